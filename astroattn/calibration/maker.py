"""Plans for a budget or a tolerance, made of what was measured, and verified."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn

from astroattn.calibration.choice import Choice
from astroattn.calibration.effects import Measured
from astroattn.calibration.verifying import Verifier
from astroattn.config import AstroConfig
from astroattn.fidelity.calls import CostMeter
from astroattn.fidelity.metrics import Array
from astroattn.imports import needs
from astroattn.patching import PatchReport
from astroattn.plan import FALLING, HeadShare, Plan, Promise

with needs("eval"):
    import numpy as np

MOST_TIMES, SLACK = 4, 1.005  # plans that are made for a cost, until the verifying items do not cost more than this
BUDGETS = 15  # of which the smallest that keeps a tolerance is searched, in equal ratios; the last is exact


Patch = Callable[[AstroConfig | Plan], AbstractContextManager[PatchReport]]  # what `patched` does with the subject


class Maker:
    """Makes plans of what was measured, and verifies them.

    What has a choice of its own is a unit: a head, or the query heads that read one key head of a streaming memory. A
    mixture is paid in products, relative to softmax attention, or in entries, relative to the tokens of a text.
    """

    def __init__(
        self,
        subject: nn.Module,
        patch: Patch,
        menu: list[AstroConfig],
        modules: dict[str, int],
        items: Sequence[Measured],
        verifier: Verifier,
        groups: Mapping[str, int],
    ) -> None:
        effect = torch.stack([item.effect for item in items]).mean(0)
        products = torch.stack([item.products for item in items]).sum(0)
        softmax = torch.stack([item.softmax for item in items]).sum(0)
        called = softmax > 0  # a module that no item calls stays exact, as it is not in the plan
        names = [name for name, heads in modules.items() for _ in range(heads)]
        self._modules = Counter(name for name, each in zip(names, called.tolist(), strict=True) if each)
        self._effect, self._products = effect[:, called].numpy(), products[:, called].numpy()
        self._softmax = softmax[called].numpy()
        sizes = [size for name, heads in self._modules.items() for size in [groups[name]] * (heads // groups[name])]
        self._unit = np.repeat(np.arange(len(sizes)), sizes)  # of each head
        firsts = np.flatnonzero(np.diff(self._unit, prepend=-1))
        effects = np.add.reduceat(self._effect, firsts, axis=1)
        self._streams = menu[-1].hidden == "streaming"
        if self._streams:
            entries = np.array([config.entries for config in menu], float)
            self._choice = Choice(effects, np.repeat(entries[:, None], len(sizes), 1), np.full(len(sizes), entries[-1]))
        else:
            self._choice = Choice(effects, self._products, self._softmax)
        self._subject, self._patch, self._menu, self._verifier = subject, patch, menu, verifier

    def for_cost(self, cost: float) -> Plan:
        """The truest plan that costs no more, neither on the items that chose it nor on those that verify.

        Where inputs decide how many keys are exact, others than those that chose may ask for more.
        """
        if cost < self._choice.least:
            raise ValueError(f"cost: {cost:g}; the least that this menu has here is {self._choice.least:.4f}")
        budget, notes = cost, []
        for _ in range(MOST_TIMES):
            chosen = self._choice.within(budget)
            promise, spent = self._verify(chosen, "verifying")
            if spent <= cost * SLACK or budget == self._choice.least:
                break
            budget = max(budget * cost / spent, self._choice.least)
        if spent > cost * SLACK:
            notes.append(f"on the unseen items it costs {spent:.1%}")
        return self._plan(chosen, promise, notes)

    def for_entries(self, entries: float) -> Plan:
        """The truest plan with so many entries in the mean."""
        chosen = self._choice.within(entries / self._menu[-1].entries)
        return self._plan(chosen, self._verify(chosen, "verifying")[0])

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
                tried[chosen.tobytes()] = chosen, self._verify(chosen, f"verifying {budgets[step]:.0%}")[0]
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
        whole = "the tokens" if self._streams else "the cost"
        notes = [
            f"at {self._choice.cost(chosen):.1%} of {whole} the tolerance is not kept: "
            f"{'at most' if self._falling else 'at least'} {self._bound(promise):.4f}"
            for chosen, promise in failed[-1:]
        ]
        if taken == BUDGETS:
            what = "memories of whole texts keep" if self._streams else "exact attention keeps"
            notes.insert(0, f"only {what} this tolerance, so the plan saves nothing")
        return self._plan(best, promise, notes)

    @property
    def _falling(self) -> bool:
        return self._verifier.metric in FALLING

    def _bound(self, promise: Promise) -> float:
        return promise.high if self._falling else promise.low

    def _exact(self) -> Array:
        return np.full(self._unit[-1] + 1, len(self._menu) - 1)

    def _verify(self, chosen: Array, title: str) -> tuple[Promise, float]:
        """What is promised of it, and what it costs on the verifying items."""
        with self._patch(Plan(model="", modules=self._heads(chosen))):
            meter = CostMeter(self._subject)
            with meter.watch():
                promise = self._verifier.verify(self._subject, title)
        meter.add(None)
        return promise, meter.totals().get("cost", 1.0)

    def _heads(self, chosen: Array) -> dict[str, tuple[AstroConfig, ...]]:
        configs = iter([self._menu[number] for number in chosen[self._unit]])
        return {name: tuple(next(configs) for _ in range(heads)) for name, heads in self._modules.items()}

    def _plan(self, chosen: Array, promise: Promise, notes: Sequence[str] = ()) -> Plan:
        mine, heads = chosen[self._unit], np.arange(len(self._unit))
        effect, products = self._effect[mine, heads], self._products[mine, heads]
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
            cost=float(products.sum() / self._softmax.sum()),
            promise=promise,
            notes=tuple(notes),
        )
