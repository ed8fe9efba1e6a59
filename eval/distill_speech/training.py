"""The clips, the attentions and how each is trained and measured."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from astroattn import AstroConfig, AstrocyteAttention, Distiller, patch
from astroattn.data import load_data
from astroattn.fidelity.passes import frame_mask
from astroattn.fidelity.speech import count_word_errors, transcribe
from astroattn.models import FRAME_MASK, LoadedModel, load_model
from eval.common import rounded
from eval.trained import LAYERS, PLACED, WHOLE, Condition, Options, run_stages

Sound = tuple[NDArray[Any], int]  # samples, and how many there are in a second

CHOSEN_ON = (2, 5)  # of the even half, in the order of names


# Every weight of the encoder, towards the original's last hidden states. On two clips held out (--held-out, one seed),
# where there is speech, the near field alone is least wrong with 2e-4 (of 4e-5, 2e-4, 1e-3: 0.354, 0.329, 0.469);
# learned neurons alone are with `FASTER` (of 2e-4, 1e-3, 4e-3: 0.809, 0.791, 0.930); random features (of 4e-5, 2e-4,
# 1e-3, 4e-3, 1e-2: 1.072, 1.036, 1.009, 0.967, 1.002), uniform attention (of 2e-4, 4e-3: 0.989, 0.870) and none (of
# 2e-4, 4e-3, 1e-2: 1.002, 0.792, 0.837) with `FASTEST`. With both, 4e-5 is better than 2e-4 (0.256, 0.324), hidden
# layers at 0.005; before that, 8 steps of the rows' loss (0.319) than 24 of the outputs' (0.606).
END_TO_END: Options = {
    **{"steps": 20, "loss": "end_to_end", "train": "all"},
    **{"host_learning_rate": 2e-4, "learning_rate": 0.02},
}
FASTER: Options = END_TO_END | {"host_learning_rate": 1e-3}
FASTEST: Options = END_TO_END | {"host_learning_rate": 4e-3}
SLOWER: Options = END_TO_END | {"host_learning_rate": 4e-5, "learning_rate": 0.005}


def transfer(steps: int) -> Options:
    """Each layer by itself. Beside a near field a step takes 1.4 s of a core, without one half a second."""
    return {"steps": steps, "loss": "rows"}


@dataclass(frozen=True)
class SpeechCondition(Condition):
    """The same, of which some are drawn anew for each seed, and one has no attention."""

    drawn: bool = False  # whether it is another with every seed before it is trained, and measured with each
    silent: bool = False  # whether attention's output is zero, whatever the settings say


def linear(hidden: str, num_hidden: int, **others: Any) -> dict[str, Any]:
    """Pure linear attention."""
    return {"hidden": hidden, "num_hidden": num_hidden, "near": 0, **others}


DEFAULT, NEAR, NEAR_LEARNED = "default", "near 64", "near 64 + learned 64"
LEARNED, RANDOM, UNIFORM, NOTHING = "learned 64", "random 64", "uniform", "no attention"
BOTH = {"hidden": "learned", "num_hidden": 64, "near": 64, **PLACED}
FLAT = linear("random", 1, activation="constant")
CONDITIONS = {
    DEFAULT: SpeechCondition({}, untrained=True),
    NEAR_LEARNED: SpeechCondition(BOTH, {LAYERS: transfer(8), WHOLE: SLOWER}, untrained=True, drawn=True),
    NEAR: SpeechCondition({"hidden": "none", "near": 64, **PLACED}, {WHOLE: END_TO_END}, untrained=True),
    LEARNED: SpeechCondition(linear("learned", 64), {LAYERS: transfer(60), WHOLE: FASTER}, untrained=True, drawn=True),
    RANDOM: SpeechCondition(linear("random", 64), {WHOLE: FASTEST}, untrained=True, drawn=True),
    UNIFORM: SpeechCondition(FLAT, {WHOLE: FASTEST}, untrained=True),
    NOTHING: SpeechCondition(FLAT, {WHOLE: FASTEST}, untrained=True, silent=True),
}


@dataclass(frozen=True)
class Speech:
    """A speech model, recordings to train its encoder on, and others to measure on."""

    whisper: LoadedModel
    training: Sequence[Sound]
    measured: Sequence[Sound]

    @property
    def encoder(self) -> nn.Module:
        """What is trained; the decoder stays as it is."""
        encoder: nn.Module = self.whisper.model.get_encoder()
        return encoder


def load_speech(folder: Path, limit: int | None, *, held_out: bool) -> Speech:
    """The even half to train on and the odd to measure on; held out: two clips of the even half instead."""
    sounds = {
        half: [clip.open() for clip in load_data(str(folder / "speech"), "audio", half=half, limit=limit).items]
        for half in ("even", "odd")
    }
    whisper = load_model(str(folder / "whisper_tiny_en"))
    if not held_out:
        return Speech(whisper, sounds["even"], sounds["odd"])
    rest = [sound for place, sound in enumerate(sounds["even"]) if place not in CHOSEN_ON]
    return Speech(whisper, rest, [sounds["even"][place] for place in CHOSEN_ON])


class Views(Sequence[dict[str, Tensor]]):
    """Clips that begin somewhere within and end with their beginning; which ones the seed and a batch's place decide.

    Each is a batch of its own. All clips come as often as the others, give or take one.
    """

    def __init__(self, speech: Speech, count: int, seed: int) -> None:
        self._speech, self._count, self._seed = speech, count, seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        place, clips = range(self._count)[index], self._speech.training
        draw = np.random.default_rng((self._seed, place // len(clips)))
        samples, rate = clips[draw.permutation(len(clips))[place % len(clips)]]
        start = np.random.default_rng((self._seed, place, 1)).integers(len(samples))
        return encode(self._speech, [(np.roll(samples, -start), rate)])


def encode(speech: Speech, sounds: Sequence[Sound]) -> dict[str, Tensor]:
    """A batch as the encoder takes it."""
    name = speech.whisper.model.main_input_name
    return {name: speech.whisper.encode(list(sounds))[name]}


class Measure:
    """What an encoder's last hidden states, and the transcripts made of them, have of the original's; clip by clip.

    "speech" and "all" are relative errors of the hidden states, over the frames before a clip ends and over all.
    "errors" are words that the transcript puts in, leaves out or changes of the original's, which has so many "words".
    """

    def __init__(self, speech: Speech) -> None:
        self._speech, self._batch = speech, encode(speech, speech.measured)
        self._truth = self._read(speech.encoder)
        mask = speech.whisper.encode(list(speech.measured))[FRAME_MASK]
        real = frame_mask({FRAME_MASK: mask}, FRAME_MASK, self._truth.shape[1])
        assert real is not None
        self._masks = {"speech": real, "all": torch.ones_like(real)}
        self._texts = self._transcribe(self._truth)

    def __call__(self, encoder: nn.Module) -> dict[str, Any]:
        hidden = self._read(encoder)
        squares, truth = ((x.double().square().sum(-1)) for x in (hidden - self._truth, self._truth))
        found: dict[str, Any] = {
            name: ((squares * mask).sum(1) / (truth * mask).sum(1)).sqrt().tolist()
            for name, mask in self._masks.items()
        }
        errors, words = count_word_errors(self._transcribe(hidden), self._texts)
        return found | {"errors": errors.tolist(), "words": words.tolist()}

    @torch.inference_mode()
    def _read(self, encoder: nn.Module) -> Tensor:
        """[clips, frames, D]."""
        (inputs,) = self._batch.values()
        return torch.cat([encoder(part).last_hidden_state for part in inputs.split(1)])

    @torch.inference_mode()
    def _transcribe(self, hidden: Tensor) -> list[str]:
        whisper = self._speech.whisper
        return transcribe(whisper.model, hidden, self._batch, whisper.tokenizer)


def train_and_measure(
    speech: Speech, measure: Measure, name: str, seed: int, rate: float | None = None
) -> list[dict[str, Any]]:
    """One row per stage: clips shown (one a step) and CPU seconds so far, and what `Measure` says.

    A rate stands in the rows too.
    """
    condition = CONDITIONS[name]
    own = {} if rate is None else {"rate": rate}
    model, shown, rows = copy.deepcopy(speech.encoder), 0, []
    patch(model, AstroConfig(**condition.settings, seed=seed))
    if condition.silent:
        silence(model)
    before = condition.untrained and (condition.drawn or seed == 0)
    stages = run_stages(condition, before, rate, lambda options: train(model, speech, options, seed))
    for stage, options, seconds in stages:
        if options is not None:
            shown += options["steps"]
        row = {"attention": name, "training": stage, "seed": seed, **own, "options": options}
        rows.append(rounded(row | {"clips": shown, "seconds": seconds} | measure(model)))
    return rows


def silence(model: nn.Module) -> None:
    """Zero the output of every attention, but not that of softmax attention, which is trained towards."""

    def hook(module: AstrocyteAttention, args: Any, output: Tensor) -> Tensor:
        return output if module.exact else torch.zeros_like(output)

    for module in model.modules():
        if isinstance(module, AstrocyteAttention):
            module.register_forward_hook(hook)


def train(model: nn.Module, speech: Speech, options: Options, seed: int) -> None:
    """One stage."""
    settings = dict(options)
    steps = settings.pop("steps")
    distiller = Distiller(model, total_steps=steps, seed=seed, **settings)
    views = Views(speech, steps, seed)
    distiller.run(views, steps, held_out=[views[0]], progress=False)
