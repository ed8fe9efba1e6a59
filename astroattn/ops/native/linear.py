"""Linear attention through a static hidden layer on the CPU, forward and backward (`ops.static`)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from astroattn.ops.features import ACTIVATIONS
from astroattn.ops.native.library import INTEGER, POINTER, TYPES, Strides, pointers, run, strides
from astroattn.ops.rows import dense_rows, empty_rows

NUMBER = {name: number for number, name in enumerate(ACTIVATIONS)}


class _Problem(ctypes.Structure):
    """`LinearProblem` in linear.h."""

    _fields_ = (
        *((name, INTEGER) for name in ("batch", "heads", "queries", "keys", "dim", "value_dim", "hidden", "type")),
        *((name, INTEGER) for name in ("activation", "weight_batches", "threads")),
        *((name, Strides) for name in ("query_stride", "key_stride", "value_stride", "out_stride")),
        ("scale_root", ctypes.c_double),
    )


class _Tensors(ctypes.Structure):
    """`LinearTensors` in linear.h."""

    _fields_ = tuple(
        (name, POINTER)
        for name in (
            "query",
            "key",
            "value",
            "weight",
            "phase",
            "key_mask",
            "out",
            "log_p",
            "kv_state",
            "z_state",
            "top",
        )
    )


class _Gradients(ctypes.Structure):
    """`LinearGradients` in linear.h."""

    _fields_ = (
        *((name, POINTER) for name in ("d_out", "d_log_p", "d_query", "d_key", "d_value", "d_weight")),
        *((name, Strides) for name in ("d_out_stride", "d_query_stride", "d_key_stride", "d_value_stride")),
    )


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
    """As `static.linear_attention`, on [B, H, N, D] tensors of any strides, weights [1 or B, H, m, D].

    Returns:
        out [B, H, Nq, Dv], log p [B, H, Nq], and the state: kv [B, H, m, Dv], z [B, H, m], top [B, H, m].

    Raises:
        RuntimeError: the kernels are not there, or not enough memory.
    """
    query, key, value = map(dense_rows, (query, key, value))
    out = empty_rows(query, value.shape[-1])
    log_p = torch.empty(query.shape[:3])
    sizes = (*query.shape[:2], weight.shape[2])
    kv_state, z_state, top = torch.empty(*sizes, value.shape[-1]), torch.empty(sizes), torch.empty(sizes)
    weight, phase, key_mask = _constants(weight, phase, key_mask)
    problem = _describe(query, key, value, out, weight, activation, scale_root)
    tensors = (query, key, value, weight, phase, key_mask, out, log_p, kv_state, z_state, top)
    run("linear", problem, _Tensors(*pointers(*tensors)))
    return out, log_p, kv_state, z_state, top


def linear_attention_backward(
    d_out: Tensor,
    d_log_p: Tensor,
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
    """Gradients of query, key, value and, if wanted, weight; phi is computed again.

    Raises:
        RuntimeError: as in `linear_attention_forward`.
    """
    query, key, value, out, d_out = map(dense_rows, (query, key, value, out, d_out))
    log_p, d_log_p, kv_state, z_state, top = (x.contiguous() for x in (log_p, d_log_p, kv_state, z_state, top))
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    dtype = weight.dtype
    weight, phase, key_mask = _constants(weight, phase, key_mask)
    d_weight = torch.empty_like(weight) if with_weight else None
    problem = _describe(query, key, value, out, weight, activation, scale_root)
    tensors = (query, key, value, weight, phase, key_mask, out, log_p, kv_state, z_state, top)
    gradients = _Gradients(*pointers(d_out, d_log_p, *grads, d_weight), *strides(d_out, *grads))
    run("linear_backward", problem, _Tensors(*pointers(*tensors)), gradients)
    return *grads, None if d_weight is None else d_weight.to(dtype)


def _constants(weight: Tensor, phase: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    mask = None if key_mask is None else key_mask.contiguous()
    return weight.float().contiguous(), phase.float().expand(weight.shape[:3]).contiguous(), mask


def _describe(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, weight: Tensor, activation: str, scale_root: float
) -> _Problem:
    batch, heads, queries, dim = query.shape
    return _Problem(
        *(batch, heads, queries, key.shape[2], dim, value.shape[-1], weight.shape[2], TYPES[query.dtype]),
        *(NUMBER[activation], weight.shape[0], torch.get_num_threads()),
        *strides(query, key, value, out),
        scale_root,
    )
