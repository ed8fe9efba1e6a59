"""Tell whoever asks how many keys near + far attention has read exactly, where that is left to its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from astroattn.ops.layout import SUBTILE, Budget


class ExactKeys(NamedTuple):
    """The exact keys of the sub-tiles [B, H, S, P], -1 where one has fewer, of sequences of these lengths [B]."""

    budget: Budget
    keys: Tensor
    queries: int
    lengths: Tensor | None

    def numbers(self) -> Tensor:
        """The mean over the sub-tiles of each sequence and head [B, H], near keys included, the prefix not."""
        found = (self.keys >= 0).sum((2, 3)).double()
        if self.lengths is None or self.budget.cross:
            return found / -(-(self.queries - self.budget.prefix) // SUBTILE)
        subtiles = -(-(self.lengths - self.budget.prefix).clamp(min=1) // SUBTILE)
        return found / subtiles[:, None].to(found)


_listeners: list[Callable[[ExactKeys], None]] = []


@contextmanager
def listening(listener: Callable[[ExactKeys], None]) -> Iterator[None]:
    """Call it for every attention inside the block whose inputs decide."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def is_asked(budget: Budget) -> bool:
    """Whether anybody listens, and there is something to tell."""
    return bool(_listeners) and budget.key_error != 0


def tell(exact_keys: ExactKeys) -> None:
    """Call all who listen."""
    for listener in _listeners:
        listener(exact_keys)
