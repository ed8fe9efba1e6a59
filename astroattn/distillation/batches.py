"""The batches of a training: in what order, from where on, and which are held out."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from astroattn.fidelity.passes import count_items, to_model

ONE_OF, MOST = 10, 16  # of a sequence one batch in ten is held out, but no more than so many
FIRST = 4  # of other iterables so many, the first
LABELS = ("label", "labels", "label_ids")
NOT_INPUTS = "expected a tensor, a mapping of keyword inputs, or a pair of one of them and its labels [B]"

Position = tuple[int, int]  # passes that are over, and batches taken since


class Ended(Exception):
    """There are no more batches."""


class _Item(NamedTuple):
    batch: Any
    position: Position  # behind it


class Source:
    """Batches one after another, those held out left out, from a position on.

    A sequence is taken in an order of its own in every pass, which the seed says; an iterable as it comes, again and
    again; an iterator once. No more is held than the batches held out, those looked at in advance, and one step's.

    Raises:
        TypeError, ValueError: no iterable of several batches, or too few of them.
    """

    def __init__(self, batches: Iterable[Any], held_out: Iterable[Any] | None, seed: int, position: Position) -> None:
        if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
            raise TypeError(
                f"batches: {type(batches).__name__}; expected several inputs of the model, for example a list"
            )
        self.batches, self.given, self.seed, self.position = batches, held_out, seed, position
        self._passes, self._place = position
        self._ahead: deque[_Item] = deque()
        self._taken: list[_Item] = []
        self._once = iter(batches) is batches
        self._left_out = 0
        if held_out is not None:
            self.held_out = list(held_out)
            if not self.held_out:
                raise ValueError("held_out: no batches; needs at least 1")
        elif isinstance(batches, Sequence):
            self._left_out = min(MOST, max(1, len(batches) // ONE_OF))
            self.held_out = [batches[i] for i in range(max(0, len(batches) - self._left_out), len(batches))]
        else:
            self._left_out = FIRST
            self.held_out = []
        least = self._left_out + 1
        if isinstance(batches, Sequence):
            if len(batches) < least:
                held = ", one to train on and one held out" if self._left_out else ""
                raise ValueError(f"batches: {len(batches)}; needs at least {least}{held}")
            self._now = self._shuffled()
        else:
            self._now = self._stream(first=True)
            try:
                self.look(1)
            except Ended:
                raise ValueError(
                    f"batches: too few; needs at least {least}, {self._left_out} of them held out"
                ) from None

    def take(self) -> Any:
        """The next batch, which is only lent until `keep` or `give_back`.

        Raises:
            Ended: there is none.
        """
        found = self._ahead.popleft() if self._ahead else self._draw()
        if found is None:
            raise Ended
        self._taken.append(found)
        return found.batch

    def keep(self) -> None:
        """What was taken is used up."""
        self.position = self._taken[-1].position
        self._taken.clear()

    def give_back(self) -> None:
        """What was taken since the last `keep` comes again."""
        self._ahead.extendleft(reversed(self._taken))
        self._taken.clear()

    def look(self, count: int) -> list[Any]:
        """The next batches of this pass, up to so many, which stay.

        Raises:
            Ended: there is none.
        """
        while len(self._ahead) < count:
            found = self._draw(again=not self._ahead)
            if found is None:
                break
            self._ahead.append(found)
        if not self._ahead:
            raise Ended
        return [each.batch for each in list(self._ahead)[:count]]

    def _draw(self, *, again: bool = True) -> _Item | None:
        """The next batch, with `again` of the next pass where this one is over; None: there is none."""
        found = next(self._now, None)
        if found is None and again and not self._once and self._place:
            self._passes, self._place = self._passes + 1, 0
            self._now = self._shuffled() if isinstance(self.batches, Sequence) else self._stream(first=False)
            found = next(self._now, None)
        if found is None:
            return None
        self._place += 1
        return _Item(found[0], (self._passes, self._place))

    def _shuffled(self) -> Iterator[tuple[Any]]:
        assert isinstance(self.batches, Sequence)
        generator = torch.Generator().manual_seed((self.seed + self._passes * 1_000_003) % 2**63)
        order = torch.randperm(len(self.batches) - self._left_out, generator=generator).tolist()
        for index in order[self._place :]:
            yield (self.batches[index],)

    def _stream(self, *, first: bool) -> Iterator[tuple[Any]]:
        come = iter(self.batches)
        head = [each for _, each in zip(range(self._left_out), come, strict=False)]
        if first and self._left_out:
            self.held_out = head
        elif not _same(head, self.held_out[: len(head)]) and self._left_out:
            warnings.warn(
                "batches: they come in another order in every pass, so the batches held out of the first are trained "
                "on in the next, and the report is of them; held_out= takes others",
                stacklevel=2,
            )
        for _ in range(self._place if first and not self._once else 0):  # before it was saved
            next(come, None)
        for each in come:
            yield (each,)


def read_inputs(model: nn.Module, batch: Any) -> Any:
    """What of a batch the model takes: no labels, on its device, floating point in its dtype.

    Raises:
        TypeError, ValueError: a batch that is none, or without rows.
    """
    if isinstance(batch, (tuple, list)):
        batch = _first_of(batch)
    if not isinstance(batch, (Tensor, Mapping)):
        raise TypeError(f"batches: one is a {type(batch).__name__}; {NOT_INPUTS}")
    if isinstance(batch, Mapping):
        batch = {name: value for name, value in batch.items() if name not in LABELS}
    count_items(batch)
    return to_model(model, batch)


def _first_of(batch: Sequence[Any]) -> Any:
    """The inputs of a pair; a second part that is more than one label a row may be a mask, which must not be lost."""
    if not batch or len(batch) > 2 or not isinstance(batch[0], (Tensor, Mapping)):
        raise TypeError(f"batches: one is a {type(batch).__name__} of {len(batch)}; {NOT_INPUTS}")
    if len(batch) == 2 and isinstance(batch[1], Tensor) and batch[1].ndim > 1:
        raise TypeError(f"batches: one is a pair whose second part is {tuple(batch[1].shape)}; {NOT_INPUTS}")
    return batch[0]


def _same(some: Any, others: Any) -> bool:
    """Whether two batches, or lists of them, are equal."""
    if isinstance(some, Tensor):
        return isinstance(others, Tensor) and torch.equal(some, others)
    if isinstance(some, Mapping):
        return some.keys() == others.keys() and all(_same(some[name], others[name]) for name in some)
    if isinstance(some, Sequence) and not isinstance(some, str):
        return len(some) == len(others) and all(map(_same, some, others))
    return bool(some == others)
