"""What somebody may have meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def suggest(word: object, known: Iterable[str]) -> str:
    """`; did you mean 'this'?` where one of the words that are known is like it, else nothing."""
    close = get_close_matches(str(word), list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""
