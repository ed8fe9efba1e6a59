"""Which peers lie below our curve, and the table of the note."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]
LONG, CHEAP = 500, 0.4  # tokens from which on, and cost up to which, no peer should lie below our curve
CHEAP_SHORT = 0.75  # what is cheap in shorter sequences, where choosing and clustering weigh more


def dominated(rows: Sequence[Row]) -> list[Row]:
    """The peers below our curve, at 500 tokens or more and a cost of at most 40 %.

    Our curve at a cost is the least error of all our lines up to it, and a straight line in both logarithms between
    two such points; before the first point it is level.
    """
    found = []
    for row in rows:
        if row["ours"] or row["tokens"] < LONG or row["cost"] > CHEAP:
            continue
        ours = [each for each in rows if each["model"] == row["model"] and each["ours"]]
        if ours and row["error"] < _curve(ours, row["cost"]):
            found.append(row)
    return found


def _curve(ours: Sequence[Row], cost: float) -> float:
    points: list[tuple[float, float]] = []
    for row in sorted(ours, key=lambda row: (row["cost"], row["error"])):
        if not points or row["error"] < points[-1][1]:
            points.append((row["cost"], row["error"]))
    costs, errors = np.log(np.maximum(points, 1e-12)).T
    return float(np.exp(np.interp(np.log(cost), costs, errors)))


def describe(row: Row) -> str:
    """A row in a sentence."""
    return f"{row['model']}: {row['line']}, {row['budget']}: error {row['error']:.4f} at {row['cost']:.1%}"


def format_point(row: Row, time: str | None = None) -> str:
    """A row in a cell of a table: error, agreement (cost), and in this form the time."""
    agreement = "" if row["agreement"] is None else f", {row['agreement']:.1%}"
    price = f"{row['cost']:.0%}" if time is None else f"{row['cost']:.0%}, {row['time']:{time}}"
    return f"{row['error']:.2g}{agreement} ({price})"


def format_markdown(rows: Sequence[Row]) -> str:
    """A markdown table with a line per method and a column per model: the least error at a low cost.

    Low is at most 40 % of softmax's products, 75 % below 500 tokens; a method with no such point shows its cheapest.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = ["| method | " + " | ".join(models) + " |", "| --- " * (len(models) + 1) + "|"]
    for line in dict.fromkeys(row["line"] for row in rows):
        cells = (_cell([row for row in rows if row["line"] == line and row["model"] == model]) for model in models)
        lines.append(f"| {line} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(rows: Sequence[Row]) -> str:
    if not rows:
        return "-"
    cheap = [row for row in rows if row["cost"] <= (CHEAP if row["tokens"] >= LONG else CHEAP_SHORT)]
    best = min(cheap, key=lambda row: row["error"]) if cheap else min(rows, key=lambda row: row["cost"])
    return format_point(best, ".2g")
