"""What each config of the menu would do to the output if one head had it, and what it would cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from astroattn.attention import AstrocyteAttention
from astroattn.config import AstroConfig
from astroattn.cost import Cost
from astroattn.fidelity.calls import AttentionCall, find_astrocytes, read_call
from astroattn.fidelity.passes import Outputs, forward, frame_mask, is_speech, pool, token_mask
from astroattn.models import FRAME_MASK
from astroattn.ops.noting import ExactKeys, listening

DIRECTIONS = 8  # random directions of the output, per item


class Measured(NamedTuple):
    """Of one item, over the heads T of all modules: effects and products of each of C configs [C, T]; softmax's [T]."""

    effect: Tensor
    products: Tensor
    softmax: Tensor


class Noted(NamedTuple):
    """One attention call of the original, and its output."""

    name: str
    call: AttentionCall
    output: Tensor


class NotDifferentiable(Exception):
    """The output of the model has no gradient; the message says why."""


@contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """A block in which the astrocytes of a model are softmax attention, and the model what it was before patching."""
    cores = find_astrocytes(model).values()
    for core in cores:
        core.exact = True
    try:
        yield
    finally:
        for core in cores:
            core.exact = False


@contextmanager
def noted(model: nn.Module) -> Iterator[list[Noted]]:
    """The attention calls inside the block. With gradients enabled every output has one, whatever the weights have."""
    calls: list[Noted] = []

    def hook(name: str) -> Any:
        def note(module: AstrocyteAttention, args: Any, kwargs: Any, output: Tensor) -> None:
            if torch.is_grad_enabled() and not output.requires_grad:
                output.requires_grad_()
            calls.append(Noted(name, read_call(module, args, kwargs), output))

        return note

    handles = [
        core.register_forward_hook(hook(name), with_kwargs=True) for name, core in find_astrocytes(model).items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def measure(
    model: nn.Module, inputs: Any, menu: Sequence[AstroConfig], pooling: str, seed: int, directions: int = DIRECTIONS
) -> Measured:
    """Measure the menu on one item; the last config of the menu is exact attention.

    The effect of a head is the mean over directions v ~ N(0, I) of (g . (o_config - o))^2, where o is its output in the
    original and g the gradient of v . y. With `directions` 0 it is |o_config - o|^2 / |o|^2.

    Raises:
        NotDifferentiable: `directions` is not 0, and the model has no gradient.
    """
    with exact(model), noted(model) as calls, torch.set_grad_enabled(directions > 0):
        outputs = forward(model, inputs)
    gradients = _gradients(_reading(model, inputs, outputs, pooling), calls, seed, directions) if directions else []
    modules = find_astrocytes(model)
    parts = []
    with torch.no_grad():
        for name, module in modules.items():
            mine = [number for number, each in enumerate(calls) if each.name == name]
            slopes = [[slope[number] for slope in gradients] for number in mine]
            parts.append(_measure_module(module, [calls[number] for number in mine], slopes, menu))
    return Measured(*(torch.cat(part, -1) for part in zip(*parts, strict=True)))


def _measure_module(
    module: AstrocyteAttention, calls: list[Noted], slopes: list[list[Tensor]], menu: Sequence[AstroConfig]
) -> Measured:
    heads = module.num_heads
    effect = torch.zeros(len(menu), heads, dtype=torch.float64)
    products = torch.zeros(len(menu), heads, dtype=torch.float64)
    softmax = torch.zeros(heads, dtype=torch.float64)
    for _, call, _ in calls:
        softmax += sum(queries * keys * 2.0 for _, queries, keys in _lengths(call))
    for number, config in enumerate(menu):
        if config.hidden == "exact":
            products[number] = softmax
            continue
        core = AstrocyteAttention(heads, module.head_dim, config)
        try:
            effect[number], told = _effect(core, calls, slopes)
        except ValueError:  # a call that this config cannot serve
            effect[number], products[number] = torch.inf, softmax
            continue
        for (_, call, _), found in zip(calls, told, strict=True):
            decided = found[0].numbers().tolist() if found else None  # by sequence and head
            for row, queries, keys in _lengths(call):
                known = (
                    [{}] if decided is None else [{config: each} for each in decided[row]]
                )  # one for all heads, or each
                costs = [_cost(core, call, queries, keys, exact).products for exact in known]
                products[number] += queries * torch.tensor(costs, dtype=torch.float64)
    return Measured(effect.nan_to_num(torch.inf, torch.inf), products, softmax)


def _effect(
    core: AstrocyteAttention, calls: list[Noted], slopes: list[list[Tensor]]
) -> tuple[Tensor, list[list[ExactKeys]]]:
    """[H], several calls of a module act together; and what each call has decided, if its inputs decide."""
    told: list[list[ExactKeys]] = []
    signed = torch.zeros(max(map(len, slopes), default=0), core.num_heads, dtype=torch.float64)
    error, norm = torch.zeros(2, core.num_heads, dtype=torch.float64)
    for (_, call, output), mine in zip(calls, slopes, strict=True):
        padding = ~call.real_queries()[:, None, :, None]
        original = output.detach().float().masked_fill(padding, 0)
        told.append([])
        with listening(told[-1].append):
            answer = core(call.query, call.key, call.value, **call.options)
        change = answer.float().masked_fill(padding, 0) - original
        for number, slope in enumerate(mine):
            signed[number] += (slope.float() * change).sum((0, 2, 3)).double().cpu()
        error += change.square().sum((0, 2, 3)).double().cpu()
        norm += original.square().sum((0, 2, 3)).double().cpu()
    return (signed.square().mean(0) if len(signed) else error / norm.clamp_min(1e-30)), told


def _lengths(call: AttentionCall) -> list[tuple[int, int, int]]:
    """The place of each sequence that is not all padding, and how many queries and keys are real tokens."""
    (batch, _, queries, _), keys = call.query.shape, call.key.shape[2]
    mask = call.options.get("key_mask")
    real = [keys] * batch if mask is None else mask.sum(1).tolist()
    asked = [queries if call.cross else min(queries, count) for count in real]
    return [(row, number, count) for row, (number, count) in enumerate(zip(asked, real, strict=True)) if count]


def _cost(
    core: AstrocyteAttention, call: AttentionCall, queries: int, keys: int, exact_keys: dict[AstroConfig, float]
) -> Cost:
    options = {name: call.options.get(name) for name in ("grid", "window", "cross")}
    return core.cost(queries, keys, causal=call.options.get("causal", False), exact_keys=exact_keys, **options)


def _gradients(reading: Tensor, calls: list[Noted], seed: int, directions: int) -> list[list[Tensor]]:
    """For every direction, the gradient at the output of every call."""
    generator = torch.Generator().manual_seed(seed)
    outputs = [call.output for call in calls]
    gradients = []
    try:
        for _ in range(directions):
            direction = torch.randn(reading.shape, generator=generator).to(reading)
            found = torch.autograd.grad((direction * reading).sum(), outputs, retain_graph=True, allow_unused=True)
            pairs = zip(found, outputs, strict=True)
            gradients.append([torch.zeros_like(output) if each is None else each for each, output in pairs])
    except RuntimeError as error:
        raise NotDifferentiable(str(error).strip().splitlines()[0]) from None
    return gradients


def _reading(model: nn.Module, inputs: Any, outputs: Outputs, pooling: str) -> Tensor:
    """What of the output counts: log-softmax logits, else the unit embedding, else the last hidden states.

    Predictions of tokens, of a whole vocabulary, count by the root of their probability: half the mean square of v . dy
    then is their KL divergence, to second order.
    """
    mask = token_mask(inputs)
    if outputs.logits is not None:
        logits = outputs.logits.float().log_softmax(-1)
        if logits.ndim == 2:
            return logits
        logits = logits * logits.detach().mul(0.5).exp()
        return logits if mask is None else logits.masked_fill(~mask[..., None], 0)
    if (states := frames(inputs, outputs)) is not None:
        return F.normalize(states.flatten(1), dim=-1)
    embedding = pool(model, outputs, mask, pooling)
    if embedding is None:
        raise ValueError(f"model: {type(model).__name__} gives neither logits nor last hidden states")
    return F.normalize(embedding, dim=-1)


def frames(inputs: Any, outputs: Outputs) -> Tensor | None:
    """Of recordings, the last hidden states [B, N, D], zero where there is padding; None for other inputs."""
    states = outputs.hidden
    if states is None or not is_speech(inputs):
        return None
    states = states.float()
    for name in ("attention_mask", FRAME_MASK):
        real = frame_mask(inputs, name, states.shape[1])
        if real is not None:
            states = states.masked_fill(~real[..., None], 0)
    return states
