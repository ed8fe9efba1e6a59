"""docs/experiments/speech.md: its answer, tables and figure, made from the rows in docs/results/distill_speech.json.

python -m eval.distill_speech.page
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eval.common import fill_marks, read_rows, run_script, write_figure
from eval.distill_speech.training import (
    CONDITIONS,
    DEFAULT,
    LEARNED,
    NEAR,
    NEAR_LEARNED,
    NOTHING,
    RANDOM,
    UNIFORM,
)
from eval.trained import LAYERS, ORIGINAL, UNTRAINED, WHOLE, Figures, Row, half_width, interval, p_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Key = tuple[str, str]  # attention and training

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE, RESULTS = DOCS / "experiments" / "speech.md", DOCS / "results" / "distill_speech.json"
FIGURE = DOCS / "figures" / "distill_speech.png"
COLOURS = {UNTRAINED: "#999999", LAYERS: "#009E73", WHOLE: "#0072B2"}
LEVEL = 0.05  # of p, above which no difference is said to be shown
LOST = 0.9  # of the words, from which on a transcript is of no use
STATED: list[tuple[Key, Key]] = [  # before anything was measured
    ((NEAR_LEARNED, WHOLE), (NEAR, WHOLE)),
    ((LEARNED, WHOLE), (RANDOM, WHOLE)),
    ((NEAR_LEARNED, WHOLE), (NEAR_LEARNED, UNTRAINED)),
]
PAIRS: list[tuple[Key, Key]] = [
    *STATED,
    ((NEAR_LEARNED, LAYERS), (NEAR, UNTRAINED)),
    ((NEAR_LEARNED, WHOLE), (NEAR_LEARNED, LAYERS)),
    ((NEAR_LEARNED, WHOLE), (DEFAULT, UNTRAINED)),
    ((LEARNED, WHOLE), (LEARNED, UNTRAINED)),
    ((LEARNED, WHOLE), (UNIFORM, WHOLE)),
    ((LEARNED, WHOLE), (NOTHING, WHOLE)),
    ((LEARNED, WHOLE), (NEAR, WHOLE)),
    ((RANDOM, WHOLE), (UNIFORM, WHOLE)),
    ((NEAR, WHOLE), (NOTHING, WHOLE)),
]


MEASURES = {
    "speech": "relative error, speech",
    "all": "relative error, all frames",
    "errors": "word error",
}
ASKED = {"speech": "the error of the hidden states where there is speech", "errors": "words that differ"}


def figures(rows: Sequence[Row], key: Key, what: str) -> Figures | None:
    """None where there are no rows."""
    mine = [row for row in rows if (row["attention"], row["training"]) == key]
    if not mine:
        return None
    values = np.array([row[what] for row in mine], float)
    words = np.array([row["words"] for row in mine], float)
    return Figures(values, words if what == "errors" else np.ones_like(values))


def show(value: float, what: str, *, sign: bool = False) -> str:
    """An error with three digits, a share of words in percent."""
    shown = f"{100 * value:+.1f}" if what == "errors" else f"{value:+.3f}"
    return shown if sign else shown.removeprefix("+")


def format_results(rows: Sequence[Row]) -> str:
    """A line per attention and stage of training: means over clips and seeds, and intervals over seeds."""
    columns = ("attention", "training", "seeds", "clips shown", "CPU s", *MEASURES.values())
    lines = [f"| {' | '.join(columns)}, % |", "| --- " * len(columns) + "|"]
    order = [ORIGINAL, *CONDITIONS]
    keys = dict.fromkeys((row["attention"], row["training"]) for row in rows)
    for key in sorted(keys, key=lambda key: order.index(key[0])):
        mine = [row for row in rows if (row["attention"], row["training"]) == key]
        cells = [*key, str(len(mine)), str(mine[0]["clips"]), f"{statistics.mean(row['seconds'] for row in mine):.0f}"]
        for what in MEASURES:
            found = figures(rows, key, what)
            assert found is not None
            half = half_width(found.seeds())
            cells.append(show(found.mean(), what) + ("" if half is None else f" ± {show(half, what)}"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(rows: Sequence[Row], pair: tuple[Key, Key], what: str) -> tuple[float, float, float, float] | None:
    """First minus second: of the means, its interval, p; None where one of them was not measured."""
    some, others = (figures(rows, key, what) for key in pair)
    if some is None or others is None:
        return None
    return some.mean() - others.mean(), *interval(some, others), p_value(some, others)


def format_differences(rows: Sequence[Row]) -> str:
    """A line per pair of `PAIRS` that was measured, with intervals and p."""
    columns = ("first", "second", MEASURES["speech"], "p", f"{MEASURES['errors']}, points", "p")
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for pair in PAIRS:
        cells = [f"{attention}, {training}" for attention, training in pair]
        for what in ("speech", "errors"):
            if (found := differences(rows, pair, what)) is not None:
                mean, low, high = (show(value, what, sign=True) for value in found[:3])
                cells += [f"{mean} [{low}, {high}]", f"{found[3]:.2g}"]
        if len(cells) == len(columns):
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def format_training(rows: Sequence[Row]) -> str:
    """A line per attention and stage that was trained: steps of one clip each, the loss and the rates."""
    columns = ("attention", "training", "steps", "loss", "rate of hidden layers", "of other weights")
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    found = {(row["attention"], row["training"]): row["options"] for row in rows if row["options"]}
    for name, stage in sorted(found, key=lambda key: list(CONDITIONS).index(key[0])):
        options, hidden = found[name, stage], CONDITIONS[name].settings["hidden"] == "learned"
        rate = f"{options.get('learning_rate', 0.05):g}" if hidden else "-"
        host = f"{options['host_learning_rate']:g}" if "host_learning_rate" in options else "-"
        lines.append(f"| {name} | {stage} | {options['steps']} | {options['loss']} | {rate} | {host} |")
    return "\n".join(lines)


def format_answer(rows: Sequence[Row]) -> str:
    """What was asked before and what came of it, in sentences that the numbers make; and what can be used at all."""
    return "\n".join([*_verdicts(rows, STATED), *_uses(rows)])


def format_others(rows: Sequence[Row]) -> str:
    """What came of the other comparisons."""
    return "\n".join(_verdicts(rows, PAIRS[len(STATED) :]))


def _verdicts(rows: Sequence[Row], pairs: Sequence[tuple[Key, Key]]) -> list[str]:
    return [f"- {verdict}" for pair in pairs if (verdict := _verdict(rows, pair))]


def _uses(rows: Sequence[Row]) -> list[str]:
    """Of what is trained to the end: where the fewest words differ, and where nearly all do."""
    last = {row["attention"]: figures(rows, (row["attention"], WHOLE), "errors") for row in rows}
    shares = {name: found.mean() for name, found in last.items() if found is not None}
    if not shares:
        return []
    best, lost = min(shares, key=lambda name: shares[name]), [name for name in shares if shares[name] >= LOST]
    lines = [f"- Of all that was trained, the fewest words differ with *{best}*: {show(shares[best], 'errors')} %."]
    if (default := figures(rows, (DEFAULT, UNTRAINED), "errors")) is not None:
        lines[0] += f" With the library's *{DEFAULT}*, not trained, it is {show(default.mean(), 'errors')} %."
    if lost:
        names = ", ".join(f"*{name}*" for name in lost)
        lines.append(f"- Of no use after this training, with {LOST:.0%} of the words wrong or more: {names}.")
    found = {name: differences(rows, ((name, WHOLE), (NOTHING, WHOLE)), "speech") for name in shares if name != NOTHING}
    if no_better := [name for name, each in found.items() if each and not (_is_shown(each) and each[0] < 0)]:
        names = ", ".join(f"*{name}*" for name in no_better)
        lines.append(f"- Not shown to be less wrong than *{NOTHING}*, trained end to end too, on speech: {names}.")
    return lines


def _is_shown(found: tuple[float, float, float, float]) -> bool:
    return not found[1] <= 0 <= found[2] and found[3] < LEVEL


def _verdict(rows: Sequence[Row], pair: tuple[Key, Key]) -> str:
    (first, second), parts = (_name(key) for key in pair), []
    for what, words in ASKED.items():
        found = differences(rows, pair, what)
        if found is None:
            return ""
        means = [figures(rows, key, what) for key in pair]
        unit = " %" if what == "errors" else ""
        ours, theirs = (show(each.mean(), what) for each in means if each is not None)
        shown = "no difference shown" if not _is_shown(found) else "**less**" if found[0] < 0 else "**more**"
        parts.append(f"{words}: {ours}{unit} against {theirs}{unit}, {shown}")
    return f"{first} against {second}. {parts[0][0].upper()}{parts[0][1:]}; {parts[1]}."


def _name(key: Key) -> str:
    attention, training = key
    words = {UNTRAINED: "untrained", LAYERS: "trained layer by layer", WHOLE: "trained end to end"}
    stages = CONDITIONS[attention].stages if attention in CONDITIONS else {}
    last = "trained layer by layer and end to end" if training == WHOLE and LAYERS in stages else words[training]
    return f"*{attention[0].upper()}{attention[1:]}*, {last}"


def format_data(rows: Sequence[Row]) -> str:
    """What the figures are of."""
    original = next(row for row in rows if row["attention"] == ORIGINAL)
    clips, words, seeds = len(original["words"]), sum(original["words"]), len({row["seed"] for row in rows})
    return (
        f"Reported: {clips} clips, of which the original writes {words} words; {seeds} seeds (of neurons and of clips "
        f"shown). With {clips} clips the least p that the test can give is {2 / 2**clips:.2g}."
    )


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """Each by its mark in the page."""
    return {
        "answer": format_answer(rows),
        "others": format_others(rows),
        "data": format_data(rows),
        "training": format_training(rows),
        "results": format_results(rows),
        "differences": format_differences(rows),
    }


def plot(rows: Sequence[Row]) -> Figure:
    """A line for each attention and stage, a point for each seed, and the mean with its interval over seeds."""
    from matplotlib.figure import Figure

    order = list(CONDITIONS)
    keys = dict.fromkeys((row["attention"], row["training"]) for row in rows if row["attention"] != ORIGINAL)
    lines = sorted(keys, key=lambda key: order.index(key[0]))
    figure = Figure(figsize=(9, 0.8 + 0.3 * len(lines)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, what in zip(panels, ("speech", "errors"), strict=True):
        for place, key in enumerate(lines):
            found = figures(rows, key, what)
            assert found is not None
            scale = 100 if what == "errors" else 1
            seeds = [scale * each for each in found.seeds()]
            colour, labels = COLOURS[key[1]], axes.get_legend_handles_labels()[1]
            style = {"marker": "|", "markersize": 10, "capsize": 3, "color": colour}
            axes.plot(seeds, [place] * len(seeds), "o", markersize=3, alpha=0.4, color=colour)
            width = half_width(seeds) or 0.0
            label = None if (stage := f"training: {key[1]}") in labels else stage
            axes.errorbar(scale * found.mean(), place, xerr=width, label=label, **style)
        axes.grid(alpha=0.25)
        axes.set_xlim(left=0)
        axes.set_xlabel(MEASURES[what] + (", %" if what == "errors" else ""))
    names = [name if name not in dict(lines[:place]) else "" for place, (name, _) in enumerate(lines)]
    panels[0].set_yticks(range(len(lines)), names)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    return figure


def main() -> None:
    """Write docs/experiments/speech.md and docs/figures/distill_speech.png anew."""
    rows = read_rows(RESULTS)
    PAGE.write_text(fill_marks(PAGE.read_text("utf-8"), tables(rows)), encoding="utf-8")
    write_figure(FIGURE, plot(rows))


if __name__ == "__main__":
    run_script(main)
