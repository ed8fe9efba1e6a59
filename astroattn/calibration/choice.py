"""The best mixture of configs for a cost."""

from __future__ import annotations

from astroattn.fidelity.metrics import Array
from astroattn.imports import needs

with needs("eval"):
    import numpy as np


class Choice:
    """Which config each of T heads has, for the least sum of effects at a cost.

    Args:
        effect: [C, T], of each config on each head; infinite where it cannot be.
        products: [C, T], what it costs. softmax: [T], what exact attention does.
    """

    def __init__(self, effect: Array, products: Array, softmax: Array) -> None:
        self._effect, self._products, self._total = effect, products, float(softmax.sum())
        usable = np.where(np.isfinite(effect), products, np.inf)
        start = np.lexsort((effect, usable), axis=0)[0]  # of each head the cheapest, of several the truest
        steps = [step for head in range(len(softmax)) for step in self._hull(head, int(start[head]))]
        self._start, self._steps = start, sorted(steps, key=lambda step: -step[0])

    @property
    def least(self) -> float:
        """The least cost of all mixtures, relative to softmax attention."""
        return self.cost(self._start)

    def cost(self, choice: Array) -> float:
        """What a mixture costs, relative to softmax attention."""
        return float(self._products[choice, np.arange(len(choice))].sum()) / self._total

    def within(self, budget: float) -> Array:
        """The mixture [T] of least effect whose cost does not exceed the budget.

        Along the lower hulls of all heads, by falling gain per product, that is the least sum of effects + lambda
        cost for some lambda; what is left of the budget goes greedily to whatever still fits.
        """
        heads = np.arange(len(self._start))
        choice: Array = self._start.copy()
        left = (budget * (1 + 1e-9) - self.least) * self._total
        for _, head, config, price in self._steps:
            if price > left:
                break
            choice[head] = config
            left -= price
        while True:
            gain = self._effect[choice, heads] - self._effect
            prices = self._products - self._products[choice, heads]
            rate = np.where((gain > 0) & (prices <= left), gain / np.maximum(prices, 1e-9 * self._total), 0)
            config, head = divmod(int(rate.argmax()), rate.shape[1])
            if rate[config, head] <= 0:
                return choice
            choice[head] = config
            left -= float(prices[config, head])

    def _hull(self, head: int, config: int) -> list[tuple[float, int, int, float]]:
        """The steps up the lower hull of (products, effect) of a head: gain per product, head, config, price."""
        effect, products = self._effect[:, head], self._products[:, head]
        steps: list[tuple[float, int, int, float]] = []
        while True:
            gain, price = effect[config] - effect, products - products[config]
            rate = np.where((gain > 0) & (price > 0), gain / np.where(price > 0, price, 1), 0)
            best = int(rate.argmax())
            if rate[best] <= 0:
                return steps
            steps.append((float(rate[best]), head, best, float(price[best])))
            config = best
