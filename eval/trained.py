"""What the experiments that train attentions share: conditions in stages, rows that go on, and paired statistics."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray
from scipy.stats import permutation_test
from scipy.stats import t as student
from tqdm import tqdm

from eval.common import read_rows, write_json

Row = dict[str, Any]
Key = tuple[str, str]  # attention and training
Options = dict[str, Any]  # of a Distiller, with "steps" and what else a step of the experiment needs

ORIGINAL, UNTRAINED, LAYERS, WHOLE = "original", "none", "layer by layer", "and end to end"
PLACED = {"exact_keys": 0, "tiles": "position"}  # a near field of the tokens around each
RESAMPLES, CONFIDENCE = 1999, 0.95

RateOption = Annotated[
    float | None,
    typer.Option("--rate", help="Of all weights outside the hidden layers, in the place of each attention's own."),
]


@dataclass(frozen=True)
class Condition:
    """An attention and how it is trained: the options of each stage, after which it is measured."""

    settings: Mapping[str, Any]  # of AstroConfig
    stages: Mapping[str, Options] = field(default_factory=dict)
    untrained: bool = False  # whether it is measured before, too, with the first seed


def run_stages(
    condition: Condition, before: bool, rate: float | None, train: Callable[[Options], None]
) -> Iterator[tuple[str, Options | None, float]]:
    """Each stage after it was trained, its options, and CPU seconds so far; `before` any, one that is none.

    A rate takes the place of that of the weights outside the hidden layers.
    """
    seconds = 0.0
    if before:
        yield UNTRAINED, None, seconds
    for stage, options in condition.stages.items():
        options = options if rate is None else options | {"host_learning_rate": rate}
        start = time.process_time()
        train(options)
        seconds += time.process_time() - start
        yield stage, options, seconds


def start_rows(json: Path | None, rate: float | None) -> list[Row]:
    """The rows that are there already; a usage error where they are of another rate."""
    rows = read_rows(json) if json else []
    if any(row.get("rate") != rate for row in rows if row["attention"] != ORIGINAL):
        raise typer.BadParameter(f"--rate: {json} has rows of another rate, or of each attention's own")
    return rows


def add_rows(
    rows: list[Row], wanted: Iterable[tuple[int, str]], run: Callable[[str, int], list[Row]], json: Path | None
) -> None:
    """Add what is not there yet of the wanted seeds and attentions, and write all whenever there is more."""
    there = {(row["seed"], row["attention"]) for row in rows}
    for seed, name in (bar := tqdm([each for each in wanted if each not in there], unit="model")):
        bar.set_description(f"{name}, seed {seed}")
        rows += run(name, seed)
        if json:  # at once, so that a run that breaks off is not lost
            write_json(json, rows, seed=0)


class Figures(NamedTuple):
    """Of one attention and stage, each [seeds, items]: a measure and what it is a share of."""

    values: NDArray[Any]
    weights: NDArray[Any]

    def mean(self) -> float:
        """Over items and seeds: the share, which is the mean where weights are one."""
        return float(self.values.sum() / self.weights.sum())

    def seeds(self) -> list[float]:
        """The same of each seed."""
        return [float(each) for each in self.values.sum(1) / self.weights.sum(1)]


def half_width(values: Sequence[float]) -> float | None:
    """Of the 95 % interval of a mean by Student's t; None of a single value."""
    if len(values) < 2:
        return None
    return float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def interval(some: Figures, others: Figures) -> tuple[float, float]:
    """95 % of the difference of the means, by a bootstrap over items, which are paired, and over the seeds of each."""
    draw, found = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        items = draw.integers(some.values.shape[1], size=some.values.shape[1])
        means = []
        for each in (some, others):
            seeds = draw.integers(len(each.values), size=len(each.values))
            means.append(Figures(*(x[seeds][:, items] for x in each)).mean())
        found.append(means[0] - means[1])
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def format_differences(
    rows: Sequence[Row],
    pairs: Iterable[tuple[Key, Key]],
    columns: tuple[str, str],
    figures: Callable[[Sequence[Row], Key, str], Figures | None],
) -> str:
    """A line per pair that was measured: points of "right" and "same", which the columns name, with intervals and p."""
    heads = ("first", "second", columns[0], "p", columns[1], "p")
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for pair in pairs:
        cells = [f"{attention}, {training}" for attention, training in pair]
        for what in ("right", "same"):
            some, others = (figures(rows, key, what) for key in pair)
            if some is None or others is None:
                break
            low, high = interval(some, others)
            difference = 100 * (some.mean() - others.mean())
            cells += [f"{difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]", f"{p_value(some, others):.2g}"]
        else:
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def p_value(some: Figures, others: Figures) -> float:
    """Of a paired permutation test over items, each with the mean of its seeds, two-sided."""
    found = permutation_test(
        (some.values.mean(0), others.values.mean(0)),
        lambda x, y, axis: (x - y).mean(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=0,
    )
    return float(found.pvalue)
