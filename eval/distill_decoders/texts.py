"""What decoders learn from: texts that are not among those reported, and two more to look at while they learn.

stories260K learns from stories that it makes up. SmolLM2-135M reads other modules of Python's library, other places of
its language reference, and AG News (`agnews/first3800.csv` in the folder that ASTROATTN_DATA names).
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from eval.common import data_folder
from eval.generate.subjects import ITEMS, LONGEST, MODULES, OTHER_MODULES, SHORT, Subject, read_items

STORIES, STORY_TOKENS, STORY_BATCH = 128, 448, 4
HELD_OUT = (4, 12)  # of the samples of SmolLM2: a place of the reference and a module
PLACES = 32  # in the language reference
LETTERS = 8  # of a token, at most: a text of so many has all the tokens that are wanted


@dataclass(frozen=True)
class Texts:
    """Batches [B, N] to learn from, and texts [1, N] that are neither learned from nor reported."""

    training: list[Tensor]
    held_out: list[Tensor]


def load_texts(subject: Subject, seed: int = 0) -> Texts:
    """The texts for a subject; stories are other ones for every seed."""
    if subject.encode is None:
        stories = write_stories(subject, len(HELD_OUT) + STORIES, seed)
        return Texts(list(stories[len(HELD_OUT) :].split(STORY_BATCH)), list(stories[: len(HELD_OUT)].split(1)))
    samples = subject.samples()
    return Texts([encode(subject, text) for text in read_training()], [samples[index] for index in HELD_OUT])


def encode(subject: Subject, text: str) -> Tensor:
    """The first tokens of a text [1, SHORT]."""
    assert subject.encode is not None
    return torch.tensor([subject.encode(text[: LETTERS * SHORT])[:SHORT]])


@torch.no_grad()
def write_stories(subject: Subject, count: int, seed: int) -> Tensor:
    """Stories [count, STORY_TOKENS] that the model makes up; not those that its plans were chosen on (seed 0 there)."""
    torch.manual_seed(1_000 + seed)
    model = subject.model
    begin = torch.full((count, 1), model.config.bos_token_id)
    size = {"min_new_tokens": STORY_TOKENS - 1, "max_new_tokens": STORY_TOKENS - 1}
    stories: Tensor = model.generate(begin, attention_mask=torch.ones_like(begin), do_sample=True, top_k=0, **size)
    return stories


def read_training() -> list[str]:
    """Modules, places of the reference and news, shuffled; each long enough, and none of a text that is reported."""
    texts = [*read_modules(), *read_reference(), *read_news()]
    random.Random(0).shuffle(texts)
    return texts


def read_modules() -> Iterator[str]:
    """Modules of the standard library but those reported or chosen on, in turn from their start and from their half."""
    found = 0
    for name in sorted(sys.stdlib_module_names - {*MODULES, *OTHER_MODULES}):
        spec = find_spec(name)
        if name.startswith("_") or spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            continue
        text = Path(spec.origin).read_text(encoding="utf-8")
        if len(text) >= 2 * LETTERS * SHORT:
            yield text[len(text) // 2 * (found % 2) :]
            found += 1


def read_reference() -> Iterator[str]:
    """Places of the language reference, away from those reported and chosen on."""
    from pydoc_data.topics import topics

    reference = "\n\n".join(topics[name] for name in sorted(topics))
    reported = [0, len(reference) // 2]
    for number in range(PLACES):
        place = (2 * number + 1) * len(reference) // (2 * PLACES)
        if not any(start <= place < start + LETTERS * LONGEST for start in reported):
            yield reference[place:]


def read_news() -> Sequence[str]:
    """News items, so many to a text."""
    folder = data_folder()
    if folder is None:
        raise ValueError("ASTROATTN_DATA is not set; it names the folder that has agnews/first3800.csv")
    items = read_items(folder)
    starts = range(0, len(items) - ITEMS + 1, 3 * ITEMS)
    return ["\n\n".join(items[start : start + ITEMS]) for start in starts]
