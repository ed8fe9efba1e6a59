"""Layouts: where a tree cuts a sequence, near fields of bounded size, and budgets that follow the length."""

from __future__ import annotations

import itertools

import pytest
import torch
from core_cases import layout
from hypothesis import given, settings
from hypothesis import strategies as st

from astroattn.ops.layout import MOST_TILES, SUBTILE, Budget, cuts, near_shape
from astroattn.ops.order import near_keys, position_order

CPU = torch.device("cpu")
BY_LENGTH = Budget(None, 0, -1, True, -1, -1, -1, 2)


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


def test_cuts_by_hand() -> None:
    """22 tokens in tiles of 8: 8, 8 and 6 of them; then fours, the last of 2."""
    assert cuts(22, 8) == ((0,), (0, 16), (0, 8, 16), (0, 4, 8, 12, 16, 20))
    assert cuts(4, 64) == ((0,),)
    assert cuts(1, 4) == ((0,),)


@settings(deadline=None)
@given(st.integers(1, 700), st.integers(1, 20))
def test_cuts_make_a_balanced_tree(body: int, subtiles: int) -> None:
    """Each level cuts nodes of the one before in two, as even as whole tiles allow, down to tiles and sub-tiles."""
    tile = SUBTILE * subtiles
    levels = cuts(body, tile)
    assert levels[0] == (0,)
    assert levels[-1] == tuple(range(0, body, SUBTILE))
    assert tuple(range(0, body, tile)) in levels
    for before, after in itertools.pairwise(levels):
        assert set(before) < set(after)
        assert list(after) == sorted(set(after))
        for begin, end in zip(before, [*before[1:], body], strict=True):
            within = [cut for cut in after if begin < cut < end]
            assert len(within) <= 1
            unit = tile if end - begin > tile else SUBTILE
            units = -(-(end - begin) // unit)
            assert within == ([begin + (units + 1) // 2 * unit] if units > 1 and within else [])
    depth = (-(-body // tile) - 1).bit_length() + (min(subtiles, -(-body // SUBTILE)) - 1).bit_length()
    assert len(levels) - 1 <= depth


@st.composite
def layouts(draw: st.DrawFn) -> tuple:
    grid = draw(st.one_of(st.none(), st.tuples(st.integers(1, 9), st.integers(1, 9))))
    body = grid[0] * grid[1] if grid else draw(st.integers(1, 60))
    tile = SUBTILE * draw(st.integers(1, 8))
    return layout(grid=grid, tile=tile, near=draw(st.integers(0, 30)), by_content=draw(st.booleans())), body


@settings(deadline=None)
@given(layouts())
def test_windows_have_the_same_size_and_no_token_twice(case: tuple) -> None:
    """They lie around their query, as far as the borders allow."""
    where, body = case
    high, wide = where.window(body)
    assert high * wide <= where.near
    rows, columns = where.grid or (1, body)
    keys = near_keys(torch.arange(body), where, body)
    assert keys.shape == (body, high * wide)
    for token, near in enumerate(keys.tolist()):
        assert len(set(near)) == high * wide
        if not near:
            continue
        assert 0 <= min(near) <= max(near) < body
        assert token in near
        for side, length, size in (
            (lambda key: key // columns, rows, high),
            (lambda key: key % columns, columns, wide),
        ):
            begin = min(map(side, near))
            assert begin == min(max(side(token) - size // 2, 0), length - size)
            assert {*map(side, near)} == set(range(begin, begin + size))


@settings(deadline=None)
@given(layouts())
def test_near_keys_of_a_run_are_bounded(case: tuple) -> None:
    """Those of four queries, and of a tile's, fit the places that the layout has for them; neighbours share theirs."""
    where, body = case
    order = torch.randperm(body) if where.by_content else position_order(where, body, CPU)
    for queries, most in ((SUBTILE, where.near_keys(body)), (where.tile, where.near_keys(body, where.tile))):
        unions = [near_keys(run, where, body).unique().numel() for run in order.split(queries)]
        assert max(unions) <= most <= body
        if not where.by_content and where.grid is None:
            assert most == min(where.window(body)[0] * where.window(body)[1] + queries - 1, body) * (where.near > 0)


def test_a_window_in_a_grid_by_hand() -> None:
    keys = near_keys(torch.tensor([0, 7, 14]), layout(grid=(3, 5), near=9), 15)
    assert keys[0].tolist() == [0, 1, 2, 5, 6, 7, 10, 11, 12]  # moved inwards at the border
    assert keys[1].tolist() == [1, 2, 3, 6, 7, 8, 11, 12, 13]
    assert keys[2].tolist() == [2, 3, 4, 7, 8, 9, 12, 13, 14]


# Budgets.


def test_a_budget_that_is_said_is_kept() -> None:
    where = Budget((5, 6), 2, 10, False, 9, 12, 7, 3).at(32, 8)
    assert where == layout(
        grid=(5, 6), prefix=2, tile=12, by_content=False, near=9, exact_keys=12, num_hidden=7, steps=3
    )
    small = Budget(None, 0, 64, True, 4, 99, 7, 2).at(10, 8)
    assert (small.tile, small.exact_keys, small.num_hidden) == (12, 10, 7)


@pytest.mark.parametrize("tokens", [1, 2, 64, 128])
def test_every_key_of_a_short_sequence_is_exact(tokens: int) -> None:
    assert BY_LENGTH.at(tokens, 64).exact_keys == tokens


@pytest.mark.parametrize("dim", [8, 32, 64, 128])
def test_budgets_by_length_grow_without_cliffs(dim: int) -> None:
    """One token more never means less, and never much more: keys and neurons by one step, tiles by one of four."""
    found = [BY_LENGTH.at(tokens, dim) for tokens in range(129, 20_000)]
    for before, after in itertools.pairwise(found):
        assert 0 <= after.exact_keys - before.exact_keys <= 1
        assert 0 <= after.near - before.near <= 1
        assert 0 <= after.num_hidden - before.num_hidden <= 8
        assert 0 <= after.tile - before.tile <= SUBTILE
    last = BY_LENGTH.at(10**6, dim)
    assert (last.near, last.exact_keys, last.num_hidden) == (4, 128, 64)
    assert all(where.tiles(129 + place) <= MOST_TILES for place, where in enumerate(found))
    assert last.tiles(10**6) <= MOST_TILES


def test_errors_of_keys_by_length() -> None:
    default = BY_LENGTH._replace(key_error=-20_000)
    errors = {tokens: default.at(tokens, 64).key_error for tokens in (128, 129, 200, 400, 5000)}
    assert errors == {128: 0, 129: 6_450, 200: 10_000, 400: 20_000, 5000: 20_000}
    assert default._replace(prefix=100).at(300, 64).key_error == 10_000
    assert BY_LENGTH._replace(key_error=20_000).at(200, 64).key_error == 20_000  # said, and so kept
    assert default.at(400, 64).least_error(400, 64) == pytest.approx(0.02 / 20)


def test_budgets_by_length_grow_with_its_root() -> None:
    """By hand, for heads of 64; narrower heads have less to tell apart, wider ones no more."""
    assert BY_LENGTH.at(400, 64) == layout(tile=20, near=3, exact_keys=48, num_hidden=32)  # the root is 20
    assert BY_LENGTH.at(1600, 64) == layout(tile=40, near=4, exact_keys=96, num_hidden=56)
    assert BY_LENGTH.at(1600, 16) == layout(tile=40, near=3, exact_keys=48, num_hidden=32)
    assert BY_LENGTH.at(1600, 256) == BY_LENGTH.at(1600, 64)
