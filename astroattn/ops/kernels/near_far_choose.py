"""Triton: what near + far attention chooses (`ops.choosing.choose`), without a tensor of tiles x keys.

    normaliser   of what each tile expects of all keys, from its mean query
    mass         of each key: what all tiles expect of it; then PyTorch learns the clusters
    share        of each cluster in what a tile expects; then PyTorch finds what sub-tiles ask of it
    candidates   of each tile, the keys of the largest scores; from blocks of keys (maxima) of long sequences
    take         of those what each sub-tile reads exactly
    left         what each key weighs in its cluster: the mass of the queries that do not read it exactly

Each makes u.k anew from mean queries and keys. All is float32, whatever the inputs were given in.
"""

from __future__ import annotations

from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from astroattn.ops import choosing
from astroattn.ops.choosing import Choice
from astroattn.ops.clustering import Clusters, find_clusters
from astroattn.ops.kernels.near_far_choosing import left_kernel, mass_kernel, normaliser_kernel, share_kernel
from astroattn.ops.kernels.near_far_selecting import candidates_kernel, maxima_kernel, take_kernel
from astroattn.ops.kernels.near_far_tiles import by_cluster
from astroattn.ops.kernels.rows import cdiv, power_of_2
from astroattn.ops.layout import SUBTILE, Layout
from astroattn.ops.order import Coordinates, find_coordinates
from astroattn.ops.tiles import by_tile, find_slots, mean_and_rest

KEYS = 32  # in a block of a product
CHUNK = 1024  # keys, of which one program of `normaliser` makes the sum
DIRECT = 4096  # keys, up to which one program looks at all of them
MOST_SCORES = 16384  # that one program holds
MOST_BLOCK = 16  # keys of which only the largest score is kept
ENTRIES = 8  # of a tile's chosen keys, that are compared at once to a block of keys


class Tiles(NamedTuple):
    """The tiles, and what they are expected to attend to.

    Attributes:
        token, real, mean, rest: as in `tiles.Reading`.
        key: all keys [Z, N, D]. normaliser: u.k less this is the logarithm of what is expected [Z, T].
    """

    token: Tensor
    real: Tensor
    mean: Tensor
    rest: Tensor
    key: Tensor
    normaliser: Tensor

    def sizes(self) -> dict[str, Any]:
        """Constants of the kernels that multiply blocks of tiles and keys."""
        dim, tiles = self.key.shape[2], self.mean.shape[1]
        most = 32 if dim <= 128 else 16  # so that the blocks fit into the least shared memory
        return {"D": dim, "DP": power_of_2(dim), "T": power_of_2(tiles, most=most), "K": KEYS, "num_stages": 2}


def block_of(layout: Layout, body: int) -> int:
    """The keys in a block of which the largest score is kept; 1: all are looked at at once, 0: there are too many.

    About as many blocks as keys in those that are looked at again.
    """
    most = max(layout.candidates(body), 1)
    if body <= DIRECT:
        return 1
    block = power_of_2(isqrt(body // most), least=2, most=MOST_BLOCK)
    while block > 1 and most * block > MOST_SCORES:
        block //= 2
    return block if block > 1 else int(body <= MOST_SCORES)


@torch.no_grad()
def choose(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Choice:
    """As `choosing.choose`, without a bias, on float32; the keys that a sub-tile chooses come in their own order."""
    prefix = layout.prefix
    body_query, body_key, body_value = (x[:, prefix:] for x in (query, key, value))
    size, body = body_key.shape[:2]
    if block_of(layout, body) == 0:
        return choosing.choose(query, key, value, layout)
    coordinates = find_coordinates(body_query, body_key)
    order = choosing.find_order(body_query, body_key, coordinates, layout)
    tiles = expect(body_query, key, order, layout)
    clusters, winners = None, order.new_zeros(size, body)
    if layout.num_hidden:
        given = body_key, body_value, coordinates, _mass(tiles, prefix), tiles.token, tiles.real
        clusters = find_clusters(*given, layout)
        winners = clusters.winners
    keys = choose_keys(tiles, coordinates, layout, clusters)
    left = _mass_left(tiles, keys, layout)
    return Choice(order, winners, choosing.by_largest(left, winners, layout), keys)


def expect(query: Tensor, key: Tensor, order: Tensor, layout: Layout) -> Tiles:
    """The tiles of the body's queries, and their normalisers: `choosing.expected_attention`."""
    token, real = find_slots(order, layout)
    mean, rest = mean_and_rest(query, token, real)
    number = real.sum(1).float()
    tiles = Tiles(token, real, mean.contiguous(), rest, key.contiguous(), mean)
    (size, tokens, _), count, chunks = key.shape, mean.shape[1], cdiv(key.shape[1], CHUNK)
    parts, sizes = key.new_empty(size, chunks, count), tiles.sizes()
    normaliser_kernel[(size * chunks * cdiv(count, sizes["T"]),)](
        tiles.mean, tiles.key, parts, tokens, count, CHUNK, chunks, **sizes
    )
    return tiles._replace(normaliser=parts.logsumexp(1) - (number / number.sum()).log())


def _mass(tiles: Tiles, prefix: int) -> Tensor:
    """What all queries are expected to attend to each key of the body [Z, n]."""
    (size, tokens, _), body = tiles.key.shape, tiles.key.shape[1] - prefix
    mass = tiles.key.new_empty(size, body)
    mass_kernel[(size * cdiv(body, KEYS),)](
        tiles.mean, tiles.key, tiles.normaliser, mass, tokens, prefix, tiles.mean.shape[1], **tiles.sizes()
    )
    return mass


def _share(tiles: Tiles, winners: Tensor, layout: Layout) -> Tensor:
    """The attention that each tile is expected to give to each cluster [Z, T, m]."""
    m, (size, count, _) = layout.num_hidden, tiles.mean.shape
    share, sizes = tiles.mean.new_empty(size, count, m), tiles.sizes()
    share_kernel[(size * m * cdiv(count, sizes["T"]),)](
        *(tiles.mean, tiles.key, tiles.normaliser, *by_cluster(winners, m), share),
        *(tiles.key.shape[1], layout.prefix, count, m), **sizes,
    )  # fmt: skip
    return share


class Scores(NamedTuple):
    """What the score of a key has beside u.k: log exp(u_s.w) / Z_s, and the logarithm of the error through its cluster.

    Attributes:
        gain: the largest of the sub-tiles [Z, T, m]. drive: of each [Z, T, s, m].
        winners: the cluster of each key [Z, n]. error, log_value, within: as in `choosing.choose_keys` [Z, n].
        offset: k - w in a few coordinates [Z, n, c]. least: the score above which a key is chosen [Z].
    """

    gain: Tensor
    drive: Tensor
    winners: Tensor
    error: Tensor
    log_value: Tensor
    within: Tensor
    offset: Tensor
    least: Tensor


def choose_keys(tiles: Tiles, coordinates: Coordinates, layout: Layout, clusters: Clusters | None) -> Tensor:
    """`choosing.choose_keys`: the exact keys of each sub-tile [Z, S, P], int32."""
    prefix, most = layout.prefix, layout.exact_keys
    body, asked = tiles.key.shape[1] - prefix, coordinates.query.shape[1]
    near = choosing.near_of_subtiles(tiles.token, tiles.real, layout, body).int().contiguous()
    keys = choosing.of_queries(torch.cat([near, near.new_full((*near.shape[:3], most), -1)], -1), asked).contiguous()
    if most == 0:
        return keys
    subtiles = choosing.find_subtiles(tiles.rest, tiles.real, coordinates, layout)
    scores = _scores(tiles, coordinates, subtiles, layout, clusters)
    candidates, best = _candidates(tiles, scores, layout)
    size, count, listed = candidates.shape
    take_kernel[(size * count * layout.subtiles(),)](
        *(candidates, best, scores.gain, scores.winners, scores.error, scores.offset, scores.log_value),
        *(scores.within, scores.drive, subtiles.direction.contiguous(), near, scores.least, keys),
        *(body, count, layout.subtiles(), keys.shape[1], layout.num_hidden, listed, near.shape[3], most),
        C=scores.offset.shape[2], E=power_of_2(listed, least=64), HIDDEN=clusters is not None,
    )  # fmt: skip
    return keys


def _scores(
    tiles: Tiles, coordinates: Coordinates, subtiles: choosing.Subtiles, layout: Layout, clusters: Clusters | None
) -> Scores:
    least = choosing.least_score(clusters, layout, tiles.mean, tiles.mean.shape[2])
    if clusters is None:
        offset, none = coordinates.key.contiguous(), least  # attention alone counts
        return Scores(none, none, none, none, none, none, offset, least)
    head_key = tiles.key[:, : layout.prefix]
    log_prefix = tiles.mean @ head_key.mT - tiles.normaliser[..., None]
    share = _share(tiles, clusters.winners, layout)
    drive, gain = choosing.find_drives(subtiles, clusters, share, head_key, log_prefix)
    within, wide = choosing.spread_of_keys(subtiles, clusters, coordinates.query.shape[1])
    error, winners = clusters.log_value + wide.log() / 2, clusters.winners.int()
    return Scores(gain, drive, winners, error, clusters.log_value, within, clusters.along.contiguous(), least)


def _candidates(tiles: Tiles, scores: Scores, layout: Layout) -> tuple[Tensor, Tensor]:
    """The keys that each tile proposes [Z, T, E], -1 behind them, and their scores."""
    (size, count, dim), body, m = tiles.mean.shape, tiles.key.shape[1] - layout.prefix, layout.num_hidden
    most, block = layout.candidates(body), block_of(layout, body)
    given = tiles.normaliser, scores.gain, scores.winners, scores.error
    candidates = scores.winners.new_full((size, count, most), -1, dtype=torch.int32)
    best = tiles.mean.new_empty(size, count, most)
    blocks, listed, held = candidates, body, power_of_2(body, least=256)
    if block > 1:
        blocks = _blocks(tiles, given, layout, block, most)
        listed = blocks.shape[2]
        held = power_of_2(listed * block)
    rows = min(max(held // 1024, 1), 4) if block == 1 and held <= DIRECT else 1
    candidates_kernel[(size * cdiv(count, rows),)](
        *(tiles.mean, tiles.key[:, layout.prefix :].mT.contiguous(), *given, scores.least, blocks, candidates, best),
        *(body, count, m, most, listed),
        D=dim, R=rows, P=held, B=block, HIDDEN=m > 0, num_warps=min(max(rows * held // 1024, 4), 16),
    )  # fmt: skip
    return candidates, best


def _blocks(tiles: Tiles, given: tuple[Tensor, ...], layout: Layout, block: int, most: int) -> Tensor:
    """The blocks of keys whose largest scores are the largest [Z, T, E]; no other has a key of the E largest scores."""
    (size, tokens, _), count, prefix = tiles.key.shape, tiles.mean.shape[1], layout.prefix
    maxima, sizes = tiles.mean.new_empty(size, count, cdiv(tokens - prefix, block)), tiles.sizes()
    maxima_kernel[(size * cdiv(tokens - prefix, KEYS) * cdiv(count, sizes["T"]),)](
        *(tiles.mean, tiles.key, *given, maxima, tokens, prefix, count, layout.num_hidden),
        **sizes, B=block, HIDDEN=layout.num_hidden > 0,
    )  # fmt: skip
    return maxima.topk(min(most, maxima.shape[2]), dim=-1).indices.sort(dim=-1).values.int()


def _mass_left(tiles: Tiles, keys: Tensor, layout: Layout) -> Tensor:
    """`choosing._mass_left` before it is measured from the largest of each cluster [Z, n]."""
    (size, tokens, _), count, prefix = tiles.key.shape, tiles.mean.shape[1], layout.prefix
    number = tiles.real.view(count, -1, SUBTILE).sum(2).float()  # queries of the sub-tiles [T, s]
    of_tile = by_tile(keys, *number.shape).flatten(2)
    chosen, place = of_tile.sort(dim=-1)
    queries = number.repeat_interleave(keys.shape[2], 1).expand(size, -1, -1).gather(2, place)
    blocks = cdiv(tokens - prefix, KEYS)
    limits = KEYS * torch.arange(blocks + 1, device=keys.device, dtype=keys.dtype)
    begins = torch.searchsorted(chosen, limits.expand(size, count, -1).contiguous(), out_int32=True)
    left, sizes = tiles.key.new_empty(size, tokens - prefix), tiles.sizes() | {"T": 16}
    left_kernel[(size * blocks,)](
        *(tiles.mean, tiles.key, tiles.normaliser, chosen, queries, begins, number.sum(1), left),
        *(tokens, prefix, count, chosen.shape[2], choosing.LEAST_MASS), **sizes, E=ENTRIES,
    )  # fmt: skip
    return left
