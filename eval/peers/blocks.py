"""Sequences in blocks of tokens, which several peers choose and average; the last block may be shorter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cut(x: Tensor, block: int) -> Tensor:
    """[B, H, N, D] as [B, H, blocks, block, D], with zeros after the last token."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))


def real(tokens: int, block: int, device: torch.device) -> Tensor:
    """Bool [blocks, block]: which places hold a token."""
    blocks = -(-tokens // block)
    return torch.arange(blocks * block, device=device).view(blocks, block) < tokens


def means(x: Tensor, block: int) -> Tensor:
    """The mean of each block [B, H, blocks, D]."""
    return cut(x, block).sum(3) / real(x.shape[2], block, x.device).sum(1, keepdim=True)


def take(blocks: Tensor, chosen: Tensor) -> Tensor:
    """The chosen blocks [B, H, Q, E] of [B, H, K, block, D], joined to [B, H, Q, E * block, D]."""
    batch, heads = chosen.shape[:2]
    rows = torch.arange(batch * heads, device=chosen.device).view(batch, heads, 1, 1)
    return blocks.flatten(0, 1)[rows, chosen].flatten(3, 4)
