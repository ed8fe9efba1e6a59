"""The kernels of `kernels.near_far`, backward: of reading, the sums over the tiles that read a key, and of writing.

With delta = d_out.o - d_log_p, each term of a query's softmax has d score = p (d_out.v - delta). Nobody adds to what
another program has stored: what a tile gives to a key that it reads exactly lies in a row of its own, and the rows of a
key are summed in the order of the tiles. So equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from astroattn.ops.kernels.features import load_rows, narrow, operand, product, store_rows, widen
from astroattn.ops.kernels.near_far_forward import cluster_and_tiles, load_means, logits_left


@triton.jit(do_not_specialize=["tokens", "prefix", "tiles", "tile", "blocks", "layers", "entries", "num_hidden"])
def read_backward_kernel(
    query, key, value, order, mean, index, taken, owner, bias, weights, log_z, mean_value, tops,
    out, log_p, d_out, d_log_p, d_rest, d_mean, d_entry_key, d_entry_value, d_bias, d_weights, d_log_z, d_mean_value,
    tokens, prefix, tiles, tile, blocks, layers, entries, num_hidden,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    Q: tl.constexpr, E: tl.constexpr, M: tl.constexpr, HIDDEN: tl.constexpr, SUB: tl.constexpr, LIKE: tl.constexpr,
):  # fmt: skip
    """Of a block of the queries of one tile, and a block of neurons (a layer); see `read_kernel`.

    Each gives d_rest [Z, layers, N, D] of its queries, and d_mean [Z, T, blocks, layers, D], less their sum; what its
    queries read of its neurons, as those or as the cluster of another sub-tile's exact key, gives d_weights, d_log_z
    and d_mean_value [Z, T, blocks, m, ...]. The first layer has what they read exactly: d_entry_key and d_entry_value
    [Z, T, entries, blocks, ...], and d (u.k) in d_bias [Z, T, entries, blocks].
    """
    pid = tl.program_id(0)
    layer = pid % layers
    block = pid // layers % blocks
    row = (pid // layers // blocks).to(tl.int64)  # of Z * T
    z = row // tiles
    body = tokens - prefix
    slot = block * Q + tl.arange(0, Q)
    place = row % tiles * tile + slot
    real = (slot < tile) & (place < body)
    token = tl.load(order + z * body + place, mask=real, other=0) + prefix
    here = tl.where(real, token, tokens)
    columns = tl.arange(0, DP)
    u = tl.load(mean + row * D + columns, mask=columns < D, other=0.0)
    q = load_rows(query + z * tokens * D, D, here, tokens, D, DP)
    rest = narrow(tl.where(real[:, None], q - u[None, :], 0.0), LIKE)
    d_o = load_rows(d_out + z * tokens * DV, DV, here, tokens, DV, DVP)
    o = load_rows(out + z * tokens * DV, DV, here, tokens, DV, DVP)
    delta = tl.sum(d_o.to(tl.float32) * o.to(tl.float32), 1)
    delta -= tl.load(d_log_p + z * tokens + token, mask=real, other=0.0)
    level = tl.load(log_p + z * tokens + token, mask=real, other=float("-inf"))
    # Where nothing was read, nothing has a share.
    level = tl.where(level == float("-inf"), float("inf"), level - tl.load(tops + row))
    neurons = layer * M + tl.arange(0, M)

    d_r = tl.zeros([Q, DP], tl.float32)
    d_u = tl.zeros([DP], tl.float32)
    through = tl.zeros([Q, M], tl.float32)  # d (r.w) of each neuron
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
        if HIDDEN:
            winner = tl.load(owner + at, mask=there, other=0)
            w = narrow(load_rows(weights + z * num_hidden * D, D, winner, num_hidden, D, DP), LIKE)
            score = tl.where(own, score, product(rest, tl.trans(w), LIKE))
        else:
            score = tl.where(own, score, float("-inf"))
        score += tl.load(bias + at, mask=there, other=float("-inf"))[None, :]
        p = tl.exp(score - level[:, None])
        d_score = p * (product(d_o, tl.trans(v), LIKE) - delta[:, None])
        d_own = tl.where(own, d_score, 0.0)
        if layer == 0:
            line = at * blocks + block
            d_v = product(tl.trans(operand(p, LIKE)), widen(d_o), LIKE)
            d_k = product(tl.trans(operand(d_own, LIKE)), widen(rest), LIKE)
            limit = tl.where(there, line + 1, line)  # rows that are there
            store_rows(d_entry_value, DV, line, limit[:, None], d_v, DV, DVP)
            store_rows(d_entry_key, D, line, limit[:, None], d_k, D, DP)
            d_logits = tl.sum(d_score, 0)  # of u.k
            tl.store(d_bias + line, d_logits, mask=there)
            d_u += tl.sum(d_logits[:, None] * k.to(tl.float32), 0)
            d_r += product(operand(d_own, LIKE), widen(k), LIKE)
        if HIDDEN:
            mine = operand(tl.where(winner[:, None] == neurons[None, :], 1.0, 0.0), LIKE)
            through += product(operand(d_score - d_own, LIKE), mine, LIKE)
    if HIDDEN:
        some = neurons < num_hidden
        w = narrow(load_rows(weights + z * num_hidden * D, D, neurons, num_hidden, D, DP), LIKE)
        score = product(rest, tl.trans(w), LIKE)
        score += tl.load(log_z + row * num_hidden + neurons, mask=some, other=float("-inf"))[None, :]
        p = tl.exp(score - level[:, None])
        v = operand(load_rows(mean_value + row * num_hidden * DV, DV, neurons, num_hidden, DV, DVP), LIKE)
        d_score = p * (product(widen(d_o), tl.trans(v), LIKE) - delta[:, None])
        through += d_score
        line = (row * blocks + block) * num_hidden
        d_v = product(tl.trans(operand(p, LIKE)), widen(d_o), LIKE)
        store_rows(d_mean_value + line * DV, DV, neurons, num_hidden, d_v, DV, DVP)
        tl.store(d_log_z + line + neurons, tl.sum(d_score, 0), mask=some)
        d_w = product(tl.trans(operand(through, LIKE)), widen(rest), LIKE)
        store_rows(d_weights + line * D, D, neurons, num_hidden, d_w, D, DP)
        d_r += product(operand(through, LIKE), widen(w), LIKE)
    store_rows(d_rest + (z * layers + layer) * tokens * D, D, here, tokens, d_r, D, DP)
    d_u -= tl.sum(d_r, 0)
    tl.store(d_mean + ((row * blocks + block) * layers + layer) * D + columns, d_u, mask=columns < D)


@triton.jit(do_not_specialize=["tokens", "tiles", "entries", "blocks"])
def sum_kernel(
    mean, d_entry_key, d_entry_value, d_bias, places, begins, d_key, d_value, tokens, tiles, entries, blocks,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """d_key and d_value [Z, N, ...] of a block of keys, from the entries of the tiles that read them exactly.

    places [Z, T * entries] are entries in the order of their keys, begins [Z, N + 1] where those of a key begin.
    """
    length = tiles * entries
    of = tl.cdiv(tokens, K)
    z = (tl.program_id(0) // of).to(tl.int64)
    keys = tl.program_id(0) % of * K + tl.arange(0, K)
    real = keys < tokens
    first = tl.load(begins + z * (tokens + 1) + keys, mask=real, other=0)
    count = tl.load(begins + z * (tokens + 1) + keys + 1, mask=real, other=0) - first
    d_k = tl.zeros([K, DP], tl.float32)
    d_v = tl.zeros([K, DVP], tl.float32)
    for step in range(0, tl.max(count, 0)):
        more = step < count
        entry = tl.load(places + z * length + first + step, mask=more, other=0)
        u = load_means(mean, z, entry // entries, tiles, D, DP)
        for block in range(0, blocks):
            line = (z * length + entry) * blocks + block
            limit = tl.where(more, line + 1, line)[:, None]
            d_k += load_rows(d_entry_key, D, line, limit, D, DP)
            d_k += tl.load(d_bias + line, mask=more, other=0.0)[:, None] * u
            d_v += load_rows(d_entry_value, DV, line, limit, DV, DVP)
    store_rows(d_key + z * tokens * D, D, keys, tokens, d_k, D, DP)
    store_rows(d_value + z * tokens * DV, DV, keys, tokens, d_v, DV, DVP)


@triton.jit
def written(u, k, v, of_tile, place, there, level, d_mean, d_log, LIKE: tl.constexpr):
    """The share c = exp(u.k) / z of keys in what tiles write [T, K], and d (u.k) = c (d_log_z + d_mean_value.(v -
    mean_value)); the part that is the same for a whole cluster is in d_log, [T, 1] as the level log z."""
    score = logits_left(u, k, of_tile, place, there)
    share = tl.where(score > float("-inf"), tl.exp(score - level), 0.0)
    return share, share * (product(d_mean, tl.trans(widen(v)), LIKE) + d_log)


@triton.jit(do_not_specialize=["tokens", "prefix", "tiles", "num_hidden", "words"])
def write_backward_kernel(
    mean, key, value, read, ordered, begins, log_z, tops, d_mean_value, d_log_z, d_key, d_value,
    tokens, prefix, tiles, num_hidden, words,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    M: tl.constexpr, T: tl.constexpr, K: tl.constexpr, LIKE: tl.constexpr,
):  # fmt: skip
    """Of a block of keys of one cluster: d_k = sum_T d (u.k) u and d_v = sum_T c d_mean_value, which it adds up."""
    body = tokens - prefix
    of = tl.cdiv(body, K) + num_hidden
    z = (tl.program_id(0) // of).to(tl.int64)
    block = tl.program_id(0) % of
    numbers = tl.arange(0, M)
    mine = begins + z * (num_hidden + 1) + numbers
    begin = tl.load(mine, mask=numbers < num_hidden, other=0)
    end = tl.load(mine + 1, mask=numbers < num_hidden, other=0)
    blocks_of = (end - begin + K - 1) // K
    behind = tl.cumsum(blocks_of, 0)  # blocks up to the end of each cluster
    cluster = tl.sum((behind <= block).to(tl.int32), 0)
    if cluster < num_hidden:
        here = numbers == cluster
        first = tl.sum(tl.where(here, begin + (block - behind + blocks_of) * K, 0), 0)
        place = first + tl.arange(0, K)
        real = place < tl.sum(tl.where(here, end, 0), 0)
        rows = tl.load(ordered + z * body + place, mask=real, other=body)
        k = load_rows(key + (z * tokens + prefix) * D, D, rows, body, D, DP)
        v = load_rows(value + (z * tokens + prefix) * DV, DV, rows, body, DV, DVP)
        d_k = load_rows(d_key + (z * tokens + prefix) * D, D, rows, body, D, DP)
        d_v = load_rows(d_value + (z * tokens + prefix) * DV, DV, rows, body, DV, DVP)
        for start in range(0, tiles, T):
            tile = start + tl.arange(0, T)
            some = tile < tiles
            row = z * tiles + tile
            state = row * num_hidden + cluster
            level = tl.load(log_z + state, mask=some, other=0.0) + tl.load(tops + row, mask=some, other=0.0)
            d_mean = load_rows(
                d_mean_value + (z * tiles * num_hidden + cluster) * DV, num_hidden * DV, tile, tiles, DV, DVP
            )
            d_mean = operand(d_mean, LIKE)
            d_log = tl.load(d_log_z + state, mask=some, other=0.0)
            u = load_means(mean, z, tile, tiles, D, DP)
            there = some[:, None] & real[None, :]
            share, d_score = written(
                u, k, v, read + row[:, None] * words, place, there, level[:, None], d_mean, d_log[:, None], LIKE
            )
            d_k += product(tl.trans(d_score), u, tl.float32)
            d_v += product(tl.trans(operand(share, LIKE)), d_mean, LIKE)
        store_rows(d_key + (z * tokens + prefix) * D, D, rows, body, d_k, D, DP)
        store_rows(d_value + (z * tokens + prefix) * DV, DV, rows, body, d_v, DV, DVP)


@triton.jit(do_not_specialize=["tokens", "prefix", "tiles", "num_hidden", "words"])
def mean_backward_kernel(
    mean, key, value, read, ordered, begins, log_z, tops, d_mean_value, d_log_z, d_means,
    tokens, prefix, tiles, num_hidden, words,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    T: tl.constexpr, K: tl.constexpr, LIKE: tl.constexpr,
):  # fmt: skip
    """Of one cluster and a block of tiles: d_u = sum_i d (u.k_i) k_i -> d_means [Z, T, m, D]."""
    z, cluster, tile = cluster_and_tiles(tiles, num_hidden, T)
    some = tile < tiles
    row = z * tiles + tile
    state = row * num_hidden + cluster
    body = tokens - prefix
    first = tl.load(begins + z * (num_hidden + 1) + cluster)
    last = tl.load(begins + z * (num_hidden + 1) + cluster + 1)
    level = tl.load(log_z + state, mask=some, other=0.0) + tl.load(tops + row, mask=some, other=0.0)
    d_log = tl.load(d_log_z + state, mask=some, other=0.0)
    d_mean = load_rows(d_mean_value + (z * tiles * num_hidden + cluster) * DV, num_hidden * DV, tile, tiles, DV, DVP)
    d_mean = operand(d_mean, LIKE)
    u = load_means(mean, z, tile, tiles, D, DP)
    d_u = tl.zeros([T, DP], tl.float32)
    for start in range(first, last, K):
        place = start + tl.arange(0, K)
        real = place < last
        rows = tl.load(ordered + z * body + place, mask=real, other=body)
        k = load_rows(key + (z * tokens + prefix) * D, D, rows, body, D, DP)
        v = load_rows(value + (z * tokens + prefix) * DV, DV, rows, body, DV, DVP)
        there = some[:, None] & real[None, :]
        _, d_score = written(
            u, k, v, read + row[:, None] * words, place, there, level[:, None], d_mean, d_log[:, None], LIKE
        )
        d_u += product(d_score, k.to(tl.float32), tl.float32)
    columns = tl.arange(0, DP)
    tl.store(d_means + state[:, None] * D + columns[None, :], d_u, mask=some[:, None] & (columns < D)[None, :])
