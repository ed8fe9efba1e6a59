"""docs/experiments/long_texts.md: its answer and tables, from the rows in docs/results/distill_long_texts.json.

python -m eval.distill_long_texts.page
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval import trained
from eval.common import fill_marks, read_rows, run_script
from eval.distill_long_texts.task import SHORT
from eval.distill_long_texts.training import (
    BAG,
    CONDITIONS,
    DEFAULT,
    HEBBIAN,
    KEYS,
    LABELS,
    LEARNED,
    LEARNED_WHOLE,
    NEAR,
    NEAR_HEBBIAN,
    NEAR_LEARNED,
    RANDOM,
    RANDOM_WHOLE,
    UNIFORM,
    UNIFORM_WHOLE,
)
from eval.trained import LAYERS, ORIGINAL, UNTRAINED, WHOLE, Figures, Key, Row, half_width, interval, p_value

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE, RESULTS = DOCS / "experiments" / "long_texts.md", DOCS / "results" / "distill_long_texts.json"
LEVEL = 0.05  # of p, above which no difference is said to be shown
TOLD: list[tuple[Key, Key]] = [  # in words
    ((NEAR_LEARNED, LAYERS), (NEAR, UNTRAINED)),
    ((LEARNED, LAYERS), (LEARNED, UNTRAINED)),
    ((LEARNED, LAYERS), (RANDOM, UNTRAINED)),
    ((LEARNED, LAYERS), (UNIFORM, UNTRAINED)),
    ((LEARNED_WHOLE, WHOLE), (LEARNED, LAYERS)),
    ((LEARNED_WHOLE, WHOLE), (RANDOM_WHOLE, WHOLE)),
    ((LEARNED_WHOLE, WHOLE), (UNIFORM_WHOLE, WHOLE)),
    ((LEARNED_WHOLE, WHOLE), (DEFAULT, UNTRAINED)),
    ((HEBBIAN, UNTRAINED), (UNIFORM, UNTRAINED)),
    ((DEFAULT, UNTRAINED), (KEYS, UNTRAINED)),
]
PAIRS: list[tuple[Key, Key]] = [
    *TOLD,
    ((DEFAULT, UNTRAINED), (ORIGINAL, LABELS)),
    ((DEFAULT, UNTRAINED), (NEAR_LEARNED, LAYERS)),
    ((DEFAULT, UNTRAINED), (HEBBIAN, UNTRAINED)),
    ((NEAR_HEBBIAN, UNTRAINED), (NEAR, UNTRAINED)),
    ((NEAR_LEARNED, LAYERS), (NEAR_LEARNED, UNTRAINED)),
    ((LEARNED, LAYERS), (HEBBIAN, UNTRAINED)),
]


def figures(rows: Sequence[Row], key: Key, what: str) -> Figures | None:
    """Of each seed and pair of documents, how many are "right" or the "same" as the original's; None: no rows."""
    mine = [row[what] for row in rows if (row["attention"], row["training"]) == key and what in row]
    if not mine:
        return None
    values = np.array([list(map(int, letters)) for letters in mine], float)
    values = values.reshape(len(mine), -1, 2).sum(-1)
    return Figures(values, np.full_like(values, 2))


def _is_shown(low: float, high: float, p: float) -> bool:
    return not low <= 0 <= high and p < LEVEL


def order_of(rows: Sequence[Row]) -> list[Key]:
    """Attentions and stages that were measured, in the order of the tables."""
    order = [ORIGINAL, BAG, *CONDITIONS]
    keys = dict.fromkeys((row["attention"], row["training"]) for row in rows)
    return sorted(keys, key=lambda key: order.index(key[0]))


def format_results(rows: Sequence[Row]) -> str:
    """A line per attention and stage of training: means over documents and seeds, intervals over seeds."""
    columns = ("attention", "training", "seeds", "documents shown", "CPU s", "right, %", "agreement, %", "KL, nats")
    columns += (f"right of {SHORT} tokens, %",)
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for key in order_of(rows):
        mine = [row for row in rows if (row["attention"], row["training"]) == key]
        cells = [*key, str(len(mine)), f"{mine[0]['documents']:.0f}"]
        cells.append(f"{statistics.mean(row['seconds'] for row in mine):.0f}")
        shares = {what: figures(rows, key, what) for what in ("right", "same", "short")}
        shown = {what: _mean([100 * each for each in found.seeds()], ".1f") for what, found in shares.items() if found}
        cells += [shown["right"], shown.get("same", "-")]
        cells += [_mean([row["KL"] for row in mine], ".3f") if "KL" in mine[0] else "-", shown.get("short", "-")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: Sequence[float], form: str) -> str:
    mean, half = format(statistics.mean(values), form), half_width(values)
    return mean if half is None else f"{mean} ± {half:{form}}"


def format_differences(rows: Sequence[Row]) -> str:
    """A line per pair of `PAIRS` that was measured: points of what is right and of agreement, with intervals and p."""
    return trained.format_differences(rows, PAIRS, ("right, points", "agreement, points"), figures)


def format_training(rows: Sequence[Row]) -> str:
    """A line per attention and stage that was trained: documents, the loss and the rates."""
    columns = (
        "attention",
        "training",
        "documents",
        "loss",
        "rate of hidden layers",
        "of other weights",
    )
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    found = {(row["attention"], row["training"]): row["options"] for row in rows if row.get("options")}
    for name, stage in (key for key in order_of(rows) if key in found):
        options, hidden = found[name, stage], CONDITIONS[name].settings["hidden"] == "learned"
        rate = f"{options.get('learning_rate', 0.05):g}" if hidden else "-"
        host = f"{options['host_learning_rate']:g}" if "host_learning_rate" in options else "-"
        shown = ", ".join(f"{size * steps} of {tokens} tokens" for tokens, size, steps in options["lessons"])
        cells = [name, stage, shown, options["loss"], rate, host]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def format_answer(rows: Sequence[Row]) -> str:
    """What came of some comparisons, and what is shown to be better than guessing, in sentences."""
    lines = []
    for first, second in TOLD:
        some, others = (figures(rows, key, "right") for key in (first, second))
        if some is None or others is None:
            continue
        shown = "no difference shown"
        if _is_shown(*interval(some, others), p_value(some, others)):
            shown = "**more**" if some.mean() > others.mean() else "**less**"
        shares = [f"{100 * each.mean():.1f} % right" for each in (some, others)]
        lines.append(f"- {_name(first)} against {_name(second)}: {shares[0]} against {shares[1]}, {shown}.")
    better: list[str] = []
    worse: list[str] = []
    for key in order_of(rows):
        found = figures(rows, key, "right")
        assert found is not None
        guess = Figures(np.ones_like(found.values[:1]), found.weights[:1])
        above = found.mean() > 0.5 and _is_shown(*interval(found, guess), p_value(found, guess))
        (better if above else worse).append(f"{_name(key)} ({100 * found.mean():.1f} %)")
    lines.append(f"- Shown to be better than guessing: {'; '.join(better) or 'none'}.")
    lines.append(f"- **Not shown to be better than guessing**: {'; '.join(worse) or 'none'}.")
    return "\n".join(lines)


def _name(key: Key) -> str:
    attention, training = key
    words = {UNTRAINED: ", untrained", LAYERS: ", trained layer by layer", LABELS: ", trained on labels", WHOLE: ""}
    return f"*{attention}*{words[training]}"


def format_data(rows: Sequence[Row]) -> str:
    """What the figures are of."""
    found = figures(rows, (ORIGINAL, LABELS), "right")
    assert found is not None
    pairs = found.values.shape[1]
    return f"Reported: {2 * pairs} documents in {pairs} pairs. Seeds are of the neurons and of the documents shown."


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """Each by its mark in the page."""
    return {
        "answer": format_answer(rows),
        "data": format_data(rows),
        "training": format_training(rows),
        "results": format_results(rows),
        "differences": format_differences(rows),
    }


def main() -> None:
    """Write docs/experiments/long_texts.md anew."""
    PAGE.write_text(fill_marks(PAGE.read_text("utf-8"), tables(read_rows(RESULTS))), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
