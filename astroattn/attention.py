"""`AstrocyteAttention`: the module that stands where softmax attention stood, on queries, keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from astroattn.checks import check_call, check_grid, check_size
from astroattn.config import AstroConfig
from astroattn.cost import Cost, count_cost, covers, prefix_length
from astroattn.hidden import RandomHidden
from astroattn.ops.near_far import near_far_attention, zero_padding
from astroattn.ops.static import Hidden, causal_linear_attention, linear_attention, near_linear_attention
from astroattn.ops.tiles import Layout, real_tokens

# Most numbers in one intermediate tensor; batch and heads are taken in slices that stay below it.
WORKSPACE = 2**26


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
        num_heads: H. head_dim: D. config: what to do; the default keeps pretrained models working.

    Attributes:
        exact: while True, forward is plain softmax attention (to compare with).

    Raises:
        TypeError, ValueError: sizes that are not positive integers.
    """

    def __init__(self, num_heads: int, head_dim: int, config: AstroConfig | None = None) -> None:
        super().__init__()
        check_size("num_heads", num_heads)
        check_size("head_dim", head_dim)
        config = AstroConfig() if config is None else config
        if not isinstance(config, AstroConfig):
            raise TypeError(f"config: {type(config).__name__}; expected AstroConfig")
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.config = config
        self.exact = False
        self.hidden = RandomHidden(num_heads, head_dim, config) if config.hidden == "random" else None

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
    ) -> Tensor:
        """Attend.

        Args:
            query: [B, H, Nq, D]. key: [B, H, Nk, D]. value: [B, H, Nk, Dv]. float32, float64, bfloat16 or float16.
            key_mask: [B, Nk] bool, True = a real token. Padding does not move the results of real tokens. Sequences
                without a real token give zeros, and so do queries that are padding, except in softmax attention.
            causal: a query sees no later key; with Nq < Nk the queries are the last tokens.
            scale: multiplies q.k; None is D^-0.5.
            grid: (rows, columns) of a ViT's patches, the last rows * columns tokens; the others come before them.

        Returns:
            [B, H, Nq, Dv], in the dtype of the query. Differentiable in query, key and value; which keys are exact
            and which cluster a key belongs to are choices and constant. NaN and infinity come out as NaN or infinity.

        Raises:
            TypeError, ValueError: shapes, dtypes or values that do not fit, naming the argument; or a combination
                that `refusal` names.
        """
        return self._attend(query, key, value, key_mask, causal, scale, grid, False)[0]

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
    ) -> tuple[Tensor, Tensor]:
        """The output, and log p [B, H, Nq], the logarithm of what divides it (the astrocyte's calcium response).

        Arguments and errors as in `forward`; slower, and of N x N memory where the attention is softmax.
        """
        return self._attend(query, key, value, key_mask, causal, scale, grid, True)

    def refusal(self, *, causal: bool) -> str | None:
        """Why this configuration cannot serve such attention at every length, or None."""
        if not causal:
            return None
        if self.config.hidden != "random":
            return "causal attention needs a static hidden layer (hidden='random')"
        if self.config.exact_keys and self.config.near:
            return "causal attention cannot choose exact keys per tile (exact_keys=0)"
        if self.config.exact_queries:
            return "causal attention has no exact queries (exact_queries=0)"
        return None

    def cost(
        self, num_queries: int, num_keys: int, *, causal: bool = False, grid: tuple[int, int] | None = None
    ) -> Cost:
        """Positions and products per query, counted from the configuration for a sequence of this length.

        Raises:
            TypeError, ValueError: numbers that are not positive integers, a grid that does not fit.
        """
        check_size("num_queries", num_queries)
        check_size("num_keys", num_keys)
        check_grid(grid, num_keys)
        if self.exact:
            return Cost(num_keys, 2 * num_keys, 2 * num_keys)
        return count_cost(self.config, self.head_dim, num_queries, num_keys, causal, grid)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, {self.config}"

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        causal: bool,
        scale: float | None,
        grid: tuple[int, int] | None,
        with_normaliser: bool,
    ) -> tuple[Tensor, Tensor]:
        check_call(self, query, key, value, key_mask, causal, scale, grid)
        scale = self.head_dim**-0.5 if scale is None else float(scale)
        if query.shape[0] == 0 or query.shape[2] == 0:
            return query.new_zeros(*query.shape[:3], value.shape[-1]), query.new_zeros(query.shape[:3])
        if self.exact or covers(self.config, key.shape[2], grid):
            return _softmax_attention(query, key, value, key_mask, causal, scale, with_normaliser)
        reason = self.refusal(causal=causal)
        if reason is not None:
            raise ValueError(f"causal: True with this config; {reason}")
        dtype = query.dtype
        with torch.autocast(query.device.type, enabled=False):
            # Means, sums and logarithms of thousands of terms are kept in float32 at least.
            work = torch.promote_types(dtype, torch.float32)
            q, k, v = query.to(work) * scale**0.5, key.to(work) * scale**0.5, value.to(work)
            out, normaliser = self._attend_real_first(q, k, v, key_mask, causal, grid)
        return out.to(dtype), normaliser

    def _attend_real_first(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        causal: bool,
        grid: tuple[int, int] | None,
    ) -> tuple[Tensor, Tensor]:
        """Attend with the real tokens moved to the front, and move the results back."""
        batch, heads, num_queries, _ = q.shape
        if causal:
            # Fewer queries than keys: the queries are the last tokens, so stand-ins take the place of the earlier ones.
            q = F.pad(q, (0, 0, k.shape[2] - num_queries, 0))
        same_tokens = q.shape[2] == k.shape[2]
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        order = lengths = None
        if key_mask is not None:
            # Real tokens first: tiles and near fields then hold the same tokens wherever the padding was.
            order = (~key_mask).to(torch.uint8).argsort(dim=1, stable=True)[:, None].expand(-1, heads, -1).flatten(0, 1)
            lengths = key_mask.sum(1).repeat_interleave(heads)
            k, v = _in_order(k, order), _in_order(v, order)
            q = _in_order(q, order) if same_tokens else q
        hidden = None if self.hidden is None else self.hidden.expand(batch, q.dtype)
        if causal and hidden is not None:  # `refusal` has turned the others away
            real = None if lengths is None else real_tokens(k.shape[1], lengths)
            out, normaliser, _ = causal_linear_attention(q, k, v, hidden, near=self.config.near, key_mask=real)
            out, normaliser = (out, normaliser) if real is None else zero_padding(out, normaliser, real)
        else:
            parts = [
                _bidirectional(
                    self.config,
                    q[part],
                    k[part],
                    v[part],
                    None if hidden is None else hidden.part(part),
                    None if lengths is None else lengths[part],
                    grid,
                )
                for part in _slices(self.config, len(q), k.shape[1], q.shape[-1])
            ]
            out, normaliser = (torch.cat(each) for each in zip(*parts, strict=True))
        if order is not None and same_tokens:
            back = order.argsort(dim=1)
            out, normaliser = _in_order(out, back), normaliser.gather(1, back)
        return tuple(x[:, -num_queries:].unflatten(0, (batch, heads)) for x in (out, normaliser))


def _bidirectional(
    config: AstroConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Hidden | None,
    lengths: Tensor | None,
    grid: tuple[int, int] | None,
) -> tuple[Tensor, Tensor]:
    """Attention of sequences flattened over batch and heads [Z, N, D], real tokens first."""
    num_keys = k.shape[1]
    prefix = prefix_length(config, num_keys, grid)
    if hidden is not None and config.near == 0 and prefix == 0:
        real = None if lengths is None else real_tokens(num_keys, lengths)
        out, normaliser = linear_attention(q, k, v, hidden, key_mask=real)
        return (out, normaliser) if real is None or q.shape[1] != num_keys else zero_padding(out, normaliser, real)
    tiled = config.near > 0
    layout = Layout(
        grid=grid if tiled else None,
        prefix=prefix,
        tile=config.tile if tiled else num_keys,  # without tiles, the whole sequence is one
        near=config.near,
        exact_keys=config.exact_keys if tiled else 0,
        groups=config.groups,
        lengths=lengths,
    )
    if hidden is not None:
        return near_linear_attention(q, k, v, hidden, layout)
    num_hidden = config.num_hidden if config.hidden == "hebbian" else 0
    return near_far_attention(q, k, v, layout, num_hidden=num_hidden, steps=config.steps)


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
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return out, logits.logsumexp(-1)


def _in_order(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))


def _slices(config: AstroConfig, size: int, num_keys: int, head_dim: int) -> list[slice]:
    """Slices of batch and heads whose largest intermediates stay within the workspace."""
    tiles = -(-num_keys // config.tile)
    largest = {
        "random": num_keys * config.num_hidden,
        "hebbian": max(min(config.groups, tiles) * num_keys, tiles * config.num_hidden * head_dim),
        "none": min(config.groups, tiles) * num_keys,
    }[config.hidden]
    if config.near:
        gathered = tiles * (config.near + config.exact_keys)
        largest = max(largest, gathered * (config.num_hidden if config.hidden == "random" else head_dim))
    step = max(1, WORKSPACE // largest)
    return [slice(start, start + step) for start in range(0, size, step)]
