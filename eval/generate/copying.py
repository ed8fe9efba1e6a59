"""A passage that comes twice: what of it a memory has kept to the second time, so many tokens after the first.

    lead, passage, gap, passage

A decoder that still has the passage quotes it, and predicts it far better than at first sight. Tokens that were merged
cannot be quoted. Passage, and lead and gap, are pieces of two of the subject's texts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from eval.common import rounded
from eval.generate.reading import ORIGINAL, UNREAD, average, lose, read
from eval.generate.subjects import Subject

LEAD, PASSAGE, PASSAGES = 32, 64, 8


def measure(subject: Subject, names: tuple[str, ...], tokens: tuple[int, ...], count: int | None) -> Iterator[Any]:
    """One row per gap (`tokens`), budget and cache: the loss on the second passage, the mean of `count` (None: 8).

    The first row of a gap is the original's where another passage came before: all that reading it is worth. `lost` is
    the share of that which a cache loses.
    """
    for gap in tokens:
        texts = [draw(subject, gap, seed) for seed in range(count or PASSAGES)]
        truth = read(subject, ORIGINAL, 0, texts)
        others = [draw(subject, gap, seed, repeated=False) for seed in range(count or PASSAGES)]
        unread = _score(subject, UNREAD, 0, texts, truth, read(subject, ORIGINAL, 0, others), gap)
        yield rounded(unread | {"lost": 1.0})
        for entries in subject.budgets:
            for name in names:
                states = read(subject, name, entries, texts)
                row = _score(subject, name, entries, texts, truth, states, gap)
                yield rounded(row | {"lost": row["nats above"] / unread["nats above"]})


def draw(subject: Subject, gap: int, seed: int, repeated: bool = True) -> Tensor:
    """Such a text [1, LEAD + PASSAGE + gap + PASSAGE]; if it is not `repeated` the first passage is another one."""
    drawn = random.Random(seed)
    ours, other = (subject.texts[(seed + step) % len(subject.texts)][0] for step in (0, 1))

    def piece(text: Tensor, count: int) -> Tensor:
        start = drawn.randrange(len(text) - count + 1)
        return text[start : start + count]

    passage, lead, between = piece(ours, PASSAGE), piece(other, LEAD), piece(other, gap)
    first = passage if repeated else piece(other, PASSAGE)
    return torch.cat([lead, first, between, passage])[None]


def _score(
    subject: Subject, name: str, entries: int, texts: list[Tensor], truth: list[Tensor], states: list[Tensor], gap: int
) -> dict[str, Any]:
    losses = [
        lose(subject.model, text[:, -PASSAGE:], theirs[-PASSAGE:], mine[-PASSAGE:])
        for text, theirs, mine in zip(texts, truth, states, strict=True)
    ]
    place = {"model": subject.name, "tokens": texts[0].shape[1], "entries": entries, "cache": name, "gap": gap}
    return place | average(losses, slice(1, PASSAGE))  # that the passage begins cannot be known
