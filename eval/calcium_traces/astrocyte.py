"""One head's calcium with drawn hidden weights, and how well it agrees with the softmax normaliser."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from astroattn.hidden import draw_orthogonal
from astroattn.ops.features import features

CHUNK = 1024  # hidden neurons at a time: bounds the memory, and is fastest


def draw_weights(kind: str, m: int, dim: int, seed: int) -> Tensor:
    """W [m, D] in float64: "iid", numpy's standard normal from this seed; or "orthogonal" within blocks of D rows."""
    if kind == "iid":
        return torch.from_numpy(np.random.RandomState(seed).randn(m, dim))  # the notebooks' generator
    return draw_orthogonal((1, m, dim), torch.Generator().manual_seed(seed))[0].double()


def stream(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    counts: Sequence[int],
    *,
    centre: bool = False,
    read_weight: Tensor | None = None,
) -> dict[int, tuple[Tensor, Tensor]]:
    """Calcium p = phi(q).sum_i phi(k_i) and output of one head, for the first m neurons of W, each m of `counts`.

    They are those of `NeuronAstrocyteNetwork` with `StaticNeurons` (tested), for many tokens and few neurons at a time.

    Args:
        query: [Nq, D]. key: [N, D], both times sqrt(scale). value: [N, Dv]. weight: W [at least max(counts), D].
        centre: take the means c of the keys and u of the queries out, which changes nothing but the error:
            exp(q.k) = exp(q.c) exp((q - u).(k - c)) exp(u.(k - c)), where the last factor weighs what is written
            and the first is known while reading.
        read_weight: W while reading (a control); None is the same as while writing, as it should be.

    Returns:
        For each m the calcium [Nq] and the output [Nq, Dv].
    """
    gain, gate = query.new_ones(len(query)), key.new_ones(len(key))
    if centre:
        gain, key = (query @ key.mean(0)).exp(), key - key.mean(0)
        gate, query = (key @ query.mean(0)).exp(), query - query.mean(0)
    written = torch.cat([value, value.new_ones(len(value), 1)], 1) * gate[:, None]
    total, done = torch.zeros(len(query), written.shape[1], dtype=query.dtype), {}
    ends = sorted({*range(CHUNK, max(counts), CHUNK), *counts})
    for start, end in zip([0, *ends], ends, strict=False):
        phase = weight.new_zeros(1, end - start)
        reading, writing = (
            features(x[None], w[None, start:end], phase, "positive_exp")[0]
            for x, w in ((query, weight if read_weight is None else read_weight), (key, weight))
        )
        total += reading @ (writing.mT @ written) * (end - start)
        if end in counts:
            done[end] = (gain * total[:, -1] / end, total[:, :-1] / total[:, -1:])
    return done


def normalise(query: Tensor, key: Tensor) -> Tensor:
    """The softmax normaliser sum_j exp(q.k_j) [Nq]."""
    return (query @ key.mT).logsumexp(-1).exp()


def score(calcium: Tensor, normaliser: Tensor) -> dict[str, float]:
    """Agreement over the tokens [N] of one head: correlations (in log, plain, of ranks) and relative errors."""
    p, z = calcium.numpy(), normaliser.numpy()
    error = np.abs(p / z - 1)
    return {
        "log_correlation": float(stats.pearsonr(np.log(p), np.log(z)).statistic),
        "correlation": float(stats.pearsonr(p, z).statistic),
        "spearman": float(stats.spearmanr(p, z).statistic),
        "median_error": float(np.median(error)),
        "rms_error": float(np.sqrt(np.mean(error**2))),
    }
