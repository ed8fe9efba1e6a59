"""Which weights end-to-end distillation moves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from astroattn.attention import AstrocyteAttention

TRAIN = ("hidden", "qk", "all", "marked")
PAIRS = (("query", "key"), ("q_proj", "k_proj"), ("q_lin", "k_lin"))  # BERT, ViT, ...; Llama, CLIP, ...; DistilBERT
FUSED = ("qkv", "Wqkv")  # one projection to queries, keys and values, in this order: timm; ModernBERT


def host_weights(
    model: nn.Module, modules: Mapping[str, AstrocyteAttention], train: str
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The weights besides the hidden layers that `train` names, and those of them whose last third (values) stays.

    Raises:
        ValueError: "qk" where a module has no query and key projections that are known here.
    """
    mine = {id(weight) for module in modules.values() for weight in module.parameters()}
    weights = [weight for weight in model.parameters() if id(weight) not in mine and weight.is_floating_point()]
    if train == "all":
        return weights, []
    if train == "marked":
        return [weight for weight in weights if weight.requires_grad], []
    if train == "hidden":
        return [], []
    separate: list[nn.Parameter] = []
    fused: list[nn.Parameter] = []
    for name, module in modules.items():
        host_name = name.rpartition(".")[0]
        host = model.get_submodule(host_name)
        found = next((pair for pair in PAIRS if all(isinstance(getattr(host, x, None), nn.Linear) for x in pair)), None)
        together = next((getattr(host, x) for x in FUSED if isinstance(getattr(host, x, None), nn.Linear)), None)
        if found is not None:
            separate += [weight for x in found for weight in getattr(host, x).parameters()]
        elif together is not None and together.out_features == 3 * module.num_heads * module.head_dim:
            fused += together.parameters()
        else:
            known = ", ".join([*("/".join(pair) for pair in PAIRS), *FUSED])
            raise ValueError(
                f"train: 'qk', but {host_name or 'the model'} ({type(host).__name__}) has no query and key projections "
                f"by a known name ({known}); use 'hidden', 'all' or 'marked'"
            )
    return [*separate, *fused], fused


@contextmanager
def only_these_train(model: nn.Module, trained: list[nn.Parameter], fused: list[nn.Parameter]) -> Iterator[None]:
    """A block in evaluation mode where only these weights have gradients; of the fused ones, not the values' third."""
    flags = {weight: weight.requires_grad for weight in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    chosen = set(trained)
    try:
        model.eval()
        for weight in flags:
            if weight.is_floating_point():
                weight.requires_grad_(weight in chosen)
        handles = [weight.register_hook(_without_values) for weight in fused]
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


def _without_values(gradient: Tensor) -> Tensor:
    """The gradient of a fused projection, zero for the values."""
    kept = torch.ones_like(gradient)
    kept[len(kept) // 3 * 2 :] = 0
    return gradient * kept
