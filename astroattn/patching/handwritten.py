"""Attention classes that write softmax out: `softmax(q k^T * scale + mask) v` in products, sums and a softmax.

The class of a module is swapped for a subclass that runs the original forward under a TorchFunctionMode. A product
that may be scores is not computed: a stand-in of the same shape without memory of its own takes its place, and what is
done with it is noted. If that leads through softmax to the product with the values, the astrocyte answers, and no
matrix of queries and keys is formed. As soon as anything else is done, what was noted is carried out, by the same
functions on the same tensors in the same order, and the forward goes on with the real tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.torch_version import TorchVersion

from astroattn.checks import SOFT_CAP, check_traceable
from astroattn.ops.layout import plain
from astroattn.patching.dense_masks import read_masks
from astroattn.patching.scores import (
    BINARY,
    UNARY,
    Labels,
    Scores,
    labels_of,
    product_dtype,
    scores_of,
    split,
    values_of,
)
from astroattn.patching.site import (
    RECORD,
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

ATTENTION_CLASS = re.compile(r"attention|attn|(mh|gp|sh)sa$", re.IGNORECASE)  # *SA: self-attention
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
WEIGHTS = ("output_attentions", "need_weights", "return_attention", "return_attention_weights")

SDPA = "scaled_dot_product_attention"
NOTHING = "its forward has no softmax(q k^T) v that could be read"
MANY_AXES = f"{WINDOW} (scores with more axes than batch and heads)"
CHANGED = "what its scores are computed from is changed in place"
OUTPUT = "its scores are its output"
LATER = "its attention weights are used for more than the values"

PRODUCTS = ("matmul", "__matmul__", "__rmatmul__", "bmm", "einsum")
VIEWS = ("view", "reshape", "unflatten", "flatten", "unsqueeze", "squeeze")
CASTS = ("to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous")
ASKED = ("size", "dim", "numel", "nelement", "is_floating_point")
LIKE = ("expand_as", "view_as", "reshape_as", "type_as", "to")  # of something else
PERMUTES = ("transpose", "swapaxes", "permute")
ATTRIBUTES = [getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "layout")]

MIXED = "heads are mixed (talking heads)"
JOINED = "scores or weights joined with others (attention sinks, several kinds of keys)"
SUM = "its scores are the sum of several products (of content and of positions, for example)"
SHIFTED = "its scores are cut, shifted or laid out anew (relative positions or windows)"
# What is done with scores, and with weights, and what that means.
MEANINGS = {
    "scores": {
        "tanh": SOFT_CAP,
        "cat": JOINED,
        **dict.fromkeys(("conv2d", "linear"), MIXED),
        **dict.fromkeys(("mul", "div", "true_divide"), "a factor on scores that have a bias"),
        **dict.fromkeys(("pad", "view", "reshape", "unflatten", "__getitem__", "gather", "as_strided"), SHIFTED),
        **dict.fromkeys(PRODUCTS, "there is no softmax between its products (linear attention)"),
    },
    "weights": {
        "cat": JOINED,
        **dict.fromkeys(("conv2d", "linear"), MIXED),
        "mul": "a factor on its attention weights (a head mask or a gate)",
        "masked_fill": "a mask on its attention weights, after the softmax",
        **dict.fromkeys(("pad", "view", "reshape", "unflatten", "__getitem__", "gather", "as_strided"), SHIFTED),
    },
}

CHANGES = [name for name in dir(Tensor) if name.endswith("_") and not name.startswith("_")]
CHANGES += ["__setitem__", *(name for name in dir(Tensor) if name.startswith("__i") and f"__{name[3:]}" in dir(Tensor))]


_registered: set[type[nn.Module]] = set()


def register(cls: type[nn.Module]) -> type[nn.Module]:
    """Have `patch` see an attention module in every module of this class; usable as a decorator.

    It is for classes of your own whose names do not say it, or whose attention is in a function that they call. Their
    forward has to call `scaled_dot_product_attention`, or to write softmax(q k^T) v out, on `[B, H, N, D]`; a forward
    of the model on `patch(model, inputs=batch)` shows whether it does, and how many heads there are.

    Raises:
        TypeError: no class of modules.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls: expected a subclass of torch.nn.Module, got {cls!r}")
    _registered.add(cls)
    return cls


@dataclass(eq=False)
class HandwrittenSite(Site):
    """An attention module whose forward is read as it runs."""

    causal: bool = False  # in the probe forward

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        if isinstance(module, tuple(_registered)):
            return True
        named = ATTENTION_CLASS.search(type(module).__name__) is not None
        return named and any(names_in(each.__code__) & {"softmax", "Softmax", SDPA} for each in methods(type(module)))

    @classmethod
    def refusal(cls, name: str, module: nn.Module) -> str | None:
        return replaced_forward(module)

    @classmethod
    def crosses(cls, name: str, module: nn.Module) -> bool:
        return super().crosses(name, module) or getattr(module, "encoder_decoder_attention", False) is True

    @classmethod
    def shape(cls, module: nn.Module) -> tuple[int, int] | None:
        return None  # only what it computes says so: the probe forward is needed

    @classmethod
    def sees_patches(cls, module: nn.Module) -> bool:
        return hasattr(getattr(module, "config", None), "patch_size") or type(module).__module__.startswith("timm.")

    def take(self, module: nn.Module) -> None:
        put_over(module, run)

    def release(self, module: nn.Module) -> None:
        take_off(module)


def run(base: type[nn.Module], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward of a patched module: that of its class, with its scores left to the astrocyte."""
    for first in (*args, *kwargs.values()):
        check_traceable(first)
        break
    if wanted := [name for name in WEIGHTS if kwargs.get(name)]:
        fall_back(getattr(module, RECORD), f"{wanted[0]}=True: attention weights, which no astrocyte forms")
        return base.forward(module, *args, **kwargs)
    watch = Watch(module)
    with watch:
        output = base.forward(module, *args, **kwargs)
    return watch.finish(output)


if TorchVersion(torch.__version__) < "2.9":  # whose compiler can neither follow the watch nor break off inside it
    run = torch.compiler.disable(run, reason="before PyTorch 2.9 scores that are written by hand run as they stand")


@dataclass(eq=False)
class Tape:
    """What was noted since one product. `steps` are functions, arguments and the stand-in for what came out."""

    steps: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Tensor]] = field(default_factory=list)
    done: int = 0  # steps that were carried out
    real: dict[Tensor, Tensor] = field(default_factory=dict)  # what they have put out, by stand-in
    answered: bool = False  # by an astrocyte, which has no weights


class Watch(TorchFunctionMode):
    """While active, reads what a module does with its scores, and hands its attention calls to its astrocyte."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.site: HandwrittenSite = getattr(module, RECORD)
        self.parts: dict[Tensor, tuple[Tape, Scores | None]] = {}  # by stand-in
        self.calls = 0
        self.stopped: str | None = None  # why the first scores did not get to the values

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            self._carry_out([each for each in _tensors((args, kwargs)) if each in self.parts], None)
            return self._fused(*self._real(args), **self._real(kwargs))
        name = _name_of(function)
        held = [each for each in _tensors((args, kwargs)) if each in self.parts]
        if not held:
            if (scores := _product(name, args, kwargs)) is not None:
                return self._note(Tape(), scores, function, args, kwargs)
            if _changes(name, kwargs):
                self._carry_out(self._noted_with(args[0] if len(args) else None), CHANGED)
            if function is Tensor.unflatten:  # Python, of which no compiler knows but as a method
                return args[0].unflatten(*args[1:], **kwargs)
            return function(*args, **kwargs)
        if name in ASKED or (name in LIKE and not self._holds(args[0])) or function in ATTRIBUTES:
            return function(*args, **kwargs)
        tape, scores = self.parts[held[0]]
        noted = tape.done == 0 or tape.answered  # and not carried out
        if scores is not None and noted and all(self.parts[each][0] is tape for each in held):
            if name in PRODUCTS and scores.softmax:
                answer = self._answer(scores, held[0], function, name, args, kwargs)
                if answer is not None:
                    return answer
            elif (after := self._step(name, scores, held, function, args, kwargs)) is not None:
                return self._note(tape, after, function, args, kwargs, into=held[0] if _in_place(name) else None)
        self._carry_out(held, _meaning(name, scores, len(held)))
        return function(*self._real(args), **self._real(kwargs))

    def finish(self, output: Any) -> Any:
        """The output of the forward with real tensors; None for weights that were not formed."""
        if self.calls == 0:
            fall_back(self.site, self.stopped or NOTHING)
        if not self.parts:
            return output
        self._carry_out([x for x in _tensors(output) if x in self.parts and not self.parts[x][0].answered], OUTPUT)
        return self._real(output, forget=True)

    def _holds(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value in self.parts

    def _note(
        self,
        tape: Tape,
        scores: Scores,
        function: Callable[..., Any],
        args: Any,
        kwargs: dict[str, Any],
        into: Tensor | None = None,
    ) -> Tensor:
        """Note a step; returns the stand-in for what it would have put out."""
        if into is not None:  # what shares memory with it has changed too, and is not followed further
            for each, (other, _) in list(self.parts.items()):
                if other is tape:
                    self.parts[each] = tape, None
            stand_in, scores = into, replace(scores, dtype=into.dtype)
        else:
            number = torch.full((), float("nan"), dtype=scores.dtype, device=scores.query.device)
            stand_in = number.expand(scores.shape)
        tape.steps.append((function, args, kwargs, stand_in))
        self.parts[stand_in] = tape, scores
        return stand_in

    def _step(
        self, name: str, scores: Scores, held: list[Tensor], function: Any, args: Any, kwargs: dict[str, Any]
    ) -> Scores | None:
        """What the scores are after a step, None where it is not one of softmax attention."""
        if len(held) > 1 and name not in ("type_as", "to"):
            return None
        stand_in = held[0]
        name = name[:-1] if _in_place(name) else name
        if name in BINARY or name == "where":
            kwargs = dict(kwargs)
            if name == "where":
                if len(args) != 3 or args[1] is not stand_in or kwargs:
                    return None
                name, args = "masked_fill", (stand_in, ~args[0], args[2])
            mirrored = len(args) == 0 or args[0] is not stand_in
            if mirrored and (len(args) < 2 or args[1] is not stand_in):
                return None
            rest = (args[0], *args[2:]) if mirrored else args[1:]
            return _try(BINARY[name], scores, rest, kwargs | {"mirrored": mirrored})
        if len(args) == 0 or args[0] is not stand_in:
            return None
        if name in UNARY:
            return _try(UNARY[name], scores, args[1:], kwargs)
        if name in CASTS:
            like = function(stand_in.new_empty(()), *args[1:], **kwargs)
            same = isinstance(like, Tensor) and like.device == stand_in.device and like.is_floating_point()
            return replace(scores, dtype=like.dtype) if same else None
        if name in VIEWS:
            return scores.viewed(tuple(map(plain, function(*args, **kwargs).shape)))
        if name in PERMUTES:
            count = stand_in.dim()
            order = list(range(count))
            if kwargs:
                return None
            if name == "permute":
                dims = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
                order = [dim % count for dim in dims]
            else:
                one, two = args[1] % count, args[2] % count
                order[one], order[two] = order[two], order[one]
            return scores.permuted(tuple(order))
        return None

    def _answer(
        self,
        weights: Scores,
        stand_in: Tensor,
        function: Callable[..., Any],
        name: str,
        args: Any,
        kwargs: dict[str, Any],
    ) -> Tensor | None:
        """The product of the weights with the values, None where it is another."""
        found = None if kwargs else labels_of(name, args)
        if found is None:
            return None
        labels, one, two = found
        first = one is stand_in
        read = values_of(labels, weights, two if first else one, first)
        if read is None:
            return None
        value, order = read

        def host() -> Tensor:
            self._carry_out([stand_in], None)
            output: Tensor = function(*self._real(args))
            return output

        output, tape = self._attend(self._read(weights, value, False), order, host), self.parts[stand_in][0]
        tape.answered = tape.done == 0 or (self.site.seen is not None and self.site.seen[-1].refusal is None)
        if tape.done:
            return output
        output = output.reshape(*weights.lead, *output.shape[-2:]).permute(order).contiguous()
        return output.to(product_dtype(value))

    def _attend(self, call: Call, order: list[int], host: Callable[[], Tensor]) -> Tensor:
        """The answer of the astrocyte `[B, H, Nq, Dv]`, or what the host itself puts out."""
        original: list[Tensor] = []

        def run_host() -> Tensor:
            original.append(host())
            back = [order.index(axis) for axis in range(len(order))]
            return original[0].permute(back).reshape(*call.query.shape[:-1], call.value.shape[-1])

        self.calls += 1
        answer = attend(self.module, call, run_host)
        return original[0] if original else answer

    def _read(self, weights: Scores, value: Tensor, causal: bool) -> Call:
        """The call in our words, or with the reason why it cannot be."""
        query, key = weights.query, weights.key
        counts = [getattr(self.module, name, None) for name in HEADS]
        given = [count for count in counts if isinstance(count, int)]
        parts = split(weights, given[0] if given else 1)
        lead = tuple(torch.broadcast_shapes(query.shape[:-2], key.shape[:-2]))
        if parts is None:
            query, key = (each.expand(*lead, -1, -1).flatten(0, -3)[:, None] for each in (query, key))
            return Call(query, key, value, refusal=MANY_AXES)
        query, key, value = (
            each.expand(*size, -1, -1).reshape(*parts, *each.shape[-2:])
            for each, size in ((query, lead), (key, lead), (value, weights.lead))
        )
        count, keys = plain(query.shape[2]), plain(key.shape[2])
        said = read_masks(weights.masks, *parts, count, keys, self.site.causal, self.site.expected)
        causal, refusal = causal or said.causal, said.refusal
        if not causal and not self.site.cross:
            refusal = refusal or unequal(count, keys)
        if self.site.seen is not None and refusal is None:
            self.site.causal = causal
        call = Call(query, key, value, said.real, causal, weights.scale, weights.dropout, refusal=refusal)
        call.documents, call.bias = said.documents, said.bias
        return call

    def _fused(self, *args: Any, **kwargs: Any) -> Tensor:
        """The answer to a call of `F.scaled_dot_product_attention`."""

        def host() -> Tensor:
            return F.scaled_dot_product_attention(*args, **kwargs)

        call = self._read_fused(*args, **kwargs)
        return host() if call is None else self._attend(call, list(range(call.query.dim())), host)

    def _read_fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Call | None:
        if enable_gqa and key.shape[-3] != query.shape[-3]:
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        found = labels_of("matmul", (query, key.transpose(-1, -2)))
        weights = None if found is None else scores_of(*found)
        if weights is None or weights.lead != tuple(query.shape[:-2]):
            return None
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        weights = replace(weights, scale=scale, dropout=dropout_p)
        if attn_mask is not None:
            boolean = isinstance(attn_mask, Tensor) and attn_mask.dtype == torch.bool
            masked = weights.with_mask(*(("hide", ~attn_mask) if boolean else ("add", attn_mask)))
            if masked is None:
                return None
            weights = masked
        return self._read(weights, value, is_causal)

    def _noted_with(self, changed: Any) -> list[Tensor]:
        """The stand-ins of what was noted with a tensor that is about to change."""
        tapes = {id(tape): tape for tape, _ in self.parts.values() if not tape.answered}
        touched = [key for key, tape in tapes.items() if any(_share(changed, each) for each in _tensors(tape.steps))]
        return [each for each, (tape, _) in self.parts.items() if id(tape) in touched]

    def _carry_out(self, held: list[Tensor], why: str | None) -> None:
        """Do what was noted, of the tapes of these stand-ins."""
        for each in held:
            tape, scores = self.parts[each]
            if tape.answered:
                fall_back(self.site, LATER)
            elif scores is not None and self.stopped is None and scores.query.shape[-2:] == scores.key.shape[-2:]:
                self.stopped = why
            while tape.done < len(tape.steps):
                function, args, kwargs, stand_in = tape.steps[tape.done]
                tape.real[stand_in] = function(*self._real(args), **self._real(kwargs))
                tape.done += 1

    def _real(self, value: Any, forget: bool = False) -> Any:
        """With real tensors in the places of stand-ins."""
        if isinstance(value, Tensor):
            if value not in self.parts:
                return value
            tape = self.parts[value][0]
            if forget and tape.answered:
                return None
            return tape.real[value]
        if not any(each in self.parts for each in _tensors(value)):
            return value
        if isinstance(value, dict):
            return type(value)(**{key: self._real(each, forget) for key, each in value.items()})
        changed = [self._real(each, forget) for each in value]
        return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)


def _meaning(name: str, scores: Scores | None, count: int) -> str:
    """Why scores cannot be followed further after this was done with so many of them."""
    if count > 1 and name in ("add", "sub"):
        return SUM
    kind = "weights" if scores is not None and scores.softmax else "scores"
    return MEANINGS[kind].get(name, f"it does more with its {kind} than softmax attention ({name})")


def _product(name: str, args: Any, kwargs: dict[str, Any]) -> Scores | None:
    """The scores that a product may be."""
    if name == "baddbmm":
        return _baddbmm(*args, **kwargs)
    if name not in PRODUCTS or kwargs:
        return None
    found = labels_of(name, args)
    return None if found is None else scores_of(*found)


def _baddbmm(
    input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1, out: Any = None
) -> Scores | None:
    labels: Labels = ((0, "row", "inner"), (0, "inner", "column"), (0, "row", "column"))
    scores = scores_of(labels, batch1, batch2)
    if scores is None or out is not None or beta not in (0, 1) or not alpha:
        return None
    scores = replace(scores, scale=alpha)
    return scores if beta == 0 else scores.with_mask("base", input)


def _try(step: Callable[..., Scores | None], scores: Scores, args: Any, kwargs: dict[str, Any]) -> Scores | None:
    """A step of the scores, None where it is called in a way that is not read."""
    try:
        return step(scores, *args, **kwargs)
    except TypeError:
        return None


def _name_of(function: Callable[..., Any]) -> str:
    """What torch calls one of its functions, operators and methods."""
    return getattr(function, "__name__", "")


# What `torch.compiler.assume_constant_result` does without importing the compiler, which cannot trace this.
_name_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _changes(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a function may change what it is given."""
    return name in CHANGES or "out" in kwargs or bool(kwargs.get("inplace"))


def _share(one: Any, two: Tensor) -> bool:
    """Whether two tensors share memory; in a graph, which cannot tell, they may."""
    if torch.compiler.is_compiling() or not isinstance(one, Tensor):
        return True
    return bool(one.untyped_storage()._cdata == two.untyped_storage()._cdata)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
