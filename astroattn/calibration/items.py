"""Which items choose a plan, and which verify it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from astroattn.fidelity.passes import count_items, take, token_mask

LEAST_ITEMS = 8  # that choose,
LEAST_TOKENS = 4096  # or so many tokens, whichever is more items;
LARGEST_SHARE = 4  # but at most one of so many, where the others have a tolerance to verify;
LARGER_SHARE = 2  # one of so many elsewhere: of a few items, one that chooses alone is no guide to others


@dataclass(frozen=True)
class Split:
    """The choosing items, one by one, with their tokens; and the batches of all others.

    `wanted` is how many items would choose were there enough of them.
    """

    choosing: list[Any]
    tokens: list[int]
    unseen: list[Any]
    wanted: int

    @property
    def verifying(self) -> int:
        """The number of items that verify."""
        return sum(count_items(batch) for batch in self.unseen)


def read(batches: Iterable[Any]) -> list[Any]:
    """All batches.

    Raises:
        ValueError: there are too few items to choose and to verify.
    """
    kept = list(batches)
    total = sum(count_items(batch) for batch in kept)
    if total < LARGEST_SHARE:
        raise ValueError(f"batches: {total} items; needs at least {LARGEST_SHARE}, as some of them choose")
    return kept


def split(batches: Sequence[Any], length: int, seed: int, share: int = LARGEST_SHARE) -> Split:
    """Divide the items of batches by a seed; `length` is the tokens of an item without a padding mask.

    At most one item of `share` chooses.
    """
    places = [(number, row) for number, batch in enumerate(batches) for row in range(count_items(batch))]
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed)).tolist()
    items: list[Any] = []
    tokens: list[int] = []
    most = len(places) // share
    seen = held = 0
    for place in order:
        number, row = places[place]
        item = take(batches[number], [row])
        mask = token_mask(item)
        count = length if mask is None else int(mask.sum())
        if seen >= LEAST_ITEMS and held + count > LEAST_TOKENS:
            break
        seen += 1
        held += count
        if len(items) < most:
            items.append(item)
            tokens.append(count)
    chosen = {places[place] for place in order[: len(items)]}
    unseen = []
    for number, batch in enumerate(batches):
        rows = [row for row in range(count_items(batch)) if (number, row) not in chosen]
        if rows:
            unseen.append(take(batch, rows))
    return Split(items, tokens, unseen, max(LEAST_ITEMS, LEAST_TOKENS * seen // max(held, 1)))
