"""Other caches of fixed size, re-implemented plainly from their papers, as attention over a whole text.

Every one of them reads and writes as `astroattn.ops.streaming` does: a token is stored when it comes, and after each
block of tokens so many entries go that the next block fits. They differ in which go, or what becomes of them. Positions
are those of the text for all of them.

    window          the oldest
    StreamingLLM    the oldest but the first four (Xiao et al. 2024; there positions are those in the cache)
    H2O             the least attention so far, summed, of all but the newest half (Zhang et al. 2023)
    TOVA            the least attention of the latest query (Oren et al. 2024)
    SnapKV-like     the least attention of the latest 32 queries, pooled over five neighbours, of all but the newest 32;
                    the paper does it once, after the prompt (Li et al. 2024)
    KVMerger-like   pairs of neighbours with the most alike keys become one, by a Gaussian kernel around that with more
                    attention, of all but the newest half; the paper does it once (Wang et al. 2024)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SINKS, RECENT, POOL = 4, 32, 5


@dataclass
class Entries:
    """What a cache holds [Z, W, ...]: keys, values, place in the text, attention in all, and of the latest queries."""

    key: Tensor
    value: Tensor
    place: Tensor
    total: Tensor
    latest: Tensor  # [Z, W]: of the latest query
    recent: Tensor  # [Z, W, blocks]: of the blocks of the latest RECENT queries


Score = Callable[[Entries, int], Tensor]
"""How much entries [Z, W] are worth keeping, for a cache of so many; infinite for those that always are."""


def window(held: Entries, size: int) -> Tensor:
    return held.place.float()


def streaming_llm(held: Entries, size: int) -> Tensor:
    return held.place.float().masked_fill(held.place < SINKS, torch.inf)


def h2o(held: Entries, size: int) -> Tensor:
    return _with_newest(held.total, size // 2)


def tova(held: Entries, size: int) -> Tensor:
    return held.latest


def snapkv(held: Entries, size: int) -> Tensor:
    pooled = F.avg_pool1d(held.recent.sum(-1)[:, None], POOL, stride=1, padding=POOL // 2)[:, 0]
    return _with_newest(pooled, min(RECENT, size // 2))


def _with_newest(score: Tensor, newest: int) -> Tensor:
    score = score.clone()
    score[:, score.shape[1] - newest :] = torch.inf
    return score


SCORES: dict[str, Score] = {
    "window": window,
    "StreamingLLM": streaming_llm,
    "H2O": h2o,
    "TOVA": tova,
    "SnapKV-like": snapkv,
}
NAMES = (*SCORES, "KVMerger-like")


def attend(name: str, query: Tensor, key: Tensor, value: Tensor, size: int, block: int) -> Tensor:
    """Causal attention with such a cache: queries [Z, G, N, D] times the scale, keys and values [Z, N, D]; any N."""
    blocks = -(-RECENT // block)
    none = key.new_zeros(len(key), 0)
    held = Entries(key[:, :0], value[:, :0], none.long(), none, none, none[..., None].expand(-1, -1, blocks))
    outs = []
    for start in range(0, key.shape[1], block):
        now = slice(start, min(start + block, key.shape[1]))
        n, before = now.stop - start, held.key.shape[1]
        new = key.new_zeros(len(key), n)
        held = Entries(
            torch.cat([held.key, key[:, now]], 1),
            torch.cat([held.value, value[:, now]], 1),
            torch.cat([held.place, torch.arange(start, now.stop).expand(len(key), -1)], 1),
            torch.cat([held.total, new], 1),
            torch.cat([held.latest, new], 1),
            torch.cat([held.recent, new[..., None].expand(-1, -1, blocks)], 1),
        )
        future = torch.ones(n, before + n, dtype=torch.bool).triu(before + 1)
        logits = torch.einsum("zgnd,zwd->zgnw", query[:, :, now], held.key).masked_fill(future, -torch.inf)
        shares = logits.softmax(-1)
        outs.append(torch.einsum("zgnw,zwd->zgnd", shares, held.value))
        attention = shares.mean(1)
        held.total, held.latest = held.total + attention.sum(1), attention[:, -1]
        held.recent = torch.cat([held.recent[..., 1:], attention.sum(1)[..., None]], -1)
        if (gone := held.key.shape[1] - (size - block)) > 0:
            held = _merge(held, gone, size // 2) if name == "KVMerger-like" else _evict(held, gone, SCORES[name], size)
    return torch.cat(outs, 2)


def _evict(held: Entries, gone: int, score: Score, size: int) -> Entries:
    kept = score(held, size).topk(held.key.shape[1] - gone, dim=1).indices.sort(1).values
    return _take(held, kept)


def _merge(held: Entries, gone: int, newest: int) -> Entries:
    """The pairs of neighbours whose keys have the largest cosines, each entry in one pair at most."""
    old = held.key.shape[1] - newest
    unit = F.normalize(held.key[:, :old], dim=-1)
    alike = (unit[:, :-1] * unit[:, 1:]).sum(-1)
    lefts = []
    for _ in range(gone):
        lefts.append(alike.argmax(1, keepdim=True))
        near = torch.arange(old - 1) - lefts[-1]
        alike = alike.masked_fill(near.abs() <= 1, -torch.inf)
    left = torch.cat(lefts, 1)
    right = left + 1
    more = held.total.gather(1, left) >= held.total.gather(1, right)
    one, other = (held.key.gather(1, x[..., None].expand(-1, -1, held.key.shape[2])) for x in (left, right))
    width = held.key.var(1).sum(-1)[:, None]  # of the kernel, in units of how far keys are from one another
    kernel = (-(one - other).square().sum(-1) / (2 * width)).exp()
    share = torch.where(more, 1 / (1 + kernel), kernel / (1 + kernel))[..., None]  # of the left one
    for field in (held.key, held.value):
        index = [x[..., None].expand(-1, -1, field.shape[2]) for x in (left, right)]
        field.scatter_(1, index[0], share * field.gather(1, index[0]) + (1 - share) * field.gather(1, index[1]))
    held.total.scatter_add_(1, left, held.total.gather(1, right))
    leaving = torch.zeros_like(held.place).scatter_(1, right, 1)
    return _take(held, leaving.argsort(dim=1, stable=True)[:, : held.key.shape[1] - gone])


def _take(held: Entries, kept: Tensor) -> Entries:
    def take(x: Tensor) -> Tensor:
        return x.gather(1, kept.view(*kept.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))

    return Entries(*(take(getattr(held, name)) for name in vars(held)))
