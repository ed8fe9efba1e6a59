"""Triton: what a streaming memory does at the end of a block (`kernels.streaming` launches it).

A block's sums go into the running means; where all room is taken, some entries join others and the gaps are closed. The
entries of a sequence and key head, z, lie in buffers of fixed size. What is stored is read by other threads, hence the
barriers; and where several threads hold the same number, none may store it before all have read it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from astroattn.ops import streaming
from astroattn.ops.kernels.features import product

SINKS = tl.constexpr(streaming.SINKS)
SECOND_ORDER = tl.constexpr(streaming.SECOND_ORDER)
LEAST_MASS = tl.constexpr(streaming.LEAST_MASS)
HIGHEST = tl.constexpr(torch.finfo(torch.float32).max)
LEAST = tl.constexpr(16)  # rows of a product's operand


class Sizes(NamedTuple):
    """Constants of the kernels."""

    WIDTH: Any  # entries there is room for
    CANDIDATES: Any  # entries that may be merged when all that room is taken: all but the newest
    BLOCK: Any
    FAST: Any  # what is left, after a block, of the attention an entry has had
    SLOW: Any  # and of the statistics of queries and outputs
    DIM: Any  # of keys
    PADDED: Any  # DIM, a power of two
    VALUE_DIM: Any
    VALUE_PADDED: Any
    HEADS: Any  # query heads of a key head
    MANY: Any  # HEADS, a power of two, so that with TOKENS a product has rows enough
    MEANS: Any  # HEADS, a power of two, 16 or more
    TOKENS: Any  # taken at once, a power of two
    TILE: Any  # entries taken at once, a power of two
    COLUMNS: Any  # of queries, keys and values that are multiplied at once, a power of two
    ALL: Any  # CANDIDATES, a power of two
    CAP: Any  # the soft cap, 0 where there is none


@triton.jit
def place_rows(x, z, index, there, column, DIM: tl.constexpr, size):
    """Where columns of the keys or values of entries lie, and which of them there are."""
    place = x + (z * size.WIDTH + index)[:, None] * DIM + column[None, :]
    return place, there[:, None] & (column < DIM)[None, :]


@triton.jit
def load_keys(memory, z, index, there, column, size):
    place, wanted = place_rows(memory.key, z, index, there, column, size.DIM, size)
    return tl.load(place, mask=wanted, other=0.0)


@triton.jit
def load_values(memory, z, index, there, column, size):
    place, wanted = place_rows(memory.value, z, index, there, column, size.VALUE_DIM, size)
    return tl.load(place, mask=wanted, other=0.0)


@triton.jit
def store_entries(memory, z, index, there, keys, values, size):
    place, wanted = place_rows(memory.key, z, index, there, tl.arange(0, size.PADDED), size.DIM, size)
    tl.store(place, keys.to(tl.float32), mask=wanted)
    place, wanted = place_rows(memory.value, z, index, there, tl.arange(0, size.VALUE_PADDED), size.VALUE_DIM, size)
    tl.store(place, values.to(tl.float32), mask=wanted)


@triton.jit
def capped(x, size):
    """c tanh(x / c), or x where there is no c."""
    if size.CAP > 0:
        x = size.CAP * (2 * tl.sigmoid(2 * x / size.CAP) - 1)
    return x


@triton.jit
def log_weights(memory, z, index, there, size):
    """Where the b of entries lie for each query head [entries, MEANS], and which of them there are."""
    head = tl.arange(0, size.MEANS)
    place = (z * size.WIDTH + index)[:, None] * size.HEADS + head[None, :]
    return memory.log_weight + place, there[:, None] & (head < size.HEADS)[None, :]


@triton.jit
def fold(mean, sums, place, there, RATE: tl.constexpr, BLOCK: tl.constexpr):
    """Take the sums over a block into running means, and empty them."""
    old = tl.load(mean + place, mask=there, other=0.0)
    new = tl.load(sums + place, mask=there, other=0.0)
    tl.debug_barrier()
    tl.store(mean + place, old * RATE + new * ((1 - RATE) / BLOCK), mask=there)
    tl.store(sums + place, tl.zeros_like(new), mask=there)


@triton.jit
def end_block(memory, z, size):
    """Take a block into the statistics."""
    for first in range(0, size.WIDTH, size.TILE):
        index = first + tl.arange(0, size.TILE)
        place, there = z * size.WIDTH + index, index < size.WIDTH
        fold(memory.attention, memory.block_attention, place, there, size.FAST, size.BLOCK)
        age = tl.load(memory.age + place, mask=there, other=0.0)
        tl.debug_barrier()
        tl.store(memory.age + place, age * size.FAST + (1 - size.FAST), mask=there)
    column, head = tl.arange(0, size.PADDED), tl.arange(0, size.MANY)
    there = column < size.DIM
    place = (z * size.HEADS + head)[:, None] * size.DIM + column[None, :]
    wanted = (head < size.HEADS)[:, None] & there[None, :]
    fold(memory.query, memory.block_query, place, wanted, size.SLOW, size.BLOCK)
    fold(memory.square, memory.block_square, z * size.DIM + column, there, size.SLOW, size.BLOCK)
    column = tl.arange(0, size.VALUE_PADDED)
    there = column < size.VALUE_DIM
    fold(memory.output, memory.block_output, z * size.VALUE_DIM + column, there, size.SLOW, size.BLOCK)


@triton.jit
def masses(memory, z, index, there, size):
    """The attention that entries have had of late."""
    place = z * size.WIDTH + index
    age = tl.load(memory.age + place, mask=there, other=1.0)
    return tl.load(memory.attention + place, mask=there, other=0.0) / age + LEAST_MASS


@triton.jit
def metric_of(memory, z, weight, column, size):
    """The queries' second moments, the same for the two axes of a rotary plane."""
    there = column < size.DIM
    square = tl.load(memory.square + z * size.DIM + column, mask=there, other=0.0)
    if size.DIM % 2 == 0:
        twin = (column + size.DIM // 2) % size.DIM
        square = 0.5 * (square + tl.load(memory.square + z * size.DIM + twin, mask=there, other=0.0))
    return square / weight


@triton.jit
def costs(memory, z, mine, there, other, other_there, weight, size):
    """What joining entries costs [mine, other]."""
    turn = tl.zeros([mine.shape[0], other.shape[0]], tl.float32)
    for start in range(0, size.DIM, size.COLUMNS):
        column = start + tl.arange(0, size.COLUMNS)
        metric = metric_of(memory, z, weight, column, size)[None, :]
        x = load_keys(memory, z, mine, there, column, size)
        y = load_keys(memory, z, other, other_there, column, size)
        turn += tl.sum(x * x * metric, 1)[:, None] + tl.sum(y * y * metric, 1)[None, :]
        turn -= 2 * product(x * metric, tl.trans(y), tl.float32)
    alike = tl.zeros([mine.shape[0], other.shape[0]], tl.float32)
    off = tl.zeros([mine.shape[0]], tl.float32)
    other_off = tl.zeros([other.shape[0]], tl.float32)
    for start in range(0, size.VALUE_DIM, size.COLUMNS):
        column = start + tl.arange(0, size.COLUMNS)
        place = memory.output + z * size.VALUE_DIM + column
        centre = (tl.load(place, mask=column < size.VALUE_DIM, other=0.0) / weight)[None, :]
        x = load_values(memory, z, mine, there, column, size) - centre
        y = load_values(memory, z, other, other_there, column, size) - centre
        off += tl.sum(x * x, 1)
        other_off += tl.sum(y * y, 1)
        alike += product(x, tl.trans(y), tl.float32)
    mass = masses(memory, z, mine, there, size)[:, None]
    other_mass = masses(memory, z, other, other_there, size)[None, :]
    part = mass / (mass + other_mass)
    turn = tl.where(turn < 0, 0.0, turn)  # a NaN stays one
    apart = off[:, None] + other_off[None, :] - 2 * alike
    apart = tl.where(apart < 0, 0.0, apart)
    lever = part * off[:, None] + (1 - part) * other_off[None, :] - part * (1 - part) * apart
    mu = part * other_mass
    return mu * mu * turn * (apart + turn * SECOND_ORDER * tl.where(lever < 0, 0.0, lever))


@triton.jit
def drives(memory, z, index, there, weight, size):
    """b + u.k of entries, for the mean u of each query head [entries, query heads]."""
    places, wanted = log_weights(memory, z, index, there, size)
    drive = tl.zeros(places.shape, tl.float32)
    for start in range(0, size.DIM, size.COLUMNS):
        column = start + tl.arange(0, size.COLUMNS)
        mean = load_means(memory, z, weight, column, size)
        drive += product(load_keys(memory, z, index, there, column, size), tl.trans(mean), tl.float32)
    return capped(drive, size) + tl.load(places, mask=wanted, other=0.0)


@triton.jit
def load_means(memory, z, weight, column, size):
    """Some columns of the mean query u of each query head [query heads, columns]."""
    head = tl.arange(0, size.MEANS)
    place = (z * size.HEADS + head)[:, None] * size.DIM + column[None, :]
    wanted = (head < size.HEADS)[:, None] & (column < size.DIM)[None, :]
    return tl.load(memory.query + place, mask=wanted, other=0.0) / weight


@triton.jit
def choose(memory, z, weight, size):
    """The entries that join others [LEAST], CANDIDATES in places beyond a block: those whose joining costs least.

    The sums of the block are empty now; their places hold what joining costs meanwhile.
    """
    for first in range(0, size.CANDIDATES, size.TILE):
        index = first + tl.arange(0, size.TILE)
        there = index < size.CANDIDATES
        least = tl.full([size.TILE], float("inf"), tl.float32)
        for start in range(0, first + size.TILE, size.TILE):
            other = start + tl.arange(0, size.TILE)
            cost = costs(memory, z, index, there, other, other < size.CANDIDATES, weight, size)
            earlier = (other[None, :] < index[:, None]) & (other >= SINKS)[None, :]
            least = tl.minimum(least, tl.min(tl.where(earlier, cost, float("inf")), 1))
        # as many as a block can always be chosen, whatever overflows
        least = tl.where(index > SINKS, tl.where(least < HIGHEST, least, HIGHEST), float("inf"))
        tl.store(memory.block_attention + z * size.WIDTH + index, least, mask=there)
    tl.debug_barrier()
    index = tl.arange(0, size.ALL)
    there = index < size.CANDIDATES
    place = memory.block_attention + z * size.WIDTH + index
    least = tl.load(place, mask=there, other=float("inf"))
    tl.debug_barrier()
    tl.store(place, tl.zeros([size.ALL], tl.float32), mask=there)
    rank = tl.arange(0, LEAST)
    gone = tl.full([LEAST], size.CANDIDATES, tl.int32)
    for number in range(size.BLOCK):
        chosen = tl.argmin(least, 0)
        gone = tl.where(rank == number, chosen, gone)
        least = tl.where(index == chosen, float("inf"), least)
    return gone


@triton.jit
def find_hosts(memory, z, gone, weight, size):
    """Which entries these join [LEAST], and the log mass of all candidates at the mean query, for each query head."""
    leaving = tl.arange(0, LEAST) < size.BLOCK
    nearest = tl.full([LEAST], float("inf"), tl.float32)
    into = tl.zeros([LEAST], tl.int32)
    best = tl.full([size.MEANS], float("-inf"), tl.float32)
    total = tl.zeros([size.MEANS], tl.float32)
    for first in range(0, size.CANDIDATES, size.TILE):
        index = first + tl.arange(0, size.TILE)
        there = index < size.CANDIDATES
        cost = costs(memory, z, gone, leaving, index, there, weight, size)
        stays = tl.sum((gone[:, None] == index[None, :]).to(tl.int32), 0) == 0
        cost = tl.where((there & stays & (index >= SINKS))[None, :], cost, float("inf"))
        low, at = tl.min(cost, 1), tl.argmin(cost, 1) + first
        into = tl.where(low < nearest, at, into)
        nearest = tl.where(low < nearest, low, nearest)
        drive = tl.where(there[:, None], drives(memory, z, index, there, weight, size), float("-inf"))
        high = tl.maximum(best, tl.max(drive, 0))
        total = total * tl.exp(best - high) + tl.sum(tl.exp(drive - high[None, :]), 0)
        best = high
    return into, best + tl.log(total)


@triton.jit
def log_sum(x, y):
    high = tl.maximum(x, y)
    return high + tl.log(tl.exp(x - high) + tl.exp(y - high))


@triton.jit
def load_entry(memory, z, index, mean, size):
    """Key, value, b + u.k for each query head u, attention and age of an entry."""
    head, column = tl.arange(0, mean.shape[0]), tl.arange(0, size.PADDED)
    place = (z * size.WIDTH + index).to(tl.int64)
    key = tl.load(memory.key + place * size.DIM + column, mask=column < size.DIM, other=0.0)
    b = tl.load(memory.log_weight + place * size.HEADS + head, mask=head < size.HEADS, other=0.0)
    column = tl.arange(0, size.VALUE_PADDED)
    value = tl.load(memory.value + place * size.VALUE_DIM + column, mask=column < size.VALUE_DIM, other=0.0)
    drive = b + capped(tl.sum(mean * key[None, :], 1), size)
    return key, value, drive, tl.load(memory.attention + place), tl.load(memory.age + place)


@triton.jit
def join(memory, z, gone, into, mean, mass, size):
    """Let one entry join another; where several join the same one, they do so one after the other."""
    key, value, drive, attention, age = load_entry(memory, z, gone, mean, size)
    host_key, host_value, host_drive, host_attention, host_age = load_entry(memory, z, into, mean, size)
    head, column = tl.arange(0, mean.shape[0]), tl.arange(0, size.PADDED)
    # the heads share keys and values: an entry's part in theirs is the mean of its part in each head's mass
    part = tl.where(head < size.HEADS, drive - mass, float("-inf"))
    host_part = tl.where(head < size.HEADS, host_drive - mass, float("-inf"))
    high = tl.maximum(tl.max(part, 0), tl.max(host_part, 0))
    part, host_part = tl.sum(tl.exp(part - high), 0), tl.sum(tl.exp(host_part - high), 0)
    share = part / (part + host_part)
    key = host_key + share * (key - host_key)
    value = host_value + share * (value - host_value)
    b = log_sum(drive, host_drive) - capped(tl.sum(mean * key[None, :], 1), size)
    tl.debug_barrier()  # all threads have read what is stored now
    place = (z * size.WIDTH + into).to(tl.int64)
    tl.store(memory.key + place * size.DIM + column, key, mask=column < size.DIM)
    tl.store(memory.log_weight + place * size.HEADS + head, b, mask=head < size.HEADS)
    column = tl.arange(0, size.VALUE_PADDED)
    tl.store(memory.value + place * size.VALUE_DIM + column, value, mask=column < size.VALUE_DIM)
    tl.store(memory.attention + place, attention + host_attention)
    tl.store(memory.age + place, tl.maximum(age, host_age))
    tl.debug_barrier()


@triton.jit
def close_gaps(memory, z, gone, size):
    """Move the entries behind those that are gone forward, in their order."""
    before = tl.sum((gone[None, :] < gone[:, None]).to(tl.int32), 1)
    left = tl.where(gone < size.CANDIDATES, gone - before, size.WIDTH)  # stay in front of the gap
    for first in range(0, size.WIDTH - size.BLOCK, size.TILE):
        index = first + tl.arange(0, size.TILE)
        source = index + tl.sum((left[:, None] <= index[None, :]).to(tl.int32), 0)
        moved = (index < size.WIDTH - size.BLOCK) & (source > index)
        keys = load_keys(memory, z, source, moved, tl.arange(0, size.PADDED), size)
        values = load_values(memory, z, source, moved, tl.arange(0, size.VALUE_PADDED), size)
        attention = tl.load(memory.attention + z * size.WIDTH + source, mask=moved)
        age = tl.load(memory.age + z * size.WIDTH + source, mask=moved)
        places, wanted = log_weights(memory, z, source, moved, size)
        weights = tl.load(places, mask=wanted)
        tl.debug_barrier()  # a tile's sources lie behind all earlier tiles
        store_entries(memory, z, index, moved, keys, values, size)
        tl.store(memory.attention + z * size.WIDTH + index, attention, mask=moved)
        tl.store(memory.age + z * size.WIDTH + index, age, mask=moved)
        places, wanted = log_weights(memory, z, index, moved, size)
        tl.store(places, weights, mask=wanted)


@triton.jit
def merge(memory, z, weight, size):
    """Let as many entries as a block has join others, and close the gaps; all room is taken before."""
    gone = choose(memory, z, weight, size)
    into, mass = find_hosts(memory, z, gone, weight, size)
    mean = load_means(memory, z, weight, tl.arange(0, size.PADDED), size)
    rank = tl.arange(0, LEAST)
    for number in range(size.BLOCK):
        one = rank == number
        join(memory, z, tl.sum(tl.where(one, gone, 0), 0), tl.sum(tl.where(one, into, 0), 0), mean, mass, size)
    close_gaps(memory, z, gone, size)
