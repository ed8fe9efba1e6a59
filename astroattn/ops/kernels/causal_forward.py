"""Triton: the forward kernels of causal attention through a static hidden layer (`kernels.causal` launches them).

Slot i of the keys is the one that lies `past` = max(near - 1, 0) tokens before query i: it is the first that the query
finds near, and the latest to be written into the hidden layer before query i + 1 comes (before query i with near = 0).
A row is a slot's place in the tensors of keys and values: slot - shift.
"""

from __future__ import annotations

from functools import cache
from math import log
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from astroattn.ops.causal import CausalState
from astroattn.ops.kernels.features import (
    LOG_2,
    LOWEST,
    TO_BASE_2,
    half_square_of,
    narrow,
    operand,
    product,
    respond,
    widen,
)
from astroattn.ops.kernels.rows import load_rows, rows_of, store_rows

# Most that a feature's gain (to base 2) may rise within a block of keys above what the block's first query sees of it:
# shares are then measured from at most 2^58 times too high, far from float32's underflow at 2^-126.
GAIN_RANGE = tl.constexpr(58.0)


class Layer(NamedTuple):
    """The hidden layer: weight [1 or B, H, m, D] and phase [1 or B, H, m], m, log m, and sqrt(scale)."""

    weight: Any
    phase: Any
    batch: int  # heads from one batch's weights to the next one's, 0 if there is one only
    size: int
    log_size: float
    scale_root: float
    ACTIVATION: Any


class Sums(NamedTuple):
    """Sums over tokens for each sequence, chunk and neuron: kv [Z, chunks, m, Dv], z and top [Z, chunks, m]; float32.

    kv = sum phi v 2^-top, z = sum phi 2^-top, top the largest gain. For the backward pass also of queries: the same of
    phi(q) d_out / p and phi(q) delta / p.
    """

    kv: Any
    z: Any
    top: Any
    chunks: int
    DIM: Any
    PADDED: Any


class Shape(NamedTuple):
    """What is the same for all programs. `tokens` are the queries; key_mask [B, rows] bytes or None."""

    key_mask: Any
    heads: int
    tokens: int
    rows: int
    past: int
    shift: int
    chunk: int
    NEAR: Any  # whether there is a near field


def layer_of(weight: Tensor, phase: Tensor, activation: str, scale_root: float) -> Layer:
    batch, heads, size, _ = weight.shape
    numbers = (0 if batch == 1 else heads, size, log(size), scale_root)
    return Layer(weight.contiguous(), phase.contiguous(), *numbers, _constant(activation))


_constant = cache(tl.constexpr)


def sums_of(state: CausalState) -> Sums:
    """The sums in a state, as of one chunk."""
    rows = rows_of(state.kv_state)
    return Sums(state.kv_state, state.z_state, state.top, 1, rows.DIM, rows.PADDED)


@triton.jit
def locate(chunks, shape):
    """Sequence, batch, head and chunk of a program."""
    z = (tl.program_id(0) // chunks).to(tl.int64)
    return z, z // shape.heads, z % shape.heads, tl.program_id(0) % chunks


@triton.jit
def start_of(x, b, h):
    """Where the rows of a batch and head begin."""
    return x.data + b * x.batch + h * x.head


@triton.jit
def real_rows(row, b, shape):
    """Whether rows exist and hold real keys."""
    real = (row >= 0) & (row < shape.rows)
    if shape.key_mask is not None:
        real = real & (tl.load(shape.key_mask + b * shape.rows + row, mask=real, other=0) != 0)
    return real


@triton.jit
def load_weights(layer, b, h, neuron, DIM: tl.constexpr, PADDED: tl.constexpr, LIKE: tl.constexpr):
    """W [neurons, PADDED] as it enters a product, and the phases."""
    first = (b * layer.batch + h) * layer.size
    column = tl.arange(0, PADDED)
    there = neuron < layer.size
    place = layer.weight + first * DIM + neuron[:, None] * DIM + column[None, :]
    weight = tl.load(place, mask=there[:, None] & (column < DIM)[None, :], other=0.0).to(LIKE)
    return widen(weight), tl.load(layer.phase + first + neuron, mask=there, other=0.0).to(tl.float32)


@triton.jit
def respond_across(w, shift, x, layer, there, LIKE: tl.constexpr):
    """Gain, base and slope [neurons, tokens]; the gain is -inf where not `there` (it must broadcast)."""
    reach = product(w, tl.trans(widen(x)), LIKE)
    half_square = half_square_of(x, layer.scale_root)[None, :]
    gain, base, slope = respond(reach, layer.scale_root, half_square, shift[:, None], layer.log_size, layer.ACTIVATION)
    return tl.where(there, gain, float("-inf")), base + tl.zeros_like(reach), slope


@triton.jit
def respond_along(w, shift, x, layer, there, LIKE: tl.constexpr):
    """Gain, base and slope [tokens, neurons]; the gain is -inf where not `there` (it must broadcast)."""
    reach = product(widen(x), tl.trans(w), LIKE)
    half_square = half_square_of(x, layer.scale_root)[:, None]
    gain, base, slope = respond(reach, layer.scale_root, half_square, shift[None, :], layer.log_size, layer.ACTIVATION)
    return tl.where(there, gain, float("-inf")), base + tl.zeros_like(reach), slope


@triton.jit
def load_sums(sums, slot, neuron, size):
    """kv [neurons, PADDED], z and top of one sequence and chunk; of neurons that do not exist as of unwritten ones."""
    there = neuron < size
    column = tl.arange(0, sums.PADDED)
    place = slot * size + neuron
    mask = there[:, None] & (column < sums.DIM)[None, :]
    kv = tl.load(sums.kv + place[:, None] * sums.DIM + column[None, :], mask=mask, other=0.0)
    z = tl.load(sums.z + place, mask=there, other=0.0)
    return kv, z, tl.load(sums.top + place, mask=there, other=LOWEST)


@triton.jit
def store_sums(sums, slot, neuron, size, kv, z, top):
    there = neuron < size
    column = tl.arange(0, sums.PADDED)
    place = slot * size + neuron
    mask = there[:, None] & (column < sums.DIM)[None, :]
    tl.store(sums.kv + place[:, None] * sums.DIM + column[None, :], kv, mask=mask)
    tl.store(sums.z + place, z, mask=there)
    tl.store(sums.top + place, top, mask=there)


@triton.jit
def add_to_sums(kv, z, top, gain, base, y, weight, LIKE: tl.constexpr):
    """The sums with some tokens more: their gain and base [neurons, tokens], what is summed y, and weights for z."""
    new_top = tl.maximum(top, tl.max(gain, 1))
    fade = tl.exp2(top - new_top)
    phi = operand(tl.exp2(gain - new_top[:, None]) * base, LIKE)
    kv = kv * fade[:, None] + product(phi, widen(y), LIKE)
    return kv, z * fade + tl.sum(phi.to(tl.float32) * weight[None, :], 1), new_top


@triton.jit
def pick_column(x, neuron):
    """One column of x [tokens, neurons]."""
    return tl.sum(tl.where((tl.arange(0, x.shape[1]) == neuron)[None, :], x, 0.0), 1)


@triton.jit
def pick_row(x, neuron):
    """One row of x [neurons, tokens]."""
    return tl.sum(tl.where((tl.arange(0, x.shape[0]) == neuron)[:, None], x, 0.0), 0)


@triton.jit
def write_kernel(key, value, layer, parts, shape, M: tl.constexpr, T: tl.constexpr):
    """What each chunk of slots writes, but for the last chunk: grid Z * (chunks - 1) * blocks of neurons."""
    LIKE: tl.constexpr = key.data.dtype.element_ty
    blocks = tl.cdiv(layer.size, M)
    pid = tl.program_id(0)
    z_index = (pid // blocks // parts.chunks).to(tl.int64)
    chunk, b, h = pid // blocks % parts.chunks, z_index // shape.heads, z_index % shape.heads
    neuron = pid % blocks * M + tl.arange(0, M)
    w, shift = load_weights(layer, b, h, neuron, key.DIM, key.PADDED, LIKE)
    kv = tl.zeros([M, value.PADDED], tl.float32)
    z = tl.zeros([M], tl.float32)
    top = tl.full([M], LOWEST, tl.float32)
    ones = tl.full([T], 1.0, tl.float32)
    for first in range(chunk * shape.chunk, (chunk + 1) * shape.chunk, T):
        row = first + tl.arange(0, T) - shape.shift
        real = real_rows(row, b, shape)
        k = load_rows(key, start_of(key, b, h), row, real)
        v = load_rows(value, start_of(value, b, h), row, real)
        gain, base, _ = respond_across(w, shift, k, layer, real[None, :], LIKE)
        kv, z, top = add_to_sums(kv, z, top, gain, base, v, ones, LIKE)
    store_sums(parts, z_index * parts.chunks + chunk, neuron, layer.size, kv, z, top)


@triton.jit
def scan_kernel(parts, before, sums, size, REVERSE: tl.constexpr):
    """For each chunk the sums of what comes before it, `before` (a state) included; REVERSE: of what comes after it.

    One program per sequence and neuron. `parts` begins with the first chunk (REVERSE: with the second one), and where
    it ends nothing is left to come.
    """
    z_index = (tl.program_id(0) // size).to(tl.int64)
    neuron = tl.program_id(0) % size
    column = tl.arange(0, sums.PADDED)
    inside = column < sums.DIM
    kv = tl.zeros([sums.PADDED], tl.float32)
    z = tl.full([], 0.0, tl.float32)
    top = tl.full([], LOWEST, tl.float32)
    if before is not None:
        place = z_index * size + neuron
        kv = tl.load(before.kv + place * sums.DIM + column, mask=inside, other=0.0)
        z = tl.load(before.z + place)
        top = tl.load(before.top + place)
        top = tl.where(top > LOWEST / 2, top * TO_BASE_2, LOWEST)
    for step in tl.range(0, sums.chunks, num_stages=3):
        chunk = sums.chunks - 1 - step if REVERSE else step
        place = (z_index * sums.chunks + chunk) * size + neuron
        tl.store(sums.kv + place * sums.DIM + column, kv, mask=inside)
        tl.store(sums.z + place, z)
        tl.store(sums.top + place, top)
        more = chunk < parts.chunks
        if REVERSE:
            chunk -= 1
            more = (chunk >= 0) & (chunk < parts.chunks)
        place = (z_index * parts.chunks + chunk) * size + neuron
        high = tl.maximum(top, tl.load(parts.top + place, mask=more, other=LOWEST))
        fade = tl.exp2(top - high)
        rise = tl.exp2(tl.load(parts.top + place, mask=more, other=LOWEST) - high)
        kv = (
            kv * fade
            + tl.load(parts.kv + place * sums.DIM + column, mask=column < tl.where(more, sums.DIM, 0), other=0.0) * rise
        )
        z = z * fade + tl.load(parts.z + place, mask=more, other=0.0) * rise
        top = high


@triton.jit
def _read_pairs(
    q_gain, q_base, k_gain, k_base, real, top, best, NEAR: tl.constexpr, M: tl.constexpr, T: tl.constexpr,
    LIKE: tl.constexpr,
):  # fmt: skip
    """Shares phi(q).phi(k) 2^-high of a block [T, T], phi(q) 2^(top - high) [T, M] for what was written before, high.

    `high` is at least `best`, and at most GAIN_RANGE above the largest term of any that the query sees. A feature is
    measured from its largest gain up to the block's last key. Where the first query that sees a key may see less by
    more than GAIN_RANGE, the terms are formed neuron by neuron, as powers of sums of logarithms that are <= 0.
    """
    place = tl.arange(0, T)
    new_top = tl.maximum(top, tl.max(k_gain, 1))
    first = tl.min(tl.where(real, place, T), 0)
    seen_top = tl.sum(tl.where((place == first)[None, :], k_gain, 0.0), 1)
    seen_top = tl.where(top > LOWEST / 2, top, seen_top)
    rise = tl.where(seen_top > LOWEST / 2, new_top - seen_top, 0.0)
    if tl.max(rise, 0) > GAIN_RANGE:
        seen = place[None, :] <= place[:, None] - NEAR
        high = best
        for neuron in range(0, M):
            gain = tl.where(seen, pick_row(k_gain, neuron)[None, :], float("-inf"))
            old = tl.sum(tl.where(tl.arange(0, M) == neuron, top, 0.0), 0)
            high = tl.maximum(high, pick_column(q_gain, neuron) + tl.maximum(tl.max(gain, 1), old))
        shares = tl.zeros([T, T], tl.float32)
        for neuron in range(0, M):
            gain = tl.where(seen, pick_row(k_gain, neuron)[None, :], float("-inf"))
            e = tl.exp2(gain + (pick_column(q_gain, neuron) - high)[:, None])
            shares += e * pick_column(q_base, neuron)[:, None] * pick_row(k_base, neuron)[None, :]
        phi = tl.exp2(q_gain + top[None, :] - high[:, None]) * q_base
    else:
        q_gain += new_top[None, :]
        high = tl.maximum(best, tl.max(q_gain, 1))
        phi = tl.exp2(q_gain - high[:, None]) * q_base
        phi_key = tl.exp2(k_gain - new_top[:, None]) * k_base
        shares = product(operand(phi, LIKE), operand(phi_key, LIKE), LIKE)
        phi *= tl.exp2(top - new_top)[None, :]
    return shares, phi, high


@triton.jit
def read_kernel(
    query, key, value, layer, sums, after, out, log_p, sign, shape,
    M: tl.constexpr, T: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Outputs and log p of a chunk, from the sums before it; the last one stores those behind it as the state `after`.

    With `sign` it stores that of p and log |p|, and no outputs. Where there are several blocks of neurons, the sums of
    any chunk move on in memory; nobody else reads them.
    """
    LIKE: tl.constexpr = query.data.dtype.element_ty
    z_index, b, h, chunk = locate(sums.chunks, shape)
    slot = z_index * sums.chunks + chunk
    k_start, v_start = start_of(key, b, h), start_of(value, b, h)
    place = tl.arange(0, T)
    neuron = tl.arange(0, M)
    w, shift = load_weights(layer, b, h, neuron, key.DIM, key.PADDED, LIKE)
    kv, z, top = load_sums(sums, slot, neuron, layer.size)
    ones = tl.full([T], 1.0, tl.float32)
    for first in range(chunk * shape.chunk, tl.minimum((chunk + 1) * shape.chunk, shape.tokens), T):
        index = first + place
        inside = index < shape.tokens
        q = load_rows(query, start_of(query, b, h), index, inside)
        row = index - shape.shift
        real = real_rows(row, b, shape) & inside
        k = load_rows(key, k_start, row, real)
        v = load_rows(value, v_start, row, real)
        best = tl.full([T], float("-inf"), tl.float32)
        p = tl.zeros([T], tl.float32)
        o = tl.zeros([T, value.PADDED], tl.float32)
        shares = tl.zeros([T, T], tl.float32)
        for block in range(0, BLOCKS):
            if BLOCKS > 1:
                neuron = block * M + tl.arange(0, M)
                w, shift = load_weights(layer, b, h, neuron, key.DIM, key.PADDED, LIKE)
                kv, z, top = load_sums(sums, slot, neuron, layer.size)
            there = neuron < layer.size
            q_gain, q_base, _ = respond_along(w, shift, q, layer, there[None, :], LIKE)
            k_gain, k_base, _ = respond_across(w, shift, k, layer, there[:, None] & real[None, :], LIKE)
            more, phi, high = _read_pairs(q_gain, q_base, k_gain, k_base, real, top, best, shape.NEAR, M, T, LIKE)
            fade = tl.exp2(best - high)
            phi = operand(phi, LIKE)
            p = p * fade + tl.sum(phi.to(tl.float32) * z[None, :], 1)
            o = o * fade[:, None] + product(phi, operand(kv, LIKE), LIKE)
            shares = shares * fade[:, None] + more
            best = high
            kv, z, top = add_to_sums(kv, z, top, k_gain, k_base, v, ones, LIKE)
            if BLOCKS > 1:
                store_sums(sums, slot, neuron, layer.size, kv, z, top)
        shares = operand(tl.where(place[None, :] <= place[:, None] - shape.NEAR, shares, 0.0), LIKE)
        p += tl.sum(shares.to(tl.float32), 1)
        o += product(shares, widen(v), LIKE)
        if shape.NEAR:
            for block in range(first, tl.minimum(first + T, shape.tokens) + shape.past, T):
                near_slot = block + place
                row = near_slot - shape.shift
                k = load_rows(key, k_start, row, (row >= 0) & (row < shape.rows))
                v = load_rows(value, v_start, row, (row >= 0) & (row < shape.rows))
                distance = near_slot[None, :] - index[:, None]
                near = (distance >= 0) & (distance <= shape.past) & real_rows(row, b, shape)[None, :]
                logits = product(widen(q), tl.trans(widen(k)), LIKE) * (layer.scale_root * layer.scale_root * TO_BASE_2)
                logits = tl.where(near, logits, float("-inf"))
                high = tl.maximum(best, tl.max(logits, 1))
                fade = tl.exp2(best - high)
                shares = operand(tl.exp2(logits - high[:, None]), LIKE)
                p = p * fade + tl.sum(shares.to(tl.float32), 1)
                o = o * fade[:, None] + product(shares, widen(v), LIKE)
                best = high
        line = z_index * shape.tokens + index
        empty = p == 0
        if sign is not None:
            tl.store(sign + line, tl.where(p < 0, -1.0, 1.0), mask=inside)
            p = tl.abs(p)
        else:
            o = narrow(o * tl.where(empty, 0.0, 1.0 / p)[:, None], LIKE)
            store_rows(out, start_of(out, b, h), index, inside, o)
        tl.store(log_p + line, tl.where(empty, float("-inf"), (tl.log2(p) + best) * LOG_2), mask=inside)
        if BLOCKS > 1:
            tl.debug_barrier()  # the next tokens read sums that other threads have stored
    if after is not None:  # noqa: SIM102 (decided by the compiler, apart from what the GPU decides)
        if chunk == sums.chunks - 1:
            for block in range(0, BLOCKS):
                if BLOCKS > 1:
                    neuron = block * M + tl.arange(0, M)
                    kv, z, top = load_sums(sums, slot, neuron, layer.size)
                top = tl.where(top > LOWEST / 2, top * LOG_2, LOWEST)
                store_sums(after, z_index, neuron, layer.size, kv, z, top)
