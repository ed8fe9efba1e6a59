"""`patch`, `unpatch` and `patched`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from astroattn.attention import AstrocyteAttention
from astroattn.config import AstroConfig, Preset, as_config
from astroattn.hidden import LearnedHidden
from astroattn.ops.layout import LEAST_QUERIES
from astroattn.patching.checking import Configs, check, check_heads, make_core, run_original, shape_of, site_at
from astroattn.patching.dense_masks import Expected
from astroattn.patching.grid import PatchGrid, place_grids
from astroattn.patching.report import NotPatched, PatchReport, Row, make_notes
from astroattn.patching.site import CORE, CROSS_IN_ORDER, NO_GRID, Site, install, remove, site_of
from astroattn.patching.survey import Found, Where, front_ends, reads_in_order, select, survey
from astroattn.plan import Plan

LONGEST = ("max_target_positions", "max_position_embeddings")  # settings that bound the length of a causal sequence
NOT_SELECTED = "not selected by where"
NOT_PLANNED = "not in the plan"

State = list[tuple[nn.Module, Site, AstrocyteAttention]]


class HoldsModel(Protocol):
    """What holds a model, such as a pipeline of transformers."""

    model: nn.Module


Model = nn.Module | HoldsModel


def module_of(model: Model) -> nn.Module:
    """The module that is meant. Raises TypeError where there is none."""
    found = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(found, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module or a pipeline, got {type(model).__name__}")
    return found


def patch(
    model: Model,
    config: AstroConfig | Plan | Preset | None = None,
    where: Where | None = None,
    *,
    inputs: Mapping[str, Any] | Tensor | None = None,
) -> PatchReport:
    """Replace the self-attention of a model by astrocytes, in place, and report what became of every attention module.

    No parameter changes, and no `state_dict` key. A module that needs something an astrocyte does not represent stays
    exact, and the report says why. Patching again adds modules, or gives them a new config; with the same config it
    changes nothing, and a learned hidden layer stays as it is unless the new config starts from other weights
    (num_hidden, orthogonal, seed). If anything fails, the model is left as it was.

    A call that turns out to need more than an astrocyte represents (a dense mask, for example, or causality that the
    config cannot serve) is answered by the model's own attention, with a warning the first time; `fallbacks` counts
    them, in a compiled graph once, when it is made. Attention dropout of the host, under `train()`, drops keys: the
    queries of a head and sequence share the draw. While a transformers model is patched, `output_attentions=True`
    raises.

    Args:
        model: any module that holds attention modules of transformers, timm, diffusers or torch.nn; a pipeline stands
            for its `.model`. A short forward on made-up input checks every module, where such input can be made up;
            the model is in eval mode for it. What it does not reach is checked in the nearest model of transformers
            around it, alone.
        config: what the astrocytes do; None is `AstroConfig()`. One of three words stands for a config of `PRESETS`:
            "balanced" is the default; "fast" has half of its exact keys and neurons, costs two thirds of it and, where
            it was measured, erred 1.6 to 3.2 times as much; "exact" has 256 exact keys, so it is softmax attention up
            to 256 tokens, and near to it but not the same in longer sequences. A `Plan` says it head by head; selected
            modules that are not in it become, or stay, exact.
        where: which modules; None is all of them. An index or several into the self-attention modules in module order
            (negative from the end), a name pattern or several (`"encoder.layer.[0-5].*"`), or a
            predicate `(name, module) -> bool`.
        inputs: a batch, keyword arguments or one tensor, as the model takes it. It is checked on that where no input
            can be made up, and where what was made up does not reach every module. A row or two will do.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a word that is no preset; a part of `where` matches nothing; the model has no attention module; no
            module can be patched (`NotPatched`, which has the report); it does not run on `inputs`; a plan does not fit
            (a module that is missing, cannot be patched here or has another number of heads).
    """
    model = module_of(model)
    if not isinstance(config, Plan):
        config = as_config(config)
    if inputs is not None and not isinstance(inputs, (Mapping, Tensor)):
        raise TypeError(f"inputs: expected a mapping of keyword arguments or a tensor, got {type(inputs).__name__}")
    found = survey(model)
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no attention module that astroattn recognises")
    selected = select(found, where)
    if isinstance(config, Plan):
        _check_plan(model, config, found)
        configs: Configs = config.modules
    else:
        configs = dict.fromkeys((each.name for each in selected), config)
    with restored_on_error(model):
        reasons, note = _patch(model, configs, found, selected, inputs)
        if isinstance(config, Plan):
            _require(config, selected, reasons)
        report = _report(model, found, selected, reasons, note)
        if lost := [row.name for row in report.patched if row.reason.endswith(NO_GRID)]:
            warnings.warn(  # which may be an error
                f"{type(model).__name__}: {NO_GRID} ({', '.join(lost[:3])}{', ...' * (len(lost) > 3)})", stacklevel=2
            )
    return report


def unpatch(model: Model) -> None:
    """Make a patched model bit for bit what it was; a model that is not patched is left alone.

    Raises:
        TypeError: `model` is not a module.
    """
    _restore(module_of(model), [])


@contextmanager
def patched(
    model: Model,
    config: AstroConfig | Plan | Preset | None = None,
    where: Where | None = None,
    *,
    inputs: Mapping[str, Any] | Tensor | None = None,
) -> Iterator[PatchReport]:
    """`patch` for the length of a block; afterwards the model is as it was, patched before or not."""
    model = module_of(model)
    before = _capture(model)
    report = patch(model, config, where, inputs=inputs)
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


def plan_parts(
    model: nn.Module, config: AstroConfig, parts: Mapping[str, tuple[Where | None, AstroConfig]], where: Where | None
) -> Plan:
    """The plan in which modules that a part means have the config of that part, and others `config`.

    Modules that cannot be patched are not in it, and its notes say why. The model is as it was.

    Args:
        parts: by the name that errors give, which modules, as `where`, and their config.
        where: the modules that are meant at all.

    Raises:
        ValueError: a part that matches nothing, or nothing that can be patched, or a module of another part, or one
            that `where` leaves out; no module can be patched.
    """
    found = survey(model)
    selected = select(found, where)
    configs = {each.name: config for each in selected}
    owners: dict[str, str] = {}
    for part, (meant, own) in parts.items():
        try:
            names = [each.name for each in select(found, meant)]
        except ValueError as error:
            raise ValueError(f"{part}: {str(error).removeprefix('where: ')}") from None
        for name in names:
            if name not in configs:
                raise ValueError(f"{part}: {name!r} is not among the layers that are patched")
            if name in owners:
                raise ValueError(f"{part}: {name!r} has its settings from {owners[name]} already")
            owners[name] = part
        configs |= dict.fromkeys(names, own)
    before = _capture(model)
    try:
        reasons, _ = _patch(model, configs, found, selected, None)
        modules = {
            each.name: getattr(each.module, CORE).configs for each in selected if site_of(each.module) is not None
        }
    finally:
        _restore(model, before)
    for part in parts:
        mine = [name for name, owner in owners.items() if owner == part]
        if not modules.keys() & set(mine):
            raise ValueError(f"{part}: none of its modules can be patched; {mine[0]!r}: {reasons[mine[0]]}")
    notes = tuple(f"{name} stays exact: {reason}" for name, reason in reasons.items())
    return Plan(model=type(model).__name__, modules=modules, notes=notes)


def fallbacks(model: Model) -> dict[str, dict[str, int]]:
    """What the astrocytes of a patched model could not do: number of calls by module name and reason."""
    sites = [(name, site) for name, module in module_of(model).named_modules() if (site := site_of(module)) is not None]
    return {name: dict(site.fallbacks) for name, site in sites if site.fallbacks}


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
            check_heads(name, heads, (core.num_heads, core.head_dim))
        elif front_end is not None and (shape := front_end.shape(module)) is not None:
            check_heads(name, heads, shape)


def _require(plan: Plan, selected: list[Found], reasons: dict[str, str]) -> None:
    """Raise ValueError for a module of the plan that was selected and stays exact."""
    for each in selected:
        if each.name in plan.modules and each.name in reasons:
            raise ValueError(f"plan: {each.name!r} cannot be patched here: {reasons[each.name]}")


def _patch(
    model: nn.Module, configs: Configs, found: list[Found], selected: list[Found], inputs: Any
) -> tuple[dict[str, str], str]:
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
        runs, note = run_original(model, fresh, inputs)
        _install(model, fresh, configs, grids)
        reasons |= check(model, fresh, configs, runs)
        ordered = [each for each in fresh if each.crosses and reads_in_order(model, found, each)]
        reasons |= {each.name: reason for each in fresh if (reason := _causal_refusal(each))}
        reasons |= {each.name: CROSS_IN_ORDER for each in ordered}
        for each in fresh:
            if each.name in reasons:
                remove(each.module)
            else:
                _remark(each)
                site = site_at(each)
                biased = [seen for seen in site.seen or [] if seen.bias]
                site.expected = Expected(bool(biased), any(seen.padding for seen in biased))
                site.seen = None
                _keep_learned(getattr(each.module, CORE), before[each.name])
        _settle(model)
    if all(site_of(each.module) is None for each in selected):
        report = _report(model, found, selected, reasons, "there is no astrocyte to check")
        error = NotPatched(f"model: none of the selected attention modules can be patched\n{report}")
        error.report = report
        raise error
    return reasons, note


def _install(model: nn.Module, fresh: list[Found], configs: Configs, grids: dict[str, PatchGrid | None]) -> None:
    for each in fresh:
        assert each.front_end is not None
        config = configs[each.name]
        shape = shape_of(each)
        if shape is None:  # the probe corrects it
            shape = (len(config) if isinstance(config, tuple) else 1, 1)
        site = each.front_end(each.name, type(each.module).__name__, grids.get(each.name))
        site.cross = each.crosses
        install(site, each.module, make_core(each.module, shape, config))
    _settle(model)


def _remark(each: Found) -> None:
    """Have the report say what a module does that is not all in its config."""
    site = site_at(each)
    calls = [seen for seen in site.seen or [] if seen.sliding_window is not None or seen.window_ended]
    if calls:
        size = f" of {calls[0].sliding_window} tokens" if calls[0].sliding_window else ""
        window = f"sliding window{size}: exact in longer sequences, by the config in others"
        if not any(seen.window_ended for seen in calls):
            window += "; not checked in longer ones"
        site.remark = "; ".join(filter(None, (site.remark, window)))
    if each.crosses:
        cross = f"cross attention: exact where there are fewer than {LEAST_QUERIES} queries"
        site.remark = "; ".join(filter(None, (site.remark, cross)))


def _keep_learned(core: AstrocyteAttention, before: AstrocyteAttention | None) -> None:
    """Let a learned layer go on where it would start from the same weights: whoever trains it goes on too."""
    old = None if before is None else before.hidden
    if isinstance(core.hidden, LearnedHidden) and isinstance(old, LearnedHidden) and core.hidden.start == old.start:
        core.hidden = old


def _causal_refusal(each: Found) -> str | None:
    """Why the config cannot serve a causal module, unless its near field covers the longest sequence there can be."""
    site, core = site_at(each), getattr(each.module, CORE)
    calls = [seen for seen in site.seen or [] if seen.refusal is None]
    causal = calls[0].causal if calls else type(site).is_causal(each.module)
    settings = getattr(each.module, "config", None)
    longest = next((value for name in LONGEST if isinstance(value := getattr(settings, name, None), int)), None)
    near = longest is not None and not each.crosses
    if near and all(config.hidden == "exact" or config.near >= longest for config in core.configs):
        return None
    if core.shares_keys and (reason := _streaming_refusal(each)):
        return reason
    soft_cap, bias = calls[0].soft_cap if calls else None, any(seen.bias for seen in calls)
    refusal: str | None = core.refusal(causal=causal, soft_cap=soft_cap, bias=bias, cross=each.crosses or None)
    return refusal


def _streaming_refusal(each: Found) -> str | None:
    """Why a module can have no streaming memory in a cache, or None."""
    site, module = site_at(each), each.module
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
            lost = site.grid is None and not site.cross and site.sees_patches(each.module)
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
