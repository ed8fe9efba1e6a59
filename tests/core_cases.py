"""Inputs, configurations and an oracle for the tests of the core (config, ops, hidden, attention)."""

from __future__ import annotations

import torch
from torch import Tensor

from astroattn import AstroConfig, AstrocyteAttention
from astroattn.ops.near_far import Choice, choose, exact_of_tiles
from astroattn.ops.reference import cluster_attention, softmax_attention
from astroattn.ops.tiles import Layout, Tiles, make_tiles

# One configuration for every path through the code; none of them covers the sequences that the tests use it on.
BIDIRECTIONAL = {
    "hebbian": AstroConfig(num_hidden=5, exact_keys=6),
    "hebbian, plain": AstroConfig(num_hidden=5, exact_keys=6, backend="torch"),
    "hebbian, one tile": AstroConfig(num_hidden=5, near=0),
    "hebbian, shared groups": AstroConfig(num_hidden=5, near=6, exact_keys=3, groups=3),
    "hebbian, shared groups, plain": AstroConfig(num_hidden=5, near=6, exact_keys=3, groups=3, backend="torch"),
    "hebbian, exact queries": AstroConfig(num_hidden=3, exact_keys=2, exact_queries=3),
    "hebbian, long tiles": AstroConfig(num_hidden=3, near=5, exact_keys=2, tile=24),
    "hebbian, no steps": AstroConfig(num_hidden=4, near=3, exact_keys=0, tile=2, steps=0),
    "near alone": AstroConfig(hidden="none", exact_keys=0, near=5),
    "near and keys": AstroConfig(hidden="none", exact_keys=4, groups=2),
    "random": AstroConfig(hidden="random", near=0),
    "random, exact queries": AstroConfig(hidden="random", near=0, exact_queries=2),
    "random, near": AstroConfig(hidden="random", exact_keys=4, near=6),
    "random, shared groups": AstroConfig(hidden="random", exact_keys=4, groups=2, exact_queries=1),
    "uniform": AstroConfig(hidden="random", activation="constant", num_hidden=1, near=0),
}
CAUSAL = {
    "causal": AstroConfig(hidden="random", near=0),
    "causal, near": AstroConfig(hidden="random", near=5, exact_keys=0),
}
EVERY = {name: (config, name in CAUSAL) for name, config in (BIDIRECTIONAL | CAUSAL).items()}


def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float64, count: int = 3) -> list[Tensor]:
    """Normal tensors, by default a query, a key and a value."""
    return [(torch.randn(shape, dtype=torch.float64) * scale).to(dtype) for _ in range(count)]


def layout(**changes: object) -> Layout:
    values = {"grid": None, "prefix": 0, "tile": 4, "near": 4, "exact_keys": 4, "groups": 256, "lengths": None}
    return Layout(**(values | changes))


def exact_mask(
    query: Tensor, key: Tensor, value: Tensor, where: Layout, num_hidden: int, steps: int
) -> tuple[Tensor, Choice, Tiles]:
    """What `near_far_attention` chooses: exact keys [Z, N, N] as a mask, the choice as it is, and the tiles."""
    size, count, prefix = len(key), key.shape[1], where.prefix
    tiles = make_tiles(where, count, key.device)
    choice = choose(query, key, value, where, num_hidden=num_hidden, steps=steps)
    keys, there = exact_of_tiles(tiles, choice.keys)
    of_tile = torch.zeros(size, len(tiles.slots), count, dtype=torch.bool)
    for z, t in ((z, t) for z in range(size) for t in range(len(tiles.slots))):
        of_tile[z, t, keys[z, t][there[z, t]] + prefix] = True
    tile_of = tiles.inverse // tiles.slots.shape[1]
    mask = torch.cat([torch.ones(size, prefix, count, dtype=torch.bool), of_tile[:, tile_of]], 1)
    mask[:, :, :prefix] = True
    return mask, choice, tiles


def near_far_oracle(
    query: Tensor, key: Tensor, value: Tensor, where: Layout, num_hidden: int, steps: int
) -> tuple[Tensor, Tensor]:
    """The formulas of `ops.near_far` with N x N matrices in float64, given its choices; u and w are computed anew."""
    mask, choice, tiles = exact_mask(query, key, value, where, num_hidden, steps)
    out = torch.zeros(value.shape, dtype=torch.float64)
    normaliser = torch.full(value.shape[:2], -torch.inf, dtype=torch.float64)
    for z in range(len(key)):
        length = key.shape[1] if where.lengths is None else int(where.lengths[z])
        if length == 0:
            continue
        one = [x[z, :length].double() for x in (query, key, value)]
        if num_hidden == 0 or length <= where.prefix:
            o, p = (x[0] for x in softmax_attention(*(x[None] for x in one), mask[z, None, :length, :length]))
        else:
            group = tiles.group[min(z, len(tiles.group) - 1)]
            winners = choice.winners[z, : length - where.prefix]
            o, p = _one_sequence(*one, mask[z, :length, :length], winners, choice.keys[z], tiles, group, where.prefix)
        out, normaliser = out.index_put((torch.tensor(z), torch.arange(length)), o), normaliser.clone()
        normaliser[z, :length] = p
    return out, normaliser


def _one_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    exact: Tensor,
    winners: Tensor,
    keys: Tensor,
    tiles: Tiles,
    group_of_tile: Tensor,
    prefix: int,
) -> tuple[Tensor, Tensor]:
    body = len(q) - prefix
    tile = (tiles.inverse // tiles.slots.shape[1])[:body]  # of each body token
    group = group_of_tile[tile]
    members = group == torch.arange(tiles.num_groups)[:, None]  # [R, n]
    number = members.sum(1, keepdim=True)
    u = members.double() @ q[prefix:] / number.clamp(min=1)  # mean query of each group [R, D]
    mean = torch.cat([q[:prefix], u[group]])
    with torch.no_grad():  # what the keys weigh is a choice
        excluded = (torch.arange(body)[:, None, None] == keys).any(-1).T  # [R, n]
        if len(tile.unique()) <= tiles.num_groups:  # no group is shared
            excluded = excluded | (members[..., None] & exact[None, prefix:, prefix:]).any(1)
        expected = (u @ k.T).softmax(-1)[:, prefix:] * number / body
        mass = (expected * ~excluded).sum(0)
        owner = (winners == torch.arange(int(winners.max()) + 1)[:, None]) * mass
    w = owner @ k[prefix:] / owner.sum(1, keepdim=True).clamp(min=1e-300)
    winners = torch.cat([torch.zeros(prefix, dtype=torch.long), winners])
    o, p = cluster_attention(q[None], k[None], v[None], mean[None], winners[None], w[None], exact[None])
    return o[0], p[0]


def relative(ours: Tensor, theirs: Tensor) -> float:
    """L2 error relative to theirs."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-300))


def module(config: AstroConfig, heads: int = 2, dim: int = 8) -> AstrocyteAttention:
    return AstrocyteAttention(heads, dim, config)


def padding_mask(tokens: int = 40) -> torch.Tensor:
    """Right, left and both sides, holes, none at all, and nothing real."""
    mask = torch.ones(6, tokens, dtype=torch.bool)
    mask[0, tokens // 2 :] = False
    mask[1, : tokens // 3] = False
    mask[2, [0, 1, 5, 6, 7, 20, tokens - 1]] = False
    mask[3, 1:] = False
    mask[5] = False
    return mask
