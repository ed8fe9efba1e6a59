"""What is computed from the outputs of a model and of the original, with intervals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from astroattn.imports import needs

with needs("eval"):
    import numpy as np
    from numpy.typing import NDArray
    from scipy import stats

Array = NDArray[Any]
MAX_PAIRED = 4096  # most items of which all pairs are compared


@dataclass(frozen=True)
class Value:
    """A figure and its 95 % interval, where one was computed."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Metric:
    """How a figure is called and shown."""

    label: str
    form: str
    note: str


METRICS = {
    "accuracy": Metric("accuracy, top-1", "{:.1%}", "share of items whose label is the first choice; Wilson interval"),
    "accuracy5": Metric("accuracy, top-5", "{:.1%}", "share of items whose label is among five; Wilson interval"),
    "mcnemar_p": Metric("McNemar p", "{:.3g}", "exact, accuracy of the original against this model"),
    "spearman": Metric("Spearman x 100", "{:.2f}", "cosine of a pair's embeddings with its score; bootstrap interval"),
    "top1_agreement": Metric("top-1 agreement", "{:.3f}", "share with the original's first choice; Wilson interval"),
    "top5_agreement": Metric("top-5 agreement", "{:.3f}", "mean share of the original's first five that are kept"),
    "logit_error": Metric("logit error", "{:.4f}", "||logits - original|| / ||original|| over all items; bootstrap"),
    "kl": Metric("KL, nats", "{:.4f}", "mean KL(original || model) of the predictions; bootstrap interval"),
    "hidden_error": Metric(
        "hidden state error", "{:.4f}", "||h - original|| / ||original||, last hidden state, all frames; bootstrap"
    ),
    "speech_error": Metric(
        "the same, speech", "{:.4f}", "of the frames before a clip ends, padding left out; bootstrap"
    ),
    "word_error": Metric(
        "word error",
        "{:.1%}",
        "of greedy transcripts against the original's own; lower case, no punctuation; bootstrap",
    ),
    "transcript_error": Metric(
        "word error, truth", "{:.1%}", "the same against the transcripts of the data; bootstrap"
    ),
    "embedding_cosine": Metric(
        "embedding cosine", "{:.4f}", "mean cosine with the original's pooled embedding; bootstrap"
    ),
    "same_neighbour": Metric(
        "same nearest neighbour", "{:.3f}", "share of items that keep their nearest other item; Wilson"
    ),
    "similarity_r": Metric("similarities r", "{:.4f}", "Pearson correlation of the cosines of all pairs of items"),
    "keys": Metric("keys", "{:.1f}", "keys that softmax attends to, mean over queries; real tokens only"),
    "positions": Metric("positions", "{:.1f}", "keys and centroids that a query attends to, mean"),
    "cost": Metric("cost", "{:.1%}", "products of length D per query over the 2N of softmax, all work counted"),
    "time": Metric("time / original", "{:.1%}", "of a batch through the whole model, over the original's"),
    "seconds": Metric("seconds / batch", "{:.3f}", "median over batches, without hooks"),
    "peak_bytes": Metric("peak memory, MB", "{:.1f}", "of one pass over the first batch, weights not counted"),
    "nonfinite": Metric("not finite", "{:.0f}", "items whose logits, embedding or frames hold NaN or infinity"),
}
SCALES = {"spearman": 100.0, "peak_bytes": 1e-6}  # the factor from a value to what is shown


def compare_logits(logits: Tensor, original: Tensor) -> dict[str, Array]:
    """Per item [B, C]: KL, squared error and norm, whether the first choice and how many of the five are kept."""
    logits, original = logits.double(), original.double()
    log_p, log_q = original.log_softmax(-1), logits.log_softmax(-1)
    parts = {
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "error": (logits - original).square().sum(-1),
        "norm": original.square().sum(-1),
        "same1": (logits.argmax(-1) == original.argmax(-1)).double(),
    }
    if logits.shape[-1] > 5:
        mine, theirs = logits.topk(5).indices, original.topk(5).indices
        parts["same5"] = (mine[:, :, None] == theirs[:, None, :]).any(1).double().mean(-1)
    return {name: part.cpu().numpy() for name, part in parts.items()}


def choose(logits: Tensor) -> dict[str, Array]:
    """Per item [B, C], C at least 2: the first choice, and how far its logit is above the second's."""
    (first, second), choice = (part.unbind(-1) for part in logits.double().topk(2))
    return {"choice": choice[0].cpu().numpy(), "margin": (first - second).cpu().numpy()}


def compare_frames(hidden: Tensor, original: Tensor, seen: Tensor | None, speech: Tensor | None) -> dict[str, Array]:
    """Per item, of last hidden states [B, N, D]: squared error and norm over the frames seen, and over those of speech.

    The masks are Bool [B, N]. None for `seen` is all frames; None for `speech` leaves that part out.
    """
    error = (hidden.double() - original.double()).square().sum(-1)
    norm = original.double().square().sum(-1)
    masks = {"hidden": torch.ones_like(error, dtype=torch.bool) if seen is None else seen, "speech": speech}
    parts = {}
    for name, mask in masks.items():
        if mask is not None:
            for kind, values in (("error", error), ("norm", norm)):
                parts[f"{name}_{kind}"] = values.masked_fill(~mask, 0).sum(1).cpu().numpy()
    return parts


def score_logits(logits: Tensor, labels: Sequence[int]) -> dict[str, Array]:
    """Per item: whether the label is the first choice, and whether it is among the first five."""
    target = torch.as_tensor(labels, device=logits.device)
    if int(target.min()) < 0 or int(target.max()) >= logits.shape[-1]:
        raise ValueError(f"labels: must be 0 to {logits.shape[-1] - 1}, got {int(target.min())} to {int(target.max())}")
    parts = {"correct1": logits.argmax(-1) == target}
    if logits.shape[-1] > 5:
        parts["correct5"] = (logits.topk(5).indices == target[:, None]).any(-1)
    return {name: part.cpu().numpy() for name, part in parts.items()}


def summarise_logits(parts: dict[str, Array], seed: int) -> dict[str, Value]:
    values = {
        "top1_agreement": share(parts["same1"]),
        "logit_error": _relative_error(parts["error"], parts["norm"], seed),
        "kl": bootstrap(lambda rows: parts["kl"][rows].mean(), len(parts["kl"]), seed),
    }
    if "same5" in parts:
        values["top5_agreement"] = Value(float(parts["same5"].mean()))
    return values


def summarise_frames(parts: dict[str, Array], seed: int) -> dict[str, Value]:
    names = [name for name in ("hidden", "speech") if f"{name}_error" in parts]
    return {f"{name}_error": _relative_error(parts[f"{name}_error"], parts[f"{name}_norm"], seed) for name in names}


def _relative_error(error: Array, norm: Array, seed: int) -> Value:
    """The root of the sum of squared errors over that of squared norms, one of each per item."""
    return bootstrap(lambda rows: np.sqrt(error[rows].sum() / norm[rows].sum()), len(error), seed)


def summarise_labels(parts: dict[str, Array], original: dict[str, Array]) -> dict[str, Value]:
    values = {"accuracy": share(parts["correct1"])}
    if "correct5" in parts:
        values["accuracy5"] = share(parts["correct5"])
    if parts is not original:
        lost = int((original["correct1"] & ~parts["correct1"]).sum())
        gained = int((~original["correct1"] & parts["correct1"]).sum())
        p = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
        values["mcnemar_p"] = Value(float(p))
    return values


def summarise_embeddings(embeddings: Array, original: Array, seed: int) -> dict[str, Value]:
    cosine = compare_embeddings(embeddings, original)
    values = {"embedding_cosine": bootstrap(lambda rows: cosine[rows].mean(), len(cosine), seed)}
    if len(embeddings) >= 3:
        mine, theirs = _similarities(embeddings), _similarities(original)
        upper = np.triu_indices(len(mine), 1)
        if mine[upper].std() > 0 and theirs[upper].std() > 0:
            values["similarity_r"] = Value(float(np.corrcoef(mine[upper], theirs[upper])[0, 1]))
        values["same_neighbour"] = share(_same_neighbours(mine, theirs))
    return values


def compare_embeddings(embeddings: Array, original: Array) -> Array:
    """Per item [B, D]: the cosine with the original's embedding."""
    cosine: Array = (normalise(embeddings) * normalise(original)).sum(1)
    return cosine


def compare_neighbours(embeddings: Array, original: Array) -> Array:
    """Per item [B, D], of the first `MAX_PAIRED`: whether its nearest other item is the original's."""
    return _same_neighbours(_similarities(embeddings), _similarities(original))


def _similarities(embeddings: Array) -> Array:
    """The cosines of all pairs of the first `MAX_PAIRED` items."""
    unit = normalise(embeddings[:MAX_PAIRED])
    cosines: Array = unit @ unit.T
    return cosines


def _same_neighbours(mine: Array, theirs: Array) -> Array:
    np.fill_diagonal(mine, -np.inf)
    np.fill_diagonal(theirs, -np.inf)
    same: Array = mine.argmax(1) == theirs.argmax(1)
    return same


def score_pairs(embeddings: Array, scores: Array, seed: int) -> dict[str, Value]:
    """Spearman correlation of the scores with the cosine of items 2i and 2i + 1."""
    unit = normalise(embeddings)
    cosine = (unit[0::2] * unit[1::2]).sum(1)
    with warnings.catch_warnings():  # a few pairs may all have one score: then the correlation is NaN
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return {
            "spearman": bootstrap(lambda rows: stats.spearmanr(cosine[rows], scores[rows]).statistic, len(scores), seed)
        }


def normalise(rows: Array) -> Array:
    rows = rows.astype(np.float64)
    unit: Array = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return unit


def share(hits: Array) -> Value:
    """The share of hits, with its 95 % Wilson interval."""
    count = int(np.sum(hits))
    interval = stats.binomtest(count, len(hits)).proportion_ci(method="wilson")
    return Value(count / len(hits), float(interval.low), float(interval.high))


def bootstrap(
    statistic: Callable[[Any], Any], count: int, seed: int, resamples: int = 1000, level: float = 0.95
) -> Value:
    """A statistic of the rows 0 to count - 1, with the percentile interval of this level over resampled rows."""
    rng = np.random.default_rng(seed)
    value = float(statistic(np.arange(count)))
    if count < 2:
        return Value(value)
    draws = [float(statistic(rng.integers(count, size=count))) for _ in range(resamples)]
    if not np.isfinite(draws).any():
        return Value(value)
    low, high = np.nanpercentile(draws, [50 - 50 * level, 50 + 50 * level])
    return Value(value, float(low), float(high))


def show(key: str, value: Value | None) -> str:
    """A figure by its name in `METRICS`, as tables have it; nothing where it was not measured."""
    if value is None:
        return ""
    if not math.isfinite(value.value):
        return "not finite"
    return METRICS[key].form.format(value.value * SCALES.get(key, 1.0))


def show_interval(key: str, value: Value | None) -> str:
    """Its interval, where it has one."""
    if value is None or value.low is None or value.high is None or not math.isfinite(value.value):
        return ""
    form, scale = METRICS[key].form, SCALES.get(key, 1.0)
    return f"[{form.format(value.low * scale)}, {form.format(value.high * scale)}]"
