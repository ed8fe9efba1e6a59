"""The order of queries in their tiles: directions that matter to q.k, a tree over them, and curves through a grid."""

from __future__ import annotations

import itertools

import pytest
import torch
from core_cases import draw, layout
from hypothesis import given, settings
from hypothesis import strategies as st

from astroattn.ops.order import (
    DIRECTIONS,
    content_order,
    factor,
    find_coordinates,
    keep_neighbours,
    position_order,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(("tokens", "dim"), [(1, 4), (5, 8), (60, 6), (200, 16)])
def test_coordinates_hold_the_products(tokens: int, dim: int) -> None:
    """(q Y).(k P) is q.k less its means over queries and keys, wherever the directions are enough."""
    query, key = draw(2, tokens, dim, count=2)
    if dim > DIRECTIONS:  # as many directions that vary
        query = query[..., :DIRECTIONS] @ torch.randn(DIRECTIONS, dim, dtype=torch.float64)
    found = find_coordinates(query, key)
    assert found.query.shape == found.key.shape == (2, tokens, min(DIRECTIONS, dim))
    centred = query - query.mean(1, keepdim=True), key - key.mean(1, keepdim=True)
    if tokens > 8:
        torch.testing.assert_close(found.query @ found.key.mT, centred[0] @ centred[1].mT, rtol=1e-3, atol=1e-3)
    for mine, whole, basis in zip(found[2:], centred, found[:2], strict=True):
        torch.testing.assert_close(mine, whole @ basis)


def test_coordinates_are_whitened() -> None:
    query, key = draw(2, 60, 6, count=2)
    seen = find_coordinates(query, key).query
    torch.testing.assert_close(seen.mT @ seen / 60, torch.eye(6).double().expand(2, -1, -1), rtol=1e-4, atol=1e-4)


def test_coordinates_are_those_that_vary_most_in_the_logits() -> None:
    """40 directions, of which a few make nearly all of q.k: they are found."""
    spread = torch.cat([torch.full((8,), 3.0), torch.full((32,), 0.1)]).double()
    query, key = (x * spread for x in draw(2, 300, 40, count=2))
    found = find_coordinates(query, key)
    query, key = (x - x.mean(1, keepdim=True) for x in (query, key))
    logits = query @ key.mT
    missed = logits - found.query @ found.key.mT
    assert missed.square().mean() < 0.02 * logits.square().mean()


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e3])
def test_coordinates_are_finite(scale: float) -> None:
    query, key = draw(2, 30, 6, count=2, dtype=torch.float32)
    for q, k in ((query * scale, key), (query, key * scale), (query[:, :1].expand_as(query), key)):
        found = find_coordinates(q, k)
        assert found.query.isfinite().all()
        assert found.key.isfinite().all()


def test_factor_has_the_metric() -> None:
    points, other = draw(3, 20, 5, count=2)
    moment = other.mT @ other
    inside = points @ factor(moment)
    torch.testing.assert_close((inside**2).sum(-1), (points @ moment * points).sum(-1), rtol=1e-4, atol=1e-4)


@settings(deadline=None)
@given(st.integers(1, 150), st.integers(1, 10), st.integers(1, 5), st.integers(0, 2**31))
def test_every_query_has_one_place(body: int, subtiles: int, dim: int, seed: int) -> None:
    points = torch.randn(2, body, dim, generator=torch.Generator().manual_seed(seed))
    for x in (points, points * 0):
        order = content_order(x, layout(tile=4 * subtiles))
        assert [sorted(each) for each in order.tolist()] == [list(range(body))] * 2


@pytest.mark.parametrize(("tile", "groups"), [(4, 16), (8, 8), (16, 4), (12, 5)])
def test_tiles_are_groups_that_stand_apart(tile: int, groups: int) -> None:
    """Points of well-separated groups, as many in each as in a tile, in any order."""
    corners = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)))[:groups] * torch.tensor([1000, 300, 90, 25])
    points = (corners[:, None] + torch.rand(groups, tile, 4)).flatten(0, 1)
    shuffled = torch.randperm(len(points))
    order = content_order(points[shuffled][None], layout(tile=tile))[0]
    group = shuffled[order] // tile
    assert all(len(set(part.tolist())) == 1 for part in group.split(tile))


def test_subtiles_are_nearer_than_tiles_and_those_than_the_sequence() -> None:
    points = torch.randn(1, 512, 3)

    def spread(order: torch.Tensor, size: int) -> float:
        parts = points[0, order].unflatten(0, (-1, size))
        return float((parts - parts.mean(1, keepdim=True)).square().mean())

    order = content_order(points, layout(tile=32))[0]
    whole, tiles, subtiles = (spread(order, size) for size in (512, 32, 4))
    assert tiles < 0.35 * whole
    assert subtiles < 0.35 * tiles


def test_the_first_cut_is_across_the_longest_direction() -> None:
    """A line of points in any direction: each tile is a piece of it."""
    place = torch.randperm(64).double()
    points = place[:, None] * torch.tensor([3.0, -4.0, 1.0]).double() + torch.randn(64, 3).double() * 0.01
    order = content_order(points[None], layout(tile=8))[0]
    found = [sorted(part.tolist()) for part in place[order].split(8)]
    assert sorted(found) == [list(range(begin, begin + 8)) for begin in range(0, 64, 8)]


@pytest.mark.parametrize("grid", [None, (16, 16)])
def test_neighbours_stay_together_where_they_ask_for_the_same(grid: tuple | None) -> None:
    """One head whose queries drift slowly through more directions than there are coordinates, one that is a mixture."""
    where, dim = layout(grid=grid, tile=16), 64
    place = torch.arange(256).double()
    columns = torch.stack([place // 16, place % 16], -1) if grid else place[:, None] / 4
    waves = columns @ torch.randn(columns.shape[1], 32, dtype=torch.float64)
    drifting = torch.cat([waves.sin(), waves.cos()], -1)
    kinds = torch.randn(8, dim, dtype=torch.float64)[torch.randint(8, (256,))]
    query = torch.stack([drifting, kinds]) + 0.01 * torch.randn(2, 256, dim, dtype=torch.float64)
    key = torch.stack([drifting, torch.randn(256, dim, dtype=torch.float64)])
    found = find_coordinates(query, key)
    order = content_order(found.query @ factor(found.key.mT @ found.key / 256), where)
    kept = keep_neighbours(query, key, order, where)
    assert torch.equal(kept[0], position_order(where, 256, CPU))
    assert torch.equal(kept[1], order[1])


@pytest.mark.parametrize("grid", [None, (8, 8)])
def test_neighbours_stay_together_for_a_bias_of_positions(grid: tuple | None) -> None:
    """All queries ask for the same; in one head a bias lets them look around themselves, in one it is the keys' own."""
    where, order = layout(grid=grid, tile=16), torch.stack([torch.randperm(64) for _ in range(2)])
    query, key = torch.ones(2, 64, 8).double(), torch.randn(2, 64, 8).double()
    place = torch.arange(64).double()
    place = torch.stack([place // 8, place % 8], -1) if grid else place[:, None]
    bias = torch.stack([-torch.cdist(place, place), place.sum(1).expand(64, -1)])
    kept = keep_neighbours(query, key, order, where, bias)
    assert torch.equal(kept[0], position_order(where, 64, CPU))
    assert torch.equal(kept[1], order[1])
    assert torch.equal(keep_neighbours(query, key, order, where), order)
    moved = bias + 1000 * torch.randn(2, 64, 1)  # by the same for all keys
    assert torch.equal(keep_neighbours(query, key, order, where, moved)[0], kept[0])


def test_too_few_neighbours_are_not_compared() -> None:
    query, key = draw(2, 3, 8, count=2)
    order = torch.tensor([[2, 0, 1]]).expand(2, -1)
    assert torch.equal(keep_neighbours(query, key, order, layout()), order)


def test_sequences_in_a_batch_have_orders_of_their_own() -> None:
    points = torch.randn(5, 77, 4)
    together = content_order(points, layout(tile=12))
    for z in range(5):
        assert torch.equal(content_order(points[z : z + 1], layout(tile=12)), together[z : z + 1])


def test_a_sequence_stands_as_it_is() -> None:
    assert position_order(layout(by_content=False), 9, CPU).tolist() == list(range(9))


def test_a_grid_along_a_z_curve_by_hand() -> None:
    order = position_order(layout(grid=(4, 4)), 16, CPU)
    assert order.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


@pytest.mark.parametrize("grid", [(14, 14), (2, 6), (16, 32), (6, 10)])
def test_runs_of_four_in_an_even_grid_are_squares(grid: tuple) -> None:
    order = position_order(layout(grid=grid), grid[0] * grid[1], CPU)
    for run in order.split(4):
        corner = int(run.min())
        assert run.sort().values.tolist() == [corner, corner + 1, corner + grid[1], corner + grid[1] + 1]


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12))
def test_every_patch_has_one_place(rows: int, columns: int) -> None:
    order = position_order(layout(grid=(rows, columns)), rows * columns, CPU)
    assert sorted(order.tolist()) == list(range(rows * columns))
