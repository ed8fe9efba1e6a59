"""Triton: near + far attention, backward, given what was chosen (`kernels.far_backward` has the hidden layer).

    delta     d_out.o - d_log_p
    queries   dq of the tiles: flash attention's backward over all that a tile reads
    chosen    dk and dv of each exact key of each group [B, H, R * e, ...]
    keys      dk and dv of the body: from the tiles whose windows hold a key, from the prefix's queries, from the groups
              that have chosen it (by an index sorted by keys), and from the hidden layer
    prefix    dq of the prefix's queries, dk and dv of the prefix's keys, in parts

Nothing is added atomically: every sum has a fixed order, so equal inputs give equal bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from astroattn.ops.kernels.far_backward import FarGradients, Given, load_queries
from astroattn.ops.kernels.features import narrow
from astroattn.ops.kernels.means import Means
from astroattn.ops.kernels.near_far_forward import NO_HIDDEN_LAYER, PART, Far, load_sums
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
    tiles_near,
    tiles_of,
    token_of,
    window_of,
)
from astroattn.ops.rows import empty_rows


class ChosenGradients(NamedTuple):
    """Gradients of the chosen keys, as rows [B, H, R * e, ...], and where those of each key are: `slot` [B * H, R * e]
    lists them by key, from first[i] on of [B * H, n + 1]."""

    key: Rows
    value: Rows
    slot: Any
    first: Any
    slots: int


@triton.jit
def _delta(out, d_out, d_log_p, delta, shape, ROWS: tl.constexpr):
    """d_out.o - d_log_p [B, H, N]; 0 for padding."""
    blocks = tl.cdiv(shape.tokens, ROWS)
    z, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    i = block * ROWS + tl.arange(0, ROWS)
    real = i < real_tokens(z, shape)
    o = load_rows(out, base(out, z, shape), i, real).to(tl.float32)
    grad = load_rows(d_out, base(d_out, z, shape), i, real).to(tl.float32)
    place = z.to(tl.int64) * shape.tokens + i
    total = tl.sum(tl.where(real[:, None], o * grad, 0.0), 1)
    if d_log_p is not None:
        total -= tl.load(d_log_p + place, mask=real, other=0.0).to(tl.float32)
    tl.store(delta + place, total, mask=i < shape.tokens)


@triton.jit
def _back(q, k, v, grad, log_sum, offset, seen, scale):
    """Shares [Q, K] of the attention and the gradient of the logits, 0 where not seen."""
    logits = dot(q, tl.trans(k)) * scale
    share = tl.where(seen, tl.exp2(logits - log_sum[:, None]), 0.0)
    return share, share * (dot(grad, tl.trans(v)) - offset[:, None])


@triton.jit
def _query_gradients(
    query, key, value, mean, d_out, log_p, delta, weights, log_sums, mean_values, winners,
    keys, number, d_mean, d_query, shape, num_keys, mean_parts,
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
    q, grad, log_sum, offset = load_queries(query, d_out, log_p, delta, z, token, real, shape)
    key_start, value_start = base(key, z, shape), base(value, z, shape)
    acc = tl.zeros([SLOTS, query.PADDED], tl.float32)
    for first in range(0, tl.minimum(shape.prefix, real_tokens(z, shape)), 16):
        i = first + tl.arange(0, 16)
        there = i < tl.minimum(shape.prefix, real_tokens(z, shape))
        k, v = load_rows(key, key_start, i, there), load_rows(value, value_start, i, there)
        _, d_logit = _back(q, k, v, grad, log_sum, offset, real[:, None] & there[None, :], shape.scale)
        acc = dot(narrow(d_logit, k.dtype), k, acc)
    key_start += shape.prefix * key.row
    value_start += shape.prefix * value.row
    first_row, first_column = window_of(tile, end, shape)
    for first in range(0, WINDOW, KEYS):
        i, there = key_in_window(first + tl.arange(0, KEYS), first_row, first_column, end, shape)
        k, v = load_rows(key, key_start, i, there), load_rows(value, value_start, i, there)
        _, d_logit = _back(q, k, v, grad, log_sum, offset, real[:, None] & there[None, :], shape.scale)
        acc = dot(narrow(d_logit, k.dtype), k, acc)
    if keys is not None:
        for first in range(0, num_keys, CHOSEN):
            slot = first + tl.arange(0, CHOSEN)
            mine = keys + (z.to(tl.int64) * shape.groups + group) * num_keys
            i = tl.load(mine + slot, mask=slot < num_keys, other=-1)
            k, v = load_rows(key, key_start, i, i >= 0), load_rows(value, value_start, i, i >= 0)
            _, d_logit = _back(q, k, v, grad, log_sum, offset, real[:, None] & (i >= 0)[None, :], shape.scale)
            acc = dot(narrow(d_logit, k.dtype), k, acc)
    common = tl.zeros([query.PADDED], tl.float32)
    if log_sums is not None:
        one = tl.arange(0, 1)
        u = tl.sum(load_rows(mean, base(mean, z, shape), group + one, one == 0).to(tl.float32), 0)
        rest = narrow(q.to(tl.float32) - u[None, :], q.dtype)
        for first in range(0, shape.clusters, M):
            j = first + tl.arange(0, M)
            log_z, mean_value, _ = load_sums(
                log_sums, mean_values, winners, key, value, u, z, tile, group, j, end, shape, SHARED, 16
            )
            w = narrow(load_rows(weights, base(weights, z, shape), j, j < shape.clusters), q.dtype)
            share = tl.exp2(dot(rest, tl.trans(w)) * shape.scale + log_z[None, :] - log_sum[:, None])
            mean_value = narrow(mean_value.to(tl.float32), grad.dtype)
            d_logit = share * (dot(grad, tl.trans(mean_value)) - offset[:, None])
            acc = dot(narrow(tl.where(real[:, None], d_logit, 0.0), w.dtype), w, acc)
        for part in range(0, mean_parts):
            row = load_rows(d_mean, base(d_mean, z, shape), part * shape.groups + group + one, one == 0)
            common += tl.sum(row, 0)
        common = common / tl.maximum(tl.load(number + z.to(tl.int64) * shape.groups + group), 1.0)
    acc = tl.where(real[:, None], acc * (shape.scale * LN_2) + common[None, :], 0.0)
    store_rows(d_query, base(d_query, z, shape) + shape.prefix * d_query.row, token, inside, acc)


@triton.jit
def _chosen_gradients(
    query, key, value, d_out, log_p, delta, keys, d_key, d_value, shape, num_keys,
    SLOTS: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = shape.HIGH * shape.WIDE
    blocks = tl.cdiv(num_keys, CHOSEN)
    block, group = tl.program_id(0) % blocks, tl.program_id(0) // blocks % shape.groups
    z = tl.program_id(0) // blocks // shape.groups
    end = end_of_columns(z, shape)
    slot = block * CHOSEN + tl.arange(0, CHOSEN)
    i = tl.load(keys + (z.to(tl.int64) * shape.groups + group) * num_keys + slot, mask=slot < num_keys, other=-1)
    k = load_rows(key, base(key, z, shape) + shape.prefix * key.row, i, i >= 0)
    v = load_rows(value, base(value, z, shape) + shape.prefix * value.row, i, i >= 0)
    acc_key = tl.zeros([CHOSEN, key.PADDED], tl.float32)
    acc_value = tl.zeros([CHOSEN, value.PADDED], tl.float32)
    first_tile, last_tile = tiles_of(group, count_tiles(end, shape), shape)
    for first in range(first_tile * SIZE, last_tile * SIZE, SLOTS):
        place = first + tl.arange(0, SLOTS)
        token, _, real = token_of(place, end, shape)
        real = real & (place < last_tile * SIZE)
        q, grad, log_sum, offset = load_queries(query, d_out, log_p, delta, z, token, real, shape)
        share, d_logit = _back(q, k, v, grad, log_sum, offset, real[:, None] & (i >= 0)[None, :], shape.scale)
        acc_value = dot(tl.trans(narrow(share, grad.dtype)), grad, acc_value)
        acc_key = dot(tl.trans(narrow(d_logit, q.dtype)), q, acc_key)
    store_rows(d_key, base(d_key, z, shape), group * num_keys + slot, slot < num_keys, acc_key)
    store_rows(d_value, base(d_value, z, shape), group * num_keys + slot, slot < num_keys, acc_value)


@triton.jit
def _key_gradients(
    query, key, value, mean, d_out, log_p, delta,
    far_key, far_value, far_near, near_logit, chosen_key, chosen_value, slot_of, first_of, num_slots,
    d_key, d_value, shape,
    HIDDEN: tl.constexpr, SLOTS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = shape.HIGH * shape.WIDE
    WINDOW: tl.constexpr = shape.WINDOW_HIGH * shape.WINDOW_WIDE
    n = shape.rows * shape.columns
    blocks = tl.cdiv(n, KEYS)
    z, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    end = end_of_columns(z, shape)
    count = count_tiles(end, shape)
    i = block * KEYS + tl.arange(0, KEYS)
    real = i < shape.rows * end
    k = load_rows(key, base(key, z, shape) + shape.prefix * key.row, i, real)
    v = load_rows(value, base(value, z, shape) + shape.prefix * value.row, i, real)
    acc_key = tl.zeros([KEYS, key.PADDED], tl.float32)
    acc_value = tl.zeros([KEYS, value.PADDED], tl.float32)
    if WINDOW > 0:
        first_row, last_row = 0, 1
        left, right = block * KEYS, tl.minimum(block * KEYS + KEYS, end) - 1
        if shape.GRID:
            top, bottom = left // shape.columns, tl.minimum(block * KEYS + KEYS, n) - 1
            bottom, single = bottom // shape.columns, bottom // shape.columns == top
            left = tl.where(single, left % shape.columns, 0)
            right = tl.where(single, (tl.minimum(block * KEYS + KEYS, n) - 1) % shape.columns, shape.columns - 1)
            first_row, last_row = tiles_near(
                top, bottom, shape.rows, shape.tiles // shape.across, shape.HIGH, shape.WINDOW_HIGH
            )
        across = shape.across if shape.GRID else count
        begin, stop = tiles_near(left, right, end, across, shape.WIDE, shape.WINDOW_WIDE)
        for row in range(first_row, last_row):
            for first in range((row * across + begin) * SIZE, (row * across + stop) * SIZE, SLOTS):
                place = first + tl.arange(0, SLOTS)
                token, _, there = token_of(place, end, shape)
                there = there & (place < (row * across + stop) * SIZE)
                window_row, window_column = window_of(place // SIZE, end, shape)
                seen = is_near(i[None, :], window_row[:, None], window_column[:, None], shape)
                seen = seen & there[:, None] & real[None, :]
                q, grad, log_sum, offset = load_queries(query, d_out, log_p, delta, z, token, there, shape)
                share, d_logit = _back(q, k, v, grad, log_sum, offset, seen, shape.scale)
                acc_value = dot(tl.trans(narrow(share, grad.dtype)), grad, acc_value)
                acc_key = dot(tl.trans(narrow(d_logit, q.dtype)), q, acc_key)
    for first in range(0, tl.minimum(shape.prefix, real_tokens(z, shape)), 16):
        token = first + tl.arange(0, 16)
        there = token < tl.minimum(shape.prefix, real_tokens(z, shape))
        q, grad, log_sum, offset = load_queries(query, d_out, log_p, delta, z, token - shape.prefix, there, shape)
        share, d_logit = _back(q, k, v, grad, log_sum, offset, there[:, None] & real[None, :], shape.scale)
        acc_value = dot(tl.trans(narrow(share, grad.dtype)), grad, acc_value)
        acc_key = dot(tl.trans(narrow(d_logit, q.dtype)), q, acc_key)
    acc_key *= shape.scale * LN_2
    if first_of is not None:
        # Where the groups that have chosen a key have left their parts: places in `slot_of` from `first_of[i]` on.
        place = tl.load(first_of + z.to(tl.int64) * (n + 1) + i, mask=real, other=0)
        last = tl.load(first_of + z.to(tl.int64) * (n + 1) + i + 1, mask=real, other=0)
        for _ in range(0, tl.max(last - place, 0)):
            slot = tl.load(slot_of + z.to(tl.int64) * num_slots + place, mask=place < last, other=0)
            acc_key += load_rows(chosen_key, base(chosen_key, z, shape), slot, place < last) * (shape.scale * LN_2)
            acc_value += load_rows(chosen_value, base(chosen_value, z, shape), slot, place < last)
            place += 1
    if HIDDEN:
        acc_key += load_rows(far_key, base(far_key, z, shape), i, real)
        acc_value += load_rows(far_value, base(far_value, z, shape), i, real)
        if near_logit is not None:
            # What the group's sums gave to the key and the tile did not read.
            begin, stop = tiles_near(i % shape.columns, i % shape.columns, end, across, shape.WIDE, shape.WINDOW_WIDE)
            row, last_row = begin * 0, begin * 0 + 1
            if shape.GRID:
                row, last_row = tiles_near(
                    i // shape.columns, i // shape.columns, shape.rows, shape.tiles // across,
                    shape.HIGH, shape.WINDOW_HIGH,
                )  # fmt: skip
            for down in range(0, tl.max(last_row - row, 0)):
                for right in range(0, tl.max(stop - begin, 0)):
                    tile = (row + down) * across + begin + right
                    window_row, window_column = window_of(tile, end, shape)
                    near = is_near(i, window_row, window_column, shape) & real
                    near = near & (row + down < last_row) & (begin + right < stop)
                    slot = i - window_column
                    if shape.GRID:
                        slot = (i // shape.columns - window_row) * shape.WINDOW_WIDE
                        slot += i % shape.columns - window_column
                    slot += tile * WINDOW
                    d_logit = tl.load(near_logit + z.to(tl.int64) * shape.tiles * WINDOW + slot, mask=near, other=0.0)
                    u = load_rows(mean, base(mean, z, shape), group_of(tile, count, shape), near)
                    acc_key += d_logit[:, None] * u.to(tl.float32) * (shape.scale * LN_2)
                    acc_value += load_rows(far_near, base(far_near, z, shape), slot, near)
    store_rows(d_key, base(d_key, z, shape) + shape.prefix * d_key.row, i, i < n, acc_key)
    store_rows(d_value, base(d_value, z, shape) + shape.prefix * d_value.row, i, i < n, acc_value)


@triton.jit
def _prefix_gradients(
    query, key, value, d_out, log_p, delta, d_query, d_key, d_value, shape, parts,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Of the prefix's queries over one part of all keys, and of its keys over one part of all queries."""
    blocks = tl.cdiv(shape.prefix, ROWS)
    part, block = tl.program_id(0) % parts, tl.program_id(0) // parts % blocks
    z = tl.program_id(0) // parts // blocks
    tokens = real_tokens(z, shape)
    mine = block * ROWS + tl.arange(0, ROWS)
    inside = mine < tl.minimum(shape.prefix, tokens)
    q, grad, log_sum, offset = load_queries(query, d_out, log_p, delta, z, mine - shape.prefix, inside, shape)
    k = load_rows(key, base(key, z, shape), mine, inside)
    v = load_rows(value, base(value, z, shape), mine, inside)
    acc_query = tl.zeros([ROWS, query.PADDED], tl.float32)
    acc_key = tl.zeros([ROWS, key.PADDED], tl.float32)
    acc_value = tl.zeros([ROWS, value.PADDED], tl.float32)
    for first in range(part * PART, tl.minimum((part + 1) * PART, tokens), KEYS):
        i = first + tl.arange(0, KEYS)
        real = i < tokens
        theirs = load_rows(key, base(key, z, shape), i, real)
        their_value = load_rows(value, base(value, z, shape), i, real)
        seen = inside[:, None] & real[None, :]
        _, d_logit = _back(q, theirs, their_value, grad, log_sum, offset, seen, shape.scale)
        acc_query = dot(narrow(d_logit, theirs.dtype), theirs, acc_query)
        q_i, grad_i, log_i, offset_i = load_queries(query, d_out, log_p, delta, z, i - shape.prefix, real, shape)
        share, d_logit = _back(q_i, k, v, grad_i, log_i, offset_i, real[:, None] & inside[None, :], shape.scale)
        acc_value = dot(tl.trans(narrow(share, grad_i.dtype)), grad_i, acc_value)
        acc_key = dot(tl.trans(narrow(d_logit, q_i.dtype)), q_i, acc_key)
    place = part * shape.prefix + mine
    wanted = mine < shape.prefix
    store_rows(d_query, base(d_query, z, shape), place, wanted, acc_query * (shape.scale * LN_2))
    store_rows(d_key, base(d_key, z, shape), place, wanted, acc_key * (shape.scale * LN_2))
    store_rows(d_value, base(d_value, z, shape), place, wanted, acc_value)


def write_delta(shape: Shape, out: Tensor, d_out: Tensor, d_log_p: Tensor | None) -> Tensor:
    """d_out.o - d_log_p [B, H, N]; d_log_p None is 0."""
    delta = scratch(out, shape.tokens)
    _delta[(out.shape[0] * out.shape[1] * -(-shape.tokens // 64),)](
        rows_of(out), rows_of(d_out), None if d_log_p is None else d_log_p.contiguous(), delta, shape, 64
    )
    return delta


def exact_gradients(
    shape: Shape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    given: Given,
    keys: Tensor,
    means: Means | None,
    far: Far | None,
    back: FarGradients | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values: of all exact keys, and those of the hidden layer added."""
    size, num_keys, prefix = query.shape[0] * query.shape[1], keys.shape[-1], shape.prefix
    d_query, d_key, d_value = (empty_rows(x, x.shape[-1]) for x in (query, key, value))
    inputs, mean = tuple(map(rows_of, (query, key, value))), None if means is None else rows_of(means.mean)
    most = blocks_of(query, value)
    block, stages = most.backward, most.stages - 1 or 1
    slots = power_of_2(shape.slots, most=block)
    _query_gradients[(size * shape.tiles * -(-shape.slots // slots),)](
        *inputs, mean, *given, *(far or NO_HIDDEN_LAYER), keys if num_keys else None,
        None if means is None else means.number,
        None if back is None else back.mean, rows_of(d_query), shape, num_keys,
        0 if back is None else back.mean.data.shape[2] // shape.groups, shape.tiles > shape.groups, slots,
        *(power_of_2(number, most=block) for number in (shape.window, num_keys, shape.clusters)),
        num_warps=4 if block > 32 or max(query.shape[-1], value.shape[-1]) <= 128 else 8, num_stages=stages,
    )  # fmt: skip
    chosen = _gradients_of_chosen(shape, query, key, value, given, keys) if num_keys else None
    _key_gradients[(size * -(-shape.body // block),)](
        *inputs, mean, *given,
        *(NO_HIDDEN_LAYER if back is None else (back.key, back.value, back.near, back.near_logit)),
        *(chosen or (None, None, None, None, 0)), rows_of(d_key), rows_of(d_value), shape,
        back is not None, block, block,
         num_warps=8, num_stages=stages,
    )  # fmt: skip
    if prefix:
        parts, rows = -(-shape.tokens // PART), power_of_2(prefix, most=block)
        sums = [scratch(query, parts * prefix, x.shape[-1]) for x in (query, key, value)]
        _prefix_gradients[(size * parts * -(-prefix // rows),)](
            *inputs, *given, *map(rows_of, sums), shape, parts, rows, block, PART, num_warps=8, num_stages=stages
        )
        for gradient, part in zip((d_query, d_key, d_value), sums, strict=True):
            gradient[:, :, :prefix] = part.unflatten(2, (parts, prefix)).sum(2)
    return d_query, d_key, d_value


def _gradients_of_chosen(
    shape: Shape, query: Tensor, key: Tensor, value: Tensor, given: Given, keys: Tensor
) -> ChosenGradients:
    """The gradients of the chosen keys, and an index of them by key."""
    num_keys, most = keys.shape[-1], blocks_of(query, value).backward
    d_key, d_value = (scratch(key, shape.groups * num_keys, x.shape[-1]) for x in (key, value))
    block = power_of_2(num_keys, most=most)
    _chosen_gradients[(keys.shape[0] * keys.shape[1] * shape.groups * -(-num_keys // block),)](
        rows_of(query), rows_of(key), rows_of(value), *given, keys, rows_of(d_key), rows_of(d_value), shape, num_keys,
        power_of_2(-(-shape.tiles // shape.groups) * shape.slots, most=most), block,
    )  # fmt: skip
    flat = keys.flatten(0, 1).flatten(1)
    by_key, slot = flat.masked_fill(flat < 0, shape.body).sort(stable=True)
    bounds = torch.arange(shape.body + 1, dtype=by_key.dtype, device=keys.device).expand(len(flat), -1).contiguous()
    first = torch.searchsorted(by_key, bounds, out_int32=True)
    return ChosenGradients(rows_of(d_key), rows_of(d_value), slot, first, flat.shape[1])
