"""The frontier that the default config was chosen on: error against positions, for MiniLM and ViT-tiny.

Choices are made on the even half of the data; what is reported elsewhere is measured on the odd half or on all.
ViT-tiny needs its weights and photos: a folder with `vit_tiny_patch16_224/model.safetensors` and
`imagenet_photos/photos.tar`, named by the environment variable ASTROATTN_DATA; without it, MiniLM only.

    python -m eval.frontier --json out/frontier.json --figure out/frontier.png
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from tqdm import tqdm

from astroattn import AstroConfig
from astroattn.recipes import Recipe, load_recipe, override
from eval.common import FigureOption, JsonOption, LimitOption, SeedOption, print_rows, write_figure, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFIGS = {
    "default": AstroConfig(),
    "8 exact keys": AstroConfig(exact_keys=8),
    "16 exact keys": AstroConfig(exact_keys=16),
    "64 exact keys": AstroConfig(exact_keys=64),
    "m = 8, 40 keys": AstroConfig(num_hidden=8, exact_keys=40),
    "m = 32, 16 keys": AstroConfig(num_hidden=32, exact_keys=16),
    "near 16, 20 keys": AstroConfig(near=16, exact_keys=20),
    "tiles of 8": AstroConfig(tile=8, near=8, exact_keys=28),
    "tiles of 16": AstroConfig(tile=16, near=16, exact_keys=20),
    "no exact keys": AstroConfig(near=36, exact_keys=0),
    "1 learning step": AstroConfig(steps=1),
    "5 learning steps": AstroConfig(steps=5),
}
PATCHES = Path(__file__).parent.parent / "patches"


def measure(limit: int | None, seed: int) -> list[dict[str, Any]]:
    """One row per model and config: positions, cost and the error of the model's output."""
    rows = []
    for name, recipe, weights in _models(limit):
        loaded = recipe.load(weights)
        for title, config in tqdm(CONFIGS.items(), name, unit="config"):
            candidate = override(recipe, asdict(config), {}, None)
            result = candidate.compare(loaded, diagnose=0, seed=seed, progress=False, controls=False)
            error = result.value("logit_error") if loaded.kind == "image" else 1 - result.value("embedding_cosine")
            agreement = result.value("top1_agreement" if loaded.kind == "image" else "same_neighbour")
            rows.append(
                {
                    "model": name,
                    "config": title,
                    "positions": result.value("positions"),
                    "cost": result.value("cost"),
                    "error": error,
                    "agreement": agreement,
                    "items": result.items,
                }
            )
    return rows


def _models(limit: int | None) -> Iterator[tuple[str, Recipe, Path | None]]:
    minilm = load_recipe(PATCHES / "minilm.toml")
    yield "MiniLM, 256 tokens", override(minilm, {}, {"half": "even", "limit": limit or 64}, None), None
    folder = os.environ.get("ASTROATTN_DATA")
    if folder is None:
        Console().print("ASTROATTN_DATA is not set: ViT-tiny is left out")
        return
    vit = load_recipe(PATCHES / "vit_tiny_patch16_224.toml")
    photos = {"source": str(Path(folder) / "imagenet_photos" / "photos.tar"), "half": "even", "limit": limit}
    weights = Path(folder) / "vit_tiny_patch16_224" / "model.safetensors"
    yield "ViT-tiny, 224 px", override(vit, {}, photos, None), weights


def plot(rows: list[dict[str, Any]]) -> Figure:
    """Error against cost, one panel per model; the colour is the number of positions."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(7 * len(models), 5), layout="constrained")
    for axis, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        mine = [row for row in rows if row["model"] == model]
        colours = [row["positions"] for row in mine]
        points = axis.scatter([100 * row["cost"] for row in mine], [row["error"] for row in mine], c=colours, s=40)
        figure.colorbar(points, ax=axis, label="positions per query")
        for row in mine:
            default = row["config"] == "default"
            axis.annotate(
                row["config"],
                (100 * row["cost"], row["error"]),
                (0, -13 if default else 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                weight="bold" if default else "normal",
            )
        label = "1 - cosine of the embedding" if "MiniLM" in model else "relative error of the logits"
        axis.set(xlabel="cost, % of softmax's products", ylabel=label, title=model, yscale="log")
        axis.margins(x=0.15, y=0.1)
        axis.grid(alpha=0.3, which="both")
    return figure


def format_markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a markdown table, one line per config; docs/method.md must hold it as it is (tested)."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = ["| config | " + " | ".join(f"{model}: positions, cost, error" for model in models) + " |"]
    lines.append("| --- " * (len(models) + 1) + "|")
    for config in dict.fromkeys(row["config"] for row in rows):
        cells = [row for row in rows if row["config"] == config]
        texts = (f"{row['positions']:.0f}, {row['cost']:.0%}, {row['error']:.4f}" for row in cells)
        lines.append(f"| {config} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main(json: JsonOption = None, figure: FigureOption = None, limit: LimitOption = None, seed: SeedOption = 0) -> None:
    """Measure the candidates for the default config on the even half of the data."""
    rows = measure(limit, seed)
    print_rows(rows, title="Even half; error: 1 - cosine (MiniLM), relative error of the logits (ViT)")
    if json:
        write_json(json, rows, seed=seed)
    if figure:
        write_figure(figure, plot(rows))


if __name__ == "__main__":
    typer.run(main)
