"""Triton: near + far attention, forward and backward (`ops.near_far` has the mathematics).

Nothing of size R x n is stored but where exact keys are chosen: then their scores, a few heads at a time, and a byte
for each group and key. Every sum has a fixed order, so equal inputs give equal bits; nothing waits for the GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from astroattn.ops.kernels.clusters import cluster_means, learn, sort_keys, take_moments
from astroattn.ops.kernels.exact_keys import choose_keys, mark_keys, reading_error
from astroattn.ops.kernels.far_backward import Given, far_gradients
from astroattn.ops.kernels.means import Means, expected_mass, far_mass, group_means, log_sums
from astroattn.ops.kernels.near_far_backward import exact_gradients, write_delta
from astroattn.ops.kernels.near_far_forward import Far, attend, write_sums
from astroattn.ops.kernels.tiles import Shape, rows_of, scratch, shape_of
from astroattn.ops.rows import dense_rows, empty_rows


def near_far_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    grid: tuple[int, int] | None,
    prefix: int,
    tile: int,
    near: int,
    exact_keys: int,
    groups: int,
    num_hidden: int,
    steps: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attention of each query to its near field, its tile's exact keys, and m hidden neurons for the rest.

    Args:
        query, key, value: [B, H, N, D], [B, H, N, D], [B, H, N, Dv]; float32, bfloat16 or float16, one for all.
        lengths: real tokens of each sequence [B], which come first; None: all. Not with a grid.
        grid, prefix, tile, near, exact_keys, groups: as in `ops.tiles.Layout`. num_hidden: m, 0 leaves the far field
            out. steps: learning steps. scale: multiplies q.k.

    Returns:
        The output [B, H, N, Dv], laid out like the query where it has as many columns; log p [B, H, N] in float32; and
        what was chosen: the cluster of each body key [B, H, n] int32, what it weighs there [B, H, n] float32, and the
        exact keys of each group [B, H, R, e] int32, -1 where there are fewer.
    """
    query, key, value = map(dense_rows, (query, key, value))
    shape = shape_of(key, lengths, grid, prefix, tile, near, groups, num_hidden, scale)
    keys = scratch(key, shape.groups, min(exact_keys, shape.body), dtype=torch.int32)
    winners = scratch(key, shape.body, dtype=torch.int32)
    means, far = None, None
    if num_hidden:
        means = group_means(shape, query)
        mass, far = _write_hidden(shape, key, value, means, winners, keys, steps)
    else:
        mass = torch.zeros_like(winners.zero_(), dtype=torch.float32)
        if keys.shape[-1]:
            choose_keys(shape, key, group_means(shape, query), None, keys)
    out, log_p = empty_rows(query, value.shape[-1]), scratch(query, shape.tokens)
    attend(shape, query, key, value, means, far, keys, out, log_p)
    return out, log_p, winners, mass, keys


def _write_hidden(
    shape: Shape, key: Tensor, value: Tensor, means: Means, winners: Tensor, keys: Tensor, steps: int
) -> tuple[Tensor, Far]:
    """Learn the hidden layer, choose the exact keys, and write everything else into it."""
    sums = log_sums(shape, key, means.mean)
    mass, without_near = expected_mass(shape, key, means, sums)
    weights = learn(shape, key, mass, means.square, winners, steps)
    if keys.shape[-1] == 0:
        moments = take_moments(shape, key, key, without_near, winners, means.square, weights)
        order, centres = sort_keys(shape, moments, winners)
        return without_near, write_sums(shape, key, value, means, winners, centres, order, None)
    moments = take_moments(shape, key, value, mass, winners, means.square, weights)
    order, mean_value = sort_keys(shape, moments, winners)
    error = reading_error(shape, key, value, weights, mean_value, means.square, winners)
    choose_keys(shape, key, means, error, keys)
    chosen = mark_keys(shape, keys, order)
    far = far_mass(shape, key, means, sums, chosen, order.order)
    centres = cluster_means(shape, key, take_moments(shape, key, key, far, winners))
    return far, write_sums(shape, key, value, means, winners, centres, order, chosen)


def near_far_backward(
    d_out: Tensor,
    d_log_p: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_p: Tensor,
    winners: Tensor,
    mass: Tensor,
    keys: Tensor,
    lengths: Tensor | None,
    grid: tuple[int, int] | None,
    prefix: int,
    tile: int,
    near: int,
    groups: int,
    num_hidden: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values. Arguments as in, and from, `near_far_forward`; d_log_p None is 0."""
    query, key, value, out, d_out = map(dense_rows, (query, key, value, out, d_out))
    shape = shape_of(key, lengths, grid, prefix, tile, near, groups, num_hidden, scale)
    log_p, winners, mass, keys = (x.contiguous() for x in (log_p, winners, mass, keys))
    given = Given(rows_of(d_out), log_p, write_delta(shape, out, d_out, d_log_p))
    if num_hidden == 0:
        return exact_gradients(shape, query, key, value, given, keys, None, None, None)
    means = group_means(shape, query)
    moments = take_moments(shape, key, key, mass, winners)
    order, centres = sort_keys(shape, moments, winners)
    chosen = mark_keys(shape, keys, order) if keys.shape[-1] else None
    far = write_sums(shape, key, value, means, winners, centres, order, chosen)
    back = far_gradients(shape, query, key, value, given, mass, means, moments, order, far, chosen)
    return exact_gradients(shape, query, key, value, given, keys, means, far, back)
