"""What is lost at which distance from the start of a text: whether it grows as the text goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from eval.common import rounded
from eval.generate.reading import ORIGINAL, average, lose, read
from eval.generate.subjects import Subject

BUCKETS = 16


def measure(subject: Subject, names: tuple[str, ...], tokens: tuple[int, ...], count: int | None) -> Iterator[Any]:
    """One row per length, budget, cache and sixteenth of `count` texts (None: all), from its token `from` on."""
    for length in tokens:
        texts = [text[:, :length] for text in subject.texts[:count]]
        truth = read(subject, ORIGINAL, 0, texts)
        width = length // BUCKETS
        for entries in subject.budgets:
            for name in names:
                states = read(subject, name, entries, texts)
                losses = [lose(subject.model, *each) for each in zip(texts, truth, states, strict=True)]
                place = {"model": subject.name, "tokens": length, "entries": entries, "cache": name}
                for start in range(0, width * BUCKETS, width):
                    yield rounded(place | {"from": start} | average(losses, slice(start, start + width)))
