"""The calls of the `AstrocyteAttention` modules of a model, and what they cost."""

from __future__ import annotations

import inspect
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from astroattn.attention import AstrocyteAttention
from astroattn.checks import is_cross
from astroattn.config import AstroConfig
from astroattn.cost import budget_of, count_cost
from astroattn.ops.layout import Budget
from astroattn.ops.noting import ExactKeys, listening


class AttentionCall(NamedTuple):
    """The arguments of one call of an `AstrocyteAttention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]  # key_mask, causal, scale, grid, window, sink, soft_cap, bias, cross

    @property
    def scale(self) -> float:
        """What multiplies q.k."""
        scale = self.options.get("scale")
        return float(self.query.shape[-1] ** -0.5 if scale is None else scale)

    @property
    def cross(self) -> bool:
        """Whether the queries are those of another sequence than the keys."""
        options = bool(self.options.get("causal")), self.options.get("cross")
        return is_cross(self.query.shape[2], self.key.shape[2], *options)

    def real_queries(self) -> Tensor:
        """Bool [B, Nq]: the queries that are real tokens, the last of the keys; those of another sequence all are."""
        batch, _, count, _ = self.query.shape
        mask = self.options.get("key_mask")
        if mask is None or self.cross:
            return self.query.new_ones(batch, count, dtype=torch.bool)
        real: Tensor = mask[:, mask.shape[1] - count :].expand(batch, count)
        return real

    def sequence(self, index: int) -> AttentionCall:
        """The call on one of the sequences alone."""
        mask = self.options.get("key_mask")
        own = {} if mask is None else {"key_mask": mask.expand(len(self.query), -1)[index : index + 1]}
        if (bias := self.options.get("bias")) is not None and len(bias) > 1:
            own["bias"] = bias[index : index + 1]
        query, key, value = (x[index : index + 1] for x in self[:3])
        return AttentionCall(query, key, value, self.options | own)


_FORWARD = inspect.signature(AstrocyteAttention.forward)


def read_call(module: AstrocyteAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionCall:
    values = dict(_FORWARD.bind(module, *args, **kwargs).arguments)
    values.pop("self")
    return AttentionCall(values.pop("query"), values.pop("key"), values.pop("value"), values)


def find_astrocytes(model: nn.Module) -> dict[str, AstrocyteAttention]:
    return {name: module for name, module in model.named_modules() if isinstance(module, AstrocyteAttention)}


class _Call(NamedTuple):
    module: AstrocyteAttention | None  # None for an attention module left exact
    rows: int
    queries: int
    keys: int
    causal: bool
    grid: tuple[int, int] | None
    window: int | None
    cross: bool
    key_mask: Tensor | None
    exact_keys: list[tuple[Budget, list[float]]]  # of a budget whose inputs decide, the mean of a sub-tile by sequence

    def decided(self) -> list[dict[AstroConfig, float]]:
        """By sequence, how many keys a sub-tile reads exactly in the mean, of each config whose inputs decide."""
        rows: list[dict[AstroConfig, float]] = [{} for _ in range(self.rows)]
        configs = [] if self.module is None else [config for config, _ in self.module.budgets]
        for budget, numbers in self.exact_keys:
            for config in configs:
                if budget_of(config, self.keys, self.grid, self.cross) == budget:
                    for row, number in zip(rows, numbers, strict=True):
                        row[config] = number
        return rows


class _Sequence(NamedTuple):
    """What the cost of a config depends on besides it."""

    head_dim: int
    queries: int
    keys: int
    causal: bool
    grid: tuple[int, int] | None
    cross: bool


class CostMeter:
    """The mean cost of a query over the attention calls of a model.

    Positions are the keys and centroids that a query attends to; the cost is the number of products of length D over
    the 2N of softmax. Both come from `AstrocyteAttention.cost`, with the number of real tokens of every row, and of
    keys that were read exactly where inputs decide. Attention modules that patching left exact count with all their
    keys and a cost of 1.

    Attributes:
        causal: whether a call of an astrocyte was causal.
        longest: most keys of a call of an astrocyte, those with a window of their own left out; 0 where there is none.
    """

    def __init__(self, model: nn.Module, exact: Sequence[str] = ()) -> None:
        self.follow(model, exact)
        self._calls: list[_Call] = []
        self._queries = self._keys = self._positions = self._products = 0.0
        self._products_of: dict[str, float] = defaultdict(float)
        self.causal, self.longest = False, 0
        self._sequences: Counter[_Sequence] = Counter()  # of the calls added last
        self._attended = 0.0  # positions of the queries of these

    def follow(self, model: nn.Module, exact: Sequence[str] = ()) -> None:
        """Note the calls of this model from now on."""
        self._astrocytes = find_astrocytes(model)
        self._exact = {name: model.get_submodule(name) for name in exact}
        self._names = {module: name for name, module in self._astrocytes.items()}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Note the calls inside the block; only shapes and references are kept, so that timing is not disturbed."""
        handles = [m.register_forward_pre_hook(self._note, with_kwargs=True) for m in self._astrocytes.values()]
        handles += [m.register_forward_pre_hook(self._note_exact, with_kwargs=True) for m in self._exact.values()]
        try:
            with listening(self._hear):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, mask: Tensor | None) -> None:
        """Add up the calls noted; `mask` holds the real tokens of the batch, for the modules left exact."""
        calls: dict[tuple[Any, ...], int] = defaultdict(int)
        for call in self._calls:
            module, rows, queries, keys, causal, grid, window, cross, key_mask, _ = call
            if module is None and mask is not None and mask.shape[1] == keys:
                key_mask = mask
            lengths = [keys] * rows if key_mask is None else key_mask.sum(1).tolist()
            for real, decided in zip(lengths, call.decided(), strict=True):
                asked, exact = queries if cross else min(queries, real), frozenset(decided.items())
                calls[module, asked, real, causal, grid, window, cross, exact] += 1
        self._calls.clear()
        self._sequences.clear()
        self._attended = 0.0
        for (module, queries, keys, causal, grid, window, cross, exact), count in calls.items():
            if keys == 0:
                continue
            positions, ratio = float(keys), 1.0
            weight = count * queries
            if module is not None:
                options = {"grid": grid, "window": window, "cross": cross, "exact_keys": dict(exact)}
                cost = module.cost(queries, keys, causal=causal, **options)
                positions, ratio = cost.positions, cost.ratio
                self._products_of[self._names[module]] += weight * keys * ratio
                if window is None:
                    self._sequences[_Sequence(module.head_dim, queries, keys, causal, grid, cross)] += weight
                    self.causal, self.longest = self.causal or causal, max(self.longest, keys)
                    self._attended += weight * positions
            self._queries += weight
            self._keys += weight * keys
            self._positions += weight * positions
            self._products += weight * keys * ratio

    def totals(self) -> dict[str, float]:
        """Means per query: `keys` (what softmax attends to), `positions`, and `cost` relative to softmax."""
        if not self._queries:
            return {}
        return {
            "keys": self._keys / self._queries,
            "positions": self._positions / self._queries,
            "cost": self._products / self._keys,
        }

    def cost_shares(self) -> dict[str, float]:
        """By the name of an astrocyte, its part of the products of all attention calls."""
        return {name: products / self._products for name, products in self._products_of.items()}

    def attended(self) -> float:
        """Mean positions of a query of the astrocytes in the calls added last, those with their own window left out."""
        return self._attended / max(self._sequences.total(), 1)

    def would_attend(self, config: AstroConfig) -> float:
        """The same with this config in all of them."""
        return (
            sum(weight * count_cost(config, *sequence).positions for sequence, weight in self._sequences.items())
            / self._sequences.total()
        )

    def _note(self, module: AstrocyteAttention, args: Any, kwargs: Any) -> None:
        seen = read_call(module, args, kwargs)
        key_mask = seen.options.get("key_mask")
        rows, _, queries, _ = seen.query.shape
        causal, grid, window = (seen.options.get(name) for name in ("causal", "grid", "window"))
        keys = seen.key.shape[2]
        self._calls.append(_Call(module, rows, queries, keys, bool(causal), grid, window, seen.cross, key_mask, []))

    def _hear(self, found: ExactKeys) -> None:
        self._calls[-1].exact_keys.append((found.budget, found.numbers().mean(1).tolist()))

    def _note_exact(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        states = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim == 3]
        if states:
            rows, count, _ = states[0].shape
            self._calls.append(_Call(None, rows, count, count, False, None, None, False, None, []))
