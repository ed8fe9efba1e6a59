"""The words that `patch` takes for a config, in whole models: what each costs, and how far the outputs move.

All self-attention of a model is replaced, as in `eval.frontier` and on the same models; errors are those of the odd
half of the data, on which nothing was chosen. With --model, the rows of the other models in the JSON stay as they are.
Times need a machine that does nothing else.

    python -m eval.presets --json out/presets.json
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

import torch
import typer

from astroattn import PRESETS
from eval.common import JsonOption, LimitOption, SeedOption, print_rows, read_rows, rounded, run_script, write_json
from eval.frontier.cases import SOURCES, choose_sources, load_case
from eval.frontier.measuring import read_outputs, record_calls, run_ours
from eval.heads import first_items

Row = dict[str, Any]
Model = StrEnum("Model", {name: name for name in SOURCES})


def measure(limit: int | None, seed: int, name: str) -> list[Row]:
    """One row per preset in the model that `SOURCES` calls `name`.

    "error" is `what`, and "agreement" that with the original's outputs; "cost" is the products over softmax's 2N;
    "time" that of the attention of all layers on one item over SDPA's, the median of turns that time both.
    """
    torch.manual_seed(seed)
    case = load_case(name, limit)
    batches = list(case.batches("odd"))
    rows = []
    with torch.inference_mode():
        truth = read_outputs(case, batches)
        calls = record_calls(case.model, first_items(batches[0], 1))
        for preset, config in PRESETS.items():
            found, cost, time = run_ours(config, case, batches, calls)
            error, agreement = case.kind.compare(found, truth)
            row = {"model": case.title, "tokens": case.tokens, "items": len(truth), "what": case.kind.error}
            row |= {"preset": preset, "cost": cost, "time": time, "error": error, "agreement": agreement}
            rows.append(rounded(row))
    return rows


def format_markdown(rows: Sequence[Row]) -> str:
    """A markdown table with a line per model and a column per preset: error, agreement (cost, time)."""
    lines = ["| model | items | error | " + " | ".join(PRESETS) + " |", "| --- " * (3 + len(PRESETS)) + "|"]
    for model in dict.fromkeys(row["model"] for row in rows):
        found = {row["preset"]: row for row in rows if row["model"] == model}
        first = found[next(iter(PRESETS))]
        cells = [model, str(first["items"]), first["what"], *(_cell(found[preset]) for preset in PRESETS)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Row) -> str:
    agreement = "" if row["agreement"] is None else f", {row['agreement']:.1%}"
    return f"{row['error']:.2g}{agreement} ({row['cost']:.0%}, {row['time']:.2f})"


def main(
    json: JsonOption = None,
    model: Annotated[
        list[Model] | None, typer.Option(help="Only this model; may be given several times. By default all.")
    ] = None,
    limit: LimitOption = None,
    seed: SeedOption = 0,
) -> None:
    """Measure every preset in every model."""
    try:
        names = choose_sources(model)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    rows = read_rows(json) if json and model else []
    for name in names:
        found = measure(limit, seed, name)
        print_rows(found, title=found[0]["model"])
        rows = sorted(
            [row for row in rows if row["model"] != found[0]["model"]] + found, key=lambda row: int(row["tokens"])
        )
        if json:  # at once, so that a run that breaks off is not lost
            write_json(json, rows, seed=seed)
    print(format_markdown(rows))


if __name__ == "__main__":
    run_script(main, data=True)
