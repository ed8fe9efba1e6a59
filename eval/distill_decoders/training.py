"""The kinds of attention that are compared, and how they are trained: transfer layer by layer, then adapters."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback

from astroattn import AstroConfig, Distiller, patch
from astroattn.distillation.weights import in_use
from astroattn.hidden import LearnedHidden
from eval.distill_decoders.texts import Texts
from eval.generate.subjects import Subject

LEARNED, RANDOM, NEAR = "near + learned", "near + random", "near alone"
KINDS = (NEAR, RANDOM, LEARNED)
START, TRANSFER, TUNED = "none", "transfer", "tuned"
SILENT = -1e4  # a bias with which a neuron has no share in anything, and no gradient
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
PROGRESS = "progress.json"

Report = Callable[[str, int, float], None]  # of a stage, steps and minutes until now
Look = Callable[[nn.Module, str, int, float], None]  # the same of a model


@dataclass(frozen=True)
class Settings:
    """What is trained, and how long; `__main__` says how it was chosen.

    Attributes:
        near, num_hidden: of every layer.
        transfer, tuning: steps. every: steps between two looks at the texts held out, transfer and tuning.
        rank, rate: of the adapters.
    """

    near: int
    num_hidden: int
    transfer: int
    tuning: int
    every: tuple[int, int]
    loss: str = "logits"
    rank: int = 8
    rate: float = 1e-3
    hidden_rate: float = 0.005

    def last(self, kind: str) -> str:
        """The last stage of the training of such attention."""
        return TUNED if self.tuning else TRANSFER if kind == LEARNED else START


SETTINGS = {
    "stories": Settings(16, 16, 100, 40, (25, 20)),
    "smollm2": Settings(64, 64, 80, 16, (20, 8)),
}


def patched_copy(subject: Subject, kind: str, settings: Settings, seed: int) -> nn.Module:
    """The subject's model with such attention in every layer."""
    model = copy.deepcopy(subject.model)
    hidden = "random" if kind == RANDOM else "learned"
    report = patch(model, AstroConfig(hidden=hidden, num_hidden=settings.num_hidden, near=settings.near, seed=seed))
    if report.exact:
        raise ValueError(f"{subject.name}: {len(report.exact)} of its attention modules were not patched")
    if kind == NEAR:
        with torch.no_grad():
            for core in in_use(model).values():
                assert isinstance(core.hidden, LearnedHidden)
                core.hidden.bias.fill_(SILENT)
    return model


def train(
    model: nn.Module,
    kind: str,
    settings: Settings,
    texts: Texts,
    seed: int,
    look: Look,
    report: Report,
    folder: Path | None = None,
) -> None:
    """Train what `patched_copy` has made.

    `report` is called with the neurons as they are drawn, after the transfer (if they learn), and after the tuning;
    `look` at intervals. `folder` keeps how far the training is, to go on after it broke off.
    """
    running = Running(model, look, report, folder)
    batches = [{"input_ids": text} for text in texts.training]
    held_out = [{"input_ids": texts.held_out[0][:, : 2 * settings.near]}]  # for a report that is not used
    if kind == LEARNED:
        base: Any = model.base_model  # no predictions are needed
        distiller = Distiller(base, loss="rows", total_steps=settings.transfer, seed=seed)
        running.take(distiller, TRANSFER, settings.transfer, settings.every[0], batches, held_out)
    else:
        report(START, 0, 0.0)
    if settings.tuning:
        adapters = LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=PROJECTIONS)
        torch.manual_seed(seed)  # of the adapters
        adapted = get_peft_model(model, adapters)  # within the model
        distiller = Distiller(
            adapted,
            loss=LOSSES[settings.loss],
            train="marked",
            learning_rate=settings.hidden_rate,
            host_learning_rate=settings.rate,
            total_steps=settings.tuning,
            max_norm=1.0,
            seed=seed,
        )
        running.take(distiller, TUNED, settings.tuning, settings.every[1], batches, held_out)


def predict_text(model: nn.Module, original: nn.Module, inputs: Any) -> Tensor:
    """The cross-entropy of a text itself, in which the original has no part."""
    loss: Tensor = model(**inputs, labels=inputs["input_ids"]).loss
    return loss


LOSSES: dict[str, Any] = {"logits": "logits", "text": predict_text}


class Running(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """A training of one stage or several: its clock, and where it is kept.

    Attributes:
        minutes: of CPU time that the steps took, and drawing the neurons, but not `look` and `report`.
        steps: of all stages.
    """

    def __init__(self, model: nn.Module, look: Look, report: Report, folder: Path | None) -> None:
        self.minutes, self.steps = 0.0, 0
        self._model, self._look, self._report, self._folder = model, look, report, folder
        if folder is not None and (folder / PROGRESS).exists():
            self.minutes = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))["minutes"]

    def take(
        self, distiller: Distiller, stage: str, steps: int, every: int, batches: list[Any], held_out: list[Any]
    ) -> None:
        """Take the steps of a stage that are not taken yet, and report."""
        self._distiller, self._stage, self._every, self._before = distiller, stage, every, self.steps
        place = None if self._folder is None else self._folder / stage
        if place is not None and place.exists():
            distiller.load(place)
        if left := steps - distiller.step:
            self._start = time.process_time()
            distiller.run(batches, left, held_out=held_out, callbacks=[self])
        self.steps += steps
        self._report(stage, self.steps, self.minutes)

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Before the first step there is the start to be reported."""
        self._stop()
        if state.global_step == 0:
            if self._stage == TRANSFER:
                self._report(START, 0, 0.0)
            self._add(state.global_step)
        self._start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """At intervals, look at the model and keep it."""
        self._stop()
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._add(state.global_step)
        self._start = time.process_time()

    def _stop(self) -> None:
        self.minutes += (time.process_time() - self._start) / 60

    def _add(self, step: int) -> None:
        self._look(self._model, self._stage, self._before + step, self.minutes)
        if self._folder is not None and step:
            (self._folder / self._stage).mkdir(parents=True, exist_ok=True)
            self._distiller.save(self._folder / self._stage)
            (self._folder / PROGRESS).write_text(json.dumps({"minutes": self.minutes}), encoding="utf-8")
