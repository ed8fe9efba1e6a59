"""Train two vision transformers on the handwritten digits that ship with scikit-learn.

The 8 x 8 images are enlarged and cut into patches of 2 x 2. The small model reads 28 x 28 pixels, so it sees 14 x 14
patches and a CLS token, as many as a ViT-B/16 does; the large one, for the demo, 80 x 80 pixels: 1,601 tokens. It has
heads of 64, and as a training step through so many tokens is slow, each step reads a random 100 of the patches
(Li et al., 2023, arXiv:2212.00794); measured and used it sees all of them. A quarter of the images, in equal shares of
every digit, is held out and looked at once, after the last step.

    python -m eval.train_digits                  # five to seven minutes on two cores; writes eval/digits_vit
    python -m eval.train_digits --size large     # under half an hour; writes eval/digits_vit_large
"""

from __future__ import annotations

import json
import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from tqdm import tqdm

from eval.common import SeedOption, provenance, run_script

ARCHITECTURE = {
    "img_size": 28,
    "patch_size": 2,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 64,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 2.0,
}
LARGE = ARCHITECTURE | {"img_size": 80, "embed_dim": 128, "depth": 3, "num_heads": 2, "no_embed_class": True}
FOLDER = Path(__file__).parent / "digits_vit"
LARGE_FOLDER = FOLDER.with_name("digits_vit_large")
BATCH, LEARNING_RATE, WARM_UP = 64, 3e-3, 0.1
AUGMENTATION = (0.2, 0.2, 0.12, 0.14, 0.14)  # most radians, shear, log scale, shift to the side and up in half images


class Size(StrEnum):
    """Which of the two models."""

    small = "small"
    large = "large"


class Recipe(NamedTuple):
    """Where a model is kept, what it is made of, and the share of the patches that a training step leaves out."""

    folder: Path
    architecture: dict[str, Any]
    left_out: float


RECIPES = {Size.small: Recipe(FOLDER, ARCHITECTURE, 0.0), Size.large: Recipe(LARGE_FOLDER, LARGE, 15 / 16)}


def load_split(size: int = ARCHITECTURE["img_size"]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the training and the held-out digits: images [N, 1, size, size] in [-1, 1] and labels [N]."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, parts)
    return (_enlarge(train_images, size), train_labels), (_enlarge(test_images, size), test_labels)


def _enlarge(images: Tensor, size: int) -> Tensor:
    images = images.float().view(-1, 1, 8, 8) / 8 - 1  # pixels are 0 to 16
    return F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False).clamp(-1, 1)


def build_digits_vit(architecture: dict[str, Any], *, left_out: float = 0.0) -> VisionTransformer:
    """Return a new model, its positions sines and cosines; in training it leaves out this share of the patches."""
    # timm's default initialisation is too small for a model so narrow: it hardly learns
    model = VisionTransformer(**architecture, weight_init="jax", patch_drop_rate=left_out)
    positions = build_sincos2d_pos_embed(list(model.patch_embed.grid_size), model.embed_dim)
    with torch.no_grad():
        model.pos_embed[:, -len(positions) :] = positions / 2
    return model


def load_digits_vit(folder: Path = FOLDER) -> VisionTransformer:
    """Return the trained model of `folder`, in evaluation mode."""
    architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architecture"]
    return _restore(architecture, load_file(folder / "model.safetensors"))


def _restore(architecture: dict[str, Any], weights: dict[str, Tensor]) -> VisionTransformer:
    model = build_digits_vit(architecture)
    kept = {name: weight.float() for name, weight in weights.items()}
    model.load_state_dict({"pos_embed": model.pos_embed} | kept)  # fixed positions are not kept
    return model.eval()


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale, shear and shift every image a little, each in its own way."""
    drawn = torch.rand(5, len(images), generator=generator) * 2 - 1
    angle, shear, log_scale, dx, dy = drawn * torch.tensor(AUGMENTATION)[:, None]
    scale, cos, sin = log_scale.exp(), angle.cos(), angle.sin()
    rows = [torch.stack([scale * cos, scale * (shear - sin), dx], 1), torch.stack([scale * sin, scale * cos, dy], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def train(
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    seed: int,
    architecture: dict[str, Any] = ARCHITECTURE,
    left_out: float = 0.0,
) -> VisionTransformer:
    """Train a new model with AdamW and a cosine schedule; where it leaves out patches, its positions are fixed."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = build_digits_vit(architecture, left_out=left_out)
    model.pos_embed.requires_grad_(not left_out)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    steps = epochs * (len(images) // BATCH)

    def schedule(step: int) -> float:
        done = step / steps
        return min(done / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * done)) + 1e-3

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    with tqdm(total=steps, desc="training", unit="step") as bar:
        for _ in range(epochs):
            for batch in torch.randperm(len(images), generator=generator).split(BATCH):
                if len(batch) < BATCH:
                    continue
                loss = F.cross_entropy(model(augment(images[batch], generator)), labels[batch], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


@torch.inference_mode()
def accuracy(model: VisionTransformer, images: Tensor, labels: Tensor) -> float:
    """Return the share of images whose largest logit is their label's."""
    predicted = torch.cat([model(batch).argmax(1) for batch in images.split(64)])
    return (predicted == labels).double().mean().item()


def main(
    size: Annotated[Size, typer.Option(help="Which of the two models.")] = Size.small,
    out: Annotated[Path | None, typer.Option(help="Folder for its files; without it, the committed one.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 50,
    seed: SeedOption = 0,
) -> None:
    """Train a digits ViT, measure it once on the held-out digits and write weights (fp16) and a JSON sidecar."""
    folder, architecture, left_out = RECIPES[size]
    (images, labels), (held_out, answers) = load_split(architecture["img_size"])
    model = train(images, labels, epochs=epochs, seed=seed, architecture=architecture, left_out=left_out)
    weights = {name: weight.half() for name, weight in model.state_dict().items()}
    if not model.pos_embed.requires_grad:
        del weights["pos_embed"]
    correct = accuracy(_restore(architecture, weights), held_out, answers)
    card = {
        "architecture": architecture,
        "held_out": {"images": len(answers), "accuracy": correct},
        "training_images": len(labels),
        "left_out": left_out,
        "epochs": epochs,
        **provenance(seed),
    }
    out = out or folder
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    print(f"held-out accuracy {correct:.4f} on {len(answers)} digits")


if __name__ == "__main__":
    run_script(main)
