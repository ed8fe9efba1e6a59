"""The rows of the measurement, and the tables that are made of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import t

from eval.common import rounded

CONFIDENCE = 0.95
QUANTITIES = ("matrix", "output", "normaliser", "block")
Row = dict[str, Any]


def make_row(model: str, layer: int | str, hidden: str, m: int, quantity: str, errors: list[float]) -> Row:
    """A row: the geometric mean over seeds with its t-interval in the logarithm, or one error that no seed changes."""
    logs = np.log(errors)
    mean, half = logs.mean(), 0.0
    if len(errors) > 1:
        half = t.ppf((1 + CONFIDENCE) / 2, len(errors) - 1) * logs.std(ddof=1) / len(errors) ** 0.5
    numbers = {"error": mean, "low": mean - half, "high": mean + half}
    return {
        "model": model,
        "layer": layer,
        "hidden": hidden,
        "m": m,
        "quantity": quantity,
        **{name: rounded(float(np.exp(number))) for name, number in numbers.items()},
    }


def select(rows: list[Row], **wanted: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def tabulate(rows: list[Row], sizes: tuple[int, ...] = (64, 1024, 16384, 131072)) -> list[dict[str, Any]]:
    """One line per model, hidden layer and m, with the error of every quantity; means over all layers."""
    table: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in rows:
        if row["layer"] == "all" and row["m"] in (1, *sizes):
            key = row["model"], row["hidden"], row["m"]
            line = table.setdefault(
                key, dict(zip(("model", "hidden", "m"), key, strict=True)) | dict.fromkeys(QUANTITIES, "-")
            )
            line[row["quantity"]] = row["error"]
    return list(table.values())


def format_markdown(rows: list[Row]) -> str:
    """The table of `tabulate` in markdown; a document that quotes it must hold it as it is."""
    lines = ["| model | hidden layer | m | " + " | ".join(QUANTITIES) + " |", "| --- " * (3 + len(QUANTITIES)) + "|"]
    for line in tabulate(rows):
        cells = (f"{x:.3f}" if isinstance(x, float) else x for x in (line[name] for name in QUANTITIES))
        lines.append(f"| {line['model']} | {line['hidden']} | {line['m']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
