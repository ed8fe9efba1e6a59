"""What masks over queries and keys say: padding, causality, documents side by side, or more than an astrocyte has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HIDDEN = -9984.0  # -10,000 in bfloat16; exp of it is zero, so a score this much lower has no weight

KEY_BIAS = "a bias on keys (ALiBi, for example), which is more than a padding mask"
DENSE = "a dense mask or bias over queries and keys, which is more than a padding mask"
PER_HEAD = "a mask or bias of its own for every head (relative positions, for example)"
LEARNED = "a learned bias on the scores"
FACTOR = "a factor on the scores of every query and key"
ROWS = 512  # of a mask, which are compared at once


@dataclass
class Mask:
    """A mask in our words.

    Attributes:
        real: [B, Nk] bool, the keys that are real tokens; None: all are.
        causal: whether a query sees no later key.
        documents: [B, N] integers that grow from one document to the next; None: there is one in each row.
        refusal: why it cannot be said in these words.
    """

    real: Tensor | None = None
    causal: bool = False
    documents: Tensor | None = None
    refusal: str | None = None


def read_mask(mask: Tensor | None, batch: int, keys: int) -> Mask:
    """Read an attention mask, broadcastable to `[B, H, Nq, Nk]`: bool, True for what is seen, or added to scores."""
    said = Mask() if mask is None else _read(mask, keys)
    return Mask(for_batch(said.real, batch), said.causal, for_batch(said.documents, batch), said.refusal)


def for_batch(x: Tensor | None, batch: int) -> Tensor | None:
    """What is said of `[1 or B, Nk]` as `[B, Nk]`; None, or of another batch, which `attend` refuses, as it is."""
    return x.expand(batch, -1) if x is not None and x.shape[0] == 1 else x


def _read(mask: Tensor, keys: int) -> Mask:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return Mask(refusal="a mask of integers")
    if mask.requires_grad:
        return Mask(refusal=LEARNED)  # though it may hide nothing yet
    compiling = torch.compiler.is_compiling()
    if mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[2] > 1 and not compiling:
        same = mask[:, :, :1]
        ends_alike = bool((mask[:, :, -1:] == same).all())  # which spares most masks the comparison of all
        if ends_alike and bool((mask == same).all()):  # for every query: a padding mask written out
            mask = same
        elif mask.shape[2] == mask.shape[3] == keys:
            seen = visible(mask)
            said = read_blocks(seen)
            if said is not None and (mask.dtype == torch.bool or bool((seen | (mask[:, 0] <= HIDDEN)).all())):
                return said
    if mask.dim() != 4 or mask.shape[1:3] != (1, 1) or mask.shape[-1] != keys:
        kind = "a dense mask" if mask.dtype == torch.bool else "a dense mask or bias"
        return Mask(refusal=f"{kind} over queries and keys, which is more than a padding mask")
    if mask.dtype != torch.bool:
        real = mask == 0
        plain = (real | (mask <= HIDDEN)).all()
        if compiling and keys == 1:
            return Mask(refusal=KEY_BIAS)  # it may be a bias on one query and key, which changes nothing
        if compiling:
            torch._assert_async(plain, "astroattn: a float mask over keys may only hold 0 and -1e4 or less")
        elif not plain:
            return Mask(refusal=KEY_BIAS)
        mask = real
    return Mask(mask[:, 0, 0, :])


def visible(mask: Tensor) -> Tensor:
    """[B, Nq, Nk], True where a query sees a key, of a mask [B, 1, Nq, Nk] that is bool or 0 there."""
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0


def read_blocks(seen: Tensor, window: int | None = None) -> Mask | None:
    """What a mask [B, N, N], True where a query sees a key, says; None if it is more than documents side by side.

    Each query that is a real token (sees itself) must see the real tokens of its document, of a causal mask the earlier
    ones, and where there is a window those at most `window` tokens away. What padding sees does not matter.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return None  # a trace would take the documents of this mask for those of all others
    real = seen.diagonal(dim1=-2, dim2=-1)
    starts = torch.ones_like(real)
    starts[:, 1:] = ~seen.diagonal(-1, dim1=-2, dim2=-1) | (real[:, 1:] != real[:, :-1])
    causal = not bool(seen.diagonal(1, dim1=-2, dim2=-1).any())
    blocks = _blocks(starts, real)
    # As many as they must see, and all of those in the blocks: then there is nothing beside them.
    whole = bool(real.all())
    found = int((seen if whole else seen & real[:, :, None]).count_nonzero())
    if found != sum(_visible(end - begin, causal, window) for _, begin, end in blocks):
        return None
    for row, begin, end in blocks:
        for first in range(begin, end, ROWS):
            queries = torch.arange(first, min(first + ROWS, end), device=seen.device)[:, None]
            distance = queries - torch.arange(begin, end, device=seen.device)
            hidden = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
            hidden = hidden if window is None else hidden | (distance.abs() > window)
            if not bool((seen[row, first : first + len(queries), begin:end] | hidden).all()):
                return None
    several = bool(((starts & real).sum(1) > 1).any())
    return Mask(None if whole else real, causal, starts.cumsum(1) if several else None)


def _blocks(starts: Tensor, real: Tensor) -> list[tuple[int, int, int]]:
    """Row, first token and end of each document of real tokens."""
    count = starts.shape[1]
    begins = starts.flatten().nonzero()[:, 0]
    ends = torch.cat([begins[1:], begins.new_tensor([starts.numel()])]) if len(begins) else begins
    places = torch.stack([begins, ends], 1)[real.flatten()[begins]].tolist()
    return [(begin // count, begin % count, begin % count + end - begin) for begin, end in places]


def _visible(size: int, causal: bool, window: int | None) -> int:
    """How many keys the queries of a document of that size see together."""
    reach = size - 1 if window is None else min(window, size - 1)
    later = reach * size - reach * (reach + 1) // 2  # on one side
    return size + later * (1 if causal else 2)


def read_masks(
    masks: tuple[tuple[str, Any], ...], batch: int, heads: int, queries: int, keys: int, causal: bool
) -> Mask:
    """What masks that were put on scores one after the other say together.

    `causal` is what they are taken for where that cannot be told: with one query, and in a graph, which asserts it.
    """
    real: Tensor | None = None  # [1 or batch, keys]
    seen: Tensor | None = None  # [1 or batch, queries, keys]
    known = False  # to be causal
    documents: Tensor | None = None
    factors: list[Tensor] = []
    for kind, mask in masks:
        if not isinstance(mask, Tensor):  # a KeyMask
            if mask.window is None and mask.documents is None:
                real, known = mask.keys if real is None else real & mask.keys, known or mask.causal
                continue
            if torch.compiler.is_compiling():
                return Mask(refusal=DENSE)
            given = mask.dense()
            kind, mask = ("hide", ~given) if given.dtype == torch.bool else ("add", given)
        mask = _per_head(mask, batch, heads)
        if kind == "keep":
            if not _holds((mask == 0) | (mask == 1)):
                return Mask(refusal=FACTOR)
            factors.append((mask != 0).all(1))
            continue
        visible = ~mask if kind == "hide" else mask == 0
        if mask.requires_grad:
            return Mask(refusal=LEARNED)
        if kind == "add" and visible.shape[1] > 1 and visible.shape[2] > 1:
            return Mask(refusal=PER_HEAD)  # of relative positions, though it may be zero now
        if kind in ("add", "base") and not _holds(visible | (mask <= HIDDEN)):
            return Mask(refusal=KEY_BIAS if mask.shape[-2] == 1 else DENSE)
        if visible.shape[1] > 1 and not _holds(visible == visible[:, :1]):
            return Mask(refusal=PER_HEAD)
        visible = visible[:, 0]
        if visible.shape[1] == 1 and visible.shape[2] == keys:
            real = visible[:, 0] if real is None else real & visible[:, 0]
        else:
            seen = visible if seen is None else seen & visible
    if seen is not None or factors:
        dense = torch.ones(1, queries, keys, dtype=torch.bool, device=(seen if seen is not None else factors[0]).device)
        dense = dense if seen is None else dense & seen
        dense = dense if real is None else dense & real[:, None, :]
        order = torch.ones(queries, keys, dtype=torch.bool, device=dense.device).tril(keys - queries)
        dense = dense & order if known else dense
        if not all(_holds(factor | ~dense) for factor in factors):
            return Mask(refusal=FACTOR)
        real = dense.any(1)
        counts = real[:, None, :] if queries > keys else real[:, None, :] & real[:, -queries:, None]  # of real queries
        if not torch.compiler.is_compiling():
            plainly = _holds((dense == real[:, None, :]) | ~counts)
            known = _holds((dense == (real[:, None, :] & order)) | ~counts) and (not plainly or causal)
            if not (plainly or known):
                said = read_blocks(dense) if queries == keys else None
                if said is None:
                    return Mask(refusal=DENSE)
                documents, real, known = said.documents, said.real, said.causal
        else:
            known = causal
            expected = real[:, None, :] & order if causal else real[:, None, :]
            _holds((dense == expected) | ~counts)
    if real is not None and not torch.compiler.is_compiling() and bool(real.all()):
        real = None
    return Mask(for_batch(real, batch), known or (causal and queries == 1), for_batch(documents, batch))


def _per_head(mask: Tensor, batch: int, heads: int) -> Tensor:
    """A mask that fits scores with any lead, as one of 4 axes: batch or 1, heads or 1, ..."""
    if mask.dim() == 4:
        return mask
    return mask.unflatten(0, (batch, heads)) if mask.shape[0] > 1 else mask[None]


def _holds(condition: Tensor) -> bool:
    """Whether this holds everywhere; in a graph, which cannot ask, it is asserted when the graph runs."""
    everywhere = condition.all()
    if torch.compiler.is_compiling():
        torch._assert_async(everywhere, "astroattn: a mask is not what it was when the graph was made")
        return True
    return bool(everywhere)
