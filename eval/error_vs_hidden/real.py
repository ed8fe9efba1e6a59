"""Errors of hidden layers on the heads of pretrained models, against exact softmax attention."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import log
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from astroattn import AstroConfig, AstrocyteAttention
from astroattn.hidden import LearnedHidden
from eval.common import relative_error, rounded
from eval.error_vs_hidden.draws import CENTRES, RANDOM, Calibration, calibrate, draw_calibrated, draw_random
from eval.error_vs_hidden.learned import attend, learn
from eval.error_vs_hidden.rows import Row, make_row
from eval.error_vs_hidden.streaming import stream_attention
from eval.error_vs_hidden.theory import GOAL, log_normaliser_variance, log_output_variance
from eval.heads import Layer, Subject, first_items, load_minilm, load_vit, read_layers

SIZES = [2**power for power in range(4, 18)]
BIN = 0.25  # of log10 of a predicted error
Loader = Callable[[int], Subject]


@dataclass(frozen=True)
class Settings:
    """How much is measured: reported items, seeds, items to fit on, sizes of learned layers and their training."""

    items: int = 1
    seeds: int = 3
    calibration: int = 8
    learned: tuple[int, ...] = (16, 64)
    steps: int = 100
    sizes: tuple[int, ...] = tuple(SIZES)


FULL = Settings(items=2, seeds=5, calibration=16, learned=(16, 64, 128), steps=300)


@dataclass(frozen=True)
class Fit:
    """What was fitted to one layer, on calibration data alone."""

    calibration: Calibration
    centres: Tensor
    learned: dict[int, LearnedHidden]


class Target:
    """Softmax attention of one layer, and how far from it another attention is."""

    def __init__(self, layer: Layer) -> None:
        logits = layer.query @ layer.key.mT
        self.layer = layer
        self.attention = logits.softmax(-1)
        self.log_normaliser = logits.logsumexp(-1)
        self.output = self.attention @ layer.value

    def errors(self, attention: Tensor, log_normaliser: Tensor | None = None) -> dict[str, float]:
        """Relative errors: of matrix, output and block in the Frobenius norm over the layer, of p per token, median."""
        output = attention @ self.layer.value
        found = {
            "matrix": relative_error(attention, self.attention),
            "output": relative_error(output, self.output),
            "block": relative_error(self.layer.block_output(output), self.layer.output),
        }
        if log_normaliser is not None:
            found["normaliser"] = self.normaliser_errors(log_normaliser).median().item()
        return found

    def normaliser_errors(self, log_normaliser: Tensor) -> Tensor:
        """|p^ / p - 1| of every token."""
        return (log_normaliser - self.log_normaliser).expm1().abs()


def measure_real(
    settings: Settings, seed: int = 0, loaders: tuple[Loader, ...] = (load_minilm, load_vit)
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows of every layer and of the mean over layers; and rows of theory: single heads, and tokens beside it."""
    rows: list[Row] = []
    theory: list[dict[str, Any]] = []
    for loader in loaders:
        subject = loader(max(settings.items, settings.calibration))
        fits = fit_layers(subject, settings, seed)
        with read_layers(subject.model, first_items(subject.inputs, settings.items)) as layers:
            found, tokens = [], []
            for layer, fit in zip(tqdm(layers, f"{subject.name}: measuring", unit="layer"), fits, strict=True):
                errors, of_tokens = measure_layer(layer, fit, settings, seed)
                found.append(errors)
                tokens += of_tokens
                for head, needed in enumerate(neurons_needed(layer, Target(layer).output)):
                    place = {"model": subject.name, "layer": layer.index, "head": head}
                    theory.append(place | {"log10_neurons": rounded(needed)})
        theory += compare_tokens(subject.name, tokens)
        for index, errors in enumerate(found):
            rows += [make_row(subject.name, index, *what, values) for what, values in errors.items()]
        for what in found[0]:
            means = [sum(values) / len(found) for values in zip(*(errors[what] for errors in found), strict=True)]
            rows.append(make_row(subject.name, "all", *what, means))
    return rows, theory


def fit_layers(subject: Subject, settings: Settings, seed: int) -> list[Fit]:
    """Fit every layer on the calibration data. It sees no reported input."""
    fits = []
    with read_layers(subject.model, first_items(subject.calibration, settings.calibration)) as layers:
        for layer in tqdm(layers, f"{subject.name}: fitting", unit="layer"):
            calibration = calibrate(layer.query, layer.key, seed)
            learned = {m: learn(layer.query, layer.key, m, settings.steps, seed) for m in settings.learned}
            fits.append(Fit(calibration, calibration.cluster(CENTRES, seed), learned))
    return fits


def measure_layer(
    layer: Layer, fit: Fit, settings: Settings, seed: int
) -> tuple[dict[tuple[str, int, str], list[float]], list[tuple[Tensor, Tensor]]]:
    """The errors of one layer by (hidden, m, quantity), one for each seed.

    And for every draw of independent weights, log10 of the error of p that theory predicts, and that measured.
    """
    target, sizes = Target(layer), list(settings.sizes)
    errors: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    tokens = []
    log_deviation = _log_deviation(layer)

    def keep(hidden: str, m: int, found: dict[str, float]) -> None:
        for quantity, error in found.items():
            errors[hidden, m, quantity].append(error)

    moved = fit.calibration.transform(layer.query, layer.key)
    shift = fit.calibration.log_normaliser_shift(layer.query)
    for draw in range(seed, seed + settings.seeds):
        for hidden in RANDOM:
            weights = draw_random(hidden, sizes[-1], layer.query.shape[-1], draw)
            for m, attention, log_normaliser in stream_attention(layer.query, layer.key, weights, sizes):
                keep(hidden, m, target.errors(attention, log_normaliser))
                if hidden == "independent":
                    tokens.append(((log_deviation - log(m) / 2) / log(10), target.normaliser_errors(log_normaliser)))
        weights = draw_calibrated(fit.centres, draw)
        for m, attention, log_normaliser in stream_attention(*moved[:2], weights, sizes, moved[2]):
            keep("calibrated", m, target.errors(attention, log_normaliser + shift))
    for m, learned in fit.learned.items():
        log_shares, log_normaliser = attend(learned, layer.query, layer.key)
        keep("learned", m, target.errors((log_shares - log_normaliser[..., None]).exp(), log_normaliser))
    for m, attention, log_normaliser in _hebbian(layer, sizes):
        keep("Hebbian", m, target.errors(attention, log_normaliser))
    keep("uniform", 1, target.errors(torch.full_like(target.attention, 1 / target.attention.shape[-1])))
    for m, error in svd_floor(target.attention, sizes):
        keep("SVD", m, {"matrix": error})
    return errors, tokens


def _log_deviation(layer: Layer) -> Tensor:
    """log of sqrt(m) times the standard deviation of p^ / p [B, H, N]."""
    pairs = zip(layer.query.flatten(0, 1).double(), layer.key.flatten(0, 1).double(), strict=True)
    variances = torch.stack([log_normaliser_variance(query, key) for query, key in pairs])
    return variances.view(layer.query.shape[:3]).float() / 2


def _hebbian(layer: Layer, sizes: list[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The library's Hebbian layer with fewer neurons than keys; values that are the identity give the matrix."""
    _, num_heads, tokens, dim = layer.query.shape
    identity = torch.eye(tokens, dtype=layer.query.dtype).expand(*layer.query.shape[:2], -1, -1)
    for m in (size for size in sizes if size < tokens):
        config = AstroConfig(num_hidden=m, near=0, exact_keys=0, tile=2**20)
        network = AstrocyteAttention(num_heads, dim, config)
        yield m, *network.with_normaliser(layer.query, layer.key, identity, scale=1.0)


def svd_floor(attention: Tensor, sizes: list[int]) -> Iterator[tuple[int, float]]:
    """The least relative error in the Frobenius norm of any matrices of rank m in the place of these [B, H, N, N]."""
    squares = torch.linalg.svdvals(attention.double()).square()
    for m in (size for size in sizes if size < attention.shape[-1]):
        yield m, (squares[..., m:].sum() / squares.sum()).sqrt().item()


def neurons_needed(layer: Layer, output: Tensor) -> list[float]:
    """log10 of the m at which theory has an error of `GOAL` in the output [B, H, N, Dv] of each head."""
    needed = []
    for head in range(layer.query.shape[1]):
        items = zip(*(x[:, head].double() for x in (layer.query, layer.key, layer.value)), strict=True)
        total = torch.cat([log_output_variance(*item) for item in items]).logsumexp(0)
        relative = total - output[:, head].double().square().sum().log()
        needed.append((relative.item() - 2 * log(GOAL)) / log(10))
    return needed


def compare_tokens(model: str, points: list[tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    """Quartiles of the measured |p^ / p - 1| of tokens, by log10 of the standard deviation that theory predicts."""
    predicted, measured = (torch.cat([pair[side].flatten() for pair in points]) for side in (0, 1))
    rows = []
    for low in (-2 + BIN * step for step in range(round(5 / BIN))):
        mine = measured[(predicted >= low) & (predicted < low + BIN)]
        if len(mine) >= 100:
            quartiles = mine.double().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
            row = {"model": model, "log10_predicted": rounded(low + BIN / 2), "tokens": len(mine)}
            rows.append(row | dict(zip(("low", "error", "high"), rounded(quartiles), strict=True)))
    return rows
