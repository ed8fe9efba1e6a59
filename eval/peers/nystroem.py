"""Nystroem attention: softmax through landmarks, the means of segments of queries and keys.

With landmarks u of the queries and w of the keys, softmax(q w') A^+ softmax(u k') v, A = softmax(u w'), whose
pseudo-inverse is the limit of Z <- Z (13 - A Z (15 - A Z (7 - A Z))) / 4 from Z = A' / (|A|_1 |A|_inf).

Source: Xiong, Zeng, Chakraborty, Tan, Fung, Li & Singh, "Nystroemformer: A Nystroem-Based Algorithm for Approximating
Self-Attention", arXiv:2102.03902. Left out: the convolution over the values that a trained model has beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor, *, landmarks: int, steps: int) -> Tensor:
    """The output [B, H, N, D]; the query is scaled.

    Args:
        landmarks: number of segments. steps: iterations of the pseudo-inverse, six in the paper.
    """
    asked, told = _means(query, landmarks), _means(key, landmarks)
    inner = (asked @ told.mT).softmax(-1)
    outer = (asked @ key.mT).softmax(-1) @ value
    return (query @ told.mT).softmax(-1) @ (_invert(inner, steps) @ outer)


def _means(x: Tensor, segments: int) -> Tensor:
    tokens = x.shape[2]
    segment = torch.arange(tokens, device=x.device) * segments // tokens
    sums = x.new_zeros(*x.shape[:2], segments, x.shape[3]).index_add_(2, segment, x)
    return sums / segment.bincount(minlength=segments)[:, None]


def _invert(matrix: Tensor, steps: int) -> Tensor:
    one = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    largest = matrix.abs().sum(-1).amax(-1) * matrix.abs().sum(-2).amax(-1)
    inverse = matrix.mT / largest[..., None, None]
    for _ in range(steps):
        both = matrix @ inverse
        inverse = inverse @ (13 * one - both @ (15 * one - both @ (7 * one - both))) / 4
    return inverse


def products(tokens: int, width: int, *, landmarks: int, steps: int) -> float:
    """Products of length D per query: means, three N x m matrices, the values, and what is among landmarks."""
    inner = 2 * landmarks**2 + 4 * steps * landmarks**3 / width
    return 2 + 4 * landmarks + inner / tokens
