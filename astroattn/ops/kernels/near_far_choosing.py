"""The kernels of `kernels.near_far_choose`, which make u.k anew wherever they need it: expected attention and scores.

All are float32; u.k is the mean query u of a tile [Z, T, D] times a key [Z, N, D]. What sums over tiles or keys does so
in one order, without atomics: equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from astroattn.ops.kernels.features import LOWEST, load_rows, product
from astroattn.ops.kernels.near_far_forward import cluster_and_tiles, load_means


@triton.jit(do_not_specialize=["tokens", "tiles", "chunk", "chunks"])
def normaliser_kernel(
    mean, key, parts, tokens, tiles, chunk, chunks,
    D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """log sum exp(u.k) over a chunk of all keys, for a block of tiles -> parts [Z, chunks, T]."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(tiles, T)
    part = pid // blocks  # of Z * chunks
    z = (part // chunks).to(tl.int64)
    rows = pid % blocks * T + tl.arange(0, T)
    u = load_means(mean, z, rows, tiles, D, DP)
    first = part % chunks * chunk
    last = tl.minimum(first + chunk, tokens)
    top = tl.full([T], LOWEST, tl.float32)
    total = tl.zeros([T], tl.float32)
    for start in range(first, last, K):
        place = start + tl.arange(0, K)
        k = load_rows(key + z * tokens * D, D, place, last, D, DP)
        score = tl.where((place < last)[None, :], product(u, tl.trans(k), tl.float32), float("-inf"))
        best = tl.maximum(top, tl.max(score, 1))
        total = total * tl.exp(top - best) + tl.sum(tl.exp(score - best[:, None]), 1)
        top = best
    tl.store(parts + part.to(tl.int64) * tiles + rows, tl.log(total) + top, mask=rows < tiles)


@triton.jit
def expect(u, k, normaliser, rows, tiles, real):
    """The attention that is expected of tiles [T, DP] for keys [K, DP]: exp(u.k - normaliser) [T, K]."""
    log_sum = tl.load(normaliser + rows, mask=rows < tiles, other=float("inf"))
    log_share = product(u, tl.trans(k), tl.float32) - log_sum[:, None]
    return tl.where((rows < tiles)[:, None] & real[None, :], tl.exp(log_share), 0.0)


@triton.jit(do_not_specialize=["tokens", "prefix", "tiles"])
def mass_kernel(
    mean, key, normaliser, mass, tokens, prefix, tiles,
    D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The attention that all tiles are expected to give to each key of a block -> mass [Z, n]."""
    body = tokens - prefix
    blocks = tl.cdiv(body, K)
    z = (tl.program_id(0) // blocks).to(tl.int64)
    place = tl.program_id(0) % blocks * K + tl.arange(0, K)
    real = place < body
    k = load_rows(key + (z * tokens + prefix) * D, D, place, body, D, DP)
    total = tl.zeros([K], tl.float32)
    for first in range(0, tiles, T):
        rows = first + tl.arange(0, T)
        u = load_means(mean, z, rows, tiles, D, DP)
        total += tl.sum(expect(u, k, normaliser + z * tiles, rows, tiles, real), 0)
    tl.store(mass + z * body + place, total, mask=real)


@triton.jit(do_not_specialize=["tokens", "prefix", "tiles", "entries"])
def left_kernel(
    mean, key, normaliser, chosen, queries, begins, numbers, left, tokens, prefix, tiles, entries, least,
    D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """The same of the queries that do not read the key exactly, and `least` of the whole -> left [Z, n].

    A tile's chosen keys [Z, T, entries] ascend, each with the queries of the sub-tile that reads it; `begins` [Z, T,
    blocks + 1] says where those of each block of K keys begin. numbers: queries of the tiles [T].
    """
    body = tokens - prefix
    blocks = tl.cdiv(body, K)
    z = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    place = block * K + tl.arange(0, K)
    real = place < body
    k = load_rows(key + (z * tokens + prefix) * D, D, place, body, D, DP)
    total = tl.zeros([K], tl.float32)
    whole = tl.zeros([K], tl.float32)
    for first in range(0, tiles, T):
        rows = first + tl.arange(0, T)
        some = rows < tiles
        row = z * tiles + rows
        begin = tl.load(begins + row * (blocks + 1) + block, mask=some, other=0)
        end = tl.load(begins + row * (blocks + 1) + block + 1, mask=some, other=0)
        taken = tl.zeros([T, K], tl.float32)
        for step in range(0, tl.max(end - begin, 0), E):
            entry = begin[:, None] + step + tl.arange(0, E)[None, :]
            there = entry < end[:, None]
            at = row[:, None] * entries + entry
            which = tl.load(chosen + at, mask=there, other=-1)
            number = tl.load(queries + at, mask=there, other=0.0)
            taken += tl.sum(tl.where(which[:, :, None] == place[None, None, :], number[:, :, None], 0.0), 1)
        number = tl.load(numbers + rows, mask=some, other=1.0)
        u = load_means(mean, z, rows, tiles, D, DP)
        expected = expect(u, k, normaliser + z * tiles, rows, tiles, real)
        share = 1.0 - taken / number[:, None]
        total += tl.sum(expected * tl.where(share < 0, 0.0, share), 0)
        whole += tl.sum(expected, 0)
    tl.store(left + z * body + place, total + least * whole, mask=real)


@triton.jit(do_not_specialize=["tokens", "prefix", "tiles", "num_hidden"])
def share_kernel(
    mean, key, normaliser, ordered, begins, share, tokens, prefix, tiles, num_hidden,
    D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The attention that a block of tiles is expected to give to one cluster -> share [Z, T, m]."""
    z, cluster, rows = cluster_and_tiles(tiles, num_hidden, T)
    body = tokens - prefix
    first = tl.load(begins + z * (num_hidden + 1) + cluster)
    last = tl.load(begins + z * (num_hidden + 1) + cluster + 1)
    u = load_means(mean, z, rows, tiles, D, DP)
    total = tl.zeros([T], tl.float32)
    for start in range(first, last, K):
        place = start + tl.arange(0, K)
        real = place < last
        member = tl.load(ordered + z * body + place, mask=real, other=body)
        k = load_rows(key + (z * tokens + prefix) * D, D, member, body, D, DP)
        total += tl.sum(expect(u, k, normaliser + z * tiles, rows, tiles, real), 1)
    tl.store(share + (z * tiles + rows) * num_hidden + cluster, total, mask=rows < tiles)
