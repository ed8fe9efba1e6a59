"""What the kernels of `kernels.near_far` read, forward and backward, given what was chosen."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from astroattn.ops import near_far
from astroattn.ops.choosing import Choice
from astroattn.ops.kernels.near_far_forward import entry_kernel, write_kernel
from astroattn.ops.kernels.rows import cdiv, power_of_2
from astroattn.ops.layout import Layout
from astroattn.ops.near_far import Union
from astroattn.ops.tiles import find_slots, mean_and_rest

LIKE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
WRITTEN = {64: (64, 32), 128: (32, 32), 256: (16, 16)}  # tiles, at most, and keys of `write`, by padded head dim
ENTRIES = 64  # of a tile, whose u.k one program makes


class Hidden(NamedTuple):
    """The hidden layer.

    Attributes:
        weights: w [Z, m, D]. total: what the keys of a cluster weigh together in it [Z, m].
        read: a bit of each key that a sub-tile of the tile reads exactly, in that order [Z, T, words].
        ordered: the body keys in the order of their clusters [Z, n]. begins: where each of those begins [Z, m + 1].
        log_z: log z [Z, T, m], measured from the tile's top. mean_value: s / z [Z, T, m, Dv].
    """

    weights: Tensor
    total: Tensor
    read: Tensor
    ordered: Tensor
    begins: Tensor
    log_z: Tensor
    mean_value: Tensor

    def written(self) -> tuple[Tensor, ...]:
        """What differentiating `write` takes, behind the keys and values."""
        return self.read, self.ordered, self.begins, self.log_z


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
    (size, tokens, _), body = key.shape, key.shape[1] - prefix
    token, real = find_slots(order, layout)
    mean = mean_and_rest(query[:, prefix:], token, real)[0].contiguous()
    tiles, subtiles = token.shape[1], layout.subtiles()
    most = layout.union(body) if _is_captured(key) else None
    union = near_far.find_union(keys, tiles, subtiles, body, most)

    # What a tile reads exactly: the prefix, all of it by every query, and the union.
    head = torch.arange(prefix, device=key.device).expand(size, tiles, -1)
    index = torch.cat([head, (union.keys + prefix).where(union.there, -1)], -1).int()
    taken = torch.cat([union.taken.new_ones(size, tiles, subtiles, prefix), union.taken], -1)
    rows = key.to(dtype).contiguous(), value.to(dtype).contiguous()
    bias, entries = key.new_empty(index.shape), index.shape[2]
    entry_kernel[(size * tiles * cdiv(entries, ENTRIES),)](
        mean, rows[0], index, bias, tokens, tiles, entries, **key_dims(key.shape[2]), E=ENTRIES
    )
    owner = torch.empty_like(index)
    top = bias.amax(-1) if entries else key.new_full((size, tiles), -torch.inf)
    if m:
        owner = winners[:, None].expand(-1, tiles, -1).gather(2, union.keys)
        owner = torch.cat([torch.zeros_like(head), owner], -1).int()
    hidden = _write(mean, *rows, union, winners, choice.mass.to(key.dtype), layout)
    if m:
        top = torch.maximum(top, hidden.log_z.amax(-1))
    top = top.clamp(min=torch.finfo(top.dtype).min)
    hidden.log_z.sub_(top[..., None])
    return Tiles(
        *(*rows, order.int(), mean, real, index, taken.to(torch.uint8), owner),
        *((bias - top[..., None]).contiguous(), top, hidden),
    )


def _is_captured(x: Tensor) -> bool:
    """Whether a CUDA graph is made: it cannot ask how many keys tiles read, and takes the bound, which may be more."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def key_dims(dim: int) -> dict[str, int]:
    return {"D": dim, "DP": power_of_2(dim)}


def dims_of(dim: int, value_dim: int) -> dict[str, int]:
    return key_dims(dim) | {"DV": value_dim, "DVP": power_of_2(value_dim)}


def _write(
    mean: Tensor, key: Tensor, value: Tensor, union: Union, winners: Tensor, mass: Tensor, layout: Layout
) -> Hidden:
    (size, tiles, dim), tokens, dv, m = mean.shape, key.shape[1], value.shape[2], layout.num_hidden
    log_z, mean_value = mean.new_empty(size, tiles, m), mean.new_empty(size, tiles, m, dv)
    weights, total = mean.new_empty(size, m, dim), mean.new_empty(size, m)
    ordered, begins = by_cluster(winners, m)
    read = _bits(union, ordered)
    if m:
        most, block = WRITTEN[power_of_2(max(dim, dv), least=64)]
        rows = power_of_2(tiles, most=most)
        write_kernel[(size * m * cdiv(tiles, rows),)](
            *(mean, key, value, mass.contiguous(), read, ordered, begins, weights, total, log_z, mean_value),
            *(tokens, layout.prefix, tiles, m, read.shape[2]),
            **dims_of(dim, dv), T=rows, K=block, LIKE=LIKE[value.dtype],
        )  # fmt: skip
    return Hidden(weights, total, read, ordered, begins, log_z, mean_value)


def _bits(union: Union, ordered: Tensor) -> Tensor:
    """Which keys each tile reads exactly: a bit of each, in this order of the keys [Z, T, words], int32."""
    size, body = ordered.shape
    numbers = torch.arange(body, device=ordered.device).expand(size, -1)
    place = torch.empty_like(numbers).scatter_(1, ordered.long(), numbers)
    place = place[:, None].expand(-1, union.keys.shape[1], -1).gather(2, union.keys)
    bits = union.there.int() << (place % 32).int()
    return bits.new_zeros(*bits.shape[:2], cdiv(body, 32)).scatter_add_(2, place // 32, bits)  # each bit once


def by_cluster(winners: Tensor, num_hidden: int) -> tuple[Tensor, Tensor]:
    """The keys in the order of their clusters [Z, n], and where each cluster begins, and the last ends [Z, m + 1]."""
    ordered, place = winners.sort(dim=1, stable=True)
    numbers = torch.arange(num_hidden + 1, device=winners.device).expand(len(winners), -1).contiguous()
    return place.int(), torch.searchsorted(ordered, numbers).int()
