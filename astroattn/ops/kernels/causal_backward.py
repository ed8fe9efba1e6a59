"""Triton: the backward kernels of causal attention through a static hidden layer (`kernels.causal` launches them).

With share_ij = phi(q_i).phi(k_j) / p_i, or exp(q_i.k_j) / p_i where k_j is near, and delta_i = d_out_i.o_i - d_log_p_i:

    G_ij = d_out_i.v_j - delta_i          d v_j = sum_i share_ij d_out_i
    d phi(q_i) = sum_j G_ij phi(k_j) / p_i        d phi(k_j) = sum_i G_ij phi(q_i) / p_i
    near: d q_i = sum_j share_ij G_ij k_j         d k_j = sum_i share_ij G_ij q_i

A query reads the keys of earlier chunks through sums before the chunk, as in the forward pass; a key meets the queries
of later chunks through the sums behind its chunk, of phi(q) d_out / p and phi(q) delta / p. Slots, rows and `past` are
those of `causal_forward`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from astroattn.ops.kernels.causal_forward import (
    add_to_sums,
    load_sums,
    load_weights,
    locate,
    pick_column,
    pick_row,
    real_rows,
    respond_across,
    respond_along,
    start_of,
    store_sums,
)
from astroattn.ops.kernels.features import LOWEST, TO_BASE_2, narrow, operand, product, widen
from astroattn.ops.kernels.rows import load_rows, store_rows

# Most that log2 of phi(q) / p may be, times what a block's keys have of a feature at most: what a key has less than
# 2^-126 of that is taken as 0, which is wrong by no more than 2^-40 of a share.
MOST = tl.constexpr(86.0)


@triton.jit
def load_normaliser(log_p, sign, delta, line, inside):
    """log2 |p| of queries, inf where nothing was read and nothing has a share; the sign of p; and delta."""
    log = tl.load(log_p + line, mask=inside, other=float("-inf")) * TO_BASE_2
    log = tl.where(log == float("-inf"), float("inf"), log)
    one = tl.full(log.shape, 1.0, tl.float32)
    if sign is not None:
        one = tl.load(sign + line, mask=inside, other=1.0)
    return log, one, tl.load(delta + line, mask=inside, other=0.0)


@triton.jit
def delta_kernel(d_out, out, d_log_p, log_p, delta, shape, T: tl.constexpr):
    """delta = d_out.o - d_log_p, and 0 where nothing was read."""
    z_index, b, h, block = locate(tl.cdiv(shape.tokens, T), shape)
    index = block * T + tl.arange(0, T)
    inside = index < shape.tokens
    do = load_rows(d_out, start_of(d_out, b, h), index, inside).to(tl.float32)
    o = load_rows(out, start_of(out, b, h), index, inside).to(tl.float32)
    line = z_index * shape.tokens + index
    result = tl.sum(do * o, 1)
    if d_log_p is not None:
        result -= tl.load(d_log_p + line, mask=inside, other=0.0)
    empty = tl.load(log_p + line, mask=inside, other=0.0) == float("-inf")
    tl.store(delta + line, tl.where(empty, 0.0, result), mask=inside)


@triton.jit
def behind_kernel(query, d_out, layer, log_p, sign, delta, parts, shape, M: tl.constexpr, T: tl.constexpr):
    """What the queries of each chunk, but for the first, add to the sums behind: grid Z * (chunks - 1) * blocks."""
    LIKE: tl.constexpr = query.data.dtype.element_ty
    blocks = tl.cdiv(layer.size, M)
    pid = tl.program_id(0)
    z_index = (pid // blocks // parts.chunks).to(tl.int64)
    part, b, h = pid // blocks % parts.chunks, z_index // shape.heads, z_index % shape.heads
    neuron = pid % blocks * M + tl.arange(0, M)
    w, shift = load_weights(layer, b, h, neuron, query.DIM, query.PADDED, LIKE)
    kv = tl.zeros([M, d_out.PADDED], tl.float32)
    z = tl.zeros([M], tl.float32)
    top = tl.full([M], LOWEST, tl.float32)
    for first in range((part + 1) * shape.chunk, tl.minimum((part + 2) * shape.chunk, shape.tokens), T):
        index = first + tl.arange(0, T)
        inside = index < shape.tokens
        q = load_rows(query, start_of(query, b, h), index, inside)
        do = load_rows(d_out, start_of(d_out, b, h), index, inside)
        log, one, weight = load_normaliser(log_p, sign, delta, z_index * shape.tokens + index, inside)
        gain, base, _ = respond_across(w, shift, q, layer, inside[None, :], LIKE)
        kv, z, top = add_to_sums(kv, z, top, gain - log[None, :], base * one[None, :], do, weight, LIKE)
    store_sums(parts, z_index * parts.chunks + part, neuron, layer.size, kv, z, top)


@triton.jit
def add_d_weight(d_weight, part, neuron, size, again, d_w, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Store d_weight [neurons, PADDED] of a chunk, added to what lies there where `again`."""
    column = tl.arange(0, PADDED)
    mask = (neuron < size)[:, None] & (column < DIM)[None, :]
    place = d_weight + (part * size + neuron[:, None]) * DIM + column[None, :]
    old = (neuron < tl.where(again, size, 0))[:, None] & (column < DIM)[None, :]
    tl.store(place, d_w + tl.load(place, mask=old, other=0.0), mask=mask)


@triton.jit
def d_half_square(e, base, slope, NORM: tl.constexpr):
    """The gradient of |x|^2 / 2 from 2^gain d phi; see NORM in `kernels.static`."""
    return tl.sum(e * base, 1) if NORM == 1 else tl.sum(e * slope, 1) * NORM


@triton.jit(do_not_specialize=["parts"])
def query_kernel(
    d_out, query, key, value, layer, sums, log_p, sign, delta, d_query, d_weight, parts, shape, NORM: tl.constexpr,
    M: tl.constexpr, T: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """d_query of a chunk and its part of d_weight [Z, parts, m, D], from the sums before the chunk."""
    LIKE: tl.constexpr = query.data.dtype.element_ty
    z_index, b, h, chunk = locate(sums.chunks, shape)
    slot = z_index * sums.chunks + chunk
    k_start, v_start = start_of(key, b, h), start_of(value, b, h)
    place = tl.arange(0, T)
    neuron = tl.arange(0, M)
    w, shift = load_weights(layer, b, h, neuron, key.DIM, key.PADDED, LIKE)
    kv, z, top = load_sums(sums, slot, neuron, layer.size)
    ones = tl.full([T], 1.0, tl.float32)
    d_w = tl.zeros([M, query.PADDED], tl.float32)
    for first in range(chunk * shape.chunk, tl.minimum((chunk + 1) * shape.chunk, shape.tokens), T):
        index = first + place
        inside = index < shape.tokens
        q = load_rows(query, start_of(query, b, h), index, inside)
        do = load_rows(d_out, start_of(d_out, b, h), index, inside)
        log, one, dlt = load_normaliser(log_p, sign, delta, z_index * shape.tokens + index, inside)
        row = index - shape.shift
        real = real_rows(row, b, shape) & inside
        k = load_rows(key, k_start, row, real)
        v = load_rows(value, v_start, row, real)
        g = product(widen(do), tl.trans(widen(v)), LIKE) - dlt[:, None]
        seen = (place[None, :] <= place[:, None] - shape.NEAR) & real[None, :]
        g = tl.where(seen, g, 0.0)
        d_q = tl.zeros([T, query.PADDED], tl.float32)
        d_h = tl.zeros([T], tl.float32)
        for block in range(0, BLOCKS):
            if BLOCKS > 1:
                neuron = block * M + tl.arange(0, M)
                w, shift = load_weights(layer, b, h, neuron, key.DIM, key.PADDED, LIKE)
                kv, z, top = load_sums(sums, slot, neuron, layer.size)
            there = neuron < layer.size
            q_gain, q_base, q_slope = respond_along(w, shift, q, layer, there[None, :], LIKE)
            k_gain, k_base, _ = respond_across(w, shift, k, layer, there[:, None] & real[None, :], LIKE)
            q_gain -= log[:, None]
            e = product(widen(do), tl.trans(operand(kv, LIKE)), LIKE) - dlt[:, None] * z[None, :]
            e *= tl.exp2(q_gain + top[None, :])
            new_top = tl.maximum(top, tl.max(k_gain, 1))
            if tl.max(tl.max(q_gain + new_top[None, :], 1), 0) > MOST:
                for number in range(0, M):
                    gain = tl.where(seen, pick_row(k_gain, number)[None, :], float("-inf"))
                    pairs = tl.exp2(gain + pick_column(q_gain, number)[:, None])
                    one_e = tl.sum(pairs * g * pick_row(k_base, number)[None, :], 1)
                    e += tl.where((tl.arange(0, M) == number)[None, :], one_e[:, None], 0.0)
            else:
                phi_key = operand(tl.exp2(k_gain - new_top[:, None]) * k_base, LIKE)
                e += tl.exp2(q_gain + new_top[None, :]) * product(operand(g, LIKE), tl.trans(phi_key), LIKE)
            e *= one[:, None]
            d_drive = operand(e * q_slope, LIKE)
            d_q += product(d_drive, w, LIKE)
            if NORM != 0:
                d_h += d_half_square(e, q_base, q_slope, NORM)
            if d_weight is not None:
                if BLOCKS > 1:
                    d_w = tl.zeros([M, query.PADDED], tl.float32)
                d_w += product(tl.trans(d_drive), widen(q), LIKE) * layer.scale_root
                if BLOCKS > 1:
                    again = first > chunk * shape.chunk
                    add_d_weight(
                        d_weight, z_index * parts + chunk, neuron, layer.size, again, d_w, query.DIM, query.PADDED
                    )
            kv, z, top = add_to_sums(kv, z, top, k_gain, k_base, v, ones, LIKE)
            if BLOCKS > 1:
                store_sums(sums, slot, neuron, layer.size, kv, z, top)
        d_q += d_h[:, None] * (q.to(tl.float32) * layer.scale_root)
        if shape.NEAR:
            for block in range(first, tl.minimum(first + T, shape.tokens) + shape.past, T):
                near_slot = block + place
                row = near_slot - shape.shift
                k = load_rows(key, k_start, row, (row >= 0) & (row < shape.rows))
                v = load_rows(value, v_start, row, (row >= 0) & (row < shape.rows))
                distance = near_slot[None, :] - index[:, None]
                near = (distance >= 0) & (distance <= shape.past) & real_rows(row, b, shape)[None, :]
                logits = product(widen(q), tl.trans(widen(k)), LIKE) * (layer.scale_root * layer.scale_root * TO_BASE_2)
                shares = tl.exp2(tl.where(near, logits - log[:, None], float("-inf"))) * one[:, None]
                shares *= product(widen(do), tl.trans(widen(v)), LIKE) - dlt[:, None]
                d_q += product(operand(shares, LIKE), widen(k), LIKE) * layer.scale_root
        store_rows(d_query, start_of(d_query, b, h), index, inside, narrow(d_q * layer.scale_root, LIKE))
        if BLOCKS > 1:
            tl.debug_barrier()  # the next tokens read sums that other threads have stored
    if d_weight is not None and BLOCKS == 1:
        add_d_weight(d_weight, z_index * parts + chunk, neuron, layer.size, False, d_w, query.DIM, query.PADDED)


@triton.jit(do_not_specialize=["parts"])
def key_kernel(
    d_out, query, key, value, layer, sums, log_p, sign, delta, d_key, d_value, d_weight, parts, shape,
    NORM: tl.constexpr, M: tl.constexpr, T: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """d_key and d_value of a chunk of slots and its part of d_weight [Z, parts, m, D], from the sums behind it.

    The blocks of a chunk come last one first. The last slots, of the near field, are behind all chunks of queries.
    """
    LIKE: tl.constexpr = query.data.dtype.element_ty
    z_index, b, h, chunk = locate(sums.chunks, shape)
    slot = z_index * sums.chunks + chunk
    q_start, do_start = start_of(query, b, h), start_of(d_out, b, h)
    place = tl.arange(0, T)
    neuron = tl.arange(0, M)
    w, shift = load_weights(layer, b, h, neuron, key.DIM, key.PADDED, LIKE)
    kv, z, top = load_sums(sums, slot, neuron, layer.size)
    d_w = tl.zeros([M, key.PADDED], tl.float32)
    steps = tl.cdiv(tl.minimum(shape.chunk, shape.tokens + shape.past - chunk * shape.chunk), T)
    for step in range(0, steps):
        first = chunk * shape.chunk + (steps - 1 - step) * T
        index = first + place
        row = index - shape.shift
        real = real_rows(row, b, shape)
        k = load_rows(key, start_of(key, b, h), row, real)
        v = load_rows(value, start_of(value, b, h), row, real)
        d_k = tl.zeros([T, key.PADDED], tl.float32)
        d_v = tl.zeros([T, value.PADDED], tl.float32)
        d_h = tl.zeros([T], tl.float32)
        inside = index < shape.tokens
        q = load_rows(query, q_start, index, inside)
        do = load_rows(d_out, do_start, index, inside)
        log, one, dlt = load_normaliser(log_p, sign, delta, z_index * shape.tokens + index, inside)
        seen = (place[:, None] <= place[None, :] - shape.NEAR) & real[:, None]
        g = tl.where(seen, product(widen(v), tl.trans(widen(do)), LIKE) - dlt[None, :], 0.0)
        shares = tl.zeros([T, T], tl.float32)
        for block in range(0, BLOCKS):
            if BLOCKS > 1:
                neuron = block * M + tl.arange(0, M)
                w, shift = load_weights(layer, b, h, neuron, key.DIM, key.PADDED, LIKE)
                kv, z, top = load_sums(sums, slot, neuron, layer.size)
            there = neuron < layer.size
            written = real & inside
            k_gain, k_base, k_slope = respond_along(w, shift, k, layer, there[None, :] & written[:, None], LIKE)
            q_gain, q_base, _ = respond_across(w, shift, q, layer, there[:, None] & inside[None, :], LIKE)
            q_gain -= log[None, :]
            q_base *= one[None, :]
            rise = tl.exp2(k_gain + top[None, :])
            e = rise * (product(widen(v), tl.trans(operand(kv, LIKE)), LIKE) - z[None, :])
            d_v += product(operand(rise * k_base, LIKE), operand(kv, LIKE), LIKE)
            high = tl.maximum(tl.max(k_gain, 0), LOWEST)
            if tl.max(tl.max(q_gain + high[:, None], 1), 0) > MOST:
                for number in range(0, M):
                    gain = tl.where(seen, pick_column(k_gain, number)[:, None], float("-inf"))
                    pairs = tl.exp2(gain + pick_row(q_gain, number)[None, :]) * pick_row(q_base, number)[None, :]
                    shares += pairs * pick_column(k_base, number)[:, None]
                    one_e = tl.sum(pairs * g, 1)
                    e += tl.where((tl.arange(0, M) == number)[None, :], one_e[:, None], 0.0)
            else:
                phi = operand(tl.exp2(q_gain + high[:, None]) * q_base, LIKE)
                rise = tl.exp2(k_gain - high[None, :])
                shares += product(operand(rise * k_base, LIKE), phi, LIKE)
                e += rise * product(operand(g, LIKE), tl.trans(phi), LIKE)
            d_drive = operand(e * k_slope, LIKE)
            d_k += product(d_drive, w, LIKE)
            if NORM != 0:
                d_h += d_half_square(e, k_base, k_slope, NORM)
            if d_weight is not None:
                if BLOCKS > 1:
                    d_w = tl.zeros([M, key.PADDED], tl.float32)
                d_w += product(tl.trans(d_drive), widen(k), LIKE) * layer.scale_root
                if BLOCKS > 1:
                    add_d_weight(
                        d_weight, z_index * parts + chunk, neuron, layer.size, step > 0, d_w, key.DIM, key.PADDED
                    )
            kv, z, top = add_to_sums(kv, z, top, q_gain, q_base, do, dlt, LIKE)
            if BLOCKS > 1:
                store_sums(sums, slot, neuron, layer.size, kv, z, top)
        d_v += product(operand(tl.where(seen, shares, 0.0), LIKE), widen(do), LIKE)
        d_k += d_h[:, None] * (k.to(tl.float32) * layer.scale_root)
        if shape.NEAR:
            for block in range(tl.maximum(first - shape.past, 0), tl.minimum(first + T, shape.tokens), T):
                at = block + place
                inside = at < shape.tokens
                q = load_rows(query, q_start, at, inside)
                do = load_rows(d_out, do_start, at, inside)
                log, one, dlt = load_normaliser(log_p, sign, delta, z_index * shape.tokens + at, inside)
                distance = index[:, None] - at[None, :]
                near = (distance >= 0) & (distance <= shape.past) & real[:, None] & inside[None, :]
                logits = product(widen(k), tl.trans(widen(q)), LIKE) * (layer.scale_root * layer.scale_root * TO_BASE_2)
                shares = tl.exp2(tl.where(near, logits - log[None, :], float("-inf"))) * one[None, :]
                d_v += product(operand(shares, LIKE), widen(do), LIKE)
                shares *= product(widen(v), tl.trans(widen(do)), LIKE) - dlt[None, :]
                d_k += product(operand(shares, LIKE), widen(q), LIKE) * layer.scale_root
        exists = (row >= 0) & (row < shape.rows)
        store_rows(d_key, start_of(d_key, b, h), row, exists, narrow(d_k * layer.scale_root, LIKE))
        store_rows(d_value, start_of(d_value, b, h), row, exists, narrow(d_v, LIKE))
        if BLOCKS > 1:
            tl.debug_barrier()  # the next tokens read sums that other threads have stored
    if d_weight is not None and BLOCKS == 1:
        add_d_weight(d_weight, z_index * parts + chunk, neuron, layer.size, False, d_w, key.DIM, key.PADDED)
