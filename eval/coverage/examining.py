"""What patching does to one model, and whether that is what its report says."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from astroattn import AstroConfig
from astroattn.attention import AstrocyteAttention
from astroattn.checks import BIAS, BIAS_CAUSAL, CROSS
from astroattn.cost import covers
from astroattn.fidelity.calls import read_call
from astroattn.patching import NotPatched, PatchReport, fallbacks, patch, probe, unpatch
from astroattn.patching.report import Row as ReportRow
from astroattn.patching.survey import survey
from eval.coverage.inputs import Inputs
from eval.coverage.subjects import CannotRun, Subject, describe, subjects

Row = dict[str, Any]

FULL = AstroConfig(hidden="random", near=4096, exact_keys=0)  # softmax attention, by construction
# Where there is a bias or the keys of another sequence, which no static layer with a near field has.
FULL_TILED = AstroConfig(hidden="none", near=4096, exact_keys=4096)
STATIC = AstroConfig(hidden="random", near=0, exact_keys=0, num_hidden=8)
DEFAULT = AstroConfig()

ROUNDING = 1e-4  # of the largest output
OWN_TOKENS = 4  # that a model puts beside those it is given, at most
ASKS = "inputs=batch"  # what reasons say that inputs would help
OTHER_ATTENTION = ("one query", "keys of another length")  # that only a forward shows


class Status(StrEnum):
    """What became of a model, the worst last but one."""

    EQUAL = "equal"
    IN_PART = "in part"
    REFUSED = "refused"
    CRASHED = "crashed"
    DIFFERENT = "silently different"
    NO_ATTENTION = "no attention"
    NOT_RUN = "could not be built or run"


class Different(Exception):
    """The model does not do what the report of the patch says; the message says how.

    Attributes:
        difference: with the full near field, where that is what is wrong.
    """

    def __init__(self, message: str, difference: float | None = None) -> None:
        super().__init__(message)
        self.difference = difference


def examine(subject: Subject) -> Row:
    """Patch and unpatch the model with three configs.

    Returns a row of "library", "type", "class", "status" and "reasons" (why modules stay exact or calls were left to
    the model's own attention, each once; what went wrong), "patched" and "total" (self-attention modules), "crossing"
    (modules of cross attention that were patched), and "difference", the largest with the full near field over the
    largest output (None where it was not measured).
    """
    row = make_row(subject)
    try:
        model, inputs = subject.build()
    except CannotRun as error:
        return row | {"reasons": [str(error)]}
    except Exception as error:  # whatever a class raises on a config that does not suit it
        return row | {"reasons": [f"not built: {describe(error)}"]}
    row["class"] = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return row | examine_model(model, inputs)


def examine_at(index: int) -> Row:
    """The row of one subject, in a process of its own."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    return examine(subjects()[index])


def make_row(subject: Subject) -> Row:
    """The row of a subject of which nothing is known yet."""
    row: Row = {"library": subject.library, "type": subject.type, "class": "", "status": Status.NOT_RUN}
    return row | {"reasons": [], "patched": 0, "total": 0, "crossing": 0, "difference": None}


def examine_model(model: nn.Module, inputs: Inputs) -> Row:
    """The part of a row that depends on the model alone."""
    found = survey(model)
    if not found:
        return {"status": Status.NO_ATTENTION, "reasons": ["no attention module is recognised"]}
    before = _Answers(model, inputs)
    if not before.repeats:
        return {"status": Status.NOT_RUN, "reasons": ["two runs of the original differ"]}
    row: Row = {}
    step = "full near field"
    try:
        try:
            report = _patch_full(model, before.inputs)
        except NotPatched as error:
            before.require_same(model)
            reasons = [row.reason for row in error.report.rows]
            mine = [row.reason for row in error.report.rows if _is_counted(row)]
            return {"status": Status.REFUSED, "reasons": _once(mine or reasons), "total": len(mine) or len(reasons)}
        row = _summarise(report)
        row["difference"] = _check_full(model, before)
        row["reasons"] = _once([*row["reasons"], *_left(model, report)])
        for name, config in (("static layer", STATIC), ("default config", DEFAULT)):
            step = name
            _check_changed(model, before, config)
        step = "unpatch"
        before.require_same(model)
    except Different as error:
        row |= {"difference": error.difference} if error.difference is not None else {}
        return row | {"status": Status.DIFFERENT, "reasons": [f"{step}: {error}"]}
    except Exception as error:
        return row | {"status": Status.CRASHED, "reasons": [f"{step}: {describe(error)}"]}
    return row | {"status": Status.IN_PART if row["reasons"] else Status.EQUAL}


def _patch_full(model: nn.Module, inputs: Inputs) -> PatchReport:
    """Patch so that every astrocyte is softmax attention."""
    try:
        report, error = _patch(model, FULL, inputs), None
    except NotPatched as refused:
        report, error = refused.report, refused
    others = {row.name for row in report.exact if row.reason in (BIAS, BIAS_CAUSAL, CROSS)}
    if others:
        with suppress(NotPatched):
            both = _patch(model, FULL_TILED, inputs, lambda name, _: name in others)
            rows = (new if new.name in others else old for new, old in zip(both.rows, report.rows, strict=True))
            return replace(both, rows=tuple(rows))
    if error is not None:
        raise error
    return report


def _patch(model: nn.Module, config: AstroConfig, inputs: Inputs, where: Any = None) -> PatchReport:
    """Patch as a user would: with inputs of one's own where the report, or the error, asks for them.

    Else `patch` has seen none of the inputs that the examination is of.
    """
    try:
        report = patch(model, config, where)
        reasons = {row.reason for row in report.exact}
    except NotPatched as error:
        report, reasons = None, {row.reason for row in error.report.exact}
        if not any(ASKS in reason for reason in reasons):
            raise
    if report is None or any(ASKS in reason for reason in reasons):
        return patch(model, config, where, inputs=inputs.arguments)
    return report


class _Answers:
    """What the original puts out, and whether it keeps real tokens apart from padding."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.inputs = inputs
        self.outputs = probe.run(model, inputs.arguments)
        self.keys = list(model.state_dict())
        self.repeats = _same(self.outputs, probe.run(model, inputs.arguments))
        self.other = inputs.with_other_padding() if inputs.real is not None and inputs.padded else None
        self.keeps_padding_apart = self.other is not None and self.spread(model, self.outputs) < ROUNDING

    def difference(self, outputs: list[Tensor]) -> float:
        """Largest difference at real tokens, over the largest value of that output."""
        return self.between(outputs, self.outputs)

    def between(self, outputs: list[Tensor], expected: list[Tensor]) -> float:
        """The same of any two runs on these inputs."""
        return self._largest(outputs, expected, 1.0)

    def spread(self, model: nn.Module, outputs: list[Tensor]) -> float:
        """How far other tokens in the place of the padding change the outputs at real tokens."""
        assert self.other is not None
        return self._largest(probe.run(model, self.other.arguments), outputs, 0.4)

    def _largest(self, outputs: list[Tensor], expected: list[Tensor], share: float) -> float:
        pairs = zip(outputs, expected, strict=True)
        return max(_difference(*(self._real(each, share) for each in pair)) for pair in pairs)

    def _real(self, output: Tensor, share: float) -> Tensor:
        """An output at real tokens: by the mask, or the first share where it has another length (frames of a sound).

        A model may put a few tokens of its own before the others or behind them: real is then what is real either way.
        """
        real = self.inputs.real
        if real is None or output.dim() < 2 or output.shape[0] != real.shape[0]:
            return output
        if output.shape[1] == real.shape[1]:
            return output[real]
        if 0 < (more := output.shape[1] - real.shape[1]) <= OWN_TOKENS:
            return output[F.pad(real, (0, more), value=True) & F.pad(real, (more, 0), value=True)]
        if output.dim() == 2:
            return output
        if share == 1 and more < 0:  # each frame is of a stretch of the input, and real where the end of it is
            ends = (torch.arange(1, output.shape[1] + 1) * real.shape[1] // output.shape[1] - 1).to(real.device)
            return output[real[:, ends]]
        return output[:, : math.ceil(share * output.shape[1])]

    def require_same(self, model: nn.Module) -> None:
        """Raise Different unless the model, without astrocytes, is bit for bit what it was."""
        unpatch(model)
        if list(model.state_dict()) != self.keys:
            raise Different("the keys of the state dict are not what they were")
        if not _same(self.outputs, probe.run(model, self.inputs.arguments)):
            raise Different("the outputs are not bit for bit what they were")


def _check_full(model: nn.Module, before: _Answers) -> float:
    """Return the largest difference of a model with softmax attention throughout; raise Different where it is none."""
    outputs = probe.run(model, before.inputs.arguments)
    if len(outputs) != len(before.outputs):
        raise Different(f"{len(outputs)} tensors come out, and {len(before.outputs)} of the original")
    difference = before.difference(outputs)
    if not difference < ROUNDING and not (difference := _difference_in_double(model, before)) < ROUNDING:
        raise Different(f"the outputs differ by {difference:.1e}", difference)
    return difference


def _difference_in_double(model: nn.Module, before: _Answers) -> float:
    """The same of both models in float64: one that compares its numbers with a limit makes much of their rounding."""
    return before.between(*_run_in_double(copy.deepcopy(model), before.inputs))


def _run_in_double(model: nn.Module, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    """What a patched model puts out in float64, and then the original; the model is used up."""
    model = model.double()
    arguments = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.arguments.items()
    }
    outputs = probe.run(model, arguments)
    unpatch(model)
    return outputs, probe.run(model, arguments)


def _check_changed(model: nn.Module, before: _Answers, config: AstroConfig) -> None:
    """Patch with a config that is not softmax; raise Different unless the outputs are finite, changed where astrocytes
    answered, and the same whatever the padding holds."""
    unpatch(model)
    try:
        _patch(model, config, before.inputs)
    except NotPatched:
        return  # said, and why: a causal model needs a static layer
    approximate: list[int] = []

    def watch(core: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(core, AstrocyteAttention)
        call = read_call(core, args, kwargs)
        tokens, crossing = call.key.shape[2], call.query.shape[2] if call.cross else None
        exact = kwargs.get("window") is not None or all(
            covers(each, tokens, kwargs.get("grid"), crossing) for each in core.configs
        )
        if not exact:
            approximate.append(tokens)

    cores = [each for each in model.modules() if isinstance(each, AstrocyteAttention)]
    handles = [core.register_forward_pre_hook(watch, with_kwargs=True) for core in cores]
    try:
        outputs = probe.run(model, before.inputs.arguments)
    finally:
        for handle in handles:
            handle.remove()
    if not all(each.isfinite().all() for each in outputs):
        raise Different("NaN or infinity comes out")
    if approximate and before.difference(outputs) == 0 and not _changes_when_enlarged(model, before.inputs):
        raise Different("the astrocytes answer, and nothing changes")
    if before.keeps_padding_apart and (spread := before.spread(model, outputs)) > ROUNDING:
        raise Different(f"padding changes the outputs at real tokens by {spread:.1e}")


def _changes_when_enlarged(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a patched model puts out anything else than the original in float64, with five times as large weights.

    Weights drawn small may hide it: where all products are near zero, attention is uniform however it is computed.
    """
    model = copy.deepcopy(model).double()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.mul_(5.0)
    return not _same(*_run_in_double(model, inputs))


def _summarise(report: PatchReport) -> Row:
    own = [each for each in report.rows if _is_counted(each)]
    reasons = [each.reason for each in own if each.status == "exact"]
    patched = [each for each in own if each.status == "astrocyte"]
    crossing = sum(each.status == "astrocyte" and each.index is None for each in report.rows)
    counts = {"patched": len(patched), "total": len(own), "crossing": crossing}
    return counts | {"reasons": _once(reasons)}


def _is_counted(row: ReportRow) -> bool:
    """Whether a module is self-attention of a sequence."""
    return row.index is not None and not row.reason.startswith(OTHER_ATTENTION)


def _left(model: nn.Module, report: PatchReport) -> list[str]:
    """What calls of self-attention were left to the model's own attention for."""
    counted = {row.name for row in report.rows if _is_counted(row)}
    reasons = [reason for name, counts in fallbacks(model).items() if name in counted for reason in counts]
    return [f"{reason} (in some calls)" for reason in reasons]


def _once(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _difference(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    if one.numel() == 0:
        return 0.0
    error = (one - other).double().abs().max() / other.double().abs().max().clamp_min(1e-12)
    return float(error) if error.isfinite() else float("inf")


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
