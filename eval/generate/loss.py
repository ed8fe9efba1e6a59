"""How much worse the next token is predicted, on texts of one or several lengths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from eval.common import rounded
from eval.generate.reading import ORIGINAL, average, lose, read
from eval.generate.subjects import Subject

SHORT = 1024  # up to so many tokens are scored from `Subject.start`, longer texts from half


def measure(subject: Subject, names: tuple[str, ...], tokens: tuple[int, ...], count: int | None) -> Iterator[Any]:
    """One row per budget, length and cache, the mean over all scored tokens of `count` texts (None: all).

    No cache knows the future, so a text is read once, at its full length. That is done with the largest budget; the
    others read the shortest length.
    """
    whole = read(subject, ORIGINAL, 0, [text[:, : max(tokens)] for text in subject.texts[:count]])
    for entries in subject.budgets:
        lengths = sorted(tokens)[: len(tokens) if entries == max(subject.budgets) else 1]
        texts = [text[:, : lengths[-1]] for text in subject.texts[:count]]
        truth = [states[: lengths[-1]] for states in whole]
        for name in names:
            states = read(subject, name, entries, texts)
            losses = [lose(subject.model, *each) for each in zip(texts, truth, states, strict=True)]
            for length in lengths:
                # the prediction after token `first` is the first that counts
                first = subject.start if length <= SHORT else length // 2
                place = {"model": subject.name, "tokens": length, "entries": entries, "cache": name}
                yield rounded(place | average(losses, slice(first + 1, length)))
