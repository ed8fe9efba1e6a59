"""What a run calls after every step: functions, and callbacks of transformers' `Trainer`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from astroattn.distillation.distiller import Distiller

    Callback: TypeAlias = Callable[[Distiller], Any] | TrainerCallback


class Hooks:
    """The callbacks of one run, all called alike.

    A `TrainerCallback` gets `TrainingArguments` and a `TrainerState` filled from the Distiller, and model, optimizer
    and lr_scheduler by name. Its `control` may stop the training; there is nothing that it could have saved or
    evaluated.

    Raises:
        TypeError: a callback that is neither.
    """

    def __init__(self, callbacks: Iterable[Any], distiller: Distiller, steps: int, progress: bool) -> None:
        self._distiller = distiller
        self._functions: list[Callable[[Distiller], Any]] = []
        self._objects: list[TrainerCallback] = []
        transformers = sys.modules.get("transformers.trainer_callback")  # which whoever made one has imported
        for each in callbacks:
            if transformers is not None and isinstance(each, transformers.TrainerCallback):
                self._objects.append(each)
            elif callable(each) and not isinstance(each, type):
                self._functions.append(each)
            else:
                name = f"the class {each.__name__}" if isinstance(each, type) else type(each).__name__
                raise TypeError(f"callbacks: {name}; expected functions of the Distiller, or TrainerCallback objects")
        if self._objects:
            self._prepare(steps, progress)

    def begin(self) -> bool:
        """Before the first step of a run, the neurons drawn; whether it is to be stopped."""
        return self._call("on_train_begin")

    def step(self) -> bool:
        """After a step; whether it is to be the last."""
        answers = [function(self._distiller) for function in self._functions]
        stop = any(answer is True for answer in answers)
        if self._objects:
            loss, schedule = self._distiller.losses[-1], self._distiller.updates.schedule
            logs = {"loss": loss, "learning_rate": schedule.get_last_lr()[0]}
            self._state.global_step = self._distiller.step
            self._state.log_history.append(logs | {"step": self._distiller.step})
            stop |= self._call("on_step_end")
            stop |= self._call("on_log", logs=logs)
        return stop

    def end(self) -> None:
        """After the last step."""
        self._call("on_train_end")

    def _prepare(self, steps: int, progress: bool) -> None:
        from transformers import TrainerControl, TrainerState, TrainingArguments

        it = self._distiller
        self._arguments = TrainingArguments(
            output_dir=".",  # nothing is written
            max_steps=it.step + steps,
            learning_rate=it.settings.learning_rate,
            gradient_accumulation_steps=it.settings.accumulation,
            max_grad_norm=it.settings.max_norm or 0.0,
            seed=it.settings.seed,
            logging_steps=1,
            report_to="none",
            disable_tqdm=not progress,
        )
        main = it.accelerator is None or it.accelerator.is_main_process
        local = it.accelerator is None or it.accelerator.is_local_main_process
        self._state = TrainerState(
            global_step=it.step,
            max_steps=it.step + steps,
            logging_steps=1,
            is_local_process_zero=local,
            is_world_process_zero=main,
        )
        self._control = TrainerControl()

    def _call(self, event: str, **more: Any) -> bool:
        updates = self._distiller.updates if self._objects else None
        for each in self._objects:
            assert updates is not None
            parts = {"model": self._distiller.model, "optimizer": updates.optimiser, "lr_scheduler": updates.schedule}
            answer = getattr(each, event)(self._arguments, self._state, self._control, **parts, **more)
            self._control = self._control if answer is None else answer
        return bool(self._objects) and bool(self._control.should_training_stop)
