"""What a mask over queries and keys says, and packed documents as the rows of padded batches.

Several documents in one row (packed texts, images of several sizes) are kept apart by a mask of blocks. An astrocyte
has no such mask; but each document is a sequence by itself, so it becomes a row of a batch with padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from astroattn.patching.scores import HIDDEN, KEY_BIAS

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
    compiling = torch.compiler.is_compiling()
    if mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[2] > 1 and not compiling:
        same = mask[:, :, :1]
        if bool((mask == same).all()):  # for every query: a padding mask written out
            mask = same
        elif mask.shape[2] == mask.shape[3] == keys:
            seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
            said = read_blocks(seen)
            if said is not None and (mask.dtype == torch.bool or bool((seen | (mask[:, 0] <= HIDDEN)).all())):
                return said
    if mask.dim() != 4 or mask.shape[1:3] != (1, 1) or mask.shape[-1] != keys:
        kind = "a dense mask" if mask.dtype == torch.bool else "a dense mask or bias"
        return Mask(refusal=f"{kind} over queries and keys, which is more than a padding mask")
    if mask.dtype != torch.bool:
        real = mask == 0
        plain = (real | (mask <= HIDDEN)).all()
        if compiling:
            torch._assert_async(plain, "astroattn: a float mask over keys may only hold 0 and -1e4 or less")
        elif not plain:
            return Mask(refusal=KEY_BIAS)
        mask = real
    return Mask(mask[:, 0, 0, :])


def read_blocks(seen: Tensor, window: int | None = None) -> Mask | None:
    """What a mask [B, N, N], True where a query sees a key, says; None if it is more than documents side by side.

    Each query that is a real token (sees itself) must see the real tokens of its document, of a causal mask the earlier
    ones, and where there is a window those at most `window` tokens away. What padding sees does not matter.
    """
    count, device = seen.shape[-1], seen.device
    real = seen.diagonal(dim1=-2, dim2=-1)
    starts = torch.ones_like(real)
    starts[:, 1:] = ~seen.diagonal(-1, dim1=-2, dim2=-1) | (real[:, 1:] != real[:, :-1])
    documents = starts.cumsum(1)
    causal = not bool(seen.diagonal(1, dim1=-2, dim2=-1).any())
    places = torch.arange(count, device=device)
    for begin in range(0, count, ROWS):
        mine = slice(begin, begin + ROWS)
        expected = (documents[:, mine, None] == documents[:, None]) & real[:, None]
        distance = places[mine, None] - places
        if causal:
            expected &= distance >= 0
        if window is not None:
            expected &= distance.abs() <= window
        if bool(((expected != seen[:, mine]) & real[:, mine, None]).any()):
            return None
    several = bool(((starts & real).sum(1) > 1).any())
    return Mask(None if bool(real.all()) else real, causal, documents if several else None)


def by_document(
    documents: Tensor,
    real: Tensor | None,
    tokens: tuple[Tensor, Tensor, Tensor],
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """Attention in which each document is a sequence by itself.

    Documents of similar length are answered together: less than half of such a batch is padding.

    Args:
        documents: as in `Mask`, of B rows. real: [B, N] or None. tokens: query, key and value [B, H, N, ...].
        attend: answers a batch of them, with its key mask [rows, N] or None.

    Returns:
        [B, H, N, Dv], zeros for padding.
    """
    batch, heads, count, _ = tokens[0].shape
    row = torch.arange(batch, device=documents.device)[:, None] * (count + 1)
    _, sizes = (documents + row).flatten().unique_consecutive(return_counts=True)
    starts = sizes.cumsum(0) - sizes
    if real is not None:
        held = real.flatten()[starts]
        starts, sizes = starts[held], sizes[held]
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in tokens)  # [B N, H, ...]
    out: Tensor = value.new_zeros(batch * count, heads, value.shape[-1])
    octaves = (sizes - 1).clamp(min=1).log2().floor()  # 1 and 2 tokens, 3 and 4, 5 to 8, ...
    for octave in octaves.unique().tolist():
        chosen = octaves == octave
        first, size = starts[chosen, None], sizes[chosen, None]
        steps = torch.arange(int(size.max()), device=first.device)
        inside = steps < size
        index = (first + steps).where(inside, first)
        q, k, v = (x[index].transpose(1, 2) for x in (query, key, value))
        answer = attend(q, k, v, None if bool(inside.all()) else inside)
        out = out.to(answer.dtype).index_put((index[inside],), answer.transpose(1, 2)[inside])
    rows: Tensor = out.unflatten(0, (batch, count))
    return rows.transpose(1, 2)
