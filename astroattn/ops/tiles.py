"""Where the tiles of queries lie, and which keys are near each of them: indices only, no attention."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How the tokens of a sequence lie, and how many of them a query attends to exactly.

    Attributes:
        grid: (rows, columns) of the last rows * columns tokens, or None for a sequence.
        prefix: tokens before the grid or sequence; they are outside the tiles, attend exactly to all tokens, and
            are exact keys of every tile.
        tile, near, exact_keys, groups: as in `AstroConfig`.
        lengths: real tokens of each sequence [Z], which come first; None: all are real. Not with a grid.
    """

    grid: tuple[int, int] | None
    prefix: int
    tile: int
    near: int
    exact_keys: int
    groups: int
    lengths: Tensor | None = None

    def body_lengths(self) -> Tensor | None:
        """Real tokens after the prefix [Z]."""
        return None if self.lengths is None else (self.lengths - self.prefix).clamp(min=0)

    def real(self, num_tokens: int) -> Tensor | None:
        """Which tokens are real [Z, N]."""
        return None if self.lengths is None else real_tokens(num_tokens, self.lengths)


def real_tokens(num_tokens: int, lengths: Tensor) -> Tensor:
    """True for the first `lengths` tokens [Z, N]."""
    return torch.arange(num_tokens, device=lengths.device) < lengths[:, None]


@dataclass(frozen=True)
class Tiles:
    """Tiles of N tokens. Leading size 1 where all sequences share the layout, Z where their lengths differ.

    Attributes:
        slots: token in each slot of each tile [T, t]; slots past the last token repeat a token and are masked.
        slot_mask: True where a slot holds a real token [1 or Z, T, t].
        inverse: slot (of T * t) of each token [N].
        near: keys near each tile [1 or Z, T, W].
        near_mask: True where such a key is real [1 or Z, T, W].
        group: the group of each tile [1 or Z, T]; the tiles of a group choose their exact keys together.
        num_groups: R.
    """

    slots: Tensor
    slot_mask: Tensor
    inverse: Tensor
    near: Tensor
    near_mask: Tensor
    group: Tensor
    num_groups: int

    @property
    def shared(self) -> bool:
        """Whether tiles may have to share a group."""
        return self.num_groups < len(self.slots)

    def of_group(self, per_group: Tensor) -> Tensor:
        """What each tile has from its group: [1 or Z, R, ...] -> [1 or Z, T, ...]."""
        if not self.shared:
            return per_group
        size = max(len(per_group), len(self.group))
        index = self.group.expand(size, -1).reshape(size, -1, *[1] * (per_group.dim() - 2))
        per_group = per_group.expand(size, *per_group.shape[1:])
        return per_group.gather(1, index.expand(-1, -1, *per_group.shape[2:]))

    def sum_groups(self, per_tile: Tensor) -> Tensor:
        """Sum over the tiles of each group: [1 or Z, T, C] -> [1 or Z, R, C]."""
        if not self.shared:
            return per_tile
        size = max(len(per_tile), len(self.group))
        index = self.group.expand(size, -1)[..., None].expand(-1, -1, per_tile.shape[-1])
        sums = per_tile.new_zeros(size, self.num_groups, per_tile.shape[-1])
        return sums.scatter_add(1, index, per_tile.expand_as(index))


def tile_shape(tile: int, rows: int, columns: int) -> tuple[int, int]:
    """The most square rectangle of `tile` patches: 4 is 2 x 2, 8 is 2 x 4; a run of tokens when there is one row."""
    if rows == 1:
        return 1, min(tile, columns)
    height = next(side for side in range(isqrt(tile), 0, -1) if tile % side == 0)
    return min(height, rows), min(tile // height, columns)


def cut(tile: int, rows: int, columns: int) -> tuple[int, int, int, int]:
    """Height and width of the tiles of a grid, and how many lie below one another and side by side."""
    high, wide = tile_shape(tile, rows, columns) if tile < rows * columns else (rows, columns)
    return high, wide, -(-rows // high), -(-columns // wide)


def near_shape(near: int, rows: int, columns: int) -> tuple[int, int]:
    """The most square rectangle of at most `near` patches inside the grid."""
    height = min(isqrt(near), rows)
    if height == 0:
        return 0, 0
    width = min(near // height, columns)
    return min(near // width, rows), width


def make_tiles(layout: Layout, num_tokens: int, device: torch.device) -> Tiles:
    """Cut the tokens after the prefix into tiles (a sequence is a grid of one row) and give each its near field.

    The near field is a window of constant size around the tile, moved inwards at the borders, so that every query has
    the same number of near keys and a window as large as the grid holds all of it.
    """
    rows, columns = layout.grid or (1, num_tokens - layout.prefix)
    tile, near, lengths = layout.tile, layout.near, layout.body_lengths()
    high, wide, down, across = cut(tile, rows, columns)
    tiles = torch.arange(down * across, device=device)
    top, left = tiles // across * high, tiles % across * wide

    slot_row = top[:, None, None] + torch.arange(high, device=device)[:, None]
    slot_column = left[:, None, None] + torch.arange(wide, device=device)
    inside = ((slot_row < rows) & (slot_column < columns)).flatten(1)
    slots = (slot_row.clamp(max=rows - 1) * columns + slot_column.clamp(max=columns - 1)).flatten(1)
    token = torch.arange(rows * columns, device=device)
    row, column = token // columns, token % columns
    tile_of_token, place = row // high * across + column // wide, row % high * wide + column % wide
    inverse = tile_of_token * (high * wide) + place

    window_high, window_wide = near_shape(near, rows, columns)
    first_row = (top + (high - window_high) // 2).clamp(0, rows - window_high)
    ends = torch.full((1, 1), columns, device=device) if lengths is None else lengths[:, None]
    # Around what the tile holds: a tile longer than its sequence has the same window however long the padding is.
    middle = left + ((ends - left).clamp(max=wide) - window_wide) // 2
    first_column = torch.minimum(middle, ends - window_wide).clamp(min=0)
    near_row = first_row[:, None] + torch.arange(window_high, device=device)
    near_column = first_column[..., None] + torch.arange(window_wide, device=device)
    near_index = (near_row[:, :, None] * columns + near_column[..., None, :]).flatten(2)
    near_mask = (near_column < ends[..., None])[..., None, :].expand(-1, -1, window_high, -1).flatten(2)

    slot_mask = inside[None]
    count = torch.full((1, 1), len(tiles), device=device)
    if lengths is not None:
        slot_mask = slot_mask & (slots < lengths[:, None, None])
        near_mask = near_mask & slot_mask.any(-1, keepdim=True)  # a tile of padding has no window
        count = (-(-lengths[:, None] // slots.shape[1])).clamp(min=1)
    num_groups = min(layout.groups, len(tiles))
    # A sequence of few tiles has one group a tile whatever the batch it is padded in.
    group = torch.where(count <= num_groups, tiles, tiles * num_groups // count).clamp(max=num_groups - 1)
    return Tiles(slots, slot_mask, inverse, near_index, near_mask, group, num_groups)
