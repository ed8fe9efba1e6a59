"""What the original shows a model that is distilled: losses on a batch, and errors on batches held out."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from astroattn.attention import AstrocyteAttention
from astroattn.distillation.batches import read_inputs
from astroattn.distillation.losses import OF_LAYERS, OF_MODEL, has_outputs, output_loss
from astroattn.distillation.transfer import Calls, Modules, generator, output_errors, read_calls, start_from_data
from astroattn.distillation.weights import in_use

if TYPE_CHECKING:
    from accelerate import Accelerator

    from astroattn.distillation.distiller import Loss


class Lessons:
    """A model and its original, which shares all weights but those of which it is given copies."""

    def __init__(
        self,
        model: nn.Module,
        modules: Modules,
        copies: Mapping[nn.Parameter, nn.Parameter],
        loss: Loss,
        accelerator: Accelerator | None,
    ) -> None:
        self._model, self._modules, self._copies = model, modules, copies
        self._original, self._exact = share_as_exact(model, modules, copies)
        self._of_layer = OF_LAYERS.get(loss) if isinstance(loss, str) else None
        self._of_model = OF_MODEL.get(loss, output_loss) if isinstance(loss, str) else loss
        self._automatic: Any = nullcontext if accelerator is None else accelerator.autocast

    def losses(self, batch: Any, seeds: Sequence[int]) -> Iterator[Tensor]:
        """The losses on a batch, one of every call of a layer, or one of the model.

        One at a time, so that only one layer's graph is in memory.
        """
        inputs = read_inputs(self._model, batch)
        if self._of_layer is None:
            with self._automatic():
                yield self._check(self._of_model(self._model, self._original, inputs))
            return
        for number, (name, call) in enumerate(self._calls(self._original, self._exact, inputs)):
            yield self._of_layer(self._modules[name], call, generator(*seeds, number))

    def draw(self, batches: Sequence[Any], seed: int) -> None:
        """Make the neurons pairs of tokens of these batches."""
        inputs = (read_inputs(self._model, batch) for batch in batches)
        calls = (self._calls(self._original, self._exact, each) for each in inputs)
        start_from_data(self._modules, calls, len(batches), seed)

    @torch.no_grad()
    def measure(self, batches: Sequence[Any]) -> tuple[dict[str, float], float]:
        """The errors of the layers beside softmax attention with the weights as they are now, and the model's loss."""
        moved = bool(self._copies)
        teacher, its = share_as_exact(self._model, self._modules, {}) if moved else (self._original, self._exact)
        calls = (self._calls(teacher, its, read_inputs(self._model, batch)) for batch in batches)
        errors = output_errors(self._modules, its, calls)
        losses = []
        with self._automatic():
            for batch in batches:
                inputs = read_inputs(self._model, batch)
                if self._of_layer is not None and not has_outputs(self._original, inputs):
                    return errors, math.nan
                losses.append(self._check(self._of_model(self._model, self._original, inputs)))
        return errors, torch.stack(losses).mean().item()

    def _calls(self, teacher: nn.Module, its: Modules, inputs: Any) -> Calls:
        with self._automatic():
            return read_calls(teacher, its, inputs)

    def _check(self, loss: Any) -> Tensor:
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            came = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"loss: it returned {came}; expected a tensor of one number")
        return loss.reshape(())


def share_as_exact(
    model: nn.Module, modules: Modules, copies: Mapping[nn.Parameter, Tensor]
) -> tuple[nn.Module, dict[str, AstrocyteAttention]]:
    """The model with softmax attention, and of its astrocytes these: all tensors are the model's, but those copied."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    original = copy.deepcopy(model, shared | {id(weight): mine for weight, mine in copies.items()}).eval()
    astrocytes = in_use(original)
    for module in astrocytes.values():
        module.exact = True
    return original, {name: astrocytes[name] for name in modules}
