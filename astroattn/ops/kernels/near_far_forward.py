"""The kernels of `kernels.near_far`, forward: entry, write and read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from astroattn.ops.kernels.features import LOWEST, load_rows, narrow, operand, product, widen

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def load_means(mean, z, rows, tiles, D: tl.constexpr, DP: tl.constexpr):
    """u of some tiles [rows, DP], of a sequence."""
    return load_rows(mean + z * tiles * D, D, rows, tiles, D, DP)


@triton.jit
def cluster_and_tiles(tiles, num_hidden, T: tl.constexpr):
    """The sequence, the cluster and the block of T tiles that a program is for."""
    blocks = tl.cdiv(tiles, T)
    pid = tl.program_id(0)
    z = (pid // (blocks * num_hidden)).to(tl.int64)
    return z, pid // blocks % num_hidden, pid % blocks * T + tl.arange(0, T)


@triton.jit(do_not_specialize=["tokens", "tiles", "entries"])
def entry_kernel(
    mean, key, index, bias, tokens, tiles, entries, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr
):  # fmt: skip
    """u.k of a block of the keys that a tile reads exactly -> bias [Z, T, entries]; -inf where the index is -1."""
    blocks = tl.cdiv(entries, E)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    entry = tl.program_id(0) % blocks * E + tl.arange(0, E)
    there = entry < entries
    rows = tl.load(index + row * entries + entry, mask=there, other=-1)
    k = load_rows(key + row // tiles * tokens * D, D, tl.where(rows < 0, tokens, rows), tokens, D, DP)
    columns = tl.arange(0, DP)
    u = tl.load(mean + row * D + columns, mask=columns < D, other=0.0)
    score = tl.where(rows < 0, float("-inf"), tl.sum(k.to(tl.float32) * u[None, :], 1))
    tl.store(bias + row * entries + entry, score, mask=there)


@triton.jit
def logits_left(u, k, of_tile, place, there):
    """u.k of tiles and the keys at these places in the order of the clusters [T, K]; -inf where the tile reads it
    exactly, which its bits say (pointers to its words [T, 1])."""
    bits = tl.load(of_tile + place[None, :] // 32, mask=there, other=-1)
    score = product(u, tl.trans(k.to(tl.float32)), tl.float32)
    return tl.where((bits >> (place % 32)[None, :]) & 1 == 0, score, float("-inf"))


@triton.jit(do_not_specialize=["tokens", "prefix", "tiles", "num_hidden", "words"])
def write_kernel(
    mean, key, value, mass, read, ordered, begins, weights, totals, log_z, mean_value,
    tokens, prefix, tiles, num_hidden, words,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    T: tl.constexpr, K: tl.constexpr, LIKE: tl.constexpr,
):  # fmt: skip
    """Of one cluster j and a block of tiles: log z_j, s_j / z_j, without the keys that a tile reads exactly.

    Those have a bit in the order of the clusters: read [Z, T, words]. The first block also has the mean w_j of the keys
    by their mass, and what they weigh together.
    """
    z, cluster, rows = cluster_and_tiles(tiles, num_hidden, T)
    some = rows < tiles
    body = tokens - prefix
    first = tl.load(begins + z * (num_hidden + 1) + cluster)
    last = tl.load(begins + z * (num_hidden + 1) + cluster + 1)
    values = value + (z * tokens + prefix) * DV
    of_tile = read + (z * tiles + rows[:, None].to(tl.int64)) * words
    keys = key + (z * tokens + prefix) * D
    u = load_means(mean, z, rows, tiles, D, DP)
    total = tl.zeros([T], tl.float32)
    sums = tl.zeros([T, DVP], tl.float32)
    top = tl.full([T], LOWEST, tl.float32)
    for start in range(first, last, K):
        place = start + tl.arange(0, K)
        real = place < last
        member = tl.load(ordered + z * body + place, mask=real, other=0)
        k = load_rows(keys, D, tl.where(real, member, body), body, D, DP)
        score = logits_left(u, k, of_tile, place, some[:, None] & real[None, :])
        best = tl.maximum(top, tl.max(score, 1))
        p = tl.exp(score - best[:, None])
        fade = tl.exp(top - best)
        v = load_rows(values, DV, tl.where(real, member, body), body, DV, DVP)
        sums = sums * fade[:, None] + product(operand(p, LIKE), widen(v), LIKE)
        total = total * fade + tl.sum(p, 1)
        top = best
    empty = total == 0
    safe = tl.where(empty, 1.0, total)
    state = (z * tiles + rows) * num_hidden + cluster
    tl.store(log_z + state, tl.where(empty, float("-inf"), tl.log(safe) + top), mask=some)
    columns = tl.arange(0, DVP)
    place = mean_value + state[:, None] * DV + columns[None, :]
    tl.store(place, sums / safe[:, None], mask=some[:, None] & (columns < DV)[None, :])
    if tl.program_id(0) % tl.cdiv(tiles, T) == 0:
        sum_of_keys = tl.zeros([DP], tl.float32)
        whole = tl.zeros([K], tl.float32)
        for begin in range(first, last, K):
            index = begin + tl.arange(0, K)
            inside = index < last
            row = tl.load(ordered + z * body + index, mask=inside, other=0)
            k = load_rows(keys, D, tl.where(inside, row, body), body, D, DP)
            weight = tl.load(mass + z * body + row, mask=inside, other=0.0)
            sum_of_keys += tl.sum(k.to(tl.float32) * weight[:, None], 0)
            whole += weight
        total_mass = tl.sum(whole, 0)
        column = tl.arange(0, DP)
        to = weights + (z * num_hidden + cluster) * D + column
        tl.store(to, sum_of_keys / tl.where(total_mass < TINY, 1.0, total_mass), mask=column < D)
        tl.store(totals + z * num_hidden + cluster, total_mass)


@triton.jit
def add_block(score, v, so_far, LIKE: tl.constexpr):
    """Go on with a softmax: scores [Q, E] and values [E, DVP], after (top, total, sums)."""
    top, total, sums = so_far
    best = tl.maximum(top, tl.max(score, 1))
    p = tl.exp(score - best[:, None])
    fade = tl.exp(top - best)
    return best, total * fade + tl.sum(p, 1), sums * fade[:, None] + product(operand(p, LIKE), v, LIKE)


@triton.jit(do_not_specialize=["tokens", "prefix", "tiles", "tile", "blocks", "entries", "num_hidden"])
def read_kernel(
    query, key, value, order, mean, index, taken, owner, bias, weights, log_z, mean_value, tops, out, log_p,
    tokens, prefix, tiles, tile, blocks, entries, num_hidden,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    Q: tl.constexpr, E: tl.constexpr, SUB: tl.constexpr, LIKE: tl.constexpr,
):  # fmt: skip
    """Outputs and log p of a block of the queries of one tile; biases and log z are measured from the tile's top."""
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)  # of Z * T
    z = row // tiles
    body = tokens - prefix
    slot = pid % blocks * Q + tl.arange(0, Q)
    place = row % tiles * tile + slot
    real = (slot < tile) & (place < body)
    token = tl.load(order + z * body + place, mask=real, other=0) + prefix
    here = tl.where(real, token, tokens)
    columns = tl.arange(0, DP)
    u = tl.load(mean + row * D + columns, mask=columns < D, other=0.0)
    q = load_rows(query + z * tokens * D, D, here, tokens, D, DP)
    rest = narrow(tl.where(real[:, None], q - u[None, :], 0.0), LIKE)
    layer = weights + z * num_hidden * D

    so_far = (tl.full([Q], LOWEST, tl.float32), tl.zeros([Q], tl.float32), tl.zeros([Q, DVP], tl.float32))
    for start in range(0, entries, E):
        entry = start + tl.arange(0, E)
        there = entry < entries
        at = row * entries + entry
        rows = tl.load(index + at, mask=there, other=-1)
        rows = tl.where(rows < 0, tokens, rows)
        k = load_rows(key + z * tokens * D, D, rows, tokens, D, DP)
        v = load_rows(value + z * tokens * DV, DV, rows, tokens, DV, DVP)
        score = product(rest, tl.trans(k), LIKE)
        of_slot = (row * (tile // SUB) + slot // SUB)[:, None] * entries + entry[None, :]
        own = tl.load(taken + of_slot, mask=real[:, None] & there[None, :], other=0) != 0
        if num_hidden > 0:
            neurons = tl.load(owner + at, mask=there, other=0)
            w = narrow(load_rows(layer, D, neurons, num_hidden, D, DP), LIKE)
            score = tl.where(own, score, product(rest, tl.trans(w), LIKE))
        else:
            score = tl.where(own, score, float("-inf"))
        score += tl.load(bias + at, mask=there, other=float("-inf"))[None, :]
        so_far = add_block(score, widen(v), so_far, LIKE)
    for start in range(0, num_hidden, E):
        neurons = start + tl.arange(0, E)
        some = neurons < num_hidden
        w = narrow(load_rows(layer, D, neurons, num_hidden, D, DP), LIKE)
        score = product(rest, tl.trans(w), LIKE)
        score += tl.load(log_z + row * num_hidden + neurons, mask=some, other=float("-inf"))[None, :]
        v = load_rows(mean_value + row * num_hidden * DV, DV, neurons, num_hidden, DV, DVP)
        so_far = add_block(score, operand(v, LIKE), so_far, LIKE)
    top, total, sums = so_far
    empty = total == 0
    safe = tl.where(empty, 1.0, total)
    columns = tl.arange(0, DVP)
    outs = out + (z * tokens + token[:, None]) * DV + columns[None, :]
    tl.store(outs, sums / safe[:, None], mask=real[:, None] & (columns < DV)[None, :])
    found = tl.log(safe) + top + tl.load(tops + row)
    tl.store(log_p + z * tokens + token, tl.where(empty, float("-inf"), found), mask=real)
