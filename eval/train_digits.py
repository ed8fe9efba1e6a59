"""Train the small vision transformer of the demo on the handwritten digits that ship with scikit-learn.

The 8 x 8 images are enlarged to 28 x 28 and cut into patches of 2 x 2, so the model sees 14 x 14 patches and a CLS
token, as many as a ViT-B/16 does. A quarter of the images, in equal shares of every digit, is held out and looked at
once, after the last step.

    python -m eval.train_digits        # five to seven minutes on two cores; writes eval/digits_vit
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

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

from eval.common import SeedOption, provenance

FOLDER = Path(__file__).parent / "digits_vit"
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
BATCH, LEARNING_RATE, WARM_UP = 64, 3e-3, 0.1
AUGMENTATION = (0.2, 0.2, 0.12, 0.14, 0.14)  # most radians, shear, log scale, shift to the side and up in half images


def load_split() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the training and the held-out digits: images [N, 1, 28, 28] in [-1, 1] and labels [N]; always the same."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, parts)
    return (_enlarge(train_images), train_labels), (_enlarge(test_images), test_labels)


def _enlarge(images: Tensor) -> Tensor:
    size = ARCHITECTURE["img_size"]
    images = images.float().view(-1, 1, 8, 8) / 8 - 1  # pixels are 0 to 16
    return F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False).clamp(-1, 1)


def load_digits_vit(folder: Path = FOLDER) -> VisionTransformer:
    """Return the trained model of `folder`, in evaluation mode."""
    model = VisionTransformer(**json.loads((folder / "config.json").read_text(encoding="utf-8"))["architecture"])
    model.load_state_dict({name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()})
    return model.eval()


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale, shear and shift every image a little, each in its own way."""
    drawn = torch.rand(5, len(images), generator=generator) * 2 - 1
    angle, shear, log_scale, dx, dy = drawn * torch.tensor(AUGMENTATION)[:, None]
    scale, cos, sin = log_scale.exp(), angle.cos(), angle.sin()
    rows = [torch.stack([scale * cos, scale * (shear - sin), dx], 1), torch.stack([scale * sin, scale * cos, dy], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def train(images: Tensor, labels: Tensor, *, epochs: int, seed: int) -> VisionTransformer:
    """Train a new model with AdamW and a cosine schedule."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    # timm's default initialisation is too small for a model so narrow: it hardly learns
    model = VisionTransformer(**ARCHITECTURE, weight_init="jax")
    positions = build_sincos2d_pos_embed(list(model.patch_embed.grid_size), model.embed_dim)
    with torch.no_grad():
        model.pos_embed[:, 1:] = positions / 2
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
    out: Annotated[Path, typer.Option(help="Folder for model.safetensors and config.json.")] = FOLDER,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 50,
    seed: SeedOption = 0,
) -> None:
    """Train the digits ViT, measure it once on the held-out digits and write weights (fp16) and a JSON sidecar."""
    (images, labels), (held_out, answers) = load_split()
    model = train(images, labels, epochs=epochs, seed=seed).half()
    out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), out / "model.safetensors")
    correct = accuracy(model.float(), held_out, answers)  # of the weights as saved
    card = {
        "architecture": ARCHITECTURE,
        "held_out": {"images": len(answers), "accuracy": correct},
        "training_images": len(labels),
        "epochs": epochs,
        **provenance(seed),
    }
    (out / "config.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    print(f"held-out accuracy {correct:.4f} on {len(answers)} digits")


if __name__ == "__main__":
    typer.run(main)
