"""What the caches lose and cost, a panel each for the tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from eval.generate.reading import ORIGINAL, OURS, UNREAD, WITH_PLAN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
COLOURS = {
    OURS: "#D55E00",
    ORIGINAL: "black",
    UNREAD: "#999999",
    "window": "#0072B2",
    "StreamingLLM": "#56B4E9",
    "H2O": "#009E73",
    "TOVA": "#CC79A7",
    "SnapKV-like": "#E69F00",
    "KVMerger-like": "#8C564B",
}


def plot(results: dict[str, list[Row]]) -> Figure:
    """The panels of these tasks' rows: one a task and model; of `distance` one a length."""
    from matplotlib.figure import Figure

    panels: list[tuple[Callable[[Axes, list[Row]], None], list[Row]]] = []
    for task, rows in results.items():
        groups: dict[Any, list[Row]] = {}
        for row in rows:
            groups.setdefault((row["model"], row["tokens"] if task == "distance" else None), []).append(row)
        panels += [(PANELS[task], group) for group in groups.values()]
    columns = math.ceil(math.sqrt(len(panels)))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3.6 * lines), layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (panel, rows) in zip(grid, panels, strict=False):
        panel(axes, rows)
        axes.title.set_fontsize("medium")
        axes.grid(alpha=0.25)
    found = [axes.get_legend_handles_labels() for axes in grid]
    labels = {label: line for lines, names in found for line, label in zip(lines, names, strict=True)}
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=min(6, len(labels)), fontsize="small")
    return figure


def _plot_loss(axes: Axes, rows: list[Row]) -> None:
    length = min(row["tokens"] for row in rows)
    rows = [row for row in rows if row["tokens"] == length]
    for name in _names(rows):
        mine = [row for row in rows if row["cache"] == name and row["nats above"] > 0]
        axes.plot([row["entries"] for row in mine], [row["nats above"] for row in mine], **_style(name))
    budgets = sorted({row["entries"] for row in rows})
    axes.set(xscale="log", yscale="log", xlabel="entries per key head", ylabel="nats per token above the original")
    axes.set_xticks(budgets, map(str, budgets))
    axes.minorticks_off()
    axes.set_title(f"loss: {rows[0]['model']}, {length:,} tokens")


def _plot_kinds(axes: Axes, rows: list[Row]) -> None:
    rows = of_largest(rows, "entries", "tokens")
    kinds = list(dict.fromkeys(row["text"] for row in rows))
    for name in _names(rows):
        mine = [row for row in rows if row["cache"] == name]
        axes.plot([kinds.index(row["text"]) for row in mine], [row["nats above"] for row in mine], **_style(name))
    axes.set_xticks(range(len(kinds)), [kind.replace(", ", ",\n") for kind in kinds], fontsize="x-small")
    axes.set(ylabel="nats per token above the original")
    axes.set_title(f"kinds: {about(rows)}")


def _plot_distance(axes: Axes, rows: list[Row]) -> None:
    rows = of_largest(rows, "entries")
    for name in _names(rows):
        mine = [row for row in rows if row["cache"] == name]
        width = mine[0]["tokens"] / len(mine)
        axes.plot([row["from"] + width / 2 for row in mine], [row["nats above"] for row in mine], **_style(name))
    axes.set(xlabel="place in the text, tokens", ylabel="nats per token above the original")
    axes.set_title(f"distance: {about(rows)}")


def _plot_recall(axes: Axes, rows: list[Row]) -> None:
    rows = of_largest(rows, "entries", "tokens")
    for row in rows:
        if row["depth"] is None:
            axes.axhline(row["log p"], color=COLOURS[UNREAD], linestyle=":", label=UNREAD)
    told = [row for row in rows if row["depth"] is not None]
    for name in _names(told):
        mine = [row for row in told if row["cache"] == name]
        axes.plot([row["depth"] for row in mine], [row["log p"] for row in mine], **_style(name))
    axes.set(xlabel="depth of the needle, share of the text", ylabel="log p of its five digits")
    axes.set_title(f"recall: {about(rows)}")


def _plot_copy(axes: Axes, rows: list[Row]) -> None:
    rows = of_largest(rows, "entries")
    for name in _names(rows):
        mine = [row for row in rows if row["cache"] == name]
        axes.plot([row["gap"] for row in mine], [row["nats above"] for row in mine], **_style(name))
    gaps = sorted({row["gap"] for row in rows})
    axes.set(xscale="log", xlabel="tokens between a passage and its repetition", ylabel="nats per token above")
    axes.set_xticks(gaps, map(str, gaps))
    axes.minorticks_off()
    axes.set_title(f"copy: {about(rows)}")


def _plot_speed(axes: Axes, rows: list[Row]) -> None:
    lines = list(dict.fromkeys((row["cache"], row["entries"]) for row in rows))
    for number, (name, entries) in enumerate(lines):
        mine = [row for row in rows if (row["cache"], row["entries"]) == (name, entries)]
        style = _style(name) | {"alpha": (number + 1) / len(lines) if entries else 1}
        style["label"] = f"{name}, {entries} entries" if entries else name
        axes.plot([row["tokens"] for row in mine], [row["step ms"] for row in mine], **style)
    axes.set(xscale="log", xlabel="tokens so far", ylabel="milliseconds of a step")
    axes.set_ylim(bottom=0)
    axes.set_title(f"speed: {rows[0]['model']}")


PANELS = {
    "loss": _plot_loss,
    "kinds": _plot_kinds,
    "distance": _plot_distance,
    "recall": _plot_recall,
    "copy": _plot_copy,
    "speed": _plot_speed,
}


def _names(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["cache"] for row in rows))


def of_largest(rows: list[Row], *fields: str) -> list[Row]:
    """The rows with the largest value of these fields, or 0: entries of a cache that is not of a fixed size."""
    most = {field: max(row[field] for row in rows) for field in fields}
    return [row for row in rows if all(row[field] in (0, most[field]) for field in fields)]


def about(rows: list[Row]) -> str:
    """Model, length and budget of such rows, in words."""
    entries, tokens = (max(row[name] for row in rows) for name in ("entries", "tokens"))
    return f"{rows[0]['model']}, up to {tokens:,} tokens, {entries} entries"


def _style(name: str) -> dict[str, Any]:
    cache = name.removesuffix(WITH_PLAN)
    line = {"linewidth": 2.5 if cache == OURS else 1, "linestyle": "-" if cache == name else "--"}
    return {"color": COLOURS[cache], "marker": "o", "markersize": 3, "label": name} | line
