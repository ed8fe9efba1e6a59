"""What a `Trainer` of transformers can call while it trains a patched model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from astroattn.fidelity.calls import find_astrocytes
from astroattn.fidelity.passes import Outputs, forward, predictions, to_model, token_mask
from astroattn.imports import needs

with needs("train"):
    from transformers import Trainer, TrainerCallback


class FidelityCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Logs how far a patched model is from its own softmax attention, before training and every so many steps.

    The same weights run twice on one held batch, in evaluation mode: as they are, and with softmax in every astrocyte.
    `Trainer.log` gets "fidelity_error", ||outputs - those with softmax|| / ||those with softmax||, of the logits or,
    where there are none, of the last hidden states; and of logits "fidelity_agreement", the share of the same first
    choices. Padding is left out of both.

        trainer.add_callback(FidelityCallback(trainer, batch, every=100))

    Args:
        trainer: whose model is measured, and who logs it.
        batch: inputs as the model takes them, a mapping of keyword arguments or one tensor; they need no labels.
        every: steps between two measurements.

    Raises:
        TypeError: a batch of another kind. ValueError: `every` is less than 1; the model is not patched.
    """

    def __init__(self, trainer: Trainer, batch: Mapping[str, Any] | Tensor, every: int = 100) -> None:
        if not isinstance(batch, (Mapping, Tensor)):
            raise TypeError(f"batch: expected a mapping of keyword arguments or a tensor, got {type(batch).__name__}")
        if every < 1:
            raise ValueError(f"every: {every}; must be at least 1 step")
        if not find_astrocytes(trainer.model):
            raise ValueError("trainer: its model is not patched, so there is nothing to compare; patch it first")
        self._trainer, self._batch, self._every = trainer, batch, every

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The distance before the first step, or before the first one after a checkpoint."""
        self._log()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The distance after a step, if it is its turn."""
        if state.global_step % self._every == 0:
            self._log()

    def _log(self) -> None:
        found = measure_fidelity(self._trainer.model, self._batch)
        self._trainer.log({f"fidelity_{name}": value for name, value in found.items()})


def measure_fidelity(model: nn.Module, batch: Mapping[str, Any] | Tensor) -> dict[str, float]:
    """The "error" and, of a model with logits, the "agreement" of a patched model with its own softmax attention."""
    inputs = to_model(model, batch)
    mask, cores = token_mask(inputs), find_astrocytes(model).values()
    modes = {module: module.training for module in model.modules()}
    exact = {core: core.exact for core in cores}
    try:
        model.eval()
        with torch.no_grad():
            mine = _read(forward(model, inputs), mask)
            for core in cores:
                core.exact = True
            softmax = _read(forward(model, inputs), mask)
    finally:
        for core, was in exact.items():
            core.exact = was
        for module, mode in modes.items():
            module.training = mode
    (values, is_choice), (truth, _) = mine, softmax
    found = {"error": ((values - truth).norm() / truth.norm()).item()}
    if is_choice:
        found["agreement"] = (values.argmax(-1) == truth.argmax(-1)).double().mean().item()
    return found


def _read(outputs: Outputs, mask: Tensor | None) -> tuple[Tensor, bool]:
    """What is compared of a pass, in float64, and whether its rows are logits."""
    logits = predictions(outputs.logits, mask)
    states = logits if logits is not None else predictions(outputs.hidden, mask)
    if states is None:
        raise ValueError("batch: the model gives neither logits nor hidden states for it")
    return states.double(), logits is not None and states.shape[-1] > 1
