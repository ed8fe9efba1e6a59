"""What near + far attention decides before it attends: the order of the queries, clusters of keys and exact keys.

`ops.near_far` says what for. Arguments are flattened over batch and heads, Z = B * H; the queries are scaled.
"""

from __future__ import annotations

from math import log
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from astroattn.ops.clustering import Clusters, find_clusters
from astroattn.ops.layout import SUBTILE, Layout
from astroattn.ops.order import (
    Coordinates,
    content_order,
    factor,
    find_coordinates,
    keep_neighbours,
    near_keys,
    position_order,
)
from astroattn.ops.tiles import Reading, by_subtile, by_tile, find_slots, read_tiles, take_rows, unique

LEAST_SPREAD = 1e-6  # of a logit within a cluster, squared
MOST_MISS = 8.0  # of d, beyond which a key is missed by all of it
LEAST_MASS = 1e-12  # of what is expected of a key, so that no cluster is empty


class Choice(NamedTuple):
    """What is decided before anything is attended to; constant in the backward pass.

    Three of them are choices, whose derivative is zero but where they change. The mass moves with queries and keys, and
    its part of the gradient is left out: of the difference that an infinitesimal step makes it is, relative, 0.1 to 2 %
    for queries and 3 to 7 % for keys in the layers of MiniLM (256 tokens, the default). A step of all tokens at once by
    0.1 % of their size does change choices, and then the output jumps by as much as the gradient says, or more.

    Attributes:
        order: the queries behind the prefix in the order of their tiles [Z, nq]; a sub-tile is four in a row.
        winners: the cluster of each body key [Z, n].
        mass: what each body key weighs in the mean w of its cluster [Z, n]. Each cluster has a factor of its own,
            which the mean does not depend on.
        keys: the exact keys of each sub-tile, as indices into the body [Z, S, P]; -1 where it has fewer.
    """

    order: Tensor
    winners: Tensor
    mass: Tensor
    keys: Tensor


@torch.no_grad()
def choose(query: Tensor, key: Tensor, value: Tensor, layout: Layout, bias: Tensor | None = None) -> Choice:
    """The order of the queries, the clusters of the keys and the exact keys of the sub-tiles."""
    prefix, m = layout.prefix, layout.num_hidden
    body_query, body_key, body_value = (x[:, prefix:] for x in (query, key, value))
    size, body = body_key.shape[:2]
    coordinates = find_coordinates(body_query, body_key)
    of_body = None if bias is None else bias[:, prefix:, prefix:]
    order = find_order(body_query, body_key, coordinates, layout, of_body)
    if not (m or layout.exact_keys):  # only near keys: nothing has to be expected of the others
        near = near_of_subtiles(*find_slots(order, layout), layout, body)
        return Choice(order, order.new_zeros(size, body), key.new_ones(size, body), of_queries(near, order.shape[1]))
    reading = read_tiles(query, key, order, layout, bias)
    expected = expected_attention(reading)
    clusters, winners = None, order.new_zeros(size, body)
    if m:
        mass = expected.body.sum(1)
        clusters = find_clusters(body_key, body_value, coordinates, mass, reading.token, reading.real, layout)
        winners = clusters.winners
    keys = choose_keys(reading, coordinates, layout, clusters, expected, key[:, :prefix])
    return Choice(order, winners, _mass_left(reading, expected.body, keys, winners, layout), keys)


def find_order(
    query: Tensor, key: Tensor, coordinates: Coordinates, layout: Layout, bias: Tensor | None = None
) -> Tensor:
    """The order of the queries [Z, nq] in which they are cut into tiles; queries, keys and bias of the body."""
    if not layout.by_content:
        return position_order(layout, query.shape[1], key.device).expand(len(key), -1)
    moment = coordinates.key.mT @ coordinates.key / key.shape[1]
    order = content_order(coordinates.query @ factor(moment), layout)
    return keep_neighbours(query, key, order, layout, bias)


class Expected(NamedTuple):
    """The attention that all queries of a tile are expected to give to each key.

    Attributes:
        body: of the body [Z, T, n]. log_body: its logarithm. log_prefix: the same of the prefix [Z, T, prefix].
    """

    body: Tensor
    log_body: Tensor
    log_prefix: Tensor


def expected_attention(reading: Reading) -> Expected:
    """The softmax of u.k over prefix and body, times the share of the queries that are in the tile."""
    normaliser = torch.cat([reading.logits, reading.prefix_logits], -1).logsumexp(-1, keepdim=True)
    number = reading.real.sum(-1, keepdim=True).to(normaliser.dtype)
    normaliser = normaliser - (number / number.sum()).log()
    log_body = reading.logits - normaliser
    return Expected(log_body.exp(), log_body, reading.prefix_logits - normaliser)


class Subtiles(NamedTuple):
    """What the queries of a sub-tile ask for beside the mean query of their tile.

    Attributes:
        weight: which slots are real [1, T, s, 4, 1]. number: how many are [1, T, s, 1].
        mean: u_s, the mean of r over the sub-tile [Z, T, s, D]. direction: in a few coordinates of keys [Z, T, s, c].
        rest: r [Z, T, s, 4, D].
    """

    weight: Tensor
    number: Tensor
    mean: Tensor
    direction: Tensor
    rest: Tensor


def find_subtiles(rest: Tensor, real: Tensor, coordinates: Coordinates, layout: Layout) -> Subtiles:
    """Their means, from r [Z, T, t, D] and which slots are real [T, t]."""
    rest, weight = (by_subtile(x, layout.subtiles()) for x in (rest, real[None, ..., None].to(rest.dtype)))
    number = weight.sum(3)
    mean = (rest * weight).sum(3) / number.clamp(min=1)
    return Subtiles(weight, number, mean, mean @ coordinates.query_basis[:, None], rest)


def near_of_subtiles(token: Tensor, real: Tensor, layout: Layout, body: int) -> Tensor:
    """The near keys of the queries of each sub-tile [Z, T, s, W], -1 behind them."""
    token, real = (by_subtile(x, layout.subtiles()) for x in (token, real.expand_as(token)))
    near = near_keys(token, layout, body).masked_fill(~real[..., None], -1).flatten(3)
    return unique(near, layout.near_keys(body))


def spread_of_keys(subtiles: Subtiles, clusters: Clusters, asked: int) -> tuple[Tensor, Tensor]:
    """E|(r - u_s).(k - w)|^2 and E|r.(k - w)|^2 of each key [Z, n]."""
    within = ((subtiles.rest - subtiles.mean[:, :, :, None]) * subtiles.weight).square().sum((1, 2, 3)) / asked
    between = (subtiles.mean.square() * subtiles.number).sum((1, 2)) / asked  # both [Z, D]
    squared = clusters.offset.square()
    of_within, of_tile = ((squared @ x[..., None])[..., 0] + LEAST_SPREAD for x in (within, within + between))
    return of_within, of_tile


def find_drives(
    subtiles: Subtiles, clusters: Clusters, share: Tensor, head_key: Tensor, log_prefix: Tensor
) -> tuple[Tensor, Tensor]:
    """log (exp(u_s.w) / Z_s) [Z, T, s, m], and its maximum over the sub-tiles [Z, T, m].

    Args:
        share: the attention that is expected of each tile for each cluster [Z, T, m].
        head_key, log_prefix: the keys of the prefix [Z, prefix, D], and what is expected for them [Z, T, prefix].
    """
    drive = subtiles.mean @ clusters.weights[:, None].mT
    log_share = share.clamp(min=torch.finfo(share.dtype).tiny).log()
    parts = drive + log_share[:, :, None], subtiles.mean @ head_key[:, None].mT + log_prefix[:, :, None]
    drive = drive - torch.cat(parts, -1).logsumexp(-1, keepdim=True)
    return drive, drive.masked_fill(subtiles.number == 0, -torch.inf).amax(2)


def least_score(clusters: Clusters | None, layout: Layout, like: Tensor, dim: int) -> Tensor:
    """The score above which a key is chosen [Z]."""
    if clusters is None or not layout.key_error:
        return like.new_full((len(like),), -torch.inf)
    return clusters.log_spread + log(layout.least_error(clusters.winners.shape[1], dim))


def choose_keys(
    reading: Reading,
    coordinates: Coordinates,
    layout: Layout,
    clusters: Clusters | None,
    expected: Expected,
    head_key: Tensor,
) -> Tensor:
    """The exact keys of each sub-tile [Z, S, P]: the near keys of its queries, and the others it asks for most.

    With u_s the mean of r over the sub-tile, the tile's candidates have the largest

        exp(u.k) max_s[exp(u_s.w) / Z_s] (E|r.(k - w)|^2)^1/2 |v - mean v|,

    expected attention times the error of reading the key through its cluster. Of them the sub-tile takes the largest

        exp((u + u_s).k) ((1 - exp(-d))^2 + E|(r - u_s).(k - w)|^2)^1/2 |v - mean v|,   d = u_s.(k - w),

    d in a few coordinates. Divided by Z_s, so that exp((u + u_s).k) is a share of the attention, and by how far values
    are apart, a score is what reading the key through its cluster adds to the error of the output, relative. On both
    levels only keys are taken of which that is more than `layout.least_error`. Without clusters there is nothing to
    read a key through, and attention alone counts.

    What a bias has beside its mean over the tile, b, is missing where a key is read through its cluster, whatever its
    value shares with the others of it: E b^2 |v - mean of all v|^2 is added to the square of the first error, and
    ((1 - exp(-b_s))^2 + E(b - b_s)^2) |v - mean of all v|^2 to that of the second, b_s its mean over the sub-tile.

    Args:
        head_key: the keys of the prefix [Z, prefix, D].
    """
    size, tiles, body = reading.logits.shape
    asked, count = reading.asked, layout.subtiles()
    near = near_of_subtiles(reading.token, reading.real, layout, body)
    if layout.exact_keys == 0:
        return of_queries(near, asked)

    subtiles = find_subtiles(reading.rest, reading.real, coordinates, layout)
    number, weight = subtiles.number, subtiles.weight
    score, offset = expected.log_body, coordinates.key
    least = least_score(clusters, layout, score, reading.rest.shape[-1])[:, None, None]
    if clusters is not None:
        offset = clusters.along
        within, wide = (x[:, None] for x in spread_of_keys(subtiles, clusters, asked))
        owner = clusters.winners[:, None].expand_as(score)
        share = score.new_zeros(*score.shape[:2], layout.num_hidden).scatter_add(2, owner, expected.body)
        drive, gain = find_drives(subtiles, clusters, share, head_key, expected.log_prefix)
        error = clusters.log_value[:, None] + wide.log() / 2
        if reading.bias is not None:
            square = reading.bias.square().sum(2) / reading.real.sum(1)[:, None]
            error = _log_root(error, clusters.log_distance[:, None] + square.log() / 2)
        score = score + gain.gather(2, owner) + error
    best, candidates = score.topk(layout.candidates(body), dim=-1)  # [Z, T, E]

    def of_candidates(x: Tensor) -> Tensor:
        """[Z, 1 or T, n] -> [Z, T, 1, E]."""
        return x.expand(size, tiles, body).gather(2, candidates)[:, :, None]

    inner = subtiles.direction @ take_rows(offset, candidates).mT  # d [Z, T, s, E]
    score = of_candidates(expected.log_body) + inner
    if clusters is not None:
        owner = of_candidates(clusters.winners[:, None]).expand_as(inner)
        miss = _missed(inner) + of_candidates(within)
        error = of_candidates(clusters.log_value[:, None]) + miss.log() / 2
    if reading.bias is not None:
        index = candidates[:, :, None].expand(-1, -1, layout.tile, -1)
        bias = by_subtile(reading.bias.gather(3, index), count)  # [Z, T, s, 4, E]
        of_subtile = bias.sum(3) / number.clamp(min=1)
        score = score + of_subtile
        if clusters is not None:
            miss = _missed(of_subtile) + ((bias - of_subtile[:, :, :, None]) * weight).square().sum(3) / number.clamp(
                min=1
            )
            error = _log_root(error, of_candidates(clusters.log_distance[:, None]) + miss.log() / 2)
    if clusters is not None:
        score = score + drive.gather(3, owner) + error
    candidates = candidates[:, :, None].expand(score.shape)
    behind = F.pad(near, (0, 1), value=-1)
    is_near = behind.gather(3, torch.searchsorted(-behind, -candidates)) == candidates
    score = score.masked_fill(is_near | (best <= least)[:, :, None], -torch.inf)
    best, place = score.topk(min(layout.exact_keys, score.shape[-1]), dim=-1)
    chosen = candidates.gather(3, place).masked_fill(best <= least[..., None], -1)
    return of_queries(torch.cat([near, chosen], -1), asked)


def _missed(d: Tensor) -> Tensor:
    """(1 - exp(-d))^2, the square of what a key that weighs exp(d) more than its cluster loses by it."""
    return (1 - (-d.clamp(-MOST_MISS, MOST_MISS)).exp()).square()


def _log_root(one: Tensor, other: Tensor) -> Tensor:
    """log (exp(2 one) + exp(2 other))^1/2: errors that have nothing to do with each other, in logarithms."""
    return torch.logaddexp(2 * one, 2 * other) / 2


def of_queries(keys: Tensor, asked: int) -> Tensor:
    """Keys of sub-tiles [Z, T, s, P] -> [Z, S, P], S the sub-tiles that hold a query."""
    return keys.flatten(1, 2)[:, : -(-asked // SUBTILE)]


def _mass_left(reading: Reading, expected: Tensor, keys: Tensor, winners: Tensor, layout: Layout) -> Tensor:
    """What each key weighs in its cluster: the attention expected of the queries that do not read it exactly [Z, n].

    It keeps 1e-12 of what all queries expect, so that no cluster is empty, and is measured from the cluster's largest.
    """
    number = reading.real.view(-1, layout.subtiles(), SUBTILE).sum(2).to(expected.dtype)  # queries [T, s]
    keys = by_tile(keys, *number.shape).where(number[..., None] > 0, -1)
    taken = F.pad(torch.zeros_like(expected), (0, 1))  # by how many queries of the tile; -1 points behind the last
    place = keys.where(keys >= 0, expected.shape[-1]).flatten(2)
    taken = taken.scatter_add(2, place, number[..., None].expand(keys.shape).flatten(2))[..., :-1]
    share = 1 - taken / number.sum(1)[:, None]
    left = (expected * share.clamp(min=0)).sum(1) + LEAST_MASS * expected.sum(1)
    return by_largest(left, winners, layout)


def by_largest(left: Tensor, winners: Tensor, layout: Layout) -> Tensor:
    """What keys weigh [Z, n], measured from the largest of their cluster."""
    largest = left.new_zeros(len(left), max(layout.num_hidden, 1)).scatter_reduce(1, winners, left, "amax")
    return left / largest.gather(1, winners).clamp(min=torch.finfo(left.dtype).tiny)
