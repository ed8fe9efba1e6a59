"""Which attention modules a model has, which of them can be taken over, and which of them are meant."""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from astroattn.attention import AstrocyteAttention
from astroattn.patching.handwritten import ATTENTION_CLASS, HandwrittenSite
from astroattn.patching.mha import MhaSite
from astroattn.patching.sdpa import POOLING, SdpaSite
from astroattn.patching.site import WINDOW, Site, site_of

Where = int | str | Sequence[int] | Sequence[str] | Callable[[str, nn.Module], bool]

POOLING_CLASS = re.compile("pooling", re.IGNORECASE)  # of the module around the attention
WINDOW_CLASS = re.compile("window", re.IGNORECASE)
UNKNOWN = (
    "no softmax in the code of this attention class; if a function that it calls has one, name the class with "
    "astroattn.register before patching"
)


@dataclass
class Found:
    """An attention module of a model. `front_end` is None and `refusal` a text where none can take it over."""

    name: str
    module: nn.Module
    front_end: type[Site] | None
    refusal: str | None
    crosses: bool = False

    @property
    def is_self_attention(self) -> bool:
        """False for cross attention and pooling, which the indices of `where` pass over."""
        return not (self.crosses or (self.refusal or "").startswith("one query"))


def survey(model: nn.Module) -> list[Found]:
    """Every attention module of the model, in module order."""
    found = []
    available = front_ends()
    ours = {id(part) for each in model.modules() if isinstance(each, AstrocyteAttention) for part in each.modules()}
    for name, module in model.named_modules():
        if id(module) in ours:
            continue
        site = site_of(module)
        front_end = type(site) if site else next((each for each in available if each.claims(module)), None)
        if site is None and front_end is HandwrittenSite and _holds_claimed(available, module):
            continue  # its own softmax is not that of its attention
        if front_end is not None:
            parent = type(model.get_submodule(name.rpartition(".")[0])).__name__
            refusal = POOLING if POOLING_CLASS.search(parent) else front_end.refusal(name, module)
            crosses = site.cross if site else front_end.crosses(name, module)
            found.append(Found(name, module, front_end, None if site else refusal, crosses))
        elif ATTENTION_CLASS.search(type(module).__name__) and not _wraps_attention(available, module):
            window = WINDOW_CLASS.search(type(module).__name__)
            found.append(Found(name, module, None, WINDOW if window else UNKNOWN))
    return found


def reads_in_order(model: nn.Module, found: list[Found], cross: Found) -> bool:
    """Whether the tokens that ask in cross attention come in order: the self-attention nearest to it is causal.

    Of an encoder and decoder of words it may be so in calls that are not made here, as of PyTorch's own decoder.
    """
    parts = cross.name.split(".")
    around = [".".join(parts[:depth]) for depth in reversed(range(len(parts)))]  # the nearest first
    for module in map(model.get_submodule, around):
        if isinstance(module, nn.TransformerDecoderLayer) or _translates(getattr(module, "config", None)):
            return True
    for name in around:
        beside = [each for each in found if not each.crosses and (not name or each.name.startswith(f"{name}."))]
        if beside:
            return any(_is_causal(each) for each in beside)
    return cross.front_end is not None and cross.front_end.is_causal(cross.module)


def _translates(config: object) -> bool:
    """Whether a config is that of an encoder and a decoder of words."""
    words = any(name.endswith("vocab_size") for name in getattr(config, "__dict__", {}))
    return words and getattr(config, "is_encoder_decoder", False) is True


def _is_causal(each: Found) -> bool:
    """Whether an attention module is causal: as the probe has seen it, else as the module says."""
    site = site_of(each.module)
    if site is not None and site.seen:
        return any(seen.causal or seen.refusal is not None for seen in site.seen)
    return each.front_end is not None and each.front_end.is_causal(each.module)


def front_ends() -> list[type[Site]]:
    """The front-ends that can matter: a model of a library exists only where the library was imported."""
    available: list[type[Site]] = [SdpaSite, MhaSite, HandwrittenSite]  # the last reads what no other knows
    if "transformers.modeling_utils" in sys.modules:
        from astroattn.patching.interface import InterfaceSite

        available.insert(0, InterfaceSite)
    return available


def _wraps_attention(available: list[type[Site]], module: nn.Module) -> bool:
    """Whether an attention module lies below this one."""
    named = any(ATTENTION_CLASS.search(type(child).__name__) for child in module.modules() if child is not module)
    return named or _holds_claimed(available, module)


def _holds_claimed(available: list[type[Site]], module: nn.Module) -> bool:
    """Whether a module that a front-end knows lies below this one."""
    return any(each.claims(child) for child in module.modules() if child is not module for each in available)


def select(found: list[Found], where: Where | None) -> list[Found]:
    """The modules that `where` means.

    Raises:
        TypeError: `where` is of none of the kinds allowed.
        ValueError: a part of `where` matches no attention module; it is named.
    """
    if where is None:
        return found
    if callable(where):
        chosen = [each for each in found if where(each.name, each.module)]
        if not chosen:
            raise ValueError(f"where: the predicate {where!r} holds for none of {len(found)} attention modules")
        return chosen
    if not isinstance(where, (int, str, Iterable)):
        raise TypeError(f"where: expected indices, name patterns or a predicate, got {type(where).__name__}")
    parts: list[object] = [where] if isinstance(where, (int, str)) else list(where)
    if not parts:
        raise ValueError("where: an empty sequence selects no attention module")
    ids = {id(each) for part in parts for each in _match(found, part)}
    return [each for each in found if id(each) in ids]


def _match(found: list[Found], part: object) -> list[Found]:
    if isinstance(part, bool) or not isinstance(part, (int, str)):
        raise TypeError(f"where: {part!r} is neither an index nor a name pattern, nor is it a predicate(name, module)")
    if isinstance(part, int):
        indexed = [each for each in found if each.is_self_attention]
        if not -len(indexed) <= part < len(indexed):
            raise ValueError(f"where: index {part} is out of range for {len(indexed)} self-attention modules")
        return [indexed[part]]
    chosen = [each for each in found if fnmatch.fnmatchcase(each.name, part)]
    if not chosen:
        names = ", ".join(each.name for each in found[:3])
        raise ValueError(f"where: {part!r} matches none of {len(found)} attention modules ({names}, ...)")
    return chosen
