"""What a patched decoder loses: nats above the original on texts, and answers about a number that it has read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from eval.common import rounded
from eval.generate import recall
from eval.generate.reading import ORIGINAL, average, lose, read
from eval.generate.recall import Needle
from eval.generate.subjects import Subject


class Loss:
    """Texts [1, N], which the original has read; called with the hidden states of another, what that loses of them.

    "nats above" is the mean over all tokens from `start` on of all texts, "texts" the same of each text.
    """

    def __init__(self, subject: Subject, texts: list[Tensor], start: int) -> None:
        self._model, self.texts, self._start = subject.model, texts, start
        self._truth = read(subject, ORIGINAL, 0, texts)

    def __call__(self, states: Iterable[Tensor]) -> dict[str, Any]:
        losses = [lose(self._model, *each) for each in zip(self.texts, self._truth, states, strict=True)]
        scored = slice(self._start + 1, max(text.shape[1] for text in self.texts))
        each = [average([one], scored)["nats above"] for one in losses]
        return rounded(average(losses, scored) | {"texts": each})  # type: ignore[no-any-return]


@torch.inference_mode()
def states_of(model: nn.Module, texts: Iterable[Tensor], title: str) -> list[Tensor]:
    """The last hidden states [N, C] that a model gives for texts [1, N]."""
    base: Any = model.base_model
    return [base(text, use_cache=False).last_hidden_state[0] for text in tqdm(list(texts), title, unit="text")]


def draw_needles(subject: Subject, tokens: int, count: int) -> list[Needle]:
    """So many numbers at each depth of `recall.DEPTHS`."""
    return [recall.draw(subject, tokens, depth, seed) for depth in recall.DEPTHS for seed in range(count)]


def answers(subject: Subject, needles: list[Needle], states: Iterable[Tensor]) -> list[dict[str, Any]]:
    """A row per depth: how often all digits were likeliest, and their log-probability."""
    return [rounded(row) for row in recall.score(subject.model, needles, list(states))]
