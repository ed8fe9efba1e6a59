"""Training the hidden layers of a patched model to attend as its softmax attention did."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from astroattn.distillation.report import DistillReport, LayerError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["DistillReport", "LayerError", "distill"]


def distill(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int = 300,
    end_to_end: int = 0,
    train: str = "hidden",
    learning_rate: float = 0.05,
    host_learning_rate: float = 2e-5,
    seed: int = 0,
    progress: bool = True,
    accelerator: Accelerator | None = None,
) -> DistillReport:
    """Train the learned hidden layers of a patched model on unlabelled inputs to attend as softmax did, in place.

    First layer by layer. A forward of the original gives the queries, keys and values of every layer. Neurons start as
    pairs of tokens, W_k a query and W_q a key that it attends to (times sqrt(scale)); then all layers learn in
    parallel, each with its own loss, KL(softmax attention || the layer's) over heads and real tokens. Only hidden
    layers move. Then, with `end_to_end`, the patched model as a whole learns to give the original's last hidden states
    (relative squared error) and logits (KL), of those that it has.

    The model runs in evaluation mode. Afterwards its modes and `requires_grad` flags are what they were. On the same
    machine a seed gives the same weights. The first part needs memory for the attention of 64 queries of each sequence
    in one layer, or of all its N queries where near > 0.

    Args:
        model: patched with hidden="learned"; its other attention modules may be anything. With steps=0 and a `train`
            other than "hidden" it may be without learned hidden layers (random features, near + far). It stays on its
            device, or moves to the accelerator's.
        batches: at least two, each as the model takes it: a mapping of keyword inputs or a tensor. Padding that
            `attention_mask` names does not count. The last tenth of them, at least one, is held out for the report.
        steps: of the first part, one batch each. 0 leaves it out: the hidden layers are trained on from what they are.
        end_to_end: steps of the second part.
        train: what the second part moves. "hidden": the hidden layers alone; "qk": and the query and key projections of
            their attention modules (without learned hidden layers, of all patched ones); "all": and every other weight;
            "marked": and the weights with requires_grad, which for a peft model are those of its adapters.
        learning_rate: of Adam on hidden layers in the first part; a tenth of it in the second.
        host_learning_rate: of Adam on all other weights. Adapters of peft take more (1e-4).
        seed: of the neurons drawn and the order of the batches.
        progress: show progress bars.
        accelerator: of `accelerate`, for its device and mixed precision, and for its processes: all are given the same
            batches, each takes others of them in a step, and gradients are averaged. The weights must be whole on each
            (no FSDP). None: one process, the model's device and precision.

    Raises:
        TypeError, ValueError: an argument that does not fit, a model without what is to be trained, or batches that do
            not call its astrocytes. Whatever ends it early, the weights are then what they were.
    """
    from astroattn.distillation.training import Plan, run  # heavier than torch

    plan = Plan(steps, end_to_end, train, learning_rate, host_learning_rate, seed, progress)
    return run(model, batches, plan, accelerator)
