"""Triton: causal attention through a static hidden layer, the latest keys exactly (`ops.causal` has the formulas).

Forward, in chunks of tokens: what each chunk writes (parallel), the sums before each chunk (a scan), and the outputs
(parallel; a chunk goes over its tokens in blocks, reads the sums and the pairs of the block, and moves the sums on).
One chunk needs two launches, several need three. The backward pass computes phi and the sums again, and in the same way
the sums over the queries behind each chunk. The sums in memory are of size N / chunk x m x Dv, with at least 256 tokens
in a chunk. Each sum has a fixed order, so equal inputs give equal bits; nothing asks the GPU and waits.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from astroattn.ops.backends import MOST_DIM
from astroattn.ops.causal import CausalState
from astroattn.ops.kernels.causal_backward import behind_kernel, delta_kernel, key_kernel, query_kernel
from astroattn.ops.kernels.causal_forward import (
    Layer,
    Shape,
    Sums,
    layer_of,
    read_kernel,
    scan_kernel,
    sums_of,
    write_kernel,
)
from astroattn.ops.kernels.causal_step import recurrent_step
from astroattn.ops.kernels.device import is_small
from astroattn.ops.kernels.features import LOWEST
from astroattn.ops.kernels.launching import Launches
from astroattn.ops.kernels.rows import Rows, cdiv, power_of_2, rows_of
from astroattn.ops.kernels.static import INDEFINITE, NORM
from astroattn.ops.rows import dense_rows, empty_rows

__all__ = ["causal_attention_backward", "causal_attention_forward", "new_state", "recurrent_step"]

Options = dict[str, int]
LEAST_CHUNK, MOST_CHUNK = 256, 1024  # tokens: shorter ones cost more in launches and sums than they save
WITHOUT_NEAR, WITH_NEAR = tl.constexpr(0), tl.constexpr(1)
PROGRAMS = 264  # two for each multiprocessor of a large GPU; a constant, so that results do not depend on the GPU


class Blocks(NamedTuple):
    """Sizes of a kernel's blocks: neurons (at most), tokens, warps."""

    neurons: int
    tokens: int
    warps: int
    stages: int  # of loads under way


# By bytes of a product's operand and padded head dim; a table, not autotuning, as in `kernels.static`.
FORWARD = {
    (2, 64): Blocks(64, 64, 4, 1),
    (2, 128): Blocks(64, 64, 4, 1),
    (2, 256): Blocks(64, 32, 8, 1),
    (4, 64): Blocks(32, 32, 8, 1),
    (4, 128): Blocks(32, 16, 8, 1),
    (4, 256): Blocks(16, 16, 8, 1),
}
BACKWARD = {
    (2, 64): Blocks(64, 32, 4, 1),
    (2, 128): Blocks(64, 32, 8, 1),
    (2, 256): Blocks(32, 16, 8, 1),
    (4, 64): Blocks(32, 32, 8, 1),
    (4, 128): Blocks(32, 16, 8, 1),
    (4, 256): Blocks(16, 16, 8, 1),
}
TABLE = {"forward": FORWARD, "backward": BACKWARD}
# In their place where there is less shared memory than on an H100.
SMALL = {("forward", 2, 256): Blocks(64, 16, 8, 1)}


def causal_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    phase: Tensor,
    key_mask: Tensor | None,
    activation: str,
    near: int,
    scale_root: float,
    state: CausalState | None = None,
    *,
    with_state: bool = True,
) -> tuple[Tensor, Tensor, CausalState | None]:
    """Causal attention with the `near` latest keys exactly: `ops.causal.causal_linear_attention`.

    Args:
        query, key, value: [B, H, N, D], [B, H, N, D], [B, H, N, Dv], all of one dtype: float32, bfloat16, float16.
        weight: [1 or B, H, m, D]. phase: [1 or B, H, m]. key_mask: real keys [B, N], bool, or None for all.
        activation: a name of `ops.features.ACTIVATIONS`. scale_root: multiplies queries and keys.
        state: where to go on from, or None for the start of a sequence; as `new_state` makes it.

    Returns:
        The output [B, H, N, Dv] in the query's dtype, the log of the normaliser [B, H, N] in float32, and
        (`with_state`) the state.

    Raises:
        ValueError: a head dim above 256, or a state of another near field.
    """
    given = (query, key, value, weight, phase, key_mask, activation, near, scale_root, state, with_state)
    launch = Launches(causal_attention_forward, *given)
    past, tokens = max(near - 1, 0), query.shape[2]
    shift, before = past, None
    if state is not None:
        if state.key.shape[2] != past:
            raise ValueError(f"near: {near}; the state keeps the latest {state.key.shape[2]} keys, not {past}")
        shift, before = 0, sums_of(state)
        if past:
            new = key.new_ones(len(key), tokens, dtype=torch.bool) if key_mask is None else key_mask
            key, value = torch.cat([state.key, key], 2), torch.cat([state.value, value], 2)
            key_mask = torch.cat([state.real[:, 0], new], 1)
    query, key, value = map(dense_rows, (query, key, value))
    blocks, options = _options("forward", query, value.shape[-1], weight.shape[2])
    shape = _shape(query, key, key_mask, near, shift, options["T"])
    layer = layer_of(weight, phase, activation, scale_root)
    inputs = (rows_of(query), rows_of(key), rows_of(value), layer)
    sums = _sums_before(launch, inputs, before, shape, options)
    out = empty_rows(query, value.shape[-1])
    log_p = query.new_empty(query.shape[:3], dtype=torch.float32)
    after = new_state(key, value, weight.shape[2], near) if with_state else None
    arguments = (*inputs, sums, None if after is None else sums_of(after), rows_of(out), log_p, None, shape)
    launch(read_kernel, _sequences(query) * sums.chunks, arguments, options | {"BLOCKS": blocks})
    if after is not None and past:
        _keep_latest(after, key, value, key_mask)
    return out, log_p, after


def causal_attention_backward(
    d_out: Tensor,
    d_log_p: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    phase: Tensor,
    key_mask: Tensor | None,
    activation: str,
    near: int,
    scale_root: float,
    out: Tensor,
    log_p: Tensor,
    *,
    with_weight: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of the query, the key, the value and (`with_weight`) the weight, from those of the output and log p.

    Of a call from the start of a sequence. Arguments as those of `causal_attention_forward`, then its results.
    d_log_p: None where log p is not used.
    """
    given = (query, key, value, weight, phase, key_mask, activation, near, scale_root, out, log_p, with_weight)
    launch = Launches(causal_attention_backward, d_out, d_log_p, *given)
    d_out, query, key, value, out = map(dense_rows, (d_out, query, key, value, out))
    d_log_p = None if d_log_p is None else d_log_p.contiguous()
    sequences, tokens, past, m = _sequences(query), query.shape[2], max(near - 1, 0), weight.shape[2]
    blocks, options = _options("backward", query, value.shape[-1], m)
    shape = _shape(query, key, key_mask, near, past, options["T"])
    layer = layer_of(weight, phase, activation, scale_root)
    inputs = (rows_of(query), rows_of(key), rows_of(value), layer)
    every = options | {"NORM": NORM.get(activation, 0), "BLOCKS": blocks}

    sign: Tensor | None = None
    arguments: tuple[object, ...]
    if activation in INDEFINITE:
        sums = _sums_before(launch, inputs, None, shape, options)
        sign, log_p = torch.empty_like(log_p), torch.empty_like(log_p)
        arguments = (*inputs, sums, None, rows_of(out), log_p, sign, shape)
        launch(read_kernel, sequences * sums.chunks, arguments, options | {"BLOCKS": blocks})
    delta, d_rows = torch.empty_like(log_p), rows_of(d_out)
    arguments = (d_rows, rows_of(out), d_log_p, log_p, delta, shape)
    launch(delta_kernel, sequences * cdiv(tokens, options["T"]), arguments, {"T": options["T"]})
    normaliser = (log_p, sign, delta)

    # The slots of the last near field have no queries beside them.
    chunks, key_chunks, parts, key_parts = _chunks(shape), cdiv(tokens + past, shape.chunk), None, None
    total = chunks + key_chunks
    d_query, d_key, d_value = (empty_rows(x, x.shape[-1]) for x in (query, key, value))
    if with_weight:
        parts = query.new_empty(*query.shape[:2], total, m, query.shape[-1], dtype=torch.float32)
        key_parts = parts[:, :, chunks:]
    sums = _sums_before(launch, inputs, None, shape, options)
    arguments = (d_rows, *inputs, sums, *normaliser, rows_of(d_query), parts, total, shape)
    launch(query_kernel, sequences * chunks, arguments, every)
    sums = _sums_behind(launch, inputs, d_rows, normaliser, key_chunks, shape, options)
    arguments = (d_rows, *inputs, sums, *normaliser, rows_of(d_key), rows_of(d_value), key_parts, total, shape)
    launch(key_kernel, sequences * key_chunks, arguments, every)
    if parts is None:
        return d_query, d_key, d_value, None
    d_weight = parts.sum((0, 2))[None] if weight.shape[0] == 1 else parts.sum(2)
    return d_query, d_key, d_value, d_weight.to(weight.dtype)


def new_state(key: Tensor, value: Tensor, num_hidden: int, near: int) -> CausalState:
    """The state before the first token, for keys and values like these [B, H, N, D].

    It is `CausalState` with [B, H] in the place of Z, and top [B, H, m]. The sums are float32; keys are not scaled.
    """
    size, past = key.shape[:2], max(near - 1, 0)
    return CausalState(
        key.new_zeros(*size, num_hidden, value.shape[-1], dtype=torch.float32),
        key.new_zeros(*size, num_hidden, dtype=torch.float32),
        key.new_full((*size, num_hidden), LOWEST.value, dtype=torch.float32),
        key.new_zeros(*size, past, key.shape[-1]),
        value.new_zeros(*size, past, value.shape[-1]),
        key.new_zeros(*size, past, dtype=torch.bool),
    )


def _sums_before(
    launch: Launches, inputs: tuple[Rows, Rows, Rows, Layer], before: Sums | None, shape: Shape, options: Options
) -> Sums:
    """What the chunks before each chunk, and before them the state, have written: one launch, or two."""
    _, key, value, layer = inputs
    chunks = _chunks(shape)
    parts, sums = (_new_sums(value, layer, shape, count) for count in (chunks - 1, chunks))
    sequences = _sequences(key.data)
    if chunks > 1:
        blocks = cdiv(layer.size, options["M"])
        launch(write_kernel, sequences * (chunks - 1) * blocks, (key, value, layer, parts, shape), options)
    launch(scan_kernel, sequences * layer.size, (parts, before, sums, layer.size), {"REVERSE": False, "num_warps": 1})
    return sums


def _sums_behind(
    launch: Launches,
    inputs: tuple[Rows, Rows, Rows, Layer],
    d_out: Rows,
    normaliser: tuple[Tensor, Tensor | None, Tensor],
    key_chunks: int,
    shape: Shape,
    options: Options,
) -> Sums:
    """What the queries of the chunks behind each chunk of slots sum up: one launch, or two."""
    query, _, _, layer = inputs
    more = _chunks(shape) - 1
    parts, sums = (_new_sums(d_out, layer, shape, count) for count in (more, key_chunks))
    sequences = _sequences(query.data)
    if more:
        blocks = cdiv(layer.size, options["M"])
        launch(behind_kernel, sequences * more * blocks, (query, d_out, layer, *normaliser, parts, shape), options)
    launch(scan_kernel, sequences * layer.size, (parts, None, sums, layer.size), {"REVERSE": True, "num_warps": 1})
    return sums


def _new_sums(like: Rows, layer: Layer, shape: Shape, chunks: int) -> Sums:
    x, sizes = like.data, (_sequences(like.data), chunks, layer.size)
    kv, z = x.new_empty(*sizes, like.DIM.value, dtype=torch.float32), x.new_empty(sizes, dtype=torch.float32)
    return Sums(kv, z, torch.empty_like(z), chunks, like.DIM, like.PADDED)


def _keep_latest(state: CausalState, key: Tensor, value: Tensor, key_mask: Tensor | None) -> None:
    """Copy the latest tokens into a new state; fewer than it has places leave the first of them without a token."""
    count = min(key.shape[2], state.key.shape[2])
    state.key[:, :, -count:] = key[:, :, -count:]
    state.value[:, :, -count:] = value[:, :, -count:]
    state.real[:, :, -count:] = True if key_mask is None else key_mask[:, None, -count:]


def _sequences(x: Tensor) -> int:
    return x.shape[0] * x.shape[1]


def _chunks(shape: Shape) -> int:
    return cdiv(shape.tokens, shape.chunk)


def _shape(query: Tensor, key: Tensor, key_mask: Tensor | None, near: int, shift: int, block: int) -> Shape:
    batch, heads, tokens, _ = query.shape
    mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    wanted = cdiv(tokens * batch * heads, PROGRAMS)
    chunk = cdiv(min(max(wanted, LEAST_CHUNK), MOST_CHUNK, tokens), block) * block
    past = max(near - 1, 0)
    return Shape(mask, heads, tokens, key.shape[2], past, shift, chunk, WITH_NEAR if near > 0 else WITHOUT_NEAR)


def _options(kernel: str, query: Tensor, dv: int, m: int) -> tuple[int, Options]:
    """The number of blocks of neurons, and what the kernels are compiled for."""
    return _options_for(kernel, query.dtype, query.shape[-1], dv, m, is_small(query.device))


@cache
def _options_for(kernel: str, dtype: torch.dtype, dim: int, dv: int, m: int, small: bool) -> tuple[int, Options]:
    if (widest := max(64, power_of_2(dim), power_of_2(dv))) > MOST_DIM:
        raise ValueError(f"head_dim: {max(dim, dv)}; the kernels take at most {MOST_DIM}")
    size = (2 if dtype == torch.bfloat16 else 4, widest)
    sizes = SMALL[kernel, *size] if small and (kernel, *size) in SMALL else TABLE[kernel][size]
    neurons = power_of_2(m, most=sizes.neurons)
    return cdiv(m, neurons), {
        "M": neurons,
        "T": sizes.tokens,
        "num_warps": sizes.warps,
        "num_stages": sizes.stages,
    }
