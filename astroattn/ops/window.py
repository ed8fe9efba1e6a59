"""Attention within a window, exactly: a near field of fixed width and nothing beyond it, in linear time and memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_BLOCK = 128  # queries that are read together


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    *,
    causal: bool,
    scale: float,
    key_mask: Tensor | None = None,
    with_normaliser: bool = False,
) -> tuple[Tensor, Tensor]:
    """Softmax over the keys at most `window` tokens from the query; if `causal`, over no later one.

    query [B, H, Nq, D], key [B, H, Nk, D], value [B, H, Nk, Dv]; key_mask [B, Nk], True = a real token. The queries are
    the last of Nk tokens. Returns the output [B, H, Nq, Dv], zeros where a query sees no key, and log p [B, H, Nq],
    empty where it is not asked for.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    first = num_keys - num_queries
    block = block_size(window)
    parts = []
    for begin in range(0, num_queries, block):
        end = min(begin + block, num_queries)
        left, right = max(first + begin - window, 0), min(first + end + (0 if causal else window), num_keys)
        places = torch.arange(first + begin, first + end, device=key.device)[:, None]
        distance = places - torch.arange(left, right, device=key.device)
        seen = (distance <= window) & (distance >= (0 if causal else -window))
        if key_mask is not None:
            seen = seen & key_mask[:, None, None, left:right]
        blind = ~seen.any(-1, keepdim=True)
        q, k, v = query[:, :, begin:end], key[:, :, left:right], value[:, :, left:right]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen | blind, scale=scale).masked_fill(blind, 0)
        log_p = query.new_empty(*query.shape[:2], 0)
        if with_normaliser:
            work = torch.promote_types(query.dtype, torch.float32)
            log_p = log_sum(q.to(work) @ k.to(work).mT * scale, seen)
        parts.append((out, log_p))
    out, log_p = (torch.cat(each, 2) for each in zip(*parts, strict=True))
    return out, log_p


def log_sum(logits: Tensor, seen: Tensor) -> Tensor:
    """The logarithm of sum exp(logits) over the keys that a query sees; -inf, and no gradient, where it sees none."""
    blind = ~seen.any(-1, keepdim=True)
    return logits.masked_fill(~(seen | blind), -torch.inf).logsumexp(-1).masked_fill(blind[..., 0], -torch.inf)


def block_size(window: int) -> int:
    """Queries that are read together; their windows overlap."""
    return max(window, LEAST_BLOCK)
