"""Attention in plain PyTorch on tensors [B, H, N, D] of any strides and dtype: what the kernels have as their twins.

Means, sums and logarithms of thousands of terms are kept in float32 at least, under autocast too. Outputs come in the
dtype of the query, log p in float32 (float64 where the inputs are). Arguments that are not said are those of
`ops.library`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from astroattn.ops import choosing, near_far, static
from astroattn.ops.causal import CausalState, causal_linear_attention
from astroattn.ops.choosing import Choice
from astroattn.ops.layout import Budget, Layout
from astroattn.ops.precision import without_autocast
from astroattn.ops.static import Hidden

Choose = Callable[[Tensor, Tensor, Tensor, Layout], Choice]
Attend = Callable[[Tensor, Tensor, Tensor, Layout, Choice], tuple[Tensor, Tensor]]

# Most numbers in one intermediate tensor; batch and heads are taken in slices that stay below it.
WORKSPACE = 2**26


def near_far_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    budget: Budget,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`near_far.near_far_attention`: the output [B, H, N, Dv] and log p [B, H, N]; differentiable as it stands."""
    return _by_length(query, key, value, bias, lengths, budget, scale, _choose_and_attend)


def near_far_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    budget: Budget,
    scale: float,
    choose: Choose | None = None,
    attend: Attend = near_far.attend,
) -> tuple[Tensor, ...]:
    """The same, and what was chosen [B, H, ...], which `near_far_backward` needs.

    Kernels may choose, where there is no bias, and attend.
    """
    tokens, queries = key.shape[2], query.shape[2]
    whole, body, asked = budget.at(tokens, key.shape[3], queries), tokens - budget.prefix, budget.asked(tokens, queries)
    order = torch.arange(asked, device=query.device, dtype=torch.int32).repeat(query.shape[0] * query.shape[1], 1)
    winners = order.new_zeros(len(order), body)
    mass = torch.zeros_like(winners, dtype=torch.float32)
    most = budget.most_keys(tokens, key.shape[3], queries, lengths)
    keys = order.new_full((len(order), whole.all_subtiles(asked), most), -1)

    def run(rows: Tensor, q: Tensor, k: Tensor, v: Tensor, b: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
        choice = choose(q, k, v, layout) if choose and b is None else choosing.choose(q, k, v, layout, b)
        for mine, found in zip((order, winners, mass, keys), choice, strict=True):
            place: tuple[Any, ...] = (rows, *map(slice, found.shape[1:]))
            mine[place] = found.to(mine.dtype)
        return attend(q, k, v, layout, choice) if b is None else near_far.attend(q, k, v, layout, choice, b)

    out, log_p = _by_length(query, key, value, bias, lengths, budget, scale, run)
    return out, log_p, *(x.unflatten(0, query.shape[:2]) for x in (order, winners, mass, keys))


def near_far_given(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    order: Tensor,
    winners: Tensor,
    mass: Tensor,
    keys: Tensor,
    lengths: Tensor | None,
    budget: Budget,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The same given what was chosen, by `near_far_forward` or by a kernel: `near_far.attend`."""
    chosen = [x.flatten(0, 1) for x in (order, winners, mass, keys)]

    def run(rows: Tensor, q: Tensor, k: Tensor, v: Tensor, b: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
        body, asked = k.shape[1] - layout.prefix, q.shape[1] - layout.prefix
        order, winners, mass = (x[rows, :count] for x, count in zip(chosen, (asked, body, body), strict=False))
        keys = chosen[3][rows, : layout.all_subtiles(asked), : layout.most_keys(body)]
        return near_far.attend(q, k, v, layout, Choice(order, winners, mass, keys), b)

    return _by_length(query, key, value, bias, lengths, budget, scale, run)


def near_far_backward(
    d_out: Tensor,
    d_log_p: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    order: Tensor,
    winners: Tensor,
    mass: Tensor,
    keys: Tensor,
    lengths: Tensor | None,
    budget: Budget,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of query, key, value and a bias, given what was chosen; it computes the attention again."""
    with _recording():
        inputs = [x.detach().requires_grad_() for x in (query, key, value, bias) if x is not None]
        query, key, value, *others = inputs
        bias = others[0] if others else None
        results = near_far_given(query, key, value, bias, order, winners, mass, keys, lengths, budget, scale)
        return torch.autograd.grad(results, inputs, [d_out, d_log_p])


def near_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    phase: Tensor,
    lengths: Tensor | None,
    budget: Budget,
    activation: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`static.near_linear_attention`: the output [B, H, N, Dv] and log p [B, H, N]; differentiable as it stands."""
    hidden = _hidden(weight, phase, activation, query)

    def run(rows: Tensor, q: Tensor, k: Tensor, v: Tensor, _: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
        root = scale**0.5  # the query has all of the scale, and the hidden layer wants the root of it on both
        return static.near_linear_attention(q / root, k * root, v, hidden.part(rows), layout)

    return _by_length(query, key, value, None, lengths, budget, scale, run)


def near_linear_backward(
    d_out: Tensor,
    d_log_p: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    phase: Tensor,
    lengths: Tensor | None,
    budget: Budget,
    activation: str,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of query, key, value and weight; it computes the forward pass again."""
    with _recording():
        q, k, v, w = inputs = [x.detach().requires_grad_() for x in (query, key, value, weight)]
        outputs = near_linear_attention(q, k, v, w, phase, lengths, budget, activation, scale)
        # Where all rows end within the prefix, no weight is read.
        return torch.autograd.grad(outputs, inputs, [d_out, d_log_p], materialize_grads=True)


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
    with without_autocast(query.device):
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
    with without_autocast(query.device):
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


Run = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Layout], tuple[Tensor, Tensor]]


def _choose_and_attend(
    rows: Tensor, q: Tensor, k: Tensor, v: Tensor, b: Tensor | None, layout: Layout
) -> tuple[Tensor, Tensor]:
    return near_far.near_far_attention(q, k, v, layout, b)


def _by_length(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    budget: Budget,
    scale: float,
    run: Run,
) -> tuple[Tensor, Tensor]:
    """Attention by `run(rows, q, k, v, b, layout)` of the sequences of one length at a time: none of them has padding.

    `rows` [z] are the places of the sequences in batch and heads, and b their bias [z, nq, n]. Queries that are padding
    get zeros and -inf, as all do of another sequence where no key is real; sequences that end within the prefix are
    softmax attention.
    """
    with without_autocast(query.device):
        q, k, v = _flat(query) * scale, _flat(key), _flat(value)
        tokens = k.shape[1]
        out, log_p = q.new_zeros(*q.shape[:2], v.shape[-1]), q.new_full(q.shape[:2], -torch.inf)
        for group, length in groups_of(lengths, key):
            asked = q.shape[1] if budget.cross else length
            layout = budget.at(length, q.shape[2], asked) if length > budget.prefix else None
            most = max(_largest(layout, length, asked, q.shape[2]), 0 if bias is None else asked * length)
            for rows in group.split(max(1, WORKSPACE // most)):
                whole = len(rows) == len(q) and length == tokens
                query_ = q if whole else q[rows, :asked]
                key_, value_ = (x if whole else x[rows, :length] for x in (k, v))
                bias_ = None if bias is None else _bias_of(bias, rows, query.shape[1], asked, length).to(q.dtype)
                if layout is None:
                    found_out, found_log_p = near_far.exact_rows(query_, key_, value_, bias_)
                else:
                    found_out, found_log_p = run(rows, query_, key_, value_, bias_, layout)
                if whole:
                    out, log_p = found_out, found_log_p
                else:
                    out[rows, :asked], log_p[rows, :asked] = found_out, found_log_p
    shape = query.shape[:2]
    return out.to(query.dtype).unflatten(0, shape), log_p.unflatten(0, shape)


def groups_of(lengths: Tensor | None, key: Tensor) -> list[tuple[Tensor, int]]:
    """Places of the sequences of one length, in batch and heads, and the length; None: that of all keys."""
    batch, heads, tokens, _ = key.shape
    every = torch.arange(batch * heads, device=key.device)
    if lengths is None:
        return [(every, tokens)]
    if lengths.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "astroattn: a CUDA graph cannot hold tiles of padded rows, whose lengths decide what is computed; "
            "compile without CUDA graphs, or give it rows of one length and no mask"
        )
    of_row = lengths.repeat_interleave(heads)
    return [(every[of_row == length], length) for length in sorted(set(lengths.tolist()))]


def _bias_of(bias: Tensor, rows: Tensor, heads: int, asked: int, length: int) -> Tensor:
    """The bias [z, nq, n] of the sequences at these places, from that of a batch [1 or B, 1 or H, Nq, N]."""
    of_batch, of_heads = (x * (size > 1) for x, size in zip((rows // heads, rows % heads), bias.shape, strict=False))
    return bias[:, :, :asked, :length][of_batch, of_heads]


def _largest(layout: Layout | None, tokens: int, queries: int, dim: int) -> int:
    """Numbers of one sequence's largest intermediate tensor."""
    if layout is None:
        return max(queries * tokens, 1)
    body, asked = tokens - layout.prefix, queries - layout.prefix
    tiles, union = layout.tiles(asked), layout.union(body)
    return max(tiles * body, tiles * union * dim, asked * (layout.prefix + union + layout.num_hidden))
