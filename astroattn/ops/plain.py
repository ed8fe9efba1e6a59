"""Attention in plain PyTorch on tensors [B, H, N, D] of any strides and dtype: what the kernels have as their twins.

Means, sums and logarithms of thousands of terms are kept in float32 at least, under autocast too. Outputs come in the
dtype of the query, log p in float32 (float64 where the inputs are). Arguments that are not said are those of
`ops.library`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from astroattn.ops import near_far, static
from astroattn.ops.causal import CausalState, causal_linear_attention
from astroattn.ops.static import Hidden
from astroattn.ops.tiles import Layout

# Most numbers in one intermediate tensor; batch and heads are taken in slices that stay below it.
WORKSPACE = 2**26


def near_far_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    num_hidden: int,
    steps: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`near_far.near_far_attention`: the output [B, H, N, Dv] and log p [B, H, N]; differentiable as it stands."""
    layout = replace(layout, lengths=_per_sequence(layout.lengths, query))
    with torch.autocast(query.device.type, enabled=False):
        q, k, v = _flat(query) * scale, _flat(key), _flat(value)
        parts = [
            near_far.near_far_attention(q[z], k[z], v[z], _part(layout, z), num_hidden=num_hidden, steps=steps)
            for z in _slices(len(q), _largest(q, layout, num_hidden))
        ]
    return _unflat(parts, query)


def near_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    phase: Tensor,
    layout: Layout,
    activation: str,
    scale_root: float,
) -> tuple[Tensor, Tensor]:
    """`static.near_linear_attention`: the output [B, H, N, Dv] and log p [B, H, N]; differentiable as it stands."""
    layout = replace(layout, lengths=_per_sequence(layout.lengths, query))
    hidden = _hidden(weight, phase, activation, query)
    with torch.autocast(query.device.type, enabled=False):
        q, k, v = _flat(query) * scale_root, _flat(key) * scale_root, _flat(value)
        tiles, count = -(-key.shape[2] // layout.tile), weight.shape[2]
        parts = [
            static.near_linear_attention(q[z], k[z], v[z], hidden.part(z), _part(layout, z))
            for z in _slices(len(q), max(key.shape[2] * count, tiles * (layout.near + layout.exact_keys) * count))
        ]
    return _unflat(parts, query)


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    phase: Tensor,
    key_mask: Tensor | None,
    activation: str,
    scale_root: float,
) -> tuple[Tensor, Tensor]:
    """`static.linear_attention`: the output [B, H, Nq, Dv] and log p [B, H, Nq]; differentiable as it stands."""
    with torch.autocast(query.device.type, enabled=False):
        q, k, v = _flat(query) * scale_root, _flat(key) * scale_root, _flat(value)
        hidden, real = _hidden(weight, phase, activation, query), _per_sequence(key_mask, query)
        return _unflat([static.linear_attention(q, k, v, hidden, key_mask=real)], query)


def causal_attention(
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
) -> tuple[Tensor, Tensor, CausalState]:
    """`causal.causal_linear_attention`: the output [B, H, N, Dv], log p [B, H, N] and the state; differentiable.

    The state is that of the kernels: as `CausalState`, with [B, H] in the place of Z; top is [B, H, m], and the latest
    keys and values are as they were given, not scaled.
    """
    shape, past = query.shape[:2], max(near - 1, 0)
    before = None
    with torch.autocast(query.device.type, enabled=False):
        q, k, v = _flat(query) * scale_root, _flat(key) * scale_root, _flat(value)
        hidden, real = _hidden(weight, phase, activation, query), _per_sequence(key_mask, query)
        if state is not None:
            kv_state, z_state, top = (x.flatten(0, 1) for x in state[:3])
            old_key, old_value = _flat(state.key) * scale_root, _flat(state.value)
            before = CausalState(kv_state, z_state, top[:, None], old_key, old_value, state.real.flatten(0, 1))
            key, value = torch.cat([state.key, key], 2), torch.cat([state.value, value], 2)
        out, log_p, after = causal_linear_attention(q, k, v, hidden, near=near, key_mask=real, state=before)
    kv_state, z_state, top, real = (
        x.unflatten(0, shape) for x in (after.kv_state, after.z_state, after.top[:, 0], after.real)
    )
    state = CausalState(kv_state, z_state, top, _latest(key, past), _latest(value, past), real)
    return *_unflat([(out, log_p)], query), state


def causal_attention_backward(
    d_out: Tensor,
    d_log_p: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    phase: Tensor,
    key_mask: Tensor | None,
    activation: str,
    near: int,
    scale_root: float,
) -> tuple[Tensor, ...]:
    """Gradients of query, key, value and weight; it computes the forward pass again."""
    with _recording():
        q, k, v, w = inputs = [x.detach().requires_grad_() for x in (query, key, value, weight)]
        out, log_p, _ = causal_attention(q, k, v, w, phase, key_mask, activation, near, scale_root)
        return torch.autograd.grad([out, log_p], inputs, [d_out, d_log_p])


@contextmanager
def _recording() -> Iterator[None]:
    """Record a graph inside a registered op, where PyTorch's dispatcher has switched autograd off."""
    key = torch._C.DispatchKey.AutogradFunctionality
    before = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, before)


def _flat(x: Tensor) -> Tensor:
    """[B, H, N, D] -> [B * H, N, D] in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).flatten(0, 1)


def _per_sequence(of_batch: Tensor | None, query: Tensor) -> Tensor | None:
    """What belongs to an element of the batch [B, ...], for each of its heads [B * H, ...]."""
    return None if of_batch is None else of_batch.repeat_interleave(query.shape[1], 0)


def _latest(x: Tensor, count: int) -> Tensor:
    """A copy of the latest tokens of [B, H, N, D], behind zeros where there are fewer."""
    return F.pad(x[:, :, max(x.shape[2] - count, 0) :], (0, 0, max(count - x.shape[2], 0), 0)).clone()


def _hidden(weight: Tensor, phase: Tensor, activation: str, query: Tensor) -> Hidden:
    """The layer of every sequence, from weights [1 or B, H, m, D]."""
    work = torch.promote_types(query.dtype, torch.float32)
    weight, phase = (x.to(work).expand(len(query), *x.shape[1:]).flatten(0, 1) for x in (weight, phase))
    return Hidden(weight, phase, activation)


def _unflat(parts: list[tuple[Tensor, Tensor]], query: Tensor) -> tuple[Tensor, Tensor]:
    out, log_p = parts[0] if len(parts) == 1 else (torch.cat(each) for each in zip(*parts, strict=True))
    shape = query.shape[:2]
    return out.to(query.dtype).unflatten(0, shape), log_p.unflatten(0, shape)


def _part(layout: Layout, rows: slice) -> Layout:
    return layout if layout.lengths is None else replace(layout, lengths=layout.lengths[rows])


def _largest(q: Tensor, layout: Layout, num_hidden: int) -> int:
    """Numbers of one sequence's largest intermediate tensor."""
    tiles = -(-q.shape[1] // layout.tile)
    per_tile = (num_hidden + layout.near + layout.exact_keys) * q.shape[2]
    return max(min(layout.groups, tiles) * q.shape[1], tiles * per_tile)


def _slices(size: int, largest: int) -> list[slice]:
    """Slices of batch and heads whose largest intermediates stay within the workspace."""
    step = max(1, WORKSPACE // largest)
    if step >= size:
        return [slice(None)]
    return [slice(start, start + step) for start in range(0, size, step)]
