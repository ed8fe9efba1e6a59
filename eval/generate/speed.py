"""What a step costs in time and memory, streaming and with a full cache, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

import astroattn
from astroattn import AstroConfig
from astroattn.patching.streaming import StreamingLayer
from eval.common import rounded
from eval.generate.subjects import Subject

CHUNK = 512  # tokens of a text that are read at once
STEPS = 20  # that are timed at each length


def size_of(cache: DynamicCache) -> int:
    """Bytes of all tensors of a cache."""
    total = 0
    for layer in cache.layers:
        tensors = layer.memory or () if isinstance(layer, StreamingLayer) else (layer.keys, layer.values)
        total += sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))
    return total


@torch.inference_mode()
def measure_speed(subject: Subject, longest: int) -> Iterator[dict[str, Any]]:
    """One row per length: milliseconds of a step and bytes of the cache, the original's and ours with each budget."""
    lengths = [longest // 8 * times for times in (1, 2, 4, 8)]
    chunk, longest = min(CHUNK, lengths[0]), lengths[-1]
    text = torch.cat(subject.texts, 1)
    text = text.repeat(1, -(-longest // text.shape[1]))[:, :longest]
    steps: dict[tuple[str, int], float] = {}
    for name, entries in (("original", 0), *(("astroattn", entries) for entries in subject.budgets)):
        if entries:
            astroattn.patch(subject.model, AstroConfig(hidden="streaming", entries=entries))
        cache = DynamicCache()
        for start in tqdm(range(0, longest, chunk), f"{name} {entries or ''}", unit="chunk"):
            subject.model(text[:, start : start + chunk], past_key_values=cache)
            if (done := start + chunk) in lengths:
                times = []
                for _ in range(STEPS):
                    begin = perf_counter()
                    subject.model(text[:, :1], past_key_values=cache)
                    times.append(perf_counter() - begin)
                step = sorted(times)[STEPS // 2]
                steps[name, done] = step
                yield rounded(
                    {
                        "model": subject.name,
                        "tokens": done,
                        "cache": name,
                        "entries": entries,
                        "step ms": 1000 * step,
                        "ratio": step / steps["original", done],
                        "cache MB": size_of(cache) / 1e6,
                    }
                )
    astroattn.unpatch(subject.model)
