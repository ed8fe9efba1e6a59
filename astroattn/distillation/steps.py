"""The steps of an optimiser over batches, on one process or several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

if TYPE_CHECKING:
    from accelerate import Accelerator

WARM_UP = 0.3  # of the steps


def take_steps(
    rates: Sequence[tuple[list[nn.Parameter], float]],
    batches: Sequence[Any],
    losses: Callable[[Any], Iterable[Tensor]],
    *,
    steps: int,
    seed: int,
    title: str,
    progress: bool,
    accelerator: Accelerator | None,
) -> list[float]:
    """Train weights by Adam, each group with its largest learning rate; returns the mean loss of every step.

    The rate rises over the first `WARM_UP` of the steps, then falls to 0, both as a cosine. Each step takes one batch
    per process, all batches in turn in a new order each time. The losses of a batch are differentiated one after
    another, and gradients are averaged over processes.
    """
    weights = [weight for group, _ in rates for weight in group]
    rates = [(group, rate) for group, rate in rates if group]
    optimiser = torch.optim.Adam([{"params": group, "lr": rate} for group, rate in rates])
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, [rate for _, rate in rates], total_steps=steps, pct_start=WARM_UP
    )
    half = accelerator is not None and accelerator.mixed_precision == "fp16"
    scaler = torch.amp.GradScaler(weights[0].device.type, enabled=half)
    rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    order, history = shuffled(len(batches), seed), []
    bar = tqdm(range(steps), title, unit="step", disable=not progress or rank > 0)
    for _ in bar:
        mine = [next(order) for _ in range(processes)][rank]
        optimiser.zero_grad()
        values = []
        for loss in losses(batches[mine]):
            values.append(loss.detach())
            if loss.requires_grad:  # not where the near field covers the sequence, which is softmax attention
                scaler.scale(loss).backward()
        if accelerator is not None and processes > 1:
            _average_gradients(weights, accelerator)
        scaler.step(optimiser)
        scaler.update()
        schedule.step()
        history.append(torch.stack(values).mean().item())
        bar.set_postfix(loss=f"{history[-1]:.4f}")
    return history


def shuffled(count: int, seed: int) -> Iterator[int]:
    """0 to count - 1 in a random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _average_gradients(weights: list[nn.Parameter], accelerator: Accelerator) -> None:
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.copy_(accelerator.reduce(weight.grad, reduction="mean"))
