"""`AstrocyteAttention`: the module that stands where softmax attention stood, on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from astroattn.answers import (
    Call,
    bidirectional_attention,
    causal_static_attention,
    decode_static,
    softmax_attention,
    stream_attention,
)
from astroattn.checks import (
    BIAS,
    BIAS_BESIDE,
    BIAS_CAUSAL,
    CROSS,
    CROSS_CAUSAL,
    CROSS_IN_WINDOW,
    SOFT_CAP,
    SOFT_CAP_IN_WINDOW,
    check_call,
    check_grid,
    check_memories,
    check_size,
    check_state,
    check_window,
    is_cross,
    reads_any_queries,
)
from astroattn.config import MIXABLE, AstroConfig, check_heads
from astroattn.cost import Cost, count_cost, count_window, covers
from astroattn.hidden import STATIC, Constants
from astroattn.ops.causal import CausalState
from astroattn.ops.layout import plain
from astroattn.ops.precision import autocast
from astroattn.ops.streaming import Memories
from astroattn.ops.window import window_attention


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
        soft_cap: float | None = None,
        bias: Tensor | None = None,
        cross: bool | None = None,
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
            cross: whether the queries are those of another sequence than the keys (cross attention); None: where
                Nq and Nk differ and it is not causal. It has no near field and no exact queries, key_mask hides keys
                alone, and below 128 queries or keys the Hebbian layer is softmax attention, which costs no more then.
                Queries that ask for the same share a tile, so the answer to one depends a little on which others
                there are.
            scale: multiplies q.k; None is D^-0.5.
            grid: (rows, columns) of a ViT's patches, the last rows * columns tokens; the others come before them.
            window: a query sees no key more than so many tokens away. The near field is then this window, whatever the
                config says, and there is nothing beyond it: softmax within the window, in linear time.
            sink: [H], floating-point. The logit of one more key of each head, whose value is zero: p has exp(sink)
                more. Where the attention is softmax it then takes N x N memory.
            soft_cap: c tanh(x / c) stands in the place of every logit x = scale q.k. Of streaming memories, and of
                what is softmax attention, then of N x N memory.
            bias: [1 or B, 1 or H, Nq, Nk], floating-point, added to scale q.k (relative positions, for example); finite
                for real tokens, as what is hidden belongs into key_mask. Of the Hebbian layer, which reads it where
                keys are exact and by its mean over a tile elsewhere, and of what is softmax attention.

        Returns:
            [B, H, Nq, Dv], in the dtype of the query (autocast's under it). Differentiable in query, key and value.
            Of the Hebbian layer the choices (which keys are exact, which cluster a key belongs to) and what a key
            weighs in its cluster's mean are constant in the backward pass, which leaves out some per cent of the
            gradient (`ops.choosing.Choice`). NaN and infinity come out as NaN or infinity.

        Raises:
            TypeError, ValueError: shapes, dtypes or values that do not fit, naming the argument; a combination that
                `refusal` names; learned weights that are on the meta device.
        """
        call = (key_mask, causal, scale, grid, window, sink, soft_cap, bias, cross)
        return self._attend(query, key, value, *call, with_normaliser=False)[0]

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
        soft_cap: float | None = None,
        bias: Tensor | None = None,
        cross: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The output, and log p [B, H, Nq], the logarithm of what divides it (the astrocyte's calcium response).

        Arguments and errors as in `forward`; slower, and of N x N memory where the attention is softmax.
        """
        call = (key_mask, causal, scale, grid, window, sink, soft_cap, bias, cross)
        return self._attend(query, key, value, *call, with_normaliser=True)

    def decode(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: CausalState | Memories | None = None,
        *,
        key_mask: Tensor | None = None,
        scale: float | None = None,
        soft_cap: float | None = None,
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
            scale, soft_cap: as in `forward`.

        Returns:
            The output [B, H, N, Dv] and the state for the next call (of float32 at least). Streaming memories whose
            numbers of entries differ come as a tuple, one for each of `budgets`.

        Raises:
            TypeError, ValueError: as in `forward`; queries and keys of different lengths; a state that does not fit.
        """
        query, key, value = autocast(query, key, value)
        reason = "it is set to exact" if self.exact else self.refusal(causal=True, soft_cap=soft_cap)
        if reason is None and self.hidden is None and not self.shares_keys:
            reason = "it is softmax attention"
        if reason is not None:
            raise ValueError(f"decode: this module has no causal state; {reason}")
        check_call(self, query, key, value, key_mask, True, scale, None, soft_cap=soft_cap)
        if query.shape[2] != key.shape[2]:
            raise ValueError(f"query: {query.shape[2]} tokens; key has {key.shape[2]}")
        scale = self.head_dim**-0.5 if scale is None else float(scale)
        if self.shares_keys:
            memories = check_memories(self, state, query, key, value)
            out, _, after = self._stream(Call(query, key, value, key_mask, True, scale, None, soft_cap), memories)
            return out, after
        assert self.hidden is not None
        query, key, weight, phase = self.hidden(query, key, scale)
        before = check_state(self, state, query, value)
        call = Call(query, key, value, key_mask, True, scale, None)
        return decode_static(self.configs[0], self.hidden, call, (weight, phase), before)

    def refusal(
        self,
        *,
        causal: bool,
        num_queries: int | None = None,
        num_keys: int | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
        bias: bool = False,
        cross: bool | None = None,
        grid: tuple[int, int] | None = None,
    ) -> str | None:
        """Why this module cannot serve such attention, at every length or at that one, or None."""
        crossing = num_queries if is_cross(num_queries, num_keys, causal, cross) else None
        if cross and causal:
            return CROSS_CAUSAL
        if crossing is not None and (window is not None or grid is not None):
            return CROSS_IN_WINDOW
        if bias and (window is not None or soft_cap is not None):
            return BIAS_BESIDE
        if bias and not self.exact:
            asked = num_keys or 0
            far = [each for each in self.configs if not (asked and covers(each, asked, None, crossing))]
            if far and causal:
                return BIAS_CAUSAL
            if any(each.hidden not in MIXABLE for each in far):
                return BIAS
        if soft_cap is not None and window is not None:
            return SOFT_CAP_IN_WINDOW
        if soft_cap is not None and not self.exact and not self.shares_keys:
            asked = num_keys or 0
            exact = (asked and covers(config, asked, None, crossing) for config in self.configs)
            if not all(one or config.hidden == "exact" for one, config in zip(exact, self.configs, strict=True)):
                return SOFT_CAP
        if window is not None:
            return None
        if num_keys is not None and self.exact:
            return None
        if self.shares_keys:
            if not causal:
                return "a streaming memory (hidden='streaming') is for causal attention"
            fits = num_queries == num_keys or all(covers(config, num_keys or 0, None) for config, _ in self.budgets)
            return None if fits else "a streaming memory reads each token when it comes: as many queries as keys"
        if not causal:
            if not (cross or crossing is not None) or all(reads_any_queries(config) for config, _ in self.budgets):
                return None
            return CROSS
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
        cross: bool | None = None,
        exact_keys: Mapping[AstroConfig, float] | None = None,
    ) -> Cost:
        """Positions and products per query, the mean of the heads, counted from their configs for such a sequence.

        Args:
            exact_keys: by config, how many keys a sub-tile reads exactly in the mean, where that is left to the inputs
                (`AstroConfig.key_error`); without it the most that there can be. `astroattn compare` measures it.

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
        cross = is_cross(num_queries, num_keys, causal, cross)
        for config, heads in self.budgets:
            exact = None if exact_keys is None else exact_keys.get(config)
            cost = count_cost(config, self.head_dim, num_queries, num_keys, causal, grid, cross, exact)
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
        soft_cap: float | None,
        bias: Tensor | None,
        cross: bool | None,
        *,
        with_normaliser: bool,
    ) -> tuple[Tensor, Tensor]:
        query, key, value = autocast(query, key, value)
        check_call(self, query, key, value, key_mask, causal, scale, grid, window, sink, soft_cap, bias, cross)
        scale = self.head_dim**-0.5 if scale is None else float(scale)
        cross = is_cross(query.shape[2], key.shape[2], causal, cross)
        call = Call(query, key, value, key_mask, causal, scale, grid, soft_cap, bias, cross)
        if sink is None:
            return self._answer(call, window, with_normaliser)
        out, log_p = self._answer(call, window, True)
        sink = sink[:, None].to(log_p)
        return out * (log_p - sink).sigmoid()[..., None].to(out.dtype), torch.logaddexp(log_p, sink)

    def _answer(self, call: Call, window: int | None, with_normaliser: bool) -> tuple[Tensor, Tensor]:
        """Attend without a sink."""
        query, key, value = call.tokens
        if query.shape[0] == 0 or query.shape[2] == 0:
            return query.new_zeros(*query.shape[:3], value.shape[-1]), query.new_zeros(query.shape[:3])
        if window is not None:
            out, log_p = window_attention(
                *(query, key, value, window),
                causal=call.causal,
                scale=call.scale,
                key_mask=call.key_mask,
                with_normaliser=with_normaliser,
            )
            return self.with_gradients(out), log_p
        if self.exact:
            return softmax_attention(call, with_normaliser)
        if self.shares_keys and not all(covers(config, key.shape[2], None) for config, _ in self.budgets):
            return self._stream(call, None)[:2]
        if len(self.budgets) == 1 or self.shares_keys:
            return self._answer_alike(self.configs[0], call, with_normaliser)
        order, place = self.heads.on(query.device)
        parts = []
        first = 0
        for config, count in self.budgets:
            parts.append(self._answer_alike(config, call.of_heads(order[first : first + count]), with_normaliser))
            first += count
        out = torch.cat([part[0] for part in parts], 1).index_select(1, place)
        if not with_normaliser:
            return out, query.new_empty(0)
        return out, torch.cat([part[1] for part in parts], 1).index_select(1, place)

    def _answer_alike(self, config: AstroConfig, call: Call, with_normaliser: bool) -> tuple[Tensor, Tensor]:
        """Attend with heads of one config."""
        if covers(config, plain(call.key.shape[2]), call.grid, call.crossing):
            out, log_p = softmax_attention(call, with_normaliser)
            return self.with_gradients(out), log_p
        if not call.causal:
            return bidirectional_attention(config, self.hidden, call)
        assert self.hidden is not None
        return causal_static_attention(config, self.hidden, call)

    def _stream(self, call: Call, memories: Memories | None) -> tuple[Tensor, Tensor, Memories]:
        places = self.heads.on(call.query.device) if len(self.budgets) > 1 else None
        return stream_attention(self.budgets, places, call, memories)


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
