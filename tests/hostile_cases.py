"""Shared by the tests of hostile use: one model for every way of taking hold of attention, and all that it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from patching_models import ALL, build, image, text
from torch import Tensor, nn

from astroattn import AstroConfig, AstrocyteAttention

SHORT = AstroConfig(near=2, exact_keys=2, tile=4, num_hidden=4)
STATIC = AstroConfig(hidden="random", near=2)
LEARNED = AstroConfig(hidden="learned", num_hidden=4)
FULL = AstroConfig(hidden="random", near=4096)
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def encoder() -> nn.Module:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    for parameter in model.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "bert": (lambda: build(ALL["bert"]), text),
    "vit": (lambda: build(ALL["vit"]), lambda: {"pixel_values": image()}),
    "timm vit": (lambda: build(ALL["timm vit"]), lambda: {"x": image()}),
    "torch": (encoder, lambda: {"src": torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(1))}),
}


def answer(model: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    """The first output, at real tokens."""
    result = model(**inputs)
    tensor = result if isinstance(result, Tensor) else result[0]
    return tensor[inputs["attention_mask"].bool()] if "attention_mask" in inputs else tensor


def cores(model: nn.Module) -> list[AstrocyteAttention]:
    return [module for module in model.modules() if isinstance(module, AstrocyteAttention)]


def fingerprint(model: nn.Module) -> list[Any]:
    """Everything of a model but its weights: classes, attributes, hooks, flags and what its configs say."""
    return [
        (
            name,
            type(module),
            sorted(vars(module)),
            [len(getattr(module, hooks)) for hooks in HOOKS],
            module.training,
            getattr(module, "fused_attn", None),
            getattr(module, "use_nested_tensor", None),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
        )
        for name, module in model.named_modules()
    ]
