"""A whole transformer block as the network runs it: attention, feed-forward, residuals and layer norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from astroattn.config import AstroConfig
from astroattn.simulation.hidden import CompetitiveNeurons, HiddenNeurons, StaticNeurons
from astroattn.simulation.network import NeuronAstrocyteNetwork


class NeuronAstrocyteBlock:
    """A post-norm transformer block (BERT, ALBERT) as a neuron-astrocyte network.

    The last layer's neurons are those of the block's output, one per dimension, and all heads write into them: for a
    token x, head i sends W_O,i (W_V,i x + b_V,i). So with all tokens written, reading gives

        l = sum_i (H_i * P_i) h_i + x + b_O,   y = norm(l),   out = norm(y + ff(y))

    where each head has an astrocyte process P_i of its own, the residual x is the first layer's direct input to the
    last, and the feed-forward layer ff is two more layers of neurons, without an astrocyte.

    Args:
        layer: a `BertLayer` or `AlbertLayer` of transformers, in evaluation mode; it is read and not changed.
        config: the random hidden layer of every head; None is one neuron per token, which is softmax attention.

    Raises:
        TypeError: a layer of another kind.
        ValueError: a layer in training mode (its dropout would be lost); a config whose hidden layer is not random.

    Source: Kozachkov, Kastanenka & Krotov, PNAS 2023. That the authors chose ALBERT for its one set of weights, which
    lets one network serve at every depth (`recur`), is inferred from their notebooks.
    """

    def __init__(self, layer: nn.Module, config: AstroConfig | None = None) -> None:
        parts = _find_parts(layer)
        if layer.training:
            raise ValueError("layer: is in training mode; call eval() first")
        if config is not None and config.hidden != "random":
            raise ValueError(f"config: hidden={config.hidden!r}; must be 'random', or None for softmax attention")
        self.parts = parts
        self.random = None if config is None else StaticNeurons.random(parts.heads, parts.head_dim, config)

    def __call__(self, x: Tensor) -> Tensor:
        """The block's output [B, N, d] for tokens x [B, N, d] without padding, in the dtype of the layer's weights."""
        parts = self.parts
        batch, count, _ = x.shape
        query, key, value = (
            linear(x).view(batch, count, parts.heads, parts.head_dim).transpose(1, 2)
            for linear in (parts.query, parts.key, parts.value)
        )
        by_head = parts.out.weight.view(-1, parts.heads, parts.head_dim)
        value = torch.einsum("bhnv,dhv->bhnd", value, by_head)  # what a head sends to the last layer
        hidden: HiddenNeurons = self.random or CompetitiveNeurons(key * parts.head_dim**-0.25)
        heads, _ = NeuronAstrocyteNetwork(hidden).run(query, key, value, record=())
        last = heads.sum(1).to(x.dtype) + x + parts.out.bias
        y: Tensor = parts.norm(last)
        out: Tensor = parts.last_norm(y + parts.feed_forward(y))
        return out

    def recur(self, x: Tensor, depth: int) -> Tensor:
        """The output after `depth` rounds of the same network, each reading what the last one gave (ALBERT)."""
        for _ in range(depth):
            x = self(x)
        return x


class _Parts(NamedTuple):
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    norm: nn.LayerNorm
    feed_forward: Callable[[Tensor], Tensor]
    last_norm: nn.LayerNorm
    heads: int
    head_dim: int


def _find_parts(layer: Any) -> _Parts:
    kind = type(layer).__name__
    if kind not in _FINDERS:
        raise TypeError(f"layer: {kind}; expected one of {', '.join(_FINDERS)} of transformers")
    return _FINDERS[kind](layer)


def _bert(layer: Any) -> _Parts:
    own, out = layer.attention.self, layer.attention.output
    return _Parts(
        own.query, own.key, own.value, out.dense, out.LayerNorm,
        lambda y: layer.output.dense(layer.intermediate(y)), layer.output.LayerNorm,
        own.num_attention_heads, own.attention_head_size,
    )  # fmt: skip


def _albert(layer: Any) -> _Parts:
    own = layer.attention
    return _Parts(
        own.query, own.key, own.value, own.dense, own.LayerNorm, layer.ff_chunk, layer.full_layer_layer_norm,
        own.num_attention_heads, own.attention_head_size,
    )  # fmt: skip


_FINDERS: dict[str, Callable[[Any], _Parts]] = {"BertLayer": _bert, "AlbertLayer": _albert}
