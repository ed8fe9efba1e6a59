"""Documents that ask at their beginning for a fact that stands far away, in pairs that have the same words.

"what colour is the key of anna?", then docstrings of Python's standard library, and among them, in the second half,
"the key of anna is red." and "the key of peter is blue.", in any order. The label is the colour. The other document of
the pair is the same but for the two colours, which are exchanged: whoever goes by which words, or which pairs of
neighbouring words, a document has answers both alike, and is right in one of them.

The question is further from both facts than six layers of a near field of 16 tokens reach together, so that what is
read right is read through the far field.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from torch import Tensor

from astroattn.data import PYTHON_DOCS, load_data

TOKENS, SHORT = 512, 48  # of a document; of those that nothing is far away in
COLOURS = ("red", "blue")  # by label
NAMES = (  # each one token; to train with, and others to measure with
    [
        *("anna", "peter", "maria", "john", "paul", "lucy", "emma", "jack", "henry", "alice"),
        *("martin", "clara", "david", "laura", "oscar", "ruth", "simon", "julia", "victor", "helen"),
    ],
    ["frank", "diana", "george", "nora", "walter", "irene", "hugo", "agnes", "felix", "edith"],
)
QUESTION, FACT = "what colour is the key of {}?", "the key of {} is {}."

Pair = tuple[list[int], list[int]]  # token ids; the labels are 0 and 1


@dataclass(frozen=True)
class Writer:
    """Writes pairs around filler."""

    encode: Callable[[str], list[int]]  # without special tokens
    names: Sequence[str]
    begin: int
    end: int

    def __call__(self, filler: Sequence[int], tokens: int, draw: random.Random) -> Pair:
        """A pair of so many tokens each, with the first of the filler."""
        asked, other = draw.sample(self.names, 2)
        question = self.encode(QUESTION.format(asked))
        facts = [[self.encode(FACT.format(name, colour)) for colour in COLOURS] for name in (asked, other)]
        room = tokens - 2 - len(question) - sum(len(fact[0]) for fact in facts)
        first, second = sorted(draw.randint(room // 2, room) for _ in range(2))
        turned, found = draw.random() < 0.5, []
        for label in (0, 1):
            one, two = facts[0][label], facts[1][1 - label]
            one, two = (two, one) if turned else (one, two)
            text = [*question, *filler[:first], *one, *filler[first:second], *two, *filler[second:room]]
            found.append([self.begin, *text, self.end])
        return found[0], found[1]

    def in_each(self, filler: Sequence[list[int]], tokens: int = TOKENS) -> dict[str, Tensor]:
        """A batch of a pair in each chunk, always the same."""
        return collate([self(chunk, tokens, random.Random(place)) for place, chunk in enumerate(filler)])


def make_writer(tokenizer: Any, names: Sequence[str]) -> Writer:
    """With a BERT's tokenizer."""
    return Writer(
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        names,
        tokenizer.cls_token_id,
        tokenizer.sep_token_id,
    )


def read_filler(tokenizer: Any, half: str) -> list[list[int]]:
    """Chunks of docstrings, of one half, without special tokens."""
    chunks = load_data(PYTHON_DOCS, "text", tokenizer=tokenizer, tokens=TOKENS, half=half).items
    return [chunk[1:-1] for chunk in chunks]


@dataclass(frozen=True)
class Lesson:
    """So many steps of so many documents, each of so many tokens."""

    tokens: int
    documents: int
    steps: int


@dataclass(frozen=True)
class Documents:
    """Batches of pairs, one lesson after the other, labels 0, 1, 0, 1, ... in each; the seed decides which pairs."""

    writer: Writer
    filler: Sequence[list[int]]
    lessons: Sequence[Lesson]
    seed: int

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        draw = random.Random(self.seed)
        for lesson in self.lessons:
            for _ in range(lesson.steps):
                fillers = draw.choices(self.filler, k=lesson.documents // 2)
                yield collate([self.writer(filler, lesson.tokens, draw) for filler in fillers])

    def __len__(self) -> int:
        return sum(lesson.steps for lesson in self.lessons)

    def count(self) -> int:
        """Documents in all."""
        return sum(lesson.documents * lesson.steps for lesson in self.lessons)


def collate(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """A batch as the model takes it."""
    return {"input_ids": torch.tensor([ids for pair in pairs for ids in pair])}


def labels_of(batch: dict[str, Tensor]) -> Tensor:
    """Of pairs side by side."""
    return torch.arange(len(batch["input_ids"])) % 2


def read_words(training: dict[str, Tensor], measured: dict[str, Tensor]) -> list[int]:
    """What TF-IDF of tokens and pairs of tokens, and a logistic regression, take the labels for."""
    texts = [[" ".join(map(str, ids)) for ids in part["input_ids"].tolist()] for part in (training, measured)]
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\d+")
    model = make_pipeline(vectors, LogisticRegression(C=10))
    found: list[int] = model.fit(texts[0], labels_of(training).tolist()).predict(texts[1]).tolist()
    return found
