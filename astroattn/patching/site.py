"""What the front-ends share: an attention call, the record kept on a patched module, and who answers the call."""

from __future__ import annotations

import inspect
import re
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from astroattn.attention import AstrocyteAttention
from astroattn.checks import DTYPES, LOST_WEIGHTS, fits_scores
from astroattn.cost import covers
from astroattn.ops.layout import plain
from astroattn.ops.precision import autocast
from astroattn.patching.dense_masks import DENSE, Expected, is_torn
from astroattn.patching.packed import by_document

if TYPE_CHECKING:
    from astroattn.patching.grid import PatchGrid
    from astroattn.patching.streaming import StreamingLayer

RECORD = "astroattn_site"  # the attribute of a patched module that holds its Site
CORE = "astrocyte"  # the attribute that holds its AstrocyteAttention

NOT_HANDED_OVER = "its forward ended without an attention call that could be handed over"
REPLACED = "its forward was replaced on the instance (accelerate's hooks do so); patch the model before that"
# Why modules stay exact, where several front-ends say it.
WINDOW = "attention within small windows, which softmax serves best"
STRIDED = "keys of another length than the queries (pooled or strided), few of them"
UNEQUAL = "keys of another length than the queries (cross attention or a static cache)"
CROSS_NAMES = re.compile(r"encoder_attn|encdec|cross_?att", re.IGNORECASE)  # of modules, in models of all libraries
CROSS_IN_ORDER = (
    "cross attention of tokens that come in order (a decoder): for one at a time softmax costs least, and a tile would "
    "show an earlier one what later ones ask for"
)
NO_GRID = "patch grid not found: tokens are treated as a sequence"
OUT_OF_REACH = {  # by what PyTorch's own error names
    "vmap": "torch.vmap does not reach into this astrocyte; loop over the samples",
    "jvp": "forward derivatives do not reach into this astrocyte; AstroConfig(backend='torch') has them",
}


@dataclass
class Call:
    """One attention call as the host made it; `[B, H, N, D]` throughout, grouped key heads already repeated.

    Only a streaming memory takes grouped key heads as they are. `refusal` says what of the call an astrocyte cannot
    represent, so that the host's own attention must answer.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None = None
    causal: bool = False
    scale: float | None = None
    dropout: float = 0.0
    grid: tuple[int, int] | None = None
    window: int | None = None  # where it ends within the sequence
    sliding_window: int | None = None  # as the host says it, wherever it ends
    sink: Tensor | None = None  # the logit of one more key of each head [H], whose value is zero
    soft_cap: float | None = None  # c, where c tanh(x / c) stands in the place of every logit x
    documents: Tensor | None = None  # [B, N], growing from one document of a row to the next; None: one in each
    bias: Tensor | None = None  # [1 or B, 1 or H, 1 or Nq, Nk], added to the logits
    refusal: str | None = None
    memory: StreamingLayer | None = None  # of the tokens before these
    cross: bool | None = None  # as in `AstrocyteAttention.forward`


@dataclass
class Seen:
    """What the probe forward saw of one call: its shapes, and how far plain softmax in our words is from the host."""

    refusal: str | None
    shape: tuple[int, int] = (0, 0)  # heads, head dimension
    dtype: torch.dtype = torch.float32
    queries: int = 0
    causal: bool = False
    sliding_window: int | None = None
    window_ended: bool = False
    soft_cap: float | None = None
    bias: bool = False
    padding: bool = False
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
    expected: Expected = field(default_factory=Expected)  # what the probe has seen of masks
    cross: bool = False  # whether its queries are those of another sequence than its keys
    finds_cache: ClassVar[bool] = False  # whether it can have a streaming memory in the cache of a call
    remark: str = ""  # what the report says of it
    handles: list[Any] = field(default_factory=list)  # of its hooks on the module, each from the moment it is there

    def __post_init__(self) -> None:
        from astroattn.patching.saving import keep_records  # which reads sites

        keep_records()  # what it is on may be saved by another library

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
    def crosses(cls, name: str, module: nn.Module) -> bool:
        """Whether the queries of a claimed module are those of another sequence than its keys, as far as names say."""
        named = "Cross" in type(module).__name__ or CROSS_NAMES.search(name) is not None
        return named or getattr(module, "is_cross_attention", False) is True

    @classmethod
    def shape(cls, module: nn.Module) -> tuple[int, int] | None:
        """Heads and head dimension as the module's attributes give them, None if they do not."""
        raise NotImplementedError

    @classmethod
    def is_causal(cls, module: nn.Module) -> bool:
        """Whether the module says of itself that it is causal."""
        return getattr(module, "is_decoder", False) is True

    @classmethod
    def sees_patches(cls, module: nn.Module) -> bool:
        """Whether the tokens of the module may be the patches of an image."""
        return False

    @classmethod
    def settle(cls, model: nn.Module) -> None:
        """Make what belongs to the whole model agree with the sites that are now in it."""

    def count(self, reason: str, message: str) -> None:
        """Count one more call of which there is something to say, and say it the first time."""
        self.fallbacks[reason] += 1
        if self.fallbacks[reason] == 1:
            warnings.warn(message, stacklevel=4)

    # What `torch.compiler.assume_constant_result` does without importing the compiler: a graph, which can have no such
    # side effects, counts once, when it is made.
    count._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def take(self, module: nn.Module) -> None:
        """Take hold of the module."""
        raise NotImplementedError

    def release(self, module: nn.Module) -> None:
        """Undo what of `take` was done, but for the hooks."""


def install(site: Site, module: nn.Module, core: AstrocyteAttention) -> None:
    """Hang the site and its astrocyte on the module."""
    setattr(module, RECORD, site)
    setattr(module, CORE, core)
    site.take(module)


def remove(module: nn.Module) -> None:
    """Undo `install`, also one that was broken off half-way."""
    site: Site = getattr(module, RECORD)
    for handle in site.handles:
        handle.remove()
    site.handles.clear()
    site.release(module)
    if hasattr(module, CORE):
        delattr(module, CORE)
    delattr(module, RECORD)


def site_of(module: nn.Module) -> Site | None:
    """The site of a patched module, None for any other."""
    # Its own: wrappers (torch.compile) pass on the attributes of what is in them. PyTorch 2.8 cannot compile vars().
    return module.__dict__.get(RECORD)


def replaced_forward(module: nn.Module) -> str | None:
    """Why a class cannot be swapped where an instance has a forward of its own, which would be run instead."""
    return REPLACED if "forward" in vars(module) else None


def unequal(queries: int, keys: int) -> str | None:
    """Why so many queries cannot read so many keys, None where there is one of each."""
    return None if queries == keys else STRIDED if queries > keys else UNEQUAL


def methods(cls: type) -> list[FunctionType]:
    """What instances of a class run: of a method that a subclass overrides, only what the overriding one calls."""
    found: list[FunctionType] = []
    overridden: set[str] = set()
    for base in cls.__mro__:
        mine = {name: inspect.unwrap(value) for name, value in vars(base).items() if callable(value)}
        functions = [(name, each) for name, each in mine.items() if inspect.isfunction(each) and name not in overridden]
        found += [function for _, function in functions]
        overridden |= {name for name, function in functions if name not in names_in(function.__code__)}
    return found


def names_in(code: CodeType) -> set[str]:
    """The globals and attributes that code names, functions within it included."""
    inner = [each for each in code.co_consts if isinstance(each, CodeType)]
    return set(code.co_names).union(*map(names_in, inner))


def attend(module: nn.Module, call: Call, host: Callable[[], Tensor]) -> Tensor:
    """Answer one call `[B, H, Nq, Dv]`: by the astrocyte, or by the host where the astrocyte may not.

    Here alone it is decided who answers: whatever the host can do, a patched module can.
    """
    site: Site = getattr(module, RECORD)
    core: AstrocyteAttention = getattr(module, CORE)
    if not torch.compiler.is_compiling() and site in _running.handed:
        _running.handed[site] = True
    call.cross = site.cross or None
    if site.seen is not None:
        return _observe(site, core, call, host)
    call.query, call.key, call.value = autocast(call.query, call.key, call.value)
    sees_grid = not site.cross and call.query.dim() == 4 and call.documents is None
    if call.grid is None and site.grid is not None and sees_grid:
        call.grid = site.grid.of(call.query.shape[2])
        if call.grid is None and not all(covers(each, plain(call.key.shape[2]), None) for each in core.configs):
            site.count(NO_GRID, f"{site.name}: {NO_GRID}")
    refusal = call.refusal or _refusal(core, call)
    if refusal is not None and call.memory is not None:
        raise ValueError(
            f"{site.name}: {refusal}; a streaming memory cannot serve this call, and keeps no tokens that the model's "
            "own attention could read"
        )
    if refusal is not None:
        fall_back(site, refusal)
        return core.with_gradients(host())
    if call.dropout > 0:
        call.value = drop_keys(call.value, call.dropout)
    if call.memory is not None:
        options = {name: getattr(call, name) for name in ("key_mask", "scale", "soft_cap")}
        return call.memory.attend(core, call.query, call.key, call.value, **options)
    try:
        answer = _answer(core, call, grid=call.grid)
    except RuntimeError as error:
        why = next((words for name, words in OUT_OF_REACH.items() if name in str(error)), None)
        if why is None:
            raise
        raise RuntimeError(f"{site.name}: {why}") from error
    return answer


def _answer(core: AstrocyteAttention, call: Call, **options: Any) -> Tensor:
    """What an astrocyte makes of a call."""
    options |= {name: getattr(call, name) for name in ("causal", "scale", "window", "sink", "soft_cap")}
    if call.cross:
        options["cross"] = True
    if call.bias is not None:
        options["bias"] = call.bias.expand(-1, -1, call.query.shape[2], -1)

    def of(query: Tensor, key: Tensor, value: Tensor, real: Tensor | None) -> Tensor:
        answer: Tensor = core(query, key, value, key_mask=real, **options)
        return answer

    tokens = (call.query, call.key, call.value)
    if call.documents is None or call.documents.numel() == 0:
        return of(*tokens, call.key_mask)
    return core.with_gradients(by_document(call.documents, call.key_mask, tokens, of))  # there may be nothing to answer


def drop_keys(value: Tensor, p: float) -> Tensor:
    """Attention dropout where no attention weights are formed: the values [B, H, N, D] of dropped keys are zero.

    A weight a_qk becomes a_qk m_k / (1 - p). For each query that is the dropout of softmax attention, whose m_qk are
    independent; here the queries of a head and sequence share the draw.
    """
    return value * F.dropout(value.new_ones(*value.shape[:3], 1), p)


def _refusal(core: AstrocyteAttention, call: Call) -> str | None:
    """Why an astrocyte may not answer a call that its front-end could read, or None."""
    tensors = query, key, value = call.query, call.key, call.value
    if any(x.dim() != 4 for x in tensors):
        return "queries, keys or values that are not [batch, heads, tokens, head dimension]"
    if query.dtype not in DTYPES or any(x.dtype != query.dtype for x in tensors):
        return "queries, keys and values of different dtypes, or of one that an astrocyte does not take"
    if any(x.device != query.device for x in tensors):
        return "queries, keys and values on different devices"
    grouped = core.shares_keys and key.shape[1] > 0 and query.shape[1] % key.shape[1] == 0
    if any(x.shape[:2] != (query.shape[0], (key if grouped else query).shape[1]) for x in (key, value)):
        return "keys broadcast over batch or heads"
    if query.shape[1] != core.num_heads or query.shape[3] != core.head_dim or key.shape[3] != core.head_dim:
        return "another number of heads or head dimension than when it was patched"
    if key.shape[2] == 0 or value.shape[2] != key.shape[2] or value.shape[3] == 0:
        return "no keys, or another number of them than of values"
    if call.scale is not None and not 0 < call.scale < inf:
        return "a scale that is not positive"
    if call.grid is not None and (call.key_mask is not None or call.causal or call.documents is not None):
        return "a mask over a grid of patches"
    if call.key_mask is not None and call.key_mask.shape != (query.shape[0], key.shape[2]):
        return "a mask for another batch or for other keys"
    if call.documents is not None and call.cross:
        return "packed documents in cross attention"
    if call.documents is not None and call.documents.shape != (query.shape[0], query.shape[2]):
        return "a mask for another batch or for other tokens"
    if call.documents is not None and call.memory is not None:
        return "packed documents in a cache"
    if call.bias is not None and call.documents is not None:
        return "a bias for every query and key of packed documents"
    if call.bias is not None and not fits_scores(call.bias, query, key.shape[2], one_row=True):
        return "a bias for another batch, for other heads or for other tokens"
    if call.sink is not None and (call.sink.shape != query.shape[1:2] or call.sink.device != query.device):
        return "attention sinks that are not one logit for each head"
    if core.hidden is not None and core.hidden.is_lost(query.device):
        return LOST_WEIGHTS
    counts = plain(query.shape[2]), plain(key.shape[2])
    crossing = counts[0] if call.cross else None
    exact = core.exact or all(covers(each, counts[1], call.grid, crossing) for each in core.configs)
    if call.bias is not None and not exact and is_torn(call.bias):
        return DENSE
    if call.causal and counts[0] > counts[1]:
        return "more queries than keys in causal attention"
    options = {name: getattr(call, name) for name in ("causal", "window", "soft_cap", "cross", "grid")}
    return core.refusal(num_queries=counts[0], num_keys=counts[1], bias=call.bias is not None, **options)


class _Running(threading.local):
    """By its site: whether a module that is running in this thread has handed over a call."""

    def __init__(self) -> None:
        self.handed: WeakKeyDictionary[Site, bool] = WeakKeyDictionary()  # a call that failed has not ended


_running = _Running()


def begin(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of a patched module; `end` is the other half."""
    if not torch.compiler.is_compiling():
        _running.handed[getattr(module, RECORD)] = False


def end(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of a patched module: say so where its forward computed attention by itself."""
    if not torch.compiler.is_compiling():
        site: Site = getattr(module, RECORD)
        if _running.handed.pop(site, None) is False:
            fall_back(site, NOT_HANDED_OVER)


def fall_back(site: Site, reason: str) -> None:
    """Count a call that the host answers, and warn at the first of its kind."""
    if site.seen is not None:
        site.seen.append(Seen(reason))
        return
    site.count(reason, f"{site.name}: left to the model's own attention: {reason}")


def _observe(site: Site, core: AstrocyteAttention, call: Call, host: Callable[[], Tensor]) -> Tensor:
    """In the probe forward: let the host answer, and note how far plain softmax on the same call is from it."""
    answer = host()
    assert site.seen is not None
    if call.refusal is not None:
        site.seen.append(Seen(call.refusal))
    else:
        query = call.query
        shape = (query.shape[1], query.shape[-1])
        more = call.sliding_window, call.window is not None, call.soft_cap
        seen = Seen(None, shape, query.dtype, query.shape[2], call.causal, *more, call.bias is not None)
        seen.padding = call.key_mask is not None
        if (core.num_heads, core.head_dim) != seen.shape:
            core = AstrocyteAttention(*seen.shape).to(query.device)  # exact, whatever its config is
        core.exact = True
        ours = _answer(core, call)
        core.exact = False
        seen.difference = _difference(answer, ours, call)
        site.seen.append(seen)
    return answer


def _difference(answer: Tensor, ours: Tensor, call: Call) -> float:
    """Largest difference relative to the largest value, over the queries that are real tokens and see one."""
    if answer.shape != ours.shape:
        return float("inf")
    error = (answer - ours).float().abs()
    if call.key_mask is not None and call.query.shape[2] == call.key.shape[2] and not call.cross:
        real = call.key_mask[:, None, :, None]
        error, answer = error.where(real, 0.0), answer.where(real, 0.0)
    difference = error.max() / answer.float().abs().max().clamp_min(1e-12)
    return float(difference) if torch.isfinite(difference) else float("inf")
