"""Triton: near + far attention, forward, given what was chosen (`ops.near_far.attend`).

    write    log z_j and s_j / z_j of a cluster of keys, for a block of tiles
    read     one softmax for each query of a tile over [what its tile reads exactly ; the neurons]

`read` is flash attention of a tile of queries over gathered rows: a key that some sub-tile of the tile reads exactly is
read by the others through its cluster, so all queries of the tile share its rows. Choosing, and the gradients, are
plain PyTorch.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from astroattn.ops import near_far, plain
from astroattn.ops.clustering import weighted_means
from astroattn.ops.kernels.features import LOWEST, load_rows, narrow, operand, product, widen
from astroattn.ops.kernels.rows import power_of_2
from astroattn.ops.layout import SUBTILE, Budget, Layout
from astroattn.ops.near_far import Choice

LIKE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Blocks(NamedTuple):
    """Sizes of the blocks of `read`: queries (at most), rows (exact keys, or neurons), warps, stages of loads."""

    queries: int
    rows: int
    warps: int
    stages: int


# By bytes of a product's operand and padded head dim; a table, not autotuning, as in `kernels.static`.
TABLE = {
    (2, 64): Blocks(64, 32, 4, 2),
    (2, 128): Blocks(64, 32, 8, 2),
    (2, 256): Blocks(32, 32, 8, 1),
    (4, 64): Blocks(32, 32, 8, 2),
    (4, 128): Blocks(32, 16, 8, 1),
    (4, 256): Blocks(16, 16, 8, 1),
}
TILES = 64  # whose sums one program of `write` makes, at most


def near_far_forward(
    query: Tensor, key: Tensor, value: Tensor, bias: None, lengths: Tensor | None, budget: Budget, scale: float
) -> tuple[Tensor, ...]:
    """As `plain.near_far_forward`, on tensors [B, H, N, D] of one dtype: float32, bfloat16, float16; without a bias."""
    attend_ = partial(attend, dtype=query.dtype)
    return plain.near_far_forward(query, key, value, bias, lengths, budget, scale, attend=attend_)


def near_far_backward(
    d_out: Tensor,
    d_log_p: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: None,
    out: Tensor,
    log_p: Tensor,
    *chosen: Any,
) -> tuple[Tensor, ...]:
    """As `plain.near_far_backward`, with the arguments of `native.near_far.near_far_backward`."""
    return plain.near_far_backward(d_out, d_log_p, query, key, value, bias, *chosen)


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, choice: Choice, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`near_far.attend`.

    Args:
        query, key, value: [Z, N, D], float32. dtype: what the keys and values were given in; products are of that.
    """
    prefix, m = layout.prefix, layout.num_hidden
    order, winners, keys = (x.long() for x in (choice.order, choice.winners, choice.keys))
    body_key = key[:, prefix:]
    (size, tokens, dim), dv, body = key.shape, value.shape[-1], body_key.shape[1]
    reading = near_far.read_tiles(query, key, order, layout, None)
    tiles, subtiles = reading.token.shape[1], layout.subtiles()
    union = near_far.find_union(keys, tiles, subtiles, body)

    # What a tile reads exactly: the prefix, all of it by every query, and the union.
    head = torch.arange(prefix, device=key.device).expand(size, tiles, -1)
    index = torch.cat([head, (union.keys + prefix).where(union.there, -1)], -1).int()
    entries = index.shape[-1]
    taken = torch.cat([union.taken.new_ones(size, tiles, subtiles, prefix), union.taken], -1)
    bias = reading.logits.gather(2, union.keys).masked_fill(~union.there, -torch.inf)
    bias = torch.cat([reading.prefix_logits, bias], -1)
    rows = key.to(dtype).contiguous(), value.to(dtype).contiguous()
    dims = {"D": dim, "DP": power_of_2(dim), "DV": dv, "DVP": power_of_2(dv)}
    like = LIKE[dtype]
    log_z, mean_value = key.new_empty(size, tiles, m), key.new_empty(size, tiles, m, dv)
    weights, owner = key.new_empty(size, m, dim), torch.empty_like(index)
    top = bias.amax(-1) if entries else key.new_full((size, tiles), -torch.inf)
    if m:
        weights = weighted_means(body_key, choice.mass.to(key.dtype), winners, m)[1]
        owner = torch.cat(
            [torch.zeros_like(head), winners[:, None].expand(-1, tiles, -1).gather(2, union.keys)], -1
        ).int()
        logits = reading.logits.masked_fill(~union.left, -torch.inf)
        ordered, begins = _by_cluster(winners, m)
        block = power_of_2(tiles, most=TILES)
        write_kernel[(size * m * -(-tiles // block),)](
            *(logits, rows[1], ordered, begins, log_z, mean_value, tokens, prefix, tiles, m),
            **dims, T=block, K=32, LIKE=like,
        )  # fmt: skip
        top = torch.maximum(top, log_z.amax(-1))
    top = top.clamp(min=torch.finfo(top.dtype).min)
    bias -= top[..., None]
    log_z -= top[..., None]

    out, log_p = key.new_empty(size, tokens, dv), key.new_empty(size, tokens)
    if prefix:
        out[:, :prefix], log_p[:, :prefix] = near_far.exact_rows(query[:, :prefix], key, value)
    sizes = TABLE[dtype.itemsize, power_of_2(max(dim, dv), least=64)]
    slots = power_of_2(layout.tile, most=sizes.queries)
    blocks = -(-layout.tile // slots)
    read_kernel[(size * tiles * blocks,)](
        *(query.contiguous(), *rows, order.int(), reading.mean, index, taken.to(torch.uint8), owner, bias.contiguous()),
        *(weights, log_z.contiguous(), mean_value, top, out, log_p),
        *(tokens, prefix, tiles, layout.tile, blocks, entries, m),
        **dims, Q=slots, E=sizes.rows, SUB=SUBTILE, LIKE=like, num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip
    return out, log_p


def _by_cluster(winners: Tensor, num_hidden: int) -> tuple[Tensor, Tensor]:
    """The keys in the order of their clusters [Z, n], and where each cluster begins, and the last ends [Z, m + 1]."""
    ordered, place = winners.sort(dim=1, stable=True)
    numbers = torch.arange(num_hidden + 1, device=winners.device).expand(len(winners), -1).contiguous()
    return place.int(), torch.searchsorted(ordered, numbers).int()


@triton.jit(do_not_specialize=["tokens", "prefix", "tiles", "num_hidden"])
def write_kernel(
    logits, value, ordered, begins, log_z, mean_value, tokens, prefix, tiles, num_hidden,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    T: tl.constexpr, K: tl.constexpr, LIKE: tl.constexpr,
):  # fmt: skip
    """Of one cluster j and a block of tiles: log z_j, s_j / z_j, from the logits u.k [Z, T, n] (-inf: not read)."""
    blocks = tl.cdiv(tiles, T)
    pid = tl.program_id(0)
    z = (pid // (blocks * num_hidden)).to(tl.int64)
    cluster = pid // blocks % num_hidden
    rows = pid % blocks * T + tl.arange(0, T)
    some = rows < tiles
    body = tokens - prefix
    first = tl.load(begins + z * (num_hidden + 1) + cluster)
    last = tl.load(begins + z * (num_hidden + 1) + cluster + 1)
    values = value + (z * tokens + prefix) * DV
    of_tile = logits + (z * tiles + rows[:, None].to(tl.int64)) * body
    total = tl.zeros([T], tl.float32)
    sums = tl.zeros([T, DVP], tl.float32)
    top = tl.full([T], LOWEST, tl.float32)
    for start in range(first, last, K):
        place = start + tl.arange(0, K)
        real = place < last
        key = tl.load(ordered + z * body + place, mask=real, other=0)
        score = tl.load(of_tile + key[None, :], mask=some[:, None] & real[None, :], other=float("-inf"))
        best = tl.maximum(top, tl.max(score, 1))
        p = tl.exp(score - best[:, None])
        fade = tl.exp(top - best)
        v = load_rows(values, DV, tl.where(real, key, body), body, DV, DVP)
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
