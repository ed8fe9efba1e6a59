"""`Distiller`: a distillation that goes on where it stopped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from astroattn.attention import AstrocyteAttention
from astroattn.distillation.hooks import Hooks
from astroattn.distillation.report import DONE, INTERRUPTED, NO_MORE, STOPPED, DistillReport, LayerError
from astroattn.distillation.updates import Updates, whole
from astroattn.distillation.weights import TRAIN, host_weights, in_use, only_these_train

if TYPE_CHECKING:
    from accelerate import Accelerator

    from astroattn.distillation.batches import Source
    from astroattn.distillation.hooks import Callback

Loss = str | Callable[[nn.Module, nn.Module, Any], Tensor]

OF_LAYERS, OF_MODEL = ("rows", "outputs"), ("end_to_end", "cosine", "logits")
RATES = {True: 0.05, False: 0.005}  # of hidden layers, each by itself or in the model as a whole
START_BATCHES = 16  # most batches that the neurons start from


@dataclass(frozen=True)
class Settings:
    """The plain arguments of a `Distiller`."""

    loss: str
    train: str
    learning_rate: float
    host_learning_rate: float
    total_steps: int | None
    max_norm: float | None
    accumulation: int
    draw: bool
    seed: int


class Distiller:
    """Trains a patched model to attend as softmax did, and goes on where it stopped: in another `run`, or after `load`.

    Only whole steps count. Whatever ends a run early (Ctrl-C, an error of a batch, a loss that is no number), the model
    is as after the last whole step, and another run goes on from there. The weights of a float16 or bfloat16 model are
    moved in float32 and rounded to what they are after every step.

    Args:
        model: patched; it stays on its device, or moves to the accelerator's. For a loss of layers, or
            train="hidden", with hidden="learned". Its weights as they are now are the original that is matched, with
            softmax attention.
        loss: of every layer by itself, on the queries, keys and values of the original: "rows", KL(softmax attention ||
            the layer's), in the mean over heads and real tokens; "outputs", the squared error of the attention outputs
            relative to the square of softmax attention's. All layers learn in parallel, and only hidden layers move. Or
            of the model as a whole: "end_to_end", the relative squared error of the last hidden states plus the KL of
            the logits, of those that it has; "cosine", 1 - the cosine of the last hidden states; "logits", the KL of
            the logits; or a function of the model, the original and the inputs that returns a scalar.
        train: what a loss of the model moves. "hidden": the hidden layers alone; "qk": and the query and key
            projections of their attention modules (without learned hidden layers, of all patched ones); "all": and
            every other weight; "marked": and the weights with requires_grad, which for a peft model are those of its
            adapters.
        learning_rate: of hidden layers; None: 0.05 for losses of layers, 0.005 for those of the model.
        host_learning_rate: of all other weights. Adapters of peft take more (1e-4).
        total_steps: of all runs together, over which the rates rise (30 %) and fall to 0, both as a cosine. None: they
            rise over 30 steps and stay.
        optimiser: makes one of groups of parameters that have "lr" (and "weight_decay" 0 where decay would do harm);
            None: Adam.
        schedule: makes a learning rate scheduler of that optimiser, which is stepped after every step, in place of what
            `total_steps` says.
        max_norm: of the gradients of a step, which are scaled down to it.
        accumulation: batches of a step, whose gradients are averaged.
        draw: before the first step every neuron becomes a pair of tokens, W_k a query and W_q a key that it attends to
            (times sqrt(scale)), each layer and each seed with draws of its own, and b such that log p is softmax
            attention's in the mean. False: hidden layers go on from what they are. None: True for losses of layers.
        seed: of the neurons drawn, and of the order of the batches.
        accelerator: of `accelerate`, for its device and mixed precision, and for its processes: all are given the same
            batches, each takes others of them in a step, and gradients are averaged. The weights must be whole on each
            (no FSDP). None: one process, the model's device and precision.

    Attributes:
        model: what is trained.
        step: whole steps until now.
        losses: of each step, the mean over its batches and layers.

    Raises:
        TypeError, ValueError: an argument that does not fit, a model without what is to be trained.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Loss = "rows",
        train: str = "hidden",
        learning_rate: float | None = None,
        host_learning_rate: float = 2e-5,
        total_steps: int | None = None,
        optimiser: Callable[[list[dict[str, Any]]], Optimizer] | None = None,
        schedule: Callable[[Optimizer], LRScheduler] | None = None,
        max_norm: float | None = None,
        accumulation: int = 1,
        draw: bool | None = None,
        seed: int = 0,
        accelerator: Accelerator | None = None,
    ) -> None:
        _check_loss(loss)
        self._of_layers = loss in OF_LAYERS
        name = loss if isinstance(loss, str) else getattr(loss, "__qualname__", type(loss).__name__)
        self._loss = loss
        rate = RATES[self._of_layers] if learning_rate is None else learning_rate
        draws = self._of_layers if draw is None else draw
        self.settings = Settings(
            *(name, train, rate, host_learning_rate, total_steps, max_norm, accumulation, draws, seed)
        )
        _check(self.settings, self._of_layers)
        if schedule is not None and total_steps is not None:
            raise ValueError("schedule: given with total_steps; needs one of them")
        for what, function in (("optimiser", optimiser), ("schedule", schedule)):
            if function is not None and not callable(function):
                raise TypeError(f"{what}: {type(function).__name__}; expected a function that makes one")
        self.model, self.accelerator = model, accelerator
        self.modules = find_modules(model, train, needs_learned=self._of_layers or train == "hidden" or draws)
        host, self._fused = host_weights(model, self.modules, train)
        hidden = [weight for module in self.modules.values() for weight in module.parameters()]
        if not hidden and not host:
            raise ValueError(f"train: {train!r}, but no weight of {type(model).__name__} has requires_grad")
        if accelerator is not None:
            model.to(accelerator.device)
        self.originals = {weight: nn.Parameter(weight.detach().clone(), requires_grad=False) for weight in host}
        plain = [weight for weight in host if weight not in self._fused]
        groups: list[dict[str, Any]] = [
            {"params": hidden, "lr": rate, "weight_decay": 0.0},
            {"params": plain, "lr": host_learning_rate},
            {"params": list(self._fused), "lr": host_learning_rate, "weight_decay": 0.0},  # whose values stay
        ]
        groups = [group for group in groups if group["params"]]
        half = any(weight.dtype == torch.float16 for weight in model.parameters())
        half |= accelerator is not None and accelerator.mixed_precision == "fp16"
        self.updates = Updates(groups, optimiser, schedule, total_steps, half=half)
        self.step = 0
        self.losses: list[float] = []
        self.position = (0, 0)  # in the batches
        self._source: Source | None = None

    def run(
        self,
        batches: Iterable[Any],
        steps: int = 300,
        *,
        held_out: Iterable[Any] | None = None,
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
    ) -> DistillReport:
        """Take steps, and report what they did to batches that are held out.

        The model runs in evaluation mode. Afterwards its modes and `requires_grad` flags are what they were. On the
        same machine two runs on the same batches are one run of as many steps. Ctrl-C ends a run, and the report says
        so. "rows" needs memory for the attention of 64 queries of each sequence in one layer.

        Args:
            batches: each as the model takes it, a tensor or a mapping of keyword inputs, or a pair of that and its
                labels. Labels, also under the names "label", "labels" and "label_ids", are left out. Padding that
                `attention_mask` names does not count. A sequence (a list) is taken in an order that the seed draws for
                every pass, a loader or other iterable as it comes, again and again, an iterator once. Memory holds the
                batches held out and, before the first step, the 16 next ones, which the neurons start from. The same
                object goes on where the last run stopped; the first object after `load` is taken from the place
                where the saved one was.
            steps: how many more, each of `accumulation` batches (for every process).
            held_out: batches for the report. None: of a sequence the last tenth, at least one and at most 16, of
                anything else the first 4; no step is taken on these.
            callbacks: functions, each called with this Distiller after every step; one that returns True ends the run.
                Or `TrainerCallback` objects of transformers, whose on_train_begin (the neurons are drawn by then),
                on_step_end, on_log and on_train_end are called; control.should_training_stop ends the run, and what
                else control asks for (saves, evaluations) is not done.
            progress: show a progress bar.

        Raises:
            TypeError, ValueError: an argument that does not fit; batches that do not call the model's astrocytes.
            FloatingPointError: a loss, a gradient or a weight that is not finite, with the number of the step.
        """
        from tqdm import tqdm

        from astroattn.distillation.batches import Ended, Source
        from astroattn.distillation.lessons import Lessons

        check_number("steps", steps, int, 1)
        total = self.settings.total_steps
        if total is not None and self.step + steps > total:
            raise ValueError(f"steps: {steps} after {self.step}; total_steps={total} allows {total - self.step} more")
        main = self.accelerator is None or self.accelerator.is_main_process
        hooks = Hooks(callbacks, self, steps, progress and main)
        source = self._source
        if source is None or source.batches is not batches or source.given is not held_out:
            goes_on = source is None or source.batches is batches
            source = Source(batches, held_out, self.settings.seed, self.position if goes_on else (0, 0))
        held = source.held_out
        lessons = Lessons(self.model, self.modules, self.originals, self._loss, self.accelerator)
        weights, first, ended = self.updates.weights, self.step, DONE
        with torch.enable_grad(), only_these_train(self.model, weights, self._fused):
            before, output_before = lessons.measure(held)
            if self.step == 0 and self.settings.draw:
                lessons.draw(source.look(START_BATCHES), self.settings.seed)
            self._source = source
            self.updates.refresh()
            bar = tqdm(total=steps, desc=self.settings.loss, unit="step", disable=not (progress and main))
            try:
                stop = hooks.begin()
                while not stop and self.step < first + steps:
                    self._take_step(source, lessons)
                    bar.update()
                    bar.set_postfix(loss=f"{self.losses[-1]:.4f}")
                    stop = hooks.step()
                if stop:
                    ended = STOPPED
            except KeyboardInterrupt:
                ended = INTERRUPTED
            except Ended:
                ended = NO_MORE
            finally:
                source.give_back()
                bar.close()
            hooks.end()
            after, output_after = lessons.measure(held)
        rows = [LayerError(n, each.configs[0].num_hidden, before[n], after[n]) for n, each in self.modules.items()]
        return DistillReport(tuple(rows), output_before, output_after, tuple(self.losses[first:]), self.step, ended)

    def save(self, folder: str | Path) -> None:
        """Write all that a run needs to go on: the weights that are trained, the optimiser, the place in the batches.

        One file, `distiller.safetensors`, with JSON in its header. The model itself is saved by `astroattn.save` and
        its library. Of several processes one should write.

        Raises:
            ValueError: an optimiser or schedule whose state is more than tensors and plain values.
        """
        from astroattn.distillation.saved import save

        save(self, Path(folder))

    def load(self, folder: str | Path) -> None:
        """Become what `save` wrote, the trained weights of the model included.

        This one is made with the same arguments, of the same checkpoint: what is not trained is the model's own.

        Raises:
            ValueError: no such file, one that is damaged, or one of another model or of other arguments. Nothing is
                changed then.
        """
        from astroattn.distillation.saved import load

        load(self, Path(folder))
        self._source = None

    def _take_step(self, source: Source, lessons: Any) -> None:
        """One step, or none at all."""
        updates, accelerator = self.updates, self.accelerator
        rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        share = 1 / self.settings.accumulation
        batches = [[source.take() for _ in range(processes)][rank] for _ in range(self.settings.accumulation)]
        while True:
            values = []
            for number, batch in enumerate(batches):
                for loss in lessons.losses(batch, (self.settings.seed, self.step, number)):
                    values.append(loss.detach().float())
                    if loss.requires_grad:  # not where the near field covers the sequence, which is softmax attention
                        updates.backward(loss * share)
            value = torch.stack(values).mean()
            finite = bool(torch.isfinite(value))
            if accelerator is not None and processes > 1:
                finite = bool(accelerator.reduce(torch.tensor(float(finite)).to(accelerator.device), "mean") == 1)
            fine = updates.gather(accelerator)
            if not finite or fine or updates.scale == 1:
                break
            updates.scale /= 2  # of float16: the same batches again
        if not finite or not fine:
            raise FloatingPointError(self._not_finite("the loss" if not finite else "a gradient"))
        with whole():
            if not updates.update(self.settings.max_norm):
                raise FloatingPointError(self._not_finite("a weight"))
            source.keep()
            self.position = source.position
            self.step += 1
            self.losses.append(value.item())

    def _not_finite(self, what: str) -> str:
        kept = f"as after step {self.step}" if self.step else "as before the first step"
        return (
            f"step {self.step + 1}: {what} is not finite; the model is {kept}. If the batch has no such "
            "numbers itself, a lower learning_rate or max_norm=1.0 may help"
        )


def find_modules(model: nn.Module, train: str, *, needs_learned: bool) -> dict[str, AstrocyteAttention]:
    """The astrocytes with a learned hidden layer by name, or all of them where none has one and none is needed."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    astrocytes = in_use(model)
    if not astrocytes:
        raise ValueError(f"model: {type(model).__name__} is not patched; astroattn.patch(model) first")
    found = {name: each for name, each in astrocytes.items() if each.configs[0].hidden == "learned"}
    if not found and needs_learned:
        raise ValueError(
            f"model: {type(model).__name__} has no learned hidden layer; patch it with AstroConfig(hidden='learned'), "
            "or train its other weights with loss='end_to_end' and train='qk', 'all' or 'marked'"
        )
    for name, module in (found or astrocytes).items():
        if module.exact:
            raise ValueError(f"model: {name} is set to exact; set it to exact = False")
    return found or astrocytes


def _check_loss(loss: object) -> None:
    if isinstance(loss, str):
        if loss not in OF_LAYERS + OF_MODEL:
            raise ValueError(f"loss: {loss!r}; must be one of {', '.join(OF_LAYERS + OF_MODEL)}, or a function")
    elif not callable(loss):
        raise TypeError(f"loss: {type(loss).__name__}; expected a name or a function")


def _check(settings: Settings, of_layers: bool) -> None:
    check_number("learning_rate", settings.learning_rate, float, 0)
    check_number("host_learning_rate", settings.host_learning_rate, float, 0)
    check_number("seed", settings.seed, int, 0)
    check_number("accumulation", settings.accumulation, int, 1)
    if settings.total_steps is not None:
        check_number("total_steps", settings.total_steps, int, 1)
    if settings.max_norm is not None:
        check_number("max_norm", settings.max_norm, float, 0)
    if not isinstance(settings.draw, bool):
        raise TypeError(f"draw: {settings.draw!r} of type {type(settings.draw).__name__}; expected bool or None")
    if settings.train not in TRAIN:
        raise ValueError(f"train: {settings.train!r}; must be one of {', '.join(TRAIN)}")
    if of_layers and settings.train != "hidden":
        raise ValueError(f"train: {settings.train!r} with loss={settings.loss!r}, which moves hidden layers alone")


def check_number(name: str, value: Any, kind: type, least: int) -> None:
    """An int of at least `least`, or a finite float above it."""
    numbers = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, numbers):
        raise TypeError(f"{name}: {value!r} of type {type(value).__name__}; expected {kind.__name__}")
    if kind is int and value < least:
        raise ValueError(f"{name}: {value}; must be at least {least}")
    if kind is float and not (math.isfinite(value) and value > least):
        raise ValueError(f"{name}: {value}; must be above {least} and finite")
