"""The optimiser behind distillation: weights of full precision, gradients that are numbers, steps that are whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

if TYPE_CHECKING:
    from accelerate import Accelerator

RISE = 0.3  # of the steps, where their number is known,
RISE_STEPS = 30  # and so many where it is not
SCALE, GROWTH = 2.0**16, 500  # of a loss in float16: what it starts with, and the steps until it is doubled again

Group = dict[str, Any]  # of an optimiser: "params", "lr", "weight_decay"


class Updates:
    """An optimiser over float32 copies of the weights that have less precision, its schedule, and a scale of losses.

    Attributes:
        weights: as the model has them. full: what the optimiser moves, the same or copies in float32.
    """

    def __init__(
        self,
        groups: list[Group],
        optimiser: Callable[[list[Group]], Optimizer] | None,
        schedule: Callable[[Optimizer], LRScheduler] | None,
        total_steps: int | None,
        *,
        half: bool,
    ) -> None:
        self.weights: list[nn.Parameter] = [weight for group in groups for weight in group["params"]]
        full = {weight: _full(weight) for weight in self.weights}
        self.full: list[Tensor] = list(full.values())
        groups = [group | {"params": [full[weight] for weight in group["params"]]} for group in groups]
        self.optimiser = torch.optim.Adam(groups) if optimiser is None else optimiser(groups)
        if not isinstance(self.optimiser, Optimizer):
            raise TypeError(f"optimiser: it returned a {type(self.optimiser).__name__}; expected a torch Optimizer")
        self.schedule = _one_cycle(self.optimiser, total_steps) if schedule is None else schedule(self.optimiser)
        if not isinstance(self.schedule, LRScheduler):
            raise TypeError(f"schedule: it returned a {type(self.schedule).__name__}; expected a torch LRScheduler")
        self.scale = SCALE if half else 1.0
        self._half = half
        self._before = [torch.empty_like(weight) for weight in self.full]

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over weights that somebody else has changed since the last step."""
        for weight, full in zip(self.weights, self.full, strict=True):
            if full is not weight and not torch.equal(full.to(weight.dtype), weight):
                full.copy_(weight)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        (loss * self.scale).backward()

    @torch.no_grad()
    def gather(self, accelerator: Accelerator | None) -> bool:
        """The gradients of the batches, mean of the processes, on the full weights; whether they are finite."""
        for weight, full in zip(self.weights, self.full, strict=True):
            gradient = None if weight.grad is None else weight.grad.to(full.dtype) / self.scale
            if accelerator is not None and accelerator.num_processes > 1:
                gradient = accelerator.reduce(torch.zeros_like(full) if gradient is None else gradient, "mean")
            weight.grad, full.grad = None, gradient
        return _finite([full.grad for full in self.full if full.grad is not None])

    @torch.no_grad()
    def update(self, max_norm: float | None) -> bool:
        """One step of the optimiser, or none; whether the weights are finite afterwards."""
        if max_norm is not None:
            nn.utils.clip_grad_norm_(self.full, max_norm)
        torch._foreach_copy_(self._before, self.full)
        self.optimiser.step()
        self.optimiser.zero_grad()
        new = [full.to(weight.dtype) for weight, full in zip(self.weights, self.full, strict=True)]
        if not _finite(new):
            torch._foreach_copy_(self.full, self._before)
            return False
        for weight, mine in zip(self.weights, new, strict=True):
            if mine is not weight:
                weight.copy_(mine)
        self.schedule.step()
        if self._half and self.schedule.last_epoch % GROWTH == 0:
            self.scale *= 2
        return True


@contextmanager
def whole() -> Iterator[None]:
    """A block that Ctrl-C waits for."""
    if threading.current_thread() is not threading.main_thread():  # where it never comes
        yield
        return
    came: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *arguments: came.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came and callable(before):
        before(*came[0])


def _full(weight: nn.Parameter) -> nn.Parameter:
    half = weight.dtype in (torch.float16, torch.bfloat16)
    return nn.Parameter(weight.detach().float()) if half else weight


def _finite(tensors: list[Tensor]) -> bool:
    return all(bool(torch.isfinite(x).all()) for x in tensors)


def _one_cycle(optimiser: Optimizer, total_steps: int | None) -> LRScheduler:
    """Up to the rate of each group over the first `RISE` of the steps, then down to 0, both as a cosine.

    Without a number of steps up over `RISE_STEPS`, and on.
    """
    if total_steps is None:
        return LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / RISE_STEPS))
    rates, cycles = [group["lr"] for group in optimiser.param_groups], optimiser.defaults
    momentum = "betas" in cycles or bool(cycles.get("momentum"))
    return OneCycleLR(optimiser, rates, total_steps, pct_start=RISE, cycle_momentum=momentum)
