"""Attention of tiles of queries: exact where it matters, and through a Hebbian hidden layer to all other keys.

For a query q = u + r of a tile (u the tile's mean query, r the rest), softmax attention's sum over keys is

    sum_i exp(q.k_i) v_i = sum_i exp(r.k_i) exp(u.k_i) v_i.

The keys are clustered, and for a key of cluster j that is not read exactly exp(r.k_i) is taken as exp(r.w_j), w_j the
mean of the cluster's keys:

    sum_j exp(r.w_j) s_j   with   s_j = sum_{i in j} exp(u.k_i) v_i,

and for the normaliser with z_j = sum_{i in j} exp(u.k_i) in place of s_j. So the mean query of a tile reads every key
without error. Tiles hold queries that ask for the same, wherever they stand, as attention does not know their order; or
neighbours, where an input's neighbours ask for the same more nearly.

Each sub-tile of four queries attends exactly to the near keys of its queries and to others that it chooses in two
levels: the tile proposes candidates, the sub-tile takes some. What no sub-tile of the tile takes is summed once for the
tile; what others take is added by each sub-tile that does not. Nothing is subtracted. (The CPU kernels sum all keys and
correct the exact ones, which is the same and faster: native/reading.h.)

A bias b on the logits is cut in the same way: its mean over the queries of a tile goes with u.k, so the sums have it,
and what is left goes with r.k, where exact keys have it and others are read without.

`choose` finds the order of the queries, the clusters and the exact keys; `attend` is everything else, differentiable,
given what was chosen. All arguments are flattened over batch and heads, Z = B * H; the queries are already multiplied
by the scale. The body is all n = N - prefix tokens behind the prefix; none of the tokens is padding. Queries may be
those of another sequence than the keys (cross attention); there is neither a prefix nor a near field then.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from astroattn.ops.clustering import cluster_sums, learn_clusters, weighted_means
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

LEAST_SPREAD = 1e-6  # of a logit within a cluster, squared
MOST_MISS = 8.0  # of d, beyond which a key is missed by all of it
LOGITS = 2**26  # of the tiles that are read at once
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


def near_far_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of each query to its sub-tile's exact keys, and to m hidden neurons for the rest.

    Args:
        query, key, value: [Z, Nq, D], [Z, N, D], [Z, N, Dv], queries scaled; float32 or float64.
        bias: [Z, Nq, N], finite, added to the logits; None: there is none.

    Returns:
        The output [Z, Nq, Dv], and the log of the normaliser [Z, Nq].
    """
    return attend(query, key, value, layout, choose(query, key, value, layout, bias), bias)


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
    rest, weight = (_by_subtile(x, layout.subtiles()) for x in (rest, real[None, ..., None].to(rest.dtype)))
    number = weight.sum(3)
    mean = (rest * weight).sum(3) / number.clamp(min=1)
    return Subtiles(weight, number, mean, mean @ coordinates.query_basis[:, None], rest)


def near_of_subtiles(token: Tensor, real: Tensor, layout: Layout, body: int) -> Tensor:
    """The near keys of the queries of each sub-tile [Z, T, s, W], -1 behind them."""
    token, real = (_by_subtile(x, layout.subtiles()) for x in (token, real.expand_as(token)))
    near = near_keys(token, layout, body).masked_fill(~real[..., None], -1).flatten(3)
    return _unique(near, layout.near_keys(body))


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
        bias = _by_subtile(reading.bias.gather(3, index), count)  # [Z, T, s, 4, E]
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


def _by_subtile(x: Tensor, count: int) -> Tensor:
    """Slots of tiles [Z, T, t, ...] as slots of sub-tiles [Z, T, s, 4, ...] (fewer where the tile is smaller)."""
    return x.reshape(*x.shape[:2], count, -1, *x.shape[3:])


def of_queries(keys: Tensor, asked: int) -> Tensor:
    """Keys of sub-tiles [Z, T, s, P] -> [Z, S, P], S the sub-tiles that hold a query."""
    return keys.flatten(1, 2)[:, : -(-asked // SUBTILE)]


def _unique(keys: Tensor, most: int) -> Tensor:
    """Each key once, -1 behind them; at most that many."""
    keys = keys.sort(-1, descending=True).values
    again = torch.zeros_like(keys, dtype=torch.bool)
    again[..., 1:] = keys[..., 1:] == keys[..., :-1]
    return keys.masked_fill(again, -1).sort(-1, descending=True).values[..., :most]


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


def by_tile(keys: Tensor, tiles: int, subtiles: int) -> Tensor:
    """Keys of sub-tiles [Z, S, P] -> [Z, T, s, P], -1 where there is no sub-tile."""
    size, have, count = keys.shape
    none = keys.new_full((size, tiles * subtiles - have, count), -1)  # F.pad of PyTorch 2.8 refuses a count of 0
    return torch.cat([keys, none], 1).view(size, tiles, subtiles, count)


class Union(NamedTuple):
    """The keys that some sub-tile of a tile reads exactly.

    Attributes:
        keys: which they are [Z, T, U]. there: whether it is one [Z, T, U]; a tile may have fewer.
        taken: whether a sub-tile reads it exactly [Z, T, s, U].
    """

    keys: Tensor
    there: Tensor
    taken: Tensor


def find_union(keys: Tensor, tiles: int, subtiles: int, body: int, most: int | None = None) -> Union:
    """The exact keys of each tile, from those of the sub-tiles [Z, S, P].

    Args:
        most: how many they are at most; None: as many as there are, for which a GPU has to be asked.
    """
    keys = by_tile(keys, tiles, subtiles)
    index = _unique(keys.flatten(2), body)
    there = index >= 0
    size = int(there.sum(-1).max()) if most is None else min(most, index.shape[-1])
    index, there = index[..., :size], there[..., :size]
    place = torch.searchsorted(-index, -keys.flatten(2)).view(keys.shape)  # -1 is behind the last, or where none is
    taken = keys.new_zeros(*keys.shape[:3], size + 1, dtype=torch.bool).scatter(3, place, True)[..., :size]
    return Union(index.clamp(min=0), there, taken)


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, choice: Choice, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention given what was chosen, by `choose` or by a kernel. Arguments and results as in `near_far_attention`."""
    prefix, m = layout.prefix, layout.num_hidden
    order, winners, keys = (x.long() for x in (choice.order, choice.winners, choice.keys))
    head_key, head_value = key[:, :prefix], value[:, :prefix]
    body_key, body_value = key[:, prefix:], value[:, prefix:]
    body = body_key.shape[1]
    reading = read_tiles(query, key, order, layout, bias)
    tiles = reading.token.shape[1]

    index, there, taken = find_union(keys, tiles, layout.subtiles(), body)
    means = reading.logits.gather(2, index).masked_fill(~there, -torch.inf)  # u.k

    if m:
        mass = choice.mass.to(key.dtype)
        weights = weighted_means(body_key, mass, winners, m)[1]
        exactly = F.pad(torch.zeros_like(reading.logits, dtype=torch.bool), (0, 1))  # the last is no key
        exactly = exactly.scatter(2, index.where(there, body), True)[..., :body]
        log_z, mean_value = write_hidden(reading.logits.masked_fill(exactly, -torch.inf), body_value, winners, m)

    def read(part: slice) -> tuple[Tensor, Tensor]:
        """One softmax for each query over [prefix ; the union, exactly or through its cluster ; the neurons]."""
        rest, keys = reading.rest[:, part], index[:, part]
        exact = rest @ take_rows(body_key, keys).mT  # r.k [Z, T, t, U]
        own = taken[:, part].repeat_interleave(SUBTILE, 2)
        head = rest @ head_key[:, None].mT
        if reading.bias is not None and reading.prefix_bias is not None:
            exact = exact + reading.bias[:, part].gather(3, keys[:, :, None].expand_as(exact))
            head = head + reading.prefix_bias[:, part]
        parts = [head, exact.masked_fill(~own, -torch.inf)]
        of_tile = [reading.prefix_logits[:, part], means[:, part]]
        values = [head_value[:, None].expand(-1, keys.shape[1], -1, -1), take_rows(body_value, keys)]
        if m:
            drive = rest @ weights[:, None].mT  # r.w [Z, T, t, m]
            owner = winners[:, None].expand(-1, keys.shape[1], -1).gather(2, keys)
            through = drive.gather(3, owner[:, :, None].expand_as(exact))
            parts[1:] = [torch.where(own, exact, through), drive]
            of_tile.append(log_z[:, part])
            values.append(mean_value[:, part])
        joint = torch.cat(of_tile, -1)[:, :, None]
        top = joint.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(rest.dtype).min)
        logits = torch.cat(parts, -1) + (joint - top)  # u.k is kept apart from r.k until the largest is subtracted
        logits = logits.clamp(min=torch.finfo(logits.dtype).min)  # a tile that may see nothing stays finite
        return logits.softmax(-1) @ torch.cat(values, 2), logits.logsumexp(-1) + top[..., 0]

    step = max(1, LOGITS // (len(key) * layout.tile * (prefix + index.shape[-1] + m)))
    out, normaliser = (
        torch.cat(x, 1) for x in zip(*(read(slice(t, t + step)) for t in range(0, tiles, step)), strict=True)
    )
    head_bias = None if bias is None else bias[:, :prefix]
    return assemble(out, normaliser, order, query, key, value, prefix, head_bias)


def assemble(
    out: Tensor,
    normaliser: Tensor,
    order: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: int,
    head_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Put rows by tile or sub-tile [Z, T, t, Dv] into the order of the tokens, behind the prefix's."""
    asked, back = order.shape[1], order.argsort(1)
    out, normaliser = (x.flatten(1, 2)[:, :asked] for x in (out, normaliser))
    out, normaliser = out.gather(1, back[..., None].expand_as(out)), normaliser.gather(1, back)
    if prefix:
        head, head_normaliser = exact_rows(query[:, :prefix], key, value, head_bias)
        out, normaliser = torch.cat([head, out], 1), torch.cat([head_normaliser, normaliser], 1)
    return out, normaliser


def exact_rows(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention of a few queries to all keys: the output and the log of the normaliser."""
    logits = query @ key.mT if bias is None else query @ key.mT + bias
    return logits.softmax(-1) @ value, logits.logsumexp(-1)


def write_hidden(logits: Tensor, value: Tensor, winners: Tensor, num_hidden: int) -> tuple[Tensor, Tensor]:
    """Write keys of logits u.k [Z, T, n] into the hidden layer: log z [Z, T, m] and s / z [Z, T, m, Dv]."""
    owner = winners[:, None].expand_as(logits)
    top = logits.new_full((*logits.shape[:2], num_hidden), torch.finfo(logits.dtype).min)
    top = top.scatter_reduce(2, owner, logits.detach(), "amax")  # from its largest, no cluster underflows
    z, s = cluster_sums((logits - top.gather(2, owner)).exp(), value, winners, num_hidden)
    empty = z == 0
    safe = z.masked_fill(empty, 1)
    return (safe.log() + top).masked_fill(empty, -torch.inf), s / safe[..., None]


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Rows [Z, n, D] at index [Z, T, P] -> [Z, T, P, D]; index_select is the fastest gather, and its backward too."""
    size, count, dim = rows.shape
    flat = (index + torch.arange(size, device=index.device)[:, None, None] * count).flatten()
    return rows.flatten(0, 1).index_select(0, flat).view(*index.shape, dim)
