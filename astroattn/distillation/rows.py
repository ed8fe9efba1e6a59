"""The rows of attention that transfer compares: what each query takes of each key [B, H, Nq, Nk], a sink left out.

`queries` are places [B, S] among the queries of each sequence; None stands for all of them.
"""

from __future__ import annotations

from math import log, sqrt

import torch
from torch import Tensor

from astroattn.attention import AstrocyteAttention
from astroattn.config import is_tiled
from astroattn.cost import covers, prefix_length
from astroattn.fidelity.calls import AttentionCall
from astroattn.hidden import LearnedHidden
from astroattn.patching.record import unwrapped

LEAST_SHARE = 1e-6  # of attention, below which a share counts as this much


def softmax_rows(call: AttentionCall, queries: Tensor | None = None) -> Tensor:
    """Softmax attention; of queries that see no key, any numbers."""
    return _hide(_exact_logits(call, queries), call, queries).softmax(-1)


def log_rows(module: AstrocyteAttention, call: AttentionCall, queries: Tensor | None = None) -> Tensor:
    """The logarithm of the module's attention, at least that of `LEAST_SHARE`."""
    if is_row_by_row(module, call):
        return _hide(_far_logits(module, call, queries), call, queries).log_softmax(-1).clamp(min=log(LEAST_SHARE))
    batch, heads, keys, _ = call.key.shape
    identity = torch.eye(keys, dtype=call.key.dtype, device=call.key.device).expand(batch, heads, -1, -1)
    rows = take(module(call.query, call.key, identity, **call.options | {"sink": None}), queries)
    return rows.clamp(min=LEAST_SHARE).log()


def log_processes(hidden: LearnedHidden, call: AttentionCall, queries: Tensor) -> tuple[Tensor, Tensor]:
    """log p [B, H, S] of softmax attention, and of the hidden layer alone."""
    softmax = _exact_logits(call, queries)
    learned = log_products(hidden, take(call.query, queries), call.key, call.scale, call.options.get("key_mask"))
    both = [_hide(logits, call, queries).logsumexp(-1) for logits in (softmax, learned)]
    return both[0], both[1]


def is_row_by_row(module: AstrocyteAttention, call: AttentionCall) -> bool:
    """Whether the row of a query can be had alone: without tiles, whose queries choose keys together."""
    keys, grid = call.key.shape[2], call.options.get("grid")
    if call.options.get("window") is not None:  # which is exact
        return False
    return all(not is_tiled(config) and not covers(config, keys, grid) for config in module.configs)


def learned_layer(module: AstrocyteAttention) -> LearnedHidden:
    """The learned hidden layer of a module, or the copy of it that an adapter of peft trains."""
    hidden: LearnedHidden = unwrapped(module.hidden)
    return hidden


def take(x: Tensor, queries: Tensor | None) -> Tensor:
    """Those of x [B, H, Nq, D]."""
    return x if queries is None else torch.take_along_dim(x, queries[:, None, :, None], 2)


def _exact_logits(call: AttentionCall, queries: Tensor | None) -> Tensor:
    return take(call.query, queries) @ call.key.mT * call.scale


def log_products(
    hidden: LearnedHidden, query: Tensor, key: Tensor, scale: float = 1.0, real: Tensor | None = None
) -> Tensor:
    """log phi(q).phi(k) [B, H, Nq, Nk], phi(q) = exp(W_q q sqrt(scale)) / sqrt(m); of `real` keys [B, Nk] alone."""
    reading = query @ hidden.query_weight.mT.to(query.dtype) * sqrt(scale)
    writing = key @ hidden.key_weight.mT.to(key.dtype) * sqrt(scale)
    if real is not None:
        writing = writing.masked_fill(~real[:, None, :, None], torch.finfo(writing.dtype).min)
    top = writing.detach().amax(2, keepdim=True)
    reading = reading + top
    best = reading.detach().amax(-1, keepdim=True)
    shares = (reading - best).exp() @ (writing - top).exp().mT / writing.shape[-1]
    return shares.clamp(min=torch.finfo(shares.dtype).tiny).log() + best


def _far_logits(module: AstrocyteAttention, call: AttentionCall, queries: Tensor | None) -> Tensor:
    """log phi(q).phi(k), but q.k where query or key is one of the exact queries, the first real tokens."""
    keys = call.key.shape[2]
    real: Tensor | None = call.options.get("key_mask")
    logits = log_products(learned_layer(module), take(call.query, queries), call.key, call.scale, real)
    prefix = prefix_length(module.configs[0], keys, None)
    if not prefix:
        return logits
    places = torch.arange(1, keys + 1, device=logits.device)[None] if real is None else real.cumsum(1) * real
    first = ((places > 0) & (places <= prefix)).expand(len(logits), -1)
    asks = first if queries is None else first.gather(1, queries)
    return torch.where(first[:, None, None] | asks[:, None, :, None], _exact_logits(call, queries), logits)


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
