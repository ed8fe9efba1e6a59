"""What masks over queries and keys say: padding, causality, documents side by side, a bias, or more than these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from astroattn.ops.library import in_graph

HIDDEN = -9984.0  # -10,000 in bfloat16; exp of it is zero, so a score this much lower has no weight
FAINT = 30.0  # exp of so much less is lost beside 1 in float32

DENSE = "a dense mask over queries and keys, which is more than a padding mask"
BIAS_IN_GRAPH = "a bias on the scores in a graph, which cannot tell it from a mask"
NOT_THE_BIAS = "astroattn: what is added to the scores hides other keys than the bias that patch has seen"
FACTOR = "a factor on the scores of every query and key"
ROWS = 512  # of a mask, which are compared at once


@dataclass
class Mask:
    """A mask in our words.

    Attributes:
        real: [B, Nk] bool, the keys that are real tokens; None: all are.
        causal: whether a query sees no later key.
        documents: [B, N] integers that grow from one document to the next; None: there is one in each row.
        bias: [1 or B, 1 or H, 1 or Nq, Nk], added to the scores; of keys that are no real tokens any numbers.
        refusal: why it cannot be said in these words.
    """

    real: Tensor | None = None
    causal: bool = False
    documents: Tensor | None = None
    bias: Tensor | None = None
    refusal: str | None = None


class Expected(NamedTuple):
    """What a graph, which cannot look at its numbers, takes a float mask over queries and keys for.

    Attributes:
        bias: a bias. padding: which may hide keys from all queries; the graph asserts that there is no more to it.
    """

    bias: bool = False
    padding: bool = False


NOTHING = Expected()


def read_mask(mask: Tensor | None, batch: int, keys: int, expected: Expected = NOTHING) -> Mask:
    """Read an attention mask, broadcastable to `[B, H, Nq, Nk]`: bool, True for what is seen, or added to scores."""
    said = Mask() if mask is None else _read(mask, keys, expected)
    real, documents = for_batch(said.real, batch), for_batch(said.documents, batch)
    return Mask(real, said.causal, documents, said.bias, said.refusal)


def for_batch(x: Tensor | None, batch: int) -> Tensor | None:
    """What is said of `[1 or B, Nk]` as `[B, Nk]`; None, or of another batch, which `attend` refuses, as it is."""
    return x.expand(batch, -1) if x is not None and x.shape[0] == 1 else x


def _read(mask: Tensor, keys: int, expected: Expected) -> Mask:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return Mask(refusal="a mask of integers")
    if mask.dim() in (2, 3):  # of all sequences, and heads
        mask = mask[(None,) * (4 - mask.dim())]
    compiling = torch.compiler.is_compiling()
    if is_bias(mask) or (compiling and _may_be_bias(mask, expected)):
        return read_bias(mask, expected)
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
            if mask.dtype != torch.bool:
                return read_bias(mask, expected)
        elif mask.dtype != torch.bool and mask.shape[-1] == keys:
            return read_bias(mask, expected)
    if mask.dim() != 4 or mask.shape[1:3] != (1, 1) or mask.shape[-1] != keys:
        return Mask(refusal=DENSE)
    if mask.dtype != torch.bool:
        real = mask == 0
        plain = (real | (mask <= HIDDEN)).all()
        if compiling and keys == 1:
            return Mask(refusal=BIAS_IN_GRAPH)  # it may be one on one query and key, which changes nothing
        if compiling:
            torch._assert_async(plain, "astroattn: a float mask over keys may only hold 0 and -1e4 or less")
        elif not plain:
            return read_bias(mask, expected)
        mask = real
    return Mask(mask[:, 0, 0, :])


def is_bias(mask: Tensor) -> bool:
    """Whether a mask is a bias, though it may be zero now: a learned one, or one of its own for every head."""
    if not mask.is_floating_point() or mask.dim() != 4:
        return False
    return mask.requires_grad or (mask.shape[1] > 1 and mask.shape[2] > 1)


def _may_be_bias(mask: Tensor, expected: Expected) -> bool:
    """Whether a graph takes a mask for a bias."""
    return expected.bias and mask.is_floating_point() and mask.dim() == 4 and mask.shape[2] > 1


def read_bias(mask: Tensor, expected: Expected) -> Mask:
    """A bias [1 or B, 1 or H, 1 or Nq, Nk], and the keys that it hides from every query and head alike.

    It may hide all keys from queries that are no real tokens: what padding sees does not matter.
    """
    compiling = torch.compiler.is_compiling()
    if in_graph() and not (compiling and _may_be_bias(mask, expected)):
        return Mask(refusal=BIAS_IN_GRAPH)
    if compiling and not expected.padding:
        torch._assert_async((mask > HIDDEN).all(), NOT_THE_BIAS)
        return Mask(bias=mask)
    if not compiling and bool(mask.amin() > HIDDEN):
        return Mask(bias=mask)
    seen = mask > HIDDEN
    real = seen.any(2, keepdim=True).any(1, keepdim=True)  # [1 or B, 1, 1, Nk]
    right = seen == real
    if mask.shape[2] == mask.shape[3]:
        right = right | ~real.mT
    if compiling:
        torch._assert_async(right.all(), NOT_THE_BIAS)
    elif not bool(right.all()):
        return Mask(refusal=DENSE)
    return Mask(real[:, 0, 0], bias=mask)


def is_torn(bias: Tensor) -> bool:
    """Whether what a bias shows to one query it hides from the next, as Swin's -100 do: a mask in moderate numbers.

    The mean over a tile of such numbers is near to none of them. In a graph it is asserted that it does not.
    """
    if not torch.compiler.is_compiling():
        least, most = bias.aminmax()
        if bool(most - least <= FAINT):
            return False
    one, other = bias[:, :, :-1], bias[:, :, 1:]
    torn = ((one - other).abs() > FAINT) & (one > HIDDEN) & (other > HIDDEN)
    if torch.compiler.is_compiling():
        torch._assert_async(~torn.any(), NOT_THE_BIAS)
        return False
    return bool(torn.any())


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
    masks: tuple[tuple[str, Any], ...],
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    causal: bool,
    expected: Expected,
) -> Mask:
    """What masks that were put on scores one after the other say together.

    `causal` is what they are taken for where that cannot be told: with one query, and in a graph, which asserts it;
    `expected` is that of a bias.
    """
    real: Tensor | None = None  # [1 or batch, keys]
    seen: Tensor | None = None  # [1 or batch, queries, keys]
    known = False  # to be causal
    documents: Tensor | None = None
    bias: Tensor | None = None
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
        if not _fits(mask, batch, heads):
            return Mask(refusal=DENSE)
        mask = _per_head(mask, batch, heads)
        if kind == "keep":
            if not _holds((mask == 0) | (mask == 1)):
                return Mask(refusal=FACTOR)
            factors.append((mask != 0).all(1))
            continue
        visible = ~mask if kind == "hide" else mask == 0
        added = kind == "add" and (is_bias(mask) or (in_graph() and _may_be_bias(mask, expected)))
        added = added or mask.requires_grad  # what a product is added to ("base") may be nothing but room for it
        if added and in_graph():
            found = read_bias(mask, expected)
            if found.bias is None:
                return found
            bias = found.bias if bias is None else bias + found.bias
            if found.real is not None:
                real = found.real if real is None else real & found.real
            continue
        if kind != "hide" and in_graph():
            if not _holds(visible | (mask <= HIDDEN)):
                return Mask(refusal=BIAS_IN_GRAPH)
        elif kind != "hide" and (added or not _holds(visible | (mask <= HIDDEN))):
            visible = mask > HIDDEN
            bias = mask if bias is None else bias + mask
            if _holds(visible):
                continue
        if visible.shape[1] > 1 and not _holds(visible == visible[:, :1]):
            return Mask(refusal=DENSE)
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
            wanted = real[:, None, :] & order if causal else real[:, None, :]
            _holds((dense == wanted) | ~counts)
    if real is not None and not torch.compiler.is_compiling() and bool(real.all()):
        real = None
    return Mask(for_batch(real, batch), known or (causal and queries == 1), for_batch(documents, batch), bias)


def _fits(mask: Tensor, batch: int, heads: int) -> bool:
    """Whether a mask is one of these sequences and heads: scores may have had other axes when it was put on them."""
    if mask.dim() == 3:
        return mask.shape[0] in (1, batch * heads)
    return mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)


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
