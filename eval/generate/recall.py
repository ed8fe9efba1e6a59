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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eval.common import rounded
from eval.generate.reading import ORIGINAL, UNREAD, predict, read
from eval.generate.subjects import Subject

CITIES = ("Lisbon", "Oslo", "Nairobi", "Lima", "Hanoi", "Cairo", "Quito", "Dublin", "Prague", "Athens")
NEEDLE = "\n\nThe magic number of {city} is {number}.\n\n"
QUESTION = "\n\nQuestion: What is the magic number of {city}?\nAnswer: The magic number of {city} is "
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.95)  # where the needle is, as a share of the text; last among the newest tokens
NEEDLES = 4


class Needle(NamedTuple):
    """A text [1, N] with a needle at this depth, or None, whose last tokens are the digits of the answer."""

    depth: float | None
    text: Tensor
    digits: int


def measure(subject: Subject, names: tuple[str, ...], tokens: tuple[int, ...], count: int | None) -> Iterator[Any]:
    """One row per length, budget, cache and depth, the mean over `count` needles (None: 4).

    The first rows are the original's with its whole cache, and where the needle was never read: what a guess is worth.
    """
    for length in tokens:
        seeds = range(count or NEEDLES)
        told = [draw(subject, length, depth, seed) for depth in DEPTHS for seed in seeds]
        untold = [draw(subject, length, None, seed) for seed in seeds]
        yield from _score(subject, UNREAD, 0, untold)
        yield from _score(subject, ORIGINAL, 0, told)
        for entries in subject.budgets:
            for name in names:
                yield from _score(subject, name, entries, told)


def draw(subject: Subject, length: int, depth: float | None, seed: int) -> Needle:
    """A needle of this seed in a text of so many tokens, or the question alone."""
    assert subject.encode is not None
    drawn = random.Random(seed)
    city, number = drawn.choice(CITIES), drawn.randrange(10_000, 100_000)
    needle, question = (subject.encode(part.format(city=city, number=number)) for part in (NEEDLE, QUESTION))
    answer = subject.encode(str(number))
    needle = [] if depth is None else needle
    room = length - len(needle) - len(question) - len(answer)
    text = subject.texts[seed % len(subject.texts)][0]
    start = drawn.randrange(len(text) - room + 1)
    filler = text[start : start + room].tolist()
    split = round((depth or 0) * room)
    text = torch.tensor([[*filler[:split], *needle, *filler[split:], *question, *answer]])
    return Needle(depth, text, len(answer))


def _score(subject: Subject, name: str, entries: int, needles: list[Needle]) -> Iterator[dict[str, Any]]:
    """A row per depth."""
    states = read(subject, ORIGINAL if name == UNREAD else name, entries, [needle.text for needle in needles])
    place = {"model": subject.name, "tokens": needles[0].text.shape[1], "entries": entries, "cache": name}
    for row in score(subject.model, needles, states):
        yield rounded(place | row)


def score(model: nn.Module, needles: list[Needle], states: list[Tensor]) -> Iterator[dict[str, Any]]:
    """By depth `log p` of the digits, each from the right ones before it, and how often all were likeliest ("exact").

    Then the greedy answer is the right one. `states` are the last hidden states [N, C] of the needles' texts.
    """
    scores: dict[float | None, list[tuple[float, bool]]] = {}
    for needle, mine in zip(needles, states, strict=True):
        predictions, answer = predict(model, mine[-needle.digits - 1 : -1]), needle.text[0, -needle.digits :]
        log_p = float(predictions.gather(1, answer[:, None]).sum())
        scores.setdefault(needle.depth, []).append((log_p, bool((predictions.argmax(1) == answer).all())))
    for depth, found in scores.items():
        log_p, exact = (sum(each) / len(found) for each in zip(*found, strict=True))
        yield {"depth": depth, "exact": exact, "log p": log_p, "scored": len(found)}
