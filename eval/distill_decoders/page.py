"""The tables and the figure of docs/experiments/decoders.md, made from the rows in docs/results.

python -m eval.distill_decoders.page
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.common import fill_marks, read_rows, run_script, show, write_figure
from eval.distill_decoders.training import LEARNED, NEAR, RANDOM, START, TRANSFER, TUNED
from eval.generate.page import format_table
from eval.trained import half_width

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE, FIGURE = DOCS / "experiments" / "decoders.md", DOCS / "figures" / "decoders.png"
FILES = {name: DOCS / "results" / f"distill_decoders_{name}.json" for name in ("stories", "smollm2")}
LOSS, CURVE, RECALL = "loss", "curve", "recall"
STAGES = {START: "-", TRANSFER: "layer by layer", TUNED: "and adapters"}
ORDER = (NEAR, RANDOM, LEARNED, "streaming memory")
COLOURS = {LEARNED: "#0072B2", RANDOM: "#D55E00", NEAR: "#999999"}


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half the width of its interval by Student's t; None of a single value."""
    return statistics.mean(values), half_width(values)


def of_texts(rows: Sequence[Row]) -> list[float]:
    """The nats above the original of each text, the mean of the seeds."""
    return [statistics.mean(each) for each in zip(*(row["texts"] for row in rows), strict=True)]


def format_loss(rows: Sequence[Row]) -> str:
    """A line per kind and stage: nats above the original with the intervals over seeds and over texts, and agreement.

    The last column is what the near field alone loses more, text by text, with its interval.
    """
    columns = ("attention", "trained", "seeds", "CPU minutes", "nats above, over seeds", "over texts", "agreement")
    lines = [f"| {' | '.join(columns)} | less than near alone |", "| --- " * 8 + "|"]
    rows = [row for row in rows if row["measure"] == LOSS]
    alone = of_texts(_mine(rows, NEAR, START))
    for name, stage in [(name, stage) for name in ORDER for stage in STAGES]:
        if not (mine := _mine(rows, name, stage)):
            continue
        texts = of_texts(mine)
        gains = [theirs - ours for theirs, ours in zip(alone, texts, strict=True)]
        cells = [
            f"{name}, {mine[0]['entries']} entries" if mine[0].get("entries") else name,
            STAGES[stage],
            str(len(mine)),
            show(statistics.mean(row["minutes"] for row in mine) if "minutes" in mine[0] else None, ".1f"),
            _with_width(interval([row["nats above"] for row in mine])),
            _with_width(interval(texts)),
            f"{statistics.mean(row['agreement'] for row in mine):.3f}",
            _with_width(interval(gains)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def format_recall(rows: Sequence[Row]) -> str:
    """A line per kind and stage, a column per depth: the share of right answers, and the log-probability of the digits.

    Both are means over the seeds, and over the numbers at a depth.
    """
    rows = [row for row in rows if row["measure"] == RECALL]
    depths = sorted({row["depth"] for row in rows})
    cells: dict[tuple[str, float], str] = {}
    for name, stage in [(name, stage) for name in ("original", *ORDER) for stage in STAGES]:
        mine = _mine(rows, name, stage)
        title = name if stage == START else f"{name}, {STAGES[stage]}"
        for depth in {row["depth"] for row in mine}:
            exact, log_p = (
                statistics.mean(row[key] for row in mine if row["depth"] == depth) for key in ("exact", "log p")
            )
            cells[title, depth] = f"{exact:.2f} ({log_p:.1f})"
    return format_table("attention", {depth: f"depth {depth:.0%}" for depth in depths}, cells)


def _mine(rows: Sequence[Row], attention: str, training: str) -> list[Row]:
    return [row for row in rows if (row["attention"], row["training"]) == (attention, training)]


def _with_width(found: tuple[float, float | None]) -> str:
    mean, half = found
    return f"{round(mean, 3) + 0.0:.3f}" + ("" if half is None else f" ± {half:.3f}")


TABLES: dict[str, tuple[str, Callable[[Sequence[Row]], str]]] = {
    "stories": ("stories", format_loss),
    "smollm2": ("smollm2", format_loss),
    "recall": ("smollm2", format_recall),
}


def fill(page: str, results: dict[str, list[Row]]) -> str:
    """The page with each table between its two marks."""
    return fill_marks(page, {name: table(results[of]) for name, (of, table) in TABLES.items()})


def plot(results: dict[str, list[Row]]) -> Figure:
    """Nats above the original on the texts held out against CPU minutes of training, a panel each decoder."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(results), 3.8), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, rows in zip(panels, results.values(), strict=True):
        curves = [row for row in rows if row["measure"] == CURVE]
        for name, colour in COLOURS.items():
            for seed in sorted({row["seed"] for row in curves if row["attention"] == name}):
                mine = [row for row in curves if (row["attention"], row["seed"]) == (name, seed)]
                points = np.array([(row["minutes"], row["nats above"]) for row in mine])
                axes.plot(*points.T, marker="o", markersize=3, color=colour, alpha=0.8, label=name)
        near, neurons = rows[0]["near"], rows[0]["neurons"]
        axes.set(xlabel="CPU minutes of training, one thread", ylabel="nats per token above the original")
        axes.set_title(f"{rows[0]['model']}, near {near}, {neurons} neurons", fontsize="medium")
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
    labels = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=len(labels), fontsize="small")
    return figure


def main() -> None:
    """Write docs/experiments/decoders.md and docs/figures/decoders.png anew."""
    results = {name: read_rows(path) for name, path in FILES.items()}
    PAGE.write_text(fill(PAGE.read_text("utf-8"), results), encoding="utf-8")
    write_figure(FIGURE, plot(results))


if __name__ == "__main__":
    run_script(main)
