"""Attention of tiles of queries to exact keys and, through a Hebbian hidden layer, to all other keys.

For a query q = u + r in a tile (u the mean query of the tile's group, r the rest), softmax attention's sum over the
far keys is

    sum_i exp(q.k_i) v_i = sum_i exp(r.k_i) exp(u.k_i) v_i.

The far keys are clustered, and in cluster j exp(r.k_i) is taken as exp(r.w_j), w_j the mean of its keys:

    sum_j exp(r.w_j) s_j   with   s_j = sum_{i in j} exp(u.k_i) v_i,

and for the normaliser with z_j = sum_{i in j} exp(u.k_i) in place of s_j.

So the mean query of a group reads every key without error, and a tile is plain attention over
[its exact keys ; m hidden neurons with weights w_j, bias log z_j and values s_j / z_j].

All arguments are flattened over batch and heads, Z = B * H; the queries are already multiplied by the scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from astroattn.ops.clustering import cluster_sums, learn_clusters, weighted_means
from astroattn.ops.tiles import Layout, Tiles, make_tiles, real_tokens


@dataclass(frozen=True)
class Reading:
    """What the groups of queries expect of the body keys (all tokens but the prefix), by their mean queries.

    Attributes:
        rest: r, the queries less their group's mean query, by tile [Z, T, t, D].
        logits: u.k [Z, R, n], -inf where padded.
        log_mass: logarithm of the attention that all queries of a group are expected to give [Z, R, n]: softmax of
            the logits over prefix and body, times the share of the queries that are in the group.
        near_any, near_all: keys near to any and to every tile of a group [1 or Z, R, n].
        rest_variance: mean square of r in each dimension [Z, D].
    """

    rest: Tensor
    mean: Tensor
    logits: Tensor
    log_mass: Tensor
    near_any: Tensor
    near_all: Tensor
    rest_variance: Tensor


@dataclass(frozen=True)
class Exact:
    """The keys that are attended exactly: of each group [Z, R, e], and with the near field of each tile [Z, T, P]."""

    group_keys: Tensor
    group_chosen: Tensor
    keys: Tensor
    chosen: Tensor


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
    body_key, body_value = key[:, layout.prefix :], value[:, layout.prefix :]
    reading = read_tiles(query, key, layout, tiles)
    if num_hidden:
        winners, error = learn_hidden(reading, body_key, body_value, num_hidden, steps, layout.body_lengths())
        exact = choose_exact_keys(reading, tiles, error, layout.exact_keys)
        far = write_hidden(reading, tiles, body_key, body_value, winners, num_hidden, exact)
    else:
        exact, far = choose_exact_keys(reading, tiles, None, layout.exact_keys), None
    out, normaliser = _attend(reading, tiles, key, value, layout.prefix, exact, far)
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
    """Mean query of each group and what it expects of every key: R * N products of length D."""
    prefix_key, query, key = key[:, : layout.prefix], query[:, layout.prefix :], key[:, layout.prefix :]
    count, lengths = key.shape[1], layout.body_lengths()
    by_tile = query[:, tiles.slots]  # [Z, T, t, D]
    real = tiles.slot_mask[..., None].to(query.dtype)  # [1 or Z, T, t, 1]
    number = tiles.sum_groups(real.sum(2))  # [1 or Z, R, 1]
    mean = tiles.sum_groups((by_tile * real).sum(2)) / number.clamp(min=1)
    rest = (by_tile - tiles.of_group(mean)[:, :, None]) * real

    logits = mean @ key.mT
    if lengths is not None:
        logits = logits.masked_fill(~real_tokens(count, lengths)[:, None], -torch.inf)
    normaliser = torch.cat([logits, mean @ prefix_key.mT], -1).logsumexp(-1, keepdim=True)
    share = number / number.sum(1, keepdim=True).clamp(min=1)
    log_mass = logits - normaliser.clamp(min=torch.finfo(logits.dtype).min) + share.log()

    near_count = _count_near(tiles, count)
    tiles_in_group = tiles.sum_groups(tiles.slot_mask.any(-1, keepdim=True).long())  # those that hold a real token
    return Reading(
        rest=rest,
        mean=mean,
        logits=logits,
        log_mass=log_mass,
        near_any=near_count > 0,
        near_all=near_count >= tiles_in_group.clamp(min=1),
        rest_variance=rest.square().sum((1, 2)) / real.sum((1, 2)).clamp(min=1),
    )


def _count_near(tiles: Tiles, count: int) -> Tensor:
    """To how many tiles of each group each key is near [1 or Z, R, n]."""
    place = tiles.group[..., None] * count + tiles.near
    near = torch.zeros(len(place), tiles.num_groups * count, dtype=torch.long, device=place.device)
    near.scatter_add_(1, place.flatten(1), tiles.near_mask.expand_as(place).flatten(1).long())
    return near.view(-1, tiles.num_groups, count)


def learn_hidden(
    reading: Reading, key: Tensor, value: Tensor, num_hidden: int, steps: int, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The cluster of each key, and the error of reading it through its cluster, |r.(k - w)| |v - mean v| [Z, n].

    Keys are compared in the metric of what the hidden layer has to tell apart, r.k: each dimension is multiplied by
    the root mean square of r. They weigh as much as the attention that the groups expect to give them.
    """
    with torch.no_grad():
        mass = reading.log_mass.exp().sum(1)
        points = key * reading.rest_variance.sqrt()[:, None]
        winners, distance = learn_clusters(points, mass, num_hidden, steps, lengths)
        mean_value = weighted_means(value, mass, winners, num_hidden)[1]
        off_value = value - mean_value.gather(1, winners[..., None].expand_as(value))
        return winners, distance.sqrt() * off_value.norm(dim=-1)


def choose_exact_keys(reading: Reading, tiles: Tiles, error: Tensor | None, exact_keys: int) -> Exact:
    """The far keys that each group asks for most: the largest exp(u.k) times the error of reading the key inexactly."""
    with torch.no_grad():
        score = reading.logits
        if error is not None:
            score = score + error.clamp(min=torch.finfo(error.dtype).tiny).log()[:, None]
        score = score.masked_fill(reading.near_any, -torch.inf)
        best, keys = score.topk(min(exact_keys, score.shape[-1]), dim=-1)
        chosen = best > -torch.inf
    near = (x.expand(len(keys), -1, -1) for x in (tiles.near, tiles.near_mask))
    of_tile = (tiles.of_group(keys), tiles.of_group(chosen))
    return Exact(keys, chosen, *(torch.cat(pair, -1) for pair in zip(near, of_tile, strict=True)))


def write_hidden(
    reading: Reading, tiles: Tiles, key: Tensor, value: Tensor, winners: Tensor, num_hidden: int, exact: Exact
) -> Far:
    """Write the far keys into the hidden layer (w, z and s of the module's formula): R * n products of length D."""
    far = (reading.log_mass != -torch.inf) & ~reading.near_all
    far = far & ~torch.zeros_like(far).scatter(-1, exact.group_keys, exact.group_chosen)
    c, top = _from_largest(reading.logits.masked_fill(~far, -torch.inf), winners, num_hidden)
    log_mass = reading.log_mass.masked_fill(~far, -torch.inf).logsumexp(1, keepdim=True)
    mass = _from_largest(log_mass, winners, num_hidden)[0][:, 0]
    weights = weighted_means(key, mass, winners, num_hidden)[1]

    z, s = cluster_sums(c, value, winners, num_hidden)
    z, s, top = (tiles.of_group(x) for x in (z, s, top))
    whole = z
    if tiles.shared:
        # The sums are the group's: take out the keys that are near to this tile (c is 0 where near to all of them).
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


def _attend(
    reading: Reading, tiles: Tiles, key: Tensor, value: Tensor, prefix: int, exact: Exact, far: Far | None
) -> tuple[Tensor, Tensor]:
    """One softmax per query over [prefix ; exact keys of the tile ; hidden neurons]: rows of tiles [Z, T, t, Dv].

    The logits are u.k + r.k, with u.k kept apart until the tile's largest has been subtracted.
    """
    rest, body_key, body_value = reading.rest, key[:, prefix:], value[:, prefix:]
    head_key, head_value = key[:, None, :prefix], value[:, None, :prefix]
    bias = [
        tiles.of_group(reading.mean @ key[:, :prefix].mT),
        _take_logits(tiles, reading.logits, exact.keys).masked_fill(~exact.chosen, -torch.inf),
    ]
    parts = [rest @ head_key.mT, rest @ take_rows(body_key, exact.keys).mT]
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
    out = shares[0] @ head_value + shares[1] @ take_rows(body_value, exact.keys)
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
