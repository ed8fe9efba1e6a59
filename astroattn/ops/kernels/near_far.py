"""Triton: near + far attention given what was chosen (`ops.near_far.attend`), forward and backward.

    write    log z_j and s_j / z_j of a cluster of keys, for a block of tiles
    read     one softmax for each query of a tile over [what its tile reads exactly ; the neurons]

`read` is flash attention of a tile of queries over gathered rows: a key that some sub-tile of the tile reads exactly is
read by the others through its cluster, so all queries of the tile share its rows. The backward pass writes again, and
differentiates reading, sums over the tiles that read a key exactly, and differentiates writing. What is chosen is up to
`kernels.near_far_choose`.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from astroattn.ops import near_far, plain
from astroattn.ops.choosing import Choice
from astroattn.ops.kernels.device import is_small
from astroattn.ops.kernels.near_far_backward import (
    mean_backward_kernel,
    read_backward_kernel,
    sum_kernel,
    write_backward_kernel,
)
from astroattn.ops.kernels.near_far_choose import choose
from astroattn.ops.kernels.near_far_forward import read_kernel
from astroattn.ops.kernels.near_far_tiles import LIKE, Tiles, dims_of, read_tiles
from astroattn.ops.kernels.rows import power_of_2
from astroattn.ops.layout import SUBTILE, Budget, Layout
from astroattn.ops.precision import without_autocast
from astroattn.ops.rows import dense_rows, empty_rows


class Blocks(NamedTuple):
    """Sizes of blocks: queries or tiles (at most), keys, warps, stages of loads."""

    queries: int
    keys: int
    warps: int
    stages: int


class Results(NamedTuple):
    """What attention has given [Z, N, ...], and the gradients of that."""

    out: Tensor
    log_p: Tensor
    d_out: Tensor
    d_log_p: Tensor


# By bytes of an input and padded head dim; a table, not autotuning, as in `kernels.static`.
FORWARD = {
    (2, 64): Blocks(64, 32, 4, 2),
    (2, 128): Blocks(64, 32, 8, 2),
    (2, 256): Blocks(32, 32, 8, 1),
    (4, 64): Blocks(32, 32, 8, 2),
    (4, 128): Blocks(32, 16, 8, 1),
    (4, 256): Blocks(16, 16, 8, 1),
}
BACKWARD = {
    (2, 64): Blocks(64, 32, 8, 1),
    (2, 128): Blocks(32, 16, 8, 1),
    (2, 256): Blocks(16, 16, 8, 1),
    (4, 64): Blocks(16, 16, 8, 1),
    (4, 128): Blocks(16, 16, 8, 1),
    (4, 256): Blocks(16, 16, 8, 1),
}
# In its place where there is less shared memory than on an H100, and no wgmma: more would spill.
SMALL = {(2, 64): Blocks(32, 32, 8, 1)}
NEURONS = {64: 64, 128: 32, 256: 32}  # that one program differentiates, at most, by padded head dim
# Tiles, keys, warps and stages of `write`, backward, by the same.
WRITTEN = {64: Blocks(32, 32, 8, 2), 128: Blocks(16, 32, 8, 2), 256: Blocks(16, 16, 8, 1)}
SUMMED = 16  # keys in a block of the sums


def near_far_forward(
    query: Tensor, key: Tensor, value: Tensor, bias: None, lengths: Tensor | None, budget: Budget, scale: float
) -> tuple[Tensor, ...]:
    """As `plain.near_far_forward`, on tensors [B, H, N, D] of one dtype: float32, bfloat16, float16; without a bias."""
    attend_ = partial(attend, dtype=query.dtype)
    out, *others = plain.near_far_forward(query, key, value, bias, lengths, budget, scale, choose, attend_)
    return empty_rows(dense_rows(query), value.shape[-1]).copy_(out), *others


def near_far_backward(
    d_out: Tensor,
    d_log_p: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: None,
    out: Tensor,
    log_p: Tensor,
    order: Tensor,
    winners: Tensor,
    mass: Tensor,
    keys: Tensor,
    lengths: Tensor | None,
    budget: Budget,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value, as `plain.near_far_backward`, from what `near_far_forward` returns."""
    dim, dv, dtype = key.shape[3], value.shape[3], query.dtype
    if dtype == torch.float32 and max(dim, dv) > 128:  # three tf32 products of such rows would spill 11 kB a thread
        given_ = (query, key, value, bias, order, winners, mass, keys, lengths, budget, scale)
        return plain.near_far_backward(d_out, d_log_p, *given_)
    with without_autocast(query.device):
        q, k, v = query.flatten(0, 1).float() * scale, key.flatten(0, 1).float(), value.flatten(0, 1).float()
        given = [x.flatten(0, 1) for x in (out, log_p, d_out.to(dtype), d_log_p)]
        chosen = [x.flatten(0, 1) for x in (order, winners, mass, keys)]
        grads = [torch.zeros_like(x) for x in (q, k, v)]
        for group, length in plain.groups_of(lengths, key):
            body = length - budget.prefix
            layout = budget.at(length, dim) if body > 0 else None
            most = length * length
            if layout is not None:
                tiles = layout.tiles(body)
                most = tiles * max(body, (budget.prefix + layout.union(body)) * (dim + dv))
            for rows in group.split(max(1, plain.WORKSPACE // max(most, 1))):
                q_, k_, v_ = (x[rows, :length] for x in (q, k, v))
                results = Results(*(x[rows, :length] for x in given))
                if layout is None:
                    found = exact_rows_backward(q_, k_, v_, results)
                else:
                    sizes = (body,), (body,), (body,), (layout.all_subtiles(body), layout.most_keys(body))
                    choice = Choice._make(x[rows, *map(slice, size)] for x, size in zip(chosen, sizes, strict=True))
                    found = attend_backward(q_, k_, v_, layout, choice, results, dtype=dtype)
                for grad, one in zip(grads, found, strict=True):
                    grad[rows, :length] = one
        grads[0] *= scale
        d_query, d_key, d_value = (x.to(dtype).unflatten(0, query.shape[:2]) for x in grads)
    return d_query, d_key, d_value


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, choice: Choice, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`near_far.attend`.

    Args:
        query, key, value: [Z, N, D], float32. dtype: what the keys and values were given in; products are of that.
    """
    prefix = layout.prefix
    (size, tokens, dim), dv = key.shape, value.shape[-1]
    read = read_tiles(query, key, value, layout, choice, dtype)
    out, log_p = key.new_empty(size, tokens, dv), key.new_empty(size, tokens)
    if prefix:
        out[:, :prefix], log_p[:, :prefix] = near_far.exact_rows(query[:, :prefix], key, value)
    sizes = FORWARD[dtype.itemsize, power_of_2(max(dim, dv), least=64)]
    slots = power_of_2(layout.tile, most=sizes.queries)
    (_, tiles, entries), blocks = read.reads.shape, -(-layout.tile // slots)
    read_kernel[(size * tiles * blocks,)](
        *(query.contiguous(), *read.read(), out, log_p),
        *(tokens, prefix, tiles, layout.tile, blocks, entries, layout.num_hidden),
        **dims_of(dim, dv), Q=slots, E=sizes.keys, SUB=SUBTILE, LIKE=LIKE[dtype],
        num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip
    return out, log_p


def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    choice: Choice,
    results: Results,
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the inputs of `attend`, float32; its `out` and that one's gradient in the dtype."""
    prefix, m, tile = layout.prefix, layout.num_hidden, layout.tile
    (size, tokens, dim), dv = key.shape, value.shape[-1]
    read = read_tiles(query, key, value, layout, choice, dtype)
    tiles, entries = read.reads.shape[1:]
    widest = power_of_2(max(dim, dv), least=64)
    sizes = BACKWARD[dtype.itemsize, widest]
    if is_small(key.device):
        sizes = SMALL.get((dtype.itemsize, widest), sizes)
    slots, neurons = power_of_2(tile, most=sizes.queries), power_of_2(m, most=NEURONS[widest])
    blocks, layers = -(-tile // slots), max(1, -(-m // neurons))
    d_rest, d_mean = key.new_empty(size, layers, tokens, dim), key.new_empty(size, tiles, blocks, layers, dim)
    d_entry_key, d_entry_value, d_bias = (
        key.new_empty(size, tiles, entries, blocks, *shape) for shape in ((dim,), (dv,), ())
    )
    d_weights, d_log_z, d_mean_value = (key.new_empty(size, tiles, blocks, m, *shape) for shape in ((dim,), (), (dv,)))
    dims, like = dims_of(dim, dv), LIKE[dtype]
    read_backward_kernel[(size * tiles * blocks * layers,)](
        *(query.contiguous(), *read.read(), *(x.contiguous() for x in results)),
        *(d_rest, d_mean, d_entry_key, d_entry_value, d_bias),
        *(d_weights, d_log_z, d_mean_value, tokens, prefix, tiles, tile, blocks, layers, entries, m),
        **dims, Q=slots, E=sizes.keys, M=neurons, HIDDEN=m > 0, SUB=SUBTILE, LIKE=like,
        num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip

    d_key, d_value = torch.empty_like(key), torch.empty_like(value)
    places, begins = _by_key(read.reads, tokens)
    sum_kernel[(size * -(-tokens // SUMMED),)](
        *(read.mean, d_entry_key, d_entry_value, d_bias, places, begins, d_key, d_value),
        *(tokens, tiles, entries, blocks), **dims, K=SUMMED,
    )  # fmt: skip
    # The mean query has what reading gives it beside what its queries' rests have already.
    d_mean = d_mean.sum((2, 3))
    if m:
        d_mean += _write_backward(read, layout, d_weights, d_log_z, d_mean_value, choice, (d_key, d_value))
    d_mean /= read.real.sum(1)[:, None]
    order = choice.order.long()
    places = torch.arange(order.shape[1], device=key.device).expand_as(order)
    tile_of = torch.empty_like(order).scatter_(1, order, places // tile)
    d_query = d_rest.sum(1)
    d_query[:, prefix:] += d_mean.gather(1, tile_of[..., None].expand(-1, -1, dim))
    if prefix:
        of_prefix = Results(*(x[:, :prefix] for x in results))
        found = exact_rows_backward(query[:, :prefix], key, value, of_prefix)
        d_query[:, :prefix] = found[0]
        d_key += found[1]
        d_value += found[2]
    return d_query, d_key, d_value


def exact_rows_backward(query: Tensor, key: Tensor, value: Tensor, results: Results) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the inputs of `near_far.exact_rows`."""
    d_out = results.d_out.float()
    share = (query @ key.mT - results.log_p[..., None]).exp()
    delta = (d_out * results.out).sum(-1) - results.d_log_p
    d_logits = share * (d_out @ value.mT - delta[..., None])
    return d_logits @ key, d_logits.mT @ query, share.mT @ d_out


def _write_backward(
    read: Tiles,
    layout: Layout,
    d_weights: Tensor,
    d_log_z: Tensor,
    d_mean_value: Tensor,
    choice: Choice,
    grads: tuple[Tensor, Tensor],
) -> Tensor:
    """Add what the keys have given to the hidden layer to d_key and d_value; what it gives to the mean queries."""
    d_key, d_value = grads
    hidden, prefix, m = read.hidden, layout.prefix, layout.num_hidden
    (size, tiles, dim), (tokens, dv) = read.mean.shape, d_value.shape[1:]
    d_mean_value, d_log_z = d_mean_value.sum(2), d_log_z.sum(2)
    d_log_z = d_log_z - (d_mean_value * hidden.mean_value).sum(-1)
    most, block, warps, stages = WRITTEN[power_of_2(max(dim, dv), least=64)]
    rows = power_of_2(tiles, most=most)
    given = read.mean, read.key, read.value, *hidden.written(), read.top, d_mean_value, d_log_z
    numbers = tokens, prefix, tiles, m, hidden.read.shape[2]
    sizes = dims_of(dim, dv) | {"T": rows, "K": block, "num_warps": warps, "num_stages": stages}
    write_backward_kernel[(size * (-(-(tokens - prefix) // block) + m),)](
        *given, d_key, d_value, *numbers, **sizes, M=power_of_2(m), LIKE=LIKE[read.value.dtype]
    )
    d_means = d_key.new_empty(size, tiles, m, dim)
    mean_backward_kernel[(size * m * -(-tiles // rows),)](
        *given, d_means, *numbers, **sizes, LIKE=LIKE[read.value.dtype]
    )
    winners = choice.winners.long()
    share = choice.mass.float() / hidden.total.gather(1, winners).clamp(min=torch.finfo(torch.float32).tiny)
    of_key = d_weights.sum((1, 2)).gather(1, winners[..., None].expand(-1, -1, d_key.shape[2]))
    d_key[:, prefix:] += share[..., None] * of_key
    return d_means.sum(2)


def _by_key(index: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The entries of all tiles of a sequence in the order of their keys [Z, T * entries], and where those of each key
    begin, and the last end [Z, N + 1]."""
    of_key, places = index.where(index >= 0, tokens).flatten(1).sort(dim=1, stable=True)
    keys = torch.arange(tokens + 1, device=index.device, dtype=index.dtype).expand(len(index), -1).contiguous()
    return places.int(), torch.searchsorted(of_key, keys).int()
