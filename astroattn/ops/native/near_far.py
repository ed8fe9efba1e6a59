"""Near + far attention on the CPU: `choosing.choose` and `near_far.attend`, and the gradients of the latter."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from astroattn.ops.layout import Budget, z_curve
from astroattn.ops.native.library import INTEGER, POINTER, TYPES, Strides, pointers, run, strides
from astroattn.ops.rows import dense_rows, empty_rows


class _Problem(ctypes.Structure):
    """`Problem` in head.h."""

    _fields_ = (
        *((name, INTEGER) for name in ("batch", "heads", "tokens", "queries", "dim", "value_dim", "type")),
        *((name, Strides) for name in ("query_stride", "key_stride", "value_stride", "out_stride", "bias_stride")),
        *((name, INTEGER) for name in ("prefix", "rows", "columns", "by_content", "steps", "cross")),
        *((name, INTEGER) for name in ("most_keys", "threads")),
        ("scale", ctypes.c_double),
    )


class _Tensors(ctypes.Structure):
    """`Tensors` in head.h."""

    _fields_ = tuple(
        (name, POINTER)
        for name in (
            *("query", "key", "value", "bias", "lengths", "layouts", "least_error", "curve", "out", "log_p"),
            *("order", "winners", "mass", "keys"),
        )
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
    bias: Tensor | None,
    lengths: Tensor | None,
    budget: Budget,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `choosing.choose` and `near_far.attend`, on [B, H, N, D] tensors of any strides.

    Args:
        bias: [1 or B, 1 or H, Nq, N], which is copied unless it is float32 with keys side by side; None: there is none.
        lengths: real tokens of each sequence, prefix included [B], int64; None: all of them.

    Returns:
        out [B, H, Nq, Dv], log p [B, H, Nq], and the choices: order [B, H, nq], winners and mass [B, H, n], keys
        [B, H, S, P]. A sequence that is shorter uses the first entries.

    Raises:
        RuntimeError: the kernels are not there, or not enough memory.
    """
    query, key, value = map(dense_rows, (query, key, value))
    batch, heads, queries, dim = query.shape
    tokens = key.shape[2]
    body, asked, layout = tokens - budget.prefix, budget.asked(tokens, queries), budget.at(tokens, dim, queries)
    out = empty_rows(query, value.shape[-1])
    log_p = torch.empty(batch, heads, queries)
    order = torch.empty(batch, heads, asked, dtype=torch.int32)
    winners = torch.empty(batch, heads, body, dtype=torch.int32)
    mass = torch.empty(batch, heads, body)
    most = budget.most_keys(tokens, dim, queries, lengths)
    keys = torch.empty(batch, heads, layout.all_subtiles(asked), most, dtype=torch.int32)
    layouts, least_error = _layouts(budget, lengths, query, tokens)
    bias = _dense_bias(bias, query)
    problem = _describe(query, key, value, out, bias, budget, most, scale)
    curve = None if budget.grid is None else _curve(*budget.grid)
    tensors = query, key, value, bias, lengths, layouts, least_error, curve, out, log_p, order, winners, mass, keys
    run("near_far", problem, _Tensors(*pointers(*tensors)))
    return out, log_p, order, winners, mass, keys


def near_far_backward(
    d_out: Tensor,
    d_log_p: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    log_p: Tensor,
    order: Tensor,
    winners: Tensor,
    mass: Tensor,
    keys: Tensor,
    lengths: Tensor | None,
    budget: Budget,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; choices and bias are constant. A thread works on whole heads.

    Raises:
        RuntimeError: as in `near_far_forward`.
    """
    query, key, value, out, d_out = map(dense_rows, (query, key, value, out, d_out))
    log_p, d_log_p, order, winners, mass, keys = (x.contiguous() for x in (log_p, d_log_p, order, winners, mass, keys))
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    layouts, least_error = _layouts(budget, lengths, query, key.shape[2])
    bias = _dense_bias(bias, query)
    problem = _describe(query, key, value, out, bias, budget, keys.shape[-1], scale)
    given = query, key, value, bias, lengths, layouts, least_error, None, out, log_p, order, winners, mass, keys
    tensors = _Tensors(*pointers(*given))
    gradients = _Gradients(*pointers(d_out, d_log_p, *grads), *strides(d_out, *grads))
    run("near_far_backward", problem, tensors, gradients)
    return grads


def _dense_bias(bias: Tensor | None, query: Tensor) -> Tensor | None:
    """The bias of all heads and sequences [B, H, Nq, N] in float32, a broadcast one in its own memory."""
    if bias is None:
        return None
    bias = bias.float()
    bias = bias if bias.stride(-1) == 1 else bias.contiguous()
    return bias.expand(*query.shape[:2], -1, -1)


@lru_cache(maxsize=64)
def _curve(rows: int, columns: int) -> Tensor:
    return torch.tensor(z_curve(rows, columns), dtype=torch.int32)


def _layouts(budget: Budget, lengths: Tensor | None, query: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """What the length of each sequence decides: [B, ...] in the order of `Layout` in head.h, and the least errors [B].

    Zeros without a body.
    """
    rows, errors = [], []
    for length in [tokens] * len(query) if lengths is None else lengths.tolist():
        body = length - budget.prefix
        if body <= 0:
            rows.append([0] * 6)
            errors.append(0.0)
            continue
        layout = budget.at(length, query.shape[3], query.shape[2])
        sizes = layout.exact_keys, layout.candidates(body), layout.num_hidden
        rows.append([layout.tile, *layout.window(body), *sizes])
        errors.append(layout.least_error(body, query.shape[3]))
    return torch.tensor(rows), torch.tensor(errors, dtype=torch.float64)


def _describe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    bias: Tensor | None,
    budget: Budget,
    most_keys: int,
    scale: float,
) -> _Problem:
    batch, heads, queries, dim = query.shape
    return _Problem(
        *(batch, heads, key.shape[2], queries, dim, value.shape[-1], TYPES[query.dtype]),
        *strides(query, key, value, out, query if bias is None else bias),
        *(budget.prefix, *(budget.grid or (0, 0)), budget.by_content, budget.steps, budget.cross, most_keys),
        *(torch.get_num_threads(), scale),
    )
