"""Packed documents as the rows of padded batches.

Several documents in one row (packed texts, images of several sizes) are kept apart by a mask of blocks. An astrocyte
has no such mask; but each document is a sequence by itself, so it becomes a row of a batch with padding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def by_document(
    documents: Tensor,
    real: Tensor | None,
    tokens: tuple[Tensor, Tensor, Tensor],
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """Attention in which each document is a sequence by itself.

    Documents of similar length are answered together: less than half of such a batch is padding.

    Args:
        documents: as in `dense_masks.Mask`. real: [B, N] or None. tokens: query, key and value [B, H, N, ...].
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
