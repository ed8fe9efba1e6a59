"""Attention to a memory of fixed size on the CPU (`ops.streaming.stream`)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from astroattn.ops.native.library import INTEGER, POINTER, Strides, pointers, run, strides
from astroattn.ops.rows import dense_rows, empty_rows
from astroattn.ops.streaming import (
    ENTRIES,
    FORGETTING,
    LEAST_MASS,
    QUERY_DECAY,
    SECOND_ORDER,
    SINKS,
    Memory,
    block_of,
)


class _Problem(ctypes.Structure):
    """`StreamProblem` in streaming.h."""

    _fields_ = (
        *((name, INTEGER) for name in ("batch", "heads", "groups", "tokens", "dim", "value_dim", "entries", "newest")),
        *((name, INTEGER) for name in ("block", "sinks", "old_width", "new_width", "threads")),
        *((name, Strides) for name in ("query_stride", "key_stride", "value_stride", "out_stride")),
        *((name, ctypes.c_double) for name in ("fast", "slow", "second_order", "least_mass", "soft_cap")),
    )


class _Tensors(ctypes.Structure):
    """`StreamTensors` in streaming.h."""

    _fields_ = tuple(
        (name, POINTER)
        for name in (
            *("query", "key", "value", "out", "log_p", "lengths"),
            *(f"before_{name}" for name in Memory._fields),
            *(f"after_{name}" for name in Memory._fields),
        )
    )


def stream(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: Memory,
    entries: int,
    newest: int,
    lengths: Tensor | None = None,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor, Memory]:
    """As `streaming.stream`, in float32, of any strides. A thread works on whole key heads.

    Raises:
        RuntimeError: the kernels are not there, or not enough memory.
    """
    batch, heads, groups, tokens, dim = query.shape
    query, key, value = map(dense_rows, (query.flatten(1, 2), key, value))
    before = Memory(*(x.contiguous() for x in memory))
    lengths = None if lengths is None else lengths.contiguous()
    width = _width(before.counts, [tokens] * batch if lengths is None else lengths.tolist(), entries)
    after = Memory(
        *(x.new_empty(batch, heads, width, *x.shape[3:]) for x in before[: len(ENTRIES)]),
        *map(torch.empty_like, before[len(ENTRIES) :]),
    )
    out = empty_rows(query, value.shape[-1])
    log_p = query.new_empty(batch, heads, groups, tokens)
    block = block_of(entries)
    problem = _Problem(
        *(batch, heads, groups, tokens, dim, value.shape[-1], entries, newest, block, SINKS),
        *(before.key.shape[2], width, torch.get_num_threads()),
        *strides(query, key, value, out),
        *((1 - FORGETTING / entries) ** block, QUERY_DECAY**block, SECOND_ORDER, LEAST_MASS, soft_cap or 0.0),
    )
    tensors = (query, key, value, out, log_p, lengths, *before, *after)
    run("stream", problem, _Tensors(*pointers(*tensors)))
    return out.unflatten(1, (heads, groups)), log_p, after


def _width(counts: Tensor, lengths: list[int], entries: int) -> int:
    """Entries of the sequence that has most, after so many more tokens."""
    block, most = block_of(entries), 0
    for (stored, written, _), length in zip(counts.tolist(), lengths, strict=True):
        blocks, rest = divmod(written + length, block)
        stored -= written  # at the start of the block
        if blocks:
            stored = min(stored + blocks * block, entries - block)
        most = max(most, stored + rest)
    return most
