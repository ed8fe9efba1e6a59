"""Triton: near + far attention, forward, given what was learned and chosen.

sums      log z_gj and s_gj / z_gj: flash attention of the mean queries over the keys of each cluster
attend    flash attention of a tile's queries over prefix keys, near keys, chosen keys and the m hidden neurons
rows      flash attention of the prefix's queries over all keys, in parts
join      the prefix's rows from their parts
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from astroattn.ops.kernels.clusters import Order
from astroattn.ops.kernels.features import narrow
from astroattn.ops.kernels.means import Means
from astroattn.ops.kernels.tiles import (
    LN_2,
    Rows,
    Shape,
    base,
    blocks_of,
    count_tiles,
    dot,
    end_of_columns,
    group_of,
    is_near,
    key_in_window,
    load_rows,
    power_of_2,
    real_tokens,
    rows_of,
    scratch,
    store_rows,
    token_of,
    window_of,
)

PART = 512  # tokens that one program reads for the prefix's queries
NOTHING = tl.constexpr(16 * torch.finfo(torch.float32).eps)  # less of a cluster than this is the rounding of its sum


class Far(NamedTuple):
    """The hidden layer: w [B, H, m, D], log z [B, H, R, m] and s / z [B, H, R * m, Dv] of each group, and the cluster
    of each key [B, H, n]. Where tiles share groups s / z is float32, else in the dtype of the values."""

    weights: Rows
    log_z: Any
    mean_value: Rows
    winners: Any


NO_HIDDEN_LAYER = (None, None, None, None)


@triton.jit
def add_keys(top, total, acc, logits, v):
    """One step of online softmax: logits [Q, KEYS] to the base 2 and values [KEYS, V] are added."""
    new = tl.maximum(top, tl.max(logits, 1))
    safe = tl.where(new > float("-inf"), new, 0.0)
    shares = tl.exp2(logits - safe[:, None])
    factor = tl.exp2(top - safe)
    acc = dot(narrow(shares, v.dtype), v, acc * factor[:, None])
    return new, total * factor + tl.sum(shares, 1), acc


@triton.jit
def _sums(mean, key, value, order, start, chosen, log_z, mean_value, shape, GROUPS: tl.constexpr, KEYS: tl.constexpr):
    """log z, -inf where a cluster has no far key, and s / z, 0 there; `chosen` marks keys by their place in `order`."""
    n, m = shape.rows * shape.columns, shape.clusters
    blocks = tl.cdiv(shape.groups, GROUPS)
    block, j = tl.program_id(0) % blocks, tl.program_id(0) // blocks % m
    z = tl.program_id(0) // blocks // m
    end = end_of_columns(z, shape)
    alone = count_tiles(end, shape) <= shape.groups
    group = block * GROUPS + tl.arange(0, GROUPS)
    inside = group < shape.groups
    first_row, first_column = window_of(group, end, shape)
    u = load_rows(mean, base(mean, z, shape), group, inside)
    key_start = base(key, z, shape) + shape.prefix * key.row
    value_start = base(value, z, shape) + shape.prefix * value.row
    top = tl.full([GROUPS], float("-inf"), tl.float32)
    total = tl.zeros([GROUPS], tl.float32)
    acc = tl.zeros([GROUPS, value.PADDED], tl.float32)
    cluster = start + z.to(tl.int64) * (m + 1) + j
    last = tl.load(cluster + 1)
    for first in range(tl.load(cluster), last, KEYS):
        place = first + tl.arange(0, KEYS)
        listed = place < last
        i = tl.load(order + z.to(tl.int64) * n + place, mask=listed, other=0)
        k = load_rows(key, key_start, i, listed)
        v = load_rows(value, value_start, i, listed)
        far = listed[None, :] & inside[:, None]
        logits = tl.where(far, dot(u, tl.trans(k)) * shape.scale, float("-inf"))
        if shape.WINDOW_WIDE > 0:
            near = is_near(i[None, :], first_row[:, None], first_column[:, None], shape) & alone
            logits = tl.where(near, float("-inf"), logits)
        if chosen is not None:
            mark = chosen + (z.to(tl.int64) * shape.groups + group)[:, None] * n + place[None, :]
            logits = tl.where(tl.load(mark, mask=far, other=0) != 0, float("-inf"), logits)
        top, total, acc = add_keys(top, total, acc, logits, v)
    some = tl.where(total > 0, total, 1.0)
    tl.store(log_z + (z.to(tl.int64) * shape.groups + group) * m + j, top + tl.log2(some), mask=inside)
    store_rows(mean_value, base(mean_value, z, shape), group * m + j, inside, acc / some[:, None])


@triton.jit
def load_sums(
    log_sums, mean_values, winners, key, value, u, z, tile, group, j, end, shape,
    SHARED: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """log z [M] and s / z [M, V] of clusters j as a tile reads them, and what is left of the group's z.

    Where the group is the tile's own they are the group's. Where it is shared, the keys near to the tile are taken out:
    of the cluster's z each of them has the share exp(u.k) / z.
    """
    groups = z.to(tl.int64) * shape.groups + group
    log_z = tl.load(log_sums + groups * shape.clusters + j, mask=j < shape.clusters, other=float("-inf"))
    start = base(mean_values, z, shape)
    mean_value = load_rows(mean_values, start, group * shape.clusters + j, j < shape.clusters)
    left = j * 0.0 + 1.0
    if SHARED:
        WINDOW: tl.constexpr = shape.WINDOW_HIGH * shape.WINDOW_WIDE
        first_row, first_column = window_of(tile, end, shape)
        for first in range(0, tl.where(count_tiles(end, shape) <= shape.groups, 0, WINDOW), KEYS):
            i, real = key_in_window(first + tl.arange(0, KEYS), first_row, first_column, end, shape)
            member = near_shares(log_sums, winners, key, u, z, groups, i, real, j, shape)
            v = load_rows(value, base(value, z, shape) + shape.prefix * value.row, i, real).to(tl.float32)
            left -= tl.sum(member, 1)
            mean_value -= dot(member, v)
        alive = left > NOTHING
        left = tl.where(alive, left, 1.0)
        log_z = tl.where(alive, log_z + tl.log2(left), float("-inf"))
        mean_value = mean_value / left[:, None]
    return log_z, mean_value, left


@triton.jit
def near_shares(log_sums, winners, key, u, z, groups, i, real, j, shape):
    """exp(u.k) / z of keys i in their clusters [M, KEYS], 0 in others; z that of the group."""
    winner = tl.load(winners + z.to(tl.int64) * (shape.rows * shape.columns) + i, mask=real, other=0)
    whole = tl.load(log_sums + groups * shape.clusters + winner, mask=real, other=float("-inf"))
    k = load_rows(key, base(key, z, shape) + shape.prefix * key.row, i, real).to(tl.float32)
    logits = tl.sum(k * u[None, :], 1) * shape.scale
    share = tl.where(whole > float("-inf"), tl.exp2(logits - tl.where(whole > float("-inf"), whole, 0.0)), 0.0)
    return tl.where(j[:, None] == winner[None, :], share[None, :], 0.0)


@triton.jit
def _attend(
    query, key, value, mean, weights, log_sums, mean_values, winners, keys, out, log_p, shape, num_keys,
    SHARED: tl.constexpr, SLOTS: tl.constexpr, KEYS: tl.constexpr, CHOSEN: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = shape.HIGH * shape.WIDE
    WINDOW: tl.constexpr = shape.WINDOW_HIGH * shape.WINDOW_WIDE
    BLOCKS: tl.constexpr = (SIZE + SLOTS - 1) // SLOTS
    block, tile = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS % shape.tiles
    z = tl.program_id(0) // BLOCKS // shape.tiles
    end = end_of_columns(z, shape)
    group = group_of(tile, count_tiles(end, shape), shape)
    place = block * SLOTS + tl.arange(0, SLOTS)
    token, inside, real = token_of(place + tile * SIZE, end, shape)
    inside, real = inside & (place < SIZE), real & (place < SIZE)
    q = load_rows(query, base(query, z, shape) + shape.prefix * query.row, token, real)
    key_start, value_start = base(key, z, shape), base(value, z, shape)
    top = tl.full([SLOTS], float("-inf"), tl.float32)
    total = tl.zeros([SLOTS], tl.float32)
    acc = tl.zeros([SLOTS, value.PADDED], tl.float32)
    for first in range(0, tl.minimum(shape.prefix, real_tokens(z, shape)), 16):
        i = first + tl.arange(0, 16)
        there = i < tl.minimum(shape.prefix, real_tokens(z, shape))
        logits = dot(q, tl.trans(load_rows(key, key_start, i, there))) * shape.scale
        logits = tl.where(there[None, :], logits, float("-inf"))
        top, total, acc = add_keys(top, total, acc, logits, load_rows(value, value_start, i, there))
    key_start += shape.prefix * key.row
    value_start += shape.prefix * value.row
    first_row, first_column = window_of(tile, end, shape)
    for first in range(0, WINDOW, KEYS):
        i, there = key_in_window(first + tl.arange(0, KEYS), first_row, first_column, end, shape)
        logits = dot(q, tl.trans(load_rows(key, key_start, i, there))) * shape.scale
        logits = tl.where(there[None, :], logits, float("-inf"))
        top, total, acc = add_keys(top, total, acc, logits, load_rows(value, value_start, i, there))
    if keys is not None:
        for first in range(0, num_keys, CHOSEN):
            slot = first + tl.arange(0, CHOSEN)
            mine = keys + (z.to(tl.int64) * shape.groups + group) * num_keys
            i = tl.load(mine + slot, mask=slot < num_keys, other=-1)
            logits = dot(q, tl.trans(load_rows(key, key_start, i, i >= 0))) * shape.scale
            logits = tl.where((i >= 0)[None, :], logits, float("-inf"))
            top, total, acc = add_keys(top, total, acc, logits, load_rows(value, value_start, i, i >= 0))
    if log_sums is not None:
        one = tl.arange(0, 1)
        u = tl.sum(load_rows(mean, base(mean, z, shape), group + one, one == 0).to(tl.float32), 0)
        rest = narrow(q.to(tl.float32) - u[None, :], q.dtype)
        for first in range(0, shape.clusters, M):
            j = first + tl.arange(0, M)
            log_z, mean_value, _ = load_sums(
                log_sums, mean_values, winners, key, value, u, z, tile, group, j, end, shape, SHARED, 16
            )
            w = load_rows(weights, base(weights, z, shape), j, j < shape.clusters)
            logits = dot(rest, tl.trans(narrow(w, q.dtype))) * shape.scale + log_z[None, :]
            top, total, acc = add_keys(top, total, acc, logits, narrow(mean_value.to(tl.float32), q.dtype))
    some = tl.where(real & (total > 0), total, 1.0)
    acc = tl.where(real[:, None], acc / some[:, None], 0.0)
    store_rows(out, base(out, z, shape) + shape.prefix * out.row, token, inside, acc)
    log_sum = tl.where(real, (top + tl.log2(some)) * LN_2, float("-inf"))
    tl.store(log_p + z.to(tl.int64) * shape.tokens + shape.prefix + token, log_sum, mask=inside)


@triton.jit
def _rows(
    query, key, value, acc_part, log_part, shape, parts, ROWS: tl.constexpr, KEYS: tl.constexpr, PART: tl.constexpr
):
    """Attention of the prefix's queries to one part of the tokens: [B, H, parts * prefix, Dv] and log2 of the sums."""
    blocks = tl.cdiv(shape.prefix, ROWS)
    part, block = tl.program_id(0) % parts, tl.program_id(0) // parts % blocks
    z = tl.program_id(0) // parts // blocks
    tokens = real_tokens(z, shape)
    row = block * ROWS + tl.arange(0, ROWS)
    q = load_rows(query, base(query, z, shape), row, row < shape.prefix)
    key_start, value_start = base(key, z, shape), base(value, z, shape)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, value.PADDED], tl.float32)
    for first in range(part * PART, tl.minimum((part + 1) * PART, tokens), KEYS):
        i = first + tl.arange(0, KEYS)
        logits = dot(q, tl.trans(load_rows(key, key_start, i, i < tokens))) * shape.scale
        logits = tl.where((i < tokens)[None, :], logits, float("-inf"))
        top, total, acc = add_keys(top, total, acc, logits, load_rows(value, value_start, i, i < tokens))
    some = tl.where(total > 0, total, 1.0)
    place = part * shape.prefix + row
    store_rows(acc_part, base(acc_part, z, shape), place, row < shape.prefix, acc / some[:, None])
    log_sum = log_part + z.to(tl.int64) * parts * shape.prefix + place
    tl.store(log_sum, top + tl.log2(some), mask=row < shape.prefix)


@triton.jit
def _join(acc_part, log_part, out, log_p, shape, parts, ROWS: tl.constexpr):
    """The prefix's rows from their parts."""
    blocks = tl.cdiv(shape.prefix, ROWS)
    z, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row = block * ROWS + tl.arange(0, ROWS)
    inside = row < shape.prefix
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, out.PADDED], tl.float32)
    for part in range(0, parts):
        place = part * shape.prefix + row
        one = tl.load(log_part + z.to(tl.int64) * parts * shape.prefix + place, mask=inside, other=float("-inf"))
        new = tl.maximum(top, one)
        safe = tl.where(new > float("-inf"), new, 0.0)
        factor, weight = tl.exp2(top - safe), tl.exp2(one - safe)
        x = load_rows(acc_part, base(acc_part, z, shape), place, inside)
        acc = acc * factor[:, None] + x * weight[:, None]
        total = total * factor + weight
        top = new
    real = (row < real_tokens(z, shape)) & (total > 0)
    some = tl.where(real, total, 1.0)
    store_rows(out, base(out, z, shape), row, inside, tl.where(real[:, None], acc / some[:, None], 0.0))
    log_sum = tl.where(real, (top + tl.log2(some)) * LN_2, float("-inf"))
    tl.store(log_p + z.to(tl.int64) * shape.tokens + row, log_sum, mask=inside)


def write_sums(
    shape: Shape,
    key: Tensor,
    value: Tensor,
    means: Means,
    winners: Tensor,
    centres: Tensor,
    order: Order,
    chosen: Tensor | None,
) -> Far:
    """Write the keys that no group reads exactly into the hidden layer."""
    groups, m, dim = shape.groups, shape.clusters, value.shape[-1]
    log_z = scratch(key, groups, m)
    dtype = torch.float32 if shape.tiles > groups else value.dtype
    mean_value = scratch(key, groups * m, dim, dtype=dtype)
    most = blocks_of(key, value)
    block = power_of_2(groups, most=most.groups)
    # Two blocks of 8 warps for each multiprocessor, for a small spill.
    registers = 128 if block == 128 and key.element_size() == 2 and chosen is None else None
    _sums[(key.shape[0] * key.shape[1] * m * -(-groups // block),)](
        rows_of(means.mean), rows_of(key), rows_of(value), order.order, order.start, chosen, log_z, rows_of(mean_value),
        shape, block, most.keys, num_warps=4 if block <= 32 else 8, num_stages=most.stages, maxnreg=registers,
    )  # fmt: skip
    return Far(rows_of(centres), log_z, rows_of(mean_value), winners)


def attend(
    shape: Shape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    means: Means | None,
    far: Far | None,
    keys: Tensor,
    out: Tensor,
    log_p: Tensor,
) -> None:
    """Attention of all queries, the prefix's to all keys and the tiles' to what they read."""
    size, num_keys, most = query.shape[0] * query.shape[1], keys.shape[-1], blocks_of(query, value)
    slots = power_of_2(shape.slots, most=most.keys)
    _attend[(size * shape.tiles * -(-shape.slots // slots),)](
        rows_of(query), rows_of(key), rows_of(value), None if means is None else rows_of(means.mean),
        *(far or NO_HIDDEN_LAYER), keys if num_keys else None, rows_of(out), log_p, shape, num_keys,
        shape.tiles > shape.groups, slots,
        *(power_of_2(number, most=most.keys) for number in (shape.window, num_keys, shape.clusters)),
        num_warps=4, num_stages=most.stages,
    )  # fmt: skip
    if shape.prefix:
        parts, rows = -(-shape.tokens // PART), power_of_2(shape.prefix, most=most.keys)
        blocks = size * -(-shape.prefix // rows)
        acc, logs = scratch(query, parts * shape.prefix, value.shape[-1]), scratch(query, parts * shape.prefix)
        _rows[(blocks * parts,)](
            rows_of(query), rows_of(key), rows_of(value), rows_of(acc), logs, shape, parts, rows, most.keys, PART,
            num_stages=most.stages,
        )  # fmt: skip
        _join[(blocks,)](rows_of(acc), logs, rows_of(out), log_p, shape, parts, rows)
