"""What distillation did to every layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

DONE = "all steps were taken"
INTERRUPTED = "interrupted; the model is as after the last whole step"
NO_MORE = "there were no more batches"
STOPPED = "a callback ended it"


@dataclass(frozen=True)
class LayerError:
    """The relative error of one layer's attention output on batches held out, before and after.

    It is ||output - softmax attention's|| / ||softmax attention's||, both on the same queries, keys and values.
    """

    name: str
    num_hidden: int
    before: float
    after: float


@dataclass(frozen=True)
class DistillReport:
    """Errors on batches that nothing was trained on, and the losses of the training.

    Attributes:
        layers: the error of each learned layer; of all patched layers where none is learned.
        output_before: of the whole patched model on the held-out batches, the loss where it is one of the model, and
            that of "end_to_end" where it is one of layers; NaN where the model gives neither hidden states nor logits.
        output_after: the same after this run.
        losses: of each step of this run; of layers, their mean.
        steps: of all runs until now.
        ended: why the run ended, in words.
    """

    layers: tuple[LayerError, ...]
    output_before: float
    output_after: float
    losses: tuple[float, ...]
    steps: int
    ended: str = DONE

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the run."""
        return self.ended == INTERRUPTED

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.layers)
        lines = [f"{'layer':{width}}     m  error before  after"]
        lines += [
            f"{row.name:{width}}  {row.num_hidden:4}  {row.before:12.3f}  {row.after:5.3f}" for row in self.layers
        ]
        means = [
            sum(errors) / len(self.layers) for errors in zip(*((r.before, r.after) for r in self.layers), strict=True)
        ]
        lines.append(f"{'mean':{width}}        {means[0]:12.3f}  {means[1]:5.3f}")
        lines.append(f"loss of the outputs, held out: {self.output_before:.4f} before, {self.output_after:.4f} after")
        lines.append(f"{len(self.losses)} steps, {self.steps} in all: {self.ended}")
        return "\n".join(lines)
