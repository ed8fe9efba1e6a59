"""What a step costs in time and memory, with a memory of fixed size and with a full cache.

A step is the forward of one token. The last thousand steps before each length are timed, eight at a time: every eight
tokens a memory makes room, so that each of these times has its share of that. Between them the text is read in pieces.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

import astroattn
from astroattn import AstroConfig
from astroattn.ops.streaming import BLOCK
from astroattn.patching.streaming import StreamingLayer
from eval.common import rounded
from eval.generate.reading import ORIGINAL, OURS
from eval.generate.subjects import Subject

STEPS, FIRST = 1000, 1024  # steps that are timed; the shortest length, which doubles
PIECE = 512  # tokens that are read at once
ORIGINAL_MOST = 8192  # tokens, beyond which the original is not measured


def size_of(cache: DynamicCache) -> int:
    """Bytes of all tensors of a cache."""
    total = 0
    for layer in cache.layers:
        tensors = layer.memory or () if isinstance(layer, StreamingLayer) else (layer.keys, layer.values)
        total += sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))
    return total


def lengths_up_to(most: int) -> list[int]:
    """1,024 and its doubles, and the last itself."""
    doubles = [FIRST << power for power in range(most.bit_length()) if FIRST << power < most]
    return [*doubles, most]


def measure(subject: Subject, names: tuple[str, ...], tokens: tuple[int, ...], count: int | None) -> Iterator[Any]:
    """One row per budget and length up to the largest of `tokens`, the original's and ours; the rest is not asked.

    `step ms` is the median of the times; `growth` that over the one of the second length, when any memory is full.
    """
    lengths = lengths_up_to(max(tokens))
    yield from _measure(subject, ORIGINAL, 0, [length for length in lengths if length <= ORIGINAL_MOST])
    for entries in subject.budgets:
        with astroattn.patched(subject.model, AstroConfig(hidden="streaming", entries=entries)):
            yield from _measure(subject, OURS, entries, lengths)


@torch.inference_mode()
def _measure(subject: Subject, name: str, entries: int, lengths: list[int]) -> Iterator[dict[str, Any]]:
    text = torch.cat(subject.texts, 1)
    text = text.repeat(1, -(-max(lengths) // text.shape[1]))
    cache, done, steps = DynamicCache(), 0, []
    for length in tqdm(lengths, f"{subject.name}, {name} {entries or ''}", unit="length"):
        for start in range(done, length - STEPS, PIECE):
            subject.model(text[:, start : min(start + PIECE, length - STEPS)], past_key_values=cache, logits_to_keep=1)
        times = []
        for start in range(length - STEPS, length, BLOCK):
            begin = perf_counter()
            for place in range(start, start + BLOCK):
                subject.model(text[:, place : place + 1], past_key_values=cache)
            times.append((perf_counter() - begin) / BLOCK)
        done = length
        steps.append(statistics.median(times))
        yield rounded(
            {
                "model": subject.name,
                "tokens": length,
                "entries": entries,
                "cache": name,
                "step ms": 1000 * steps[-1],
                "growth": steps[-1] / steps[1] if len(steps) > 1 else None,
                "cache MB": size_of(cache) / 1e6,
            }
        )
