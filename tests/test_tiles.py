"""Tiles and near fields: every token in one tile, windows of constant size around it, groups of equal size."""

from __future__ import annotations

import pytest
import torch
from core_cases import layout
from hypothesis import given, settings
from hypothesis import strategies as st

from astroattn.ops.tiles import make_tiles, near_shape, tile_shape

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("tile", "rows", "columns", "shape"),
    [
        (4, 14, 14, (2, 2)),
        (8, 14, 14, (2, 4)),
        (9, 14, 14, (3, 3)),
        (7, 14, 14, (1, 7)),
        (16, 3, 14, (3, 4)),
        (4, 1, 20, (1, 4)),
        (4, 1, 3, (1, 3)),
        (1, 5, 5, (1, 1)),
    ],
)
def test_tile_shape(tile: int, rows: int, columns: int, shape: tuple) -> None:
    assert tile_shape(tile, rows, columns) == shape


@pytest.mark.parametrize(
    ("near", "rows", "columns", "shape"),
    [
        (16, 14, 14, (4, 4)),
        (20, 14, 14, (4, 5)),
        (15, 14, 14, (3, 5)),
        (2, 14, 14, (1, 2)),
        (0, 14, 14, (0, 0)),
        (16, 2, 14, (2, 8)),
        (16, 14, 2, (8, 2)),
        (196, 14, 14, (14, 14)),
        (999, 14, 14, (14, 14)),
        (5, 1, 40, (1, 5)),
        (50, 1, 40, (1, 40)),
    ],
)
def test_near_shape(near: int, rows: int, columns: int, shape: tuple) -> None:
    assert near_shape(near, rows, columns) == shape


def test_a_grid_by_hand() -> None:
    """A grid of 3 x 5 in tiles of 2 x 2 with windows of 3 x 3; the last row and column of tiles are cut."""
    tiles = make_tiles(layout(grid=(3, 5), prefix=2, near=9), 17, CPU)
    held = [tiles.slots[t][tiles.slot_mask[0, t]].tolist() for t in range(6)]
    assert held == [[0, 1, 5, 6], [2, 3, 7, 8], [4, 9], [10, 11], [12, 13], [14]]
    windows = [sorted(set((near % 5).tolist())) for near in tiles.near[0]]
    assert windows == [[0, 1, 2], [1, 2, 3], [2, 3, 4]] * 2
    assert all(near.unique().numel() == 9 for near in tiles.near[0])


def test_windows_lie_around_their_tiles() -> None:
    """A grid of 8 x 8 in tiles of 2 x 2 with windows of 4 x 4: a margin of one patch, less at the borders."""
    tiles = make_tiles(layout(grid=(8, 8), near=16), 64, CPU)
    for t, near in enumerate(tiles.near[0].tolist()):
        row, column = divmod(t, 4)
        assert [min(near) // 8, min(near) % 8] == [min(max(2 * side - 1, 0), 4) for side in (row, column)]


def test_a_sequence_by_hand() -> None:
    """Ten tokens, nine of them after the prefix, in tiles of 4 with windows of 6."""
    tiles = make_tiles(layout(prefix=1, near=6), 10, CPU)
    assert tiles.near[0].tolist() == [[0, 1, 2, 3, 4, 5], [3, 4, 5, 6, 7, 8], [3, 4, 5, 6, 7, 8]]
    assert tiles.slot_mask[0].sum(-1).tolist() == [4, 4, 1]
    assert tiles.group.tolist() == [[0, 1, 2]]


@st.composite
def layouts(draw: st.DrawFn) -> tuple:
    grid = draw(st.one_of(st.none(), st.tuples(st.integers(1, 9), st.integers(1, 9))))
    prefix = draw(st.integers(0, 3))
    tokens = prefix + (grid[0] * grid[1] if grid else draw(st.integers(1, 60)))
    sizes = {name: draw(st.integers(1, 30)) for name in ("tile", "near", "groups")}
    return layout(grid=grid, prefix=prefix, **sizes), tokens


@settings(deadline=None)
@given(layouts())
def test_every_token_is_in_one_tile(case: tuple) -> None:
    where, tokens = case
    tiles, body = make_tiles(where, tokens, CPU), tokens - where.prefix
    assert sorted(tiles.slots[tiles.slot_mask[0]].tolist()) == list(range(body))
    assert tiles.slots.flatten()[tiles.inverse].tolist() == list(range(body))
    assert tiles.slot_mask[0].flatten()[tiles.inverse].all()
    assert tiles.slots.shape[1] <= max(where.tile, 1)


@settings(deadline=None)
@given(layouts())
def test_windows_have_the_same_size_and_no_token_twice(case: tuple) -> None:
    where, tokens = case
    tiles, body = make_tiles(where, tokens, CPU), tokens - where.prefix
    rows, columns = where.grid or (1, body)
    high, wide = near_shape(where.near, rows, columns)
    assert high * wide <= where.near
    assert tiles.near_mask.all()
    assert tiles.near.shape[-1] == high * wide
    assert all(len(set(near)) == high * wide and 0 <= min(near) <= max(near) < body for near in tiles.near[0].tolist())
    tile = tile_shape(where.tile, rows, columns) if where.tile < rows * columns else (rows, columns)
    if high >= tile[0] and wide >= tile[1]:
        for t, near in enumerate(tiles.near[0].tolist()):  # a tile lies within its window
            assert set(tiles.slots[t][tiles.slot_mask[0, t]].tolist()) <= set(near)


@settings(deadline=None)
@given(layouts(), st.booleans())
def test_groups_are_runs_of_tiles_of_about_the_same_number(case: tuple, with_lengths: bool) -> None:
    where, tokens = case
    if with_lengths and where.grid is None:  # the same with all lengths given
        where = layout(**(vars(where) | {"lengths": torch.tensor([tokens])}))
    tiles = make_tiles(where, tokens, CPU)
    assert tiles.num_groups == min(where.groups, len(tiles.slots))
    number = torch.bincount(tiles.group[0], minlength=tiles.num_groups)
    assert (tiles.group[0].diff() >= 0).all()
    assert number.max() - number.min() <= 1
    assert len(number) == tiles.num_groups


@settings(deadline=None)
@given(layouts(), st.integers(1, 60))
def test_a_padded_sequence_has_the_tiles_that_it_has_alone(case: tuple, padding: int) -> None:
    where, tokens = case
    where = layout(**(vars(where) | {"grid": None}))
    alone = make_tiles(where, tokens, CPU)
    lengths = torch.tensor([tokens, tokens + padding])
    padded = make_tiles(layout(**(vars(where) | {"lengths": lengths})), tokens + padding, CPU)
    assert not (padded.slot_mask[0] & (padded.slots >= tokens - where.prefix)).any()

    def by_token(tiles: object, row: int) -> list:
        tile_of = tiles.inverse[: tokens - where.prefix] // tiles.slots.shape[1]
        near = [tiles.near[row, t][tiles.near_mask[row, t]].tolist() for t in range(len(tiles.slots))]
        return [(int(t), near[t], int(tiles.group[row, t])) for t in tile_of]

    assert by_token(alone, 0) == by_token(padded, 0)
    held = padded.slot_mask[0].any(-1)
    assert not padded.near_mask[0, ~held].any()  # tiles of padding have no window


def test_sums_over_groups() -> None:
    tiles = make_tiles(layout(tile=2, groups=3), 14, CPU)  # 7 tiles: groups of 3, 2 and 2
    assert tiles.group.tolist() == [[0, 0, 0, 1, 1, 2, 2]]
    per_tile = torch.arange(7.0)[None, :, None].expand(2, -1, 1)
    assert tiles.sum_groups(per_tile)[..., 0].tolist() == [[3.0, 7.0, 11.0]] * 2
    assert tiles.of_group(tiles.sum_groups(per_tile))[0, :, 0].tolist() == [3, 3, 3, 7, 7, 11, 11]
