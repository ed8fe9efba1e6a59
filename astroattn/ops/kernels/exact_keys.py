"""Triton: the choice of exact keys, by scores of which a few heads are in memory at a time.

errors    of reading a key through its cluster
scores    of each key for each group; `torch.topk` takes the largest
mark      which keys each group has chosen, a byte for each group and key
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from astroattn.ops.kernels.clusters import Order, load_centres, load_metric
from astroattn.ops.kernels.means import Means
from astroattn.ops.kernels.tiles import (
    Shape,
    base,
    blocks_of,
    count_tiles,
    dot,
    end_of_columns,
    is_near,
    load_rows,
    power_of_2,
    rows_of,
    scratch,
    tiles_of,
    window_of,
)

SCORES = 2**26  # most scores at a time


@triton.jit
def _errors(
    key, value, weights, mean_value, square, winners, error, shape, squares, SQUARES: tl.constexpr, KEYS: tl.constexpr
):
    """log2 of the error of reading a key through its cluster, |r.(k - w)| |v - mean v|, up to one factor for all."""
    n = shape.rows * shape.columns
    blocks = tl.cdiv(n, KEYS)
    z, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    i = block * KEYS + tl.arange(0, KEYS)
    end = end_of_columns(z, shape)
    real = i < shape.rows * end
    winner = tl.load(winners + z.to(tl.int64) * n + i, mask=real, other=0)
    k = load_rows(key, base(key, z, shape) + shape.prefix * key.row, i, real).to(tl.float32)
    v = load_rows(value, base(value, z, shape) + shape.prefix * value.row, i, real).to(tl.float32)
    k -= load_centres(weights, key, z, winner, end, shape)
    v -= load_rows(mean_value, base(mean_value, z, shape), winner, real)
    squared = tl.sum(k * k * load_metric(square, z, shape, squares, SQUARES)[None, :], 1) * tl.sum(v * v, 1)
    tl.store(error + z.to(tl.int64) * n + i, 0.5 * tl.log2(tl.maximum(squared, 1e-37)), mask=i < n)


@triton.jit
def _scores(mean, key, error, scores, shape, first_z, most_tiles, GROUPS: tl.constexpr, KEYS: tl.constexpr):
    """log2 of exp(u.k) times the error [some z, R, n]; -inf for keys near to a tile of the group, and for padding."""
    n = shape.rows * shape.columns
    key_blocks, blocks = tl.cdiv(n, KEYS), tl.cdiv(shape.groups, GROUPS)
    i = tl.program_id(0) % key_blocks * KEYS + tl.arange(0, KEYS)
    group = tl.program_id(0) // key_blocks % blocks * GROUPS + tl.arange(0, GROUPS)
    slice_ = tl.program_id(0) // key_blocks // blocks
    z = first_z + slice_
    end = end_of_columns(z, shape)
    first, last = tiles_of(group, count_tiles(end, shape), shape)
    real = i < shape.rows * end
    u = load_rows(mean, base(mean, z, shape), group, group < shape.groups)
    score = dot(u, tl.trans(load_rows(key, base(key, z, shape) + shape.prefix * key.row, i, real))) * shape.scale
    if error is not None:
        score += tl.load(error + z.to(tl.int64) * n + i, mask=real, other=0.0)[None, :]
    taken = (i >= shape.rows * end)[None, :] | (group < 0)[:, None]
    if shape.WINDOW_WIDE > 0:
        for step in range(0, most_tiles):
            first_row, first_column = window_of(first + step, end, shape)
            near = is_near(i[None, :], first_row[:, None], first_column[:, None], shape)
            taken = taken | (near & (first + step < last)[:, None])
    place = (slice_.to(tl.int64) * shape.groups + group)[:, None] * n + i[None, :]
    tl.store(
        scores + place, tl.where(taken, float("-inf"), score), mask=(group < shape.groups)[:, None] & (i < n)[None, :]
    )


@triton.jit
def _mark(keys, places, chosen, shape, num_keys, CHOSEN: tl.constexpr):
    """Mark the keys that each group has chosen, at their places in the order of the clusters."""
    n = shape.rows * shape.columns
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, CHOSEN)
    i = tl.load(keys + row * num_keys + slot, mask=slot < num_keys, other=-1)
    place = tl.load(places + row // shape.groups * n + i, mask=i >= 0, other=0)
    tl.store(chosen + row * n + place, 1, mask=i >= 0)


def reading_error(
    shape: Shape,
    key: Tensor,
    value: Tensor,
    weights: Tensor | None,
    mean_value: Tensor,
    square: Tensor,
    winners: Tensor,
) -> Tensor:
    error, block = scratch(key, shape.body), blocks_of(key, value).keys
    squares = square.shape[2]
    _errors[(key.shape[0] * key.shape[1] * -(-shape.body // block),)](
        rows_of(key), rows_of(value), None if weights is None else rows_of(weights), rows_of(mean_value),
        rows_of(square), winners, error, shape, squares, power_of_2(squares, 1), block,
    )  # fmt: skip
    return error


def choose_keys(shape: Shape, key: Tensor, means: Means, error: Tensor | None, keys: Tensor) -> None:
    """Fill `keys` [B, H, R, e] with those of the largest scores, a few heads at a time."""
    size, num_keys = key.shape[0] * key.shape[1], keys.shape[-1]
    step = max(1, SCORES // (shape.groups * shape.body))
    most = blocks_of(key)
    rows = min(64, most.groups)
    blocks = -(-shape.groups // rows) * -(-shape.body // most.keys)
    for first in range(0, size, step):
        scores = key.new_empty(min(step, size - first), shape.groups, shape.body, dtype=torch.float32)
        _scores[(len(scores) * blocks,)](
            rows_of(means.mean),
            rows_of(key),
            error,
            scores,
            shape,
            first,
            -(-shape.tiles // shape.groups),
            rows,
            most.keys,
        )
        best, index = scores.topk(num_keys)
        keys.view(size, shape.groups, num_keys)[first : first + step] = index.masked_fill(best == -torch.inf, -1)


def mark_keys(shape: Shape, keys: Tensor, order: Order) -> Tensor:
    """The keys that each group has chosen, by their places in the order of the clusters: [B, H, R, n] uint8."""
    chosen = torch.zeros(*keys.shape[:3], shape.body, dtype=torch.uint8, device=keys.device)
    _mark[(keys.shape[0] * keys.shape[1] * shape.groups,)](
        keys, order.place, chosen, shape, keys.shape[-1], power_of_2(keys.shape[-1], 1)
    )
    return chosen
