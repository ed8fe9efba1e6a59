"""Attention scores that are only described: `softmax(q k^T * scale + mask)` on its way to the product with the values.

Every function here takes one step of that way, and returns None where the step is not one of softmax attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from astroattn.ops.layout import plain
from astroattn.patching.dense_masks import HIDDEN

Labels = tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]  # of the axes of two factors and their product


@dataclass(frozen=True)
class Scores:
    """Scores, or after `softmax` weights, of queries `[*lead, Nq, D]` and keys `[*lead, Nk, D]`.

    `lead` is what the tensor has before queries and keys now: batch and heads, or both in one. `axes` is the order of
    its axes, each the place it has in (*lead, queries, keys).
    """

    query: Tensor
    key: Tensor
    lead: tuple[int, ...]
    axes: tuple[int, ...]
    dtype: torch.dtype
    heads: int | None = None  # where the shapes have shown them
    scale: float = 1.0
    masks: tuple[
        tuple[str, Any], ...
    ] = ()  # ("add", bias), ("base", the same of baddbmm), ("hide", where), ("keep", factor 0 or 1)
    softmax: bool = False
    dropout: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor that this stands for."""
        sizes = (*self.lead, plain(self.query.shape[-2]), plain(self.key.shape[-2]))
        return tuple(sizes[axis] for axis in self.axes)

    @property
    def in_order(self) -> bool:
        """Whether the axes are (*lead, queries, keys)."""
        return self.axes == tuple(range(len(self.axes)))

    def with_mask(self, kind: str, mask: Any) -> Scores | None:
        """After a mask, which must not make the scores larger by broadcasting."""
        if self.softmax or not self.in_order:
            return None
        if isinstance(mask, Tensor):
            shape = (1,) * (len(self.axes) - mask.dim()) + tuple(mask.shape)
            if len(shape) != len(self.axes) or any(m not in (1, s) for m, s in zip(shape, self.shape, strict=True)):
                return None
            mask = mask.reshape(shape)
        after = replace(self, masks=(*self.masks, (kind, mask)))
        return after if kind == "hide" else after.promoted(mask)

    def times(self, factor: Any, divide: bool = False) -> Scores | None:
        """After a factor: a number, one for every head, or 0 and 1 for every query and key."""
        if self.softmax or not self.in_order:
            return None
        if isinstance(factor, (int, float)):
            if self.masks or factor == 0:
                return None
            return replace(self, scale=self.scale / factor if divide else self.scale * factor)
        if not isinstance(factor, Tensor):
            return None
        one_each = factor.dim() == self.query.dim() and factor.shape[-2:] == (1, 1)
        if factor.numel() == 1 or (one_each and self.lead == tuple(self.query.shape[:-2])):
            if self.masks:
                return None
            after = self.promoted(factor)
            factor = factor.reshape(()) if factor.numel() == 1 else factor
            return replace(after, query=self.query / factor if divide else self.query * factor)
        return None if divide else self.with_mask("keep", factor)

    def promoted(self, other: Any) -> Scores:
        """Of the dtype that comes of these scores and another tensor."""
        if isinstance(other, Tensor) and (other.dim() == 0 or not other.is_floating_point()):
            return self
        dtype = other.dtype if isinstance(other, Tensor) else other.dtype_of_bias  # of a KeyMask
        return replace(self, dtype=torch.promote_types(self.dtype, dtype or self.dtype))

    def softmaxed(self, dim: int | None, dtype: torch.dtype | None) -> Scores | None:
        """After a softmax over the keys."""
        if self.softmax or dim is None or self.axes[dim] != len(self.lead) + 1:
            return None
        if dtype is None:
            dtype = torch.float32 if torch.is_autocast_enabled(self.query.device.type) else self.dtype
        return replace(self, softmax=True, dtype=dtype)

    def permuted(self, order: tuple[int, ...]) -> Scores:
        """With its axes in this order."""
        return replace(self, axes=tuple(self.axes[axis] for axis in order))

    def viewed(self, shape: tuple[int, ...]) -> Scores | None:
        """With batch and heads in one axis, or in two."""
        count = len(self.lead)
        if self.axes[:count] != tuple(range(count)) or shape[-2:] != self.shape[-2:]:
            return None
        lead = shape[:-2]
        last = tuple(axis - count + len(lead) for axis in self.axes[count:])
        heads = lead[1] if len(lead) == 2 else self.heads
        return replace(self, lead=lead, axes=(*range(len(lead)), *last), heads=heads)


def labels_of(name: str, args: tuple[Any, ...]) -> tuple[Labels, Tensor, Tensor] | None:
    """The factors of a matrix product or an einsum, and names for their axes."""
    if name == "einsum":
        equation, *factors = args
        if len(factors) == 1 and isinstance(factors[0], (list, tuple)):
            factors = list(factors[0])
        if len(factors) != 2 or not isinstance(equation, str) or "." in equation or "->" not in equation:
            return None
        left, _, out = equation.replace(" ", "").partition("->")
        one, _, two = left.partition(",")
        labels: Labels = (tuple(one), tuple(two), tuple(out))
        if any(len(set(each)) != len(each) for each in labels):
            return None
        return labels, factors[0], factors[1]
    if len(args) != 2 or not all(isinstance(each, Tensor) for each in args):
        return None
    one, two = args
    if one.dim() < 3 or one.dim() != two.dim():
        return None
    lead = tuple(range(one.dim() - 2))
    return ((*lead, "row", "inner"), (*lead, "inner", "column"), (*lead, "row", "column")), one, two


def scores_of(labels: Labels, one: Tensor, two: Tensor) -> Scores | None:
    """The product of queries and keys."""
    left, right, out = labels
    inner = [label for label in left if label in right and label not in out]
    rows, columns = ([x for x in mine if x not in other] for mine, other in ((left, right), (right, left)))
    lead = [label for label in out if label in left and label in right]
    if (len(inner), len(rows), len(columns)) != (1, 1, 1) or not lead:
        return None
    canonical = [*lead, *rows, *columns]
    if sorted(map(str, out)) != sorted(map(str, canonical)):
        return None
    query = one.permute([left.index(label) for label in (*lead, *rows, *inner)])
    key = two.permute([right.index(label) for label in (*lead, *columns, *inner)])
    sizes = tuple(map(plain, torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])))
    heads = sizes[1] if len(sizes) == 2 else None
    axes = tuple(canonical.index(label) for label in out)
    return Scores(query, key, sizes, axes, product_dtype(query), heads)


def product_dtype(factor: Tensor) -> torch.dtype:
    """Of what a matrix product puts out here."""
    kind = factor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else factor.dtype


def values_of(labels: Labels, weights: Scores, value: Tensor, first: bool) -> tuple[Tensor, list[int]] | None:
    """The values `[*lead, Nk, Dv]` of a product with weights, and how `[*lead, Nq, Dv]` must be permuted to be it."""
    left, right, out = labels
    mine, other = (left, right) if first else (right, left)
    canonical = [mine[weights.axes.index(axis)] for axis in range(len(mine))]
    lead, row, column = canonical[:-2], canonical[-2], canonical[-1]
    width = [label for label in other if label not in mine]
    if len(width) != 1 or {*other} != {*lead, column, *width} or {*out} != {*lead, row, *width}:
        return None
    value = value.permute([other.index(label) for label in (*lead, column, *width)])
    if any(size not in (1, mine) for size, mine in zip(value.shape, weights.lead, strict=False)):
        return None
    return value, [[*lead, row, *width].index(label) for label in out]


def split(weights: Scores, heads: int | None) -> tuple[int, int] | None:
    """Batch and heads, where `heads` is what the module says; None where they cannot be told apart."""
    if len(weights.lead) == 2:
        return weights.lead[0], weights.lead[1]
    total = prod(weights.lead)
    heads = weights.heads or heads
    if len(weights.lead) != 1 or not heads or total % heads:
        return None
    return total // heads, heads


Step = Callable[..., Scores | None]


def _add(scores: Scores, other: Any, *, alpha: float = 1, mirrored: bool = False) -> Scores | None:
    if scores.softmax or alpha != 1:
        return None
    # one number for all scores changes no weight
    return scores if isinstance(other, (int, float)) else scores.with_mask("add", other)


def _sub(scores: Scores, other: Any, *, alpha: float = 1, mirrored: bool = False) -> Scores | None:
    if mirrored or not isinstance(other, (int, float, Tensor)):
        return None
    return _add(scores, -other, alpha=alpha)


def _mul(scores: Scores, other: Any, *, mirrored: bool = False) -> Scores | None:
    return scores.times(other)


def _div(scores: Scores, other: Any, *, mirrored: bool = False) -> Scores | None:
    return None if mirrored else scores.times(other, divide=True)


def _masked_fill(scores: Scores, mask: Any, value: Any, *, mirrored: bool = False) -> Scores | None:
    return scores.with_mask("hide", mask) if not mirrored and _is_low(value) and isinstance(mask, Tensor) else None


def _max(scores: Scores, other: Any, *, mirrored: bool = False) -> Scores | None:
    return scores if _is_low(other) and not scores.softmax else None  # no score is that low


def _softmax(scores: Scores, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Scores | None:
    return scores.softmaxed(dim, dtype)


def _dropout(scores: Scores, p: float = 0.5, training: bool = True, inplace: bool = False) -> Scores | None:
    if training and p > 0:
        return replace(scores, dropout=p) if scores.softmax and not scores.dropout and not inplace else None
    return scores


def _is_low(value: Any) -> bool:
    if isinstance(value, Tensor):
        if value.numel() != 1 or torch.compiler.is_compiling():
            return False
        value = value.item()
    return isinstance(value, (int, float)) and value <= HIDDEN


# By the names of torch's functions, operators and methods.
BINARY: dict[str, Step] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "true_divide": _div,
    "masked_fill": _masked_fill,
    "max": _max,
    "maximum": _max,
}
UNARY: dict[str, Step] = {"softmax": _softmax, "dropout": _dropout}
