"""Whether a patched model stands in for the original: a test of non-inferiority with a tolerance."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

from astroattn.fidelity import metrics
from astroattn.fidelity.metrics import Value
from astroattn.imports import needs
from astroattn.plan import FALLING as FALLING_PLANNED
from astroattn.plan import METRICS as PLANNED

with needs("eval"):
    import numpy as np

if TYPE_CHECKING:
    from astroattn.fidelity.result import Fidelity

MEASURED = {  # what a tolerance can be of, and its name among the figures of a comparison
    "top1": "top1_agreement",
    "kl": "kl",
    "cosine": "embedding_cosine",
    "neighbour": "same_neighbour",
    "word_error": "word_error",
    "hidden_error": "hidden_error",
}
AUTO = ("top1", "cosine", "word_error", "hidden_error", "kl")  # the first that was measured
MEANINGS = {
    **PLANNED,
    "word_error": "the share of words that differ from the original's own transcripts",
    "hidden_error": "the relative error of the last hidden states",
}
FALLING = (*FALLING_PLANNED, "word_error", "hidden_error")  # metrics of which less is better


@dataclass(frozen=True)
class Verdict:
    """How true the patched model is to the original by one metric, and whether that is within a tolerance.

    Args:
        metric: a name in `MEASURED`.
        value: the figure with its 95 % interval.
        items: the number of items it is of.
        tolerance: what was asked for; None for nothing.
        nonfinite: items of which the patched model gave NaN or infinity; then there is no figure, and nothing is kept.
    """

    metric: str
    value: Value
    items: int
    tolerance: float | None = None
    nonfinite: int = 0

    @property
    def bound(self) -> float:
        """The end of the interval that a tolerance is held against: the low one, or the high one of an error."""
        bound = self.value.high if self.metric in FALLING else self.value.low
        return float("nan") if bound is None else bound

    @property
    def margin(self) -> float | None:
        """How far the bound is within the tolerance; below 0 where it is not, None without a tolerance."""
        if self.tolerance is None:
            return None
        return self.tolerance - self.bound if self.metric in FALLING else self.bound - self.tolerance

    @property
    def kept(self) -> bool | None:
        """Whether the bound is within the tolerance; None without a tolerance."""
        return None if self.margin is None else bool(self.margin >= 0)  # false for NaN

    @property
    def reason(self) -> str:
        """The figure, its interval and the tolerance, in words."""
        if self.nonfinite:
            return f"the patched model gave NaN or infinity for {self.nonfinite} of {self.items} items"
        limit = "at most" if self.metric in FALLING else "at least"
        text = f"{MEANINGS[self.metric]} is {self.value.value:.4f} on {self.items} items"
        if self.value.low is not None and self.value.high is not None:
            text += f" (95 % interval {self.value.low:.4f} to {self.value.high:.4f})"
        if self.margin is None or self.tolerance is None:
            return f"{text}; no tolerance was asked for"
        verb = "keeps" if self.kept else "misses"
        text += f"; asked for: {limit} {self.tolerance:g}, which the interval {verb} by {abs(self.margin):.4f}"
        near = self.value.value <= self.tolerance if self.metric in FALLING else self.value.value >= self.tolerance
        return f"{text} (the figure itself is within it: more items may show it)" if near and not self.kept else text

    def __str__(self) -> str:
        titles = {
            None: "not tested",
            True: "stands in for the original",
            False: "not shown to stand in for the original",
        }
        return f"{titles[self.kept]}: {self.reason}"


def check_tolerance(metric: str, tolerance: float | None) -> None:
    """Raise ValueError for a metric that is not known, or a tolerance that it cannot have."""
    if metric not in (names := ("auto", *MEASURED)):
        raise ValueError(f"metric: must be one of {', '.join(names)}, got {metric!r}")
    if tolerance is None:
        return
    falling = metric in FALLING
    if not isfinite(tolerance) or tolerance <= 0 or (not falling and metric != "auto" and tolerance >= 1):
        raise ValueError(f"tolerance: must be above 0{'' if falling else ' and below 1'}, got {tolerance:g}")


def judge(result: Fidelity, metric: str = "auto", tolerance: float | None = None) -> Verdict:
    """Hold a figure of a comparison against a tolerance.

    `auto` is the first choice of a model with one prediction per item, else the embedding, the words, the frames.
    Figures of a model that predicts every token are means over items here, as an interval over tokens would be too
    narrow.

    Raises:
        ValueError: a metric that was not measured, naming those that were; a tolerance that it cannot have; one item.
    """
    check_tolerance(metric, tolerance)
    values = result.rows["patched"].values
    of_tokens = "top1" in result.per_item and "original" not in result.per_item
    there = [name for name, key in MEASURED.items() if key in values]
    if "nonfinite" in values:
        name = metric if metric != "auto" else "top1"
        return Verdict(name, Value(float("nan")), result.items, tolerance, int(values["nonfinite"].value))
    if metric == "auto":
        metric = next((name for name in AUTO if name in there and not (of_tokens and name == "top1")), metric)
        check_tolerance(metric, tolerance)
    if metric not in there:
        raise ValueError(f"metric: {metric!r} was not measured; there are {', '.join(there) or 'none'}")
    value, items = values[MEASURED[metric]], result.items
    if of_tokens and metric in ("top1", "kl"):
        column = np.array(result.per_item[metric], dtype=float)
        value, items = metrics.bootstrap(lambda rows: column[rows].mean(), len(column), 0), len(column)
    if tolerance is not None and (value.low is None or value.high is None):
        raise ValueError(f"tolerance: {result.items} items are too few for an interval of {metric!r}")
    return Verdict(metric, value, items, tolerance)
