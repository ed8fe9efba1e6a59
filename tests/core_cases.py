"""Inputs, configurations and an oracle for the tests of the core (config, ops, hidden, attention)."""

from __future__ import annotations

import torch
from torch import Tensor

from astroattn import AstroConfig, AstrocyteAttention
from astroattn.ops.choosing import Choice, choose
from astroattn.ops.layout import SUBTILE, Layout
from astroattn.ops.reference import cluster_attention, softmax_attention

# One configuration for every path through the code; none of them covers the sequences that the tests use it on.
BIDIRECTIONAL = {
    "hebbian": AstroConfig(num_hidden=5, near=1, exact_keys=6, tile=12),
    "hebbian, plain": AstroConfig(num_hidden=5, near=1, exact_keys=6, tile=12, backend="torch"),
    "hebbian, by position": AstroConfig(num_hidden=5, near=6, exact_keys=3, tiles="position", tile=8),
    "hebbian, by position, plain": AstroConfig(
        num_hidden=5, near=6, exact_keys=3, tiles="position", tile=8, backend="torch"
    ),
    "hebbian, keys alone": AstroConfig(num_hidden=4, near=0, exact_keys=4, tile=4),
    "hebbian, no exact keys": AstroConfig(num_hidden=5, near=0, exact_keys=0, tile=16),
    "hebbian, exact queries": AstroConfig(num_hidden=3, near=1, exact_keys=2, exact_queries=3, tile=8),
    "hebbian, long tiles": AstroConfig(num_hidden=3, near=5, exact_keys=2, tiles="position", tile=24),
    "hebbian, no steps": AstroConfig(num_hidden=4, near=3, exact_keys=0, tile=4, steps=0),
    "hebbian, by length": AstroConfig(exact_keys=5),
    "hebbian, by length, plain": AstroConfig(exact_keys=5, tiles="position", backend="torch"),
    "near alone": AstroConfig(hidden="none", near=5, exact_keys=0, tiles="position", tile=4),
    "near and keys": AstroConfig(hidden="none", near=1, exact_keys=4, tile=16),
    "random": AstroConfig(hidden="random"),
    "random, exact queries": AstroConfig(hidden="random", exact_queries=2),
    "random, near": AstroConfig(hidden="random", exact_keys=4, near=6, tiles="position", tile=8),
    "random, content": AstroConfig(hidden="random", exact_keys=4, near=1, exact_queries=1, tile=12),
    "random, keys alone": AstroConfig(hidden="random", exact_keys=5, tile=8),
    "uniform": AstroConfig(hidden="random", activation="constant", num_hidden=1),
}
CAUSAL = {
    "causal": AstroConfig(hidden="random"),
    "causal, near": AstroConfig(hidden="random", near=5),
}
EVERY = {name: (config, name in CAUSAL) for name, config in (BIDIRECTIONAL | CAUSAL).items()}


def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float64, count: int = 3) -> list[Tensor]:
    """Normal tensors, by default a query, a key and a value."""
    return [(torch.randn(shape, dtype=torch.float64) * scale).to(dtype) for _ in range(count)]


def layout(**changes: object) -> Layout:
    values = {"grid": None, "prefix": 0, "tile": 8, "by_content": True, "near": 1, "exact_keys": 4}
    return Layout(**(values | {"num_hidden": 5, "steps": 2} | changes))


def exact_mask(choice: Choice, where: Layout) -> Tensor:
    """Which keys are exact for each query [Z, Nq, N]: all for the prefix, and the prefix for all."""
    size, asked = choice.order.shape
    prefix = where.prefix
    mask = torch.ones(size, prefix + asked, prefix + choice.winners.shape[1], dtype=torch.bool)
    mask[:, prefix:, prefix:] = False
    for z in range(size):
        for queries, keys in zip(choice.order[z].split(SUBTILE), choice.keys[z], strict=True):
            mask[z, prefix + queries.long()[:, None], prefix + keys[keys >= 0].long()] = True
    return mask


def near_far_oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    where: Layout,
    choice: Choice | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The formulas of `ops.near_far` with N x N matrices in float64, given what was chosen; u and w anew."""
    choice = choose(query, key, value, where, bias) if choice is None else choice
    query, key, value = query.double(), key.double(), value.double()
    bias = query.new_zeros(1, query.shape[1], key.shape[1]) if bias is None else bias.double()
    mask, prefix = exact_mask(choice, where), where.prefix
    if where.num_hidden == 0:
        return softmax_attention(query, key, value, mask, bias)
    size, asked = choice.order.shape
    tile = torch.empty(size, asked, dtype=torch.long)  # of each query behind the prefix
    tile.scatter_(1, choice.order.long(), (torch.arange(asked) // where.tile).expand(size, -1))
    same = torch.eye(prefix + asked, dtype=torch.float64).repeat(size, 1, 1)  # a prefix query is its own mean
    same[:, prefix:, prefix:] = (tile[:, :, None] == tile[:, None]).double()
    same = same / same.sum(-1, keepdim=True)
    mean, mean_bias = same @ query, same @ bias
    winners = choice.winners.long()
    owner = torch.nn.functional.one_hot(winners, where.num_hidden) * choice.mass.double()[..., None]
    weights = owner.mT @ key[:, prefix:] / owner.sum(1)[..., None].clamp(min=1e-300)
    winners = torch.nn.functional.pad(winners, (prefix, 0))  # keys of the prefix are read through no cluster
    return cluster_attention(query, key, value, mean, winners, weights, mask, bias, mean_bias)


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
