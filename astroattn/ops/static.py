"""Attention through a static hidden layer: write, read, in linear time and without an N x N matrix.

    kv_j = sum_i phi_j(k_i) v_i,  z_j = sum_i phi_j(k_i)   (the paper's H and g: Hebbian and presynaptic plasticity)
    o = sum_j phi_j(q) kv_j / p,  p = sum_j phi_j(q) z_j   (the paper's p: the astrocyte process, dividing the synapses)

All arguments are flattened over batch and heads, Z = B * H; queries and keys are both multiplied by sqrt(scale).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from astroattn.ops.features import respond
from astroattn.ops.near_far import assemble, choose_exact_keys, read_tiles, take_rows
from astroattn.ops.tiles import Layout, make_tiles

CHUNK = 64  # tokens that causal attention reads pair by pair, at least
# Most that the gains of one chunk may rise above what a query of it sees: exp(-40) is far from float32's underflow.
GAIN_RANGE = 40


class Hidden(NamedTuple):
    """A static hidden layer: weights [Z, m, D], phases [Z, m] (used by the cosines) and the name of phi."""

    weight: Tensor
    phase: Tensor
    activation: str

    def part(self, rows: slice) -> Hidden:
        """The layer of some of the sequences."""
        return Hidden(self.weight[rows], self.phase[rows], self.activation)


@dataclass(frozen=True)
class State:
    """What has been written: kv_state [Z, m, Dv] and z_state [Z, m], both times exp(-top), top [Z, 1, m] the gains."""

    kv_state: Tensor
    z_state: Tensor
    top: Tensor


def write(key: Tensor, value: Tensor, hidden: Hidden, key_mask: Tensor | None, top: Tensor | None = None) -> State:
    """Write keys and values into the hidden layer. `top`: the least gain per feature to measure from [Z, 1, m]."""
    phi, top = _key_features(key, hidden, key_mask, top)
    return State(phi.mT @ value, phi.sum(1), top)


def _key_features(
    key: Tensor, hidden: Hidden, key_mask: Tensor | None, top: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """phi(k) exp(-top) [Z, N, m] and top [Z, 1, m], the largest gain of each feature over the keys."""
    gain, base = respond(key, hidden.weight, hidden.phase, hidden.activation)
    if key_mask is not None:
        gain = gain.masked_fill(~key_mask[..., None], -torch.inf)
    highest = gain.detach().amax(1, keepdim=True).expand(-1, -1, base.shape[-1])
    highest = highest.clamp(min=torch.finfo(gain.dtype).min / 4)
    highest = highest if top is None else torch.maximum(highest, top)
    return (gain - highest).exp() * base, highest


def _query_features(query: Tensor, hidden: Hidden, top: Tensor) -> tuple[Tensor, Tensor]:
    """phi(q) exp(top - best) [Z, N, m] and best [Z, N, 1], per query; p = exp(best) phi.z."""
    gain, base = respond(query, hidden.weight, hidden.phase, hidden.activation)
    gain = gain + top
    best = gain.detach().amax(-1, keepdim=True)
    return (gain - best).exp() * base, best


def read(query: Tensor, state: State, hidden: Hidden) -> tuple[Tensor, Tensor]:
    """Read the hidden layer: the output [Z, N, Dv] and log p [Z, N] (NaN where an activation makes p negative)."""
    phi, best = _query_features(query, hidden, state.top)
    return _divide(phi @ state.kv_state, phi @ state.z_state[..., None], best)


def _divide(out: Tensor, process: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """out / p and log p + high; zeros and -inf where nothing has been written."""
    empty = process == 0
    safe = process.masked_fill(empty, 1)
    return out.masked_fill(empty, 0) / safe, (safe.log() + high).masked_fill(empty, -torch.inf)[..., 0]


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, hidden: Hidden, *, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Write all tokens, then read: bidirectional attention, 4 m products of length D per token.

    Args:
        query: [Z, Nq, D]. key, value: [Z, Nk, D], [Z, Nk, Dv]. key_mask: real keys [Z, Nk], or None for all.

    Returns:
        The output [Z, Nq, Dv] and the log of the normaliser [Z, Nq].
    """
    return read(query, write(key, value, hidden, key_mask), hidden)


def near_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, hidden: Hidden, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Bidirectional attention with the near field and exact keys of tiles attended exactly, the rest through phi.

    The hidden layer is written once with all keys; for the P exact keys of a tile phi(q).phi(k) is taken out again and
    exp(q.k) put in. Arguments and results as in `near_far.near_far_attention`.
    """
    num_tokens, prefix = key.shape[1], layout.prefix
    tiles = make_tiles(layout, num_tokens, key.device)
    exact = choose_exact_keys(read_tiles(query, key, layout, tiles), tiles, None, layout.exact_keys)
    real = layout.real(num_tokens)

    head = torch.arange(prefix, device=key.device).expand(len(key), len(tiles.slots), -1)
    head_real = torch.ones_like(head, dtype=torch.bool) if real is None else real[:, None, :prefix].expand(head.shape)
    index = torch.cat([head, exact.keys + prefix], -1)
    chosen = torch.cat([head_real, exact.chosen], -1)[:, :, None]

    phi_key, top = _key_features(key, hidden, real)
    slots = tiles.slots + prefix
    phi_query, best = (x[:, slots] for x in _query_features(query, hidden, top))
    logits = (query[:, slots] @ take_rows(key, index).mT).masked_fill(~chosen, -torch.inf)
    overlap = (phi_query @ take_rows(phi_key, index).mT).masked_fill(~chosen, 0)

    total = phi_query @ phi_key.sum(1)[:, None, :, None]
    # Where every key is exact, taking them out of phi leaves rounding: it has no weight, however large phi was.
    left = chosen.sum(-1, keepdim=True) < (num_tokens if real is None else real.sum(1)[:, None, None, None])
    best = best.masked_fill(~left, torch.finfo(best.dtype).min)
    high = torch.maximum(logits.detach().amax(-1, keepdim=True), best)
    fade = (best - high).exp()
    shares = (logits - high).exp() - fade * overlap
    process = shares.sum(-1, keepdim=True) + fade * total
    out = shares @ take_rows(value, index) + fade * (phi_query @ (phi_key.mT @ value)[:, None])
    return assemble(*_divide(out, process, high), tiles, query, key, value, layout)


def causal_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Hidden,
    *,
    near: int = 0,
    key_mask: Tensor | None = None,
    state: State | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, State | None]:
    """Causal attention in chunks: keys of earlier chunks through the state, keys of the same chunk pair by pair.

    A query reads the `near` latest keys (itself included) exactly and all earlier ones through phi. The state has
    constant size, and another call can go on from it (with near = 0).

    Args:
        query, key, value: [Z, N, D], [Z, N, D], [Z, N, Dv]. key_mask: real keys [Z, N]. state: where to go on from.

    Returns:
        The output [Z, N, Dv], the log of the normaliser [Z, N] (zeros and -inf where no key has come yet), and the
        state, or None with a near field.
    """
    if state is not None and near:
        raise ValueError(f"near: {near}; going on from a state needs near=0, because a state keeps no recent keys")
    size, count, _ = key.shape
    chunk = max(chunk, near)
    if state is None:
        m, dim = hidden.weight.shape[1], value.shape[-1]
        low = torch.finfo(key.dtype).min / 4
        state = State(key.new_zeros(size, m, dim), key.new_zeros(size, m), key.new_full((size, 1, m), low))
    outs, normalisers = [], []
    lag = chunk if near else 0  # with a near field, the state stays one chunk behind, so that a window fits in two
    for start in range(0, count, chunk):
        now = slice(start, min(start + chunk, count))
        recent = slice(max(start - lag, 0), now.stop)
        mask = None if key_mask is None else key_mask[:, recent]
        out, normaliser = _read_chunk(query[:, now], key[:, recent], value[:, recent], state, hidden, near, mask)
        outs.append(out)
        normalisers.append(normaliser)
        done = slice(recent.start, now.stop - lag) if lag else now
        if done.stop > done.start:
            mask = None if key_mask is None else key_mask[:, done]
            state = _add(state, write(key[:, done], value[:, done], hidden, mask, state.top))
    return torch.cat(outs, 1), torch.cat(normalisers, 1), None if near else state


def _add(old: State, new: State) -> State:
    """The sum of two states, the newer measured from the higher gains."""
    fade = (old.top - new.top).exp()
    return State(
        old.kv_state * fade.mT + new.kv_state,
        old.z_state * fade[:, 0] + new.z_state,
        new.top,
    )


def _read_chunk(
    query: Tensor, key: Tensor, value: Tensor, state: State, hidden: Hidden, near: int, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Queries that are the last tokens of the keys read the state and, pair by pair, the keys that they see.

    A feature is measured from its largest gain over the keys that the last query sees. Where an earlier query sees
    only gains so much smaller that they could underflow, the queries are read in two halves.
    """
    queries, keys = query.shape[1], key.shape[1]
    gain, base = respond(key, hidden.weight, hidden.phase, hidden.activation)
    position = torch.arange(keys, device=key.device)
    far = (position < keys - near)[None] if key_mask is None else (position < keys - near) & key_mask
    gain = gain.masked_fill(~far[..., None], -torch.inf).expand_as(base)
    highest = torch.cat([state.top, gain.detach()], 1).cummax(1).values
    seen_top = highest[:, (position[keys - queries :] + 1 - near).clamp(min=0)]  # what each query sees [Z, queries, m]
    top = seen_top[:, -1:]
    some = seen_top > torch.finfo(key.dtype).min / 4  # False where there is no far key yet
    if queries > 1 and ((top - seen_top).masked_fill(~some, 0) > GAIN_RANGE).any():
        half = queries // 2
        early = slice(keys - queries + half)
        mask = None if key_mask is None else key_mask[:, early]
        parts = (
            _read_chunk(query[:, :half], key[:, early], value[:, early], state, hidden, near, mask),
            _read_chunk(query[:, half:], key, value, state, hidden, near, key_mask),
        )
        return torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], 1)

    phi_key = (gain - top).exp() * base
    gain, base = respond(query, hidden.weight, hidden.phase, hidden.activation)
    best = (gain.detach() + seen_top).amax(-1, keepdim=True)
    phi_query = (gain + top - best).masked_fill(~some, -torch.inf).exp() * base
    fade = (state.top - top).exp()
    process = phi_query @ (state.z_state * fade[:, 0])[..., None]
    out = phi_query @ (state.kv_state * fade.mT)

    distance = position[keys - queries :, None] - position
    seen = (distance >= 0)[None] if key_mask is None else (distance >= 0) & key_mask[:, None]
    shares = (phi_query @ phi_key.mT).masked_fill(~seen, 0)
    high = best
    if near:
        close = seen & (distance < near)
        logits = (query @ key.mT).masked_fill(~close, -torch.inf)
        high = torch.maximum(best, logits.detach().amax(-1, keepdim=True))
        scale = (best - high).exp()
        shares = torch.where(close, (logits - high).exp(), shares * scale)
        process, out = process * scale, out * scale
    return _divide(out + shares @ value, process + shares.sum(-1, keepdim=True), high)


def recurrent_step(
    query: Tensor, key: Tensor, value: Tensor, hidden: Hidden, state: State
) -> tuple[Tensor, Tensor, State]:
    """One token: write it, then read. query, key [Z, 1, D], value [Z, 1, Dv]; output, log normaliser, new state."""
    state = _add(state, write(key, value, hidden, None, state.top))
    out, normaliser = read(query, state, hidden)
    return out, normaliser, state
