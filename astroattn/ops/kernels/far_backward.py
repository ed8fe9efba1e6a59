"""Triton: near + far attention, the backward pass of what is read through the hidden layer.

With a = exp(r.w_j) z_tj / p, the share of a query's attention that neuron j has, and delta = d_out.o - d_log_p:

    states    z ds_j = sum_q a d_out, z dz_j = - sum_q a delta, of a group;
              with dl = a (d_out.s_j / z_j - delta): dr = sum_j dl w_j, dw_j = sum_q dl r
    keys      with c = exp(u.k_i) / z_gj: dl = c (z ds_j.v_i + z dz_j), dv_i = sum_g c z ds_j, dk_i = sum_g dl u,
              and dk_i += mass_i / (sum of mass in the cluster) dw_j
    means     du = sum_i dl k_i, of which and of - sum_q dr each query of the group gets its part

Where tiles share a group, the keys near to a tile are not in what the tile reads: each gets the negative of its part.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from astroattn.ops.kernels.clusters import Moments, Order
from astroattn.ops.kernels.features import narrow
from astroattn.ops.kernels.means import PROGRAMS, Means
from astroattn.ops.kernels.near_far_forward import Far, load_sums, near_shares
from astroattn.ops.kernels.tiles import (
    LN_2,
    LOG2_E,
    Rows,
    Shape,
    base,
    blocks_of,
    count_tiles,
    dot,
    end_of_columns,
    is_near,
    key_in_window,
    load_rows,
    power_of_2,
    rows_of,
    scratch,
    store_rows,
    tiles_of,
    token_of,
    window_of,
)


class FarGradients(NamedTuple):
    """Gradients of what is read through the hidden layer.

    Attributes:
        key, value: of the body keys [B, H, n, D], [B, H, n, Dv], but for what shared groups take out again.
        mean: what the queries of a group get, each its part, in parts [B, H, parts * R, D].
        near, near_logit: of the keys in the windows of tiles that share groups [B, H, T * W, Dv], [B, H, T * W]: of
            their values, and of their logit with u; None where no groups are shared.
    """

    key: Rows
    value: Rows
    mean: Rows
    near: Rows | None
    near_logit: Any


class Given(NamedTuple):
    """What the backward pass of every logit needs: d_out, log p and delta [B, H, N]."""

    d_out: Rows
    log_p: Any
    delta: Any


@triton.jit
def load_queries(query, d_out, log_p, delta, z, token, real, shape):
    """Rows of queries and of d_out, log2 p and delta, of body tokens (the prefix's are below 0); 0 where masked."""
    q = load_rows(query, base(query, z, shape) + shape.prefix * query.row, token, real)
    grad = load_rows(d_out, base(d_out, z, shape) + shape.prefix * d_out.row, token, real)
    place = z.to(tl.int64) * shape.tokens + shape.prefix + token
    log_sum = tl.load(log_p + place, mask=real, other=0.0) * LOG2_E
    return q, grad, log_sum, tl.load(delta + place, mask=real, other=0.0)


@triton.jit
def widened(x):
    """float16 as float32: a gradient may lie outside the range of float16."""
    if x.dtype == tl.float16:
        x = x.to(tl.float32)
    return x


@triton.jit
def _state_gradients(
    query, key, value, mean, d_out, log_p, delta, weights, log_sums, mean_values, winners,
    d_state, d_z, d_weights, d_mean, d_near, d_near_logit,
    shape, per_part, parts, SHARED: tl.constexpr, SLOTS: tl.constexpr, M: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = shape.HIGH * shape.WIDE
    WINDOW: tl.constexpr = shape.WINDOW_HIGH * shape.WINDOW_WIDE
    blocks = tl.cdiv(shape.clusters, M)
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks % parts
    z = tl.program_id(0) // blocks // parts
    end = end_of_columns(z, shape)
    count = count_tiles(end, shape)
    j = block * M + tl.arange(0, M)
    one = tl.arange(0, 1)
    w = load_rows(weights, base(weights, z, shape), j, j < shape.clusters)
    narrow_w = narrow(w, query.data.dtype.element_ty)
    acc_weights = tl.zeros([M, query.PADDED], tl.float32)
    for group in range(part * per_part, tl.minimum((part + 1) * per_part, shape.groups)):
        u = tl.sum(load_rows(mean, base(mean, z, shape), group + one, one == 0).to(tl.float32), 0)
        acc_state = tl.zeros([M, value.PADDED], tl.float32)
        acc_z = tl.zeros([M], tl.float32)
        acc_rest = tl.zeros([M], tl.float32)
        acc_mean = tl.zeros([query.PADDED], tl.float32)
        first_tile, last_tile = tiles_of(group, count, shape)
        for tile in range(first_tile, last_tile):
            log_z, mean_value, left = load_sums(
                log_sums, mean_values, winners, key, value, u, z, tile, group, j, end, shape, SHARED, KEYS
            )
            state = tl.zeros([M, value.PADDED], tl.float32)
            state_z = tl.zeros([M], tl.float32)
            mean_value = narrow(mean_value.to(tl.float32), value.data.dtype.element_ty)
            for first in range(0, SIZE, SLOTS):
                place = first + tl.arange(0, SLOTS)
                token, _, real = token_of(place + tile * SIZE, end, shape)
                real = real & (place < SIZE)
                q, grad, log_sum, offset = load_queries(query, d_out, log_p, delta, z, token, real, shape)
                rest = narrow(q.to(tl.float32) - u[None, :], q.dtype)
                logits = dot(rest, tl.trans(narrow_w)) * shape.scale + log_z[None, :]
                share = tl.where(real[:, None], tl.exp2(logits - log_sum[:, None]), 0.0)
                d_logit = share * (dot(grad, tl.trans(mean_value)) - offset[:, None])
                wide_grad, wide_rest = widened(grad), widened(rest)
                state = dot(tl.trans(narrow(share, wide_grad.dtype)), wide_grad, state)
                state_z -= tl.sum(share * offset[:, None], 0)
                acc_rest += tl.sum(d_logit, 0)
                acc_weights = dot(tl.trans(narrow(d_logit, wide_rest.dtype)), wide_rest, acc_weights)
            acc_state += state / left[:, None]
            acc_z += state_z / left
            if SHARED:
                groups = z.to(tl.int64) * shape.groups + group
                first_row, first_column = window_of(tile, end, shape)
                for first in range(0, tl.where(count <= shape.groups, 0, WINDOW), KEYS):
                    place = first + tl.arange(0, KEYS)
                    i, real = key_in_window(place, first_row, first_column, end, shape)
                    member = near_shares(log_sums, winners, key, u, z, groups, i, real, j, shape) / left[:, None]
                    k = load_rows(key, base(key, z, shape) + shape.prefix * key.row, i, real).to(tl.float32)
                    v = load_rows(value, base(value, z, shape) + shape.prefix * value.row, i, real).to(tl.float32)
                    d_value = dot(tl.trans(member), state)
                    d_logit = tl.sum(d_value * v, 1) + tl.sum(member * state_z[:, None], 0)
                    acc_mean -= tl.sum(d_logit[:, None] * k, 0)
                    slot = place + tile * WINDOW
                    mine = real & (tl.sum(member, 0) > 0)
                    store_rows(d_near, base(d_near, z, shape), slot, mine, -d_value)
                    tl.store(d_near_logit + z.to(tl.int64) * shape.tiles * WINDOW + slot, -d_logit, mask=mine)
        place = group * shape.clusters + j
        store_rows(d_state, base(d_state, z, shape), place, j < shape.clusters, acc_state)
        tl.store(d_z + z.to(tl.int64) * shape.groups * shape.clusters + place, acc_z, mask=j < shape.clusters)
        acc_mean = (acc_mean - tl.sum(acc_rest[:, None] * w, 0)) * (shape.scale * LN_2)
        store_rows(d_mean, base(d_mean, z, shape), block * shape.groups + group + one, one == 0, acc_mean[None, :])
    store_rows(d_weights, base(d_weights, z, shape), part * shape.clusters + j, j < shape.clusters, acc_weights)


@triton.jit
def _shares(logits, log_z, group, i, place, z, end, chosen, shape):
    """exp(u.k) / z of a cluster's keys, 0 where a group leaves the key out; all arguments broadcast."""
    share = tl.where(log_z > float("-inf"), tl.exp2(logits - tl.where(log_z > float("-inf"), log_z, 0.0)), 0.0)
    if shape.WINDOW_WIDE > 0:
        first_row, first_column = window_of(group, end, shape)
        near = is_near(i, first_row, first_column, shape) & (count_tiles(end, shape) <= shape.groups)
        share = tl.where(near, 0.0, share)
    if chosen is not None:
        mark = chosen + (z.to(tl.int64) * shape.groups + group) * (shape.rows * shape.columns) + place
        share = tl.where(tl.load(mark, mask=log_z > float("-inf"), other=0) != 0, 0.0, share)
    return share


@triton.jit
def _far_key_gradients(
    key, value, mean, order, start, chosen, log_z, d_state, d_z, d_weights, totals, mass, d_key, d_value,
    shape, weight_parts, mass_parts, GROUPS: tl.constexpr, KEYS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """One block of keys, all of one cluster."""
    n, m = shape.rows * shape.columns, shape.clusters
    all_blocks = n // KEYS + m
    z, block = tl.program_id(0) // all_blocks, tl.program_id(0) % all_blocks
    end = end_of_columns(z, shape)
    clusters = tl.arange(0, M)
    starts = start + z.to(tl.int64) * (m + 1) + clusters
    inside = clusters < m
    blocks = tl.cdiv(tl.load(starts + 1, mask=inside, other=0) - tl.load(starts, mask=inside, other=0), KEYS)
    before = tl.cumsum(blocks, 0) - blocks
    if block >= tl.sum(blocks, 0):
        return  # the grid has room for a part of a block in every cluster
    j = tl.sum((inside & (before + blocks <= block)).to(tl.int32), 0)
    begin = tl.load(start + z.to(tl.int64) * (m + 1) + j)
    place = begin + (block - tl.sum(tl.where(clusters == j, before, 0), 0)) * KEYS + tl.arange(0, KEYS)
    real = place < tl.load(start + z.to(tl.int64) * (m + 1) + j + 1)
    i = tl.load(order + z.to(tl.int64) * n + place, mask=real, other=0)
    k = load_rows(key, base(key, z, shape) + shape.prefix * key.row, i, real)
    v = widened(load_rows(value, base(value, z, shape) + shape.prefix * value.row, i, real))
    acc_key = tl.zeros([KEYS, key.PADDED], tl.float32)
    acc_value = tl.zeros([KEYS, value.PADDED], tl.float32)
    for first in range(0, shape.groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        there = group < shape.groups
        u = load_rows(mean, base(mean, z, shape), group, there)
        row = (z.to(tl.int64) * shape.groups + group) * m + j
        state = load_rows(d_state, base(d_state, z, shape), group * m + j, there)
        state_z = tl.load(d_z + row, mask=there, other=0.0)
        sums = tl.load(log_z + row, mask=there, other=float("-inf"))
        sums = tl.where(real[:, None], sums[None, :], float("-inf"))
        logits = dot(k, tl.trans(u)) * shape.scale
        share = _shares(logits, sums, group[None, :], i[:, None], place[:, None], z, end, chosen, shape)
        state = narrow(state, v.dtype)
        d_logit = share * (dot(v, tl.trans(state)) + state_z[None, :])
        acc_value = dot(narrow(share, v.dtype), state, acc_value)
        u = widened(u)
        acc_key = dot(narrow(d_logit, u.dtype), u, acc_key)
    total = 0.0
    for part in range(0, mass_parts):
        total += tl.load(totals + (z.to(tl.int64) * mass_parts + part) * m + j)
    one = tl.arange(0, 1)
    weights = tl.zeros([key.PADDED], tl.float32)
    for part in range(0, weight_parts):
        row = load_rows(d_weights, base(d_weights, z, shape), part * m + j + one, one == 0)
        weights += tl.sum(row, 0)
    weigh = tl.load(mass + z.to(tl.int64) * n + i, mask=real, other=0.0) / tl.where(total > 0, total, 1.0)
    acc_key = (acc_key + weigh[:, None] * weights[None, :]) * (shape.scale * LN_2)
    store_rows(d_key, base(d_key, z, shape), i, real, acc_key)
    store_rows(d_value, base(d_value, z, shape), i, real, acc_value)


@triton.jit
def _mean_gradients(
    key, value, mean, order, start, chosen, log_z, d_state, d_z, d_mean, shape, skip, parts,
    GROUPS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """du of a block of groups, from every `parts`-th cluster; written behind the first `skip` parts."""
    n, m = shape.rows * shape.columns, shape.clusters
    blocks = tl.cdiv(shape.groups, GROUPS)
    part, block = tl.program_id(0) % parts, tl.program_id(0) // parts % blocks
    z = tl.program_id(0) // parts // blocks
    end = end_of_columns(z, shape)
    group = block * GROUPS + tl.arange(0, GROUPS)
    there = group < shape.groups
    u = load_rows(mean, base(mean, z, shape), group, there)
    acc = tl.zeros([GROUPS, key.PADDED], tl.float32)
    for j in range(part, m, parts):
        row = (z.to(tl.int64) * shape.groups + group) * m + j
        state = load_rows(d_state, base(d_state, z, shape), group * m + j, there)
        state_z = tl.load(d_z + row, mask=there, other=0.0)
        sums = tl.load(log_z + row, mask=there, other=float("-inf"))
        last = tl.load(start + z.to(tl.int64) * (m + 1) + j + 1)
        for first in range(tl.load(start + z.to(tl.int64) * (m + 1) + j), last, KEYS):
            place = first + tl.arange(0, KEYS)
            real = place < last
            i = tl.load(order + z.to(tl.int64) * n + place, mask=real, other=0)
            k = load_rows(key, base(key, z, shape) + shape.prefix * key.row, i, real)
            v = widened(load_rows(value, base(value, z, shape) + shape.prefix * value.row, i, real))
            log_sums = tl.where(real[None, :], sums[:, None], float("-inf"))
            logits = dot(u, tl.trans(k)) * shape.scale
            share = _shares(logits, log_sums, group[:, None], i[None, :], place[None, :], z, end, chosen, shape)
            d_logit = share * (dot(narrow(state, v.dtype), tl.trans(v)) + state_z[:, None])
            k = widened(k)
            acc = dot(narrow(d_logit, k.dtype), k, acc)
    place = (skip + part) * shape.groups + group
    store_rows(d_mean, base(d_mean, z, shape), place, there, acc * (shape.scale * LN_2))


def far_gradients(
    shape: Shape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    given: Given,
    mass: Tensor,
    means: Means,
    moments: Moments,
    order: Order,
    far: Far,
    chosen: Tensor | None,
) -> FarGradients:
    """What the hidden layer hands back to its keys, its values and the mean queries."""
    size, groups, m = query.shape[0] * query.shape[1], shape.groups, shape.clusters
    dim, value_dim = query.shape[-1], value.shape[-1]
    shared = shape.tiles > groups
    most = blocks_of(key, value, widened=True)
    keys, stages = most.backward, most.stages - 1 or 1
    block = power_of_2(m, most=keys)
    blocks = -(-m // block)
    per_part = -(-groups // max(1, min(groups, PROGRAMS // (size * blocks))))
    weight_parts = -(-groups // per_part)
    group_block = power_of_2(groups, most=keys)
    splits = min(m, max(1, PROGRAMS // (size * -(-groups // group_block))))
    d_state, d_z = scratch(key, groups * m, value_dim), scratch(key, groups, m)
    d_weights, d_mean = scratch(key, weight_parts * m, dim), scratch(key, (blocks + splits) * groups, dim)
    near = near_logit = None
    if shared:
        near, near_logit = (scratch(key, shape.tiles * shape.window, *last).zero_() for last in ((value_dim,), ()))
    _state_gradients[(size * weight_parts * blocks,)](
        rows_of(query), rows_of(key), rows_of(value), rows_of(means.mean), *given, *far,
        rows_of(d_state), d_z, rows_of(d_weights), rows_of(d_mean), None if near is None else rows_of(near), near_logit,
        shape, per_part, weight_parts, shared, power_of_2(shape.slots, most=keys), block, 16,
        num_warps=4 if block <= 32 and max(dim, value_dim) <= 64 else 8, num_stages=stages,
    )  # fmt: skip
    d_key, d_value = scratch(key, shape.body, dim), scratch(key, shape.body, value_dim)
    written = (order.order, order.start, chosen, far.log_z, rows_of(d_state), d_z)
    _far_key_gradients[(size * (shape.body // keys + m),)](
        rows_of(key), rows_of(value), rows_of(means.mean), *written, rows_of(d_weights), moments.totals, mass,
        rows_of(d_key), rows_of(d_value), shape, weight_parts, moments.totals.shape[2], group_block, keys,
        power_of_2(m), num_warps=8, num_stages=stages,
    )  # fmt: skip
    _mean_gradients[(size * -(-groups // group_block) * splits,)](
        rows_of(key), rows_of(value), rows_of(means.mean), *written, rows_of(d_mean), shape, blocks, splits,
        group_block, keys, num_warps=8, num_stages=stages,
    )  # fmt: skip
    return FarGradients(
        rows_of(d_key), rows_of(d_value), rows_of(d_mean), None if near is None else rows_of(near), near_logit
    )
