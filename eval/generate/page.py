"""The table of docs/generation.md, made from the committed rows."""

from __future__ import annotations

from typing import Any


def format_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: a line per cache, a column per model and budget; nats above the original, and agreement."""
    columns = list(dict.fromkeys((row["model"], row["tokens"], row["entries"]) for row in rows))
    titles = [f"{model}, {tokens:,} tokens: {entries} entries" for model, tokens, entries in columns]
    lines = ["| cache | " + " | ".join(titles) + " |", "| --- " * (len(columns) + 1) + "|"]
    found = {(row["model"], row["tokens"], row["entries"], row["cache"]): row for row in rows}
    for name in dict.fromkeys(row["cache"] for row in rows):
        cells = [_cell(found.get((*column, name))) for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    return "-" if row is None else f"{row['nats above']:.3f} ({row['agreement']:.3f})"
