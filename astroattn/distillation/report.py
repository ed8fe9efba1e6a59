"""What distillation did to every layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


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
        output_before, output_after: what the end-to-end loss is on the held-out batches, of the whole patched model;
            NaN where it gives neither hidden states nor logits.
        transfer_losses: of each step, the mean divergence of the layers in nats. end_to_end_losses: of each step.
    """

    layers: tuple[LayerError, ...]
    output_before: float
    output_after: float
    transfer_losses: tuple[float, ...]
    end_to_end_losses: tuple[float, ...]

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
        return "\n".join(lines)
