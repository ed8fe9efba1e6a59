"""Budgets per layer and head: the cheapest plan that keeps a promise, or the truest one for a cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from astroattn.calibration.menu import default_menu
from astroattn.config import AstroConfig
from astroattn.plan import Plan

if TYPE_CHECKING:
    from astroattn.fidelity.passes import Outputs

__all__ = ["calibrate", "default_menu"]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    tolerance: float | None = None,
    cost: float | None = None,
    entries: float | None = None,
    metric: str | Callable[[Outputs, Outputs], Any] = "auto",
    menu: Sequence[AstroConfig] | None = None,
    where: Any = None,
    pooling: str = "auto",
    seed: int = 0,
    progress: bool = True,
    state: str | Path | None = None,
) -> Plan:
    """Choose what every head of a model does, from sample inputs, and measure on others what that changes.

    A few items choose: they run once through the original, and its gradients say to first order what each config of the
    menu would do to the output if one head had it, E (v . dy)^2 over directions v of the output y (the log-softmax
    logits, of tokens times the root of their probabilities; else the unit embedding, else the last hidden states). The
    plan has the least sum of these effects plus lambda times cost. All other items verify: the model as a whole,
    patched by the plan, beside the original.

    With `tolerance` plans of several costs are verified, and that is taken whose bound, of 90 % confidence, is within
    it, and whose next cheaper neighbour's is: the cheapest of all that are within it owes that to luck on these items.
    Exact attention everywhere always is within. With `cost` or `entries` there is one plan, and the promise says what
    was measured. On the same machine a seed gives the same plan.

    Decoders, which have no other config without weights, are given streaming memories: each key head chooses its number
    of entries, and pays by it. A plan is for texts of about the length of these items.

    Args:
        model: any that `patch` takes, patched or not. It is not touched: a copy that shares its weights is.
        batches: model inputs, each a mapping of keyword arguments or one tensor, with the items along dimension 0. They
            are read once and kept. Eight items choose, or as many as hold 4,096 tokens, at most a quarter of all for a
            tolerance, which the others verify, and half of them otherwise.
        tolerance: the least value of the metric, below 1, or the most of "kl", in nats; this, `cost` or `entries`.
        cost: the most products of the patched modules over those of softmax attention, 0 to 1.
        entries: of streaming memories, the mean number for a key head, at most the tokens of an item.
        metric: "top1" (agreement), "kl" (of the predictions), "cosine" (with the original's embedding), "neighbour"
            (the nearest neighbour among the verifying items is kept), or a function of the patched model's and the
            original's `fidelity.passes.Outputs` for a batch, which gives a value in [0, 1] for each item. "auto" is
            top1 where there are logits [B, C], kl for streaming memories, else cosine. Of recordings all frames
            together are the embedding.
        menu: what a head may do; None is `default_menu`, or streaming memories of 16 entries to all tokens. Exact
            attention, or a memory of all tokens, always is a choice. Configs with weights of their own (random,
            learned) cannot be mixed and are refused.
        where: which modules, as in `patch`.
        pooling: how hidden states become an embedding, as in `fidelity.compare`.
        seed: of the split, the directions and the bounds.
        progress: show progress bars.
        state: a .safetensors file that keeps what was measured, item by item; a later call with the same arguments goes
            on from it. None keeps nothing.

    Raises:
        TypeError: an argument or a batch of the wrong type.
        ValueError: an argument that does not fit; too few items for such a tolerance (the message says how many are
            needed); a cost that no plan of the menu has; a state of other arguments; an original that puts out NaN.
        ImportError: what the extra "eval" brings is not installed.
    """
    from astroattn.calibration.planning import Wish, make_plan  # heavier than torch

    wish = Wish(
        tolerance, cost, entries, metric, menu, where, pooling, seed, progress, None if state is None else Path(state)
    )
    return make_plan(model, batches, wish)
