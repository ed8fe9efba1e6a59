"""How heads of one config answer a checked call: by softmax, through clusters, a static layer or a streaming memory.

Each function returns the output [B, H, Nq, Dv] and log p [B, H, Nq], the logarithm of what divides it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from astroattn.config import AstroConfig, is_tiled
from astroattn.cost import budget_of, prefix_length
from astroattn.hidden import LearnedHidden, RandomHidden
from astroattn.ops.causal import CausalState
from astroattn.ops.features import POSITIVE
from astroattn.ops.layout import plain
from astroattn.ops.library import (
    causal_attention,
    decode,
    in_graph,
    linear_attention,
    near_far_attention,
    near_linear_attention,
    stream,
)
from astroattn.ops.padding import in_order, put_back, sort_tokens, zero_padding
from astroattn.ops.precision import without_autocast
from astroattn.ops.streaming import Memories, each_of, empty_memory, soft_capped, together
from astroattn.ops.window import log_sum

StaticLayer = RandomHidden | LearnedHidden


@dataclass(eq=False)
class Call:
    """What `AstrocyteAttention.forward` was given, checked; the scale is a number.

    No named tuple, and nothing of `dataclasses` that looks at fields: PyTorch 2.8 compiles neither.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    causal: bool
    scale: float
    grid: tuple[int, int] | None
    soft_cap: float | None = None
    bias: Tensor | None = None
    cross: bool = False

    @property
    def crossing(self) -> int | None:
        """The number of queries, where they are those of another sequence than the keys."""
        return plain(self.query.shape[2]) if self.cross else None

    @property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        return self.query, self.key, self.value

    def of(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Call:
        """The same call of other tokens, without its bias."""
        more = {"soft_cap": self.soft_cap, "cross": self.cross}
        return Call(query, key, value, key_mask, self.causal, self.scale, self.grid, **more)  # type: ignore[arg-type]

    def ordered(self, order: Tensor, key_mask: Tensor | None) -> Call:
        """The keys in an order [B, N], and the queries unless they are of another sequence; its mask is this one."""
        query, key, value = (x if x is self.query and self.cross else in_order(x, order) for x in self.tokens)
        call = self.of(query, key, value, key_mask)
        if self.bias is not None:  # of every sequence its own from now on
            bias = in_order(self.bias.expand(order.shape[0], -1, -1, -1).mT, order).mT
            call.bias = bias if self.cross else in_order(bias, order)
        return call

    def of_heads(self, heads: Tensor) -> Call:
        """These heads alone."""
        query, key, value = (x.index_select(1, heads) for x in self.tokens)
        call = self.of(query, key, value, self.key_mask)
        if self.bias is not None:
            call.bias = self.bias if self.bias.shape[1] == 1 else self.bias.index_select(1, heads)
        return call


def softmax_attention(call: Call, with_log_p: bool) -> tuple[Tensor, Tensor]:
    """Softmax attention by SDPA; log p only where it is asked for (else empty)."""
    query, key, value = call.tokens
    key_mask, causal, scale = call.key_mask, call.causal, call.scale
    num_queries, num_keys = query.shape[2], key.shape[2]
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    mask = None if key_mask is None else key_mask[:, None, None]
    beside = mask is not None or call.soft_cap is not None or call.bias is not None
    if causal and (beside or num_queries != num_keys):
        seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=key.device).tril(num_keys - num_queries)
        mask = seen if mask is None else mask & seen
    if call.soft_cap is not None:
        return _capped_softmax(call.of(query, key, value, key_mask), mask)
    added = mask
    if call.bias is not None:
        added = call.bias.to(query.dtype)
        added = added if mask is None else added.masked_fill(~mask, torch.finfo(query.dtype).min)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=added, is_causal=causal and added is None, scale=scale
    )
    if key_mask is not None:
        out = out.masked_fill(~key_mask.any(1)[:, None, None, None], 0)
    if not with_log_p:
        return out, query.new_empty(0)
    work = torch.promote_types(query.dtype, torch.float32)
    logits = query.to(work) @ key.to(work).mT * scale
    if causal and mask is None:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=key.device).tril()
    if call.bias is not None:  # finite, so that a query whose bias is -inf throughout has no gradient of NaN
        logits = logits + call.bias.to(work).clamp(min=torch.finfo(work).min)
    return out, logits.logsumexp(-1) if mask is None else log_sum(logits, mask)


def _capped_softmax(call: Call, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax of c tanh(q.k / c); zeros where a query sees no key."""
    work = torch.promote_types(call.query.dtype, torch.float32)
    query, key, value = (x.to(work) for x in call.tokens)
    if mask is None:
        mask = torch.ones(1, key.shape[2], dtype=torch.bool, device=key.device)
    with without_autocast(query.device):
        logits = soft_capped(query @ key.mT * call.scale, call.soft_cap)
        blind = ~mask.any(-1, keepdim=True)
        shares = logits.masked_fill(~(mask | blind), -torch.inf).softmax(-1).masked_fill(blind, 0)
        return (shares @ value).to(call.query.dtype), log_sum(logits, mask)


def bidirectional_attention(config: AstroConfig, hidden: StaticLayer | None, call: Call) -> tuple[Tensor, Tensor]:
    """Exact keys, and all others through clusters (`hidden` None) or a static layer."""
    key_mask, scale = call.key_mask, call.scale
    num_keys = plain(call.key.shape[2])
    prefix = prefix_length(config, num_keys, call.grid)
    if hidden is not None and not is_tiled(config) and not prefix:
        out, log_p = _through_hidden(config, hidden, call)
        if key_mask is None or call.cross:
            return out, log_p
        return zero_padding(out, log_p, key_mask)
    order = lengths = None
    if key_mask is not None:
        # Real tokens first: a sequence is then the same wherever its padding was.
        order, lengths = sort_tokens(~key_mask)[0], key_mask.sum(1)
        if call.bias is None or not _is_in_order(order):  # which would copy the bias
            call = call.ordered(order, key_mask)
    budget = budget_of(config, num_keys, call.grid, call.cross)
    if hidden is not None and not is_tiled(config) and hidden.activation in POSITIVE:
        out, log_p = _beside_prefix(config, hidden, call, prefix, lengths)
    elif hidden is not None:
        query, key, weight, phase = hidden(call.query, call.key, scale)
        out, log_p = near_linear_attention(
            *(query, key, call.value, weight, phase, budget),
            activation=hidden.activation,
            scale=scale,
            lengths=lengths,
            backend=config.backend,
        )
    else:
        out, log_p = near_far_attention(
            *call.tokens, budget, scale=scale, bias=call.bias, lengths=lengths, backend=config.backend
        )
    return (out, log_p) if order is None or call.cross else put_back(order, out, log_p)


def _is_in_order(order: Tensor) -> bool:
    """Whether tokens stand as the order has them, as far as that can be asked: not of fake ones, nor for a graph."""
    if in_graph() or type(order) is not Tensor:
        return False
    return bool((order == torch.arange(order.shape[1], device=order.device)).all())


def causal_static_attention(config: AstroConfig, hidden: StaticLayer, call: Call) -> tuple[Tensor, Tensor]:
    """The latest tokens exactly, all earlier ones through a static layer."""
    query, key, weight, phase = hidden(call.query, call.key, call.scale)
    num_queries, num_keys = query.shape[2], key.shape[2]
    if num_queries < num_keys:
        # The queries are the last tokens, so stand-ins take the place of the earlier ones.
        query = F.pad(query, (0, 0, num_keys - num_queries, 0))
    call, order = _padding_first(call.of(query, key, call.value, call.key_mask))
    out, log_p = causal_attention(
        *(*call.tokens, weight, phase),
        activation=hidden.activation,
        near=config.near,
        scale=call.scale,
        key_mask=call.key_mask,
        backend=config.backend,
    )
    if order is not None and call.key_mask is not None:
        out, log_p = put_back(order, *zero_padding(out, log_p, call.key_mask))
    if num_queries < num_keys:
        out, log_p = out[:, :, -num_queries:], log_p[:, :, -num_queries:]
    return out, log_p


def decode_static(
    config: AstroConfig, hidden: StaticLayer, call: Call, weights: tuple[Tensor, Tensor], state: CausalState | None
) -> tuple[Tensor, CausalState]:
    """The output for the next tokens, whose queries and keys are the hidden layer's, and the state behind them."""
    call, order = _padding_first(call)
    out, state = decode(
        *(*call.tokens, *weights),
        activation=hidden.activation,
        near=config.near,
        scale=call.scale,
        key_mask=call.key_mask,
        state=state,
        backend=config.backend,
    )
    if order is not None and call.key_mask is not None:
        out = in_order(out.masked_fill(~call.key_mask[:, None, :, None], 0), order.argsort(dim=1))
    return out, state


def stream_attention(
    budgets: tuple[tuple[AstroConfig, int], ...],
    places: list[Tensor] | None,
    call: Call,
    memories: Memories | None,
) -> tuple[Tensor, Tensor, Memories]:
    """Streaming memories, and what they are behind these tokens.

    Args:
        budgets: the configs, and how many query heads have each.
        places: two tensors, the heads in the order of the budgets and the place of each there; None for one budget.
    """
    dtype, groups = call.query.dtype, call.query.shape[1] // call.key.shape[1]
    work = torch.promote_types(dtype, torch.float32)
    order = lengths = None
    call = call.of(call.query.to(work) * call.scale, call.key.to(work), call.value.to(work), call.key_mask)
    if call.key_mask is not None and not bool(call.key_mask.all()):
        order, lengths = sort_tokens(~call.key_mask)[0], call.key_mask.sum(1).cpu()
        call = call.ordered(order, call.key_mask)
    query, key, value = call.tokens
    if places is not None:
        query = query.index_select(1, places[0])
        key, value = (x.index_select(1, places[0][::groups] // groups) for x in (key, value))
    query = query.unflatten(1, (-1, groups))
    outs, logs, after, first = [], [], [], 0
    for number, (config, count) in enumerate(budgets):
        mine = slice(first, first := first + count // groups)
        q, k, v = query[:, mine], key[:, mine], value[:, mine]
        memory = empty_memory(q, k, v) if memories is None else each_of(memories)[number]
        out, log_p, memory = stream(
            *(q, k, v, memory, config.entries, config.near, lengths, call.soft_cap), backend=config.backend
        )
        out, log_p = out.flatten(1, 2), log_p.flatten(1, 2)
        outs.append(out)
        logs.append(log_p)
        after.append(memory)
    if places is not None:
        out, log_p = (torch.cat(parts, 1).index_select(1, places[1]) for parts in (outs, logs))
    if order is not None:
        out, log_p = put_back(order, out, log_p)
    return out.to(dtype), log_p, together(after)


def _padding_first(call: Call) -> tuple[Call, Tensor | None]:
    """A near field then holds the same tokens wherever the padding was."""
    if call.key_mask is None:
        return call, None
    order, key_mask = sort_tokens(call.key_mask)
    return call.ordered(order, key_mask), order


def _through_hidden(config: AstroConfig, hidden: StaticLayer, call: Call) -> tuple[Tensor, Tensor]:
    """All keys through a static hidden layer."""
    query, key, weight, phase = hidden(call.query, call.key, call.scale)
    return linear_attention(
        *(query, key, call.value, weight, phase),
        activation=hidden.activation,
        scale=call.scale,
        key_mask=call.key_mask,
        backend=config.backend,
    )


def _beside_prefix(
    config: AstroConfig, hidden: StaticLayer, call: Call, prefix: int, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Exact queries and a static hidden layer alone; the real tokens come first."""
    query, key, value = call.tokens
    real = None if lengths is None else torch.arange(key.shape[2], device=key.device) < lengths[:, None]
    first = softmax_attention(call.of(query[:, :, :prefix], key, value, real), True)
    body = query[:, :, prefix:]
    behind = call.of(body, key[:, :, prefix:], value[:, :, prefix:], None if real is None else real[:, prefix:])
    far, log_far = _through_hidden(config, hidden, behind)
    work = log_far.dtype
    lowest = torch.finfo(work).min  # not -inf: a sequence of nothing but padding would have gradients of NaN
    with without_autocast(query.device):
        logits = body.to(work) @ key[:, :, :prefix].to(work).mT * call.scale
        if real is not None:
            logits = logits.masked_fill(~real[:, None, None, :prefix], lowest)
        logits = torch.cat([logits, log_far.clamp(min=lowest)[..., None]], -1)
        shares = logits.softmax(-1)
        out = shares[..., :prefix] @ value[:, :, :prefix].to(work) + shares[..., prefix:] * far.to(work)
    out, log_p = torch.cat([first[0], out.to(query.dtype)], 2), torch.cat([first[1], logits.logsumexp(-1)], 2)
    return (out, log_p) if real is None else zero_padding(out, log_p, real)
