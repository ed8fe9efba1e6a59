"""Reading a text with a cache of fixed size, and what the predictions lose token by token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AttentionInterface

import astroattn
from astroattn import AstroConfig
from astroattn.ops.streaming import block_of
from eval.generate.caches import attend
from eval.generate.plans import load_plan
from eval.generate.subjects import Subject

ORIGINAL, OURS = "original", "astroattn"
WITH_PLAN = ", planned"  # of any cache: each key head with a budget of its own, so many entries in the mean
PLANNED = OURS + WITH_PLAN
UNREAD = "never read"  # the original, where what it is asked for was not in the text
PEER = "eval_cache"  # the name of the attention function below
PIECE = 256  # tokens whose predictions are held at once: those of 8,192 would take gigabytes
_peer: dict[str, Any] = {}  # its name, and the number of entries of each key head, by layer


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """What transformers calls for a peer: a whole text without padding."""
    heads, _, dim = key.shape[1:]
    scale = dim**-0.5 if scaling is None else scaling
    query = (query * scale).unflatten(1, (heads, -1))
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    sizes: list[int] = _peer["sizes"](module, heads)
    for size in set(sizes):
        mine = [head for head, each in enumerate(sizes) if each == size]
        rows = (x[:, mine].flatten(0, 1) for x in (query, key, value))
        part = attend(_peer["name"], *rows, size=size, block=block_of(size))
        out[:, mine] = part.unflatten(0, (-1, len(mine)))
    return out.flatten(1, 2).transpose(1, 2), None


AttentionInterface.register(PEER, _attention)


@contextmanager
def with_cache(subject: Subject, name: str, entries: int) -> Iterator[None]:
    """Its model with such a cache of so many entries, for texts without padding."""
    model, plan = subject.model, load_plan(subject.name, entries) if name.endswith(WITH_PLAN) else None
    if name in (OURS, PLANNED):
        with astroattn.patched(model, plan or AstroConfig(hidden="streaming", entries=entries)):
            yield
        return
    names = {id(module): path for path, module in model.named_modules()}

    def sizes(module: nn.Module, heads: int) -> list[int]:
        if plan is None:
            return [entries] * heads
        configs = plan.modules[names[id(module)]]
        return [config.entries for config in configs[:: len(configs) // heads]]

    before = model.config._attn_implementation
    _peer.update(name=name.removesuffix(WITH_PLAN), sizes=sizes)
    model.set_attn_implementation(PEER)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.inference_mode()
def read(subject: Subject, name: str, entries: int, texts: list[Tensor]) -> list[Tensor]:
    """The last hidden states [N, C] of texts [1, N], the original's or with a cache; predictions follow from them."""
    model = subject.model
    title = f"{subject.name}, {name}" if name == ORIGINAL else f"{subject.name}, {name}, {entries} entries"
    with nullcontext() if name == ORIGINAL else with_cache(subject, name, entries):
        return [
            model.base_model(text, use_cache=False).last_hidden_state[0] for text in tqdm(texts, title, unit="text")
        ]


@torch.inference_mode()
def predict(model: nn.Module, states: Tensor) -> Tensor:
    """Log-probabilities [n, V] of the tokens after those with these hidden states [n, C]."""
    predictions: Tensor = model.get_output_embeddings()(states).log_softmax(-1)
    return predictions


class Losses(NamedTuple):
    """Of the tokens 1 to N - 1 of a text [N - 1], each from those before it."""

    original: Tensor  # -log p of the original
    above: Tensor  # what the cache's is above that
    kl: Tensor  # from the original's prediction
    same: Tensor  # whether both would have named the same token


def lose(model: nn.Module, text: Tensor, truth: Tensor, states: Tensor) -> Losses:
    """What is lost of a text [1, N], from the hidden states of the original and with a cache [N, C]."""
    parts = []
    for start in range(0, text.shape[1] - 1, PIECE):
        now = slice(start, min(start + PIECE, text.shape[1] - 1))
        theirs, ours = predict(model, truth[now]), predict(model, states[now])
        target = text[0, now.start + 1 : now.stop + 1, None]
        right = theirs.gather(1, target)[:, 0]
        parts.append(
            Losses(
                -right,
                right - ours.gather(1, target)[:, 0],
                (theirs.exp() * (theirs - ours)).sum(1),
                (theirs.argmax(1) == ours.argmax(1)).float(),
            )
        )
    return Losses(*map(torch.cat, zip(*parts, strict=True)))


def average(losses: list[Losses], tokens: slice) -> dict[str, Any]:
    """Means over these tokens of all texts, counted from 0, as values of a row."""
    # the loss of token i is number i - 1
    cut = slice(max(tokens.start - 1, 0), tokens.stop - 1)
    original, above, kl, same = (torch.cat([each[field][cut] for each in losses]) for field in range(4))
    return {
        "nats above": float(above.double().mean()),
        "KL": float(kl.double().mean()),
        "agreement": float(same.mean()),
        "original": float(original.double().mean()),
        "scored": len(above),
    }
