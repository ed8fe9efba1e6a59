"""Attention through a static hidden layer, for many numbers of neurons in one pass over them, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024  # neurons whose features are in memory at a time

# Neurons start to stop: their weights [c, D] or, one layer per head, [H, c, D], and log gains [c] or [H, 1, c].
Draw = Callable[[int, int], tuple[Tensor, Tensor]]


def stream_attention(
    query: Tensor, key: Tensor, draw: Draw, sizes: list[int], key_bias: Tensor | float = 0.0
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Attention with the first m neurons, for every m of `sizes`, which increase.

    The sums S_ni = sum_j phi_j(q_n) phi_j(k_i) b_i grow neuron by neuron. Query features are measured from the highest
    that the query has met, key features from the highest over the keys, so nothing overflows and no query loses all.

        phi_j(x) = exp(w_j.x - |x|^2 / 2 + gain_j) / sqrt(m)

    Args:
        query, key: [B, H, N, D], both times sqrt(scale). key_bias: log b [B, H, N], a weight of each key.

    Yields:
        m, the attention matrix S / sum_i S [B, H, N, N] and the log of the normaliser sum_i S [B, H, N].
    """
    half_query = -query.square().sum(-1, keepdim=True) / 2
    half_key = -key.square().sum(-1, keepdim=True) / 2
    if isinstance(key_bias, Tensor):
        half_key = half_key + key_bias[..., None]
    query, key = torch.cat([query, half_query], -1), torch.cat([key, half_key], -1)
    sums = query.new_zeros(*query.shape[:3], key.shape[2])
    best = query.new_full((*query.shape[:3], 1), -torch.inf)
    start = 0
    for m in sizes:
        while start < m:
            stop = min(start + CHUNK, m)
            weight, gain = draw(start, stop)
            weight = F.pad(weight, (0, 1), value=1.0)  # reads the last column, w.x - |x|^2 / 2 in one product
            key_gain = key @ weight.mT
            top = key_gain.amax(2, keepdim=True)
            query_gain = (query @ weight.mT).add_(2 * gain + top)
            higher = torch.maximum(best, query_gain.amax(-1, keepdim=True))
            sums *= (best - higher).exp()
            sums += query_gain.sub_(higher).exp_() @ key_gain.sub_(top).exp_().mT
            best, start = higher, stop
        total = sums.sum(-1, keepdim=True)
        yield m, sums / total, (total.log() + best)[..., 0] - log(m)
