"""The two parts of distillation, one after the other."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from astroattn.attention import AstrocyteAttention
from astroattn.distillation.outputs import has_outputs, mean_output_loss, output_loss
from astroattn.distillation.report import DistillReport, LayerError
from astroattn.distillation.steps import take_steps
from astroattn.distillation.transfer import output_errors, read_calls, start_from_data, transfer_losses
from astroattn.distillation.weights import TRAIN, host_weights, only_these_train
from astroattn.fidelity.calls import find_astrocytes
from astroattn.fidelity.passes import count_items, to_model

if TYPE_CHECKING:
    from accelerate import Accelerator

HELD_OUT = 10  # one batch in so many
START_BATCHES = 16  # most batches that the neurons start from
SLOWER = 0.1  # the hidden layers' rate end to end, relative to that of the first part


@dataclass(frozen=True)
class Plan:
    """The plain arguments of `distill`."""

    steps: int
    end_to_end: int
    train: str
    learning_rate: float
    host_learning_rate: float
    seed: int
    progress: bool

    def __post_init__(self) -> None:
        for name in ("steps", "end_to_end", "seed"):
            value = getattr(self, name)
            if type(value) is not int:
                raise TypeError(f"{name}: {value!r} of type {type(value).__name__}; expected int")
            if value < 0:
                raise ValueError(f"{name}: {value}; must be at least 0")
        if not self.steps + self.end_to_end:
            raise ValueError("steps: 0 with end_to_end=0 leaves nothing to do")
        for name in ("learning_rate", "host_learning_rate"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"{name}: {value!r} of type {type(value).__name__}; expected a number")
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: {value}; must be positive and finite")
        if self.train not in TRAIN:
            raise ValueError(f"train: {self.train!r}; must be one of {', '.join(TRAIN)}")


def run(model: nn.Module, batches: Iterable[Any], plan: Plan, accelerator: Accelerator | None) -> DistillReport:
    """What `distill` does."""
    modules = find_modules(model, plan)
    host, fused = host_weights(model, modules, plan.train)
    inputs = read_batches(model, batches)
    if accelerator is not None:
        model.to(accelerator.device)
    inputs = [to_model(model, each) for each in inputs]
    held = max(1, len(inputs) // HELD_OUT)
    training, held_out = inputs[:-held], inputs[-held:]
    hidden = [weight for module in modules.values() for weight in module.parameters()]
    if not hidden and not host:
        raise ValueError(f"train: {plan.train!r}, but no weight of {type(model).__name__} has requires_grad")
    automatic = nullcontext if accelerator is None else accelerator.autocast

    with (
        torch.enable_grad(),
        restored_on_error([*hidden, *host]) as saved,
        only_these_train(model, [*hidden, *host], fused),
    ):
        original, exact = share_as_exact(model, saved)

        def calls_of(teacher: nn.Module, its: Mapping[str, AstrocyteAttention], batch: Any) -> Any:
            with automatic():
                return read_calls(teacher, {name: its[name] for name in modules}, batch)

        def measure() -> tuple[dict[str, float], float]:
            """The errors of the layers beside softmax attention with the weights as they are now, and the loss."""
            teacher, its = (original, exact) if not host else share_as_exact(model, {})
            errors = output_errors(modules, its, (calls_of(teacher, its, batch) for batch in held_out))
            with automatic():
                return errors, mean_output_loss(model, original, held_out) if comparable else math.nan

        def layer_losses(batch: Any) -> Iterator[Tensor]:
            return transfer_losses(modules, calls_of(original, exact, batch), draws)

        def loss_end_to_end(batch: Any) -> Iterator[Tensor]:
            with automatic():
                yield output_loss(model, original, batch)

        with automatic():
            comparable = has_outputs(original, held_out[0])
        if plan.end_to_end and not comparable:
            raise ValueError(f"end_to_end: {type(model).__name__} gives neither last hidden states nor logits to match")
        options: dict[str, Any] = {"seed": plan.seed, "progress": plan.progress, "accelerator": accelerator}
        before, output_before = measure()
        transfer: list[float] = []
        draws = torch.Generator().manual_seed(plan.seed)
        if plan.steps:
            start_from_data(modules, [calls_of(original, exact, batch) for batch in training[:START_BATCHES]], draws)
            rates = [(hidden, plan.learning_rate)]
            transfer = take_steps(rates, training, layer_losses, steps=plan.steps, title="layers", **options)
        end_to_end: list[float] = []
        if plan.end_to_end:
            rates = [(hidden, plan.learning_rate * SLOWER), (host, plan.host_learning_rate)]
            end_to_end = take_steps(
                rates, training, loss_end_to_end, steps=plan.end_to_end, title="end to end", **options
            )
        after, output_after = measure()
    rows = [LayerError(n, module.configs[0].num_hidden, before[n], after[n]) for n, module in modules.items()]
    return DistillReport(tuple(rows), output_before, output_after, tuple(transfer), tuple(end_to_end))


def find_modules(model: nn.Module, plan: Plan) -> dict[str, AstrocyteAttention]:
    """The astrocytes with a learned hidden layer by name, or all of them where none has one and none is needed."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    astrocytes = find_astrocytes(model)
    found = {name: each for name, each in astrocytes.items() if each.configs[0].hidden == "learned"}
    if not found and (plan.steps or plan.train == "hidden"):
        raise ValueError(
            f"model: {type(model).__name__} has no learned hidden layer; patch it with AstroConfig(hidden='learned'), "
            "or train its other weights with steps=0 and train='qk', 'all' or 'marked'"
        )
    if not astrocytes:
        raise ValueError(f"model: {type(model).__name__} is not patched; astroattn.patch(model) first")
    for name, module in (found or astrocytes).items():
        if module.exact:
            raise ValueError(f"model: {name} is set to exact; set it to exact = False")
    return found or astrocytes


def read_batches(model: nn.Module, batches: Iterable[Any]) -> list[Any]:
    """The batches as a list, each checked."""
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(f"batches: {type(batches).__name__}; expected several inputs of the model, for example a list")
    inputs = list(batches)
    if len(inputs) < 2:
        raise ValueError(f"batches: {len(inputs)}; needs at least 2, one to train on and one held out")
    for each in inputs:
        to_model(model, each)
        count_items(each)
    return inputs


def share_as_exact(
    model: nn.Module, copies: Mapping[nn.Parameter, Tensor]
) -> tuple[nn.Module, dict[str, AstrocyteAttention]]:
    """The model with softmax attention, and its astrocytes: all tensors are the model's, but those with a copy."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    original = copy.deepcopy(model, shared | {id(weight): mine for weight, mine in copies.items()}).eval()
    astrocytes = find_astrocytes(original)
    for module in astrocytes.values():
        module.exact = True
    return original, astrocytes


@contextmanager
def restored_on_error(weights: list[nn.Parameter]) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """Copies of the weights, which they are given back if the block raises."""
    copies = {weight: nn.Parameter(weight.detach().clone(), requires_grad=False) for weight in weights}
    try:
        yield copies
    except BaseException:
        with torch.no_grad():
            for weight, mine in copies.items():
                weight.copy_(mine)
        raise
