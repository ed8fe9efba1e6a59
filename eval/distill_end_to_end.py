"""What should move end to end: hidden layers, the query and key projections, adapters of peft, or every weight?

MiniLM with pure linear attention (64 learned neurons) learns layer by layer on docstrings, and from there, as a whole,
to give the original's last hidden states. Reported are other docstrings. The rate of the weights outside hidden layers
is, of `RATES`, the one with the least loss for the first seed on batches held out of the training.

    python -m eval.distill_end_to_end --json out/distill_end_to_end.json      # some twenty minutes of three cores
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from astroattn import AstroConfig, DistillReport, distill, patch
from eval.common import (
    JsonOption,
    LimitOption,
    SeedsOption,
    print_rows,
    relative_error,
    run_script,
    show,
    summarise_seeds,
    write_json,
)
from eval.distill import BATCH, ITEMS, TOKENS, split
from eval.heads import first_items, load_minilm

TRAINING, STEPS, NUM_HIDDEN, RANK = 512, 200, 64, 8
RATES = (2e-5, 1e-4, 5e-4)
MEASURES = ("error", "cosine")
START, HIDDEN = "layer by layer", "hidden layers"
MOVED = {  # `train` of distill
    HIDDEN: "hidden",
    "and query and key projections": "qk",
    f"and adapters of the query and key projections, rank {RANK}": "marked",
    "all weights": "all",
}


def measure(limit: int | None, seeds: int, steps: int) -> list[dict[str, Any]]:
    """One row for the start and one for each choice of weights, means over seeds."""
    torch.set_flush_denormal(True)  # the exponentials of hidden layers make many, which slow a CPU down
    subject = load_minilm(TRAINING if limit is None else max(limit, 2 * BATCH), TOKENS)
    reported = first_items(subject.inputs, limit or ITEMS)
    training = split(subject.calibration, BATCH)
    original = last_states(subject.model, reported)
    rates = {HIDDEN: RATES[0]}  # of weights that it does not move
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (START, *MOVED)}

    def keep(name: str, rate: float, model: nn.Module, before: nn.Module, seconds: float) -> None:
        row = {"rate": rate, "weights": count_moved(model, before), "seconds": seconds}
        found[name].append(row | errors_of(last_states(model, reported), original))

    for seed in range(seeds):
        start, began = copy.deepcopy(subject.model), time.process_time()
        patch(start, AstroConfig(hidden="learned", num_hidden=NUM_HIDDEN, near=0, exact_keys=0, seed=seed))
        distill(start, training, steps=steps, seed=seed)
        keep(START, 0.0, start, subject.model, time.process_time() - began)
        for name, train in tqdm(MOVED.items(), f"seed {seed}", unit="model"):
            some = (rates[name],) if name in rates else RATES
            trained = [train_end_to_end(start, training, train, rate, steps, seed) for rate in some]
            best = min(trained, key=lambda each: each.report.output_after)
            rates[name] = best.rate
            keep(name, 0.0 if name == HIDDEN else best.rate, best.model, start, best.seconds)
    return [{"moved": name, **summarise_seeds(rows, MEASURES)} for name, rows in found.items()]


@dataclass(frozen=True)
class Trained:
    """A model after distillation end to end at one rate, and the CPU seconds it took."""

    model: nn.Module
    rate: float
    report: DistillReport
    seconds: float


def train_end_to_end(
    start: nn.Module, training: Sequence[Any], train: str, rate: float, steps: int, seed: int
) -> Trained:
    """Train a copy."""
    model, began = copy.deepcopy(start), time.process_time()
    if train == "marked":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["query", "key"]))
    options = {"loss": "end_to_end", "train": train, "host_learning_rate": rate}
    report = distill(model, training, steps=steps, seed=seed, **options)
    return Trained(model, rate, report, time.process_time() - began)


@torch.no_grad()
def last_states(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The last hidden states [B, N, hidden]; the chunks have no padding."""
    states: Tensor = model(**inputs).last_hidden_state
    return states


def errors_of(states: Tensor, original: Tensor) -> dict[str, float]:
    """Relative error of the states, and the mean cosine of the chunks' embeddings, the means over tokens."""
    cosines = F.cosine_similarity(states.mean(1), original.mean(1))
    return {"error": relative_error(states, original), "cosine": cosines.mean().item()}


def count_moved(model: nn.Module, before: nn.Module) -> int:
    """How many numbers are in the weights that moved, or that `before` does not have (peft renames the others)."""
    old = dict(before.named_parameters())
    moved = 0
    for name, weight in model.named_parameters():
        same = old.get(name.removeprefix("base_model.model.").replace(".base_layer", ""))
        moved += 0 if same is not None and torch.equal(weight, same) else weight.numel()
    return moved


def format_markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a markdown table; docs/experiments/texts.md must hold it as it is (tested)."""
    columns = ("moved", "weights that moved", "rate", "CPU seconds", "error of the states", "cosine of embeddings")
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    lines += [
        f"| {row['moved']} | {row['weights']:,} | {row['rate'] or '-'} | {row['seconds']:.0f} "
        f"| {row['error']:.3f} ± {show(row['error_spread'], '.3f')} "
        f"| {row['cosine']:.4f} ± {show(row['cosine_spread'], '.4f')} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(seeds: SeedsOption = 3, limit: LimitOption = None, json: JsonOption = None) -> None:
    """Distil pure linear attention end to end, moving few weights or all, and measure what each is worth."""
    rows = measure(limit, seeds, STEPS)
    print_rows(rows, title="MiniLM on docstrings that nothing was trained on")
    if json:
        write_json(json, rows, seed=0)


if __name__ == "__main__":
    run_script(main)
