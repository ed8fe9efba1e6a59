"""Triton: causal attention of one token, for decoding: one launch, which moves the state on in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from astroattn.ops.causal import CausalState
from astroattn.ops.kernels.causal_forward import layer_of, load_sums, start_of, store_sums, sums_of
from astroattn.ops.kernels.features import LOG_2, LOWEST, TO_BASE_2, narrow, respond
from astroattn.ops.kernels.launching import Launches
from astroattn.ops.kernels.rows import load_rows, power_of_2, rows_of, store_rows
from astroattn.ops.rows import dense_rows

BLOCK = 8192  # numbers of the hidden layer, and of the near field, that are taken at once


@triton.jit
def load_row(x, b, h):
    """The first row of a batch and head, float32."""
    column = tl.arange(0, x.PADDED)
    return tl.load(start_of(x, b, h) + column, mask=column < x.DIM, other=0.0).to(tl.float32)


@triton.jit
def store_row(x, b, h, index, row):
    column = tl.arange(0, x.PADDED)
    place = start_of(x, b, h) + index * x.row + column
    tl.store(place, narrow(row, x.data.dtype.element_ty), mask=column < x.DIM)


@triton.jit
def respond_once(w, shift, x, layer):
    """Gain and base [neurons] of the response to x [PADDED]."""
    half_square = tl.sum(x * x, 0) * (0.5 * layer.scale_root * layer.scale_root)
    reach = tl.sum(w * x[None, :], 1)
    gain, base, _ = respond(reach, layer.scale_root, half_square, shift, layer.log_size, layer.ACTIVATION)
    return gain, base + tl.zeros_like(reach)


@triton.jit
def step_kernel(
    query, key, value, layer, sums, old_key, old_value, old_real, key_mask, out, log_p, heads,
    PAST: tl.constexpr, NEAR: tl.constexpr, M: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """One sequence: read the state and the near keys, write the token that leaves the near field, move the others."""
    z_index = tl.program_id(0).to(tl.int64)
    b, h = z_index // heads, z_index % heads
    q, k, v = load_row(query, b, h), load_row(key, b, h), load_row(value, b, h)
    real = True
    if key_mask is not None:
        real = tl.load(key_mask + b) != 0
    old_real += z_index * PAST
    leaving, leaving_value, leaving_real = k, v, real
    if PAST > 0:
        leaving, leaving_value = load_row(old_key, b, h), load_row(old_value, b, h)
        leaving_real = tl.load(old_real) != 0
    best = tl.full([], float("-inf"), tl.float32)
    p = tl.full([], 0.0, tl.float32)
    o = tl.zeros([value.PADDED], tl.float32)
    column = tl.arange(0, key.PADDED)
    for first in range(0, layer.size, M):
        neuron = first + tl.arange(0, M)
        there = neuron < layer.size
        row = (b * layer.batch + h) * layer.size + neuron
        place = layer.weight + row[:, None] * key.DIM + column[None, :]
        w = tl.load(place, mask=there[:, None] & (column < key.DIM)[None, :], other=0.0).to(tl.float32)
        shift = tl.load(layer.phase + row, mask=there, other=0.0).to(tl.float32)
        kv, z, top = load_sums(sums, z_index, neuron, layer.size)
        top = tl.where(top > LOWEST / 2, top * TO_BASE_2, LOWEST)
        gain, base = respond_once(w, shift, leaving, layer)
        gain = tl.where(there, tl.where(leaving_real, gain, float("-inf")), float("-inf"))
        new_top = tl.maximum(top, gain)
        fade = tl.exp2(top - new_top)
        phi = tl.exp2(gain - new_top) * base
        new_kv = kv * fade[:, None] + phi[:, None] * leaving_value[None, :]
        new_z = z * fade + phi
        if not NEAR:
            kv, z, top = new_kv, new_z, new_top
        gain, base = respond_once(w, shift, q, layer)
        gain = tl.where(there, gain + top, float("-inf"))
        high = tl.maximum(best, tl.max(gain, 0))
        phi = tl.exp2(gain - high) * base
        fade = tl.exp2(best - high)
        p = p * fade + tl.sum(phi * z, 0)
        o = o * fade + tl.sum(phi[:, None] * kv, 0)
        best = high
        tl.debug_barrier()  # all threads have read what is stored now
        new_top = tl.where(new_top > LOWEST / 2, new_top * LOG_2, LOWEST)
        store_sums(sums, z_index, neuron, layer.size, new_kv, new_z, new_top)
    if NEAR:
        scale = layer.scale_root * layer.scale_root * TO_BASE_2
        logit = tl.where(real, tl.sum(q * k, 0) * scale, float("-inf"))
        high = tl.maximum(best, logit)
        share, fade = tl.exp2(logit - high), tl.exp2(best - high)
        p = p * fade + share
        o = o * fade + share * v
        best = high
        for first in range(0, PAST, T):
            index = first + tl.arange(0, T)
            inside = index < PAST
            keys = load_rows(old_key, start_of(old_key, b, h), index, inside)
            values = load_rows(old_value, start_of(old_value, b, h), index, inside)
            reals = tl.load(old_real + index, mask=inside, other=0)
            logits = tl.sum(keys.to(tl.float32) * q[None, :], 1) * scale
            logits = tl.where(reals != 0, logits, float("-inf"))
            high = tl.maximum(best, tl.max(logits, 0))
            shares, fade = tl.exp2(logits - high), tl.exp2(best - high)
            p = p * fade + tl.sum(shares, 0)
            o = o * fade + tl.sum(shares[:, None] * values.to(tl.float32), 0)
            best = high
            tl.debug_barrier()
            moved = inside & (index > 0)
            store_rows(old_key, start_of(old_key, b, h), index - 1, moved, keys)
            store_rows(old_value, start_of(old_value, b, h), index - 1, moved, values)
            tl.store(old_real + index - 1, reals, mask=moved)
        if PAST > 0:
            tl.debug_barrier()
            store_row(old_key, b, h, PAST - 1, k)
            store_row(old_value, b, h, PAST - 1, v)
            tl.store(old_real + PAST - 1, real)
    empty = p == 0
    store_row(out, b, h, 0, o * tl.where(empty, 0.0, 1.0 / p))
    tl.store(log_p + z_index, tl.where(empty, float("-inf"), (tl.log2(p) + best) * LOG_2))


def recurrent_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    phase: Tensor,
    key_mask: Tensor | None,
    activation: str,
    near: int,
    scale_root: float,
    state: CausalState,
) -> tuple[Tensor, Tensor]:
    """`causal_attention_forward` of one token; the state is changed in place, so that a CUDA graph can repeat it.

    Args:
        query, key, value: [B, H, 1, D], [B, H, 1, D], [B, H, 1, Dv]. key_mask: [B, 1], False for padding, or None.
        state: of `causal_attention_forward`, or of `new_state` for the first token. The rest as there.

    Returns:
        The output [B, H, 1, Dv] in the query's dtype, and the log of the normaliser [B, H, 1].

    Raises:
        ValueError: several tokens, or a state of another near field.
    """
    past = max(near - 1, 0)
    if query.shape[2] != 1:
        raise ValueError(f"query: {query.shape[2]} tokens; a step takes one")
    if state.key.shape[2] != past:
        raise ValueError(f"near: {near}; the state keeps the latest {state.key.shape[2]} keys, not {past}")
    given = (query, key, value, weight, phase, key_mask, activation, near, scale_root, state)
    launch = Launches(recurrent_step, *given)
    query, key, value = map(dense_rows, (query, key, value))
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    log_p = query.new_empty(query.shape[:3], dtype=torch.float32)
    m = weight.shape[2]
    rows = BLOCK // max(power_of_2(query.shape[-1]), power_of_2(value.shape[-1]))
    mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    sizes = {"PAST": past, "NEAR": near > 0, "M": power_of_2(m, most=rows), "T": power_of_2(past, most=rows)}
    launch(
        step_kernel,
        query.shape[0] * query.shape[1],
        (
            *(*map(rows_of, (query, key, value)), layer_of(weight, phase, activation, scale_root), sums_of(state)),
            *(rows_of(state.key), rows_of(state.value), state.real.view(torch.uint8)),
            *(mask, rows_of(out), log_p, query.shape[1]),
        ),
        sizes | {"num_warps": 8},
    )
    return out, log_p
