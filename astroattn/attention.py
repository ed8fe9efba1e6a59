"""`AstrocyteAttention`: the module that stands where softmax attention stood, on queries, keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from astroattn.checks import (
    NEEDS_SELF_ATTENTION,
    NEEDS_SELF_ATTENTION_IN_WINDOW,
    check_call,
    check_grid,
    check_memories,
    check_size,
    check_state,
    check_window,
    reads_any_queries,
)
from astroattn.config import AstroConfig, check_heads, is_tiled
from astroattn.cost import Cost, budget_of, count_cost, count_window, covers, prefix_length
from astroattn.hidden import STATIC, Constants
from astroattn.ops.causal import CausalState
from astroattn.ops.features import POSITIVE
from astroattn.ops.layout import plain
from astroattn.ops.library import (
    causal_attention,
    decode,
    linear_attention,
    near_far_attention,
    near_linear_attention,
    stream,
)
from astroattn.ops.streaming import Memories, each_of, empty_memory, together
from astroattn.ops.window import log_sum, window_attention


class AstrocyteAttention(nn.Module):
    """Attention as a neuron-astrocyte network: exact near field and exact keys, all else through a hidden layer.

    For each query q (queries and keys times sqrt(scale)), with E its exact keys:

        o = (sum_{i in E} exp(q.k_i) v_i + far(q)) / p,   p = sum_{i in E} exp(q.k_i) + the same of far

    where far reads all other keys through m hidden neurons: phi(q).sum_i phi(k_i) v_i for the random layer (the
    paper's H phi(q), divided by its astrocyte process p = g.phi(q)), and the clusters' sums of `ops.near_far` for the
    Hebbian one. Near and far partition the keys exactly. Where near field and exact keys hold every key it is softmax
    attention, computed by `scaled_dot_product_attention`.

    Source: Kozachkov, Kastanenka & Krotov, PNAS 2023; the near field, the exact keys and the Hebbian layer are ours.

    Args:
        num_heads: H. head_dim: D.
        config: what to do; the default keeps pretrained models working. A sequence has one config per head; heads that
            differ must have no weights of their own (hidden="hebbian", "none" or "exact"), or all be "streaming", those
            alike that read the same key head.

    Attributes:
        configs: one config per head.
        config: the config that all heads have, or `configs` where they differ.
        budgets: the distinct configs and how many heads have each.
        exact: while True, forward is plain softmax attention (to compare with).

    Raises:
        TypeError, ValueError: sizes that are not positive integers; configs that are none, not as many as heads, or
            that cannot stand side by side.
    """

    def __init__(
        self, num_heads: int, head_dim: int, config: AstroConfig | Sequence[AstroConfig] | None = None
    ) -> None:
        super().__init__()
        check_size("num_heads", num_heads)
        check_size("head_dim", head_dim)
        config = AstroConfig() if config is None else config
        if isinstance(config, AstroConfig):
            config = (config,) * num_heads
        if not isinstance(config, Sequence):
            raise TypeError(f"config: {type(config).__name__}; expected AstroConfig or one per head")
        self.configs = check_heads(config)
        if len(self.configs) != num_heads:
            raise ValueError(f"config: {len(self.configs)} of them; this module has num_heads={num_heads}")
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.exact = False
        heads: dict[AstroConfig, list[int]] = {}
        for head, each in enumerate(self.configs):
            heads.setdefault(each, []).append(head)
        self.budgets = tuple((each, len(mine)) for each, mine in heads.items())  # heads of one config run together
        if len(self.budgets) > 1:
            order = torch.tensor([head for mine in heads.values() for head in mine], device="cpu")
            self.heads = Constants(order=order, place=order.argsort())
        first = self.configs[0]
        layer = STATIC.get(first.hidden)
        self.hidden = None if layer is None else layer(num_heads, head_dim, first)

    @property
    def config(self) -> AstroConfig | tuple[AstroConfig, ...]:
        """The config that all heads have, or one per head where they differ."""
        return self.configs if len(self.budgets) > 1 else self.configs[0]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_mask: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
        grid: tuple[int, int] | None = None,
        window: int | None = None,
        sink: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [B, H, Nq, D], float32, float64, bfloat16 or float16, as key and value; under autocast all three are
                taken in its dtype, as by `scaled_dot_product_attention`.
            key: [B, H, Nk, D].
            value: [B, H, Nk, Dv].
            key_mask: [B, Nk] bool, True = a real token. Padding does not move the results of real tokens. Sequences
                without a real token give zeros, and so do queries that are padding, except in softmax attention.
            causal: a query sees no later key; with Nq < Nk the queries are the last tokens.
            scale: multiplies q.k; None is D^-0.5.
            grid: (rows, columns) of a ViT's patches, the last rows * columns tokens; the others come before them.
            window: a query sees no key more than so many tokens away. The near field is then this window, whatever the
                config says, and there is nothing beyond it: softmax within the window, in linear time.
            sink: [H], floating-point. The logit of one more key of each head, whose value is zero: p has exp(sink)
                more. Where the attention is softmax it then takes N x N memory.

        Returns:
            [B, H, Nq, Dv], in the dtype of the query (autocast's under it). Differentiable in query, key and value.
            Of the Hebbian layer the choices (which keys are exact, which cluster a key belongs to) and what a key
            weighs in its cluster's mean are constant in the backward pass, which leaves out some per cent of the
            gradient (`ops.near_far.Choice`). NaN and infinity come out as NaN or infinity.

        Raises:
            TypeError, ValueError: shapes, dtypes or values that do not fit, naming the argument; a combination that
                `refusal` names; learned weights that are on the meta device.
        """
        return self._attend(query, key, value, key_mask, causal, scale, grid, window, sink, False)[0]

    @property
    def shares_keys(self) -> bool:
        """Whether several query heads may read the same key head: a streaming memory belongs to a key head."""
        return self.configs[0].hidden == "streaming"

    def with_normaliser(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_mask: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
        grid: tuple[int, int] | None = None,
        window: int | None = None,
        sink: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The output, and log p [B, H, Nq], the logarithm of what divides it (the astrocyte's calcium response).

        Arguments and errors as in `forward`; slower, and of N x N memory where the attention is softmax.
        """
        return self._attend(query, key, value, key_mask, causal, scale, grid, window, sink, True)

    def decode(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: CausalState | Memories | None = None,
        *,
        key_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, CausalState | Memories]:
        """Causal attention of the next tokens: to themselves, and to all earlier ones through a state of fixed size.

        Whatever the tokens are cut into, the outputs are those of `forward(causal=True)` over all of them; but where
        padding comes between real tokens of different calls, it takes places in the near field of a static layer. A
        streaming memory knows no padding.

        Args:
            query: the new tokens [B, H, N, D], one or more.
            key: theirs [B, H, N, D]; to a streaming memory keys and values may have fewer heads, each read by as many
                query heads in turn.
            value: theirs [B, H, N, Dv].
            state: what the call before has returned, which is used up by that; None: these are the first tokens.
            key_mask: as in `forward`.
            scale: as in `forward`.

        Returns:
            The output [B, H, N, Dv] and the state for the next call (of float32 at least). Streaming memories whose
            numbers of entries differ come as a tuple, one for each of `budgets`.

        Raises:
            TypeError, ValueError: as in `forward`; queries and keys of different lengths; a state that does not fit.
        """
        query, key, value = autocast(query, key, value)
        reason = "it is set to exact" if self.exact else self.refusal(causal=True)
        if reason is None and self.hidden is None and not self.shares_keys:
            reason = "it is softmax attention"
        if reason is not None:
            raise ValueError(f"decode: this module has no causal state; {reason}")
        check_call(self, query, key, value, key_mask, True, scale, None)
        if query.shape[2] != key.shape[2]:
            raise ValueError(f"query: {query.shape[2]} tokens; key has {key.shape[2]}")
        scale = self.head_dim**-0.5 if scale is None else float(scale)
        if self.shares_keys:
            memories = check_memories(self, state, query, key, value)
            out, _, after = self._stream(query, key, value, key_mask, scale, memories)
            return out, after
        assert self.hidden is not None
        query, key, weight, phase = self.hidden(query, key, scale)
        before = check_state(self, state, query, value)
        order = None
        if key_mask is not None:
            order, key_mask = _sort(key_mask)
            query, key, value = (_in_order(x, order) for x in (query, key, value))
        out, state = decode(
            *(query, key, value, weight, phase),
            activation=self.hidden.activation,
            near=self.configs[0].near,
            scale=scale,
            key_mask=key_mask,
            state=before,
            backend=self.configs[0].backend,
        )
        if order is not None and key_mask is not None:
            out = _in_order(out.masked_fill(~key_mask[:, None, :, None], 0), order.argsort(dim=1))
        return out, state

    def refusal(
        self, *, causal: bool, num_queries: int | None = None, num_keys: int | None = None, window: int | None = None
    ) -> str | None:
        """Why this module cannot serve such attention, at every length or at that one, or None."""
        if window is not None:
            return None if causal or num_queries == num_keys else NEEDS_SELF_ATTENTION_IN_WINDOW
        if num_keys is not None and self.exact:
            return None
        if self.shares_keys:
            if not causal:
                return "a streaming memory (hidden='streaming') is for causal attention"
            fits = num_queries == num_keys or all(covers(config, num_keys or 0, None) for config, _ in self.budgets)
            return None if fits else "a streaming memory reads each token when it comes: as many queries as keys"
        if not causal:
            if num_queries == num_keys or all(reads_any_queries(config) for config, _ in self.budgets):
                return None
            return NEEDS_SELF_ATTENTION
        for config, _ in self.budgets:
            asked = num_keys is None or not covers(config, num_keys, None)
            if asked and (reason := _causal_refusal(config)) is not None:
                return reason
        return None

    def cost(
        self,
        num_queries: int,
        num_keys: int,
        *,
        causal: bool = False,
        grid: tuple[int, int] | None = None,
        window: int | None = None,
    ) -> Cost:
        """Positions and products per query, the mean of the heads, counted from their configs for such a sequence.

        Raises:
            TypeError, ValueError: numbers that are not positive integers, a grid that does not fit.
        """
        check_size("num_queries", num_queries)
        check_size("num_keys", num_keys)
        check_grid(grid, num_keys)
        check_window(window)
        if window is not None:
            return count_window(window, num_queries, num_keys, causal)
        if self.exact:
            return Cost(num_keys, 2 * num_keys, 2 * num_keys)
        positions = products = 0.0
        for config, heads in self.budgets:
            cost = count_cost(config, self.head_dim, num_queries, num_keys, causal, grid)
            positions += heads / self.num_heads * cost.positions
            products += heads / self.num_heads * cost.products
        return Cost(positions, products, 2 * num_keys)

    def with_gradients(self, out: Tensor) -> Tensor:
        """An answer that the hidden layer has no part in, from which trained hidden weights get gradients of zero.

        Without any, DistributedDataParallel would wait for them.
        """
        weights = [] if self.hidden is None or not torch.is_grad_enabled() else list(self.hidden.parameters())
        for weight in weights:
            if weight.requires_grad and weight.device == out.device:
                out = out + weight[..., :0].sum().to(out.dtype)
        return out

    def __prepare_scriptable__(self) -> AstrocyteAttention:  # `torch.jit.script` asks every module below a model
        raise TypeError(
            "torch.jit.script cannot compile an AstrocyteAttention, whose Python is more than its language; use "
            "torch.export or torch.compile, or call astroattn.unpatch(model) first"
        )

    def extra_repr(self) -> str:
        sizes = f"num_heads={self.num_heads}, head_dim={self.head_dim}"
        if len(self.budgets) == 1:
            return f"{sizes}, {self.configs[0]}"
        groups = [f"heads {[h for h, mine in enumerate(self.configs) if mine == c]}: {c}" for c, _ in self.budgets]
        return "\n".join([sizes, *groups])

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        causal: bool,
        scale: float | None,
        grid: tuple[int, int] | None,
        window: int | None,
        sink: Tensor | None,
        with_normaliser: bool,
    ) -> tuple[Tensor, Tensor]:
        query, key, value = autocast(query, key, value)
        check_call(self, query, key, value, key_mask, causal, scale, grid, window, sink)
        scale = self.head_dim**-0.5 if scale is None else float(scale)
        options = (key_mask, causal, scale, grid, window)
        if sink is None:
            return self._attend_checked(query, key, value, *options, with_normaliser)
        out, log_p = self._attend_checked(query, key, value, *options, True)
        sink = sink[:, None].to(log_p)
        return out * (log_p - sink).sigmoid()[..., None].to(out.dtype), torch.logaddexp(log_p, sink)

    def _attend_checked(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        causal: bool,
        scale: float,
        grid: tuple[int, int] | None,
        window: int | None,
        with_normaliser: bool,
    ) -> tuple[Tensor, Tensor]:
        """Attend without a sink."""
        if query.shape[0] == 0 or query.shape[2] == 0:
            return query.new_zeros(*query.shape[:3], value.shape[-1]), query.new_zeros(query.shape[:3])
        if window is not None:
            out, log_p = window_attention(
                *(query, key, value, window),
                causal=causal,
                scale=scale,
                key_mask=key_mask,
                with_normaliser=with_normaliser,
            )
            return self.with_gradients(out), log_p
        if self.exact:
            return _softmax_attention(query, key, value, key_mask, causal, scale, with_normaliser)
        options = (key_mask, causal, scale, grid, with_normaliser)
        if self.shares_keys and not all(covers(config, key.shape[2], None) for config, _ in self.budgets):
            return self._stream(query, key, value, key_mask, scale, None)[:2]
        if len(self.budgets) == 1 or self.shares_keys:
            return self._attend_alike(self.configs[0], query, key, value, *options)
        order, place = self.heads.on(query.device)
        parts = []
        first = 0
        for config, count in self.budgets:
            heads = order[first : first + count]
            first += count
            query_, key_, value_ = (x.index_select(1, heads) for x in (query, key, value))
            parts.append(self._attend_alike(config, query_, key_, value_, *options))
        out = torch.cat([part[0] for part in parts], 1).index_select(1, place)
        if not with_normaliser:
            return out, query.new_empty(0)
        return out, torch.cat([part[1] for part in parts], 1).index_select(1, place)

    def _attend_alike(
        self,
        config: AstroConfig,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        causal: bool,
        scale: float,
        grid: tuple[int, int] | None,
        with_normaliser: bool,
    ) -> tuple[Tensor, Tensor]:
        """Attend with heads of one config."""
        if covers(config, plain(key.shape[2]), grid):
            out, log_p = _softmax_attention(query, key, value, key_mask, causal, scale, with_normaliser)
            return self.with_gradients(out), log_p
        if not causal:
            return self._bidirectional(config, query, key, value, key_mask, scale, grid)
        return self._causal(config, query, key, value, key_mask, scale)

    def _stream(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        scale: float,
        memories: Memories | None,
    ) -> tuple[Tensor, Tensor, Memories]:
        dtype, groups = query.dtype, query.shape[1] // key.shape[1]
        work = torch.promote_types(dtype, torch.float32)
        query, key, value = query.to(work) * scale, key.to(work), value.to(work)
        order = lengths = None
        if key_mask is not None and not bool(key_mask.all()):
            order, lengths = _sort(~key_mask)[0], key_mask.sum(1).cpu()
            query, key, value = (_in_order(x, order) for x in (query, key, value))
        if len(self.budgets) > 1:
            heads, place = self.heads.on(query.device)
            query = query.index_select(1, heads)
            key, value = (x.index_select(1, heads[::groups] // groups) for x in (key, value))
        query = query.unflatten(1, (-1, groups))
        outs, logs, after, first = [], [], [], 0
        for number, (config, count) in enumerate(self.budgets):
            mine = slice(first, first := first + count // groups)
            q, k, v = query[:, mine], key[:, mine], value[:, mine]
            memory = empty_memory(q, k, v) if memories is None else each_of(memories)[number]
            out, log_p, memory = stream(q, k, v, memory, config.entries, config.near, lengths, backend=config.backend)
            out, log_p = out.flatten(1, 2), log_p.flatten(1, 2)
            outs.append(out)
            logs.append(log_p)
            after.append(memory)
        if len(self.budgets) > 1:
            out, log_p = (torch.cat(parts, 1).index_select(1, place) for parts in (outs, logs))
        if order is not None:
            out, log_p = _put_back(order, out, log_p)
        return out.to(dtype), log_p, together(after)

    def _causal(
        self, config: AstroConfig, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        assert self.hidden is not None
        query, key, weight, phase = self.hidden(query, key, scale)
        num_queries, num_keys = query.shape[2], key.shape[2]
        if num_queries < num_keys:
            # The queries are the last tokens, so stand-ins take the place of the earlier ones.
            query = F.pad(query, (0, 0, num_keys - num_queries, 0))
        order = None
        if key_mask is not None:
            # Padding first: a near field then holds the same tokens wherever the padding was.
            order, key_mask = _sort(key_mask)
            query, key, value = (_in_order(x, order) for x in (query, key, value))
        out, normaliser = causal_attention(
            query,
            key,
            value,
            weight,
            phase,
            activation=self.hidden.activation,
            near=config.near,
            scale=scale,
            key_mask=key_mask,
            backend=config.backend,
        )
        if order is not None and key_mask is not None:
            out, normaliser = _zero_padding(out, normaliser, key_mask)
            out, normaliser = _put_back(order, out, normaliser)
        if num_queries < num_keys:
            out, normaliser = out[:, :, -num_queries:], normaliser[:, :, -num_queries:]
        return out, normaliser

    def _bidirectional(
        self,
        config: AstroConfig,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        scale: float,
        grid: tuple[int, int] | None,
    ) -> tuple[Tensor, Tensor]:
        num_keys, backend = plain(key.shape[2]), config.backend
        prefix = prefix_length(config, num_keys, grid)
        if self.hidden is not None and not is_tiled(config) and not prefix:
            out, normaliser = self._through_hidden(query, key, value, key_mask, scale)
            if key_mask is None or query.shape[2] != num_keys:
                return out, normaliser
            return _zero_padding(out, normaliser, key_mask)
        order = lengths = None
        if key_mask is not None:
            # Real tokens first: a sequence is then the same wherever its padding was.
            order, lengths = _sort(~key_mask)[0], key_mask.sum(1)
            query, key, value = (_in_order(x, order) for x in (query, key, value))
        budget = budget_of(config, num_keys, grid)
        if self.hidden is not None and not is_tiled(config) and self.hidden.activation in POSITIVE:
            out, normaliser = self._beside_prefix(query, key, value, prefix, lengths, scale)
        elif self.hidden is not None:
            query, key, weight, phase = self.hidden(query, key, scale)
            out, normaliser = near_linear_attention(
                *(query, key, value, weight, phase, budget),
                activation=self.hidden.activation,
                scale=scale,
                lengths=lengths,
                backend=backend,
            )
        else:
            out, normaliser = near_far_attention(
                query, key, value, budget, scale=scale, lengths=lengths, backend=backend
            )
        if order is not None:
            out, normaliser = _put_back(order, out, normaliser)
        return out, normaliser

    def _through_hidden(
        self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """All keys through a static hidden layer."""
        assert self.hidden is not None
        query, key, weight, phase = self.hidden(query, key, scale)
        return linear_attention(
            *(query, key, value, weight, phase),
            activation=self.hidden.activation,
            scale=scale,
            key_mask=key_mask,
            backend=self.configs[0].backend,
        )

    def _beside_prefix(
        self, query: Tensor, key: Tensor, value: Tensor, prefix: int, lengths: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Exact queries and a static hidden layer alone; the real tokens come first."""
        real = None if lengths is None else torch.arange(key.shape[2], device=key.device) < lengths[:, None]
        first = _softmax_attention(query[:, :, :prefix], key, value, real, False, scale, True)
        body = query[:, :, prefix:]
        behind = None if real is None else real[:, prefix:]
        far, log_far = self._through_hidden(body, key[:, :, prefix:], value[:, :, prefix:], behind, scale)
        work = log_far.dtype
        lowest = torch.finfo(work).min  # not -inf: a sequence of nothing but padding would have gradients of NaN
        with torch.autocast(query.device.type, enabled=False):
            logits = body.to(work) @ key[:, :, :prefix].to(work).mT * scale
            if real is not None:
                logits = logits.masked_fill(~real[:, None, None, :prefix], lowest)
            logits = torch.cat([logits, log_far.clamp(min=lowest)[..., None]], -1)
            shares = logits.softmax(-1)
            out = shares[..., :prefix] @ value[:, :, :prefix].to(work) + shares[..., prefix:] * far.to(work)
        out, log_p = torch.cat([first[0], out.to(query.dtype)], 2), torch.cat([first[1], logits.logsumexp(-1)], 2)
        return (out, log_p) if real is None else _zero_padding(out, log_p, real)


def autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in autocast's dtype where that is on, as it does for `scaled_dot_product_attention`."""
    return [
        x.to(torch.get_autocast_dtype(x.device.type)) if isinstance(x, Tensor) and _is_autocast(x) else x
        for x in tensors
    ]


# Asked before any call, as PyTorch 2.8 cannot ask while it compiles one.
_KNOWS_AUTOCAST = {kind: torch.amp.is_autocast_available(kind) for kind in ("cpu", "cuda", "mps", "xpu")}


def _is_autocast(x: Tensor) -> bool:
    kind = x.device.type
    if kind not in _KNOWS_AUTOCAST and kind != "meta":
        _KNOWS_AUTOCAST[kind] = torch.amp.is_autocast_available(kind)
    return (
        _KNOWS_AUTOCAST.get(kind, False)
        and torch.is_autocast_enabled(kind)
        and x.is_floating_point()
        and x.dtype != torch.float64
    )


def _causal_refusal(config: AstroConfig) -> str | None:
    """Why heads of this config cannot serve causal attention at every length, or None."""
    if config.hidden == "exact":
        return None
    if config.hidden not in STATIC:
        return "causal attention needs a streaming memory or a static layer (hidden='streaming', 'random' or 'learned')"
    if config.exact_keys:
        return "causal attention cannot choose exact keys by content (exact_keys=0)"
    if config.exact_queries:
        return "causal attention has no exact queries (exact_queries=0)"
    return None


def _softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    causal: bool,
    scale: float,
    with_normaliser: bool,
) -> tuple[Tensor, Tensor]:
    """Softmax attention by SDPA; the log of the normaliser only where it is asked for (else empty)."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    mask = None if key_mask is None else key_mask[:, None, None]
    if causal and (mask is not None or num_queries != num_keys):
        seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=key.device).tril(num_keys - num_queries)
        mask = seen if mask is None else mask & seen
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal and mask is None, scale=scale
    )
    if key_mask is not None:
        out = out.masked_fill(~key_mask.any(1)[:, None, None, None], 0)
    if not with_normaliser:
        return out, query.new_empty(0)
    work = torch.promote_types(query.dtype, torch.float32)
    logits = query.to(work) @ key.to(work).mT * scale
    if causal and mask is None:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=key.device).tril()
    return out, logits.logsumexp(-1) if mask is None else log_sum(logits, mask)


def _sort(flags: Tensor) -> tuple[Tensor, Tensor]:
    """The order [B, N] that puts the tokens without a flag first and keeps all else, and the flags in that order."""
    flags, order = flags.to(torch.uint8).sort(dim=1, stable=True)
    return order, flags.bool()


def _in_order(x: Tensor, order: Tensor) -> Tensor:
    """The tokens of [B, H, N] or [B, H, N, D] in the order [B, N]."""
    index = order[:, None] if x.dim() == 3 else order[:, None, :, None]
    return x.gather(2, index.expand(-1, *x.shape[1:2], -1, *x.shape[3:]))


def _put_back(order: Tensor, out: Tensor, normaliser: Tensor) -> tuple[Tensor, Tensor]:
    """What was computed in an order [B, N], as the tokens came."""
    back = order.argsort(dim=1)
    return _in_order(out, back), _in_order(normaliser, back)


def _zero_padding(out: Tensor, normaliser: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros and -inf for queries that are padding [B, N]."""
    padding = ~real[:, None]
    return out.masked_fill(padding[..., None], 0), normaliser.masked_fill(padding, -torch.inf)
