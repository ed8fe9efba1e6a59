"""How true a patched model is to the original on the verifying items, and what of it can be promised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import ceil, inf, isfinite, log
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from astroattn.calibration.effects import exact, frames
from astroattn.fidelity import metrics
from astroattn.fidelity.metrics import Array
from astroattn.fidelity.passes import Outputs, count_items, forward, pool, to_model, token_mask
from astroattn.imports import needs
from astroattn.plan import FALLING, METRICS, Promise
from astroattn.suggestions import suggest

with needs("eval"):
    import numpy as np
    from scipy import stats

LEVEL = 0.9  # confidence of each bound
LEAST_ITEMS = 8  # for the mean of a metric that is not a share

Function = Callable[[Outputs, Outputs], Any]
Metric = str | Function


class Kept(NamedTuple):
    """What is kept of the original's outputs for a batch.

    Of models that predict tokens the logits are not: a vocabulary for every token. They are computed again.
    """

    items: int
    logits: Tensor | None
    embedding: Tensor | None
    outputs: Outputs | None  # for a function of the user alone


class Verifier:
    """The verifying items, what the original gives for them, and the metric.

    Args:
        original: the model without patches. batches: of the verifying items.
        metric, tolerance, pooling, seed, progress: as in `calibrate`.

    Raises:
        ValueError: the metric is not known or the outputs do not have it; there are too few items for the tolerance;
            the original puts out NaN or infinity.
    """

    def __init__(
        self,
        original: nn.Module,
        batches: Sequence[Any],
        metric: Metric,
        tolerance: float | None,
        pooling: str,
        seed: int,
        progress: bool,
    ) -> None:
        self._batches, self._pooling, self._seed, self._tolerance = batches, pooling, seed, tolerance
        self._metric, self._progress = metric, progress
        self._function = None if isinstance(metric, str) else metric
        self._kept: list[Kept] = []
        for batch in self._bar("original"):
            kept = self._keep(original, batch)
            if not all(part.isfinite().all() for part in kept[1:3] if part is not None):
                raise ValueError("model: the original itself puts out NaN or infinity")
            if not self._kept:
                first = kept
            self._kept.append(kept._replace(logits=None) if _is_of_tokens(kept) else kept)
        self.items = sum(kept.items for kept in self._kept)
        self._again = _is_of_tokens(first)
        flat = first.logits is not None and not self._again
        if metric == "auto":
            metric = "top1" if flat else "cosine"
        self.metric = metric if isinstance(metric, str) else getattr(metric, "__name__", "the given function")
        needed = {"top1": first.logits, "kl": first.logits, "neighbour": first.embedding, "cosine": first.embedding}
        if isinstance(metric, str) and needed[metric] is None:
            raise ValueError(f"metric: {metric!r} needs an output that a {type(original).__name__} does not give here")
        self._share = metric == "neighbour" or (metric == "top1" and flat)
        self._allowed = _most_changed(self.items, tolerance) if self._share else inf

    def require_items(self, wanted: int) -> None:
        """Raise ValueError where the items are too few for the tolerance; `wanted` are those that choose."""
        if self._tolerance is None:
            return
        least = ceil(log(1 - LEVEL) / log(self._tolerance)) if self._share else LEAST_ITEMS
        if self.items < least:
            total = least + min(wanted, ceil(least / 3))
            raise ValueError(
                f"batches: {self.items} items are left to verify with; a tolerance of {self._tolerance:g} for "
                f"{self.metric!r} at {LEVEL:.0%} confidence needs at least {least}, so {total} in all"
            )

    def verify(self, patched: nn.Module, title: str) -> Promise:
        """Run the patched model on the items and compare; `title` is that of the progress bar.

        Once more items have changed than a tolerance allows among all of them, the rest is not run.
        """
        parts: list[Array] = []
        values: Array = np.empty(0)
        for number, (batch, kept) in enumerate(zip(self._bar(title), self._kept, strict=True), 1):
            mine = self._keep(patched, batch)
            if self.metric == "neighbour":  # among the items so far
                parts.append(np.nan_to_num(_numpy(mine.embedding)))
                theirs = np.concatenate([_numpy(each.embedding) for each in self._kept[:number]])
                values = metrics.compare_neighbours(np.concatenate(parts), theirs)
            else:
                if self._again:
                    with exact(patched):
                        kept = kept._replace(logits=self._keep(patched, batch).logits)
                parts.append(self._compare(mine, kept, batch))
                values = np.concatenate(parts)
            if self._share and (values == 0).sum() > self._allowed:
                break
        return self._promise(values.astype(float))

    def certain(self) -> Promise:
        """The promise of the original itself."""
        value = 0.0 if self.metric in FALLING else 1.0
        return Promise(
            metric=self.metric,
            tolerance=self._tolerance,
            value=value,
            low=value,
            high=value,
            level=LEVEL,
            items=self.items,
        )

    def _bar(self, title: str) -> Iterable[Any]:
        bar: Iterable[Any] = tqdm(self._batches, title, unit="batch", leave=False, disable=not self._progress)
        return bar

    def _keep(self, model: nn.Module, batch: Any) -> Kept:
        inputs = to_model(model, batch)
        with torch.inference_mode():
            outputs = forward(model, inputs)
            states = frames(inputs, outputs)
            mask = token_mask(inputs)
            embedding = pool(model, outputs, mask, self._pooling) if states is None else states.flatten(1)
        logits = outputs.logits
        if logits is not None and logits.ndim > 2 and self._metric not in ("top1", "kl"):
            logits = None  # one prediction per token may be large
        return Kept(count_items(batch), logits, embedding, None if self._function is None else outputs)

    def _compare(self, mine: Kept, kept: Kept, batch: Any) -> Array:
        """The metric of each item of a batch; what is not finite is as bad as can be."""
        if self._function is not None:
            assert mine.outputs is not None
            assert kept.outputs is not None
            values = np.asarray(torch.as_tensor(self._function(mine.outputs, kept.outputs)).detach().cpu(), dtype=float)
            if values.shape != (kept.items,) or not ((values >= 0) & (values <= 1)).all():
                raise ValueError(
                    f"metric: {self.metric} gave {values.shape} values from {values.min(initial=np.inf):g} to "
                    f"{values.max(initial=-np.inf):g}; must be one in [0, 1] for each of {kept.items} items"
                )
            return values
        if self.metric == "cosine":
            return np.nan_to_num(metrics.compare_embeddings(_numpy(mine.embedding), _numpy(kept.embedding)))
        return _compare_logits(mine.logits, kept.logits, token_mask(batch), "same1" if self.metric == "top1" else "kl")

    def _promise(self, values: Array) -> Promise:
        mean = float(values.mean())
        if self._share or (self._function is not None and np.isin(values, (0, 1)).all()):
            low, high = _share_bounds(int(values.sum()), len(values))
        else:
            found = metrics.bootstrap(lambda rows: values[rows].mean(), len(values), self._seed, level=2 * LEVEL - 1)
            low, high = (mean if bound is None else bound for bound in (found.low, found.high))
        return Promise(
            metric=self.metric,
            tolerance=self._tolerance,
            value=mean,
            low=low,
            high=high,
            level=LEVEL,
            items=len(values),
        )


def check_metric(metric: Any, tolerance: float | None) -> None:
    """Raise TypeError or ValueError for a metric that is none, or a tolerance that it cannot have."""
    if not callable(metric) and metric not in (names := ("auto", *METRICS)):
        meant = suggest(metric, names)
        raise ValueError(f"metric: {metric!r}; must be one of {', '.join(names)}, or a function of two Outputs{meant}")
    if tolerance is None:
        return
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
        raise TypeError(f"tolerance: {type(tolerance).__name__}; expected a number")
    falling = metric in FALLING if isinstance(metric, str) else False
    if not isfinite(tolerance) or tolerance <= 0 or (not falling and tolerance >= 1):
        wanted = "above 0" if falling else "above 0 and below 1: no sample shows that nothing ever changes"
        raise ValueError(f"tolerance: {tolerance:g}; must be {wanted}")


def _share_bounds(kept: int, items: int) -> tuple[float, float]:
    """Clopper and Pearson's one-sided bounds of a share."""
    exact = stats.binomtest(kept, items).proportion_ci(2 * LEVEL - 1, method="exact")
    return float(exact.low), float(exact.high)


def _most_changed(items: int, tolerance: float | None) -> float:
    """Of so many items, how many may change at most for the bound to be within the tolerance; -1 where none may."""
    if tolerance is None:
        return inf
    return next(
        (changed - 1 for changed in range(items + 1) if _share_bounds(items - changed, items)[0] < tolerance), items
    )


def _compare_logits(mine: Tensor | None, theirs: Tensor | None, mask: Tensor | None, name: str) -> Array:
    """Per item: of logits [B, C], or the mean over the real tokens of logits [B, N, C]."""
    assert mine is not None
    assert theirs is not None
    worst = 0.0 if name == "same1" else 1e30
    parts = []
    for row in range(len(mine)):
        chosen = slice(None) if mask is None or mine.ndim == 2 else mask[row]
        one, other = (x[row].unsqueeze(0) if x.ndim == 2 else x[row][chosen] for x in (mine, theirs))
        parts.append(float(metrics.compare_logits(one, other)[name].mean()) if one.isfinite().all() else worst)
    return np.array(parts)


def _is_of_tokens(kept: Kept) -> bool:
    return kept.logits is not None and kept.logits.ndim > 2


def _numpy(tensor: Tensor | None) -> Array:
    assert tensor is not None
    array: Array = tensor.float().cpu().numpy()
    return array
