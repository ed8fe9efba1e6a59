"""What the front-ends share: an attention call, the record kept on a patched module, and who answers the call."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from astroattn.attention import AstrocyteAttention

if TYPE_CHECKING:
    from astroattn.patching.grid import PatchGrid

RECORD = "astroattn_site"  # the attribute of a patched module that holds its Site
CORE = "astrocyte"  # the attribute that holds its AstrocyteAttention

NO_GRID = "patch grid not found: tokens are treated as a sequence"
DROPOUT = "attention dropout is not applied: an astrocyte forms no attention weights to drop"


@dataclass
class Call:
    """One attention call as the host made it; `[B, H, N, D]` throughout, grouped key heads already repeated.

    `refusal` says what of it an astrocyte cannot represent, so that the host's own attention must answer.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None = None
    causal: bool = False
    scale: float | None = None
    dropout: float = 0.0
    grid: tuple[int, int] | None = None
    refusal: str | None = None


@dataclass
class Seen:
    """What the probe forward saw of one call: its shapes, and how far plain softmax in our words is from the host."""

    refusal: str | None
    shape: tuple[int, int] = (0, 0)  # heads, head dimension
    dtype: torch.dtype = torch.float32
    queries: int = 0
    causal: bool = False
    difference: float = 0.0


@dataclass(eq=False)
class Site:
    """The record kept on a patched module. One subclass per front-end; each knows how to take hold of a module.

    It holds plain values and modules only, so that a patched model can be copied and pickled.
    """

    name: str
    class_name: str
    grid: PatchGrid | None = None
    fallbacks: Counter[str] = field(default_factory=Counter)  # calls the host answered, by reason
    seen: list[Seen] | None = None  # a list during the probe forward

    def __post_init__(self) -> None:
        from astroattn.patching.record import keep_records  # which reads sites

        keep_records()  # what it is on may be saved by transformers

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.__post_init__()

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        """Whether this front-end can take hold of modules of this class."""
        raise NotImplementedError

    @classmethod
    def refusal(cls, name: str, module: nn.Module) -> str | None:
        """Why a claimed module must stay exact, as far as can be told without running it."""
        raise NotImplementedError

    @classmethod
    def shape(cls, module: nn.Module) -> tuple[int, int] | None:
        """Heads and head dimension as the module's attributes give them, None if they do not."""
        raise NotImplementedError

    @classmethod
    def is_causal(cls, module: nn.Module) -> bool:
        """Whether the module says of itself that it is causal."""
        return False

    @classmethod
    def sees_patches(cls, module: nn.Module) -> bool:
        """Whether the tokens of the module may be the patches of an image."""
        return False

    @classmethod
    def settle(cls, model: nn.Module) -> None:
        """Make what belongs to the whole model agree with the sites that are now in it."""

    def take(self, module: nn.Module) -> None:
        """Take hold of the module."""
        raise NotImplementedError

    def release(self, module: nn.Module) -> None:
        """Undo `take`."""
        raise NotImplementedError


def install(site: Site, module: nn.Module, core: AstrocyteAttention) -> None:
    """Hang the site and its astrocyte on the module."""
    setattr(module, RECORD, site)
    setattr(module, CORE, core)
    site.take(module)


def remove(module: nn.Module) -> None:
    """Undo `install`."""
    site: Site = getattr(module, RECORD)
    site.release(module)
    delattr(module, CORE)
    delattr(module, RECORD)


def site_of(module: nn.Module) -> Site | None:
    """The site of a patched module, None for any other."""
    return getattr(module, RECORD, None)


def replaced_forward(module: nn.Module) -> str | None:
    """Why a class cannot be swapped where an instance has a forward of its own, which would be run instead."""
    return "its forward was replaced on the instance (accelerate's hooks do so)" if "forward" in vars(module) else None


def attend(module: nn.Module, call: Call, host: Callable[[], Tensor]) -> Tensor:
    """Answer one call `[B, H, Nq, Dv]`: by the astrocyte, or by the host where the call cannot be represented."""
    site: Site = getattr(module, RECORD)
    core: AstrocyteAttention = getattr(module, CORE)
    if site.seen is not None:
        return _observe(site, core, call, host)
    grid = call.grid
    if grid is None and site.grid is not None:
        grid = site.grid.of(call.query.shape[2])
        if grid is None:
            _count(site, NO_GRID, f"{site.name}: {NO_GRID}")
    refusal = call.refusal
    if grid is not None and (call.key_mask is not None or call.causal):
        refusal = refusal or "a mask over a grid of patches"
    if refusal is not None:
        fall_back(site, refusal)
        return host()
    if call.dropout > 0:
        _count(site, DROPOUT, DROPOUT)
    try:
        answer: Tensor = core(
            call.query,
            call.key,
            call.value,
            key_mask=call.key_mask,
            causal=call.causal,
            scale=call.scale,
            grid=grid,
        )
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise RuntimeError(
            f"{site.name}: torch.vmap does not reach into this astrocyte; loop over the samples"
        ) from error
    return answer


def fall_back(site: Site, reason: str) -> None:
    """Count a call that the host answers, and warn at the first of its kind."""
    if site.seen is not None:
        site.seen.append(Seen(reason))
        return
    _count(site, reason, f"{site.name}: left to the model's own attention: {reason}")


def _count(site: Site, reason: str, message: str) -> None:
    if torch.compiler.is_compiling():
        return  # a graph has no such side effects
    site.fallbacks[reason] += 1
    if site.fallbacks[reason] == 1:
        warnings.warn(message, stacklevel=3)


def _observe(site: Site, core: AstrocyteAttention, call: Call, host: Callable[[], Tensor]) -> Tensor:
    """In the probe forward: let the host answer, and note how far plain softmax on the same call is from it."""
    answer = host()
    assert site.seen is not None
    if call.refusal is not None:
        site.seen.append(Seen(call.refusal))
    else:
        query = call.query
        shape = (query.shape[1], query.shape[-1])
        seen = Seen(None, shape, query.dtype, query.shape[2], call.causal)
        if (core.num_heads, core.head_dim) != seen.shape:
            core = AstrocyteAttention(*seen.shape).to(query.device)  # exact, whatever its config is
        core.exact = True
        ours = core(query, call.key, call.value, key_mask=call.key_mask, causal=call.causal, scale=call.scale)
        core.exact = False
        seen.difference = _difference(answer, ours, call)
        site.seen.append(seen)
    return answer


def _difference(answer: Tensor, ours: Tensor, call: Call) -> float:
    """Largest difference relative to the largest value, over the queries that are real tokens and see one."""
    if answer.shape != ours.shape:
        return float("inf")
    error = (answer - ours).float().abs()
    if call.key_mask is not None and call.query.shape[2] == call.key.shape[2]:
        real = call.key_mask[:, None, :, None]
        error, answer = error.where(real, 0.0), answer.where(real, 0.0)
    difference = error.max() / answer.float().abs().max().clamp_min(1e-12)
    return float(difference) if torch.isfinite(difference) else float("inf")


def key_mask(mask: Tensor | None, batch: int, keys: int) -> tuple[Tensor | None, str | None]:
    """Read an attention mask, broadcastable to `[B, H, Nq, Nk]`, as a mask of keys.

    Returns `(mask [B, Nk] with True for a real token, None)`, or `(None, reason)` where the mask is more than that.
    """
    if mask is None:
        return None, None
    if mask.dim() != 4 or mask.shape[1:3] != (1, 1) or mask.shape[-1] != keys:
        kind = "a dense mask" if mask.dtype == torch.bool else "a dense mask or bias"
        return None, f"{kind} over queries and keys, which is more than a padding mask"
    if mask.dtype != torch.bool:
        real = mask == 0
        hidden = mask <= torch.finfo(mask.dtype).min
        plain = (real | hidden).all()
        if torch.compiler.is_compiling():
            torch._assert_async(plain, "astroattn: a float mask over keys may only hold 0 and -inf")
        elif not plain:
            return None, "a bias on keys, which is more than a padding mask"
        mask = real
    return mask[:, 0, 0, :].expand(batch, keys), None
