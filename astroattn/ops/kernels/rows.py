"""Rows of a tensor [B, H, N, D] as kernels take, load and store them."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from astroattn.ops.kernels.features import narrow


class Rows(NamedTuple):
    """A tensor [B, H, N, D] as kernels take it: its data and its strides (the last one is 1), D, and D padded."""

    data: Any
    batch: int
    head: int
    row: int
    DIM: Any
    PADDED: Any


def rows_of(x: Tensor) -> Rows:
    """A tensor [B, H, N, D] whose last stride is 1, as kernels take it."""
    batch, head, row, _ = x.stride()
    return Rows(x, batch, head, row, *_dims_of(x.shape[-1]))


@cache
def _dims_of(dim: int) -> tuple[tl.constexpr, tl.constexpr]:
    return tl.constexpr(dim), tl.constexpr(power_of_2(dim))


def power_of_2(number: int, least: int = 16, most: int = 1 << 30) -> int:
    """The smallest power of two that is not below `number`, within bounds; in plain Python, as Triton's own is slow."""
    return min(max(1 << max(number - 1, 0).bit_length(), least), most)


def cdiv(number: int, by: int) -> int:
    """Their quotient, rounded up."""
    return -(-number // by)


@triton.jit
def load_rows(x, start, index, mask):
    """Rows [len(index), PADDED] of a sequence that begins at `start`; zeros where masked, and in the padding."""
    column = tl.arange(0, x.PADDED)
    wanted = mask[:, None]
    if x.DIM != x.PADDED:
        wanted = wanted & (column < x.DIM)[None, :]
    return tl.load(start + index.to(tl.int64)[:, None] * x.row + column[None, :], mask=wanted, other=0.0)


@triton.jit
def store_rows(x, start, index, mask, values):
    """Store rows [len(index), PADDED]; counterpart of `load_rows`."""
    column = tl.arange(0, x.PADDED)
    wanted = mask[:, None]
    if x.DIM != x.PADDED:
        wanted = wanted & (column < x.DIM)[None, :]
    place = start + index.to(tl.int64)[:, None] * x.row + column[None, :]
    tl.store(place, narrow(values.to(tl.float32), x.data.dtype.element_ty), mask=wanted)
