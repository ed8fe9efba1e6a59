"""How far the outputs of a patched model are from those of the original."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from astroattn.fidelity.passes import forward, token_mask


def output_loss(model: nn.Module, original: nn.Module, inputs: Any) -> Tensor:
    """The error of the last hidden states plus the divergence of the logits, of those that the model has.

    ||h - h_original||^2 / ||h_original||^2 over the real tokens of the batch, and the mean of
    KL(softmax(logits_original) || softmax(logits)) over items, or over real tokens where each has a prediction.
    """
    with torch.no_grad():
        theirs = forward(original, inputs)
    ours, mask = forward(model, inputs), token_mask(inputs)
    losses = []
    if theirs.hidden is not None and ours.hidden is not None:
        hidden, target = (_real(x, mask).float() for x in (ours.hidden, theirs.hidden))
        losses.append((hidden - target).square().sum() / target.square().sum())
    if theirs.logits is not None and ours.logits is not None:
        log_ours, log_theirs = (_real(x, mask).float().log_softmax(-1) for x in (ours.logits, theirs.logits))
        losses.append((log_theirs.exp() * (log_theirs - log_ours)).sum(-1).mean())
    return torch.stack(losses).sum()


@torch.no_grad()
def has_outputs(original: nn.Module, inputs: Any) -> bool:
    """Whether the model gives something that `output_loss` compares."""
    outputs = forward(original, inputs)
    return outputs.hidden is not None or outputs.logits is not None


@torch.no_grad()
def mean_output_loss(model: nn.Module, original: nn.Module, batches: Sequence[Any]) -> float:
    """The mean of `output_loss` over batches."""
    return torch.stack([output_loss(model, original, inputs) for inputs in batches]).mean().item()


def _real(x: Tensor, mask: Tensor | None) -> Tensor:
    """The vectors of real tokens [R, D], or of all tokens or items where there is no padding mask over them."""
    return x[mask.to(x.device)] if mask is not None and x.shape[:2] == mask.shape else x.flatten(0, -2)
