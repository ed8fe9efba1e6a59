"""Triton: the streaming memory (`ops.streaming` has the formulas), in place on buffers of fixed size: one launch.

One program goes through the tokens of one sequence and key head: it writes up to a block of them, reads with their
query heads, and at the end of a block takes the statistics in and merges. Programs share nothing, counts and schedule
included, so each sequence is in its own block, and nothing asks the GPU and waits: a CUDA graph can repeat a step. Sums
have a fixed order. There are no gradients here: those are `ops.streaming`'s.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from astroattn.ops.backends import MOST_DIM
from astroattn.ops.kernels.causal_forward import start_of
from astroattn.ops.kernels.features import product
from astroattn.ops.kernels.launching import Launches
from astroattn.ops.kernels.rows import load_rows, power_of_2, rows_of, store_rows
from astroattn.ops.kernels.streaming_merge import (
    LEAST,
    Sizes,
    capped,
    end_block,
    load_keys,
    load_values,
    log_weights,
    merge,
    store_entries,
)
from astroattn.ops.rows import dense_rows
from astroattn.ops.streaming import ENTRIES, FORGETTING, QUERY_DECAY, Memory, block_of

# What is taken at once: rows of queries (at most, unless a token has more), entries, columns that are multiplied, and
# numbers of a tile (at most). Larger ones spill registers (`python -m tests.gpu_compile streaming`).
QUERIES, TILE, COLUMNS, NUMBERS = 64, 32, 32, 4096


@triton.jit
def add_to(pointer, place, there, x):
    """Add to numbers of which several threads may hold the same."""
    old = tl.load(pointer + place, mask=there, other=0.0)
    tl.debug_barrier()  # all threads have read what is stored now
    tl.store(pointer + place, old + x, mask=there)


@triton.jit
def insert(key, value, memory, b, h, z, done, stored, take, size):
    """Write tokens behind the stored entries."""
    token = tl.arange(0, size.TOKENS)
    there = token < take
    keys = load_rows(key, start_of(key, b, h), done + token, there)
    values = load_rows(value, start_of(value, b, h), done + token, there)
    store_entries(memory, z, stored + token, there, keys, values, size)
    place = z * size.WIDTH + stored + token
    zero = tl.zeros([size.TOKENS], tl.float32)
    tl.store(memory.attention + place, zero, mask=there)
    tl.store(memory.age + place, zero, mask=there)
    tl.store(memory.block_attention + place, zero, mask=there)
    places, wanted = log_weights(memory, z, stored + token, there, size)
    tl.store(places, tl.zeros(places.shape, tl.float32), mask=wanted)


@triton.jit
def logits_of(query, start, token, real, memory, z, index, last, end, size):
    """q.k + b [rows of queries, entries]; -inf for what a query does not see."""
    head = tl.arange(0, size.MANY * size.TOKENS) // size.TOKENS
    place = (z * size.WIDTH + index)[None, :] * size.HEADS + head[:, None]
    there = index < end
    logits = tl.zeros(place.shape, tl.float32)
    for first in range(0, query.DIM, size.COLUMNS):
        column = first + tl.arange(0, size.COLUMNS)
        at = start + token.to(tl.int64)[:, None] * query.row + column[None, :]
        q = tl.load(at, mask=real[:, None] & (column < query.DIM)[None, :], other=0.0).to(tl.float32)
        logits += product(q, tl.trans(load_keys(memory, z, index, there, column, size)), tl.float32)
    b = tl.load(memory.log_weight + place, mask=there[None, :] & (head < size.HEADS)[:, None], other=0.0)
    return tl.where(there[None, :] & (index[None, :] <= last[:, None]), capped(logits, size) + b, float("-inf"))


@triton.jit
def read(query, memory, out, log_p, b, h, z, done, stored, take, count, size):
    """Read with the queries of tokens just written, each what came before it, and sum up what the statistics need."""
    row = tl.arange(0, size.MANY * size.TOKENS)  # query head by query head
    head, token = row // size.TOKENS, row % size.TOKENS
    real = (head < size.HEADS) & (token < take)
    start = (query.data + b * query.batch + (h * size.HEADS + head) * query.head)[:, None]
    last, end = stored + token, stored + take
    best = tl.full([size.MANY * size.TOKENS], float("-inf"), tl.float32)
    total = tl.zeros([size.MANY * size.TOKENS], tl.float32)
    for first in range(0, end, size.TILE):
        logits = logits_of(
            query, start, done + token, real, memory, z, first + tl.arange(0, size.TILE), last, end, size
        )
        high = tl.maximum(best, tl.max(logits, 1))
        total = total * tl.exp(best - high) + tl.sum(tl.exp(logits - high[:, None]), 1)
        best = high
    log = best + tl.log(total)
    tl.store(log_p + (z * size.HEADS + head) * count + done + token, log, mask=real)

    o = tl.zeros([size.MANY * size.TOKENS, size.VALUE_PADDED], tl.float32)
    for first in range(0, end, size.TILE):
        index = first + tl.arange(0, size.TILE)
        logits = logits_of(query, start, done + token, real, memory, z, index, last, end, size)
        shares = tl.where(real[:, None], tl.exp(logits - log[:, None]), 0.0)
        values = load_values(memory, z, index, index < end, tl.arange(0, size.VALUE_PADDED), size)
        o += product(shares, values, tl.float32)
        add_to(memory.block_attention, z * size.WIDTH + index, index < end, tl.sum(shares, 0) / size.HEADS)
    to = out.data + b * out.batch + (h * size.HEADS + head) * out.head
    store_rows(out, to[:, None], done + token, real, o)

    q = load_rows(query, start, done + token, real).to(tl.float32)
    column = tl.arange(0, query.PADDED)
    head = tl.arange(0, size.MANY)
    there = column < query.DIM
    sums = tl.sum(tl.reshape(q, (size.MANY, size.TOKENS, query.PADDED)), 1)
    place = (z * size.HEADS + head)[:, None] * query.DIM + column[None, :]
    add_to(memory.block_query, place, (head < size.HEADS)[:, None] & there[None, :], sums)
    add_to(memory.block_square, z * query.DIM + column, there, tl.sum(q * q, 0) / size.HEADS)
    column = tl.arange(0, out.PADDED)
    add_to(memory.block_output, z * out.DIM + column, column < out.DIM, tl.sum(o, 0) / size.HEADS)


@triton.jit(do_not_specialize=["count"])
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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: Memory,
    entries: int,
    newest: int,
    lengths: Tensor | None = None,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor, Memory]:
    """Read and write N tokens, one block after the other: `ops.streaming.stream`, in one launch; without gradients.

    Arguments, results and their shapes as there; tokens in float32, bfloat16 or float16 and the output in the query's
    dtype, the memory and log p in float32.

    Raises:
        ValueError: a head dim above 256, a memory with more entries, or gradients are wanted.
    """
    buffers = open_memory(memory, entries)
    on_device = None if lengths is None else lengths.to(key.device)
    out, log_p = stream_in_place(query, key, value, buffers, newest, on_device, soft_cap)
    counts = _counts_after(memory.counts, key.shape[2] if lengths is None else lengths, entries)
    return out, log_p, _close(buffers, counts)


def stream_in_place(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    buffers: Memory,
    newest: int,
    lengths: Tensor | None = None,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`stream`, which changes the memory where it lies: one token is a step that a CUDA graph can repeat.

    Args:
        query, key, value, newest, soft_cap: as in `ops.streaming.stream`. buffers: of `open_memory`. lengths: on the
            device.

    Returns:
        The output [B, H, G, N, Dv] in the query's dtype, and log p [B, H, G, N] in float32; 0 and -inf for padding.

    Raises:
        ValueError: a head dim above 256, or gradients are wanted.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, *buffers)):
        raise ValueError("query, key, value or memory: one needs gradients, which only backend='torch' has here")
    if (widest := max(query.shape[-1], value.shape[-1])) > MOST_DIM:
        raise ValueError(f"head_dim: {widest}; the kernels take at most {MOST_DIM}")
    launch = Launches(stream_in_place, query, key, value, buffers, newest, lengths, soft_cap)
    batch, heads, groups, count, _ = query.shape
    query, key, value = map(dense_rows, (query.flatten(1, 2), key, value))
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    log_p = query.new_empty(batch, heads, groups, count, dtype=torch.float32)
    if lengths is not None:
        out.zero_()
        log_p.fill_(-torch.inf)
    sizes = _sizes(buffers.key.shape[2], newest, groups, count, query.shape[-1], value.shape[-1], soft_cap or 0.0)
    arguments = (*map(rows_of, (query, key, value)), buffers, rows_of(out), log_p, lengths, count, heads, sizes)
    launch(stream_kernel, batch * heads, arguments, {"num_warps": 8, "num_stages": 1})  # more would load old numbers
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


@cache
def _sizes(entries: int, newest: int, groups: int, count: int, dim: int, dv: int, soft_cap: float) -> Sizes:
    block, widest = block_of(entries), power_of_2(max(dim, dv))
    many, candidates = power_of_2(groups, least=1), entries - max(newest - block, 0)
    tokens = 1 if count == 1 else max(min(block, min(QUERIES, NUMBERS // widest) // many), 1)
    sizes = Sizes(
        WIDTH=entries,
        CANDIDATES=candidates,
        BLOCK=block,
        FAST=(1 - FORGETTING / entries) ** block,
        SLOW=QUERY_DECAY**block,
        DIM=dim,
        PADDED=power_of_2(dim),
        VALUE_DIM=dv,
        VALUE_PADDED=power_of_2(dv),
        HEADS=groups,
        MANY=max(many, LEAST.value // tokens),
        MEANS=max(many, LEAST.value),
        TOKENS=tokens,
        TILE=min(TILE, NUMBERS // widest),
        COLUMNS=min(COLUMNS, widest),
        ALL=power_of_2(candidates),
        CAP=soft_cap,
    )
    return Sizes(*map(tl.constexpr, sizes))
