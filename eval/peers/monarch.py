"""The nearest Monarch matrix to softmax attention, after MonarchAttention.

The sequence is cut into m blocks of b tokens; query (l, j) and key (k, i) are token j or i of block l or k. A Monarch
matrix is M[lj, ki] = L_j[l, k] R_k[j, i]; with rows that sum to one. Softmax maximises sum M (q.k - log M), so R and L
are improved in turns, each by the softmax that maximises this sum while the other is held:

    R_k[j, :] = softmax_i(a_jk.k_ki),                  a_jk = sum_l L_j[l, k] q_lj / sum_l L_j[l, k]
    L_j[l, :] = softmax_k(q_lj.c_jk + entropy_jk),     c_jk = sum_i R_k[j, i] k_ki

starting from L_j = 1, so that at first block k is read by its own queries.

Source: Yaras, Xu, Abillama, Lee & Balzano, "MonarchAttention: Zero-Shot Conversion to Fast, Hardware-Aware Structured
Attention", arXiv:2505.18698; the updates are derived here from its objective. Left out: its fused kernel. Places that
fill up the first block are at the front, so that the rows of a square patch grid are blocks where b is its width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor, *, block: int, steps: int) -> Tensor:
    """The output [B, H, N, D]; the query is scaled.

    Args:
        block: tokens per block; one, or all tokens, is softmax attention.
        steps: updates of R and L.
    """
    tokens = query.shape[2]
    front = -tokens % block
    query, key, value = (F.pad(x, (0, 0, front, 0)).unflatten(2, (-1, block)) for x in (query, key, value))
    real = (torch.arange(front + tokens, device=key.device) >= front).view(-1, block)  # [m, b]
    ask = query.transpose(2, 3)  # [B, H, b, m, D], as L takes it
    reader = query
    for step in range(steps):
        right = (reader @ key.mT).masked_fill(~real[:, None], -torch.inf).softmax(-1)  # [B, H, m, b, b]
        entropy = torch.special.entr(right).sum(-1).transpose(2, 3)
        left = (ask @ (right @ key).transpose(2, 3).mT + entropy[..., None, :]).softmax(-1)  # [B, H, b, m, m]
        if step < steps - 1:
            weight = left * real.T[..., None]
            reader = (weight.mT @ ask / weight.sum(-2)[..., None].clamp(min=1e-30)).transpose(2, 3)
    out = left @ (right @ value).transpose(2, 3)
    return out.transpose(2, 3).flatten(2, 3)[:, :, front:]


def products(tokens: int, width: int, *, block: int, steps: int) -> float:
    """Products of length D per query: a step has two with b and two with m, but a is free at first; then the values."""
    number = -(-tokens // block)
    places = number * block / tokens
    return places * (2 * steps * (block + number) - number + block + number)
