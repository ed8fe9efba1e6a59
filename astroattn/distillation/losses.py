"""What distillation makes small: of every layer by itself, or of the model as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from astroattn.attention import AstrocyteAttention
from astroattn.distillation.rows import QUERIES, log_rows, softmax_rows
from astroattn.fidelity.calls import AttentionCall
from astroattn.fidelity.passes import Outputs, forward, token_mask

OfLayer = Callable[[AstrocyteAttention, AttentionCall, torch.Generator], Tensor]
OfModel = Callable[[nn.Module, nn.Module, Any], Tensor]  # of the model, the original and the inputs


def divergence(module: AstrocyteAttention, call: AttentionCall, generator: torch.Generator) -> Tensor:
    """KL(softmax attention || the module's) in nats, mean over heads and queries that are real tokens.

    Of each sequence `QUERIES` queries are drawn.
    """
    real, queries = call.real_queries(), None
    if real.shape[1] > QUERIES:
        draw = torch.rand(real.shape, generator=generator).to(real.device)
        queries = draw.masked_fill(~real, -1).topk(QUERIES)[1]
        real = real.gather(1, queries)
    with torch.no_grad():
        target = softmax_rows(call, queries)
    rows = (torch.xlogy(target, target) - target * log_rows(module, call, queries)).sum(-1)
    return rows.transpose(1, 2)[real].mean()


def output_error(module: AstrocyteAttention, call: AttentionCall, generator: torch.Generator) -> Tensor:
    """||output - softmax attention's||^2 / ||softmax attention's||^2, over queries that are real tokens."""
    real = call.real_queries()
    with torch.no_grad():
        softmax = AstrocyteAttention(module.num_heads, module.head_dim)
        softmax.exact = True
        truth = softmax(*call[:3], **call.options).transpose(1, 2)[real]
    out = module(*call[:3], **call.options).transpose(1, 2)[real]
    error: Tensor = (out - truth).square().sum() / truth.square().sum()
    return error


def output_loss(model: nn.Module, original: nn.Module, inputs: Any) -> Tensor:
    """The error of the last hidden states plus the divergence of the logits, of those that the model has.

    ||h - h_original||^2 / ||h_original||^2 over the real tokens of the batch, and the mean of
    KL(softmax(logits_original) || softmax(logits)) over items, or over real tokens where each has a prediction.
    """
    ours, theirs = _both(model, original, inputs)
    losses = []
    if theirs.hidden is not None and ours.hidden is not None:
        hidden, target = (_real(x, inputs) for x in (ours.hidden, theirs.hidden))
        losses.append((hidden - target).square().sum() / target.square().sum())
    if theirs.logits is not None and ours.logits is not None:
        losses.append(_divergence(ours.logits, theirs.logits, inputs))
    if not losses:
        raise ValueError(f"loss: 'end_to_end', but {type(model).__name__} gives neither last hidden states nor logits")
    return torch.stack(losses).sum()


def cosine_loss(model: nn.Module, original: nn.Module, inputs: Any) -> Tensor:
    """1 - the cosine of the last hidden states, mean over real tokens."""
    ours, theirs = _both(model, original, inputs)
    if theirs.hidden is None or ours.hidden is None:
        raise ValueError(f"loss: 'cosine', but {type(model).__name__} gives no last hidden states")
    return 1 - F.cosine_similarity(_real(ours.hidden, inputs), _real(theirs.hidden, inputs), dim=-1).mean()


def logits_loss(model: nn.Module, original: nn.Module, inputs: Any) -> Tensor:
    """KL(softmax(logits_original) || softmax(logits)) in nats, mean over items, or real tokens where each has one."""
    ours, theirs = _both(model, original, inputs)
    if theirs.logits is None or ours.logits is None:
        raise ValueError(f"loss: 'logits', but {type(model).__name__} gives none")
    return _divergence(ours.logits, theirs.logits, inputs)


OF_LAYERS: dict[str, OfLayer] = {"rows": divergence, "outputs": output_error}
OF_MODEL: dict[str, OfModel] = {"end_to_end": output_loss, "cosine": cosine_loss, "logits": logits_loss}


@torch.no_grad()
def has_outputs(original: nn.Module, inputs: Any) -> bool:
    """Whether a model gives something that `output_loss` compares."""
    outputs = forward(original, inputs)
    return outputs.hidden is not None or outputs.logits is not None


def _both(model: nn.Module, original: nn.Module, inputs: Any) -> tuple[Outputs, Outputs]:
    with torch.no_grad():
        theirs = forward(original, inputs)
    return forward(model, inputs), theirs


def _divergence(ours: Tensor, theirs: Tensor, inputs: Any) -> Tensor:
    log_ours, log_theirs = (_real(x, inputs).log_softmax(-1) for x in (ours, theirs))
    return (log_theirs.exp() * (log_theirs - log_ours)).sum(-1).mean()


def _real(x: Tensor, inputs: Any) -> Tensor:
    """The vectors of real tokens [R, D], or of all tokens or items where there is no padding mask over them."""
    mask = token_mask(inputs)
    return (x[mask.to(x.device)] if mask is not None and x.shape[:2] == mask.shape else x.flatten(0, -2)).float()
