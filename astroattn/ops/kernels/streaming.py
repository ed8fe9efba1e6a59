"""Triton: the streaming memory (`ops.streaming` has the formulas), in place on buffers of fixed size: one launch.

One program goes through the tokens of one sequence and key head: it writes up to a block of them, reads with their
query heads, and at the end of a block takes the statistics in and merges. Programs share nothing, counts and schedule
included, so each sequence is in its own block, and nothing asks the GPU and waits: a CUDA graph can repeat a step. Sums
have a fixed order. There are no gradients here: those are `ops.streaming`'s.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from astroattn.ops import streaming
from astroattn.ops.backends import MOST_DIM
from astroattn.ops.kernels.causal_forward import start_of
from astroattn.ops.kernels.features import product
from astroattn.ops.kernels.rows import load_rows, power_of_2, rows_of, store_rows
from astroattn.ops.rows import dense_rows
from astroattn.ops.streaming import ENTRIES, FORGETTING, QUERY_DECAY, Memory, block_of

SINKS = tl.constexpr(streaming.SINKS)
SECOND_ORDER = tl.constexpr(streaming.SECOND_ORDER)
LEAST_MASS = tl.constexpr(streaming.LEAST_MASS)
HIGHEST = tl.constexpr(torch.finfo(torch.float32).max)
LEAST = tl.constexpr(16)  # rows of a product's operand
COLUMNS = tl.constexpr(32)  # of keys and values that are compared at once

QUERIES, TILE = 64, 32  # rows of queries (at most, unless a token has more), and entries, that are taken at once
NUMBERS = 8192  # of a tile of queries, at most


class Sizes(NamedTuple):
    """Constants of the kernel: a power of two where it says so."""

    WIDTH: Any  # entries there is room for
    CANDIDATES: Any  # entries that may be merged when all that room is taken: all but the newest
    BLOCK: Any
    FAST: Any  # what is left, after a block, of the attention an entry has had
    SLOW: Any  # and of the statistics of queries and outputs
    HEADS: Any  # query heads of a key head
    MANY: Any  # HEADS, a power of two, times TOKENS 16 or more
    TOKENS: Any  # taken at once, a power of two
    TILE: Any  # entries taken at once, a power of two
    ALL: Any  # CANDIDATES, a power of two


@triton.jit
def add_to(pointer, place, there, x):
    """Add to numbers of which several threads may hold the same."""
    old = tl.load(pointer + place, mask=there, other=0.0)
    tl.debug_barrier()  # all threads have read what is stored now
    tl.store(pointer + place, old + x, mask=there)


@triton.jit
def fold(mean, sums, place, there, RATE: tl.constexpr, BLOCK: tl.constexpr):
    """Take the sums over a block into running means, and empty them."""
    old = tl.load(mean + place, mask=there, other=0.0)
    new = tl.load(sums + place, mask=there, other=0.0)
    tl.debug_barrier()
    tl.store(mean + place, old * RATE + new * ((1 - RATE) / BLOCK), mask=there)
    tl.store(sums + place, tl.zeros_like(new), mask=there)


@triton.jit
def load_keys(memory, z, index, there):
    return load_rows(memory.key, start_of(memory.key, 0, z), index, there)


@triton.jit
def load_values(memory, z, index, there):
    return load_rows(memory.value, start_of(memory.value, 0, z), index, there)


@triton.jit
def log_weights(memory, z, index, there, size):
    """Where the b of entries lie for each query head [entries, LEAST or more], and which of them there are."""
    head = tl.arange(0, size.MANY if size.MANY > LEAST else LEAST)
    place = (z * size.WIDTH + index)[:, None] * size.HEADS + head[None, :]
    return memory.log_weight + place, there[:, None] & (head < size.HEADS)[None, :]


@triton.jit
def insert(key, value, memory, b, h, z, done, stored, take, size):
    """Write tokens behind the stored entries."""
    token = tl.arange(0, size.TOKENS)
    there = token < take
    keys = load_rows(key, start_of(key, b, h), done + token, there)
    values = load_rows(value, start_of(value, b, h), done + token, there)
    store_rows(memory.key, start_of(memory.key, 0, z), stored + token, there, keys)
    store_rows(memory.value, start_of(memory.value, 0, z), stored + token, there, values)
    place = z * size.WIDTH + stored + token
    zero = tl.zeros([size.TOKENS], tl.float32)
    tl.store(memory.attention + place, zero, mask=there)
    tl.store(memory.age + place, zero, mask=there)
    tl.store(memory.block_attention + place, zero, mask=there)
    places, wanted = log_weights(memory, z, stored + token, there, size)
    tl.store(places, tl.zeros(places.shape, tl.float32), mask=wanted)


@triton.jit
def logits_of(q, memory, z, index, last, end, size):
    """q.k + b [rows, entries]; -inf for what a query does not see."""
    head = tl.arange(0, size.MANY * size.TOKENS) // size.TOKENS
    place = (z * size.WIDTH + index)[None, :] * size.HEADS + head[:, None]
    there = index < end
    b = tl.load(memory.log_weight + place, mask=there[None, :] & (head < size.HEADS)[:, None], other=0.0)
    logits = product(q, tl.trans(load_keys(memory, z, index, there)), tl.float32) + b
    return tl.where(there[None, :] & (index[None, :] <= last[:, None]), logits, float("-inf"))


@triton.jit
def read(query, memory, out, log_p, b, h, z, done, stored, take, count, size):
    """Read with the queries of tokens just written, each what came before it, and sum up what the statistics need."""
    row = tl.arange(0, size.MANY * size.TOKENS)  # query head by query head
    head, token = row // size.TOKENS, row % size.TOKENS
    real = (head < size.HEADS) & (token < take)
    start = query.data + b * query.batch + (h * size.HEADS + head) * query.head
    q = load_rows(query, start[:, None], done + token, real).to(tl.float32)
    last, end = stored + token, stored + take
    best = tl.full([size.MANY * size.TOKENS], float("-inf"), tl.float32)
    total = tl.zeros([size.MANY * size.TOKENS], tl.float32)
    for first in range(0, end, size.TILE):
        logits = logits_of(q, memory, z, first + tl.arange(0, size.TILE), last, end, size)
        high = tl.maximum(best, tl.max(logits, 1))
        total = total * tl.exp(best - high) + tl.sum(tl.exp(logits - high[:, None]), 1)
        best = high
    log = best + tl.log(total)
    tl.store(log_p + (z * size.HEADS + head) * count + done + token, log, mask=real)

    o = tl.zeros([size.MANY * size.TOKENS, memory.value.PADDED], tl.float32)
    for first in range(0, end, size.TILE):
        index = first + tl.arange(0, size.TILE)
        logits = logits_of(q, memory, z, index, last, end, size)
        shares = tl.where(real[:, None], tl.exp(logits - log[:, None]), 0.0)
        o += product(shares, load_values(memory, z, index, index < end), tl.float32)
        add_to(memory.block_attention, z * size.WIDTH + index, index < end, tl.sum(shares, 0) / size.HEADS)
    start = out.data + b * out.batch + (h * size.HEADS + head) * out.head
    store_rows(out, start[:, None], done + token, real, o)

    column = tl.arange(0, query.PADDED)
    head = tl.arange(0, size.MANY)
    there = column < query.DIM
    sums = tl.sum(tl.reshape(q, (size.MANY, size.TOKENS, query.PADDED)), 1)
    place = (z * size.HEADS + head)[:, None] * query.DIM + column[None, :]
    add_to(memory.block_query, place, (head < size.HEADS)[:, None] & there[None, :], sums)
    add_to(memory.block_square, z * query.DIM + column, there, tl.sum(q * q, 0) / size.HEADS)
    column = tl.arange(0, out.PADDED)
    add_to(memory.block_output, z * out.DIM + column, column < out.DIM, tl.sum(o, 0) / size.HEADS)


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
    column, head = tl.arange(0, memory.key.PADDED), tl.arange(0, size.MANY)
    there = column < memory.key.DIM
    place = (z * size.HEADS + head)[:, None] * memory.key.DIM + column[None, :]
    wanted = (head < size.HEADS)[:, None] & there[None, :]
    fold(memory.query, memory.block_query, place, wanted, size.SLOW, size.BLOCK)
    fold(memory.square, memory.block_square, z * memory.key.DIM + column, there, size.SLOW, size.BLOCK)
    column = tl.arange(0, memory.value.PADDED)
    there = column < memory.value.DIM
    fold(memory.output, memory.block_output, z * memory.value.DIM + column, there, size.SLOW, size.BLOCK)


@triton.jit
def load_part(x, z, index, there, column):
    """Some columns of the rows of entries."""
    place = start_of(x, 0, z) + index.to(tl.int64)[:, None] * x.row + column[None, :]
    return tl.load(place, mask=there[:, None] & (column < x.DIM)[None, :], other=0.0)


@triton.jit
def masses(memory, z, index, there, size):
    """The attention that entries have had of late."""
    place = z * size.WIDTH + index
    age = tl.load(memory.age + place, mask=there, other=1.0)
    return tl.load(memory.attention + place, mask=there, other=0.0) / age + LEAST_MASS


@triton.jit
def metric_of(memory, z, weight, column):
    """The queries' second moments, the same for the two axes of a rotary plane."""
    there = column < memory.key.DIM
    square = tl.load(memory.square + z * memory.key.DIM + column, mask=there, other=0.0)
    if memory.key.DIM % 2 == 0:
        twin = (column + memory.key.DIM // 2) % memory.key.DIM
        square = 0.5 * (square + tl.load(memory.square + z * memory.key.DIM + twin, mask=there, other=0.0))
    return square / weight


@triton.jit
def costs(memory, z, mine, there, other, other_there, weight, size):
    """What joining entries costs [mine, other]."""
    turn = tl.zeros([mine.shape[0], other.shape[0]], tl.float32)
    for start in range(0, memory.key.DIM, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        metric = metric_of(memory, z, weight, column)[None, :]
        x, y = load_part(memory.key, z, mine, there, column), load_part(memory.key, z, other, other_there, column)
        turn += tl.sum(x * x * metric, 1)[:, None] + tl.sum(y * y * metric, 1)[None, :]
        turn -= 2 * product(x * metric, tl.trans(y), tl.float32)
    alike = tl.zeros([mine.shape[0], other.shape[0]], tl.float32)
    off = tl.zeros([mine.shape[0]], tl.float32)
    other_off = tl.zeros([other.shape[0]], tl.float32)
    for start in range(0, memory.value.DIM, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        place = memory.output + z * memory.value.DIM + column
        centre = (tl.load(place, mask=column < memory.value.DIM, other=0.0) / weight)[None, :]
        x = load_part(memory.value, z, mine, there, column) - centre
        y = load_part(memory.value, z, other, other_there, column) - centre
        off += tl.sum(x * x, 1)
        other_off += tl.sum(y * y, 1)
        alike += product(x, tl.trans(y), tl.float32)
    mass, other_mass = masses(memory, z, mine, there, size)[:, None], masses(memory, z, other, other_there, size)[None, :]
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
    drive = tl.load(places, mask=wanted, other=0.0)
    for start in range(0, memory.key.DIM, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mean = load_means(memory, z, weight, column, size)
        drive += product(load_part(memory.key, z, index, there, column), tl.trans(mean), tl.float32)
    return drive


@triton.jit
def load_means(memory, z, weight, column, size):
    """Some columns of the mean query u of each query head [query heads, columns]."""
    head = tl.arange(0, size.MANY if size.MANY > LEAST else LEAST)
    place = (z * size.HEADS + head)[:, None] * memory.key.DIM + column[None, :]
    wanted = (head < size.HEADS)[:, None] & (column < memory.key.DIM)[None, :]
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
    best = tl.full([size.MANY if size.MANY > LEAST else LEAST], float("-inf"), tl.float32)
    total = tl.zeros([size.MANY if size.MANY > LEAST else LEAST], tl.float32)
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
    head, column = tl.arange(0, mean.shape[0]), tl.arange(0, memory.key.PADDED)
    place = (z * size.WIDTH + index).to(tl.int64)
    key = tl.load(memory.key.data + place * memory.key.DIM + column, mask=column < memory.key.DIM, other=0.0)
    b = tl.load(memory.log_weight + place * size.HEADS + head, mask=head < size.HEADS, other=0.0)
    column = tl.arange(0, memory.value.PADDED)
    value = tl.load(memory.value.data + place * memory.value.DIM + column, mask=column < memory.value.DIM, other=0.0)
    drive = b + tl.sum(mean * key[None, :], 1)
    return key, value, drive, tl.load(memory.attention + place), tl.load(memory.age + place)


@triton.jit
def join(memory, z, gone, into, mean, mass, size):
    """Let one entry join another; where several join the same one, they do so one after the other."""
    key, value, drive, attention, age = load_entry(memory, z, gone, mean, size)
    host_key, host_value, host_drive, host_attention, host_age = load_entry(memory, z, into, mean, size)
    head, column = tl.arange(0, mean.shape[0]), tl.arange(0, memory.key.PADDED)
    # the heads share keys and values: an entry's part in theirs is the mean of its part in each head's mass
    part = tl.where(head < size.HEADS, drive - mass, float("-inf"))
    host_part = tl.where(head < size.HEADS, host_drive - mass, float("-inf"))
    high = tl.maximum(tl.max(part, 0), tl.max(host_part, 0))
    part, host_part = tl.sum(tl.exp(part - high), 0), tl.sum(tl.exp(host_part - high), 0)
    share = part / (part + host_part)
    key = host_key + share * (key - host_key)
    value = host_value + share * (value - host_value)
    b = log_sum(drive, host_drive) - tl.sum(mean * key[None, :], 1)
    tl.debug_barrier()  # all threads have read what is stored now
    place = (z * size.WIDTH + into).to(tl.int64)
    tl.store(memory.key.data + place * memory.key.DIM + column, key, mask=column < memory.key.DIM)
    tl.store(memory.log_weight + place * size.HEADS + head, b, mask=head < size.HEADS)
    column = tl.arange(0, memory.value.PADDED)
    tl.store(memory.value.data + place * memory.value.DIM + column, value, mask=column < memory.value.DIM)
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
        keys, values = load_keys(memory, z, source, moved), load_values(memory, z, source, moved)
        attention = tl.load(memory.attention + z * size.WIDTH + source, mask=moved)
        age = tl.load(memory.age + z * size.WIDTH + source, mask=moved)
        places, wanted = log_weights(memory, z, source, moved, size)
        weights = tl.load(places, mask=wanted)
        tl.debug_barrier()  # a tile's sources lie behind all earlier tiles
        store_rows(memory.key, start_of(memory.key, 0, z), index, moved, keys)
        store_rows(memory.value, start_of(memory.value, 0, z), index, moved, values)
        tl.store(memory.attention + z * size.WIDTH + index, attention, mask=moved)
        tl.store(memory.age + z * size.WIDTH + index, age, mask=moved)
        places, wanted = log_weights(memory, z, index, moved, size)
        tl.store(places, weights, mask=wanted)


@triton.jit
def merge(memory, z, weight, size):
    """Let as many entries as a block has join others, and close the gaps; all room is taken before."""
    gone = choose(memory, z, weight, size)
    into, mass = find_hosts(memory, z, gone, weight, size)
    mean = load_means(memory, z, weight, tl.arange(0, memory.key.PADDED), size)
    rank = tl.arange(0, LEAST)
    for number in range(size.BLOCK):
        one = rank == number
        join(memory, z, tl.sum(tl.where(one, gone, 0), 0), tl.sum(tl.where(one, into, 0), 0), mean, mass, size)
    close_gaps(memory, z, gone, size)


@triton.jit
def stream_kernel(query, key, value, memory, out, log_p, lengths, count, heads, size):
    """The tokens of one sequence and key head, in its own blocks."""
    z = tl.program_id(0).to(tl.int64)
    b, h = z // heads, z % heads
    length = count
    if lengths is not None:
        length = tl.load(lengths + b).to(tl.int32)
    stored = tl.load(memory.counts + 3 * z).to(tl.int32)
    written = tl.load(memory.counts + 3 * z + 1).to(tl.int32)
    seen = tl.load(memory.counts + 3 * z + 2)
    weight = tl.load(memory.weight + z)
    done = stored * 0
    while done < length:
        take = tl.minimum(tl.minimum(length - done, size.TOKENS), -written + size.BLOCK)
        insert(key, value, memory, b, h, z, done, stored, take, size)
        tl.debug_barrier()
        read(query, memory, out, log_p, b, h, z, done, stored, take, count, size)
        tl.debug_barrier()
        done += take
        stored += take
        written += take
        if written == size.BLOCK:
            end_block(memory, z, size)
            weight = weight * size.SLOW + (1 - size.SLOW)
            written -= size.BLOCK
            tl.debug_barrier()
            if stored == size.WIDTH:
                merge(memory, z, weight, size)
                stored -= size.BLOCK
                tl.debug_barrier()
    tl.debug_barrier()  # all threads have read what is stored now
    tl.store(memory.counts + 3 * z, stored.to(tl.int64))
    tl.store(memory.counts + 3 * z + 1, written.to(tl.int64))
    tl.store(memory.counts + 3 * z + 2, seen + length)
    tl.store(memory.weight + z, weight)


def stream(
    query: Tensor, key: Tensor, value: Tensor, memory: Memory, entries: int, newest: int, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor, Memory]:
    """Read and write N tokens, one block after the other: `ops.streaming.stream`, in one launch; without gradients.

    Arguments, results and their shapes as there; tokens in float32, bfloat16 or float16 and the output in the query's
    dtype, the memory and log p in float32.

    Raises:
        ValueError: a head dim above 256, or a memory with more entries.
    """
    buffers = open_memory(memory, entries)
    on_device = None if lengths is None else lengths.to(key.device)
    out, log_p = stream_in_place(query, key, value, buffers, newest, on_device)
    counts = _counts_after(memory.counts, key.shape[2] if lengths is None else lengths, entries)
    return out, log_p, _close(buffers, counts)


def stream_in_place(
    query: Tensor, key: Tensor, value: Tensor, buffers: Memory, newest: int, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`stream`, which changes the memory where it lies: one token is a step that a CUDA graph can repeat.

    Args:
        query, key, value, newest: as in `ops.streaming.stream`. buffers: of `open_memory`. lengths: on the device.

    Returns:
        The output [B, H, G, N, Dv] in the query's dtype, and log p [B, H, G, N] in float32; 0 and -inf for padding.

    Raises:
        ValueError: a head dim above 256.
    """
    if (widest := max(query.shape[-1], value.shape[-1])) > MOST_DIM:
        raise ValueError(f"head_dim: {widest}; the kernels take at most {MOST_DIM}")
    batch, heads, groups, count, _ = query.shape
    query, key, value = map(dense_rows, (query.flatten(1, 2), key, value))
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    log_p = query.new_full((batch, heads, groups, count), -torch.inf, dtype=torch.float32)
    state = buffers._replace(key=_flat_rows(buffers.key), value=_flat_rows(buffers.value))
    stream_kernel[(batch * heads,)](
        *(*map(rows_of, (query, key, value)), state, rows_of(out), log_p, lengths, count, heads),
        _sizes(buffers.key.shape[2], newest, groups, count, widest),
        num_warps=8,
        num_stages=1,  # what is loaded ahead may have been stored since
    )
    return out.unflatten(1, (heads, groups)), log_p


def open_memory(memory: Memory, entries: int) -> Memory:
    """A copy of a memory on buffers that `stream_in_place` changes, with room for so many entries.

    It is float32; key, value, log_weight, attention, age and block_attention have W = entries; weight [B, H] and counts
    [B, H, 3] are on the device, once for each key head.

    Raises:
        ValueError: a memory with more entries.
    """
    most = int(memory.counts[:, 0].max())
    if most > entries:
        raise ValueError(f"memory: {most} entries; there is room for entries={entries}")
    batch, heads, width, _ = memory.key.shape
    fields = {}
    for name, x in memory._asdict().items():
        x = x.to(memory.key.device, torch.int64 if name == "counts" else torch.float32)
        if name in ENTRIES:
            fields[name] = x.new_zeros(batch, heads, entries, *x.shape[3:])
            fields[name][:, :, :width] = x[:, :, :entries]
        elif name in ("weight", "counts"):
            fields[name] = x[:, None].repeat(1, heads, *[1] * (x.dim() - 1))
        else:
            fields[name] = x.clone(memory_format=torch.contiguous_format)
    return Memory(**fields)


def close_memory(buffers: Memory) -> Memory:
    """What `ops.streaming` goes on from, as a copy; it waits for the device."""
    return _close(Memory(*(x.clone() for x in buffers)), buffers.counts[:, 0].cpu())


def _close(buffers: Memory, counts: Tensor) -> Memory:
    """The buffers' stored entries, with counts on the CPU."""
    width = int(counts[:, 0].max())
    fields = {name: getattr(buffers, name)[:, :, :width] for name in ENTRIES}
    return buffers._replace(**fields, weight=buffers.weight[:, 0], counts=counts)


def _counts_after(counts: Tensor, lengths: Tensor | int, entries: int) -> Tensor:
    """Counts [B, 3] after so many more tokens, known without the device."""
    block = block_of(entries)
    stored, written, seen = counts.unbind(1)
    blocks, rest = (written + lengths) // block, (written + lengths) % block
    whole = torch.minimum(stored - written + block * blocks, torch.full_like(stored, entries - block))
    return torch.stack([whole + rest, rest, seen + lengths], 1)


def _flat_rows(x: Tensor) -> Any:
    """Of contiguous buffers [B, H, W, D], as one batch of B H heads."""
    return rows_of(x.flatten(0, 1)[None])


@cache
def _sizes(entries: int, newest: int, groups: int, count: int, widest: int) -> Sizes:
    block = block_of(entries)
    many = power_of_2(groups, least=1)
    tokens = 1 if count == 1 else max(min(block, min(QUERIES, NUMBERS // power_of_2(widest)) // many), 1)
    candidates = entries - max(newest - block, 0)
    fast, slow = (1 - FORGETTING / entries) ** block, QUERY_DECAY**block
    many = max(many, LEAST.value // tokens)
    return Sizes(
        *map(tl.constexpr, (entries, candidates, block, fast, slow, groups, many, tokens, TILE, power_of_2(candidates)))
    )
