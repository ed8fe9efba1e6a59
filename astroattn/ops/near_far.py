"""Attention of tiles of queries to exact keys and, through a Hebbian hidden layer, to all other keys.

For a query q = u + r in a tile (u the mean query of the tile's group, r the rest), softmax attention's sum over the
far keys is

    sum_i exp(q.k_i) v_i = sum_i exp(r.k_i) exp(u.k_i) v_i.

The far keys are clustered, and in cluster j exp(r.k_i) is taken as exp(r.w_j), w_j the mean of its keys:

    sum_j exp(r.w_j) s_j   with   s_j = sum_{i in j} exp(u.k_i) v_i,

and for the normaliser with z_j = sum_{i in j} exp(u.k_i) in place of s_j.

So the mean query of a group reads every key without error, and a tile is plain attention over
[its exact keys ; m hidden neurons with weights w_j, bias log z_j and values s_j / z_j].

`choose` finds the clusters and the exact keys; `attend` is everything else, differentiable, given what was chosen.
All arguments are flattened over batch and heads, Z = B * H; the queries are already multiplied by the scale. The body
is all n = N - prefix tokens behind the prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from astroattn.ops.clustering import cluster_sums, learn_clusters, weighted_means
from astroattn.ops.tiles import Layout, Tiles, make_tiles, real_tokens


class Choice(NamedTuple):
    """What is decided before anything is attended to; constant in the backward pass.

    Attributes:
        winners: the cluster of each body key [Z, n].
        mass: what each body key weighs in the mean w of its cluster [Z, n], 0 for padding. Each cluster has a factor
            of its own, which the mean does not depend on.
        keys: the exact keys of each group, as indices into the body [Z, R, e]; -1 where it has fewer.
    """

    winners: Tensor
    mass: Tensor
    keys: Tensor


@dataclass(frozen=True)
class Reading:
    """What the groups of queries expect of the body keys, by their mean queries.

    Attributes:
        rest: r, the queries less their group's mean query, by tile [Z, T, t, D].
        mean: u [Z, R, D].
        logits: u.k [Z, R, n], -inf where padded.
    """

    rest: Tensor
    mean: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Far:
    """The hidden layer as the tiles read it: w [Z, m, D], z exp(-top) and its logarithm with top [Z, T, m], s exp(-top)
    [Z, T, m, Dv], top the largest u.k of a far key of the cluster."""

    weights: Tensor
    z: Tensor
    log_z: Tensor
    s: Tensor


def near_far_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, num_hidden: int, steps: int
) -> tuple[Tensor, Tensor]:
    """Attention of each query to its near field, its tile's exact keys, and m hidden neurons for the rest.

    Args:
        query, key, value: [Z, N, D], [Z, N, D], [Z, N, Dv], queries scaled; float32 or float64.
        num_hidden: m; 0 leaves the far field out. steps: Hebbian learning steps.

    Returns:
        The output [Z, N, Dv], and the log of the normaliser [Z, N]; zeros and -inf for padded queries.
    """
    tiles = make_tiles(layout, key.shape[1], key.device)
    reading = read_tiles(query, key, layout, tiles)
    choice = _choose(reading, key, value, layout, tiles, num_hidden, steps)
    return _attend(reading, query, key, value, layout, tiles, choice, num_hidden)


def choose(query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, num_hidden: int, steps: int) -> Choice:
    """The clusters of the keys and the exact keys of the groups. Arguments as in `near_far_attention`."""
    with torch.no_grad():
        tiles = make_tiles(layout, key.shape[1], key.device)
        reading = read_tiles(query, key, layout, tiles)
        return _choose(reading, key, value, layout, tiles, num_hidden, steps)


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, choice: Choice, num_hidden: int
) -> tuple[Tensor, Tensor]:
    """Attention given what was chosen, by `choose` or by a kernel. Arguments and results as in `near_far_attention`."""
    tiles = make_tiles(layout, key.shape[1], key.device)
    reading = read_tiles(query, key, layout, tiles)
    return _attend(reading, query, key, value, layout, tiles, choice, num_hidden)


@torch.no_grad()
def _choose(
    reading: Reading, key: Tensor, value: Tensor, layout: Layout, tiles: Tiles, num_hidden: int, steps: int
) -> Choice:
    prefix = layout.prefix
    body_key, body_value = key[:, prefix:], value[:, prefix:]
    if num_hidden == 0:
        keys = choose_exact_keys(reading, tiles, None, layout.exact_keys)
        return Choice(keys.new_zeros(body_key.shape[:2]), body_key.new_zeros(body_key.shape[:2]), keys)
    log_mass = expected_attention(reading, key[:, :prefix], tiles)
    mass = log_mass.exp().sum(1)
    winners, error = learn_hidden(reading, tiles, mass, body_key, body_value, layout, num_hidden, steps)
    keys = choose_exact_keys(reading, tiles, error, layout.exact_keys)
    log_mass = log_mass.masked_fill(_excluded(reading, tiles, keys), -torch.inf).logsumexp(1, keepdim=True)
    return Choice(winners, _from_largest(log_mass, winners, num_hidden)[0][:, 0], keys)


def _attend(
    reading: Reading,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    tiles: Tiles,
    choice: Choice,
    num_hidden: int,
) -> tuple[Tensor, Tensor]:
    choice = Choice(choice.winners.long(), choice.mass.to(key.dtype), choice.keys.long())
    far = None
    if num_hidden:
        far = write_hidden(reading, tiles, key[:, layout.prefix :], value[:, layout.prefix :], choice, num_hidden)
    out, normaliser = _read(reading, tiles, key, value, layout.prefix, choice.keys, far)
    return assemble(out, normaliser, tiles, query, key, value, layout)


def assemble(
    out: Tensor, normaliser: Tensor, tiles: Tiles, query: Tensor, key: Tensor, value: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Put the tiles' rows [Z, T, t, Dv] into the order of the tokens, behind the prefix's; zeros for padding."""
    out, normaliser = (x.flatten(1, 2)[:, tiles.inverse] for x in (out, normaliser))
    if layout.prefix:
        head, head_normaliser = exact_rows(query[:, : layout.prefix], key, value, layout.lengths)
        out, normaliser = torch.cat([head, out], 1), torch.cat([head_normaliser, normaliser], 1)
    real = layout.real(key.shape[1])
    return (out, normaliser) if real is None else zero_padding(out, normaliser, real)


def zero_padding(out: Tensor, normaliser: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros and -inf for queries that are padding [Z, N]."""
    return out.masked_fill(~real[..., None], 0), normaliser.masked_fill(~real, -torch.inf)


def exact_rows(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax attention of a few queries to all keys: the output and the log of the normaliser."""
    logits = query @ key.mT
    if lengths is not None:
        real = real_tokens(key.shape[1], lengths)
        logits = logits.masked_fill(~real[:, None], torch.finfo(logits.dtype).min)
    return logits.softmax(-1) @ value, logits.logsumexp(-1)


def read_tiles(query: Tensor, key: Tensor, layout: Layout, tiles: Tiles) -> Reading:
    """Mean query of each group and its logits with every key: R * n products of length D."""
    query, key = query[:, layout.prefix :], key[:, layout.prefix :]
    lengths = layout.body_lengths()
    by_tile = query[:, tiles.slots]  # [Z, T, t, D]
    real = tiles.slot_mask[..., None].to(query.dtype)  # [1 or Z, T, t, 1]
    mean = tiles.sum_groups((by_tile * real).sum(2)) / _real_queries(tiles, query.dtype).clamp(min=1)
    rest = (by_tile - tiles.of_group(mean)[:, :, None]) * real
    logits = mean @ key.mT
    if lengths is not None:
        logits = logits.masked_fill(~real_tokens(key.shape[1], lengths)[:, None], -torch.inf)
    return Reading(rest, mean, logits)


def _real_queries(tiles: Tiles, dtype: torch.dtype) -> Tensor:
    """Number of real queries of each group [1 or Z, R, 1]."""
    return tiles.sum_groups(tiles.slot_mask.sum(-1, keepdim=True).to(dtype))


def expected_attention(reading: Reading, prefix_key: Tensor, tiles: Tiles) -> Tensor:
    """The logarithm of the attention that all queries of a group are expected to give to each body key [Z, R, n].

    It is the softmax of u.k over prefix and body, times the share of the queries that are in the group.
    """
    logits, number = reading.logits, _real_queries(tiles, reading.logits.dtype)
    normaliser = torch.cat([logits, reading.mean @ prefix_key.mT], -1).logsumexp(-1, keepdim=True)
    share = number / number.sum(1, keepdim=True).clamp(min=1)
    return logits - normaliser.clamp(min=torch.finfo(logits.dtype).min) + share.log()


def _count_near(tiles: Tiles, count: int) -> Tensor:
    """To how many tiles of each group each key is near [1 or Z, R, n]."""
    place = tiles.group[..., None] * count + tiles.near
    near = torch.zeros(len(place), tiles.num_groups * count, dtype=torch.long, device=place.device)
    near.scatter_add_(1, place.flatten(1), tiles.near_mask.expand_as(place).flatten(1).long())
    return near.view(-1, tiles.num_groups, count)


def learn_hidden(
    reading: Reading,
    tiles: Tiles,
    mass: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    num_hidden: int,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """The cluster of each body key, and the error of reading it through its cluster, |r.(k - w)| |v - mean v| [Z, n].

    Keys are compared in the metric of what the hidden layer has to tell apart, r.k: each dimension is multiplied by
    the root mean square of r. They weigh as much as the attention that the groups expect to give them, mass [Z, n].
    """
    queries = tiles.slot_mask.sum((1, 2)).clamp(min=1)[:, None]
    spread = (reading.rest.square().sum((1, 2)) / queries).sqrt()
    winners, distance = learn_clusters(key * spread[:, None], mass, num_hidden, steps, layout.body_lengths())
    mean_value = weighted_means(value, mass, winners, num_hidden)[1]
    off_value = value - mean_value.gather(1, winners[..., None].expand_as(value))
    return winners, distance.sqrt() * off_value.norm(dim=-1)


def choose_exact_keys(reading: Reading, tiles: Tiles, error: Tensor | None, exact_keys: int) -> Tensor:
    """The far keys that each group asks for most [Z, R, e], -1 where there are fewer.

    They have the largest exp(u.k) times the error of reading the key inexactly (1 where `error` is None).
    """
    with torch.no_grad():
        score = reading.logits
        if error is not None:
            score = score + error.clamp(min=torch.finfo(error.dtype).tiny).log()[:, None]
        score = score.masked_fill(_count_near(tiles, score.shape[-1]) > 0, -torch.inf)
        best, keys = score.topk(min(exact_keys, score.shape[-1]), dim=-1)
        return keys.masked_fill(best == -torch.inf, -1)


def exact_of_tiles(tiles: Tiles, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The near field of each tile and the exact keys of its group [Z, T, P], and which of them there are."""
    near, near_mask = (x.expand(len(keys), -1, -1) for x in (tiles.near, tiles.near_mask))
    keys = tiles.of_group(keys)
    return torch.cat([near, keys.clamp(min=0)], -1), torch.cat([near_mask, keys >= 0], -1)


def _excluded(reading: Reading, tiles: Tiles, keys: Tensor) -> Tensor:
    """Keys that the sums of a group leave out [Z, R, n]: those chosen and, where no tiles share a group, those near."""
    size, groups, count = reading.logits.shape
    chosen = torch.zeros(size, groups, count + 1, dtype=torch.bool, device=keys.device)  # -1 points behind the last
    chosen = chosen.scatter(-1, torch.where(keys < 0, count, keys), True)[..., :-1]
    if not tiles.shared:
        return chosen | (_count_near(tiles, count) > 0)
    alone = tiles.slot_mask.any(-1).sum(-1) <= groups  # [1 or Z], of the sequences
    return chosen | ((_count_near(tiles, count) > 0) & alone[:, None, None])


def write_hidden(reading: Reading, tiles: Tiles, key: Tensor, value: Tensor, choice: Choice, num_hidden: int) -> Far:
    """Write the far keys into the hidden layer (w, z and s of the module's formula): R * n products of length D."""
    winners = choice.winners
    weights = weighted_means(key, choice.mass, winners, num_hidden)[1]
    far = reading.logits.masked_fill(_excluded(reading, tiles, choice.keys), -torch.inf)
    c, top = _from_largest(far, winners, num_hidden)
    z, s = cluster_sums(c, value, winners, num_hidden)
    z, s, top = (tiles.of_group(x) for x in (z, s, top))
    whole = z
    if tiles.shared:
        # The sums are the group's: take out the keys that are near to this tile (c is 0 where they are left out).
        z_near, s_near = _near_sums(tiles, c, value, winners, num_hidden)
        z, s = z - z_near, s - s_near
    alive = z > 16 * torch.finfo(z.dtype).eps * whole  # less than the rounding of what was taken out is nothing
    safe = z.masked_fill(~alive, 1)
    log_z = (safe.log() + top).masked_fill(~alive, -torch.inf)
    return Far(weights, safe, log_z, s)


def _from_largest(logits: Tensor, winners: Tensor, num_hidden: int) -> tuple[Tensor, Tensor]:
    """exp(logits - top) [Z, R, n] and top [Z, R, m], the largest logit of the cluster: so no cluster underflows."""
    owner = winners[:, None].expand_as(logits)
    top = logits.new_full((*logits.shape[:2], num_hidden), torch.finfo(logits.dtype).min)
    top = top.scatter_reduce(2, owner, logits.detach(), "amax")
    return (logits - top.gather(2, owner)).exp(), top


def _near_sums(tiles: Tiles, c: Tensor, value: Tensor, winners: Tensor, num_hidden: int) -> tuple[Tensor, Tensor]:
    """What the near keys of each tile put into its group's sums: z [Z, T, m] and s [Z, T, m, Dv]."""
    near = tiles.near.expand(len(c), -1, -1)
    c_near = _take_logits(tiles, c, near).masked_fill(~tiles.near_mask, 0)  # [Z, T, W]
    owner = take_rows(winners[..., None], near)  # [Z, T, W, 1]
    z = c.new_zeros(*near.shape[:2], num_hidden).scatter_add(2, owner[..., 0], c_near)
    weighted = take_rows(value, near) * c_near[..., None]
    s = weighted.new_zeros(*near.shape[:2], num_hidden, value.shape[-1])
    return z, s.scatter_add(2, owner.expand_as(weighted), weighted)


def _read(
    reading: Reading, tiles: Tiles, key: Tensor, value: Tensor, prefix: int, keys: Tensor, far: Far | None
) -> tuple[Tensor, Tensor]:
    """One softmax per query over [prefix ; exact keys of the tile ; hidden neurons]: rows of tiles [Z, T, t, Dv].

    The logits are u.k + r.k, with u.k kept apart until the tile's largest has been subtracted.
    """
    rest, body_key, body_value = reading.rest, key[:, prefix:], value[:, prefix:]
    head_key, head_value = key[:, None, :prefix], value[:, None, :prefix]
    exact, chosen = exact_of_tiles(tiles, keys)
    bias = [
        tiles.of_group(reading.mean @ key[:, :prefix].mT),
        _take_logits(tiles, reading.logits, exact).masked_fill(~chosen, -torch.inf),
    ]
    parts = [rest @ head_key.mT, rest @ take_rows(body_key, exact).mT]
    if far is not None:
        bias.append(far.log_z)
        parts.append(rest @ far.weights[:, None].mT)
    joint_bias = torch.cat(bias, -1)[:, :, None]
    top = joint_bias.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(rest.dtype).min)
    logits = torch.cat(parts, -1) + (joint_bias - top)
    # A tile without any key (padding only) has all logits at -inf: keep its softmax finite, it is masked later.
    logits = logits.clamp(min=torch.finfo(logits.dtype).min)
    sizes = [part.shape[-1] for part in parts]
    shares = logits.softmax(-1).split(sizes, -1)
    out = shares[0] @ head_value + shares[1] @ take_rows(body_value, exact)
    if far is not None:
        out = out + (shares[2] / far.z[:, :, None]) @ far.s
    normaliser = logits.logsumexp(-1) + top[..., 0]
    return out, normaliser


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Rows [Z, n, D] at index [Z, T, P] -> [Z, T, P, D]; index_select is the fastest gather, and its backward too."""
    size, count, dim = rows.shape
    flat = (index + torch.arange(size, device=index.device)[:, None, None] * count).flatten()
    return rows.flatten(0, 1).index_select(0, flat).view(*index.shape, dim)


def _take_logits(tiles: Tiles, logits: Tensor, index: Tensor) -> Tensor:
    """Logits of groups [Z, R, n] at the keys [Z, T, P] of their tiles -> [Z, T, P]."""
    size, groups, count = logits.shape
    row = torch.arange(size, device=index.device)[:, None] * groups + tiles.group
    return logits.flatten().index_select(0, (row[..., None] * count + index).flatten()).view(index.shape)
