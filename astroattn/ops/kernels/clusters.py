"""Triton: the clusters of the keys (`ops.clustering` has the formulas).

moments     the nearest cluster of each key, and the sums over its members of mass times a row, mass, and 1, in parts
update      the means of the clusters
sort        the keys in the order of their clusters (a counting sort), and the means of the clusters
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from astroattn.ops.kernels.features import narrow
from astroattn.ops.kernels.means import MOST_PARTS, PROGRAMS
from astroattn.ops.kernels.tiles import (
    Shape,
    base,
    blocks_of,
    dot,
    end_of_columns,
    load_rows,
    power_of_2,
    rows_of,
    scratch,
    store_rows,
)


class Moments(NamedTuple):
    """Sums over the members of each cluster in each part of the keys, of `length` keys: of mass times a row
    [B, H, parts * m, D], of mass, and of 1 [B, H, parts, m]."""

    sums: Tensor
    totals: Tensor
    counts: Tensor
    length: int


class Order(NamedTuple):
    """The keys by cluster.

    Attributes:
        order: the real keys, one cluster after the other [B, H, n]. place: where each key is listed [B, H, n].
        start: where each cluster begins, and the end [B, H, m + 1].
    """

    order: Tensor
    place: Tensor
    start: Tensor


@triton.jit
def load_centres(weights, key, z, j, end, shape):
    """The centres of clusters j; before the first step the keys at equal distances along the sequence."""
    if weights is None:
        at = (2 * j + 1).to(tl.int64) * (shape.rows * end) // (2 * shape.clusters)
        at = tl.minimum(at, shape.rows * shape.columns - 1)
        start = base(key, z, shape) + shape.prefix * key.row
        centres = load_rows(key, start, at, j < shape.clusters).to(tl.float32)
    else:
        centres = load_rows(weights, base(weights, z, shape), j, j < shape.clusters)
    return centres


@triton.jit
def load_metric(square, z, shape, parts, PARTS: tl.constexpr):
    """The mean square of r in each dimension over the largest of them [D]."""
    part = tl.arange(0, PARTS)
    squares = tl.sum(load_rows(square, base(square, z, shape), part, part < parts), 0)
    return squares / tl.maximum(tl.max(squares, 0), 1e-30)


@triton.jit
def _scaled(centres, metric, j, shape, TO: tl.constexpr):
    """Centres [M, D] in the metric, and half their squared lengths: with k, half the distance less what all share."""
    scaled = centres * metric[None, :]
    half = tl.where(j < shape.clusters, tl.sum(scaled * centres, 1) * 0.5, float("inf"))
    return tl.trans(narrow(scaled, TO)), half


@triton.jit
def _assign(key, weights, square, winners, shape, squares, SQUARES: tl.constexpr, KEYS: tl.constexpr, M: tl.constexpr):
    """The nearest cluster of each key, for more clusters than one block holds."""
    n = shape.rows * shape.columns
    blocks = tl.cdiv(n, KEYS)
    z, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    end = end_of_columns(z, shape)
    metric = load_metric(square, z, shape, squares, SQUARES)
    i = block * KEYS + tl.arange(0, KEYS)
    k = load_rows(key, base(key, z, shape) + shape.prefix * key.row, i, i < n)
    least = tl.full([KEYS], float("inf"), tl.float32)
    winner = tl.zeros([KEYS], tl.int32)
    for first in range(0, shape.clusters, M):
        j = first + tl.arange(0, M)
        scaled, half = _scaled(load_centres(weights, key, z, j, end, shape), metric, j, shape, k.dtype)
        distance = half[None, :] - dot(k, scaled)
        closest = tl.min(distance, 1)
        winner = tl.where(closest < least, first + tl.argmin(distance, 1), winner)
        least = tl.minimum(closest, least)
    tl.store(winners + z.to(tl.int64) * n + i, winner, mask=i < n)


@triton.jit
def _moments(
    key, rows, weights, square, mass, winners, sums, totals, counts, shape, parts, squares, length,
    SQUARES: tl.constexpr, KEYS: tl.constexpr, M: tl.constexpr, ASSIGN: tl.constexpr,
):  # fmt: skip
    n, m = shape.rows * shape.columns, shape.clusters
    blocks = tl.cdiv(m, M)
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks % parts
    z = tl.program_id(0) // blocks // parts
    end = end_of_columns(z, shape)
    j = block * M + tl.arange(0, M)
    row = z.to(tl.int64) * n
    key_start = base(key, z, shape) + shape.prefix * key.row
    row_start = base(rows, z, shape) + shape.prefix * rows.row
    if ASSIGN:
        metric = load_metric(square, z, shape, squares, SQUARES)
        centres = load_centres(weights, key, z, j, end, shape)
        scaled, half = _scaled(centres, metric, j, shape, key.data.dtype.element_ty)
    acc = tl.zeros([M, rows.PADDED], tl.float32)
    total = tl.zeros([M], tl.float32)
    number = tl.zeros([M], tl.int32)
    for first in range(part * length, tl.minimum((part + 1) * length, n), KEYS):
        i = first + tl.arange(0, KEYS)
        real = i < shape.rows * end
        if ASSIGN:
            k = load_rows(key, key_start, i, real)
            winner = tl.minimum(tl.argmin(half[None, :] - dot(k, scaled), 1), m - 1)  # NaN has a cluster, too
            tl.store(winners + row + i, winner, mask=i < n)
        else:
            winner = tl.load(winners + row + i, mask=i < n, other=0)
        member = (j[:, None] == winner[None, :]) & real[None, :]
        weight = tl.where(member, tl.load(mass + row + i, mask=i < n, other=0.0)[None, :], 0.0)
        x = load_rows(rows, row_start, i, real)
        if x.dtype == tl.bfloat16:
            weight = narrow(weight, tl.bfloat16)
        else:
            x = x.to(tl.float32)
        acc = dot(weight, x, acc)
        total += tl.sum(weight.to(tl.float32), 1)
        number += tl.sum(member.to(tl.int32), 1)
    place = (z.to(tl.int64) * parts + part) * m + j
    store_rows(sums, base(sums, z, shape), part * m + j, j < m, acc)
    tl.store(totals + place, total, mask=j < m)
    tl.store(counts + place, number, mask=j < m)


@triton.jit
def _mean_of_cluster(sums, totals, old, z, j, shape, parts, PARTS: tl.constexpr):
    """The mean [1, D] of cluster j over all parts; `old` where nothing has mass."""
    part = tl.arange(0, PARTS)
    acc = tl.sum(load_rows(sums, base(sums, z, shape), part * shape.clusters + j, part < parts), 0)
    place = (z.to(tl.int64) * parts + part) * shape.clusters + j
    total = tl.sum(tl.load(totals + place, mask=part < parts, other=0.0), 0)
    return tl.where(total > 0, acc[None, :] / tl.where(total > 0, total, 1.0), old)


@triton.jit
def _update(key, sums, totals, weights, new, shape, parts, PARTS: tl.constexpr, KEEP: tl.constexpr):
    """One step's new means; KEEP: a cluster without mass stays where it was, else it has the mean 0."""
    z, j = tl.program_id(0) // shape.clusters, tl.program_id(0) % shape.clusters
    one = tl.arange(0, 1)
    old = tl.zeros([1, sums.PADDED], tl.float32)
    if KEEP:
        old = load_centres(weights, key, z, j + one, end_of_columns(z, shape), shape)
    mean = _mean_of_cluster(sums, totals, old, z, j, shape, parts, PARTS)
    store_rows(new, base(new, z, shape), j + one, one == 0, mean)


@triton.jit
def _sort(
    winners, sums, totals, counts, order, places, starts, mean, shape, parts, length,
    PARTS: tl.constexpr, KEYS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    n, m = shape.rows * shape.columns, shape.clusters
    z, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    real = shape.rows * end_of_columns(z, shape)
    j, others = tl.arange(0, M), tl.arange(0, PARTS)
    row = z.to(tl.int64) * n
    count = tl.load(
        counts + (z.to(tl.int64) * parts + others[:, None]) * m + j[None, :],
        mask=(others < parts)[:, None] & (j < m)[None, :],
        other=0,
    )
    total = tl.sum(count, 0)
    start = tl.cumsum(total, 0) - total
    if part == 0:
        tl.store(starts + z.to(tl.int64) * (m + 1) + j, start, mask=j < m)
        tl.store(starts + z.to(tl.int64) * (m + 1) + m, real)
    begin = start + tl.sum(tl.where((others < part)[:, None], count, 0), 0)
    rank = tl.arange(0, KEYS)
    for first in range(part * length, tl.minimum((part + 1) * length, real), KEYS):
        i = first + rank
        winner = tl.load(winners + row + i, mask=i < real, other=-1)
        earlier = tl.sum(((winner[:, None] == winner[None, :]) & (rank[:, None] > rank[None, :])).to(tl.int32), 1)
        member = winner[:, None] == j[None, :]
        place = tl.sum(tl.where(member, begin[None, :], 0), 1) + earlier
        tl.store(order + row + place, i, mask=i < real)
        tl.store(places + row + i, place, mask=i < real)
        begin += tl.sum(member.to(tl.int32), 0)
    one = tl.arange(0, 1)
    for mine in range(part, m, parts):
        old = tl.zeros([1, sums.PADDED], tl.float32)
        row_of = _mean_of_cluster(sums, totals, old, z, mine, shape, parts, PARTS)
        store_rows(mean, base(mean, z, shape), mine + one, one == 0, row_of)


def take_moments(
    shape: Shape,
    key: Tensor,
    rows: Tensor,
    mass: Tensor,
    winners: Tensor,
    square: Tensor | None = None,
    weights: Tensor | None = None,
) -> Moments:
    """The moments of clusters over `rows`; with `square` the winners are found first, among `weights`, and written.

    Without `weights` the clusters begin at keys of equal distances.
    """
    size, n, m = key.shape[0] * key.shape[1], shape.body, shape.clusters
    length = 64 * max(2, -(-n // (64 * min(MOST_PARTS, max(1, PROGRAMS // size)))))
    parts = -(-n // length)
    most = blocks_of(key, rows, widened=True)
    block = power_of_2(m, most=most.clusters)
    blocks = -(-m // block)
    squares = 1 if square is None else square.shape[2]
    metric = (None, None) if square is None else (weights if weights is None else rows_of(weights), rows_of(square))
    if square is not None and blocks > 1:
        _assign[(size * -(-n // most.keys),)](
            rows_of(key),
            *metric,
            winners,
            shape,
            squares,
            power_of_2(squares, 1),
            most.keys,
            block,
            num_stages=most.stages,
        )
    dim = rows.shape[-1]
    counts = scratch(key, parts, m, dtype=torch.int32)
    moments = Moments(scratch(key, parts * m, dim), scratch(key, parts, m), counts, length)
    _moments[(size * parts * blocks,)](
        rows_of(key), rows_of(rows), *metric, mass, winners, rows_of(moments.sums), *moments[1:3], shape, parts,
        squares, length, power_of_2(squares, 1), most.keys, block, square is not None and blocks == 1,
        num_warps=4 if max(dim, key.shape[-1]) <= 64 else 8, num_stages=most.stages,
    )  # fmt: skip
    return moments


def cluster_means(
    shape: Shape, key: Tensor, moments: Moments, old: Tensor | None = None, *, keep: bool = False
) -> Tensor:
    """The means of the clusters [B, H, m, D]; with `keep` one without mass stays at `old` (None: where it began)."""
    size, m, dim = key.shape[0] * key.shape[1], shape.clusters, moments.sums.shape[-1]
    new = scratch(key, m, dim)
    parts = moments.totals.shape[2]
    _update[(size * m,)](
        rows_of(key), rows_of(moments.sums), moments.totals, None if old is None else rows_of(old), rows_of(new), shape,
        parts, power_of_2(parts, 1), keep, num_warps=1 if dim <= 64 else 4,
    )  # fmt: skip
    return new


def learn(shape: Shape, key: Tensor, mass: Tensor, square: Tensor, winners: Tensor, steps: int) -> Tensor | None:
    """The clusters' weights after some steps of weighted k-means [B, H, m, D]; None: where they began."""
    weights = None
    for _ in range(steps):
        moments = take_moments(shape, key, key, mass, winners, square, weights)
        weights = cluster_means(shape, key, moments, weights, keep=True)
    return weights


def sort_keys(shape: Shape, moments: Moments, winners: Tensor) -> tuple[Order, Tensor]:
    """The keys by cluster, and the clusters' means of what the moments are of [B, H, m, D]."""
    parts, m = moments.totals.shape[2], shape.clusters
    most = power_of_2(m)
    order = Order(*(scratch(winners, size, dtype=torch.int32) for size in (shape.body, shape.body, m + 1)))
    mean = scratch(winners, m, moments.sums.shape[-1])
    _sort[(winners.shape[0] * winners.shape[1] * parts,)](
        winners, rows_of(moments.sums), *moments[1:3], *order, rows_of(mean), shape, parts, moments.length,
        power_of_2(parts, 1), max(16, min(128, 16384 // most)), most, num_warps=4 if most <= 128 else 8,
    )  # fmt: skip
    return order, mean
