"""The words that `patch` takes for a config, in whole models: what each costs, and how far the outputs move.

All self-attention of a model is replaced, as in `eval.frontier` and on the same models; errors are those of the odd
half of the data, on which nothing was chosen. With --model, the rows of the other models in the JSON stay as they are.
Times need a machine that does nothing else.

    python -m eval.presets --json out/presets.json
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from astroattn import PRESETS
from eval.common import JsonOption, LimitOption, SeedOption, print_rows, read_rows, run_script, write_json
from eval.frontier.cases import ModelOption, choose_from_command_line
from eval.frontier.comparing import format_point
from eval.frontier.measuring import Row, measure_runs, run_ours


def measure(limit: int | None, seed: int, name: str) -> list[Row]:
    """One row per preset: `measure_runs`, with "preset"."""
    runs = [({"preset": preset}, partial(run_ours, config)) for preset, config in PRESETS.items()]
    return measure_runs(lambda case: runs, limit, seed, name)


def format_markdown(rows: Sequence[Row]) -> str:
    """A markdown table with a line per model and a column per preset: error, agreement (cost, time)."""
    lines = ["| model | items | error | " + " | ".join(PRESETS) + " |", "| --- " * (3 + len(PRESETS)) + "|"]
    for model in dict.fromkeys(row["model"] for row in rows):
        found = {row["preset"]: row for row in rows if row["model"] == model}
        first = found[next(iter(PRESETS))]
        cells = [model, str(first["items"]), first["what"], *(format_point(found[preset], ".2f") for preset in PRESETS)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    json: JsonOption = None,
    model: ModelOption = None,
    limit: LimitOption = None,
    seed: SeedOption = 0,
) -> None:
    """Measure every preset in every model."""
    names = choose_from_command_line(model)
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
