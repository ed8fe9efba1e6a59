"""Triton: bidirectional attention through a static hidden layer, forward and backward (`ops.static`).

    write    kv_j = sum_i phi_j(k_i) v_i, z_j = sum_i phi_j(k_i)    per chunk of keys, then one sum over the chunks
    read     o = sum_j phi_j(q) kv_j / p, p = sum_j phi_j(q) z_j    per chunk of queries

Both are flash attention with the hidden neurons on one side: W x is computed, turned into phi and multiplied on chip,
each feature measured from its largest gain so far. Nothing of size N x m is stored; the backward pass computes phi
again. Each sum has a fixed order, so equal inputs give equal bits.
"""

from __future__ import annotations

from functools import cache
from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from astroattn.ops.backends import MOST_DIM
from astroattn.ops.kernels.device import is_small
from astroattn.ops.kernels.launching import Launches
from astroattn.ops.kernels.rows import cdiv, power_of_2
from astroattn.ops.kernels.static_backward import read_backward_kernel, write_backward_kernel
from astroattn.ops.kernels.static_forward import combine_kernel, read_kernel, write_kernel
from astroattn.ops.rows import dense_rows, empty_rows

# How phi depends on h = |x|^2 / 2: d phi / d h = -d phi / d (W x) (-1), = phi (1), or not at all.
NORM = {"positive_exp": -1, "linear": -1, "cosine": 1, "positive_cosine": 1}
INDEFINITE = ("cosine", "linear")  # p may be negative, and log p does not tell
REGISTERS = 2**16  # of a multiprocessor


class Blocks(NamedTuple):
    """Sizes of a kernel's blocks: neurons (at most), tokens, warps, stages of loads under way; programs per processor.

    The last limits the registers, to what the compiler needs without spilling (`python -m tests.gpu_compile`).
    """

    neurons: int
    tokens: int
    warps: int
    stages: int
    resident: int


# By bytes of a product's operand and padded head dim. A table, not autotuning: tuning would time kernels in the middle
# of a CUDA graph's capture and of a user's first call at every new length, and tests would not know what they test.
TABLE = {
    "write": {
        (2, 64): Blocks(64, 64, 4, 3, 4),
        (2, 128): Blocks(64, 64, 4, 2, 2),
        (2, 256): Blocks(64, 32, 8, 2, 1),
        (4, 64): Blocks(64, 32, 4, 2, 2),
        (4, 128): Blocks(32, 32, 4, 2, 2),
        (4, 256): Blocks(16, 16, 4, 1, 2),
    },
    "read": {
        (2, 64): Blocks(64, 64, 4, 3, 3),
        (2, 128): Blocks(64, 64, 4, 2, 2),
        (2, 256): Blocks(64, 64, 8, 1, 1),
        (4, 64): Blocks(64, 64, 4, 1, 2),
        (4, 128): Blocks(32, 64, 4, 1, 2),
        (4, 256): Blocks(16, 16, 4, 1, 2),
    },
    "backward": {
        (2, 64): Blocks(64, 32, 4, 2, 2),
        (2, 128): Blocks(64, 32, 8, 1, 1),
        (2, 256): Blocks(32, 32, 8, 1, 1),
        (4, 64): Blocks(32, 32, 4, 1, 2),
        (4, 128): Blocks(32, 16, 4, 1, 1),
        (4, 256): Blocks(16, 16, 4, 1, 1),
    },
}
# In their place where there is less shared memory than on an H100.
SMALL = {
    ("write", 2, 64): Blocks(64, 64, 4, 3, 2),
    ("read", 2, 64): Blocks(64, 64, 4, 3, 2),
    ("backward", 4, 128): Blocks(16, 16, 8, 1, 1),
}
# Tokens of a chunk, at least (below, another launch to sum the chunks costs more than it saves) and at most.
CHUNKS = {"write": (256, 1024), "read": (1, 512), "backward": (256, 1024)}


def linear_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    phase: Tensor,
    key_mask: Tensor | None,
    activation: str,
    scale_root: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Write all keys into the hidden layer and read it: `ops.static.linear_attention`.

    Args:
        query: [B, H, Nq, D]. key, value: [B, H, Nk, D], [B, H, Nk, Dv]. All of one dtype: float32, bfloat16, float16.
        weight: [1 or B, H, m, D]. phase: [1 or B, H, m]. key_mask: real keys [B, Nk], bool, or None for all.
        activation: a name of `ops.features.ACTIVATIONS`. scale_root: multiplies queries and keys.

    Returns:
        The output [B, H, Nq, Dv] in the query's dtype, the log of the normaliser [B, H, Nq], and what has been written,
        kv_state [B, H, m, Dv], z_state [B, H, m], both times 2^-top, and top [B, H, m]; float32.

    Raises:
        ValueError: D or Dv above 256.
    """
    given = (query, key, value, weight, phase, key_mask, activation, scale_root)
    launch = Launches(linear_attention_forward, *given)
    query, key, value = map(dense_rows, (query, key, value))
    (batch, heads, num_queries), (num_keys, dv), m = query.shape[:3], value.shape[2:], weight.shape[2]
    hidden = _hidden(weight, phase, query.dtype)
    blocks, resident, options = _options("write", query, dv, m)
    chunk, chunks = _split("write", num_keys, batch * heads * blocks, resident, options["N"], key, value)
    states = _new_states(key, (batch, heads, m), dv)
    parts = _new_states(key, (batch, heads, chunks, m), dv) if chunks > 1 else states
    launch(
        write_kernel,
        batch * heads * chunks * blocks,
        (_strided(key), _strided(value), hidden, _bytes(key_mask), parts, num_keys, chunk, chunks, scale_root, log(m)),
        options | {"ACTIVATION": activation},
    )
    if chunks > 1:
        launch(
            combine_kernel, batch * heads * m, (parts, states, m, chunks), {"DV": dv, "DVP": options["DVP"], "N": 16}
        )
    out = empty_rows(query, dv)
    log_p = query.new_empty(batch, heads, num_queries, dtype=torch.float32)
    _read(launch, query, hidden, states, activation, scale_root, out, log_p, None)
    return out, log_p, *states


def linear_attention_backward(
    d_out: Tensor,
    d_log_p: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    phase: Tensor,
    key_mask: Tensor | None,
    activation: str,
    scale_root: float,
    out: Tensor,
    log_p: Tensor,
    kv_state: Tensor,
    z_state: Tensor,
    top: Tensor,
    *,
    with_weight: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of the query, the key, the value and (`with_weight`) the weight, from those of the output and log p.

    Arguments as those of `linear_attention_forward`, then its results. d_log_p: None where log p is not used.
    """
    given = (query, key, value, weight, phase, key_mask, activation, scale_root, out, log_p, kv_state, z_state, top)
    launch = Launches(linear_attention_backward, d_out, d_log_p, *given, with_weight)
    query, key, value, out, d_out = map(dense_rows, (query, key, value, out, d_out))
    (batch, heads, num_queries, dim), (num_keys, dv), m = query.shape, value.shape[2:], weight.shape[2]
    hidden, states = _hidden(weight, phase, query.dtype), (kv_state, z_state, top)
    blocks, resident, options = _options("backward", query, dv, m)
    more = {"BLOCKS": blocks, "ACTIVATION": activation, "NORM": NORM.get(activation, 0)}
    query_chunk, query_chunks = _split(
        "backward", num_queries, batch * heads, resident, options["N"], query, out, d_out
    )
    key_chunk, key_chunks = _split("backward", num_keys, batch * heads, resident, options["N"], key, value)
    all_chunks = query_chunks + key_chunks

    sign = None
    if blocks > 1 and activation in INDEFINITE:
        sign, log_p = torch.empty_like(log_p), torch.empty_like(log_p)
        _read(launch, query, hidden, states, activation, scale_root, out, log_p, sign)
    d_query, d_key, d_value = grads = empty_rows(query, dim), empty_rows(key, dim), empty_rows(value, dv)
    scratch = [torch.empty_like(x, dtype=torch.float32) if blocks > 1 else x for x in grads]
    d_state = query.new_empty(batch, heads, query_chunks, m * (dv + 1), dtype=torch.float32)
    parts = query.new_empty(batch, heads, all_chunks, m, dim, dtype=torch.float32) if with_weight else None
    d_log_p = None if d_log_p is None else d_log_p.contiguous()
    launch(
        read_backward_kernel,
        batch * heads * query_chunks,
        (
            *(_strided(d_out), d_log_p, _strided(query), hidden, states),
            *(_strided(out), log_p, sign, _strided(d_query), _strided(scratch[0]), d_state, parts),
            *(num_queries, query_chunk, query_chunks, all_chunks, scale_root, log(m)),
        ),
        options | more,
    )
    d_state = d_state.sum(2) if query_chunks > 1 else d_state
    launch(
        write_backward_kernel,
        batch * heads * key_chunks,
        (
            *(d_state, _strided(key), _strided(value), hidden, _bytes(key_mask), top),
            *(_strided(d_key), _strided(d_value), _strided(scratch[1]), _strided(scratch[2])),
            None if parts is None else parts[:, :, query_chunks:],
            *(num_keys, key_chunk, key_chunks, all_chunks, scale_root, log(m)),
        ),
        options | more,
    )
    if parts is None:
        return d_query, d_key, d_value, None
    d_weight = parts.sum((0, 2))[None] if weight.shape[0] == 1 else parts.sum(2)
    return d_query, d_key, d_value, d_weight.to(weight.dtype)


def _read(
    launch: Launches,
    query: Tensor,
    hidden: tuple[Tensor, Tensor, int, int, int],
    states: tuple[Tensor, ...],
    activation: str,
    scale_root: float,
    out: Tensor,
    log_p: Tensor,
    sign: Tensor | None,
) -> None:
    (batch, heads, num_queries), (m, dv) = query.shape[:3], states[0].shape[2:]
    blocks, resident, options = _options("read", query, dv, m)
    chunk, chunks = _split("read", num_queries, batch * heads, resident, options["N"], query, out)
    launch(
        read_kernel,
        batch * heads * chunks,
        (_strided(query), hidden, states, _strided(out), log_p, sign, num_queries, chunk, chunks, scale_root, log(m)),
        options | {"BLOCKS": blocks, "ACTIVATION": activation},
    )


def _strided(x: Tensor) -> tuple[Tensor, int, int, int]:
    batch, head, row, _ = x.stride()
    return x, batch, head, row


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _hidden(weight: Tensor, phase: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, int, int, int]:
    """Weights, phases, H, m, and how many layers further the next sequence's is."""
    batch, heads, m, _ = weight.shape
    weight = weight if weight.dtype == dtype else weight.float()
    return weight.contiguous(), phase.contiguous(), heads, m, 0 if batch == 1 else heads


def _new_states(like: Tensor, shape: tuple[int, ...], dv: int) -> tuple[Tensor, Tensor, Tensor]:
    """Empty kv_state [*shape, Dv], z_state and top [*shape]."""
    kv, z = like.new_empty(*shape, dv, dtype=torch.float32), like.new_empty(shape, dtype=torch.float32)
    return kv, z, torch.empty_like(z)


def _options(kernel: str, query: Tensor, dv: int, m: int) -> tuple[int, int, dict[str, int]]:
    """Blocks of neurons, programs that a processor holds, and what the kernel is compiled for."""
    return _options_for(kernel, query.dtype, query.shape[-1], dv, m, is_small(query.device))


@cache
def _options_for(
    kernel: str, dtype: torch.dtype, dim: int, dv: int, m: int, small: bool
) -> tuple[int, int, dict[str, int]]:
    padded, padded_v = map(power_of_2, (dim, dv))
    if max(padded, padded_v) > MOST_DIM:
        raise ValueError(f"head_dim: {max(dim, dv)}; the kernels take at most {MOST_DIM}")
    operand, widest = 2 if dtype == torch.bfloat16 else 4, max(64, padded, padded_v)
    blocks = TABLE[kernel][operand, widest]
    if small:
        blocks = SMALL.get((kernel, operand, widest), blocks)
    neurons = power_of_2(m, most=blocks.neurons)
    options = {"D": dim, "DP": padded, "DV": dv, "DVP": padded_v, "M": neurons, "N": blocks.tokens}
    registers = min(255, REGISTERS // (blocks.resident * blocks.warps * 32))
    options |= {"num_warps": blocks.warps, "num_stages": blocks.stages, "maxnreg": registers}
    return cdiv(m, neurons), blocks.resident, options


def _split(kernel: str, tokens: int, programs: int, resident: int, block: int, *tensors: Tensor) -> tuple[int, int]:
    """Tokens per chunk and number of chunks: so that `programs` times as many fill the GPU in whole waves."""
    least, most = CHUNKS[kernel]
    slots = resident * _processors(tensors[0].device)
    waves = max(1, cdiv(tokens * programs, slots * most))
    chunk = max(least, cdiv(tokens * programs, slots * waves))
    # Offsets within a chunk are 32-bit numbers.
    chunk = max(1, min(chunk, (2**31 - 1) // max(1, *(x.stride(2) for x in tensors)) - block, tokens))
    chunk = cdiv(chunk, block) * block
    return chunk, max(1, cdiv(tokens, chunk))


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; for CPU tensors (interpreter, compilation) those of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
