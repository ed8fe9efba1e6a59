"""What the kernels of `kernels.near_far` read, forward and backward, given what was chosen."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from astroattn.ops import near_far
from astroattn.ops.kernels.near_far_forward import write_kernel
from astroattn.ops.kernels.rows import power_of_2
from astroattn.ops.layout import Layout
from astroattn.ops.near_far import Choice

LIKE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
TILES = 64  # whose sums one program of `write` makes, at most


class Hidden(NamedTuple):
    """The hidden layer.

    Attributes:
        weights: w [Z, m, D]. total: what the keys of a cluster weigh together in it [Z, m].
        logits: u.k of the body [Z, T, n]; -inf for a key that a sub-tile of the tile reads exactly.
        ordered: the body keys in the order of their clusters [Z, n]. begins: where each of those begins [Z, m + 1].
        log_z: log z [Z, T, m], measured from the tile's top. mean_value: s / z [Z, T, m, Dv].
    """

    weights: Tensor
    total: Tensor
    logits: Tensor
    ordered: Tensor
    begins: Tensor
    log_z: Tensor
    mean_value: Tensor


class Tiles(NamedTuple):
    """The tiles, and what they read.

    Attributes:
        key, value: all [Z, N, ...], as products take them. order: the queries in the order of their tiles [Z, n].
        mean: u [Z, T, D]. real: which slots of the tiles are [T, t].
        reads: the keys that a tile reads exactly [Z, T, entries], the prefix first; -1 where it has fewer.
        taken: which sub-tiles do [Z, T, s, entries], bytes. owner: their clusters [Z, T, entries].
        bias: their u.k [Z, T, entries], -inf where there is none, measured from top, the tile's largest [Z, T].
    """

    key: Tensor
    value: Tensor
    order: Tensor
    mean: Tensor
    real: Tensor
    reads: Tensor
    taken: Tensor
    owner: Tensor
    bias: Tensor
    top: Tensor
    hidden: Hidden

    def read(self) -> tuple[Tensor, ...]:
        """What `read_kernel` and `read_backward_kernel` take, behind the query."""
        of_hidden = self.hidden.weights, self.hidden.log_z, self.hidden.mean_value
        return *self[:4], self.reads, self.taken, self.owner, self.bias, *of_hidden, self.top


def read_tiles(query: Tensor, key: Tensor, value: Tensor, layout: Layout, choice: Choice, dtype: torch.dtype) -> Tiles:
    """Find them, and write the hidden layer. Arguments as those of `kernels.near_far.attend`."""
    prefix, m = layout.prefix, layout.num_hidden
    order, winners, keys = (x.long() for x in (choice.order, choice.winners, choice.keys))
    size, body = len(key), key.shape[1] - prefix
    reading = near_far.read_tiles(query, key, order, layout, None)
    tiles, subtiles = reading.token.shape[1], layout.subtiles()
    union = near_far.find_union(keys, tiles, subtiles, body)

    # What a tile reads exactly: the prefix, all of it by every query, and the union.
    head = torch.arange(prefix, device=key.device).expand(size, tiles, -1)
    index = torch.cat([head, (union.keys + prefix).where(union.there, -1)], -1).int()
    taken = torch.cat([union.taken.new_ones(size, tiles, subtiles, prefix), union.taken], -1)
    bias = reading.logits.gather(2, union.keys).masked_fill(~union.there, -torch.inf)
    bias = torch.cat([reading.prefix_logits, bias], -1)
    rows = key.to(dtype).contiguous(), value.to(dtype).contiguous()
    owner = torch.empty_like(index)
    top = bias.amax(-1) if index.shape[-1] else key.new_full((size, tiles), -torch.inf)
    logits = reading.logits
    if m:
        owner = winners[:, None].expand(-1, tiles, -1).gather(2, union.keys)
        owner = torch.cat([torch.zeros_like(head), owner], -1).int()
        logits = logits.masked_fill(~union.left, -torch.inf)
    hidden = _write(*rows, logits, winners, choice.mass.to(key.dtype), layout)
    if m:
        top = torch.maximum(top, hidden.log_z.amax(-1))
    top = top.clamp(min=torch.finfo(top.dtype).min)
    hidden.log_z.sub_(top[..., None])
    return Tiles(
        *(*rows, order.int(), reading.mean, reading.real, index, taken.to(torch.uint8), owner),
        *((bias - top[..., None]).contiguous(), top, hidden),
    )


def dims_of(dim: int, value_dim: int) -> dict[str, int]:
    return {"D": dim, "DP": power_of_2(dim), "DV": value_dim, "DVP": power_of_2(value_dim)}


def _write(key: Tensor, value: Tensor, logits: Tensor, winners: Tensor, mass: Tensor, layout: Layout) -> Hidden:
    (size, tiles, _), (tokens, dim), dv, m = logits.shape, key.shape[1:], value.shape[2], layout.num_hidden
    log_z, mean_value = logits.new_empty(size, tiles, m), logits.new_empty(size, tiles, m, dv)
    weights, total = logits.new_empty(size, m, dim), logits.new_empty(size, m)
    ordered, begins = by_cluster(winners, m)
    if m:
        block = power_of_2(tiles, most=TILES)
        write_kernel[(size * m * -(-tiles // block),)](
            *(logits, key, value, mass.contiguous(), ordered, begins, weights, total, log_z, mean_value),
            *(tokens, layout.prefix, tiles, m),
            **dims_of(dim, dv), T=block, K=32, LIKE=LIKE[value.dtype],
        )  # fmt: skip
    return Hidden(weights, total, logits, ordered, begins, log_z, mean_value)


def by_cluster(winners: Tensor, num_hidden: int) -> tuple[Tensor, Tensor]:
    """The keys in the order of their clusters [Z, n], and where each cluster begins, and the last ends [Z, m + 1]."""
    ordered, place = winners.sort(dim=1, stable=True)
    numbers = torch.arange(num_hidden + 1, device=winners.device).expand(len(winners), -1).contiguous()
    return place.int(), torch.searchsorted(ordered, numbers).int()
