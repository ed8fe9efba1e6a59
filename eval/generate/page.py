"""The tables and the figure of docs/generation.md, made from the rows in docs/results.

python -m eval.generate.page
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from eval.common import fill_marks, run_script, write_figure
from eval.generate.distance import BUCKETS
from eval.generate.figure import Row, about, of_largest, plot

DOCS = Path(__file__).parent.parent.parent / "docs"
MISSING = "(not measured yet)"


def format_loss(rows: list[Row]) -> str:
    """A line per cache, a column per model, length and budget; nats above the original, and agreement."""

    def column(row: Row) -> str:
        return f"{row['model']}, {row['tokens']:,} tokens: {row['entries']} entries"

    cells = {(row["cache"], column(row)): f"{row['nats above']:.3f} ({row['agreement']:.3f})" for row in rows}
    return format_table("cache", {column(row): column(row) for row in rows}, cells)


def format_kinds(rows: list[Row]) -> str:
    """A line per text and a column per budget and cache; nats above, and agreement."""

    def column(row: Row) -> str:
        return f"{row['entries']} entries: {row['cache']}"

    cells = {(row["text"], column(row)): f"{row['nats above']:.3f} ({row['agreement']:.3f})" for row in rows}
    return format_table(
        f"{rows[0]['model']}, {rows[0]['tokens']:,} tokens", {column(r): column(r) for r in rows}, cells
    )


def format_distance(rows: list[Row]) -> str:
    """A table per length: a line per cache, a column from the start to a sixteenth, and for each time as much."""
    lengths = sorted({row["tokens"] for row in rows})
    return "\n\n".join(_distance_of([row for row in rows if row["tokens"] == length]) for length in lengths)


def _distance_of(rows: list[Row]) -> str:
    rows = of_largest(rows, "entries")
    width = min(row["from"] for row in rows if row["from"])
    edges = [0, width, 2 * width, 4 * width, 8 * width, BUCKETS * width - width, BUCKETS * width]
    spans = list(pairwise(edges))
    columns = {first: f"{first:,} to {last:,}" for first, last in spans}
    cells = {}
    for name in dict.fromkeys(row["cache"] for row in rows):
        for first, last in spans:
            mine = [row for row in rows if row["cache"] == name and first <= row["from"] < last]
            mean = sum(row["nats above"] * row["scored"] for row in mine) / sum(row["scored"] for row in mine)
            cells[name, first] = f"{mean:.3f}"
    return format_table(about(rows), columns, cells)


def format_recall(rows: list[Row]) -> str:
    """A line per cache, a column per depth; the share of right answers, and the log-probability of the digits."""
    rows = of_largest(rows, "entries", "tokens")
    depths = sorted({row["depth"] for row in rows if row["depth"] is not None})
    cells = {
        (row["cache"], depth): f"{row['exact']:.2f} ({row['log p']:.1f})"
        for row in rows
        for depth in ([row["depth"]] if row["depth"] is not None else depths)
    }
    return format_table(about(rows), {depth: f"depth {depth:.0%}" for depth in depths}, cells)


def format_copy(rows: list[Row]) -> str:
    """A line per cache, a column per gap; nats above the original, and the share of what there is to lose."""
    rows = of_largest(rows, "entries")
    columns = {row["gap"]: f"after {row['gap']:,} tokens" for row in rows}
    cells = {}
    for row in rows:
        nats, lost = round(row["nats above"], 2) + 0.0, round(row["lost"], 2) + 0.0  # not -0
        cells[row["cache"], row["gap"]] = f"{nats:.2f} ({lost:.0%})"
    return format_table(about(rows), columns, cells)


def format_speed(rows: list[Row]) -> str:
    """A line per model and budget, a column per length; milliseconds and megabytes. The last is the growth."""

    def line(row: Row) -> str:
        return f"{row['model']}, {row['cache']}" + (f", {row['entries']} entries" if row["entries"] else "")

    columns: dict[Any, str] = {tokens: f"{tokens:,}" for tokens in sorted({row["tokens"] for row in rows})}
    cells = {(line(row), row["tokens"]): f"{row['step ms']:.2f} ({row['cache MB']:.2f})" for row in rows}
    for row in rows:  # the longest of a line comes last
        if row["growth"] is not None:
            cells[line(row), "growth"] = f"{row['growth']:.2f}"
    return format_table("ms a token (MB)", columns | {"growth": "growth"}, cells)


def format_table(corner: str, columns: dict[Any, str], cells: dict[tuple[str, Any], str]) -> str:
    """A Markdown table with a column per key of `columns`; cells by line and column."""
    lines = [f"| {corner} | " + " | ".join(columns.values()) + " |", "| --- " * (len(columns) + 1) + "|"]
    for name in dict.fromkeys(line for line, _ in cells):
        lines.append(f"| {name} | " + " | ".join(cells.get((name, column), "-") for column in columns) + " |")
    return "\n".join(lines)


FORMATS: dict[str, Callable[[list[Row]], str]] = {
    "loss": format_loss,
    "kinds": format_kinds,
    "distance": format_distance,
    "recall": format_recall,
    "copy": format_copy,
    "speed": format_speed,
}


def load_results() -> dict[str, list[Row]]:
    """The committed rows of each task that was measured, in one file or several (`generate_loss_stories.json` ...)."""
    results: dict[str, list[Row]] = {}
    for task in FORMATS:
        for path in sorted((DOCS / "results").glob(f"generate_{task}*.json")):
            results.setdefault(task, []).extend(json.loads(path.read_text("utf-8"))["rows"])
    return results


def fill(page: str, results: dict[str, list[Row]]) -> str:
    """The page with the table of each task between its two marks, `<!-- task -->` and `<!-- end -->`."""
    tables = {task: table(results[task]) if task in results else MISSING for task, table in FORMATS.items()}
    return fill_marks(page, tables)


def main() -> None:
    """Write docs/generation.md and docs/figures/generate.png anew."""
    results = load_results()
    page = DOCS / "generation.md"
    page.write_text(fill(page.read_text("utf-8"), results), encoding="utf-8")
    write_figure(DOCS / "figures" / "generate.png", plot(results))


if __name__ == "__main__":
    run_script(main)
