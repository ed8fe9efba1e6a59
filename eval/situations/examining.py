"""One situation, and whether the patched model does in it what its report says."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from astroattn import AstroConfig
from astroattn.attention import AstrocyteAttention
from astroattn.cost import covers
from astroattn.fidelity.calls import read_call
from astroattn.patching import NotPatched, PatchReport, patch, unpatch
from astroattn.patching.site import CORE, NO_GRID, site_of
from eval.coverage.subjects import describe
from eval.situations.calls import Given, at_real_tokens, give, with_other_padding
from eval.situations.drawing import Situation, simplify
from eval.situations.models import build
from eval.situations.wrapping import COMPILED, Wrapped, wrap

Answer = tuple[list[Tensor], list[Tensor]] | Exception  # outputs and gradients, or what was raised

CONFIGS = {
    "full": AstroConfig(hidden="random", near=4096, exact_keys=0),  # softmax attention, by construction
    "default": AstroConfig(),
    "short": AstroConfig(near=2, exact_keys=2, tile=4, num_hidden=4),
    "static": AstroConfig(hidden="random"),
    "static_near": AstroConfig(hidden="random", near=4),
    "learned": AstroConfig(hidden="learned"),
}
ROUNDING = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1, "autocast": 1e-1}
HOW = {"all": None, "first": 0, "last": -1}


WRONG = "wrong"


class Wrong(Exception):
    """The patched model does not do what it should; the message says what."""


def examine(situation: Situation) -> str:
    """What came of a situation: "patched", "refused" (the model stays as it was) or "raises as the original does".

    Raises:
        Wrong: something else.
    """
    logging.disable(logging.CRITICAL)
    quiet = redirect_stdout(io.StringIO())  # torch.export prints the graphs that it cannot make
    with quiet, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            return _examine(situation, said)
        except Wrong:
            raise
        except Exception as error:
            raise Wrong(f"{describe(error)}") from error


def judge(situation: Situation) -> dict[str, str]:
    """What came of a situation, and where it is wrong the simplest one that still is."""
    torch.set_num_threads(1)
    try:
        return {"came": examine(situation)}
    except Wrong as error:
        first = str(error)

    def fails(other: Situation) -> bool:
        try:
            examine(other)
        except Wrong as error:
            return str(error)[:30] == first[:30]
        return False

    return {"came": WRONG, "why": first, "simplest": str(simplify(situation, fails))}


def _examine(situation: Situation, said: list[warnings.WarningMessage]) -> str:
    given = give(situation)

    def fresh() -> nn.Module:
        return _prepared(situation)

    try:
        before = wrap(situation.wrapper, fresh(), fresh)
    except Exception:  # a scalar weight cannot be sharded, for example
        return "the original cannot be wrapped"
    keys = list(before.module.state_dict())
    expected = _answer(situation, before, given)
    if not _same(_answer(situation, before, given), expected, 0.0):
        return "the original does not repeat itself"

    model = fresh()
    report: PatchReport | None = None
    try:
        if situation.order == "patch_first":
            report = _patch(situation, model)
            wrapped = wrap(situation.wrapper, model, fresh)
        else:
            wrapped = wrap(situation.wrapper, model, fresh)
            report = _patch(situation, wrapped.module)
    except ValueError as error:
        if not isinstance(error, NotPatched) or report is not None:
            raise
        wrapped = wrap(situation.wrapper, model, fresh) if situation.order == "patch_first" else wrapped
        _require_original(situation, wrapped, given, expected, keys)
        return "refused"

    said.clear()
    with _watching(situation, wrapped.module) as seen:
        found = _answer(situation, wrapped, given)
    if isinstance(expected, Exception):
        if isinstance(found, Exception) and type(found) is not type(expected):
            raise Wrong(f"raises {describe(found)}; the original raises {describe(expected)}")
        _require_original(situation, wrapped, given, expected, keys)
        return "raises as the original does"
    if isinstance(found, Exception):
        raise Wrong(f"raises {describe(found)}") from found
    _check_counts(situation, wrapped.module, report, seen, said)
    _check_answer(situation, wrapped, given, expected, found, seen)
    _require_original(situation, wrapped, given, expected, keys)
    return "patched"


def _prepared(situation: Situation) -> nn.Module:
    """A model of the situation, without dropout, so that training repeats itself."""
    model = copy.deepcopy(build(situation.model)[0])
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or (name == "p" and isinstance(module, nn.Dropout))):
                setattr(module, name, 0.0)
    if situation.dtype != "autocast":
        model.to(getattr(torch, situation.dtype))
    return model.train(situation.training)


def _patch(situation: Situation, model: nn.Module) -> PatchReport:
    with _PATCHED_UNDER[situation.patched_under]():
        return patch(model, CONFIGS[situation.config], HOW[situation.where])


@contextmanager
def _default_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


_PATCHED_UNDER: dict[str, Any] = {
    "plain": nullcontext,
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu"),
    "default_float64": _default_float64,
    "default_meta": lambda: torch.device("meta"),
}
_GRADS: dict[str, Any] = {
    "no_grad": torch.no_grad,
    "grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
}


def _answer(situation: Situation, wrapped: Wrapped, given: Given) -> Answer:
    """Outputs at real tokens, and gradients of a weighted sum of them where there are any."""
    autocast: AbstractContextManager[Any] = torch.autocast("cpu") if situation.dtype == "autocast" else nullcontext()
    torch.manual_seed(0)
    wrapped.module.zero_grad()
    try:
        with ExitStack() as stack:
            stack.enter_context(_GRADS[situation.grad]())
            stack.enter_context(autocast)
            outputs = [at_real_tokens(situation, given, each) for each in _tensors(wrapped.call(**given.arguments))]
        losses = [(each.float() * _weights(each)).sum() for each in outputs if each.requires_grad]
        if not losses:
            return outputs, []
        torch.stack(losses).sum().backward()
    except Exception as error:  # whatever a model raises
        return error
    own = [each for name, each in wrapped.module.named_parameters() if CORE not in name.split(".")]
    return [each.detach() for each in outputs], [_whole(each.grad, each) for each in own if not each.is_meta]


def _weights(output: Tensor) -> Tensor:
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(2)) / max(1, output.numel()) ** 0.5


def _whole(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    """A gradient; that of a shard is the whole one, and none is zeros."""
    whole: Tensor = torch.zeros_like(parameter) if gradient is None else gradient
    return (whole.full_tensor() if hasattr(whole, "full_tensor") else whole).clone()


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


class _Seen:
    """What the modules of a model did: how often they were called and their astrocytes answered, and how."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()
        self.approximate = 0


@contextmanager
def _watching(situation: Situation, model: nn.Module) -> Iterator[_Seen]:
    """Hooks on the sites and astrocytes of a model, where hooks run."""
    seen = _Seen()
    handles = []

    def note_call(name: str) -> Any:
        return lambda *_: seen.calls.update([name])

    def note_answer(name: str) -> Any:
        def note(core: AstrocyteAttention, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            seen.answers.update([name])
            call, mask = read_call(core, args, kwargs), kwargs.get("key_mask")
            keys, crossing = call.key.shape[2], call.query.shape[2] if call.cross else None
            several = keys > 1 if mask is None else bool((mask.sum(1) > 1).any())  # of one key all take the value
            windowed, grid = kwargs.get("window") is not None, kwargs.get("grid")
            exact = windowed or all(covers(each, keys, grid, crossing) for each in core.configs)
            seen.approximate += several and not exact

        return note

    for module in model.modules() if situation.wrapper not in COMPILED else ():
        if (site := site_of(module)) is not None:
            handles.append(module.register_forward_pre_hook(note_call(site.name)))
            handles.append(getattr(module, CORE).register_forward_pre_hook(note_answer(site.name), with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _check_counts(
    situation: Situation, model: nn.Module, report: PatchReport, seen: _Seen, said: list[warnings.WarningMessage]
) -> None:
    """Every call was answered by an astrocyte or is counted as left to the host, with a warning."""
    names = {row.name for row in report.patched}
    sites = [site for module in model.modules() if (site := site_of(module)) is not None]
    if {site.name for site in sites} != names:
        raise Wrong(f"the report has {sorted(names)} as astrocytes, the model {sorted(site.name for site in sites)}")
    counts = {site.name: site.fallbacks for site in sites}  # a wrapper gives modules other names
    texts = [str(each.message) for each in said]
    for name, reasons in counts.items():
        for reason in reasons:
            if not any(reason in text for text in texts):
                raise Wrong(f"{name}: left to the host without a warning: {reason}")
    if situation.wrapper in COMPILED:
        return
    for name in names:
        left = sum(count for reason, count in counts.get(name, {}).items() if reason != NO_GRID)
        if seen.answers[name] + left < seen.calls[name] or not seen.calls[name]:
            raise Wrong(f"{name}: {seen.calls[name]} calls, {seen.answers[name]} answers and {left} counted fallbacks")


def _check_answer(
    situation: Situation, wrapped: Wrapped, given: Given, expected: Answer, found: Answer, seen: _Seen
) -> None:
    """With the full near field softmax attention; else finite, changed, and the same whatever the padding holds."""
    rounding = ROUNDING[situation.dtype]
    for kind, before, after in zip(("outputs", "gradients"), expected, found, strict=True):
        finite = all(bool(each.isfinite().all()) for each in before)
        if len(before) != len(after):
            raise Wrong(f"{len(after)} {kind}, of the original {len(before)}")
        if finite and not all(bool(each.isfinite().all()) for each in after):
            raise Wrong(f"NaN or infinity in the {kind}")
        if finite and situation.config == "full" and (difference := _difference(before, after)) > rounding:
            raise Wrong(f"the {kind} differ by {difference:.1e} from softmax attention")
    if [each.dtype for each in expected[0]] != [each.dtype for each in found[0]]:
        raise Wrong(f"outputs of {found[0][0].dtype}, of the original {expected[0][0].dtype}")
    if seen.approximate and all(each.numel() for each in found[0]) and _difference(expected[0], found[0]) == 0:
        raise Wrong("the astrocytes answer, and nothing changes")
    if situation.wrapper in COMPILED:
        inside = wrapped.module
        left = _count_left(inside)
        eager = _answer(situation, Wrapped(inside, getattr(inside, "_orig_mod", inside)), given)
        alike = left.keys() <= (_count_left(inside) - left).keys()  # else the host has answered in the graph alone
        differs = alike and situation.wrapper != "compile_inside"
        if differs and (difference := _largest(eager, found)) > rounding:
            raise Wrong(f"the graph differs by {difference:.1e} from what is not compiled")
    learned = [each for name, each in wrapped.module.named_parameters() if f"{CORE}.hidden" in name]
    learned = [each for each in learned if each.requires_grad]  # an adapter freezes what it does not train
    if seen.approximate and situation.grad == "grad" and learned and all(each.grad is None for each in learned):
        raise Wrong("the learned weights have no gradient")
    if (other := with_other_padding(situation, given)) is not None:
        spread = _largest(_answer(situation, wrapped, other), found)
        if spread > rounding and _same(_answer(situation, _original(situation), other), expected, rounding):
            raise Wrong(f"padding moves the outputs at real tokens by {spread:.1e}")


def _count_left(model: nn.Module) -> Counter[tuple[str, str]]:
    """Calls that were left to the host, by module and reason."""
    sites = [site for module in model.modules() if (site := site_of(module)) is not None]
    return Counter({(site.name, why): count for site in sites for why, count in site.fallbacks.items()})


def _original(situation: Situation) -> Wrapped:
    model = _prepared(situation)
    return Wrapped(model, model)


def _require_original(situation: Situation, wrapped: Wrapped, given: Given, expected: Answer, keys: list[str]) -> None:
    """Unpatch; raise Wrong unless it is bit for bit the original."""
    unpatch(wrapped.module)
    if situation.model == "torch_encoder":
        torch.compiler.reset()  # PyTorch aborts where a graph made with dense tensors is given nested ones
    if list(wrapped.module.state_dict()) != keys:
        raise Wrong("unpatched, the keys of the state dict are not what they were")
    found = _answer(situation, wrapped, given)
    if _same(found, expected, 0.0):
        return
    if isinstance(found, Exception):
        raise Wrong(f"unpatched, it raises {describe(found)}") from found
    if isinstance(expected, Exception):
        return  # what the probe forward has laid out (shards, for example) may stay
    raise Wrong(f"unpatched, the outputs differ by {_largest(found, expected):.1e}")


def _largest(one: Answer, other: Answer) -> float:
    if isinstance(one, Exception) or isinstance(other, Exception):
        return float("inf")
    return _difference(other[0], one[0])


def _same(one: Answer, other: Answer, rounding: float) -> bool:
    if isinstance(one, Exception) and isinstance(other, Exception):
        return type(one) is type(other)
    return _largest(one, other) <= rounding


def _difference(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest difference, over the largest value of that tensor, but at least a thousandth of that of all."""
    if [each.shape for each in before] != [each.shape for each in after]:
        return float("inf")
    largest = [float(each.double().nan_to_num().abs().max()) if each.numel() else 0.0 for each in before]
    least = max(1e-3 * max(largest, default=0.0), 1e-12)
    worst = 0.0
    for one, other, size in zip(before, after, largest, strict=True):
        error = (one.double() - other.double()).abs()
        error = error.masked_fill(one.isnan() & other.isnan() | (one == other), 0.0)
        worst = max(worst, float(error.nan_to_num(nan=float("inf")).max()) / max(size, least) if one.numel() else 0.0)
    return worst
