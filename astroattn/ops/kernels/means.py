"""Triton: the mean queries of the groups, and what they expect of the keys.

    means       u, the mean query of each group, and the mean squares of r = q - u
    normaliser  log sum_i exp(u_g.k_i), in parts
    mass        sum_g share_g exp(u_g.k_i) / sum_i exp(u_g.k_i), with and without what a group leaves out

Every sum has a fixed order, so equal inputs give equal bits. Logarithms are to the base 2. `ops.near_far` has the
formulas.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from astroattn.ops.kernels.features import narrow
from astroattn.ops.kernels.tiles import (
    Shape,
    base,
    blocks_of,
    count_tiles,
    dot,
    end_of_columns,
    is_near,
    load_rows,
    power_of_2,
    real_tokens,
    rows_of,
    scratch,
    store_rows,
    tiles_of,
    token_of,
    window_of,
)

PROGRAMS = 528  # four for each multiprocessor of a large GPU; a constant, so that results do not depend on the GPU
MOST_PARTS = 64


class Means(NamedTuple):
    """What the queries of each group have in common.

    Attributes:
        mean: u [B, H, R, D], in the dtype of the queries; not scaled.
        number: real queries [B, H, R].
        square: sums of r * r over some of the groups [B, H, parts, D].
    """

    mean: Tensor
    number: Tensor
    square: Tensor


@triton.jit
def _means(query, mean, number, square, shape, per_part, parts, SLOTS: tl.constexpr):
    z, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    end = end_of_columns(z, shape)
    count = count_tiles(end, shape)
    start, mean_start = base(query, z, shape) + shape.prefix * query.row, base(mean, z, shape)
    SIZE: tl.constexpr = shape.HIGH * shape.WIDE
    one = tl.arange(0, 1)
    squares = tl.zeros([query.PADDED], tl.float32)
    for group in range(part * per_part, tl.minimum((part + 1) * per_part, shape.groups)):
        first, last = tiles_of(group, count, shape)
        total = tl.zeros([query.PADDED], tl.float32)
        members = 0
        for slot in range(first * SIZE, last * SIZE, SLOTS):
            place = slot + tl.arange(0, SLOTS)
            token, _, real = token_of(place, end, shape)
            real = real & (place < last * SIZE)
            total += tl.sum(load_rows(query, start, token, real).to(tl.float32), 0)
            members += tl.sum(real.to(tl.int32), 0)
        u = narrow(total / tl.maximum(members, 1), mean.data.dtype.element_ty)
        store_rows(mean, mean_start, group + one, one == 0, u[None, :])
        tl.store(number + z.to(tl.int64) * shape.groups + group, members)
        for slot in range(first * SIZE, last * SIZE, SLOTS):  # read again: in one pass small squares would be lost
            place = slot + tl.arange(0, SLOTS)
            token, _, real = token_of(place, end, shape)
            real = real & (place < last * SIZE)
            rest = load_rows(query, start, token, real).to(tl.float32) - u.to(tl.float32)[None, :]
            squares += tl.sum(tl.where(real[:, None], rest * rest, 0.0), 0)
    store_rows(square, base(square, z, shape), part + one, one == 0, squares[None, :])


@triton.jit
def _normaliser(mean, key, log_sum, shape, parts, GROUPS: tl.constexpr, KEYS: tl.constexpr):
    blocks = tl.cdiv(shape.groups, GROUPS)
    part, block = tl.program_id(0) % parts, tl.program_id(0) // parts % blocks
    z = tl.program_id(0) // parts // blocks
    tokens = real_tokens(z, shape)
    group = block * GROUPS + tl.arange(0, GROUPS)
    u = load_rows(mean, base(mean, z, shape), group, group < shape.groups)
    start = base(key, z, shape)
    length = tl.cdiv(tl.cdiv(shape.tokens, parts), KEYS) * KEYS
    top = tl.full([GROUPS], float("-inf"), tl.float32)
    total = tl.zeros([GROUPS], tl.float32)
    for first in range(part * length, tl.minimum((part + 1) * length, tokens), KEYS):
        token = first + tl.arange(0, KEYS)
        k = load_rows(key, start, token, token < tokens)
        logits = tl.where((token < tokens)[None, :], dot(u, tl.trans(k)) * shape.scale, float("-inf"))
        new = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp2(top - new) + tl.sum(tl.exp2(logits - new[:, None]), 1)
        top = new
    place = log_sum + (z.to(tl.int64) * parts + part) * shape.groups + group
    tl.store(place, top + tl.log2(tl.where(total > 0, total, 1.0)), mask=group < shape.groups)


@triton.jit
def _mass(
    mean, key, log_sum, number, chosen, order, mass, far, shape, parts,
    PARTS: tl.constexpr, GROUPS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """`mass` [B, H, n] (None: not wanted), and `far` the same of the groups that do not leave the key out."""
    n = shape.rows * shape.columns
    blocks = tl.cdiv(n, KEYS)
    z, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    end = end_of_columns(z, shape)
    alone = count_tiles(end, shape) <= shape.groups
    place = block * KEYS + tl.arange(0, KEYS)
    real = place < shape.rows * end
    row, groups = z.to(tl.int64) * n, z.to(tl.int64) * shape.groups
    token = place if order is None else tl.load(order + row + place, mask=real, other=0)
    k = load_rows(key, base(key, z, shape) + shape.prefix * key.row, token, real)
    mean_start = base(mean, z, shape)
    whole = tl.zeros([KEYS], tl.float32)
    rest = tl.zeros([KEYS], tl.float32)
    part = tl.arange(0, PARTS)
    for first in range(0, shape.groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        inside = group < shape.groups
        sums = tl.load(
            log_sum + (z.to(tl.int64) * parts + part[:, None]) * shape.groups + group[None, :],
            mask=(part < parts)[:, None] & inside[None, :],
            other=float("-inf"),
        )
        top = tl.max(sums, 0)
        normaliser = tl.log2(tl.sum(tl.exp2(sums - tl.where(top > float("-inf"), top, 0.0)[None, :]), 0)) + top
        size = tl.load(number + groups + group, mask=inside, other=0.0)
        normaliser = tl.where(size > 0, normaliser - tl.log2(size / (shape.rows * end)), float("inf"))
        u = load_rows(mean, mean_start, group, inside)
        shares = tl.exp2(dot(k, tl.trans(u)) * shape.scale - normaliser[None, :])
        if mass is not None:
            whole += tl.sum(shares, 1)
        if shape.WINDOW_WIDE > 0:
            first_row, first_column = window_of(group, end, shape)
            near = is_near(token[:, None], first_row[None, :], first_column[None, :], shape)
            shares = tl.where(near & alone, 0.0, shares)
        if chosen is not None:
            mark = chosen + (groups + group)[None, :] * n + place[:, None]
            shares = tl.where(tl.load(mark, mask=inside[None, :] & real[:, None], other=0) != 0, 0.0, shares)
        rest += tl.sum(shares, 1)
    if mass is not None:
        tl.store(mass + row + place, tl.where(real, whole, 0.0), mask=place < n)
    if key.data.dtype.element_ty == tl.bfloat16:  # so that the means of the clusters weigh by just these numbers
        rest = narrow(rest, tl.bfloat16).to(tl.float32)
    token = tl.where(real, token, place)  # padding is in no order: it stays where it is
    tl.store(far + row + token, tl.where(real, rest, 0.0), mask=place < n)


def group_means(shape: Shape, query: Tensor) -> Means:
    """The mean query of each group, and how much the queries differ from it."""
    size, dim = query.shape[0] * query.shape[1], query.shape[-1]
    per_part = -(-shape.groups // MOST_PARTS)
    parts = -(-shape.groups // per_part)
    means = Means(
        scratch(query, shape.groups, dim, dtype=query.dtype),
        scratch(query, shape.groups),
        scratch(query, parts, dim),
    )
    slots = power_of_2(-(-shape.tiles // shape.groups) * shape.slots, 4, 64)
    _means[(size * parts,)](
        rows_of(query), rows_of(means.mean), means.number, rows_of(means.square), shape, per_part, parts, slots
    )
    return means


def log_sums(shape: Shape, key: Tensor, mean: Tensor) -> Tensor:
    """log2 of the sum of exp(u.k) over parts of the tokens [B, H, parts, R]."""
    most = blocks_of(key)
    groups = power_of_2(shape.groups, most=most.groups)
    blocks = key.shape[0] * key.shape[1] * -(-shape.groups // groups)
    parts = max(1, min(PROGRAMS // (2 * blocks), shape.tokens // 256, MOST_PARTS))
    sums = scratch(key, parts, shape.groups)
    _normaliser[(blocks * parts,)](
        rows_of(mean), rows_of(key), sums, shape, parts, groups, most.keys, num_warps=8, num_stages=most.stages
    )
    return sums


def expected_mass(shape: Shape, key: Tensor, means: Means, sums: Tensor) -> tuple[Tensor, Tensor]:
    """What all groups expect to give to each key [B, H, n], and the same without the groups that it is near to."""
    mass, far = scratch(key, shape.body), scratch(key, shape.body)
    _launch_mass(shape, key, means, sums, None, None, mass, far)
    return mass, far


def far_mass(shape: Shape, key: Tensor, means: Means, sums: Tensor, chosen: Tensor, order: Tensor) -> Tensor:
    """As the second of `expected_mass`, and without the groups that have chosen the key.

    `chosen` [B, H, R, n] uint8 marks a group's keys at their places in `order` [B, H, n].
    """
    far = scratch(key, shape.body)
    _launch_mass(shape, key, means, sums, chosen, order, None, far)
    return far


def _launch_mass(
    shape: Shape,
    key: Tensor,
    means: Means,
    sums: Tensor,
    chosen: Tensor | None,
    order: Tensor | None,
    mass: Tensor | None,
    far: Tensor,
) -> None:
    parts, most = sums.shape[2], blocks_of(key)
    keys = 2 * most.keys  # each program reads all mean queries
    _mass[(key.shape[0] * key.shape[1] * -(-shape.body // keys),)](
        rows_of(means.mean), rows_of(key), sums, means.number, chosen, order, mass, far, shape, parts,
        power_of_2(parts, 1), power_of_2(shape.groups, most=most.groups), keys, num_warps=8, num_stages=most.stages,
    )  # fmt: skip
