"""The tables and the figure of docs/experiments/photos.md, made from the rows in docs/results/distill_photos*.json.

python -m eval.distill_photos.page
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eval import trained
from eval.common import fill_marks, read_rows, run_script, show, spread, write_figure
from eval.distill_photos.training import (
    BY_LAYERS,
    CHOSEN,
    CHOSEN_HEBBIAN,
    CHOSEN_LEARNED,
    CONDITIONS,
    LEARNED,
    LEAST_NEAR,
    LONGER,
    NEAR,
    NEAR_LEARNED,
    NEAR_LONGER,
    RANDOM,
    UNIFORM,
    WIDE,
    WIDE_LONGER,
)
from eval.trained import LAYERS, ORIGINAL, UNTRAINED, WHOLE, Figures, Key, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


DOCS = Path(__file__).parent.parent.parent / "docs"
RESULTS, FIGURE = DOCS / "results" / "distill_photos.json", DOCS / "figures" / "photos.png"
LARGE = DOCS / "results" / "distill_photos_448.json"  # of 448 pixels
COLOURS = {NEAR_LEARNED: "#0072B2", NEAR: "#999999", WIDE: "#009E73", LEARNED: "#CC79A7", RANDOM: "#D55E00"}
GOAL = 0.7  # of the original's top-1, for pure linear attention
PAIRS: list[tuple[Key, Key]] = [
    ((NEAR_LEARNED, WHOLE), (ORIGINAL, UNTRAINED)),
    ((NEAR_LEARNED, LAYERS), (NEAR, UNTRAINED)),
    ((NEAR_LEARNED, WHOLE), (NEAR, WHOLE)),
    ((LEARNED, WHOLE), (LEARNED, LAYERS)),
    ((LEARNED, WHOLE), (RANDOM, WHOLE)),
    ((LEARNED, WHOLE), (UNIFORM, WHOLE)),
    ((LONGER, WHOLE), (LEARNED, WHOLE)),
    ((WIDE, LAYERS), (LEARNED, LAYERS)),
    ((WIDE, WHOLE), (LEARNED, WHOLE)),
    ((WIDE, WHOLE), (NEAR, WHOLE)),
    ((WIDE_LONGER, WHOLE), (WIDE, WHOLE)),
    ((BY_LAYERS, WHOLE), (WIDE, WHOLE)),
    ((BY_LAYERS, WHOLE), (WIDE_LONGER, WHOLE)),
    ((BY_LAYERS, WHOLE), (ORIGINAL, UNTRAINED)),
    ((NEAR_LONGER, WHOLE), (NEAR_LEARNED, WHOLE)),
    ((NEAR_LONGER, WHOLE), (ORIGINAL, UNTRAINED)),
    ((RANDOM, WHOLE), (UNIFORM, WHOLE)),
    ((LEARNED, WHOLE), (LEAST_NEAR, WHOLE)),
    ((NEAR, WHOLE), (LEAST_NEAR, WHOLE)),
    ((CHOSEN_LEARNED, WHOLE), (CHOSEN, WHOLE)),
    ((CHOSEN_LEARNED, WHOLE), (CHOSEN_HEBBIAN, WHOLE)),
    ((CHOSEN_HEBBIAN, WHOLE), (CHOSEN_HEBBIAN, UNTRAINED)),
    ((CHOSEN_LEARNED, WHOLE), (NEAR_LEARNED, WHOLE)),
]


def flags(rows: Sequence[Row], key: Key, what: str) -> Figures | None:
    """Of each seed and photo whether the choice is "right" or the "same" as the original's [S, P]; None: no rows."""
    mine = [row for row in rows if (row["attention"], row["training"]) == key]
    values = np.array([list(map(int, row[what])) for row in mine], float)
    return Figures(values, np.ones_like(values)) if mine else None


def format_results(rows: Sequence[Row]) -> str:
    """A line per attention and stage of training, means over seeds."""
    columns = ("attention", "training", "seeds", "photos shown", "CPU s", "top-1, %", "of the original's")
    lines = [f"| {' | '.join((*columns, 'agreement, %', 'KL, nats'))} |", "| --- " * (len(columns) + 2) + "|"]
    original = flags(rows, (ORIGINAL, UNTRAINED), "right")
    assert original is not None
    order = [ORIGINAL, *CONDITIONS]
    keys = dict.fromkeys((row["attention"], row["training"]) for row in rows)
    for key in sorted(keys, key=lambda key: order.index(key[0])):
        mine = [row for row in rows if (row["attention"], row["training"]) == key]
        cells = [*key, str(len(mine)), str(mine[0]["photos"]), f"{statistics.mean(row['seconds'] for row in mine):.0f}"]
        shares = {what: [100 * row[what].count("1") / len(row[what]) for row in mine] for what in ("right", "same")}
        cells += [_mean(shares["right"], ".1f"), f"{statistics.mean(shares['right']) / original.mean():.0f} %"]
        cells += [_mean(shares["same"], ".1f"), _mean([row["KL"] for row in mine], ".3f")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: Sequence[float], form: str) -> str:
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {show(spread(values), form)}"


def format_differences(rows: Sequence[Row]) -> str:
    """A line per pair of `PAIRS` that was measured: points of top-1 and of agreement, with intervals and p."""
    return trained.format_differences(rows, PAIRS, ("top-1, points", "agreement, points"), flags)


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """Each by its mark in the page."""
    large = read_rows(LARGE)
    return {
        "results": format_results(rows),
        "differences": format_differences(rows),
        "results-448": format_results(large),
        "differences-448": format_differences(large),
    }


def plot(rows: Sequence[Row]) -> Figure:
    """Top-1 on the odd half against CPU seconds, a line for each attention and length of training, means over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    original = 100 * next(row["right"].count("1") / len(row["right"]) for row in rows if row["attention"] == ORIGINAL)
    for height, style, name in ((original, "--", "original"), (GOAL * original, ":", f"{GOAL:.0%} of the original's")):
        axes.axhline(height, linestyle=style, color="black", linewidth=1, label=name)
    named: set[str] = set()
    for attention in dict.fromkeys(row["attention"] for row in rows):
        family = attention.partition(",")[0]
        if family not in COLOURS:
            continue
        points = []
        for stage in (UNTRAINED, LAYERS, WHOLE):
            if mine := [row for row in rows if (row["attention"], row["training"]) == (attention, stage)]:
                shares = [100 * row["right"].count("1") / len(row["right"]) for row in mine]
                seconds = statistics.mean(row["seconds"] for row in mine)
                points.append((seconds, statistics.mean(shares), spread(shares) or 0.0))
        seconds, means, spreads = zip(*points, strict=True)
        label = None if family in named else family
        axes.errorbar(seconds, means, spreads, marker="o", markersize=4, capsize=2, color=COLOURS[family], label=label)
        named.add(family)
    axes.set(xlabel="CPU seconds of training, one thread", ylabel="top-1, %", ylim=(0, 100))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def main() -> None:
    """Write docs/experiments/photos.md and docs/figures/photos.png anew."""
    page, rows = DOCS / "experiments" / "photos.md", read_rows(RESULTS)
    page.write_text(fill_marks(page.read_text("utf-8"), tables(rows)), encoding="utf-8")
    write_figure(FIGURE, plot(rows))


if __name__ == "__main__":
    run_script(main)
