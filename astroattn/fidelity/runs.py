"""Several comparisons on the same items: what differs, and whether that could be chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from astroattn.fidelity.figure import CONTROL, PATCHED
from astroattn.fidelity.metrics import METRICS, Array
from astroattn.fidelity.page import Chart, Table, draw_chart, show_both, write_page
from astroattn.fidelity.result import Fidelity
from astroattn.fidelity.saved import load_result
from astroattn.imports import needs
from astroattn.tables import Block, render
from astroattn.tables import Table as TextTable

with needs("eval"):
    import numpy as np

RESAMPLES = 2000
SUMMARY = (
    *("accuracy", "top1_agreement", "logit_error", "kl", "embedding_cosine", "same_neighbour"),
    *("hidden_error", "speech_error", "word_error"),
)
ERRORS = ("logit_error", "hidden_error", "word_error", "kl", "embedding_cosine")  # of the frontier, the first there is


class Figure(NamedTuple):
    """A figure of all items from two columns: the sum of the first over that of the second (None: their number).

    Relative errors: `numerator` is e = ||difference|| / n with the norm n; the figure is sqrt(sum (e n)^2 / sum n^2).
    """

    title: str
    numerator: str
    denominator: str | None = None
    relative: bool = False


FIGURES = (
    Figure("accuracy, top-1", "patched_correct"),
    Figure("first choice kept", "top1"),
    Figure("logit error", "logit_error", "logit_norm", relative=True),
    Figure("KL, nats", "kl"),
    Figure("embedding cosine", "cosine"),
    Figure("nearest neighbour kept", "neighbour"),
    Figure("hidden state error", "hidden_error", "hidden_norm", relative=True),
    Figure("the same, speech", "speech_error", "speech_norm", relative=True),
    Figure("word error", "word_errors", "words"),
)


@dataclass(frozen=True)
class Difference:
    """What another run changes in one figure, over the items that have it in both.

    Args:
        title: of the figure.
        items: their number.
        first, other: the figure in the two runs.
        low, high: 95 % interval of other - first, from items resampled in pairs; None for a single item.
        lost, gained: of a figure that is yes or no, items that only the first run has right, and only the other.
        p: of McNemar's exact test of the two; None for other figures.
    """

    title: str
    items: int
    first: float
    other: float
    low: float | None
    high: float | None
    lost: int | None = None
    gained: int | None = None
    p: float | None = None


@dataclass(frozen=True)
class Runs:
    """Comparisons on the same items, by name; made by `load_runs`. The others are held against the first."""

    results: Mapping[str, Fidelity]

    def differences(self, seed: int = 0) -> dict[str, list[Difference]]:
        """Per other run, every figure that it and the first have of each item."""
        (_, first), *others = self.results.items()
        return {name: _compare(first.per_item, other.per_item, seed) for name, other in others}

    def tables(self, seed: int = 0) -> list[Table]:
        """The runs side by side, and each other run against the first."""
        first = next(iter(self.results))
        tables = [_summary(self.results)]
        for name, rows in self.differences(seed).items():
            tables.append(_difference_table(f"{name} against {first}", rows, self.results[first], self.results[name]))
        return tables

    def write_page(self, path: str | Path, seed: int = 0) -> None:
        """Write one HTML page of it, which needs no network."""
        write_page(path, "runs.html", results=self.results, tables=self.tables(seed), charts=_frontier(self.results))

    def blocks(self, seed: int = 0) -> list[Block]:
        """What is printed."""
        first = next(iter(self.results.values()))
        tables = [TextTable(each.columns, each.rows, title=each.caption) for each in self.tables(seed)]
        return [f"{first.items} items of {first.data}", *tables]

    def to_dict(self, seed: int = 0) -> dict[str, Any]:
        """Per other run, what differs from the first; plain values for JSON."""
        return {name: [asdict(each) for each in rows] for name, rows in self.differences(seed).items()}

    def __str__(self) -> str:
        return render(self.blocks())


def load_runs(paths: Sequence[str | Path]) -> Runs:
    """Read results of `compare` as JSON.

    Raises:
        ValueError: fewer than two, one that cannot be read, or one that is of other items than the first, naming it.
    """
    if len(paths) < 2:
        raise ValueError(f"results: two or more are needed, got {len(paths)}")
    stems = [Path(path).stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"results: the same file twice: {max(names, key=names.count)!r}")
    results = dict(zip(names, map(load_result, paths), strict=True))
    first = names[0]
    for name in names:
        _check_items(first, results[first], name, results[name])
    return Runs(results)


def _check_items(first: str, one: Fidelity, name: str, other: Fidelity) -> None:
    if not other.per_item:
        raise ValueError(f"results: {name!r} has no per_item, so it cannot be compared item by item; measure it again")
    differ = f"results: {name!r} is of other items than {first!r}"
    if one.items != other.items:
        raise ValueError(f"{differ}: {other.items}, not {one.items}")
    for column in ("name", "digest"):
        pairs = zip(other.per_item.get(column, []), one.per_item.get(column, []), strict=False)
        for number, (mine, theirs) in enumerate(pairs):
            if mine != theirs:
                shown = other.per_item["name"][number], one.per_item["name"][number]
                raise ValueError(f"{differ}: item {number} is {shown[0]!r}, not {shown[1]!r}")
    if one.per_item["name"] == [str(number) for number in range(len(one.per_item["name"]))] and one.data != other.data:
        raise ValueError(f"{differ}: the items have no names, and {other.data!r} is not {one.data!r}")


def _compare(first: Mapping[str, list[Any]], other: Mapping[str, list[Any]], seed: int) -> list[Difference]:
    found = []
    for figure in FIGURES:
        needed = [name for name in (figure.numerator, figure.denominator) if name]
        if all(name in run for run in (first, other) for name in needed):
            parts = [_parts(figure, run) for run in (first, other)]
            there = np.all([np.isfinite(part) for pair in parts for part in pair], axis=0)
            if there.any():
                found.append(_difference(figure, [(x[there], y[there]) for x, y in parts], seed))
    return found


def _parts(figure: Figure, run: Mapping[str, list[Any]]) -> tuple[Array, Array]:
    """Numerator and denominator of each item."""
    above = np.array(run[figure.numerator], dtype=float)
    below = np.ones_like(above) if figure.denominator is None else np.array(run[figure.denominator], dtype=float)
    return ((above * below) ** 2, below**2) if figure.relative else (above, below)


def _difference(figure: Figure, parts: list[tuple[Array, Array]], seed: int) -> Difference:
    from scipy import stats

    def total(above: Array, below: Array, axis: int = -1) -> Array:
        ratio: Array = above.sum(axis) / np.maximum(below.sum(axis), np.finfo(float).tiny)
        return np.sqrt(ratio) if figure.relative else ratio

    def difference(a: Array, b: Array, c: Array, d: Array, axis: int = -1) -> Array:
        return total(c, d, axis) - total(a, b, axis)

    (above, below), (other_above, other_below) = parts
    low = high = None
    if len(above) > 1:
        interval = stats.bootstrap(
            (above, below, other_above, other_below), difference, paired=True, vectorized=True, method="percentile",
            n_resamples=RESAMPLES, batch=max(1, 1_000_000 // len(above)), random_state=np.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
        low, high = float(interval.low), float(interval.high)
    lost = gained = p = None
    if figure.denominator is None and np.isin([above, other_above], (0, 1)).all():
        lost, gained = int((above > other_above).sum()), int((above < other_above).sum())
        p = float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
    one, other = (float(total(x, y)) for x, y in parts)
    return Difference(figure.title, len(above), one, other, low, high, lost, gained, p)


def _relative_time(result: Fidelity) -> float:
    return result.value("seconds") / result.value("seconds", "original")


def _summary(results: Mapping[str, Fidelity]) -> Table:
    there = [key for key in SUMMARY if any(key in result.rows["patched"].values for result in results.values())]
    rows = []
    for name, result in results.items():
        values = result.rows["patched"].values
        rows.append(
            [
                name,
                show_both("positions", values.get("positions")),
                show_both("cost", values.get("cost")),
                f"{_relative_time(result):.2f}",
                *(show_both(key, values.get(key)) for key in there),
            ]
        )
    columns = ["run", "positions", "cost", "time / original", *(METRICS[key].label for key in there)]
    return Table("Runs, with 95 % intervals", columns, rows)


def _difference_table(caption: str, found: list[Difference], first: Fidelity, other: Fidelity) -> Table:
    rows = []
    for each in found:
        interval = "" if each.low is None else f"[{each.low:+.3g}, {each.high:+.3g}]"
        counts = "" if each.p is None else f"{each.lost} / {each.gained}"
        p = "" if each.p is None else f"{each.p:.3g}"
        change = f"{each.other - each.first:+.3g}"
        rows.append(
            [each.title, str(each.items), f"{each.first:.4g}", f"{each.other:.4g}", change, interval, counts, p]
        )
    ratios = {"time / original": (_relative_time(first), _relative_time(other))}
    if "cost" in first.rows["patched"].values and "cost" in other.rows["patched"].values:
        ratios = {"cost": (first.value("cost"), other.value("cost"))} | ratios
    for title, (one, two) in ratios.items():
        rows.append([title, "", f"{one:.4g}", f"{two:.4g}", f"× {two / one:.3f}" if one else "", "", "", ""])
    columns = ["figure", "items", "first", "other", "change", "95 % interval", "only first / only other", "McNemar p"]
    return Table(caption, columns, rows)


def _frontier(results: Mapping[str, Fidelity]) -> list[Chart]:
    """Error against cost of all runs that have both."""
    runs = {name: result.rows["patched"].values for name, result in results.items()}
    key = next((key for key in ERRORS if all(key in values for values in runs.values())), None)
    if key is None or not all("cost" in values for values in runs.values()):
        return []
    label = f"1 - {METRICS[key].label}" if key == "embedding_cosine" else METRICS[key].label

    def draw(axes: Any) -> None:
        for name, values in runs.items():
            cost, error = values["cost"].value, values[key].value
            error = 1 - error if key == "embedding_cosine" else error
            axes.plot(cost, error, "o", markersize=7, color=PATCHED)
            plain = name.replace("$", r"\$")  # no formula
            axes.annotate(plain, (cost, error), (6, 4), textcoords="offset points", fontsize=8, color="black")
        axes.set_xlabel("cost: products over those of softmax attention")
        axes.set_ylabel(label)
        axes.plot(1, 0, "o", markersize=7, color=CONTROL, clip_on=False)
        axes.annotate("original", (1, 0), (6, 4), textcoords="offset points", fontsize=8, color="black")
        axes.set_xlim(0, max(1.15, axes.get_xlim()[1]))
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)

    return [
        draw_chart("frontier", f"{label} against cost", "Lower left is better; the figures are in the table.", draw)
    ]
