"""The kernels of `kernels.static`, forward: write, combine, read."""

from __future__ import annotations

import triton
import triton.language as tl

from astroattn.ops.kernels.features import (
    LOG_2,
    LOWEST,
    at,
    half_square_of,
    load_layer,
    load_rows,
    locate,
    narrow,
    operand,
    product,
    respond,
    store_rows,
    widen,
)


@triton.jit(do_not_specialize=["num_keys", "chunk", "chunks"])
def write_kernel(
    key, value, hidden, key_mask, states, num_keys, chunk, chunks, scale_root, log_m,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """States of one chunk of keys and one block of neurons: kv [Z, chunks, m, DV], z and top [Z, chunks, m]."""
    LIKE: tl.constexpr = key[0].dtype.element_ty
    weight, phase, heads, num_hidden, layer_b = hidden
    blocks = tl.cdiv(num_hidden, M)
    pid = tl.program_id(0)
    sequence, b, h, part, first, count = locate(pid // blocks, chunks, chunk, num_keys, heads)
    neurons = pid % blocks * M + tl.arange(0, M)
    layer = (b * layer_b + h) * num_hidden
    w = narrow(load_rows(weight + layer * D, D, neurons, num_hidden, D, DP), LIKE)
    shift = tl.load(phase + layer + neurons, mask=neurons < num_hidden, other=0.0).to(tl.float32)
    keys, key_n = at(key, b, h, first)
    values, value_n = at(value, b, h, first)
    kv = tl.zeros([M, DVP], tl.float32)
    z = tl.zeros([M], tl.float32)
    top = tl.full([M], LOWEST, tl.float32)
    for start in range(0, count, N):
        tokens = start + tl.arange(0, N)
        k = load_rows(keys, key_n, tokens, count, D, DP)
        v = load_rows(values, value_n, tokens, count, DV, DVP)
        real = tokens < count
        if key_mask is not None:
            real = tl.load(key_mask + b * num_keys + first + tokens, mask=real, other=0) != 0
        reach = product(w, tl.trans(k), LIKE)
        half_square = half_square_of(k, scale_root)[None, :]
        gain, base, _slope = respond(reach, scale_root, half_square, shift[:, None], log_m, ACTIVATION)
        gain = tl.where(real[None, :], gain, float("-inf"))
        high = tl.maximum(top, tl.max(gain, 1))
        fade = tl.exp2(top - high)
        phi = tl.exp2(gain - high[:, None]) * base
        kv = kv * fade[:, None] + product(operand(phi, LIKE), widen(v), LIKE)
        z = z * fade + tl.sum(phi, 1)
        top = high
    state = (sequence * chunks + part) * num_hidden
    store_rows(states[0] + state * DV, DV, neurons, num_hidden, kv, DV, DVP)
    tl.store(states[1] + state + neurons, z, mask=neurons < num_hidden)
    tl.store(states[2] + state + neurons, top, mask=neurons < num_hidden)


@triton.jit(do_not_specialize=["num_hidden", "chunks"])
def combine_kernel(parts, states, num_hidden, chunks, DV: tl.constexpr, DVP: tl.constexpr, N: tl.constexpr):
    """The sum of the chunks' states of one neuron, measured from the highest of their tops."""
    row = tl.program_id(0).to(tl.int64)
    first = row // num_hidden * chunks * num_hidden + row % num_hidden
    kv = tl.zeros([DVP], tl.float32)
    z = tl.zeros([N], tl.float32)
    top = tl.full([], LOWEST, tl.float32)
    for start in range(0, chunks, N):
        part = start + tl.arange(0, N)
        some = part < chunks
        tops = tl.load(parts[2] + first + part * num_hidden, mask=some, other=LOWEST)
        high = tl.maximum(top, tl.max(tops, 0))
        share = tl.exp2(tops - high)
        fade = tl.exp2(top - high)
        kv_part = load_rows(parts[0] + first * DV, num_hidden * DV, part, chunks, DV, DVP)
        kv = kv * fade + tl.sum(kv_part * share[:, None], 0)
        z = z * fade + share * tl.load(parts[1] + first + part * num_hidden, mask=some, other=0.0)
        top = high
    columns = tl.arange(0, DVP)
    tl.store(states[0] + row * DV + columns, kv, mask=columns < DV)
    tl.store(states[1] + row, tl.sum(z, 0))
    tl.store(states[2] + row, top)


@triton.jit
def read_block(q, half_square, layer, so_far, scale_root, log_m, LIKE: tl.constexpr, ACTIVATION: tl.constexpr):
    """Read a block of neurons: the largest gain, and p and the outputs measured from it, added to those `so_far`."""
    w, kv, shift, z, top = layer
    reach = product(q, tl.trans(w), LIKE)
    gain, base, _slope = respond(reach, scale_root, half_square, shift, log_m, ACTIVATION)
    gain += top
    best = tl.max(gain, 1)
    if so_far is not None:
        best = tl.maximum(best, so_far[0])
    phi = tl.exp2(gain - best[:, None]) * base
    p = tl.sum(phi * z, 1)
    o = product(operand(phi, LIKE), kv, LIKE)
    if so_far is not None:
        fade = tl.exp2(so_far[0] - best)
        p += so_far[1] * fade
        o += so_far[2] * fade[:, None]
    return best, p, o


@triton.jit(do_not_specialize=["num_queries", "chunk", "chunks"])
def read_kernel(
    query, hidden, states, out, log_p, sign, num_queries, chunk, chunks, scale_root, log_m,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BLOCKS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Outputs and log p of one chunk of queries; with `sign`, that of p and log |p|, and no outputs."""
    LIKE: tl.constexpr = query[0].dtype.element_ty
    weight, phase, heads, num_hidden, layer_b = hidden
    sequence, b, h, _part, first, count = locate(tl.program_id(0), chunks, chunk, num_queries, heads)
    weight += (b * layer_b + h) * num_hidden * D
    phase += (b * layer_b + h) * num_hidden
    kv_state = states[0] + sequence * num_hidden * DV
    z_state = states[1] + sequence * num_hidden
    top_state = states[2] + sequence * num_hidden
    written = (kv_state, z_state, top_state)
    queries, query_n = at(query, b, h, first)
    outs, out_n = at(out, b, h, first)
    neurons = tl.arange(0, M)
    if BLOCKS == 1:  # the layer stays on chip
        layer = load_layer(weight, phase, written, neurons, num_hidden, D, DP, DV, DVP, LIKE)
    for start in range(0, count, N):
        tokens = start + tl.arange(0, N)
        q = load_rows(queries, query_n, tokens, count, D, DP)
        half_square = half_square_of(q, scale_root)[:, None]
        if BLOCKS == 1:
            best, p, o = read_block(q, half_square, layer, None, scale_root, log_m, LIKE, ACTIVATION)
        else:
            best = tl.full([N], float("-inf"), tl.float32)
            p = tl.zeros([N], tl.float32)
            o = tl.zeros([N, DVP], tl.float32)
            for block in range(0, BLOCKS):
                some = load_layer(weight, phase, written, block * M + neurons, num_hidden, D, DP, DV, DVP, LIKE)
                best, p, o = read_block(q, half_square, some, (best, p, o), scale_root, log_m, LIKE, ACTIVATION)
        row = sequence * num_queries + first + tokens
        empty = p == 0
        if sign is not None:
            tl.store(sign + row, tl.where(p < 0, -1.0, 1.0), mask=tokens < count)
            p = tl.abs(p)
        else:
            store_rows(outs, out_n, tokens, count, o * tl.where(empty, 0.0, 1.0 / p)[:, None], DV, DVP)
        tl.store(log_p + row, tl.where(empty, float("-inf"), (tl.log2(p) + best) * LOG_2), mask=tokens < count)
