"""How rows of numbers lie in memory: what all kernels need of their inputs, and give their results."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_rows(x: Tensor) -> Tensor:
    """The tensor with neighbouring numbers in its rows."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_rows(like: Tensor, columns: int) -> Tensor:
    """For results [B, H, N, columns], laid out like `like` where it has as many columns."""
    return torch.empty_like(like) if like.shape[-1] == columns else like.new_empty(*like.shape[:3], columns)
