"""Block-sparse attention after SpargeAttention: blocks of keys are kept or dropped by what their means predict.

Blocks of queries and of keys are averaged; the softmax of the means' products predicts how much attention a block of
queries pays to each block of keys, and the largest are kept until they hold a given share of it. A block whose tokens
do not resemble one another (mean cosine below a threshold) is not judged by its mean: it is always kept, or keeps all.

Source: Zhang, Xiang, Huang, Wei, Xi, Zhu & Chen, "SpargeAttn: Accurate Sparse Attention Accelerating Any Model
Inference", arXiv:2502.18137. Left out: the second filter, which skips p.v where p is small in an online softmax; the
8-bit q.k; tuning per head of share and threshold (here they are the budget); the order of tokens along a space-filling
curve. Its kernel has blocks of 128 queries and 64 keys; here their sizes are part of the budget.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.peers import blocks


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, query_block: int, key_block: int, mass: int, similarity: int
) -> Tensor:
    """The output [B, H, N, D] of softmax over the kept keys; the query is scaled.

    Args:
        query_block, key_block: tokens per block.
        mass: percent of the predicted attention that is kept; 100 is softmax attention.
        similarity: percent of cosine below which a block's mean is not trusted; 0 trusts all.
    """
    keep = select(query, key, query_block=query_block, key_block=key_block, mass=mass, similarity=similarity)
    real = blocks.real(key.shape[2], key_block, key.device)
    parts = (blocks.cut(query, query_block), blocks.cut(key, key_block), blocks.cut(value, key_block), keep)
    # Head by head: all blocks of a head are filled up to the most that one keeps, and heads differ the most in it.
    heads = [_attend(*head, real) for head in zip(*(x.flatten(0, 1) for x in parts), strict=True)]
    return torch.stack(heads).view(*query.shape[:2], -1, query.shape[3])[:, :, : query.shape[2]]


def _attend(queries: Tensor, keys: Tensor, values: Tensor, keep: Tensor, real: Tensor) -> Tensor:
    """One head: blocks [n, block, D] of queries, and of keys and values, of which each takes those that it keeps."""
    kept, chosen = keep.float().topk(int(keep.sum(-1).max()), -1)
    seen = (real[chosen] & kept.bool()[..., None]).flatten(1)[:, None].expand(-1, queries.shape[1], -1)
    return F.scaled_dot_product_attention(
        queries, keys[chosen].flatten(1, 2), values[chosen].flatten(1, 2), attn_mask=seen, scale=1.0
    )


def select(query: Tensor, key: Tensor, *, query_block: int, key_block: int, mass: int, similarity: int) -> Tensor:
    """Bool [B, H, blocks of queries, blocks of keys]: which are kept."""
    trusted, judged = _trusted(query, query_block, similarity), _trusted(key, key_block, similarity)
    logits = blocks.means(query, query_block) @ blocks.means(key, key_block).mT
    predicted = logits.masked_fill(~judged[:, :, None], -1e9).softmax(-1)
    share, order = predicted.sort(-1, descending=True)
    before = (share.cumsum(-1) - share).clamp(0, 1)
    keep = before.le(mass / 100).gather(-1, order.argsort(-1))
    return keep | ~judged[:, :, None] | ~trusted[..., None]


def _trusted(x: Tensor, block: int, similarity: int) -> Tensor:
    # The mean cosine of all pairs is the squared length of the mean of the unit vectors.
    return blocks.means(F.normalize(x, dim=-1), block).square().sum(-1) >= similarity / 100


def kept_keys(query: Tensor, key: Tensor, *, query_block: int, **budget: int) -> float:
    """Keys that a query attends to, mean over all."""
    keep = select(query, key, query_block=query_block, **budget)
    sizes = blocks.real(key.shape[2], budget["key_block"], key.device).sum(1).float()
    weights = blocks.real(query.shape[2], query_block, query.device).sum(1) / query.shape[2]
    return ((keep.float() @ sizes) @ weights.float()).mean().item()


def products(
    tokens: int, width: int, *, query_block: int, key_block: int, mass: int, similarity: int, kept: float
) -> float:
    """Products of length D per query: means, cosines, predictions, and two for each key of `kept`."""
    predictions = -(-tokens // query_block) * -(-tokens // key_block) / tokens
    return 2 + (4 if similarity else 0) + predictions + 2 * kept
