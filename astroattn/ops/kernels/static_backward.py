"""The kernels of `kernels.static`, backward: of reading and of writing, each computing phi again."""

from __future__ import annotations

import triton
import triton.language as tl

from astroattn.ops.kernels.features import (
    TO_BASE_2,
    at,
    half_square_of,
    load_layer,
    load_rows,
    locate,
    operand,
    product,
    respond,
    store_rows,
    widen,
)


@triton.jit
def _add_rows(
    out, scratch, stride, rows, limit, x, block, BLOCKS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr
):
    """Store the sum of x over the blocks of neurons, which come in order; it stays in float32 until the last."""
    if BLOCKS == 1:
        store_rows(out, stride, rows, limit, x, SIZE, PADDED)
    else:
        x += load_rows(scratch, stride, rows, tl.where(block > 0, limit, 0), SIZE, PADDED)
        store_rows(scratch, stride, rows, tl.where(block < BLOCKS - 1, limit, 0), x, SIZE, PADDED)
        store_rows(out, stride, rows, tl.where(block == BLOCKS - 1, limit, 0), x, SIZE, PADDED)


@triton.jit
def input_gradient(x, w, scale_root, d_drive, phi_d_phi, NORM: tl.constexpr, LIKE: tl.constexpr):
    """d x of a block of neurons, from those of the drive and of phi, the latter times phi."""
    d_x = product(operand(d_drive, LIKE), widen(w), LIKE)
    if NORM != 0:  # through |x|^2 / 2
        d_half = tl.sum(phi_d_phi, 1) if NORM == 1 else -tl.sum(d_drive, 1)
        d_x += d_half[:, None] * (x.to(tl.float32) * scale_root)
    return d_x * scale_root


@triton.jit(do_not_specialize=["num_queries", "chunk", "chunks", "all_chunks"])
def read_backward_kernel(
    d_out, d_log_p, query, hidden, states, out, log_p, sign, d_query, scratch, d_state, d_weight,
    num_queries, chunk, chunks, all_chunks, scale_root, log_m,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BLOCKS: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Of one chunk of queries: d_query, and its part of d_kv and d_z [Z, chunks, m DV + m] and of d_weight.

    With a_j = phi_j(q) / p and delta = d_out.o - d_log_p:
    d_kv_j = sum a_j d_out, d_z_j = -sum a_j delta, d phi_j = (d_out.kv_j - delta z_j) / p.
    """
    LIKE: tl.constexpr = query[0].dtype.element_ty
    weight, phase, heads, num_hidden, layer_b = hidden
    sequence, b, h, part, first, count = locate(tl.program_id(0), chunks, chunk, num_queries, heads)
    weight += (b * layer_b + h) * num_hidden * D
    phase += (b * layer_b + h) * num_hidden
    kv_state = states[0] + sequence * num_hidden * DV
    z_state = states[1] + sequence * num_hidden
    top_state = states[2] + sequence * num_hidden
    d_state += (sequence * chunks + part) * num_hidden * (DV + 1)
    queries, query_n = at(query, b, h, first)
    outs, out_n = at(out, b, h, first)
    d_outs, d_out_n = at(d_out, b, h, first)
    d_queries, d_query_n = at(d_query, b, h, first)
    sums, _sum_n = at(scratch, b, h, first)
    for block in range(0, BLOCKS):
        neurons = block * M + tl.arange(0, M)
        w, kv, shift, z, top = load_layer(
            weight, phase, (kv_state, z_state, top_state), neurons, num_hidden, D, DP, DV, DVP, LIKE
        )
        d_kv = tl.zeros([M, DVP], tl.float32)
        d_z = tl.zeros([M], tl.float32)
        d_w = tl.zeros([M, DP], tl.float32)
        for start in range(0, count, N):
            tokens = start + tl.arange(0, N)
            row = sequence * num_queries + first + tokens
            q = load_rows(queries, query_n, tokens, count, D, DP)
            do = load_rows(d_outs, d_out_n, tokens, count, DV, DVP)
            reach = product(q, tl.trans(w), LIKE)
            gain, base, slope = respond(
                reach, scale_root, half_square_of(q, scale_root)[:, None], shift, log_m, ACTIVATION
            )
            gain += top
            through = product(widen(do), tl.trans(kv), LIKE)
            if BLOCKS == 1:  # p and delta come out on the way
                e = tl.exp2(gain - tl.max(gain, 1)[:, None])
                p = tl.sum(e * base * z, 1)
                e *= tl.where(p == 0, 0.0, 1.0 / p)[:, None]
                delta = tl.sum(e * base * through, 1)
            else:
                normaliser = tl.load(log_p + row, mask=tokens < count, other=float("-inf"))
                # Where nothing was read, log p is -inf and nothing has a share.
                normaliser = tl.where(normaliser == float("-inf"), float("inf"), normaliser)
                e = tl.exp2(gain - normaliser[:, None] * TO_BASE_2)
                if sign is not None:
                    e *= tl.load(sign + row, mask=tokens < count, other=0.0)[:, None]
                o = load_rows(outs, out_n, tokens, count, DV, DVP)
                delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
            if d_log_p is not None:
                delta -= tl.load(d_log_p + row, mask=tokens < count, other=0.0)
            d_phi = through - delta[:, None] * z
            d_drive = e * slope * d_phi
            d_kv += product(tl.trans(operand(e * base, LIKE)), widen(do), LIKE)
            d_z -= tl.sum(e * base * delta[:, None], 0)
            if d_weight is not None:
                d_w += product(tl.trans(operand(d_drive, LIKE)), widen(q), LIKE)
            d_q = input_gradient(q, w, scale_root, d_drive, e * base * d_phi, NORM, LIKE)
            _add_rows(d_queries, sums, d_query_n, tokens, count, d_q, block, BLOCKS, D, DP)
        store_rows(d_state, DV, neurons, num_hidden, d_kv, DV, DVP)
        tl.store(d_state + num_hidden * DV + neurons, d_z, mask=neurons < num_hidden)
        if d_weight is not None:
            one = d_weight + (sequence * all_chunks + part) * num_hidden * D
            store_rows(one, D, neurons, num_hidden, d_w * scale_root, D, DP)
        if BLOCKS > 1:
            tl.debug_barrier()  # the next block of neurons adds to what other threads may have stored


@triton.jit(do_not_specialize=["num_keys", "chunk", "chunks", "all_chunks"])
def write_backward_kernel(
    d_state, key, value, hidden, key_mask, top_state, d_key, d_value, key_scratch, value_scratch, d_weight,
    num_keys, chunk, chunks, all_chunks, scale_root, log_m,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BLOCKS: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Of one chunk of keys: d_key, d_value and its part of d_weight.

    d_v = sum_j phi_j(k) d_kv_j, d phi_j = d_kv_j.v + d_z_j.
    """
    LIKE: tl.constexpr = key[0].dtype.element_ty
    weight, phase, heads, num_hidden, layer_b = hidden
    sequence, b, h, part, first, count = locate(tl.program_id(0), chunks, chunk, num_keys, heads)
    weight += (b * layer_b + h) * num_hidden * D
    phase += (b * layer_b + h) * num_hidden
    top_state += sequence * num_hidden
    d_state += sequence * num_hidden * (DV + 1)
    keys, key_n = at(key, b, h, first)
    values, value_n = at(value, b, h, first)
    d_keys, d_key_n = at(d_key, b, h, first)
    d_values, d_value_n = at(d_value, b, h, first)
    key_sums, _key_sum_n = at(key_scratch, b, h, first)
    value_sums, _value_sum_n = at(value_scratch, b, h, first)
    for block in range(0, BLOCKS):
        neurons = block * M + tl.arange(0, M)
        w, d_kv, shift, d_z, top = load_layer(
            weight, phase, (d_state, d_state + num_hidden * DV, top_state), neurons, num_hidden, D, DP, DV, DVP, LIKE
        )
        d_w = tl.zeros([M, DP], tl.float32)
        for start in range(0, count, N):
            tokens = start + tl.arange(0, N)
            k = load_rows(keys, key_n, tokens, count, D, DP)
            v = load_rows(values, value_n, tokens, count, DV, DVP)
            real = tokens < count
            if key_mask is not None:
                real = tl.load(key_mask + b * num_keys + first + tokens, mask=real, other=0) != 0
            reach = product(k, tl.trans(w), LIKE)
            gain, base, slope = respond(
                reach, scale_root, half_square_of(k, scale_root)[:, None], shift, log_m, ACTIVATION
            )
            # Keys that are not there, and neurons that are not (top -inf), have no share.
            e = tl.exp2(tl.where(real[:, None] & (top > float("-inf")), gain - top, float("-inf")))
            d_phi = product(widen(v), tl.trans(d_kv), LIKE) + d_z
            d_drive = e * slope * d_phi
            d_v = product(operand(e * base, LIKE), d_kv, LIKE)
            if d_weight is not None:
                d_w += product(tl.trans(operand(d_drive, LIKE)), widen(k), LIKE)
            d_k = input_gradient(k, w, scale_root, d_drive, e * base * d_phi, NORM, LIKE)
            _add_rows(d_keys, key_sums, d_key_n, tokens, count, d_k, block, BLOCKS, D, DP)
            _add_rows(d_values, value_sums, d_value_n, tokens, count, d_v, block, BLOCKS, DV, DVP)
        if d_weight is not None:
            one = d_weight + (sequence * all_chunks + part) * num_hidden * D
            store_rows(one, D, neurons, num_hidden, d_w * scale_root, D, DP)
        if BLOCKS > 1:
            tl.debug_barrier()
