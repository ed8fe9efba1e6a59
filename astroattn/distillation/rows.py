"""The rows of attention that transfer compares: what each query takes of each key [B, H, Nq, Nk], a sink left out.

`queries` are places [B, S] among the queries of each sequence; None stands for all of them.
"""

from __future__ import annotations

from math import log, sqrt

import torch
from torch import Tensor

from astroattn.attention import AstrocyteAttention
from astroattn.config import AstroConfig, is_tiled
from astroattn.cost import budget_of, covers, prefix_length
from astroattn.fidelity.calls import AttentionCall
from astroattn.hidden import LearnedHidden
from astroattn.ops.padding import in_order, sort_tokens
from astroattn.ops.plain import groups_of
from astroattn.ops.static import exact_pairs
from astroattn.ops.streaming import soft_capped
from astroattn.patching.record import unwrapped

QUERIES = 64  # of a sequence; their rows say enough of the others', and cost 64 N instead of N^2
LEAST_SHARE = 1e-6  # of attention, below which a share counts as this much


def softmax_rows(call: AttentionCall, queries: Tensor | None = None) -> Tensor:
    """Softmax attention; of queries that see no key, any numbers."""
    return _hide(_exact_logits(call, queries), call, queries).softmax(-1)


def log_rows(module: AstrocyteAttention, call: AttentionCall, queries: Tensor | None = None) -> Tensor:
    """The logarithm of the module's attention, at least that of `LEAST_SHARE`."""
    logits = _exact_logits(call, queries) if _is_softmax(module, call) else _far_logits(module, call, queries)
    return _hide(logits, call, queries).log_softmax(-1).clamp(min=log(LEAST_SHARE))


def _is_softmax(module: AstrocyteAttention, call: AttentionCall) -> bool:
    """Whether a module with a learned hidden layer attends to every key exactly: to few of them, or in a window."""
    in_window = call.options.get("window") is not None
    return in_window or covers(module.configs[0], call.key.shape[2], call.options.get("grid"))


def learned_layer(module: AstrocyteAttention) -> LearnedHidden:
    """The learned hidden layer of a module, or the copy of it that an adapter of peft trains."""
    hidden: LearnedHidden = unwrapped(module.hidden)
    return hidden


def take(x: Tensor, queries: Tensor | None) -> Tensor:
    """Those of x [B, H, Nq, D]."""
    return x if queries is None else torch.take_along_dim(x, queries[:, None, :, None], 2)


def _exact_logits(call: AttentionCall, queries: Tensor | None) -> Tensor:
    logits, bias = take(call.query, queries) @ call.key.mT * call.scale, call.options.get("bias")
    return soft_capped(logits if bias is None else logits + take(bias, queries), call.options.get("soft_cap"))


def log_products(
    hidden: LearnedHidden, query: Tensor, key: Tensor, scale: float = 1.0, real: Tensor | None = None
) -> Tensor:
    """log phi(q).phi(k) [B, H, Nq, Nk], of queries and keys times sqrt(scale); of `real` keys [B, Nk] alone."""
    reading = query @ hidden.query_weight.mT.to(query.dtype) * sqrt(scale)
    writing = key @ hidden.key_weight.mT.to(key.dtype) * sqrt(scale) + hidden.bias[:, None].to(key.dtype)
    if real is not None:
        writing = writing.masked_fill(~real[:, None, :, None], torch.finfo(writing.dtype).min)
    top = writing.detach().amax(2, keepdim=True)
    reading = reading + top
    best = reading.detach().amax(-1, keepdim=True)
    shares = (reading - best).exp() @ (writing - top).exp().mT / writing.shape[-1]
    return shares.clamp(min=torch.finfo(shares.dtype).tiny).log() + best


def _far_logits(module: AstrocyteAttention, call: AttentionCall, queries: Tensor | None) -> Tensor:
    """log phi(q).phi(k), but q.k where the key is attended exactly."""
    real: Tensor | None = call.options.get("key_mask")
    logits = log_products(learned_layer(module), take(call.query, queries), call.key, call.scale, real)
    exact = _is_exact(module, call, queries)
    return logits if exact is None else torch.where(exact, _exact_logits(call, queries), logits)


def _is_exact(module: AstrocyteAttention, call: AttentionCall, queries: Tensor | None) -> Tensor | None:
    """Where a key is one of the `near` latest real ones, or it or the query one of the exact ones; None: nowhere."""
    (many, keys), config = (call.query.shape[2], call.key.shape[2]), module.configs[0]
    if is_tiled(config) and not call.options.get("causal"):
        return _is_exact_in_tiles(config, call, queries)
    real: Tensor | None = call.options.get("key_mask")
    prefix, near = prefix_length(config, keys, None), config.near if call.options.get("causal") else 0
    if not prefix and not near:
        return None
    # the number of each real token; padding has that of the one before it
    places = torch.arange(1, keys + 1, device=call.key.device)[None] if real is None else real.cumsum(1)
    places = places.expand(len(call.key), -1)
    asks = places[:, keys - many :] if queries is None else places.gather(1, queries + keys - many)
    age = asks[:, :, None] - places[:, None]
    exact = ((age >= 0) & (age < near)) | (places[:, None] <= prefix) | (asks[:, :, None] <= prefix)
    return exact[:, None]


@torch.no_grad()
def _is_exact_in_tiles(config: AstroConfig, call: AttentionCall, queries: Tensor | None) -> Tensor:
    """Where a key is one that the tiles of a bidirectional layer read exactly [B, H, S, N]."""
    (batch, heads, keys, _), grid = call.key.shape, call.options.get("grid")
    real: Tensor | None = call.options.get("key_mask")
    query, key, lengths = call.query, call.key, None
    place = torch.arange(keys, device=key.device).expand(batch, -1)  # of each token in the order of the tiles
    if real is not None:
        order, lengths = sort_tokens(~real)[0], real.sum(1)
        query, key = in_order(query, order), in_order(key, order)
        place = order.argsort(1)
    asking = place if queries is None else place.gather(1, queries)
    asking = asking.repeat_interleave(heads, 0)
    budget, many = budget_of(config, keys, grid), asking.shape[1]
    q, k = query.flatten(0, 1) * call.scale, key.flatten(0, 1)
    exact = torch.ones(batch * heads, many, keys, dtype=torch.bool, device=key.device)
    for rows, length in groups_of(lengths, key):
        if length > budget.prefix:
            layout, mine = budget.at(length, q.shape[2]), asking[rows].clamp(max=length - 1)
            exact[rows, :, :length] = exact_pairs(q[rows, :length], k[rows, :length], mine, layout)
    return torch.take_along_dim(exact.unflatten(0, (batch, heads)), place[:, None, None], 3)


def missing_gain(module: AstrocyteAttention, call: AttentionCall, queries: Tensor) -> Tensor:
    """log of sum exp(q.k) over the keys that are read through phi, minus log of sum phi(q).phi(k) [B, H, S].

    NaN where there is no such key.
    """
    real: Tensor | None = call.options.get("key_mask")
    exact, sums = _is_exact(module, call, queries), []
    for logits in (
        _exact_logits(call, queries),
        log_products(learned_layer(module), take(call.query, queries), call.key, call.scale, real),
    ):
        lowest = torch.finfo(logits.dtype).min
        logits = _hide(logits, call, queries)
        logits = logits if exact is None else logits.masked_fill(exact, lowest)
        sums.append(logits.logsumexp(-1).masked_fill((logits == lowest).all(-1), torch.nan))
    return sums[0] - sums[1]


def spread_queries(call: AttentionCall) -> Tensor:
    """Places [B, S] of `QUERIES` real tokens spread evenly over each sequence, the same wherever its padding is."""
    number = call.real_queries().cumsum(1)
    share = (torch.arange(QUERIES, device=number.device) + 0.5) / QUERIES
    return torch.searchsorted(number, (share * number[:, -1:]).long() + 1).clamp(max=number.shape[1] - 1)


def _hide(logits: Tensor, call: AttentionCall, queries: Tensor | None) -> Tensor:
    """Without the keys that a query does not see."""
    real, (many, keys) = call.options.get("key_mask"), (call.query.shape[2], call.key.shape[2])
    lowest = torch.finfo(logits.dtype).min  # not -inf: a sequence of nothing but padding would have gradients of NaN
    if real is not None:
        logits = logits.masked_fill(~real[:, None, None], lowest)
    causal, window = call.options.get("causal"), call.options.get("window")
    if causal or window is not None:
        seen = torch.ones(1, 1, many, keys, dtype=torch.bool, device=logits.device)
        reach = keys if window is None else window
        seen = seen.tril(keys - many + (0 if causal else reach)).triu(keys - many - reach)
        logits = logits.masked_fill(~take(seen, queries), lowest)
    return logits
