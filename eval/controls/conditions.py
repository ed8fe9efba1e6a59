"""What a head reads in each condition: the real input, and the controls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import AutoModel

from eval.heads import Subject, first_items, read_layers
from eval.train_digits import ARCHITECTURE

REAL, SYNAPSES, OTHER = "real", "synapses shuffled", "other keys"
TOKENS, DIMENSIONS, UNTRAINED = "tokens shuffled", "dimensions shuffled", "untrained"


class Head(NamedTuple):
    """What one head reads, in float64: query, key [N, D], times sqrt(scale), and value [N, Dv]."""

    query: Tensor
    key: Tensor
    value: Tensor


def conditions(subject: Subject, seed: int) -> Iterator[tuple[str, list[Head]]]:
    """The heads of all layers by condition, for the first input; other keys are of the second."""
    generator = torch.Generator().manual_seed(seed)
    pair = first_items(subject.inputs, 2)
    first, second = (_read(subject.model, pair, item) for item in (0, 1))
    yield REAL, first
    yield SYNAPSES, first
    yield OTHER, [Head(one.query, *two[1:]) for one, two in zip(first, second, strict=True)]
    yield TOKENS, _read(subject.model, shuffle_tokens(pair, generator), 0)
    yield DIMENSIONS, [head._replace(key=_shuffle_dimensions(head.key, generator)) for head in first]
    yield UNTRAINED, _read(untrained(subject, seed), pair, 0)


def shuffle_tokens(inputs: Any, generator: torch.Generator) -> Any:
    """The inputs with the tokens of texts (not the first and last), or 14 x 14 patches of images, in a new order."""
    if isinstance(inputs, Tensor):
        side = inputs.shape[-1] // 14
        patches = inputs.unfold(2, side, side).unfold(3, side, side)  # [B, C, 14, 14, side, side]
        order = torch.randperm(14 * 14, generator=generator)
        patches = patches.flatten(2, 3)[:, :, order].unflatten(2, (14, 14))
        return patches.permute(0, 1, 2, 4, 3, 5).reshape(inputs.shape)
    count = inputs["input_ids"].shape[1]
    order = torch.cat(
        [torch.tensor([0]), 1 + torch.randperm(count - 2, generator=generator), torch.tensor([count - 1])]
    )
    return {**inputs, "input_ids": inputs["input_ids"][:, order]}


def untrained(subject: Subject, seed: int) -> nn.Module:
    """A model of the same architecture with the weights that it would start its training with."""
    torch.manual_seed(seed)
    model: nn.Module
    if subject.name == "MiniLM":
        model = AutoModel.from_config(subject.model.config)
    elif subject.name == "digits ViT":
        model = VisionTransformer(**ARCHITECTURE, weight_init="jax")
        nn.init.trunc_normal_(model.head.weight, std=0.02)  # zero at the start of its training: there is no top-1
    else:
        model = timm.create_model("vit_tiny_patch16_224")
    return model.eval()


def _read(model: nn.Module, inputs: Any, item: int) -> list[Head]:
    """What every head of every layer reads of one item."""
    with read_layers(model, inputs) as layers:
        return [
            Head(*(x[item, head].double() for x in (layer.query, layer.key, layer.value)))
            for layer in layers
            for head in range(layer.query.shape[1])
        ]


def _shuffle_dimensions(key: Tensor, generator: torch.Generator) -> Tensor:
    """Each dimension of [N, D] permuted over the tokens in its own way."""
    return key.gather(0, torch.rand(key.shape, generator=generator).argsort(0))
