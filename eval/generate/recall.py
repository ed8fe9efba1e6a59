"""A needle: a number somewhere in a long text, asked for at the end.

    ... The magic number of Lisbon is 48213. ... Question: What is the magic number of Lisbon?
    Answer: The magic number of Lisbon is

What stands before and after it is a piece of one of the subject's texts. Of four ways to put it (plain, said twice, as
a question, as a chat) this is the one that the original answered best, for other numbers and places than those drawn
here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from eval.common import rounded
from eval.generate.reading import ORIGINAL, UNREAD, predict, read
from eval.generate.subjects import Subject

CITIES = ("Lisbon", "Oslo", "Nairobi", "Lima", "Hanoi", "Cairo", "Quito", "Dublin", "Prague", "Athens")
NEEDLE = "\n\nThe magic number of {city} is {number}.\n\n"
QUESTION = "\n\nQuestion: What is the magic number of {city}?\nAnswer: The magic number of {city} is "
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)  # where the needle is, as a share of the text
NEEDLES = 4


def measure(subject: Subject, names: tuple[str, ...], tokens: tuple[int, ...], count: int | None) -> Iterator[Any]:
    """One row per length, budget, cache and depth, the mean over `count` needles (None: 4).

    The first rows are the original's with its whole cache, and where the needle was never read: what a guess is worth.
    """
    seeds = range(count or NEEDLES)
    for length in tokens:
        for depth in (None, *DEPTHS):
            name = UNREAD if depth is None else ORIGINAL
            yield _score(subject, name, 0, length, depth, seeds)
        for entries in subject.budgets:
            for name in names:
                for depth in DEPTHS:
                    yield _score(subject, name, entries, length, depth, seeds)


def draw(subject: Subject, length: int, depth: float | None, seed: int) -> tuple[Tensor, int]:
    """A text [1, length] with a needle at this depth (None: without) that ends with the answer, of so many tokens."""
    assert subject.encode is not None
    drawn = random.Random(seed)
    city, number = drawn.choice(CITIES), drawn.randrange(10_000, 100_000)
    needle, question = (subject.encode(part.format(city=city, number=number)) for part in (NEEDLE, QUESTION))
    answer = subject.encode(str(number))
    room = length - len(needle) - len(question) - len(answer)
    text = subject.texts[seed % len(subject.texts)][0]
    start = drawn.randrange(len(text) - room + 1)
    filler = text[start : start + room].tolist()
    split = round((depth or 0) * room)
    told = [] if depth is None else needle
    return torch.tensor([[*filler[:split], *told, *filler[split:], *question, *answer]]), len(answer)


def _score(subject: Subject, name: str, entries: int, length: int, depth: float | None, seeds: range) -> dict[str, Any]:
    """A row: `log p` of the digits, each from the right ones before it, and how often the greedy answer is right.

    It is where each digit is the most likely one.
    """
    drawn = [draw(subject, length, depth, seed) for seed in seeds]
    states = read(subject, ORIGINAL if depth is None else name, entries, [text for text, _ in drawn])
    log_p, exact = 0.0, 0
    for (text, digits), mine in zip(drawn, states, strict=True):
        predictions, answer = predict(subject.model, mine[-digits - 1 : -1]), text[0, -digits:]
        log_p += float(predictions.gather(1, answer[:, None]).sum())
        exact += int((predictions.argmax(1) == answer).all())
    return rounded(
        {
            "model": subject.name,
            "tokens": length,
            "entries": entries,
            "cache": name,
            "depth": depth,
            "exact": exact / len(drawn),
            "log p": log_p / len(drawn),
            "scored": len(drawn),
        }
    )
