"""Whether the modules of a model can be taken over: each is checked in a forward of the model.

First the original runs, then the patched model, whose modules answer by themselves and note how far softmax attention
in our words is from that.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from astroattn.attention import AstrocyteAttention
from astroattn.checks import DTYPES
from astroattn.config import AstroConfig
from astroattn.hidden import LearnedHidden
from astroattn.patching import probe
from astroattn.patching.site import CORE, Site, site_of
from astroattn.patching.survey import Found

UNKNOWN_HEADS = (
    "its heads cannot be counted without a forward, and no input can be made up; give one (patch(model, inputs=batch))"
)

Configs = Mapping[str, AstroConfig | tuple[AstroConfig, ...]]  # of all heads, or of each, by the name of the module


class Run(NamedTuple):
    """One run of a model, or of a part of it by itself, before it is patched."""

    name: str
    part: nn.Module
    inputs: Any
    outputs: list[Tensor]


def run_original(model: nn.Module, fresh: list[Found], given: Any = None) -> tuple[list[Run], str]:
    """Run the model on made-up input, then by itself the nearest part around each module that was not called.

    Where that does not do for the whole model, it runs on the inputs `given`, if there are any.

    Returns:
        The runs, and how they went.

    Raises:
        ValueError: the model does not run on the inputs given.
    """
    called: set[int] = set()
    handles: list[RemovableHandle] = []
    runs: list[Run] = []
    missing = ""

    def run(name: str, part: nn.Module, inputs: Any = None) -> None:
        part = getattr(part, "_orig_mod", part)  # of torch.compile, which takes anything and would make graphs of this
        known = set(called)
        try:
            found = probe.make_run(part) if inputs is None else (inputs, probe.run(part, inputs))
        except Exception:
            called.intersection_update(known)  # what it called before it failed was not checked
            raise
        runs.append(Run(name, part, *found))

    try:
        for each in fresh:
            handles.append(each.module.register_forward_pre_hook(lambda module, _: called.add(id(module))))
        try:
            run("", model)
        except probe.NoProbe as error:
            missing = str(error)
        except Exception as error:  # whatever a model raises on input that does not suit it
            missing = f"the model does not run on made-up input: {_line(error)}"
        basis = [] if missing else ["made-up input"]
        if given is not None and (missing or any(id(each.module) not in called for each in fresh)):
            try:
                run("", model, given)
            except Exception as error:
                raise ValueError(f"inputs: the model does not run on them: {_line(error)}") from error
            basis, missing = [*basis, "the inputs given"], ""
        tried: set[str] = set()
        for each in fresh:
            name = f"{each.name}."
            while id(each.module) not in called and (name := name.rpartition(".")[0]):
                part = model.get_submodule(name)
                if name in tried or not (hasattr(part, "main_input_name") or probe.takes_tokens(part)):
                    continue
                tried.add(name)
                with suppress(Exception):  # no input, or one that does not suit it
                    run(name, part)
    finally:
        for handle in handles:
            handle.remove()
    if not missing:
        return runs, f"every astrocyte was checked against softmax on {' and '.join(basis)}"
    return runs, f"{'of some parts alone' if runs else 'none'}, {missing}"


def check(model: nn.Module, fresh: list[Found], configs: Configs, runs: list[Run]) -> dict[str, str]:
    """Repeat the runs, the model's own attention answering; returns why modules must stay exact.

    What no run calls stays exact if the whole model ran, and is not checked if it did not.
    """
    for each in fresh:
        site_at(each).seen = []
    reasons: dict[str, str] = {}
    for name, part, inputs, expected in runs:
        before = {each.name: len(site_at(each).seen or []) for each in fresh}
        changed = _repeat(part, inputs, expected)
        for each in fresh:
            if len(site_at(each).seen or []) > before[each.name] and name:
                site_at(each).remark = "checked alone" if name == each.name else f"checked in {name} alone"
            if changed and (not name or f"{each.name}.".startswith(f"{name}.")):
                reasons.setdefault(each.name, f"the model {changed} when its attention is taken over")
    whole = any(not run.name for run in runs)
    for each in fresh:
        core = getattr(each.module, CORE)
        seen = site_at(each).seen or []
        if each.name in reasons:
            continue
        if not seen and not whole:
            if shape_of(each) is None:
                reasons[each.name] = UNKNOWN_HEADS
        elif reason := probe.verdict(seen):
            reasons[each.name] = reason
        elif (shape := seen[0].shape) != (core.num_heads, core.head_dim):
            check_heads(each.name, configs[each.name], shape)
            setattr(each.module, CORE, make_core(each.module, shape, configs[each.name]))
    return reasons


def _repeat(part: nn.Module, inputs: Any, expected: list[Tensor]) -> str | None:
    """What is wrong with the outputs of a patched model, None if nothing is."""
    try:
        outputs = probe.run(part, inputs)
    except Exception as error:
        return f"fails ({_line(error)})"
    if len(outputs) < len(expected):
        return "lacks outputs (attention weights, which no astrocyte forms)"
    return "changes" if probe.differ(expected, outputs) else None


def check_heads(name: str, heads: AstroConfig | tuple[AstroConfig, ...], shape: tuple[int, int]) -> None:
    """Raise ValueError for configs of another number of heads than the module has."""
    if isinstance(heads, tuple) and len(heads) != shape[0]:
        raise ValueError(f"plan: {name!r} has {shape[0]} heads; the plan has configs for {len(heads)}")


def make_core(
    module: nn.Module, shape: tuple[int, int], config: AstroConfig | tuple[AstroConfig, ...]
) -> AstrocyteAttention:
    """The astrocyte of a module with so many heads of such a dimension, where its weights are."""
    parameter = next(module.parameters(), None)
    fetched = any("_hf_hook" in vars(each) for each in module.modules())  # by accelerate; not the weights of a core
    with torch.inference_mode(False):  # what is made in inference mode can never be trained
        core = AstrocyteAttention(*shape, config).train(module.training)
        if parameter is None or (parameter.is_meta and fetched):
            return core
        if isinstance(core.hidden, LearnedHidden) and parameter.dtype in DTYPES:  # FSDP wants one dtype in a module
            core.hidden.to(parameter.dtype)
        return core.to(parameter.device)


def shape_of(each: Found) -> tuple[int, int] | None:
    """Heads and head dimension of a module that can be taken over, as far as they are known."""
    assert each.front_end is not None
    return each.front_end.shape(each.module)


def site_at(each: Found) -> Site:
    """The site of a module that is patched."""
    site = site_of(each.module)
    assert site is not None
    return site


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
