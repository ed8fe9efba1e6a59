"""Exact attention with q.k in 8-bit integers, after SageAttention.

The mean key is subtracted, which softmax does not see and which leaves less to round; then each block of queries and of
keys is rounded to -127..127 times a scale of its own.

Source: Zhang, Wei, Huang, Zhang, Zhu & Chen, "SageAttention: Accurate 8-Bit Attention for Plug-and-play Inference
Acceleration", arXiv:2410.02367. Emulated: the rounded numbers are multiplied in the inputs' precision, so the error is
that of the rounding and the time is not that of integers. Left out: p.v with 16-bit numbers and sums, which would add
an error.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from eval.peers import blocks

LARGEST = 127


def attention(query: Tensor, key: Tensor, value: Tensor, *, query_block: int, key_block: int) -> Tensor:
    """The output [B, H, N, D]; the query is scaled. A scale is shared by so many queries, or so many keys."""
    key = key - key.mean(2, keepdim=True)
    return F.scaled_dot_product_attention(_rounded(query, query_block), _rounded(key, key_block), value, scale=1.0)


def _rounded(x: Tensor, block: int) -> Tensor:
    parts = blocks.cut(x, block)
    scale = parts.abs().amax((3, 4), keepdim=True).clamp(min=1e-30) / LARGEST
    return ((parts / scale).round() * scale).flatten(2, 3)[:, :, : x.shape[2]]


def products(tokens: int, width: int, *, query_block: int, key_block: int) -> float:
    """Products of length D per query: those of softmax, an 8-bit one counted as one, and the mean key."""
    return 2 * tokens + 1
