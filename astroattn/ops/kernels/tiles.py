"""Where tiles, windows and groups lie, by arithmetic inside a kernel: the twin of `astroattn.ops.tiles`.

Names in the kernels: z is a sequence of one head (of Z = B * H), R groups, T tiles, m hidden neurons, n body tokens.
A slot is a place in a tile; slots of all tiles are numbered in a row, `tile * HIGH * WIDE + place`.
"""

from __future__ import annotations

from math import e, log2
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from astroattn.ops.kernels.features import INTERPRETED, narrow
from astroattn.ops.tiles import cut, near_shape

LN_2 = tl.constexpr(1 / log2(e))
LOG2_E = tl.constexpr(log2(e))


class Rows(NamedTuple):
    """A tensor [B, H, N, D] as kernels take it: its data and its strides (the last one is 1), D, and D padded."""

    data: Any
    batch: int
    head: int
    row: int
    DIM: Any
    PADDED: Any


class Shape(NamedTuple):
    """Everything that is the same for all sequences; in capitals what the compiler knows.

    The last rows * columns of the tokens are the body; a sequence has one row. `lengths` [B] or None: real tokens.
    `scale` is that of the logits times log2(e).
    """

    lengths: Any
    heads: int
    tokens: int
    prefix: int
    rows: int
    columns: int
    across: int
    tiles: int
    groups: int
    clusters: int
    scale: float
    GRID: Any
    HIGH: Any
    WIDE: Any
    WINDOW_HIGH: Any
    WINDOW_WIDE: Any

    @property
    def body(self) -> int:
        """Body tokens."""
        return self.rows * self.columns

    @property
    def slots(self) -> int:
        """Slots of a tile."""
        return int(self.HIGH.value * self.WIDE.value)

    @property
    def window(self) -> int:
        """Keys of a window."""
        return int(self.WINDOW_HIGH.value * self.WINDOW_WIDE.value)


def rows_of(x: Tensor) -> Rows:
    """A tensor [B, H, N, D] whose last stride is 1, as kernels take it."""
    dim = x.shape[-1]
    return Rows(x, x.stride(0), x.stride(1), x.stride(2), tl.constexpr(dim), tl.constexpr(power_of_2(dim)))


class Blocks(NamedTuple):
    """Most rows in a block: of keys or queries, of groups, of clusters, and in the backward pass of anything."""

    keys: int
    groups: int
    clusters: int
    backward: int
    stages: int


# By bytes of a number and padded head dim: a block fits into shared memory, and few numbers are spilled. A table,
# not autotuning: that would time kernels inside a CUDA graph's capture and at every new length.
BLOCKS = {
    (2, 64): Blocks(64, 128, 64, 64, 3),
    (2, 128): Blocks(32, 64, 64, 32, 2),
    (2, 256): Blocks(32, 32, 32, 16, 2),
    (4, 64): Blocks(32, 64, 32, 32, 2),
    (4, 128): Blocks(32, 32, 32, 16, 1),
    (4, 256): Blocks(16, 16, 16, 16, 1),
}


def blocks_of(*tensors: Tensor, widened: bool = False) -> Blocks:
    """Sizes of blocks for rows like these; `widened`: where float16 is taken as float32."""
    bytes_ = 4 if widened and tensors[0].dtype == torch.float16 else tensors[0].element_size()
    return BLOCKS[bytes_, max(64, *(power_of_2(x.shape[-1]) for x in tensors))]


def shape_of(
    key: Tensor,
    lengths: Tensor | None,
    grid: tuple[int, int] | None,
    prefix: int,
    tile: int,
    near: int,
    groups: int,
    num_hidden: int,
    scale: float,
) -> Shape:
    """The layout of `ops.tiles.make_tiles` as numbers."""
    tokens = key.shape[2]
    rows, columns = grid or (1, tokens - prefix)
    high, wide, down, across = cut(tile, rows, columns)
    tiles = down * across
    sizes = (tokens, prefix, rows, columns, across, tiles, min(groups, tiles), num_hidden)
    constants = (rows > 1, high, wide, *near_shape(near, rows, columns))
    return Shape(lengths, key.shape[1], *sizes, scale * log2(e), *map(tl.constexpr, constants))


def power_of_2(number: int, least: int = 16, most: int = 1 << 30) -> int:
    """The smallest power of two that is not below `number`, within bounds."""
    return int(min(max(triton.next_power_of_2(number), least), most))


def scratch(like: Tensor, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An empty tensor [B, H, ...] for the sequences of a tensor [B, H, ...]."""
    return torch.empty((*like.shape[:2], *sizes), dtype=dtype, device=like.device)


@triton.jit
def base(x, z, shape):
    """Where sequence z of a tensor `Rows` begins."""
    return x.data + (z // shape.heads).to(tl.int64) * x.batch + (z % shape.heads).to(tl.int64) * x.head


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


@triton.jit
def dot(a, b, acc=None):
    """a @ b (+ acc) in float32; float32 operands are taken in three parts, so that nothing is rounded to tf32."""
    if INTERPRETED:  # which would multiply the bits of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def real_tokens(z, shape):
    """Real tokens of the sequence, prefix included."""
    tokens = shape.tokens
    if shape.lengths is not None:
        tokens = tl.load(shape.lengths + z // shape.heads).to(tl.int32)
    return tokens


@triton.jit
def end_of_columns(z, shape):
    """Where the real columns end: for a sequence its real body tokens."""
    end = shape.columns
    if shape.lengths is not None:
        end = tl.maximum(tl.load(shape.lengths + z // shape.heads).to(tl.int32) - shape.prefix, 0)
    return end


@triton.jit
def count_tiles(end, shape):
    """Tiles that hold real tokens, at least one."""
    count = shape.tiles
    if shape.lengths is not None:
        count = tl.maximum((end + shape.WIDE - 1) // shape.WIDE, 1)
    return count


@triton.jit
def group_of(tile, count, shape):
    """The group of a tile."""
    shared = tl.minimum(tile * shape.groups // count, shape.groups - 1)
    return tl.where(count <= shape.groups, tl.minimum(tile, shape.groups - 1), shared)


@triton.jit
def tiles_of(group, count, shape):
    """First tile of a group, and the first behind it."""
    shared = count > shape.groups
    first = tl.where(shared, (group * count + shape.groups - 1) // shape.groups, group)
    last = tl.where(shared, ((group + 1) * count + shape.groups - 1) // shape.groups, group + 1)
    return first, last


@triton.jit
def token_of(slot, end, shape):
    """The body token in a slot, whether the slot lies inside the grid or sequence, and whether the token is real."""
    SIZE: tl.constexpr = shape.HIGH * shape.WIDE
    token, inside, real = slot, slot < shape.columns, slot < end
    if shape.GRID:
        tile, place = slot // SIZE, slot % SIZE
        row = tile // shape.across * shape.HIGH + place // shape.WIDE
        column = tile % shape.across * shape.WIDE + place % shape.WIDE
        token, inside = row * shape.columns + column, (row < shape.rows) & (column < shape.columns)
        real = inside
    return token, inside, real


@triton.jit
def window_of(tile, end, shape):
    """First row and first column of the near field of a tile."""
    left = tile % shape.across * shape.WIDE if shape.GRID else tile * shape.WIDE
    middle = left + ((tl.minimum(end - left, shape.WIDE) - shape.WINDOW_WIDE) >> 1)
    first_column = tl.maximum(tl.minimum(middle, end - shape.WINDOW_WIDE), 0)
    first_row = first_column * 0
    if shape.GRID:
        top = tile // shape.across * shape.HIGH + ((shape.HIGH - shape.WINDOW_HIGH) >> 1)
        first_row = tl.minimum(tl.maximum(top, 0), shape.rows - shape.WINDOW_HIGH)
    return first_row, first_column


@triton.jit
def key_in_window(place, first_row, first_column, end, shape):
    """The body token at a place of a window, and whether there is one."""
    row, column = first_row, first_column + place
    if shape.GRID:
        row, column = first_row + place // shape.WINDOW_WIDE, first_column + place % shape.WINDOW_WIDE
    return row * shape.columns + column, (place < shape.WINDOW_HIGH * shape.WINDOW_WIDE) & (column < end)


@triton.jit
def is_near(key, first_row, first_column, shape):
    """Whether real body tokens lie in windows; `key` and the windows must broadcast."""
    column = key % shape.columns - first_column if shape.GRID else key - first_column
    near = (column >= 0) & (column < shape.WINDOW_WIDE)
    if shape.GRID:
        row = key // shape.columns - first_row
        near = near & (row >= 0) & (row < shape.WINDOW_HIGH)
    return near


@triton.jit
def tiles_near(first, last, end, count, SIZE: tl.constexpr, WINDOW: tl.constexpr):
    """In one dimension, a range of tiles that holds all those whose window meets the keys first ... last."""
    HALF: tl.constexpr = (SIZE - WINDOW) >> 1
    begin = tl.where(first < WINDOW, 0, tl.maximum(first - WINDOW - HALF, 0) // SIZE)
    stop = tl.where(last >= end - WINDOW, count, tl.minimum((last - ((1 - WINDOW) >> 1)) // SIZE + 1, count))
    return begin, stop
