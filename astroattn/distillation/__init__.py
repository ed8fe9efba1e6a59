"""Training the hidden layers of a patched model to attend as its softmax attention did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from astroattn.distillation.distiller import Distiller, Loss, check_number
from astroattn.distillation.report import DistillReport, LayerError
from astroattn.distillation.weights import parameter_groups

if TYPE_CHECKING:
    from accelerate import Accelerator

    from astroattn.distillation.hooks import Callback

__all__ = ["DistillReport", "Distiller", "LayerError", "distill", "parameter_groups"]


def distill(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int = 300,
    loss: Loss = "rows",
    train: str = "hidden",
    learning_rate: float | None = None,
    host_learning_rate: float = 2e-5,
    optimiser: Callable[[list[dict[str, Any]]], Optimizer] | None = None,
    max_norm: float | None = None,
    accumulation: int = 1,
    held_out: Iterable[Any] | None = None,
    callbacks: Sequence[Callback] = (),
    seed: int = 0,
    progress: bool = True,
    accelerator: Accelerator | None = None,
) -> DistillReport:
    """Train a patched model on unlabelled inputs to attend as softmax did, in place: one run of a `Distiller`.

    Its rates rise and fall once over these steps (`total_steps=steps`). Arguments and errors are those of `Distiller`
    and of its `run`. To train layer by layer and then as a whole, call it twice:

        distill(model, batches)
        distill(model, batches, loss="end_to_end", train="qk")
    """
    check_number("steps", steps, int, 1)
    distiller = Distiller(
        model,
        loss=loss,
        train=train,
        learning_rate=learning_rate,
        host_learning_rate=host_learning_rate,
        total_steps=steps,
        optimiser=optimiser,
        max_norm=max_norm,
        accumulation=accumulation,
        seed=seed,
        accelerator=accelerator,
    )
    return distiller.run(batches, steps=steps, held_out=held_out, callbacks=callbacks, progress=progress)
