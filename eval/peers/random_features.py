"""Positive orthogonal random features, as in Performers: this library's random hidden layer without a near field.

Source: Choromanski et al., "Rethinking Attention with Performers", arXiv:2009.14794. Left out: redrawing the features,
which is for training.
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from astroattn import AstroConfig, AstrocyteAttention


def attention(query: Tensor, key: Tensor, value: Tensor, *, features: int) -> Tensor:
    """The output [B, H, N, D]; the query is scaled."""
    return _module(query.shape[1], query.shape[3], features)(query, key, value, scale=1.0)


def products(tokens: int, width: int, *, features: int) -> float:
    """Products of length D per query: features of queries and keys, sums and reading."""
    return _module(1, width, features).cost(tokens, tokens).products


@lru_cache
def _module(heads: int, width: int, features: int) -> AstrocyteAttention:
    return AstrocyteAttention(heads, width, AstroConfig(hidden="random", num_hidden=features, near=0)).eval()
