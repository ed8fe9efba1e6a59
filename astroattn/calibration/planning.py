"""The steps of a calibration: split, measure, choose, verify."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from astroattn.calibration.effects import DIRECTIONS, NotDifferentiable, exact, measure, noted
from astroattn.calibration.items import LARGER_SHARE, LARGEST_SHARE, Split, read, split
from astroattn.calibration.maker import Maker, Patch
from astroattn.calibration.menu import check_menu, check_streaming_menu, default_menu, streaming_menu
from astroattn.calibration.state import State, identify
from astroattn.calibration.verifying import Metric, Verifier, check_metric
from astroattn.choices import POOLINGS
from astroattn.config import LEAST_ENTRIES, AstroConfig
from astroattn.fidelity.calls import find_astrocytes
from astroattn.fidelity.environment import describe_versions
from astroattn.fidelity.passes import forward, take, to_model, to_patch
from astroattn.fidelity.speech import within_encoder
from astroattn.fidelity.subject import left_exact, share_weights
from astroattn.patching import PatchReport, fallbacks, patched, unpatch
from astroattn.patching.site import CORE
from astroattn.plan import Plan


@dataclass(frozen=True)
class Wish:
    """What `calibrate` was asked for; its arguments."""

    tolerance: float | None
    cost: float | None
    entries: float | None
    metric: Metric
    menu: Sequence[AstroConfig] | None
    where: Any
    pooling: str
    seed: int
    progress: bool
    state: Path | None

    def check(self) -> None:
        """Raise TypeError or ValueError for what does not fit."""
        if sum(each is not None for each in (self.tolerance, self.cost, self.entries)) != 1:
            raise ValueError("tolerance, cost, entries: give exactly one of them")
        if self.entries is not None and (isinstance(self.entries, bool) or not isinstance(self.entries, (int, float))):
            raise TypeError(f"entries: {type(self.entries).__name__}; expected a number")
        if self.entries is not None and not (isfinite(self.entries) and self.entries >= LEAST_ENTRIES):
            raise ValueError(f"entries: {self.entries:g}; a streaming memory has at least {LEAST_ENTRIES}")
        for number, config in enumerate(self.menu or ()):
            if not isinstance(config, AstroConfig):
                raise TypeError(f"menu[{number}]: {type(config).__name__}; expected AstroConfig")
        if self.cost is not None and (isinstance(self.cost, bool) or not isinstance(self.cost, (int, float))):
            raise TypeError(f"cost: {type(self.cost).__name__}; expected a number")
        if self.cost is not None and not (isfinite(self.cost) and 0 < self.cost <= 1):
            raise ValueError(f"cost: {self.cost:g}; must be above 0 and at most 1, softmax attention's")
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling: must be one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        check_metric(self.metric, self.tolerance)


def make_plan(model: nn.Module, batches: Iterable[Any], wish: Wish) -> Plan:
    """Do what `calibrate` says."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    wish.check()
    subject = share_weights(model)
    unpatch(subject)
    where = within_encoder(subject, wish.where)
    kept = read(batches)
    patch = partial(patched, subject, where=where, inputs=to_patch(subject, kept[0]))
    base, metric = AstroConfig(), wish.metric
    if streams := _streams(wish, patch):
        base = AstroConfig(hidden="streaming")
        metric = "kl" if metric == "auto" else metric
    with patch(base) as report:
        length, groups = _look(subject, max(kept, key=_width))
        if streams:
            menu = check_streaming_menu(streaming_menu(length) if wish.menu is None else wish.menu, length)
            least, most = min(config.entries for config in menu), menu[-1].entries
            if wish.entries is not None and not least <= wish.entries <= most:
                raise ValueError(f"entries: {wish.entries:g}; this menu has {least} to {most} here")
        else:
            menu = check_menu(default_menu(length) if wish.menu is None else wish.menu)
        parts = split(kept, length, wish.seed, LARGER_SHARE if wish.tolerance is None else LARGEST_SHARE)
    verifier = Verifier(subject, parts.unseen, metric, wish.tolerance, wish.pooling, wish.seed, progress=wish.progress)
    verifier.require_items(parts.wanted)
    with patch(base):
        cores = find_astrocytes(subject)
        modules = {_owner(name): core.num_heads for name, core in cores.items()}
        all_choosing = split(kept, length, wish.seed, LARGER_SHARE).choosing  # those of another wish begin alike
        known = identify(model, modules, menu, all_choosing, seed=wish.seed, pooling=wish.pooling)
        state = State(wish.state, known)
        _measure(subject, parts, menu, wish, state)
        notes = [*state.notes, *_left_out(report, fallbacks(subject))]
    maker = Maker(subject, patch, menu, modules, state.items[: len(parts.choosing)], verifier, groups)
    provenance = {
        "seed": wish.seed,
        "choosing_items": len(parts.choosing),
        "choosing_tokens": sum(parts.tokens),
        "verifying_items": parts.verifying,
        "menu": len(menu),
        "versions": describe_versions(),
    }
    if wish.cost is not None:
        plan = maker.for_cost(wish.cost)
    elif wish.entries is not None:
        plan = maker.for_entries(wish.entries)
    else:
        plan = maker.for_tolerance()
    return replace(plan, provenance=provenance, notes=(*plan.notes, *notes))


def _streams(wish: Wish, patch: Patch) -> bool:
    """Whether streaming memories are to be chosen: where they were asked for, and where nothing else can be."""
    if wish.menu is not None:
        streams = any(config.hidden == "streaming" for config in wish.menu)
        if wish.entries is not None and not streams:
            raise ValueError(f"entries: {wish.entries:g}, but menu has no streaming memory")
    else:
        streams = wish.entries is not None or _only_streams(patch)
    if streams and wish.cost is not None:
        raise ValueError("cost: of products; a streaming memory has a number of entries: give entries or tolerance")
    return streams


def _only_streams(patch: Patch) -> bool:
    try:
        with patch(AstroConfig()):
            return False
    except ValueError as error:
        with suppress(ValueError), patch(AstroConfig(hidden="streaming")):
            return True
        raise error from None


def _look(subject: nn.Module, batch: Any) -> tuple[int, dict[str, int]]:
    """The most keys that a call of an astrocyte has for the first item; of each module, the queries to a key head."""
    with exact(subject), noted(subject) as calls, torch.no_grad():
        forward(subject, to_model(subject, take(batch, [0])))
    if not calls:
        raise ValueError("model: its astrocytes were not called; no call could be represented, or none was made")
    groups = {_owner(each.name): each.call.query.shape[1] // each.call.key.shape[1] for each in calls}
    return max(each.call.key.shape[2] for each in calls), groups


def _owner(name: str) -> str:
    """The name of the attention module of an astrocyte."""
    return name.removesuffix(CORE).removesuffix(".")


def _width(batch: Any) -> int:
    """Tokens of the items of a batch, where it is of tokens."""
    tensors = batch.values() if isinstance(batch, Mapping) else [batch]
    return max((each.shape[1] for each in tensors if isinstance(each, Tensor) and each.ndim == 2), default=0)


def _measure(subject: nn.Module, parts: Split, menu: list[AstroConfig], wish: Wish, state: State) -> None:
    """Measure the choosing items that the state does not hold yet."""
    directions = 0 if state.notes else DIRECTIONS
    done = min(len(state.items), len(parts.choosing))
    bar = tqdm(parts.choosing[done:], "measuring", len(parts.choosing), unit="item", initial=done, leave=False,
               disable=not wish.progress)  # fmt: skip
    for number, item in enumerate(bar, done):
        inputs, seed = to_model(subject, item), wish.seed + number
        try:
            measured = measure(subject, inputs, menu, wish.pooling, seed, directions)
        except NotDifferentiable as error:
            if number:
                raise ValueError(f"model: has no gradient on some items: {error}") from None
            state.notes.append(
                f"the model has no gradient ({error}), so the plan goes by each head's own error; which heads matter "
                "to the output is not known"
            )
            directions = 0
            measured = measure(subject, inputs, menu, wish.pooling, seed, directions)
        state.add(measured)


def _left_out(report: PatchReport, fallen: dict[str, dict[str, int]]) -> list[str]:
    notes = []
    if names := left_exact(report):
        notes.append(f"{len(names)} attention modules are exact and not in the plan: {', '.join(names)}")
    return notes + [f"{name}: some calls are answered by the model's own attention: {', '.join(why)}"
                    for name, why in fallen.items()]  # fmt: skip
