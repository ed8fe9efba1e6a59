"""Tiles and sub-tiles of queries: which queries they hold, their mean queries, and what those make of the keys.

As in `ops.near_far`: all is flattened over batch and heads, Z = B * H, queries are scaled, and the body is all n tokens
behind the prefix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from astroattn.ops.layout import Layout


@dataclass(frozen=True)
class Reading:
    """The queries by tile, and what they expect of the body keys by their mean queries.

    Attributes:
        asked: number of queries, those of the prefix not counted.
        token: the query in each slot [Z, T, t]; slots behind the last query repeat it and are not real.
        real: which slots are [T, t].
        mean: u [Z, T, D]. rest: r [Z, T, t, D], 0 in slots that are not real.
        logits: u.k of the body [Z, T, n], with the tile's mean bias. prefix_logits: of the prefix [Z, T, prefix].
        bias: what the bias has beside its mean [Z, T, t, n], 0 in slots that are not real; None without one.
        prefix_bias: the same for the prefix [Z, T, t, prefix].
    """

    asked: int
    token: Tensor
    real: Tensor
    mean: Tensor
    rest: Tensor
    logits: Tensor
    prefix_logits: Tensor
    bias: Tensor | None
    prefix_bias: Tensor | None


def read_tiles(query: Tensor, key: Tensor, order: Tensor, layout: Layout, bias: Tensor | None) -> Reading:
    """Mean query of each tile and its logits with every key: T * N products of length D."""
    prefix, asked = layout.prefix, order.shape[1]
    token, real = find_slots(order, layout)
    mean, rest = mean_and_rest(query[:, prefix:], token, real)
    logits = mean @ key.mT
    if bias is None:
        return Reading(asked, token, real, mean, rest, logits[..., prefix:], logits[..., :prefix], None, None)
    mean_bias, bias = mean_and_rest(bias[:, prefix:], token, real)
    logits = logits + mean_bias
    parts = logits[..., prefix:], logits[..., :prefix], bias[..., prefix:], bias[..., :prefix]
    return Reading(asked, token, real, mean, rest, *parts)


def find_slots(order: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The queries of each tile, as `Reading` has them: token [Z, T, t] and real [T, t]."""
    asked, tile = order.shape[1], layout.tile
    slots = torch.arange(layout.tiles(asked) * tile, device=order.device).view(-1, tile)
    return order[:, slots.clamp(max=asked - 1)], slots < asked


def mean_and_rest(x: Tensor, token: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over each tile [Z, T, d] of x [Z, n, d], and what is left [Z, T, t, d], 0 in slots that are not real."""
    weight = real[None, ..., None].to(x.dtype)
    by_tile = take_rows(x, token)
    mean = (by_tile * weight).sum(2) / weight.sum(2)
    return mean, (by_tile - mean[:, :, None]) * weight


def by_tile(keys: Tensor, tiles: int, subtiles: int) -> Tensor:
    """Keys of sub-tiles [Z, S, P] -> [Z, T, s, P], -1 where there is no sub-tile."""
    size, have, count = keys.shape
    none = keys.new_full((size, tiles * subtiles - have, count), -1)  # F.pad of PyTorch 2.8 refuses a count of 0
    return torch.cat([keys, none], 1).view(size, tiles, subtiles, count)


def by_subtile(x: Tensor, count: int) -> Tensor:
    """Slots of tiles [Z, T, t, ...] as slots of sub-tiles [Z, T, s, 4, ...] (fewer where the tile is smaller)."""
    return x.reshape(*x.shape[:2], count, -1, *x.shape[3:])


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Rows [Z, n, D] at index [Z, T, P] -> [Z, T, P, D]; index_select is the fastest gather, and its backward too."""
    size, count, dim = rows.shape
    flat = (index + torch.arange(size, device=index.device)[:, None, None] * count).flatten()
    return rows.flatten(0, 1).index_select(0, flat).view(*index.shape, dim)


def unique(keys: Tensor, most: int) -> Tensor:
    """Each key once, -1 behind them; at most that many."""
    keys = keys.sort(-1, descending=True).values
    again = torch.zeros_like(keys, dtype=torch.bool)
    again[..., 1:] = keys[..., 1:] == keys[..., :-1]
    return keys.masked_fill(again, -1).sort(-1, descending=True).values[..., :most]
