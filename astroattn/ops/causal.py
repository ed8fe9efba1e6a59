"""Causal attention through a static hidden layer, the latest keys exactly: in chunks, or on from a state of fixed size.

    o_i = (sum_{near j} exp(q_i.k_j) v_j + sum_{earlier j} phi(q_i).phi(k_j) v_j) / p_i,   p_i the same sums without v

All arguments are flattened over batch and heads, Z = B * H; queries and keys are both multiplied by sqrt(scale).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from astroattn.ops.features import respond
from astroattn.ops.static import Hidden, State, add_states, divide

CHUNK = 64  # tokens that are read pair by pair
# Most that the gains of one chunk may rise above what a query of it sees: exp(-40) is far from float32's underflow.
GAIN_RANGE = 40


class CausalState(NamedTuple):
    """What the tokens so far leave behind, of the same size however many they are.

    The hidden layer, as in `static.State`: kv_state [Z, m, Dv], z_state [Z, m], top [Z, 1, m]. And the near - 1 latest
    tokens, which are not written into it yet: key [Z, near - 1, D], value [Z, near - 1, Dv], and which of them are
    real tokens, neither padding nor before the first, real [Z, near - 1].
    """

    kv_state: Tensor
    z_state: Tensor
    top: Tensor
    key: Tensor
    value: Tensor
    real: Tensor


def empty_state(key: Tensor, value: Tensor, hidden: Hidden, near: int) -> CausalState:
    """The state before the first token, for keys and values like these."""
    size, m, past = len(key), hidden.weight.shape[1], max(near - 1, 0)
    return CausalState(
        value.new_zeros(size, m, value.shape[-1]),
        key.new_zeros(size, m),
        key.new_full((size, 1, m), torch.finfo(key.dtype).min / 4),
        key.new_zeros(size, past, key.shape[-1]),
        value.new_zeros(size, past, value.shape[-1]),
        torch.zeros(size, past, dtype=torch.bool, device=key.device),
    )


def causal_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Hidden,
    *,
    near: int = 0,
    key_mask: Tensor | None = None,
    state: CausalState | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, CausalState]:
    """Causal attention in chunks: keys of earlier chunks through the state, keys of the same chunk pair by pair.

    A query reads the `near` latest keys (itself included, padding counted) exactly and all earlier ones through phi.
    With near = 0 it reads itself through phi, too. One token after the other is a call with N = 1 each.

    Args:
        query, key, value: [Z, N, D], [Z, N, D], [Z, N, Dv]. key_mask: real keys [Z, N]. state: where to go on from.

    Returns:
        The output [Z, N, Dv], the log of the normaliser [Z, N] (zeros and -inf where no key has come yet), and the
        state, from which another call can go on.

    Raises:
        ValueError: a state of another near field.
    """
    count, past = key.shape[1], max(near - 1, 0)
    state = empty_state(key, value, hidden, near) if state is None else state
    if state.key.shape[1] != past:
        raise ValueError(f"near: {near}; the state keeps the latest {state.key.shape[1]} keys, not {past}")
    # Behind the recent tokens, slot i is the first token that query i finds near, and the latest one to be written
    # before query i + 1.
    key, value = torch.cat([state.key, key], 1), torch.cat([state.value, value], 1)
    real = key_mask
    if past:
        new = torch.ones_like(state.real[:, :1]).expand(-1, count) if key_mask is None else key_mask
        real = torch.cat([state.real, new], 1)
    written = State(state.kv_state, state.z_state, state.top)
    outs, normalisers = [], []
    for start in range(0, count, chunk):
        now = slice(start, min(start + chunk, count))
        slots = slice(start, now.stop + past)
        mask = None if real is None else real[:, slots]
        out, normaliser, written = _attend(query[:, now], key[:, slots], value[:, slots], mask, written, hidden, near)
        outs.append(out)
        normalisers.append(normaliser)
    # Copies: views would keep all tokens in memory.
    recent = (x[:, count:].clone() for x in (key, value, state.real if real is None else real))
    state = CausalState(written.kv_state, written.z_state, written.top.clone(), *recent)
    return torch.cat(outs, 1), torch.cat(normalisers, 1), state


def _attend(
    query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, state: State, hidden: Hidden, near: int
) -> tuple[Tensor, Tensor, State]:
    """Read a chunk of n queries and write the first n of its n + near - 1 slots: output, log p, and the new state.

    A feature is measured from its largest gain over the keys that the last query reads through phi. Where an earlier
    query reads only gains so much smaller that they could underflow, the chunk is taken in two halves.
    """
    n = query.shape[1]
    own = min(near, 1)  # with a near field, slot i is near to query i, and otherwise in its far field
    gain, base = respond(key[:, :n], hidden.weight, hidden.phase, hidden.activation)
    if real is not None:
        gain = gain.masked_fill(~real[:, :n, None], -torch.inf)
    gain = gain.expand_as(base)
    highest = torch.cat([state.top, gain.detach()], 1).cummax(1).values
    seen_top = highest[:, 1 - own : n + 1 - own]  # over what each query reads through phi [Z, n, m]
    top, new_top = seen_top[:, -1:], highest[:, -1:]
    some = seen_top > torch.finfo(key.dtype).min / 4  # False where there is no such key yet
    if n > 1 and ((top - seen_top).masked_fill(~some, 0) > GAIN_RANGE).any():
        half, past = n // 2, key.shape[1] - n
        outs, normalisers = [], []
        for now, slots in ((slice(half), slice(half + past)), (slice(half, None), slice(half, None))):
            mask = None if real is None else real[:, slots]
            out, normaliser, state = _attend(query[:, now], key[:, slots], value[:, slots], mask, state, hidden, near)
            outs.append(out)
            normalisers.append(normaliser)
        return torch.cat(outs, 1), torch.cat(normalisers, 1), state

    query_gain, query_base = respond(query, hidden.weight, hidden.phase, hidden.activation)
    high = (query_gain.detach() + seen_top).amax(-1, keepdim=True)
    close = logits = None
    if near:
        slot = torch.arange(key.shape[1], device=key.device)
        first = slot[:n, None]
        close = ((slot >= first) & (slot < first + near)).expand(len(key), -1, -1)
        close = close if real is None else close & real[:, None]
        logits = (query @ key.mT).masked_fill(~close, -torch.inf)
        high = torch.maximum(high, logits.detach().amax(-1, keepdim=True))
    phi_query = (query_gain + top - high).masked_fill(~some, -torch.inf).exp() * query_base
    phi_key = (gain[:, : n - own] - top).exp() * base[:, : n - own]
    fade = (state.top - top).exp()
    shares = (phi_query @ phi_key.mT).tril(-own)
    process = phi_query @ (state.z_state * fade[:, 0])[..., None] + shares.sum(-1, keepdim=True)
    out = phi_query @ (state.kv_state * fade.mT) + shares @ value[:, : n - own]
    if logits is not None:
        shares = (logits - high).exp()
        process, out = process + shares.sum(-1, keepdim=True), out + shares @ value
    phi_key = (gain - new_top).exp() * base
    new = State(phi_key.mT @ value[:, :n], phi_key.sum(1), new_top)
    return *divide(out, process, high), add_states(state, new)
