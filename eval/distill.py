"""What a learned hidden layer is worth: its error beside that of random features, layer by layer of MiniLM.

The layers learn on docstrings of the calibration half (`astroattn.distill`, layer by layer); the errors are those of
the attention output on the reported half, which nothing was chosen on.

    python -m eval.distill --json out/distill.json --figure out/distill.png      # some four minutes of one core
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from astroattn import AstroConfig, AstrocyteAttention, distill, patched
from astroattn.fidelity.calls import find_astrocytes
from eval.common import (
    FigureOption,
    JsonOption,
    LimitOption,
    SeedOption,
    print_rows,
    relative_error,
    run_script,
    write_figure,
    write_json,
)
from eval.heads import Layer, first_items, load_minilm, read_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ITEMS, TOKENS = 32, 128  # reported chunks of text, and their length
TRAINING, BATCH, STEPS = 128, 4, 300
RANDOM, SEEDS = (64, 1024), 3
HEBBIAN = 64
LEARNED = (16, 64)
REFERENCE, TARGET = "random, m = 1024", "learned, m = 64"
COLOURS = {  # of Okabe and Ito
    "uniform": "0.6",
    "random, m = 64": "#E69F00",
    REFERENCE: "#D55E00",
    "learned, m = 16": "#56B4E9",
    TARGET: "#0072B2",
    "Hebbian, m = 64": "#009E73",
}


def measure(limit: int | None, seed: int, steps: int = STEPS) -> list[dict[str, Any]]:
    """One row per layer and one for their mean: the relative error of each hidden layer, and the ratio of two."""
    subject = load_minilm(TRAINING if limit is None else max(limit, 2 * BATCH), TOKENS)
    training = split(subject.calibration, BATCH)
    reported = first_items(subject.inputs, limit or ITEMS)
    errors: dict[str, list[float]] = {}
    for m in LEARNED:
        config = AstroConfig(hidden="learned", num_hidden=m, near=0, exact_keys=0, seed=seed)
        with patched(subject.model, config):
            print(f"m = {m}\n{distill(subject.model, training, steps=steps, seed=seed)}")
            modules = list(find_astrocytes(subject.model).values())
            with read_layers(subject.model, reported) as layers:
                pairs = zip(modules, layers, strict=True)
                errors[f"learned, m = {m}"] = [error_of(module, layer) for module, layer in pairs]
    with read_layers(subject.model, reported) as layers:
        for layer in tqdm(layers, "others", unit="layer"):
            for name, found in measure_others(layer, seed).items():
                errors.setdefault(name, []).append(found)
    rows = [{"layer": str(i)} | {name: errors[name][i] for name in COLOURS} for i in range(len(errors[TARGET]))]
    rows.append({"layer": "mean"} | {name: sum(errors[name]) / len(rows) for name in COLOURS})
    ratios = [row[TARGET] / row[REFERENCE] for row in rows[:-1]]
    return [
        row | {"learned / random": ratio} for row, ratio in zip(rows, [*ratios, sum(ratios) / len(ratios)], strict=True)
    ]


def split(inputs: dict[str, Tensor], rows: int) -> list[dict[str, Tensor]]:
    """Batches of so many rows."""
    count = len(next(iter(inputs.values())))
    return [{name: x[i : i + rows] for name, x in inputs.items()} for i in range(0, count, rows)]


def measure_others(layer: Layer, seed: int) -> dict[str, float]:
    """The errors of uniform attention, of orthogonal random features (mean of `SEEDS`) and of the Hebbian layer."""
    heads, dim = layer.query.shape[1], layer.query.shape[-1]

    def error(**settings: Any) -> float:
        return error_of(AstrocyteAttention(heads, dim, AstroConfig(near=0, exact_keys=0, **settings)), layer)

    seeds = range(seed, seed + SEEDS)
    found = {
        f"random, m = {m}": sum(error(hidden="random", num_hidden=m, seed=s) for s in seeds) / SEEDS for m in RANDOM
    }
    found["uniform"] = error(hidden="random", activation="constant", num_hidden=1)
    found[f"Hebbian, m = {HEBBIAN}"] = error(hidden="hebbian", num_hidden=HEBBIAN, tile=2**20)
    return found


@torch.no_grad()
def error_of(module: AstrocyteAttention, layer: Layer) -> float:
    """||output - softmax attention's|| / ||softmax attention's|| over the layer."""
    truth = (layer.query @ layer.key.mT).softmax(-1) @ layer.value
    return relative_error(module(layer.query, layer.key, layer.value, scale=1.0), truth)


def plot(rows: list[dict[str, Any]]) -> Figure:
    """The errors of every layer side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(COLOURS)
    for i, (name, colour) in enumerate(COLOURS.items()):
        places = [place + (i - (len(COLOURS) - 1) / 2) * width for place in range(len(rows))]
        axes.bar(places, [row[name] for row in rows], width, color=colour, label=name)
    axes.set_xticks(range(len(rows)), [row["layer"] for row in rows])
    axes.set(xlabel="layer of MiniLM", ylabel="relative error of the attention output")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def format_markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "| --- " * len(rows[0]) + "|"]
    lines += [
        "| " + " | ".join(value if isinstance(value, str) else f"{value:.3f}" for value in row.values()) + " |"
        for row in rows
    ]
    return "\n".join(lines)


def main(json: JsonOption = None, figure: FigureOption = None, limit: LimitOption = None, seed: SeedOption = 0) -> None:
    """Train learned hidden layers on one half of the texts and measure them on the other, beside random features."""
    rows = measure(limit, seed)
    print_rows(rows, title="Relative error of MiniLM's attention output")
    if json:
        write_json(json, rows, seed=seed)
    if figure:
        write_figure(figure, plot(rows))


if __name__ == "__main__":
    run_script(main)
