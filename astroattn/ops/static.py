"""Attention through a static hidden layer: write, read, in linear time and without an N x N matrix.

    kv_j = sum_i phi_j(k_i) v_i,  z_j = sum_i phi_j(k_i)   (the paper's H and g: Hebbian and presynaptic plasticity)
    o = sum_j phi_j(q) kv_j / p,  p = sum_j phi_j(q) z_j   (the paper's p: the astrocyte process, dividing the synapses)

All arguments are flattened over batch and heads, Z = B * H; queries and keys are both multiplied by sqrt(scale).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from astroattn.ops.choosing import choose
from astroattn.ops.features import respond
from astroattn.ops.layout import SUBTILE, Layout
from astroattn.ops.near_far import assemble
from astroattn.ops.tiles import take_rows

FEATURES, LEAST_CHUNK = 2**18, 16  # numbers in one chunk's features, and its least number of tokens


class Hidden(NamedTuple):
    """A static hidden layer: weights [Z, m, D], phases [Z, m] (used by the cosines) and the name of phi."""

    weight: Tensor
    phase: Tensor
    activation: str

    def part(self, rows: Tensor) -> Hidden:
        """The layer of some of the sequences, by their places."""
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
    return divide(phi @ state.kv_state, phi @ state.z_state[..., None], best)


def divide(out: Tensor, process: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """out / p and log p + high; zeros and -inf where nothing has been written."""
    empty = process == 0
    safe = process.masked_fill(empty, 1)
    return out.masked_fill(empty, 0) / safe, (safe.log() + high).masked_fill(empty, -torch.inf)[..., 0]


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, hidden: Hidden, *, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Write all tokens, then read: bidirectional attention, 4 m products of length D per token.

    It goes over the tokens in chunks, so that the features of all of them never exist at once.

    Args:
        query: [Z, Nq, D]. key, value: [Z, Nk, D], [Z, Nk, Dv]. key_mask: real keys [Z, Nk], or None for all.

    Returns:
        The output [Z, Nq, Dv] and the log of the normaliser [Z, Nq].
    """
    state = None
    for part in _chunks(key, hidden):
        mask = None if key_mask is None else key_mask[:, part]
        new = write(key[:, part], value[:, part], hidden, mask, None if state is None else state.top)
        state = new if state is None else add_states(state, new)
    assert state is not None
    outs, normalisers = zip(*(read(query[:, part], state, hidden) for part in _chunks(query, hidden)), strict=True)
    return torch.cat(outs, 1), torch.cat(normalisers, 1)


def _chunks(x: Tensor, hidden: Hidden) -> list[slice]:
    """Tokens of x [Z, N, D] whose features stay in the cache; all at once in a graph, which should not grow with N."""
    if torch.compiler.is_compiling():
        return [slice(None)]
    step = max(LEAST_CHUNK, FEATURES // (len(x) * hidden.weight.shape[1]))
    return [slice(start, start + step) for start in range(0, x.shape[1], step)]


def near_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, hidden: Hidden, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Bidirectional attention with the exact keys of sub-tiles attended exactly, the rest through phi.

    The hidden layer is written once with all keys; for the P exact keys of a sub-tile phi(q).phi(k) is taken out again
    and exp(q.k) put in. Arguments and results as in `near_far.near_far_attention`; the layout has no hidden neurons.
    """
    num_tokens, prefix = key.shape[1], layout.prefix
    body = num_tokens - prefix
    choice = choose(query, key, value, layout)
    slots = torch.arange(choice.keys.shape[1] * SUBTILE, device=key.device)
    token = choice.order[:, slots.clamp(max=body - 1)].unflatten(1, (-1, SUBTILE)) + prefix

    head = torch.arange(prefix, device=key.device).expand(*choice.keys.shape[:2], -1)
    index = torch.cat([head, choice.keys.clamp(min=0) + prefix], -1)
    chosen = torch.cat([torch.ones_like(head, dtype=torch.bool), choice.keys >= 0], -1)[:, :, None]

    phi_key, top = _key_features(key, hidden, None)
    phi_query, best = (take_rows(x, token) for x in _query_features(query, hidden, top))
    logits = (take_rows(query, token) @ take_rows(key, index).mT).masked_fill(~chosen, -torch.inf)
    overlap = (phi_query @ take_rows(phi_key, index).mT).masked_fill(~chosen, 0)

    total = phi_query @ phi_key.sum(1)[:, None, :, None]
    # Where every key is exact, taking them out of phi leaves rounding: it has no weight, however large phi was.
    best = best.masked_fill(chosen.sum(-1, keepdim=True) == num_tokens, torch.finfo(best.dtype).min)
    high = torch.maximum(logits.detach().amax(-1, keepdim=True), best)
    fade = (best - high).exp()
    shares = (logits - high).exp() - fade * overlap
    process = shares.sum(-1, keepdim=True) + fade * total
    out = shares @ take_rows(value, index) + fade * (phi_query @ (phi_key.mT @ value)[:, None])
    return assemble(*divide(out, process, high), choice.order, query, key, value, prefix)


@torch.no_grad()
def exact_pairs(query: Tensor, key: Tensor, asking: Tensor, layout: Layout) -> Tensor:
    """Which keys some queries attend to exactly [Z, S, N] in `near_linear_attention`: `asking` are their places [Z, S].

    The prefix attends exactly to all keys, and all queries to it.
    """
    choice, prefix = choose(query, key, key, layout), layout.prefix  # without clusters values have no part in it
    body = key.shape[1] - prefix
    subtile = choice.order.argsort(1).gather(1, (asking - prefix).clamp(min=0)) // SUBTILE
    keys = choice.keys.gather(1, subtile[..., None].expand(-1, -1, choice.keys.shape[2]))
    exact = torch.zeros(*keys.shape[:2], body + 1, dtype=torch.bool, device=key.device)  # no key is behind the last
    exact = exact.scatter(2, keys.where(keys >= 0, body), True)[..., :body]
    return F.pad(exact, (prefix, 0), value=True) | (asking < prefix)[..., None]


def add_states(old: State, new: State) -> State:
    """The sum of two states, the newer measured from the higher gains."""
    fade = (old.top - new.top).exp()
    return State(
        old.kv_state * fade.mT + new.kv_state,
        old.z_state * fade[:, 0] + new.z_state,
        new.top,
    )
