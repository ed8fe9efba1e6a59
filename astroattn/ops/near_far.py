"""Attention of tiles of queries: exact where it matters, and through a Hebbian hidden layer to all other keys.

For a query q = u + r of a tile (u the tile's mean query, r the rest), softmax attention's sum over keys is

    sum_i exp(q.k_i) v_i = sum_i exp(r.k_i) exp(u.k_i) v_i.

The keys are clustered, and for a key of cluster j that is not read exactly exp(r.k_i) is taken as exp(r.w_j), w_j the
mean of the cluster's keys:

    sum_j exp(r.w_j) s_j   with   s_j = sum_{i in j} exp(u.k_i) v_i,

and for the normaliser with z_j = sum_{i in j} exp(u.k_i) in place of s_j. So the mean query of a tile reads every key
without error. Tiles hold queries that ask for the same, wherever they stand, as attention does not know their order; or
neighbours, where an input's neighbours ask for the same more nearly.

Each sub-tile of four queries attends exactly to the near keys of its queries and to others that it chooses in two
levels: the tile proposes candidates, the sub-tile takes some. What no sub-tile of the tile takes is summed once for the
tile; what others take is added by each sub-tile that does not. Nothing is subtracted. (The CPU kernels sum all keys and
correct the exact ones, which is the same and faster: native/reading.h.)

A bias b on the logits is cut in the same way: its mean over the queries of a tile goes with u.k, so the sums have it,
and what is left goes with r.k, where exact keys have it and others are read without.

`choosing.choose` finds the order of the queries, the clusters and the exact keys; `attend` is everything else,
differentiable, given what was chosen. All arguments are flattened over batch and heads, Z = B * H; the queries are
already multiplied by the scale. The body is all n = N - prefix tokens behind the prefix; none of the tokens is padding.
Queries may be those of another sequence than the keys (cross attention); there is neither a prefix nor a near field
then.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from astroattn.ops import choosing
from astroattn.ops.choosing import Choice
from astroattn.ops.clustering import cluster_sums, weighted_means
from astroattn.ops.layout import SUBTILE, Layout
from astroattn.ops.tiles import by_tile, read_tiles, take_rows, unique

LOGITS = 2**26  # of the tiles that are read at once


def near_far_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of each query to its sub-tile's exact keys, and to m hidden neurons for the rest.

    Args:
        query, key, value: [Z, Nq, D], [Z, N, D], [Z, N, Dv], queries scaled; float32 or float64.
        bias: [Z, Nq, N], finite, added to the logits; None: there is none.

    Returns:
        The output [Z, Nq, Dv], and the log of the normaliser [Z, Nq].
    """
    return attend(query, key, value, layout, choosing.choose(query, key, value, layout, bias), bias)


class Union(NamedTuple):
    """The keys that some sub-tile of a tile reads exactly.

    Attributes:
        keys: which they are [Z, T, U]. there: whether it is one [Z, T, U]; a tile may have fewer.
        taken: whether a sub-tile reads it exactly [Z, T, s, U].
    """

    keys: Tensor
    there: Tensor
    taken: Tensor


def find_union(keys: Tensor, tiles: int, subtiles: int, body: int, most: int | None = None) -> Union:
    """The exact keys of each tile, from those of the sub-tiles [Z, S, P].

    Args:
        most: how many they are at most; None: as many as there are, for which a GPU has to be asked.
    """
    keys = by_tile(keys, tiles, subtiles)
    index = unique(keys.flatten(2), body)
    there = index >= 0
    size = int(there.sum(-1).max()) if most is None else min(most, index.shape[-1])
    index, there = index[..., :size], there[..., :size]
    place = torch.searchsorted(-index, -keys.flatten(2)).view(keys.shape)  # -1 is behind the last, or where none is
    taken = keys.new_zeros(*keys.shape[:3], size + 1, dtype=torch.bool).scatter(3, place, True)[..., :size]
    return Union(index.clamp(min=0), there, taken)


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, choice: Choice, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention given what was chosen, by `choose` or by a kernel. Arguments and results as in `near_far_attention`."""
    prefix, m = layout.prefix, layout.num_hidden
    order, winners, keys = (x.long() for x in (choice.order, choice.winners, choice.keys))
    head_key, head_value = key[:, :prefix], value[:, :prefix]
    body_key, body_value = key[:, prefix:], value[:, prefix:]
    body = body_key.shape[1]
    reading = read_tiles(query, key, order, layout, bias)
    tiles = reading.token.shape[1]

    index, there, taken = find_union(keys, tiles, layout.subtiles(), body)
    means = reading.logits.gather(2, index).masked_fill(~there, -torch.inf)  # u.k

    if m:
        mass = choice.mass.to(key.dtype)
        weights = weighted_means(body_key, mass, winners, m)[1]
        exactly = F.pad(torch.zeros_like(reading.logits, dtype=torch.bool), (0, 1))  # the last is no key
        exactly = exactly.scatter(2, index.where(there, body), True)[..., :body]
        log_z, mean_value = write_hidden(reading.logits.masked_fill(exactly, -torch.inf), body_value, winners, m)

    def read(part: slice) -> tuple[Tensor, Tensor]:
        """One softmax for each query over [prefix ; the union, exactly or through its cluster ; the neurons]."""
        rest, keys = reading.rest[:, part], index[:, part]
        exact = rest @ take_rows(body_key, keys).mT  # r.k [Z, T, t, U]
        own = taken[:, part].repeat_interleave(SUBTILE, 2)
        head = rest @ head_key[:, None].mT
        if reading.bias is not None and reading.prefix_bias is not None:
            exact = exact + reading.bias[:, part].gather(3, keys[:, :, None].expand_as(exact))
            head = head + reading.prefix_bias[:, part]
        parts = [head, exact.masked_fill(~own, -torch.inf)]
        of_tile = [reading.prefix_logits[:, part], means[:, part]]
        values = [head_value[:, None].expand(-1, keys.shape[1], -1, -1), take_rows(body_value, keys)]
        if m:
            drive = rest @ weights[:, None].mT  # r.w [Z, T, t, m]
            owner = winners[:, None].expand(-1, keys.shape[1], -1).gather(2, keys)
            through = drive.gather(3, owner[:, :, None].expand_as(exact))
            parts[1:] = [torch.where(own, exact, through), drive]
            of_tile.append(log_z[:, part])
            values.append(mean_value[:, part])
        joint = torch.cat(of_tile, -1)[:, :, None]
        top = joint.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(rest.dtype).min)
        logits = torch.cat(parts, -1) + (joint - top)  # u.k is kept apart from r.k until the largest is subtracted
        logits = logits.clamp(min=torch.finfo(logits.dtype).min)  # a tile that may see nothing stays finite
        return logits.softmax(-1) @ torch.cat(values, 2), logits.logsumexp(-1) + top[..., 0]

    step = max(1, LOGITS // (len(key) * layout.tile * (prefix + index.shape[-1] + m)))
    out, normaliser = (
        torch.cat(x, 1) for x in zip(*(read(slice(t, t + step)) for t in range(0, tiles, step)), strict=True)
    )
    head_bias = None if bias is None else bias[:, :prefix]
    return assemble(out, normaliser, order, query, key, value, prefix, head_bias)


def assemble(
    out: Tensor,
    normaliser: Tensor,
    order: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: int,
    head_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Put rows by tile or sub-tile [Z, T, t, Dv] into the order of the tokens, behind the prefix's."""
    asked, back = order.shape[1], order.argsort(1)
    out, normaliser = (x.flatten(1, 2)[:, :asked] for x in (out, normaliser))
    out, normaliser = out.gather(1, back[..., None].expand_as(out)), normaliser.gather(1, back)
    if prefix:
        head, head_normaliser = exact_rows(query[:, :prefix], key, value, head_bias)
        out, normaliser = torch.cat([head, out], 1), torch.cat([head_normaliser, normaliser], 1)
    return out, normaliser


def exact_rows(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention of a few queries to all keys: the output and the log of the normaliser."""
    logits = query @ key.mT if bias is None else query @ key.mT + bias
    return logits.softmax(-1) @ value, logits.logsumexp(-1)


def write_hidden(logits: Tensor, value: Tensor, winners: Tensor, num_hidden: int) -> tuple[Tensor, Tensor]:
    """Write keys of logits u.k [Z, T, n] into the hidden layer: log z [Z, T, m] and s / z [Z, T, m, Dv]."""
    owner = winners[:, None].expand_as(logits)
    top = logits.new_full((*logits.shape[:2], num_hidden), torch.finfo(logits.dtype).min)
    top = top.scatter_reduce(2, owner, logits.detach(), "amax")  # from its largest, no cluster underflows
    z, s = cluster_sums((logits - top.gather(2, owner)).exp(), value, winners, num_hidden)
    empty = z == 0
    safe = z.masked_fill(empty, 1)
    return (safe.log() + top).masked_fill(empty, -torch.inf), s / safe[..., None]
