"""Tokens in an order in which padding stands on one side, and back."""

from __future__ import annotations

import torch
from torch import Tensor


def sort_tokens(flags: Tensor) -> tuple[Tensor, Tensor]:
    """The order [B, N] that puts the tokens without a flag first and keeps all else, and the flags in that order."""
    flags, order = flags.to(torch.uint8).sort(dim=1, stable=True)
    return order, flags.bool()


def in_order(x: Tensor, order: Tensor) -> Tensor:
    """The tokens of [B, H, N] or [B, H, N, D] in the order [B, N]."""
    index = order[:, None] if x.dim() == 3 else order[:, None, :, None]
    return x.gather(2, index.expand(-1, *x.shape[1:2], -1, *x.shape[3:]))


def put_back(order: Tensor, out: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """What was computed in an order [B, N], as the tokens came."""
    back = order.argsort(dim=1)
    return in_order(out, back), in_order(log_p, back)


def zero_padding(out: Tensor, log_p: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros and -inf for queries that are padding [B, N]."""
    padding = ~real[:, None]
    return out.masked_fill(padding[..., None], 0), log_p.masked_fill(padding, -torch.inf)
