"""Fine-tune an image classifier with its own attention and with astrocytes, with the same budget and seeds.

    python -m eval.finetune_images --attention original --attention linear --num-hidden 16
    python -m eval.finetune_images --data photos/ --model timm:vit_tiny_patch16_224 --weights model.safetensors

Without --data it goes on with the digits ViT of this folder, on the 1,347 digits it was trained on, and reports the 450
that were held out from the start. A folder has one subfolder per class; a fifth of its photos is held out (--test: all
of another folder). A tenth of the training images is the validation part, for --patience.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from astroattn.data import load_data
from astroattn.models import load_model
from eval import finetuning_variants as variants
from eval.common import JsonOption, LimitOption, run_script
from eval.finetune_text import TEST, VALIDATION, Items, split
from eval.finetuning import Settings, Task
from eval.train_digits import augment, load_digits_vit, load_split


def load_digits_task(limit: int | None) -> Task:
    """Handwritten digits; training images are turned, scaled and shifted a little."""
    train, test = (list(zip(images, labels.tolist(), strict=True))[:limit] for images, labels in load_split())
    train, validation = split(train, VALIDATION)
    return Task("digits", train, validation, test, collate_images, collate_augmented)


def load_folder_task(data: str, test: str | None, encode: Callable[[Any], Tensor], limit: int | None) -> Task:
    """Photos of two folders, or of one that is divided; they are opened when they are needed."""
    train = load_photos(data, limit)
    train, held_out = split(train, TEST) if test is None else (train, load_photos(test, limit))
    train, validation = split(train, VALIDATION)
    names = sorted({name for _, name in train})
    unknown = sorted({name for _, name in held_out} - set(names))
    if unknown:
        raise ValueError(f"test: has the class {unknown[0]!r}, which no photo to train on has")
    parts = [[(photo, names.index(name)) for photo, name in part] for part in (train, validation, held_out)]
    return Task(Path(data).name, *parts, collate=partial(collate_photos, encode))


def load_photos(source: str, limit: int | None) -> Items:
    """Photos with their labels.

    Raises:
        ValueError: a photo has no label: the source has no subfolders, or the dataset no column of labels.
    """
    photos = load_data(source, "image", limit=limit).items
    if any(photo.label is None for photo in photos):
        raise ValueError(f"data: the photos of {source!r} have no labels; one subfolder per class gives them")
    return [(photo, photo.label) for photo in photos]


def collate_images(items: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W] and labels [B]."""
    return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])


def collate_augmented(items: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """The same, augmented as the digits ViT was trained."""
    images, labels = collate_images(items)
    return augment(images, torch.default_generator), labels


def collate_photos(encode: Callable[[Any], Tensor], items: Sequence[tuple[Any, int]]) -> tuple[Tensor, Tensor]:
    """Photos as the model takes them [B, 3, H, W], and labels [B]."""
    return encode([photo.open() for photo, _ in items]), torch.tensor([label for _, label in items])


def load_classifier(spec: str, weights: Path | None, classes: int) -> nn.Module:
    """A pretrained model of timm with a new classification head."""
    model = load_model(spec, weights=weights).model
    model.reset_classifier(classes)
    return model


def main(
    data: Annotated[str | None, typer.Option(help="Folder of photos or datasets:NAME; without it, digits.")] = None,
    test: Annotated[str | None, typer.Option(help="What is reported; without it, a fifth of --data.")] = None,
    model: Annotated[str, typer.Option(help="timm:NAME, for --data.")] = "timm:vit_tiny_patch16_224",
    weights: Annotated[Path | None, typer.Option(help="Its weights, a safetensors file; without, the hub's.")] = None,
    attention: variants.AttentionOption = [variants.Attention.default],  # noqa: B006 (typer copies it)
    num_hidden: variants.HiddenOption = 16,
    distill: variants.DistillOption = 0,
    end_to_end: variants.EndToEndOption = 0,
    distill_batch_size: variants.DistillBatchOption = 8,
    epochs: variants.EpochsOption = 10,
    batch_size: variants.BatchOption = 64,
    learning_rate: variants.RateOption = 3e-4,
    hidden_learning_rate: variants.HiddenRateOption = 3e-3,
    seed: variants.SeedsOption = [0],  # noqa: B006
    patience: variants.PatienceOption = None,
    out: variants.OutOption = None,
    resume: variants.ResumeOption = False,
    limit: LimitOption = None,
    json: JsonOption = None,
) -> None:
    """Fine-tune on labelled images and measure once on images that were held out."""
    if data is None:
        task, load = load_digits_task(limit), load_digits_vit
    else:
        if not model.startswith("timm:"):
            raise ValueError(f"model: {model!r}; must be timm:NAME")
        task = load_folder_task(data, test, load_model(model, weights=weights).encode, limit)
        load = partial(load_classifier, model, weights, 1 + max(label for _, label in task.train))
    variants.run_all(
        load,
        task,
        Settings(
            epochs,
            batch_size,
            learning_rate,
            hidden_learning_rate,
            patience,
            distill=distill,
            end_to_end=end_to_end,
            distill_batch_size=distill_batch_size,
        ),
        attention=attention,
        seeds=seed,
        num_hidden=num_hidden,
        out=out,
        resume=resume,
        json=json,
    )


if __name__ == "__main__":
    run_script(main)
