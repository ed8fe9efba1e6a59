"""As many exact keys as their errors ask for, beside as many for every sub-tile: whole models, error against cost.

All self-attention of a model is replaced, as in `eval.frontier` and on the same models. The default's error was chosen
on the even halves of the data; reported is the odd half. "fixed" is a number of keys that only the length decides.

    python -m eval.key_error --json docs/results/key_error.json     # with --model, the others' rows in it stay
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import sqrt

from astroattn import AstroConfig
from astroattn.calibration.menu import by_error
from astroattn.config import KEY_ERROR
from eval.common import JsonOption, LimitOption, SeedOption, print_rows, read_rows, run_script, write_json
from eval.frontier.cases import Case, ModelOption, choose_from_command_line
from eval.frontier.comparing import format_point
from eval.frontier.measuring import Row, Run, measure_runs, run_ours

FIXED = (0.6, 1.2, 2.4, 4.8)  # times the square root of the length: exact keys
ERRORS = (0.08, 0.04, KEY_ERROR, 0.01)


def find_runs(case: Case) -> list[tuple[Row, Run]]:
    """Each with "exact keys" in words."""
    configs = {f"fixed, {times:g} sqrt(n)": AstroConfig(exact_keys=round(times * sqrt(case.tokens))) for times in FIXED}
    configs |= {f"errors of {error:g}": by_error(case.tokens, error) for error in ERRORS}
    configs["the default"] = AstroConfig()
    return [({"exact keys": name}, partial(run_ours, config)) for name, config in configs.items()]


def format_markdown(rows: Sequence[Row]) -> str:
    """A line for each number of keys and a column per model: error, agreement (cost)."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = [f"| exact keys | {' | '.join(models)} |", "| --- " * (1 + len(models)) + "|"]
    for name in dict.fromkeys(row["exact keys"] for row in rows):
        cells = []
        for model in models:
            (row,) = (row for row in rows if (row["exact keys"], row["model"]) == (name, model))
            cells.append(format_point(row))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(json: JsonOption = None, model: ModelOption = None, limit: LimitOption = None, seed: SeedOption = 0) -> None:
    """Measure every number of exact keys in every model."""
    rows = read_rows(json) if json and model else []
    for name in choose_from_command_line(model):
        found = measure_runs(find_runs, limit, seed, name)
        print_rows(found, title=found[0]["model"])
        rows = [row for row in rows if row["model"] != found[0]["model"]] + found
        rows.sort(key=lambda row: int(row["tokens"]))
        if json:  # at once, so that a run that breaks off is not lost
            write_json(json, rows, seed=seed)
    print(format_markdown(rows))


if __name__ == "__main__":
    run_script(main)
