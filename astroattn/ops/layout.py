"""How a sequence is cut into tiles of queries, and how many keys and neurons each of them has: plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import Any, NamedTuple

from torch import Tensor

SUBTILE = 4  # queries that attend to the same keys
CANDIDATES = 3  # keys that a tile proposes, for each that one of its sub-tiles takes
LEAST_BODY = 128  # tokens up to which, where the length decides, softmax attention costs no more
LEAST_QUERIES = 128  # of another sequence, below which softmax attention is faster than the choice among the keys
MOST_TILES = 128  # of a sequence
# Where the length decides: so much times a root, within bounds.
HIDDEN_PER_ROOT, MOST_HIDDEN = 1.45, 64
KEYS_PER_ROOT, MOST_KEYS = 2.4, 128
LONG_BODY = 400  # tokens from which on keys may be off by as much as ever; in shorter ones keys are few and cost little
MOST_OFTEN = 3  # times as many keys at most, and a quarter of all, where their errors decide how many
NEAR_PER_ROOT, LEAST_NEAR, MOST_NEAR = 0.15, 3, 4
WIDTH = 64  # of a head; narrower ones have less to tell apart
ROOT = -1  # of a number that the length decides
HALF_ROOT = -2  # half of that


@dataclass(frozen=True)
class Layout:
    """What attention does with the n = N - prefix tokens of the body of a sequence.

    As many queries as keys, or those of another sequence (cross attention), without a grid, prefix or near field then.

    Attributes:
        grid: (rows, columns) of the body, or None for a sequence.
        prefix: tokens before the body; they are outside the tiles, attend exactly to all tokens, and are exact keys of
            every query.
        tile: queries in a tile, a multiple of `SUBTILE`. Where the body is no multiple of it, the last tile has fewer.
        by_content: whether the tiles hold queries that ask for the same, or neighbours whatever they ask for.
        near: the nearest keys of each query, which its sub-tile attends exactly.
        exact_keys: the most others that a sub-tile chooses.
        num_hidden: m, hidden neurons for the rest; 0 leaves the rest out.
        steps: Hebbian learning steps.
        key_error: in millionths, times the root of the length: what reading a key through its cluster adds to the error
            of the output at least, if it is chosen, as expected and relative to how far values are apart. 0: as many
            are chosen as may be.
    """

    grid: tuple[int, int] | None
    prefix: int
    tile: int
    by_content: bool
    near: int
    exact_keys: int
    num_hidden: int
    steps: int
    key_error: int = 0

    def tiles(self, asked: int) -> int:
        """Number of tiles T of so many queries behind the prefix."""
        return -(-asked // self.tile)

    def subtiles(self) -> int:
        """Sub-tiles of a tile."""
        return self.tile // SUBTILE

    def window(self, body: int) -> tuple[int, int]:
        """Rows and columns of the near field of a query."""
        if self.grid is None:
            return min(self.near, 1), min(self.near, body)
        return near_shape(self.near, *self.grid)

    def near_keys(self, body: int, queries: int = SUBTILE) -> int:
        """Most near keys of a run of so many queries in the order of their tiles: neighbours share theirs."""
        high, wide = self.window(body)
        if self.by_content or high * wide == 0:
            return min(queries * high * wide, body)
        if self.grid is None:
            return min(queries - 1 + wide, body)
        return most_near(*self.grid, high, wide, queries)

    def all_subtiles(self, asked: int) -> int:
        """Sub-tiles of so many queries behind the prefix, S."""
        return -(-asked // SUBTILE)

    def most_keys(self, body: int) -> int:
        """Most exact keys of a sub-tile P, those of the prefix not counted."""
        return self.near_keys(body) + self.exact_keys

    def union(self, body: int) -> int:
        """Most exact keys of all sub-tiles of a tile."""
        chosen = self.candidates(body) + self.near_keys(body, self.tile)
        return min(chosen, self.subtiles() * self.most_keys(body), body)

    def least_error(self, body: int, dim: int) -> float:
        """What reading a key of a head of this dimension through its cluster has to add to the error, to be chosen."""
        return self.key_error / 1e6 / _root(body, dim)

    def candidates(self, body: int) -> int:
        """Keys that a tile proposes to its sub-tiles."""
        return min(CANDIDATES * self.exact_keys, body)


class Budget(NamedTuple):
    """A layout in which some numbers are left to the length of each sequence: plain values, as operators take them.

    Attributes as in `Layout`; tile, near, exact_keys and num_hidden may be `ROOT`, the last two also `HALF_ROOT`.
    Queries that are asked for in tiles of another size than a multiple of `SUBTILE` get the next larger one.
    cross: whether the queries are those of another sequence.
    key_error: as in `Layout`, of sequences in which not all keys are exact anyway; negative: so much from `LONG_BODY`
        tokens behind the prefix on, and in shorter sequences less in proportion to them.
    """

    grid: tuple[int, int] | None
    prefix: int
    tile: int
    by_content: bool
    near: int
    exact_keys: int
    num_hidden: int
    steps: int
    cross: bool = False
    key_error: int = 0

    def asked(self, tokens: int, queries: int) -> int:
        """How many queries are behind the prefix; so many are those of another sequence, if they are."""
        return queries if self.cross else tokens - self.prefix

    def most_keys(self, tokens: int, dim: int, queries: int, lengths: Tensor | None) -> int:
        """Most exact keys of a sub-tile in any sequence of a batch: one of up to 128 tokens may have more."""
        layout, body = self.at(tokens, dim, queries), tokens - self.prefix
        if lengths is None or self.exact_keys >= 0:
            return layout.most_keys(body)
        return layout.near_keys(body) + max(layout.exact_keys, min(body, LEAST_BODY))

    def at(self, tokens: int, dim: int, queries: int = 0) -> Layout:
        """The layout of a sequence of so many tokens, more than those of the prefix, in a head of this dimension.

        Where the length decides, the numbers grow with its square root up to their bounds, and the time of a query with
        them; so the time of a sequence grows as n^1.5, its memory linearly. Up to 128 tokens every key is exact.

        Args:
            queries: how many there are, for cross attention.
        """
        body, asked = tokens - self.prefix, self.asked(tokens, queries)
        root = _root(body, dim)
        tile, near, keys, hidden = self.tile, self.near, self.exact_keys, self.num_hidden
        if tile == ROOT:
            tile = max(round(body**0.5), -(-asked // MOST_TILES))
        if near == ROOT:
            near = min(max(round(NEAR_PER_ROOT * root), LEAST_NEAR), MOST_NEAR)
        key_error = self.key_error
        if key_error < 0:
            key_error = -key_error * min(body, LONG_BODY) // LONG_BODY
        if keys < 0 and body <= LEAST_BODY:
            keys, key_error = body, 0
        elif keys < 0:
            most = min(round(KEYS_PER_ROOT * root), MOST_KEYS)
            keys = (max(most, min(MOST_OFTEN * most, body // 4)) if key_error else most) // -keys
        if hidden < 0:
            hidden = min(max(8 * round(HIDDEN_PER_ROOT * root / -hidden / 8), 8), MOST_HIDDEN // -hidden)
        tile = SUBTILE * min(max(-(-tile // SUBTILE), 1), -(-asked // SUBTILE))
        keys = min(keys, body)
        return Layout(self.grid, self.prefix, tile, self.by_content, near, keys, hidden, self.steps, key_error)


def _root(body: int, dim: int) -> float:
    """Of the length, less where heads are narrow; not sqrt, which a graph for any length could not trace."""
    root: float = (body * min(dim / WIDTH, 1)) ** 0.5
    return root


def near_shape(near: int, rows: int, columns: int) -> tuple[int, int]:
    """The most square rectangle of at most `near` patches inside the grid."""
    height = min(isqrt(near), rows)
    if height == 0:
        return 0, 0
    width = min(near // height, columns)
    return min(near // width, rows), width


@lru_cache(maxsize=64)
def z_curve(rows: int, columns: int) -> tuple[int, ...]:
    """The patches of a grid along a Z-curve: where rows and columns are even, each run of four is a square."""

    def place(token: int) -> int:
        row, column = divmod(token, columns)
        sides = max(rows, columns).bit_length()
        return sum((column >> bit & 1) << 2 * bit | (row >> bit & 1) << 2 * bit + 1 for bit in range(sides))

    return tuple(sorted(range(rows * columns), key=place))


@lru_cache(maxsize=64)
def most_near(rows: int, columns: int, high: int, wide: int, queries: int) -> int:
    """Most patches in the windows of a run of so many queries along the Z-curve of a grid."""
    order, most = z_curve(rows, columns), 0
    for begin in range(0, len(order), queries):
        held: set[int] = set()
        for token in order[begin : begin + queries]:
            row, column = divmod(token, columns)
            top = min(max(row - high // 2, 0), rows - high)
            left = min(max(column - wide // 2, 0), columns - wide)
            for line in range(top, top + high):
                held.update(range(line * columns + left, line * columns + left + wide))
        most = max(most, len(held))
    return most


@lru_cache(maxsize=64)
def cuts(body: int, tile: int) -> tuple[tuple[int, ...], ...]:
    """Where each level of a balanced tree cuts a run of tokens: first into tiles, then those into sub-tiles.

    Returns:
        For each level the beginnings of its nodes, 0 first. Every cut is at a multiple of the tile, or of the sub-tile
        within a tile, as near to the middle of the node as that allows.
    """
    levels = [[0]]
    for unit in (tile, SUBTILE):
        while True:
            begins = levels[-1]
            ends = [*begins[1:], body]
            units = [-(-(end - begin) // unit) for begin, end in zip(begins, ends, strict=True)]
            if max(units) == 1:
                break
            middles = [begin + (count + 1) // 2 * unit for begin, count in zip(begins, units, strict=True) if count > 1]
            levels.append(sorted([*begins, *middles]))
    return tuple(map(tuple, levels))


def plain(size: Any) -> Any:
    """A size as a number; while `torch.jit.trace` records, those of shapes are tensors."""
    return int(size) if isinstance(size, Tensor) else size
