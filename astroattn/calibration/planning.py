"""The steps of a calibration: split, measure, choose, verify."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from astroattn.calibration.choice import Choice
from astroattn.calibration.effects import DIRECTIONS, Measured, NotDifferentiable, exact, measure, noted
from astroattn.calibration.items import Split, read, split, take
from astroattn.calibration.menu import check_menu, default_menu
from astroattn.calibration.state import State, identify
from astroattn.calibration.verifying import Metric, Verifier, check_metric
from astroattn.config import AstroConfig
from astroattn.fidelity.calls import find_astrocytes
from astroattn.fidelity.environment import describe_versions
from astroattn.fidelity.metrics import Array
from astroattn.fidelity.passes import POOLINGS, forward, to_model
from astroattn.fidelity.speech import within_encoder
from astroattn.fidelity.subject import left_exact, share_weights
from astroattn.patching import PatchReport, fallbacks, patched, unpatch
from astroattn.patching.site import CORE
from astroattn.plan import FALLING, HeadShare, Plan, Promise

BUDGETS = 15  # costs of which the cheapest that keeps a tolerance is searched, in equal ratios; the last is exact


@dataclass(frozen=True)
class Wish:
    """What `calibrate` was asked for; its arguments."""

    tolerance: float | None
    cost: float | None
    metric: Metric
    menu: Sequence[AstroConfig] | None
    where: Any
    pooling: str
    seed: int
    progress: bool
    state: Path | None

    def check(self) -> None:
        """Raise TypeError or ValueError for what does not fit."""
        if (self.tolerance is None) == (self.cost is None):
            raise ValueError("tolerance, cost: give exactly one of them")
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
    with patched(subject, AstroConfig(), where) as report:
        length = _longest(subject, kept[0])
        menu = check_menu(default_menu(length) if wish.menu is None else wish.menu)
        parts = split(kept, length, wish.seed)
    verifier = Verifier(
        subject, parts.unseen, wish.metric, wish.tolerance, wish.pooling, wish.seed, progress=wish.progress
    )
    verifier.require_items(parts.wanted)
    with patched(subject, AstroConfig(), where):
        cores = find_astrocytes(subject)
        modules = {name.removesuffix(CORE).removesuffix("."): core.num_heads for name, core in cores.items()}
        known = identify(model, modules, menu, parts.choosing, seed=wish.seed, pooling=wish.pooling)
        state = State(wish.state, known)
        _measure(subject, parts, menu, wish, state)
        notes = [*state.notes, *_left_out(report, fallbacks(subject))]
    maker = _Maker(subject, where, menu, modules, state.items, verifier, wish)
    provenance = {
        "seed": wish.seed,
        "choosing_items": len(parts.choosing),
        "choosing_tokens": sum(parts.tokens),
        "verifying_items": parts.verifying,
        "menu": len(menu),
        "versions": describe_versions(),
    }
    plan = maker.for_tolerance() if wish.cost is None else maker.for_cost(wish.cost)
    return replace(plan, provenance=provenance, notes=(*plan.notes, *notes))


def _longest(subject: nn.Module, batch: Any) -> int:
    """The most keys that a call of an astrocyte has for the first item."""
    with exact(subject), noted(subject) as calls, torch.no_grad():
        forward(subject, to_model(subject, take(batch, [0])))
    if not calls:
        raise ValueError("model: its astrocytes were not called; no call could be represented, or none was made")
    return max(call.key.shape[2] for _, call, _ in calls)


def _measure(subject: nn.Module, parts: Split, menu: list[AstroConfig], wish: Wish, state: State) -> None:
    """Measure the choosing items that the state does not hold yet."""
    directions = 0 if state.notes else DIRECTIONS
    done = len(state.items)
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


class _Maker:
    """Makes plans of what was measured, and verifies them."""

    def __init__(
        self,
        subject: nn.Module,
        where: Any,
        menu: list[AstroConfig],
        modules: dict[str, int],
        items: Sequence[Measured],
        verifier: Verifier,
        wish: Wish,
    ) -> None:
        effect = torch.stack([item.effect for item in items]).mean(0)
        products = torch.stack([item.products for item in items]).sum(0)
        softmax = torch.stack([item.softmax for item in items]).sum(0)
        called = softmax > 0  # a module that no item calls stays exact, as it is not in the plan
        names = [name for name, heads in modules.items() for _ in range(heads)]
        self._modules = Counter(name for name, each in zip(names, called.tolist(), strict=True) if each)
        self._effect, self._products = effect[:, called].numpy(), products[:, called].numpy()
        self._softmax = softmax[called].numpy()
        self._choice = Choice(self._effect, self._products, self._softmax)
        self._subject, self._where, self._menu, self._verifier, self._wish = subject, where, menu, verifier, wish

    def for_cost(self, cost: float) -> Plan:
        """The truest plan for a cost."""
        if cost < self._choice.least:
            raise ValueError(f"cost: {cost:g}; the least that this menu has here is {self._choice.least:.4f}")
        chosen = self._choice.within(cost)
        return self._plan(chosen, self._verify(chosen, "verifying"))

    def for_tolerance(self) -> Plan:
        """The cheapest plan that keeps the tolerance together with the next cheaper one, of `BUDGETS` costs.

        The cheapest that keeps it was picked on the verifying items as the luckiest of all that were tried.
        """
        least = min(self._choice.least, 1.0)
        budgets = [least ** (1 - step / BUDGETS) for step in range(BUDGETS)]
        tried: dict[bytes, tuple[Array, Promise]] = {}

        def keeps(step: int) -> bool:
            chosen = self._choice.within(budgets[step])
            if chosen.tobytes() not in tried:
                tried[chosen.tobytes()] = chosen, self._verify(chosen, f"verifying a cost of {budgets[step]:.0%}")
            return bool(tried[chosen.tobytes()][1].kept)

        broken, kept = -1, BUDGETS  # indices: the dearest that does not keep it, the cheapest that does
        while kept - broken > 1:
            middle = (broken + kept) // 2
            if keeps(middle):
                kept = middle
            else:
                broken = middle
        # another plan, for several costs may give the same
        cheapest = None if kept == BUDGETS else self._choice.within(budgets[kept]).tobytes()
        dearer = (s for s in range(kept + 1, BUDGETS) if self._choice.within(budgets[s]).tobytes() != cheapest)
        taken = next((step for step in dearer if keeps(step)), BUDGETS)
        best = self._exact() if taken == BUDGETS else self._choice.within(budgets[taken])
        _, promise = tried.get(best.tobytes(), (best, self._verifier.certain()))
        failed = [each for each in tried.values() if not each[1].kept]
        notes = [
            f"at a cost of {self._choice.cost(chosen):.1%} the tolerance is not kept: "
            f"{'at most' if self._falling else 'at least'} {self._bound(promise):.4f}"
            for chosen, promise in failed[-1:]
        ]
        if taken == BUDGETS:
            notes.insert(0, "only exact attention keeps this tolerance, so the plan saves nothing")
        return self._plan(best, promise, notes)

    @property
    def _falling(self) -> bool:
        return self._verifier.metric in FALLING

    def _bound(self, promise: Promise) -> float:
        return promise.high if self._falling else promise.low

    def _exact(self) -> Array:
        return np.full(len(self._softmax), len(self._menu) - 1)

    def _verify(self, chosen: Array, title: str) -> Promise:
        with patched(self._subject, Plan(model="", modules=self._heads(chosen)), self._where):
            return self._verifier.verify(self._subject, title)

    def _heads(self, chosen: Array) -> dict[str, tuple[AstroConfig, ...]]:
        configs = iter([self._menu[number] for number in chosen])
        return {name: tuple(next(configs) for _ in range(heads)) for name, heads in self._modules.items()}

    def _plan(self, chosen: Array, promise: Promise, notes: Sequence[str] = ()) -> Plan:
        heads = np.arange(len(chosen))
        effect, products = self._effect[chosen, heads], self._products[chosen, heads]
        shares = iter(
            HeadShare(*map(float, values))
            for values in zip(
                products / self._softmax,
                products / products.sum(),
                effect / max(effect.sum(), np.finfo(float).tiny),
                strict=True,
            )
        )
        return Plan(
            model=type(self._subject).__name__,
            modules=self._heads(chosen),
            shares={name: tuple(next(shares) for _ in range(count)) for name, count in self._modules.items()},
            cost=self._choice.cost(chosen),
            promise=promise,
            notes=tuple(notes),
        )
