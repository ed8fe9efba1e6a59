"""What theory says of a random hidden layer with m independent neurons w ~ N(0, I), shared by all keys of a head.

The mean of phi(q).phi(k) is exp(q.k), and for one query and two keys

    Cov[phi(q).phi(k), phi(q).phi(k')] = exp(q.k + q.k') (exp((q + k).(q + k')) - 1) / m,

so for one pair the relative variance is (exp(|q + k|^2) - 1) / m. All of it is per query, times m, as logarithms
(they reach hundreds), in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOAL = 0.1  # relative error at which the neurons that are needed are counted


def log_normaliser_variance(query: Tensor, key: Tensor) -> Tensor:
    """log of m Var[p] / p^2 = sum_jj' a_j a_j' (exp((q + k_j).(q + k_j')) - 1), exactly [N]; query, key: [N, D]."""
    second_moment = _log_products(query, key).flatten(1).logsumexp(-1)
    return second_moment + torch.log1p(-(-second_moment).exp())


def log_output_variance(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """log of m E|o^ - o|^2 [N] for an output o = sum_j a_j v_j, by the delta method:

    sum_jj' a_j a_j' exp((q + k_j).(q + k_j')) (v_j - o).(v_j' - o)
    """
    products = _log_products(query, key)
    top = products.amax((1, 2))
    attention = (query @ key.mT).softmax(-1)
    output = attention @ value
    across = output @ value.mT
    deviations = value @ value.mT - across[:, None] - across[:, :, None] + output.square().sum(-1)[:, None, None]
    total = ((products - top[:, None, None]).exp_() * deviations).sum((1, 2))
    return top + total.clamp(min=torch.finfo(total.dtype).tiny).log()


def _log_products(query: Tensor, key: Tensor) -> Tensor:
    """log of a_j a_j' exp((q + k_j).(q + k_j')) [N, N, N]."""
    logits = query @ key.mT
    single = logits.log_softmax(-1) + logits
    return single[:, None] + single[:, :, None] + key @ key.mT + query.square().sum(-1)[:, None, None]
