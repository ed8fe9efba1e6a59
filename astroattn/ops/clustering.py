"""Competitive Hebbian learning of hidden weights, which is weighted k-means, and sums over its clusters."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from astroattn.ops.layout import Layout
from astroattn.ops.order import Coordinates, factor
from astroattn.ops.tiles import mean_and_rest


class Clusters(NamedTuple):
    """The clusters before exact keys are chosen.

    Attributes:
        weights: w [Z, m, D]. winners: the cluster of each key [Z, n].
        offset: k - w [Z, n, D]. along: the same in a few coordinates [Z, n, c].
        log_value: log |v - mean v| [Z, n], of the cluster's v; log_distance: the same of all v.
        log_spread: the logarithm of how far values are apart [Z], the root of the mean of |v - mean v|^2.
    """

    weights: Tensor
    winners: Tensor
    offset: Tensor
    along: Tensor
    log_value: Tensor
    log_distance: Tensor
    log_spread: Tensor


def find_clusters(
    key: Tensor, value: Tensor, coordinates: Coordinates, mass: Tensor, token: Tensor, real: Tensor, layout: Layout
) -> Clusters:
    """Learn the clusters of the body keys, by the differences that queries of a tile can tell, and measure them."""
    rest = mean_and_rest(coordinates.query, token, real)[1].flatten(1, 2)
    metric = factor(rest.mT @ rest / coordinates.query.shape[1])
    winners = learn_clusters(coordinates.key @ metric, mass, layout.num_hidden, layout.steps)
    return measure_clusters(key, value, coordinates, mass, winners, layout.num_hidden)


def measure_clusters(
    key: Tensor, value: Tensor, coordinates: Coordinates, mass: Tensor, winners: Tensor, num_hidden: int
) -> Clusters:
    """What each cluster is, and where each key is in it."""

    def offset(x: Tensor) -> tuple[Tensor, Tensor]:
        mean = weighted_means(x, mass, winners, num_hidden)[1]
        return mean, x - mean.gather(1, winners[..., None].expand_as(x))

    weights, from_weights = offset(key)

    def log_norm(x: Tensor) -> Tensor:
        length: Tensor = x.norm(dim=-1)
        return length.clamp(min=torch.finfo(x.dtype).tiny).log()

    whole = mass.sum(1).clamp(min=torch.finfo(mass.dtype).tiny)
    centre = (mass[..., None] * value).sum(1, keepdim=True) / whole[:, None, None]
    log_value, log_distance = log_norm(offset(value)[1]), log_norm(value - centre)
    spread = (value - value.mean(1, keepdim=True)).square().sum(-1).mean(1).sqrt()
    log_spread = spread.clamp(min=torch.finfo(value.dtype).tiny).log()
    return Clusters(weights, winners, from_weights, offset(coordinates.key)[1], log_value, log_distance, log_spread)


def learn_clusters(points: Tensor, mass: Tensor, num_clusters: int, steps: int) -> Tensor:
    """Assign each point to one of m clusters by weighted k-means: winner takes all, then Hebbian learning.

    a_i = argmin_j |x_i - w_j|^2, w_j = sum_{i: a_i = j} mass_i x_i / sum_{i: a_i = j} mass_i, `steps` times, from
    points at equal distances along the sequence. Not differentiable: an assignment is a choice.
    Cost: (steps + 1) m + steps products of length c per point.

    Args:
        points: [Z, N, c]. mass: [Z, N], not negative.

    Returns:
        The cluster of each point [Z, N].
    """
    start = (torch.arange(num_clusters, device=points.device) * 2 + 1) * points.shape[1] // (2 * num_clusters)
    weights = points[:, start]
    for _ in range(steps):
        total, mean = weighted_means(points, mass, _nearest(points, weights), num_clusters)
        weights = torch.where(total[..., None] > 0, mean, weights)
    return _nearest(points, weights)


def _nearest(points: Tensor, weights: Tensor) -> Tensor:
    # |x - w|^2 without |x|^2, which is the same for all w.
    return torch.baddbmm(weights.square().sum(-1)[:, None], points, weights.mT, alpha=-2).argmin(-1)


def weighted_means(points: Tensor, mass: Tensor, winners: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Total mass [Z, m] and weighted mean [Z, m, D] of each cluster; an empty cluster has mass 0 and mean 0."""
    size, _, dim = points.shape
    place = (winners + torch.arange(size, device=points.device)[:, None] * num_clusters).flatten()
    total = mass.new_zeros(size * num_clusters).index_add(0, place, mass.flatten())
    sums = points.new_zeros(size * num_clusters, dim).index_add(0, place, (points * mass[..., None]).flatten(0, 1))
    # An empty cluster is divided by 1, not by almost 0, which would make NaN of its gradient.
    mean = sums / total.masked_fill(total < torch.finfo(total.dtype).tiny, 1)[:, None]
    return total.view(size, num_clusters), mean.view(size, num_clusters, dim)


def cluster_sums(weights: Tensor, values: Tensor, winners: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Sums over the members of each cluster, once for each row of weights.

    z_rj = sum_{i: a_i = j} c_ri,  s_rj = sum_{i: a_i = j} c_ri v_i. The keys are laid out in blocks that belong to
    one cluster each, so that this is one batched product of R * N vectors, not m times as many.

    Args:
        weights: c [Z, R, N]. values: v [Z, N, Dv]. winners: a [Z, N].

    Returns:
        z [Z, R, m] and s [Z, R, m, Dv].
    """
    size, rows, count = weights.shape
    device, dim = weights.device, values.shape[-1]
    block, num_blocks = block_layout(count, num_clusters)

    members = torch.zeros(size, num_clusters, dtype=torch.long, device=device)
    members.scatter_add_(1, winners, torch.ones_like(winners))
    blocks = (members + block - 1) // block
    last_block = blocks.cumsum(1)
    ordered, order = winners.sort(dim=1, stable=True)
    rank = torch.arange(count, device=device) - (members.cumsum(1) - members).gather(1, ordered)
    place = (last_block - blocks).gather(1, ordered) * block + rank
    source = torch.full((size, num_blocks * block), count, device=device)  # `count` points at a row of zeros
    source.scatter_(1, place, order)
    every_block = torch.arange(num_blocks, device=device).expand(size, -1).contiguous()
    owner = torch.searchsorted(last_block, every_block, right=True)
    owner = owner.clamp(max=num_clusters - 1)  # blocks that nobody owns hold zeros

    c = F.pad(weights, (0, 1)).gather(2, source[:, None].expand(-1, rows, -1)).unflatten(2, (num_blocks, block))
    v = F.pad(F.pad(values, (0, 1), value=1), (0, 0, 0, 1))  # a column of ones: z is s of the value 1
    v = v.gather(1, source[..., None].expand(-1, -1, dim + 1)).unflatten(1, (num_blocks, block))
    sums = c.transpose(1, 2) @ v  # [Z, blocks, R, Dv + 1]
    owner_row = (owner + torch.arange(size, device=device)[:, None] * num_clusters).flatten()
    s = sums.new_zeros(size * num_clusters, rows, dim + 1).index_add(0, owner_row, sums.flatten(0, 1))
    s = s.unflatten(0, (size, num_clusters)).transpose(1, 2)
    return s[..., -1], s[..., :-1]


def block_layout(count: int, num_clusters: int) -> tuple[int, int]:
    """Keys per block and number of blocks that hold `count` keys in any clusters; about 5 m blocks at any length."""
    block = max(4, -(-count // (4 * num_clusters)))
    return block, count // block + num_clusters
