"""Centroids of all keys and exact clusters for each query, after Multipole Attention.

k-means groups the keys; each query attends exactly to the clusters whose centroids w give it the largest q.w, as long
as they fit into a number of tokens, and to every other cluster through n exp(q.w) and the mean of its values.

Source: Hooper, Zhao, Manolache, Kim, Mahoney, Shao, Keutzer & Gholami, "Multipole Attention for Efficient Long Context
Reasoning", arXiv:2506.13059. Left out: what serves decoding (updates of the clusters for new tokens, positions in
windows, sharing among grouped heads) and deeper hierarchies of centroids; k-means is Euclidean, starting from evenly
spaced keys. All logits are computed and those not chosen masked: on a CPU that is faster than to gather the keys of
each query, and `products` counts what is chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Clusters(NamedTuple):
    """The cluster of each key [B, H, N], and of each cluster [B, H, m] its size and its centroid [.., D]."""

    member: Tensor
    size: Tensor
    centroid: Tensor


def attention(query: Tensor, key: Tensor, value: Tensor, *, clusters: int, exact: int, steps: int) -> Tensor:
    """The output [B, H, N, D]; the query is scaled.

    Args:
        clusters: number of centroids. steps: of k-means.
        exact: most keys that a query attends exactly; all of them is softmax attention.
    """
    found = _cluster(key, clusters, steps)
    is_exact = _choose(query @ found.centroid.mT, found.size, exact)
    member = F.one_hot(found.member, clusters).to(query.dtype)
    is_chosen = is_exact.to(query.dtype) @ member.mT > 0.5
    bias = found.size.log()[:, :, None].masked_fill(is_exact, -torch.inf)
    bias = torch.cat([torch.zeros_like(is_chosen, dtype=query.dtype).masked_fill_(~is_chosen, -torch.inf), bias], -1)
    keys = torch.cat([key, found.centroid], 2)
    values = torch.cat([value, _means(value, found.member, found.size)], 2)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=1.0)


def _cluster(key: Tensor, clusters: int, steps: int) -> Clusters:
    tokens = key.shape[2]
    centroid = key[:, :, torch.arange(clusters, device=key.device) * tokens // clusters]
    for step in range(steps + 1):
        member = (key @ centroid.mT - centroid.square().sum(-1)[:, :, None] / 2).argmax(-1)
        size = torch.zeros_like(centroid[..., 0]).scatter_add_(2, member, torch.ones_like(key[..., 0]))
        if step < steps:
            centroid = torch.where(size[..., None] > 0, _means(key, member, size), centroid)
    return Clusters(member, size, _means(key, member, size))


def _means(x: Tensor, member: Tensor, size: Tensor) -> Tensor:
    sums = x.new_zeros(*size.shape, x.shape[-1]).scatter_add_(2, member[..., None].expand_as(x), x)
    return sums / size.clamp(min=1)[..., None]


def _choose(logits: Tensor, size: Tensor, exact: int) -> Tensor:
    """Bool [B, H, N, m]: for each query the clusters of the largest logits that together hold at most so many keys."""
    order = logits.masked_fill(size[:, :, None] == 0, -torch.inf).argsort(-1, descending=True)
    fits = size[:, :, None].expand_as(logits).gather(-1, order).cumsum(-1) <= exact
    return fits.gather(-1, order.argsort(-1))


def kept_keys(query: Tensor, key: Tensor, *, clusters: int, exact: int, steps: int) -> float:
    """Keys that a query attends exactly, mean over all."""
    found = _cluster(key, clusters, steps)
    is_exact = _choose(query @ found.centroid.mT, found.size, exact)
    return (is_exact * found.size[:, :, None]).sum(-1).mean().item()


def products(tokens: int, width: int, *, clusters: int, exact: int, steps: int, kept: float) -> float:
    """Products of length D per query: k-means, the values' means, reading m centroids and `kept` keys."""
    learning = (steps + 1) * clusters + steps + 2
    return learning + 2 * clusters + 2 * kept
