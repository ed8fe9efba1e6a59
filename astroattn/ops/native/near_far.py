"""Near + far attention on the CPU: `near_far.choose` and `near_far.attend`, and the gradients of the latter."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from astroattn.ops.native.library import INTEGER, POINTER, TYPES, Strides, pointers, run, strides
from astroattn.ops.rows import dense_rows, empty_rows
from astroattn.ops.tiles import cut, near_shape


class _Problem(ctypes.Structure):
    """`Problem` in head.h."""

    _fields_ = (
        *((name, INTEGER) for name in ("batch", "heads", "tokens", "dim", "value_dim", "type")),
        *((name, Strides) for name in ("query_stride", "key_stride", "value_stride", "out_stride")),
        *((name, INTEGER) for name in ("prefix", "rows", "columns")),
        *((name, INTEGER) for name in ("tile_high", "tile_wide", "window_high", "window_wide")),
        *((name, INTEGER) for name in ("exact_keys", "groups", "hidden", "steps", "threads")),
        ("scale", ctypes.c_double),
    )


class _Tensors(ctypes.Structure):
    """`Tensors` in head.h."""

    _fields_ = tuple(
        (name, POINTER) for name in ("query", "key", "value", "lengths", "out", "log_p", "winners", "mass", "keys")
    )


class _Gradients(ctypes.Structure):
    """`Gradients` in backward.h."""

    _fields_ = (
        *((name, POINTER) for name in ("d_out", "d_log_p", "d_query", "d_key", "d_value")),
        *((name, Strides) for name in ("d_out_stride", "d_query_stride", "d_key_stride", "d_value_stride")),
    )


def near_far_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    grid: tuple[int, int] | None,
    prefix: int,
    tile: int,
    near: int,
    exact_keys: int,
    groups: int,
    num_hidden: int,
    steps: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `near_far.choose` and `near_far.attend`, on [B, H, N, D] tensors of any strides.

    Returns:
        out [B, H, N, Dv], log p [B, H, N], and the choices: winners and mass [B, H, n], keys [B, H, R, e].

    Raises:
        RuntimeError: the kernels are not there, or not enough memory.
    """
    query, key, value = map(dense_rows, (query, key, value))
    batch, heads, tokens, _ = query.shape
    body = tokens - prefix
    out = empty_rows(query, value.shape[-1])
    log_p = torch.empty(batch, heads, tokens)
    winners = torch.zeros(batch, heads, body, dtype=torch.int32)
    mass = torch.zeros(batch, heads, body)
    problem = _describe(query, key, value, out, grid, prefix, tile, near, groups, num_hidden, scale)
    problem.exact_keys, problem.steps = min(exact_keys, body), steps
    keys = torch.empty(batch, heads, problem.groups, problem.exact_keys, dtype=torch.int32)
    run("astroattn_near_far", problem, _Tensors(*pointers(query, key, value, lengths, out, log_p, winners, mass, keys)))
    return out, log_p, winners, mass, keys


def near_far_backward(
    d_out: Tensor,
    d_log_p: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_p: Tensor,
    winners: Tensor,
    mass: Tensor,
    keys: Tensor,
    lengths: Tensor | None,
    grid: tuple[int, int] | None,
    prefix: int,
    tile: int,
    near: int,
    groups: int,
    num_hidden: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; the choices are constant. A thread works on whole heads.

    Raises:
        RuntimeError: as in `near_far_forward`.
    """
    query, key, value, out, d_out = map(dense_rows, (query, key, value, out, d_out))
    log_p, d_log_p, winners, mass, keys = (x.contiguous() for x in (log_p, d_log_p, winners, mass, keys))
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    problem = _describe(query, key, value, out, grid, prefix, tile, near, groups, num_hidden, scale)
    problem.exact_keys = keys.shape[-1]
    tensors = _Tensors(*pointers(query, key, value, lengths, out, log_p, winners, mass, keys))
    gradients = _Gradients(*pointers(d_out, d_log_p, *grads), *strides(d_out, *grads))
    run("astroattn_near_far_backward", problem, tensors, gradients)
    return grads


def _describe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    grid: tuple[int, int] | None,
    prefix: int,
    tile: int,
    near: int,
    groups: int,
    num_hidden: int,
    scale: float,
) -> _Problem:
    batch, heads, tokens, dim = query.shape
    rows, columns = grid or (1, tokens - prefix)
    high, wide, down, across = cut(tile, rows, columns)
    groups = min(groups, down * across)
    return _Problem(
        *(batch, heads, tokens, dim, value.shape[-1], TYPES[query.dtype]),
        *strides(query, key, value, out),
        *(prefix, rows, columns, high, wide, *near_shape(near, rows, columns)),
        *(0, groups, num_hidden, 0, torch.get_num_threads(), scale),
    )
