"""The kernels of `kernels.near_far_choose` that select keys by their scores (`choosing.choose_keys`).

Nothing is sorted: of many numbers the largest are found by trying limits, bit by bit of integers that are ordered as
the numbers are, and of equal ones the first are taken. So equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from astroattn.ops.choosing import MOST_MISS
from astroattn.ops.kernels.features import load_rows, product
from astroattn.ops.kernels.near_far_forward import load_means

NEVER = tl.constexpr(-(2**31))  # the rank of what must not be taken
ALL_BITS = tl.constexpr(2**31 - 1)
BOUND = tl.constexpr(MOST_MISS)


@triton.jit
def rank_of(x):
    """Integers in the order of the floats; NaN has its place too, so every order is a total one."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & ALL_BITS)


@triton.jit
def value_of(rank):
    return (rank ^ ((rank >> 31) & ALL_BITS)).to(tl.float32, bitcast=True)


@triton.jit
def take_largest(ranks, most, limit):
    """Which numbers of each row [R, P] are its `most` largest above a limit; of equal ones the first."""
    bound = tl.full([ranks.shape[0]], NEVER, tl.int32)  # in the end the largest that so many reach
    for step in range(32):
        higher = bound ^ (tl.full([ranks.shape[0]], 1, tl.int32) << (31 - step))
        enough = tl.sum((ranks >= higher[:, None]).to(tl.int32), 1) >= most
        bound = tl.where(enough, higher, bound)
    above = ranks > tl.maximum(bound, limit)[:, None]
    equal = (ranks == bound[:, None]) & (bound > limit)[:, None]
    ties = most - tl.sum(above.to(tl.int32), 1)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= ties[:, None]))


@triton.jit(do_not_specialize=["tokens", "prefix", "tiles", "num_hidden"])
def maxima_kernel(
    mean, key, normaliser, gain, winners, error, maxima, tokens, prefix, tiles, num_hidden,
    D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, K: tl.constexpr, B: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """The largest score of each block of B keys, for a block of tiles and K keys -> maxima [Z, T, n / B]."""
    body = tokens - prefix
    blocks = tl.cdiv(tiles, T)
    parts = tl.cdiv(body, K)
    pid = tl.program_id(0)
    z = (pid // (blocks * parts)).to(tl.int64)
    part = pid // blocks % parts
    rows = pid % blocks * T + tl.arange(0, T)
    some = rows < tiles
    row = z * tiles + rows
    place = part * K + tl.arange(0, K)
    real = place < body
    u = load_means(mean, z, rows, tiles, D, DP)
    k = load_rows(key + (z * tokens + prefix) * D, D, place, body, D, DP)
    score = product(u, tl.trans(k), tl.float32) - tl.load(normaliser + row, mask=some, other=0.0)[:, None]
    if HIDDEN:
        owner = tl.load(winners + z * body + place, mask=real, other=0)
        score += tl.load(gain + row[:, None] * num_hidden + owner[None, :], mask=some[:, None], other=0.0)
        score += tl.load(error + z * body + place, mask=real, other=0.0)[None, :]
    score = tl.where(real[None, :], score, float("-inf"))
    best = tl.max(tl.reshape(score, [T, K // B, B]), 2)
    block = part * (K // B) + tl.arange(0, K // B)
    count = tl.cdiv(body, B)
    tl.store(maxima + row[:, None] * count + block[None, :], best, mask=some[:, None] & (block < count)[None, :])


@triton.jit(do_not_specialize=["body", "tiles", "num_hidden", "most", "listed"])
def candidates_kernel(
    mean, columns, normaliser, gain, winners, error, least, blocks, candidates, scores,
    body, tiles, num_hidden, most, listed,
    D: tl.constexpr, R: tl.constexpr, P: tl.constexpr, B: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """What R tiles propose: of all keys (B = 1), or of the listed blocks of B keys, the `most` of the largest scores.

    Scores stay in registers, so the keys come by their coordinates: columns [Z, D, n]. Candidates [Z, T, most] ascend;
    where there are fewer, the last ones stay as they were.
    """
    groups = tl.cdiv(tiles, R)
    z = (tl.program_id(0) // groups).to(tl.int64)
    rows = tl.program_id(0) % groups * R + tl.arange(0, R)
    some = (rows < tiles)[:, None]
    row = (z * tiles + rows)[:, None]
    lane = tl.arange(0, P)[None, :]
    if B == 1:
        place = lane
        real = place < body
    else:
        block = tl.load(blocks + row * listed + lane // B, mask=some & (lane < listed * B), other=0)
        place = block * B + lane % B
        real = (lane < listed * B) & (place < body)
    score = tl.zeros([R, P], tl.float32)
    for d in range(D):
        u = tl.load(mean + row * D + d, mask=some, other=0.0)
        score += u * tl.load(columns + (z * D + d) * body + place, mask=real, other=0.0)
    score -= tl.load(normaliser + row, mask=some, other=0.0)
    if HIDDEN:
        owner = tl.load(winners + z * body + place, mask=real, other=0)
        score += tl.load(gain + row * num_hidden + owner, mask=some & real, other=0.0)
        score += tl.load(error + z * body + place, mask=real, other=0.0)
    ranks = tl.where(some & real, rank_of(score), NEVER)
    taken = take_largest(ranks, most, rank_of(tl.load(least + z)))
    at = row * most + tl.cumsum(taken.to(tl.int32), 1) - 1
    tl.store(candidates + at, tl.zeros([R, P], tl.int32) + place, mask=taken)
    tl.store(scores + at, value_of(ranks), mask=taken)


@triton.jit(do_not_specialize=["body", "tiles", "subtiles", "asked", "num_hidden", "listed", "near_keys", "most"])
def take_kernel(
    candidates, scores, gain, winners, error, offset, log_value, within, drive, direction, near, least, keys,
    body, tiles, subtiles, asked, num_hidden, listed, near_keys, most,
    C: tl.constexpr, E: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """Of its tile's candidates the `most` that a sub-tile asks for most, behind its near keys -> keys [Z, asked, P].

    A candidate's score less what it has beside u.k is what is expected of it. Scores and limits as in
    `choosing.choose_keys`; the chosen keys ascend.
    """
    pid = tl.program_id(0)  # of Z * T * s
    row = (pid // subtiles).to(tl.int64)  # of Z * T
    z = row // tiles
    subtile = row % tiles * subtiles + pid % subtiles
    lane = tl.arange(0, E)
    there = lane < listed
    which = tl.load(candidates + row * listed + lane, mask=there, other=-1)
    real = which >= 0
    at = z * body + which
    score = tl.load(scores + row * listed + lane, mask=real, other=0.0)
    d = tl.zeros([E], tl.float32)
    for c in range(C):
        d += tl.load(direction + pid.to(tl.int64) * C + c) * tl.load(offset + at * C + c, mask=real, other=0.0)
    score += d
    if HIDDEN:
        owner = tl.load(winners + at, mask=real, other=0)
        score -= tl.load(gain + row * num_hidden + owner) + tl.load(error + at, mask=real, other=0.0)
        lost = 1 - tl.exp(-tl.minimum(tl.maximum(d, -BOUND), BOUND))
        miss = lost * lost + tl.load(within + at, mask=real, other=1.0)
        score += tl.load(log_value + at, mask=real, other=0.0) + 0.5 * tl.log(miss)
        score += tl.load(drive + pid.to(tl.int64) * num_hidden + owner)
    for w in range(near_keys):
        real = real & (which != tl.load(near + pid.to(tl.int64) * near_keys + w))
    ranks = tl.where(real & (subtile < asked), rank_of(score), NEVER)
    taken = take_largest(ranks[None, :], most, rank_of(tl.load(least + z)))
    to = (z * asked + subtile) * (near_keys + most) + near_keys + tl.cumsum(taken.to(tl.int32), 1) - 1
    tl.store(keys + to, which[None, :], mask=taken)
