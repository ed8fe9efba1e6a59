"""What is computed from the outputs of a model and of the original, with intervals."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

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
    "seconds": Metric("seconds / batch", "{:.3f}", "median over batches, without hooks"),
    "peak_bytes": Metric("peak memory, MB", "{:.1f}", "of one pass over the first batch, weights not counted"),
    "nonfinite": Metric("not finite", "{:.0f}", "items whose logits or embedding hold NaN or infinity"),
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
        "logit_error": bootstrap(
            lambda rows: np.sqrt(parts["error"][rows].sum() / parts["norm"][rows].sum()), len(parts["kl"]), seed
        ),
        "kl": bootstrap(lambda rows: parts["kl"][rows].mean(), len(parts["kl"]), seed),
    }
    if "same5" in parts:
        values["top5_agreement"] = Value(float(parts["same5"].mean()))
    return values


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
    mine, theirs = normalise(embeddings), normalise(original)
    cosine = (mine * theirs).sum(1)
    values = {"embedding_cosine": bootstrap(lambda rows: cosine[rows].mean(), len(cosine), seed)}
    if len(mine) >= 3:
        mine, theirs = mine[:MAX_PAIRED] @ mine[:MAX_PAIRED].T, theirs[:MAX_PAIRED] @ theirs[:MAX_PAIRED].T
        upper = np.triu_indices(len(mine), 1)
        if mine[upper].std() > 0 and theirs[upper].std() > 0:
            values["similarity_r"] = Value(float(np.corrcoef(mine[upper], theirs[upper])[0, 1]))
        np.fill_diagonal(mine, -np.inf)
        np.fill_diagonal(theirs, -np.inf)
        values["same_neighbour"] = share(mine.argmax(1) == theirs.argmax(1))
    return values


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


def bootstrap(statistic: Callable[[Any], Any], count: int, seed: int, resamples: int = 1000) -> Value:
    """A statistic of the rows 0 to count - 1, with the 95 % percentile interval over resampled rows."""
    rng = np.random.default_rng(seed)
    value = float(statistic(np.arange(count)))
    if count < 2:
        return Value(value)
    draws = [float(statistic(rng.integers(count, size=count))) for _ in range(resamples)]
    if not np.isfinite(draws).any():
        return Value(value)
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return Value(value, float(low), float(high))
