"""`patch`, `unpatch` and `patched`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from astroattn.attention import AstrocyteAttention
from astroattn.config import AstroConfig
from astroattn.hidden import LearnedHidden
from astroattn.patching import probe
from astroattn.patching.grid import PatchGrid, place_grids
from astroattn.patching.report import PatchReport, Row, make_notes
from astroattn.patching.site import CORE, NO_GRID, Site, install, remove, site_of
from astroattn.patching.survey import Found, Where, front_ends, select, survey
from astroattn.plan import Plan

LONGEST = ("max_target_positions", "max_position_embeddings")  # settings that bound the length of a causal sequence
NOT_SELECTED = "not selected by where"
NOT_PLANNED = "not in the plan"
UNKNOWN_HEADS = "its heads cannot be counted without a forward on made-up input, and there was none"

State = list[tuple[nn.Module, Site, AstrocyteAttention]]
Configs = Mapping[str, AstroConfig | tuple[AstroConfig, ...]]  # of all heads, or of each, by the name of the module


def patch(model: nn.Module, config: AstroConfig | Plan | None = None, where: Where | None = None) -> PatchReport:
    """Replace the self-attention of a model by astrocytes, in place, and report what became of every attention module.

    No parameter changes, and no `state_dict` key. A module that needs something an astrocyte does not represent stays
    exact, and the report says why. Patching again adds modules, or gives them a new config; with the same config it
    changes nothing, and a learned hidden layer stays as it is unless the new config starts from other weights
    (num_hidden, orthogonal, seed). If anything fails, the model is left as it was.

    A call that turns out to need more than an astrocyte represents (a dense mask, for example, or causality that the
    config cannot serve) is answered by the model's own attention, with a warning the first time; `fallbacks` counts
    them, in a compiled graph once, when it is made. Attention dropout is not applied by
    an astrocyte. While a transformers model is patched, `output_attentions=True` raises.

    Args:
        model: any module that holds attention modules of transformers, timm, diffusers or torch.nn. A short forward on
            made-up input checks every module, where such input can be made up; the model is in eval mode for it. What
            it does not reach is checked in the nearest model of transformers around it, alone.
        config: what the astrocytes do; None is `AstroConfig()`. A `Plan` says it head by head; selected modules that
            are not in it become, or stay, exact.
        where: which modules; None is all of them. An index or several into the self-attention modules in module order
            (negative from the end), a name pattern or several (`"encoder.layer.[0-5].*"`), or a
            predicate `(name, module) -> bool`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a part of `where` matches nothing; the model has no attention module; no module can be patched
            (the message has every reason); a plan does not fit (a module that is missing, cannot be patched here or has
            another number of heads).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if config is not None and not isinstance(config, (AstroConfig, Plan)):
        raise TypeError(f"config: expected an AstroConfig, a Plan or None, got {type(config).__name__}")
    found = survey(model)
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no attention module that astroattn recognises")
    selected = select(found, where)
    if isinstance(config, Plan):
        _check_plan(model, config, found)
        configs: Configs = config.modules
    else:
        configs = dict.fromkeys((each.name for each in selected), config or AstroConfig())
    with restored_on_error(model):
        reasons, note = _patch(model, configs, found, selected)
        if isinstance(config, Plan):
            _require(config, selected, reasons)
        report = _report(model, found, selected, reasons, note)
        if lost := [row.name for row in report.patched if row.reason.endswith(NO_GRID)]:
            warnings.warn(  # which may be an error
                f"{type(model).__name__}: {NO_GRID} ({', '.join(lost[:3])}{', ...' * (len(lost) > 3)})", stacklevel=2
            )
    return report


def unpatch(model: nn.Module) -> None:
    """Make a patched model bit for bit what it was; a model that is not patched is left alone.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    _restore(model, [])


@contextmanager
def patched(
    model: nn.Module, config: AstroConfig | Plan | None = None, where: Where | None = None
) -> Iterator[PatchReport]:
    """`patch` for the length of a block; afterwards the model is as it was, patched before or not."""
    before = _capture(model)
    report = patch(model, config, where)
    try:
        yield report
    finally:
        _restore(model, before)


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """A block after which the model is patched as it was before, if the block raises."""
    before = _capture(model)
    try:
        yield
    except BaseException:
        _restore(model, before)
        raise


def fallbacks(model: nn.Module) -> dict[str, dict[str, int]]:
    """What the astrocytes of a patched model could not do: number of calls by module name and reason."""
    sites = [site for module in model.modules() if (site := site_of(module)) is not None]
    return {site.name: dict(site.fallbacks) for site in sites if site.fallbacks}


def _check_plan(model: nn.Module, plan: Plan, found: list[Found]) -> None:
    """Raise ValueError where a plan cannot fit, as far as can be told before anything changes."""
    modules = {each.name: each for each in found}
    if lost := [name for name in plan.modules if name not in modules]:
        raise ValueError(
            f"plan: {type(model).__name__} has no attention module {lost[0]!r} "
            f"({len(lost)} of {len(plan.modules)} are missing); the plan is for a {plan.model}"
        )
    for name, heads in plan.modules.items():
        front_end, module = modules[name].front_end, modules[name].module
        core = getattr(module, CORE, None)
        if isinstance(core, AstrocyteAttention):
            _check_heads(name, heads, (core.num_heads, core.head_dim))
        elif front_end is not None and (shape := front_end.shape(module)) is not None:
            _check_heads(name, heads, shape)


def _check_heads(name: str, heads: AstroConfig | tuple[AstroConfig, ...], shape: tuple[int, int]) -> None:
    if isinstance(heads, tuple) and len(heads) != shape[0]:
        raise ValueError(f"plan: {name!r} has {shape[0]} heads; the plan has configs for {len(heads)}")


def _require(plan: Plan, selected: list[Found], reasons: dict[str, str]) -> None:
    """Raise ValueError for a module of the plan that was selected and stays exact."""
    for each in selected:
        if each.name in plan.modules and each.name in reasons:
            raise ValueError(f"plan: {each.name!r} cannot be patched here: {reasons[each.name]}")


def _patch(model: nn.Module, configs: Configs, found: list[Found], selected: list[Found]) -> tuple[dict[str, str], str]:
    """Make the selected modules what `configs` says, exact where it says nothing.

    Returns why those that stay exact do, and how the probe went.
    """
    reasons = {each.name: each.refusal for each in selected if each.refusal is not None}
    unplanned = [each for each in selected if each.name not in configs]
    reasons |= {each.name: NOT_PLANNED for each in unplanned if each.name not in reasons}
    fresh = [each for each in selected if each.name not in reasons and not _has(each.module, configs[each.name])]
    before = {each.name: getattr(each.module, CORE, None) for each in fresh}
    grids: dict[str, PatchGrid | None] = {}  # of towers that may be around the model
    for each in fresh + unplanned:
        if (site := site_of(each.module)) is not None:
            grids[each.name] = site.grid
            remove(each.module)
    _settle(model)
    note = "not needed"
    if fresh:
        runs, note = _run_original(model, fresh)
        _install(model, fresh, configs, grids)
        reasons |= _probe(model, fresh, configs, runs)
        reasons |= {each.name: reason for each in fresh if (reason := _causal_refusal(each))}
        for each in fresh:
            if each.name in reasons:
                remove(each.module)
            else:
                _remark(each)
                _site(each).seen = None
                _keep_learned(getattr(each.module, CORE), before[each.name])
        _settle(model)
    if all(site_of(each.module) is None for each in selected):
        report = _report(model, found, selected, reasons, "there is no astrocyte to check")
        raise ValueError(f"model: none of the selected attention modules can be patched\n{report}")
    return reasons, note


class _Run(NamedTuple):
    """One run of a model, or of a part of it by itself, before it is patched."""

    name: str
    part: nn.Module
    inputs: dict[str, Any]
    outputs: list[Tensor]


def _run_original(model: nn.Module, fresh: list[Found]) -> tuple[list[_Run], str]:
    """Run the model on made-up input, then by itself the nearest part around each module that was not called."""
    called: set[int] = set()
    handles: list[RemovableHandle] = []
    runs: list[_Run] = []
    missing = ""

    def run(name: str, part: nn.Module) -> None:
        known = set(called)
        try:
            runs.append(_Run(name, part, *probe.make_run(part)))
        except Exception:
            called.intersection_update(known)  # what it called before it failed was not checked
            raise

    try:
        for each in fresh:
            handles.append(each.module.register_forward_pre_hook(lambda module, _: called.add(id(module))))
        try:
            run("", model)
        except probe.NoProbe as error:
            missing = str(error)
        except Exception as error:  # whatever a model raises on input that does not suit it
            missing = f"the model does not run on made-up input: {_line(error)}"
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
        return runs, "every astrocyte was checked against softmax on made-up input"
    return runs, f"{'of some parts alone' if runs else 'none'}, {missing}"


def _probe(model: nn.Module, fresh: list[Found], configs: Configs, runs: list[_Run]) -> dict[str, str]:
    """Repeat the runs, the model's own attention answering; returns why modules must stay exact.

    What no run calls stays exact if the whole model ran, and is not checked if it did not.
    """
    for each in fresh:
        _site(each).seen = []
    reasons: dict[str, str] = {}
    for name, part, inputs, expected in runs:
        before = {each.name: len(_site(each).seen or []) for each in fresh}
        changed = _repeat(part, inputs, expected)
        for each in fresh:
            if len(_site(each).seen or []) > before[each.name] and name:
                _site(each).remark = "checked alone" if name == each.name else f"checked in {name} alone"
            if changed and (not name or f"{each.name}.".startswith(f"{name}.")):
                reasons.setdefault(each.name, f"the model {changed} when its attention is taken over")
    whole = any(not run.name for run in runs)
    for each in fresh:
        core = getattr(each.module, CORE)
        seen = _site(each).seen or []
        if each.name in reasons:
            continue
        if not seen and not whole:
            if _shape(each) is None:
                reasons[each.name] = UNKNOWN_HEADS
        elif reason := probe.verdict(seen):
            reasons[each.name] = reason
        elif (shape := seen[0].shape) != (core.num_heads, core.head_dim):
            _check_heads(each.name, configs[each.name], shape)
            setattr(each.module, CORE, _core(each.module, shape, configs[each.name]))
    return reasons


def _repeat(part: nn.Module, inputs: dict[str, Any], expected: list[Tensor]) -> str | None:
    """What is wrong with the outputs of a patched model, None if nothing is."""
    try:
        outputs = probe.run(part, inputs)
    except Exception as error:
        return f"fails ({_line(error)})"
    if len(outputs) < len(expected):
        return "lacks outputs (attention weights, which no astrocyte forms)"
    return "changes" if probe.differ(expected, outputs) else None


def _install(model: nn.Module, fresh: list[Found], configs: Configs, grids: dict[str, PatchGrid | None]) -> None:
    for each in fresh:
        assert each.front_end is not None
        config = configs[each.name]
        shape = _shape(each)
        if shape is None:  # the probe corrects it
            shape = (len(config) if isinstance(config, tuple) else 1, 1)
        site = each.front_end(each.name, type(each.module).__name__, grids.get(each.name))
        install(site, each.module, _core(each.module, shape, config))
    _settle(model)


def _remark(each: Found) -> None:
    """Have the report say what a module does that is not all in its config."""
    site = _site(each)
    calls = [seen for seen in site.seen or [] if seen.sliding_window is not None or seen.window_ended]
    if calls:
        size = f" of {calls[0].sliding_window} tokens" if calls[0].sliding_window else ""
        window = f"sliding window{size}: exact in longer sequences, by the config in others"
        if not any(seen.window_ended for seen in calls):
            window += "; not checked in longer ones"
        site.remark = "; ".join(filter(None, (site.remark, window)))


def _core(
    module: nn.Module, shape: tuple[int, int], config: AstroConfig | tuple[AstroConfig, ...]
) -> AstrocyteAttention:
    parameter = next(module.parameters(), None)
    fetched = any("_hf_hook" in vars(each) for each in module.modules())  # by accelerate; not the weights of a core
    with torch.inference_mode(False):  # what is made in inference mode can never be trained
        core = AstrocyteAttention(*shape, config).train(module.training)
        return core if parameter is None or (parameter.is_meta and fetched) else core.to(parameter.device)


def _keep_learned(core: AstrocyteAttention, before: AstrocyteAttention | None) -> None:
    """Let a learned layer go on where it would start from the same weights: whoever trains it goes on too."""
    old = None if before is None else before.hidden
    if isinstance(core.hidden, LearnedHidden) and isinstance(old, LearnedHidden) and core.hidden.start == old.start:
        core.hidden = old


def _causal_refusal(each: Found) -> str | None:
    """Why the config cannot serve a causal module, unless its near field covers the longest sequence there can be."""
    site, core = _site(each), getattr(each.module, CORE)
    causal = site.seen[0].causal if site.seen else type(site).is_causal(each.module)
    settings = getattr(each.module, "config", None)
    longest = next((value for name in LONGEST if isinstance(value := getattr(settings, name, None), int)), None)
    if longest is not None and all(c.hidden == "exact" or c.near >= longest for c in core.configs):
        return None
    if core.shares_keys and (reason := _streaming_refusal(each)):
        return reason
    refusal: str | None = core.refusal(causal=causal)
    return refusal


def _streaming_refusal(each: Found) -> str | None:
    """Why a module can have no streaming memory in a cache, or None."""
    site, module = _site(each), each.module
    if any(seen.sliding_window is not None or seen.window_ended for seen in site.seen or []):
        return "sliding window: its cache does not grow"
    if getattr(module, "sinks", None) is not None:
        return "attention sinks, which a streaming memory does not read"
    if getattr(getattr(module, "config", None), "num_kv_shared_layers", None):
        return "layers that read the keys of others, whose streaming memory is not theirs"
    if hasattr(module, "layer_idx") and not site.finds_cache:
        return "its attention class does not hand over its cache"
    return None


def _has(module: nn.Module, config: AstroConfig | tuple[AstroConfig, ...]) -> bool:
    if site_of(module) is None:
        return False
    core: AstrocyteAttention = getattr(module, CORE)
    return core.configs == (config if isinstance(config, tuple) else (config,) * core.num_heads)


def _shape(each: Found) -> tuple[int, int] | None:
    assert each.front_end is not None
    return each.front_end.shape(each.module)


def _site(each: Found) -> Site:
    site = site_of(each.module)
    assert site is not None
    return site


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _settle(model: nn.Module) -> None:
    for front_end in front_ends():
        front_end.settle(model)
    place_grids(model)


def _capture(model: nn.Module) -> State:
    """Everything that patching has put into a model."""
    sites = [(module, site) for module in model.modules() if (site := site_of(module)) is not None]
    return [(module, site, getattr(module, CORE)) for module, site in sites]


def _restore(model: nn.Module, state: State) -> None:
    """Make a model hold exactly that."""
    for module in [each for each in model.modules() if site_of(each) is not None]:
        remove(module)
    for module, site, core in state:
        if site_of(module) is not None:  # it was taken out of the model meanwhile
            remove(module)
        site.seen = None
        install(site, module, core)
    _settle(model)


def _report(
    model: nn.Module, found: list[Found], selected: list[Found], reasons: dict[str, str], note: str
) -> PatchReport:
    rows = []
    chosen = {each.name for each in selected}
    numbers = iter(range(len(found)))
    for each in found:
        site = site_of(each.module)
        shape: tuple[int | None, int | None] = (None, None)
        kinds = 1
        if site is not None:
            core = getattr(each.module, CORE)
            shape, kinds = (core.num_heads, core.head_dim), len(set(core.configs))
            lost = site.grid is None and site.sees_patches(each.module)
            reason = "; ".join(filter(None, (site.remark, NO_GRID if lost else "")))
        else:
            reason = reasons.get(each.name) or each.refusal or ("" if each.name in chosen else NOT_SELECTED)
            if each.front_end is not None:
                shape = each.front_end.shape(each.module) or shape
        rows.append(
            Row(
                name=each.name,
                class_name=site.class_name if site is not None else type(each.module).__name__,
                status="exact" if site is None else "astrocyte",
                reason=reason,
                heads=shape[0],
                head_dim=shape[1],
                index=next(numbers) if each.is_self_attention else None,
                kinds=kinds,
            )
        )
    return PatchReport(type(model).__name__, tuple(rows), note, make_notes(model))
