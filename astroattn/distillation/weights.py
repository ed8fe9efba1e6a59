"""Which weights are trained, and at what rates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from astroattn.attention import AstrocyteAttention
from astroattn.hidden import LearnedHidden
from astroattn.patching.record import unwrapped
from astroattn.patching.site import CORE

TRAIN = ("hidden", "qk", "all", "marked")
PAIRS = (("query", "key"), ("q_proj", "k_proj"), ("q_lin", "k_lin"))  # BERT, ViT, ...; Llama, CLIP, ...; DistilBERT
FUSED = {"qkv": 0, "Wqkv": 0, "c_attn": -1}  # to queries, keys and values along that axis: timm; ModernBERT; GPT-2


def parameter_groups(
    model: nn.Module, *, learning_rate: float, hidden_learning_rate: float = 1e-3, weight_decay: float = 0.01
) -> list[dict[str, Any]]:
    """The weights of a model that have requires_grad, as groups of an optimiser: learned hidden layers apart.

    Hidden weights move much further than pretrained ones: they have a rate of their own, and no decay, which would pull
    a neuron away from the tokens it stands for. Of the others vectors (biases, norms) have none either.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    layers = [module for module in model.modules() if isinstance(module, LearnedHidden)]
    hidden = {id(weight) for layer in layers for weight in layer.parameters()}
    kinds: dict[tuple[float, float], list[nn.Parameter]] = {}
    for weight in model.parameters():
        if weight.requires_grad:
            mine = id(weight) in hidden
            decay = 0.0 if mine or weight.dim() < 2 else weight_decay
            kinds.setdefault((hidden_learning_rate if mine else learning_rate, decay), []).append(weight)
    return [{"params": each, "lr": rate, "weight_decay": decay} for (rate, decay), each in kinds.items()]


def in_use(model: nn.Module) -> dict[str, AstrocyteAttention]:
    """The astrocytes of a model by name; of those that adapters of peft have copies of, the active copy."""
    found = {}
    idle: set[int] = set()
    for name, module in model.named_modules():
        active = unwrapped(module)
        if active is not module:
            idle |= {id(each) for each in module.modules()} - {id(each) for each in active.modules()}
        if isinstance(module, AstrocyteAttention) and id(module) not in idle:
            found[name] = module
    return found


def host_weights(
    model: nn.Module, modules: Mapping[str, AstrocyteAttention], train: str
) -> tuple[list[nn.Parameter], dict[nn.Parameter, int]]:
    """The weights besides the hidden layers that `train` names, and the axis of those whose last third (values) stays.

    Raises:
        ValueError: "qk" where a module has no query and key projections that are known here.
    """
    mine = {id(weight) for module in modules.values() for weight in module.parameters()}
    weights = [weight for weight in model.parameters() if id(weight) not in mine and weight.is_floating_point()]
    if train == "all":
        return weights, {}
    if train == "marked":
        return [weight for weight in weights if weight.requires_grad], {}
    if train == "hidden":
        return [], {}
    separate: list[nn.Parameter] = []
    fused: dict[nn.Parameter, int] = {}
    hosts = {id(unwrapped(getattr(each, CORE))): each for each in model.modules() if hasattr(each, CORE)}
    for name, module in modules.items():
        host = hosts.get(id(module), model.get_submodule(name.rpartition(".")[0]))
        found = next((pair for pair in PAIRS if all(_is_projection(host, part) for part in pair)), None)
        together = next((part for part in FUSED if _is_projection(host, part)), None)
        width = 3 * module.num_heads * module.head_dim
        if found is not None:
            separate += [weight for part in found for weight in getattr(host, part).parameters()]
        elif together is not None and all(
            weight.shape[FUSED[together]] == width for weight in getattr(host, together).parameters()
        ):
            fused |= dict.fromkeys(getattr(host, together).parameters(), FUSED[together])
        else:
            known = ", ".join([*("/".join(pair) for pair in PAIRS), *FUSED])
            raise ValueError(
                f"train: 'qk', but {name.rpartition('.')[0] or 'the model'} ({type(host).__name__}) has no query and "
                f"key projections by a known name ({known}); use 'hidden', 'all' or 'marked'"
            )
    return [*separate, *fused], fused


@contextmanager
def only_these_train(
    model: nn.Module, trained: list[nn.Parameter], fused: Mapping[nn.Parameter, int]
) -> Iterator[None]:
    """A block in evaluation mode where only these weights have gradients; of the fused ones, not the values' third."""
    flags = {weight: weight.requires_grad for weight in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    chosen = set(trained)
    try:
        model.eval()
        for weight in flags:
            if weight.is_floating_point():
                weight.requires_grad_(weight in chosen)
        handles = [weight.register_hook(_WithoutValues(axis)) for weight, axis in fused.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
    finally:
        for weight, flag in flags.items():
            weight.requires_grad_(flag)
        for weight in chosen:
            weight.grad = None
        for module, mode in modes.items():
            module.training = mode


def _is_projection(host: nn.Module, name: str) -> bool:
    """Whether a module has such a layer: a `Linear`, or the one of transformers that has its weight transposed."""
    layer = getattr(host, name, None)
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


class _WithoutValues:
    """The gradient of a fused projection, zero for the values."""

    def __init__(self, axis: int) -> None:
        self.axis = axis

    def __call__(self, gradient: Tensor) -> Tensor:
        kept = torch.ones_like(gradient)
        size = kept.shape[self.axis] // 3
        kept.narrow(self.axis, 2 * size, size).zero_()
        return gradient * kept
