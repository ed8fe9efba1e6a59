"""Exact blocks and the means of all others, after PISA (piecewise sparse attention).

Each block of queries attends exactly to the blocks of keys whose means promise the largest logits. Another block j of
n_j keys is expanded around its mean: sum_i exp(q.k_i) v_i = exp(q.kbar_j) (n_j vbar_j + q' H_j) + ..., where
H_j = sum_i (k_i - kbar_j) (v_i - vbar_j)'; the normaliser has no first-order term. One H for all blocks, scaled by
their sizes, makes that term global: q' C times the attention that the means receive, C the covariance within blocks.

Source: Li, Shao, Zhong, Zhou, Bai, Xiong & Xie, "PISA: Piecewise Sparse Attention Is Wiser for Efficient Diffusion
Transformers", arXiv:2602.01077. The formulas are derived here from its description, so its scaling of the global term
may differ. Left out: its kernels, which go over the blocks in one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eval.peers import blocks


def attention(query: Tensor, key: Tensor, value: Tensor, *, block: int, exact: int, first_order: int) -> Tensor:
    """The output [B, H, N, D]; the query is scaled.

    Args:
        block: tokens per block, of queries and keys.
        exact: blocks of keys that each block of queries attends exactly; all of them is softmax attention.
        first_order: 1 with the global first-order term, 0 without.
    """
    tokens = key.shape[2]
    real = blocks.real(tokens, block, key.device)
    key_means, value_means = blocks.means(key, block), blocks.means(value, block)
    chosen = (blocks.means(query, block) @ key_means.mT).topk(min(exact, len(real)), -1).indices
    queries = blocks.cut(query, block)
    keys, values = (blocks.take(blocks.cut(x, block), chosen) for x in (key, value))
    near = (queries @ keys.mT).masked_fill(~real[chosen].flatten(3)[:, :, :, None], -torch.inf)
    far = queries @ key_means[:, :, None].mT + real.sum(1).log()
    is_exact = torch.zeros_like(far[..., 0, :], dtype=torch.bool).scatter_(-1, chosen, True)
    far = far.masked_fill(is_exact[..., None, :], -torch.inf)
    near, far = torch.cat([near, far], -1).softmax(-1).split([near.shape[-1], far.shape[-1]], -1)
    out = near @ values + far @ value_means[:, :, None]
    if first_order:
        inner, outer = (
            (blocks.cut(x, block) - mean[..., None, :]) * real[..., None]
            for x, mean in ((key, key_means), (value, value_means))
        )
        covariance = inner.flatten(2, 3).mT @ outer.flatten(2, 3) / tokens
        out = out + far.sum(-1, keepdim=True) * (queries @ covariance[:, :, None])
    return out.flatten(2, 3)[:, :, :tokens]


def products(tokens: int, width: int, *, block: int, exact: int, first_order: int) -> float:
    """Products of length D per query: three means, predictions, reading, and the matrix C made and read."""
    number = -(-tokens // block)
    read = 2 * min(exact * block, tokens) + 2 * number
    return 3 + number**2 / tokens + read + (2 * width if first_order else 0)
