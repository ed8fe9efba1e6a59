"""What is lost of each text by itself: a mean over few texts hides which they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from eval.common import rounded
from eval.generate.reading import ORIGINAL, average, lose, read
from eval.generate.subjects import Subject


def measure(subject: Subject, names: tuple[str, ...], tokens: tuple[int, ...], count: int | None) -> Iterator[Any]:
    """One row per length, budget, cache and text, of the first `count` texts (None: all), from `Subject.start` on."""
    kinds = list(subject.kinds().items())[:count]
    for length in tokens:
        texts = [text[:, :length] for _, text in kinds]
        truth = read(subject, ORIGINAL, 0, texts)
        for entries in subject.budgets:
            for name in names:
                states = read(subject, name, entries, texts)
                for (kind, _), *each in zip(kinds, texts, truth, states, strict=True):
                    losses = lose(subject.model, *each)
                    place = {"model": subject.name, "text": kind, "tokens": length, "entries": entries, "cache": name}
                    yield rounded(place | average([losses], slice(subject.start + 1, length)))
