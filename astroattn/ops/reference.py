"""Dense oracles: the same mathematics with full N x N matrices, to test the fast forms against. Use float64."""

from __future__ import annotations

import torch
from torch import Tensor

from astroattn.ops.features import features


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, bias: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """softmax(q.k + bias) v and its log normaliser; a query without any key gives zeros and -inf.

    Args:
        mask, bias: [Z, Nq, Nk].
    """
    logits = query @ key.mT + bias
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    normaliser = logits.logsumexp(-1)
    shares = (logits - normaliser.clamp(min=torch.finfo(logits.dtype).min)[..., None]).exp()
    return shares @ value, normaliser


def feature_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    phase: Tensor,
    activation: str,
    exact: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with exp(q.k) where `exact` [Z, Nq, Nk] and phi(q).phi(k) elsewhere; output and log normaliser."""
    through_phi = features(query, weight, phase, activation) @ features(key, weight, phase, activation).mT
    shares = torch.where(exact, (query @ key.mT).exp(), through_phi)
    if mask is not None:
        shares = shares.masked_fill(~mask, 0)
    process = shares.sum(-1, keepdim=True)
    return shares @ value / process, process[..., 0].log()


def cluster_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mean: Tensor,
    winners: Tensor,
    weights: Tensor,
    exact: Tensor,
    bias: Tensor | float = 0.0,
    mean_bias: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention with exp(q.k + b) where `exact`, and exp(u.k + b_u + r.w) elsewhere, w the weights of the cluster.

    Args:
        mean: u of each query [Z, N, D], r = q - u. winners: cluster of each key [Z, N]. weights: w [Z, m, D].
        exact: [Z, N, N]. bias: b [Z, N, N]. mean_bias: b_u, its mean over the tile of the query [Z, N, N].
    """
    far = mean @ key.mT + mean_bias + (query - mean) @ weights.gather(1, winners[..., None].expand_as(key)).mT
    logits = torch.where(exact, query @ key.mT + bias, far)
    return logits.softmax(-1) @ value, logits.logsumexp(-1)
