"""Classes that call `torch.nn.functional.scaled_dot_product_attention` themselves: those of timm and of diffusers.

The class of a module is swapped for a subclass that runs the original forward under a TorchFunctionMode, which hands
that one call to the astrocyte. Projections, norms, gates and rotary embeddings stay the class's own code. Classes are
named here, not imported: a module of such a class cannot exist unless its library was imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from astroattn.checks import check_traceable
from astroattn.ops.layout import plain
from astroattn.patching.dense_masks import read_mask
from astroattn.patching.site import (
    RECORD,
    STRIDED,
    WINDOW,
    Call,
    Site,
    attend,
    fall_back,
    methods,
    names_in,
    replaced_forward,
    unequal,
)
from astroattn.patching.swapped import put_over, take_off

# Global self-attention over all tokens, and how the module's input holds them.
LAYOUTS = {
    "timm.layers.attention.Attention": "tokens",
    "timm.layers.attention.AttentionRope": "tokens",
    "timm.models.beit.Attention": "tokens",
    "timm.models.eva.EvaAttention": "tokens",
    "timm.models.maxxvit.Attention2d": "channels, rows, columns",
    "timm.models.vision_transformer.ParallelScalingBlock": "tokens",
    "timm.models.vision_transformer_relpos.RelPosAttention": "tokens",
    "timm.models.vision_transformer_sam.Attention": "rows, columns, channels",
    "timm.models.metaformer.Attention": "tokens",
    "timm.models.volo.Attention": "rows, columns, channels",
    "timm.models.fastvit.Attention": "channels, rows, columns",
    "timm.models.visformer.Attention": "channels, rows, columns",
    "diffusers.models.attention_processor.Attention": "tokens",
    "diffusers.models.transformers.transformer_flux.FluxAttention": "tokens",
}
CALLS = {"scaled_dot_product_attention", "dispatch_attention_fn"}  # the latter is how diffusers calls it

FUSED = "fused_attn"

POOLING = "one query (attention pooling)"
CHANNELS = "attention over channels, not tokens"
DIFFERENTIAL = "difference of two attention maps"
HAND_WRITTEN = "softmax written out by hand, where scaled_dot_product_attention was expected"

# Attention classes that stay exact, and why.
REFUSALS = {
    "timm.models.maxxvit.AttentionCl": WINDOW,
    "timm.models.tiny_vit.Attention": WINDOW,
    "timm.models.swin_transformer.WindowAttention": WINDOW,
    "timm.models.swin_transformer_v2.WindowAttention": WINDOW,
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": WINDOW,
    "timm.models.hiera.MaskUnitAttention": WINDOW,
    "timm.models.hieradet_sam2.MultiScaleAttention": WINDOW,
    "timm.models.davit.WindowAttention": WINDOW,
    "timm.models.nest.Attention": WINDOW,
    "timm.models.iformer.SHMA": WINDOW,
    "timm.models.twins.LocallyGroupedAttn": WINDOW,
    "timm.models.twins.GlobalSubSampleAttn": STRIDED,
    "timm.models.pvt_v2.Attention": STRIDED,
    "timm.models.nextvit.EfficientAttention": STRIDED,
    "timm.layers.attention2d.MultiQueryAttention2d": STRIDED,
    "timm.layers.attention_pool.AttentionPoolLatent": POOLING,
    "timm.layers.attention_pool2d.AttentionPool2d": POOLING,
    "timm.layers.attention_pool2d.RotAttentionPool2d": POOLING,
    "timm.models.cait.ClassAttn": POOLING,
    "timm.models.volo.ClassAttention": POOLING,
    "timm.models.xcit.XCA": CHANNELS,
    "timm.models.davit.ChannelAttention": CHANNELS,
    "timm.models.davit.ChannelAttentionV2": CHANNELS,
    "timm.models.edgenext.CrossCovarianceAttn": CHANNELS,
    "timm.layers.diff_attention.DiffAttention": DIFFERENTIAL,
    "timm.models.vision_transformer.DiffParallelScalingBlock": DIFFERENTIAL,
    "timm.models.crossvit.CrossAttention": POOLING,
    "timm.models.cait.TalkingHeadAttn": HAND_WRITTEN,
}


@dataclass(eq=False)
class SdpaSite(Site):
    """A module whose forward calls `F.scaled_dot_product_attention` once."""

    fused: bool | None = None  # the module's fused_attn before it was patched

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        return known_class(type(module)) is not None

    @classmethod
    def refusal(cls, name: str, module: nn.Module) -> str | None:
        if (reason := REFUSALS.get(known_class(type(module)) or "")) is not None:
            return reason
        parts = (module, getattr(module, "processor", None))  # where diffusers has it
        own = not any(CALLS & names_in(each.__code__) for part in parts for each in methods(type(part)))
        return HAND_WRITTEN if own else replaced_forward(module)

    @classmethod
    def crosses(cls, name: str, module: nn.Module) -> bool:
        return getattr(module, "is_cross_attention", False) is True

    @classmethod
    def shape(cls, module: nn.Module) -> tuple[int, int] | None:
        heads = getattr(module, "num_heads", None) or getattr(module, "heads", None)
        head_dim = getattr(module, "head_dim", None)
        if head_dim is None and heads and isinstance(width := getattr(module, "inner_dim", None), int):
            head_dim = width // heads
        if head_dim is None and heads and isinstance(qkv := getattr(module, "qkv", None), nn.Linear):
            head_dim = qkv.out_features // (3 * heads)
        return (heads, head_dim) if heads and head_dim else None

    @classmethod
    def sees_patches(cls, module: nn.Module) -> bool:
        return LAYOUTS.get(known_class(type(module)) or "") == "tokens"

    def take(self, module: nn.Module) -> None:
        self.fused = getattr(module, FUSED, None)
        put_over(module, run)
        if self.fused is not None:
            setattr(module, FUSED, True)  # the other branch writes the softmax out by hand

    def release(self, module: nn.Module) -> None:
        take_off(module)
        if self.fused is not None:
            setattr(module, FUSED, self.fused)


class Reroute(TorchFunctionMode):
    """While active, hands calls of `F.scaled_dot_product_attention` to a module's astrocyte."""

    def __init__(self, module: nn.Module, grid: tuple[int, int] | None, calls: list[Call]) -> None:
        super().__init__()
        self.module = module
        self.grid = grid
        self.calls = calls  # those handed over

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        query = args[0] if args else kwargs["query"]
        check_traceable(query)
        joined = query.dim() == 3  # batch and heads in one axis
        if joined:
            args = tuple(map(self._with_heads, args))
            kwargs = {name: self._with_heads(value) for name, value in kwargs.items()}
        call = _read(getattr(self.module, RECORD), *args, **kwargs)
        call.grid = self.grid
        self.calls.append(call)
        output = attend(self.module, call, lambda: function(*args, **kwargs))
        return output.flatten(0, 1) if joined else output

    def _with_heads(self, value: Any) -> Any:
        heads = self.module.num_heads
        return value.unflatten(0, (-1, heads)) if isinstance(value, Tensor) and value.dim() == 3 else value


def _read(
    site: Site,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Call:
    """A call of `F.scaled_dot_product_attention`, in our words."""
    mask = read_mask(attn_mask, query.shape[0], key.shape[-2], site.expected)
    refusal = mask.refusal or (None if site.cross else unequal(query.shape[-2], key.shape[-2]))
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    call = Call(query, key, value, mask.real, is_causal or mask.causal, scale, dropout_p, refusal=refusal)
    call.documents, call.bias = mask.documents, mask.bias
    return call


def run(base: type[nn.Module], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward of a patched module: that of its class, with its scores left to the astrocyte."""
    calls: list[Call] = []
    with Reroute(module, _grid(LAYOUTS[known_class(base) or ""], args), calls):
        output = base.forward(module, *args, **kwargs)
    if not calls:
        fall_back(getattr(module, RECORD), "scaled_dot_product_attention was not called")
    return output


def _grid(layout: str, args: tuple[Any, ...]) -> tuple[int, int] | None:
    if layout == "tokens" or not args:
        return None
    axes = layout.split(", ")
    shape = args[0].shape[1:]
    return plain(shape[axes.index("rows")]), plain(shape[axes.index("columns")])


def known_class(cls: type) -> str | None:
    """The name of the first class of the tables above that this one is or comes from, None for any other."""
    for base in cls.__mro__:  # no next(): PyTorch 2.8 cannot compile it with a default
        name = f"{base.__module__}.{base.__qualname__}"
        if name in LAYOUTS or name in REFUSALS:
            return name
    return None
