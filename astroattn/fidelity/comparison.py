"""The original and the patched model, side by side on the same inputs."""

from __future__ import annotations

import shlex
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from astroattn.choices import POOLINGS
from astroattn.config import AstroConfig, Preset, as_config
from astroattn.fidelity import metrics
from astroattn.fidelity.calls import CostMeter, find_astrocytes
from astroattn.fidelity.diagnosis import Diagnosis, LayerFidelity
from astroattn.fidelity.environment import describe_device, describe_versions
from astroattn.fidelity.items import MOST_ITEMS, make_columns, name_items
from astroattn.fidelity.metrics import Value
from astroattn.fidelity.passes import (
    Outputs,
    count_items,
    find_speech_encoder,
    is_speech,
    to_model,
    to_patch,
    token_mask,
)
from astroattn.fidelity.resources import MEMORY_METHODS
from astroattn.fidelity.result import Fidelity, Row
from astroattn.fidelity.speech import transcribe, within_encoder, word_error
from astroattn.fidelity.subject import Reading, Subject, left_exact
from astroattn.imports import needs
from astroattn.ops.layout import MOST_HIDDEN
from astroattn.patching import fallbacks
from astroattn.plan import Plan
from astroattn.suggestions import suggest

with needs("eval"):
    import numpy as np

UNIFORM = AstroConfig(hidden="random", activation="constant", num_hidden=1, near=0)


def compare(
    model: nn.Module,
    batches: Iterable[Any],
    config: AstroConfig | Plan | Preset | None = None,
    *,
    where: Any = None,
    labels: Sequence[int] | None = None,
    scores: Sequence[float] | None = None,
    transcripts: Sequence[str] | None = None,
    tokenizer: Any = None,
    items: Sequence[Any] | None = None,
    class_names: Mapping[int, str] | None = None,
    pooling: str = "auto",
    diagnose: int = 2,
    controls: bool = True,
    seed: int = 0,
    name: str | None = None,
    data: str = "batches",
    progress: bool = True,
) -> Fidelity:
    """Patch a copy of the model and measure what changed; the model itself is not touched.

    Every batch goes once through the original, the patched model and the controls, which share their weights. The
    batches are read once, one after the other; of each only logit statistics and pooled embeddings are kept.

    Of a model that turns speech into text the encoder is compared, and only it is patched: time, memory and cost are
    those of its forward. Outside of them the decoder, which stays as it is, writes greedy transcripts from its frames.

    Args:
        model: a model without patches, on the device and in the dtype to measure.
        batches: model inputs, each a mapping of keyword arguments or one tensor, with the items along dimension 0. An
            `attention_mask` [B, N] marks real tokens; padding is left out of every figure. A batch of recordings may
            hold `frame_mask` [B, T], True for the steps of its input before a clip ends; the model does not get it.
        config: for `patch`; None is the default, a word one of `PRESETS`. With a plan the controls patch the modules
            that it names.
        where: for `patch`; None is all layers.
        labels: the class of every item, in order, for accuracy; needs logits [B, C].
        scores: for sentence pairs, the score of items 2i and 2i + 1.
        transcripts: for recordings, what is said in every item, in order.
        tokenizer: of a model that turns speech into text; without it no transcripts are compared.
        items: what the batches were made of, in order, for `per_item` and the report: texts, images of PIL, or whatever
            has a `name` and an `open()` that gives such an image, which is called for the few photos that are shown.
        class_names: of the classes, by their index, for the same.
        pooling: how hidden states become an embedding: `"mean"` over real tokens, `"cls"`, `"model"` (its own), or
            `"auto"`: `mean` for text, `model` for photos. Recordings have no embedding: their frames are compared.
        diagnose: number of batches, from the first, that are also measured per layer and head.
        controls: also measure uniform attention, the near field alone and random features with the same m, and what
            else could be done with as many positions as the patched model attends to, batch by batch: a window of
            them, and exact keys in place of hidden neurons. Of causal attention the window is that of the newest
            tokens, with the mean of all older ones ("newest and mean").
        seed: of the bootstrap intervals.
        name: of the model, for the tables.
        data: a name of the inputs, for the same.
        progress: show a progress bar.

    Raises:
        ValueError: no batches, a model that is patched already, or labels, scores, transcripts or items that do not fit
            the rows of the batches.
        TypeError: a batch that is neither a tensor nor a mapping.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling: must be one of {', '.join(POOLINGS)}, got {pooling!r}{suggest(pooling, POOLINGS)}")
    if diagnose < 0:
        raise ValueError(f"diagnose: must be 0 or more batches, got {diagnose}")
    if find_astrocytes(model):
        raise ValueError("model: is patched already; unpatch it first (compare patches a copy of its own)")
    config = config if isinstance(config, Plan) else as_config(config)
    where = within_encoder(model, where)
    writes = tokenizer is not None and find_speech_encoder(model) is not None
    total = len(batches) if isinstance(batches, Sized) else None
    batches = iter(batches)
    if (first := next(batches, None)) is None:
        raise ValueError("batches: there are none")
    checked = to_patch(model, first)
    subjects = {"original": Subject(model), "patched": Subject(model, config, where, checked)}
    same = _same_modules(subjects["patched"]) if isinstance(config, Plan) else where
    diagnosis = Diagnosis(subjects["patched"].model)
    exact_check: float | None = None
    diagnosed = count = 0
    with torch.inference_mode():
        for number, batch in enumerate(
            tqdm(chain([first], batches), "comparing", total, unit="batch", disable=not progress)
        ):
            inputs = to_model(model, batch)
            if is_speech(inputs) and pooling != "auto":
                raise ValueError(
                    f"pooling: recordings are compared frame by frame, so it must be auto, got {pooling!r}"
                )
            start, count = count, count + count_items(inputs)
            chosen = None if labels is None else labels[start:count]
            if chosen is not None and len(chosen) < count - start:
                raise ValueError(f"labels: {start + len(chosen)}, but there are {count} items or more")
            original: Reading | None = None
            queue = list(subjects.items())
            for title, subject in queue:
                reading = subject.run(inputs, pooling, original, chosen)
                if writes and reading.outputs.hidden is not None:
                    subject.transcripts += transcribe(subject.model, reading.outputs.hidden, inputs, tokenizer)
                original = original or reading
                if title == "patched" and controls:  # only now is it known what it attends to in this batch
                    more = control_configs(config, subject.meter.causal) | budget_configs(config, subject.meter)
                    for control, choice in more.items():
                        if number == 0:
                            subjects[control] = Subject(model, choice, same, checked)
                            queue.append((control, subjects[control]))
                        elif control in subjects:
                            subjects[control].change(choice)
            if number < diagnose and original is not None:
                difference = _difference(diagnosis.add(inputs), original.outputs, token_mask(inputs))
                exact_check = max(exact_check or 0.0, difference)
                diagnosed = count
    if labels is not None and len(labels) != count:
        raise ValueError(f"labels: {len(labels)}, but there are {count} items")
    if scores is not None and 2 * len(scores) != count:
        raise ValueError(f"scores: {len(scores)}, but there are {count} items; one is needed for every two")
    if transcripts is not None and len(transcripts) != count:
        raise ValueError(f"transcripts: {len(transcripts)}, but there are {count} items")
    if items is not None and len(items) != count:
        raise ValueError(f"items: {len(items)}, but the batches hold {count}")
    rows, notes = _summarise(subjects, labels, scores, transcripts, seed)
    notes += _patch_notes(subjects["patched"])
    if count > MOST_ITEMS:
        notes.append(f"per_item holds the first {MOST_ITEMS} items")
    if controls and not {"near alone", "newest and mean"} & subjects.keys():
        notes.append("the config has no near field, so there is no control with the near field alone")
    return Fidelity(
        model=name or type(model).__name__,
        data=data,
        items=count,
        rows=rows,
        layers=_with_place(diagnosis.layers(), subjects["patched"]),
        diagnosed=diagnosed,
        exact_check=exact_check,
        notes=tuple(notes),
        environment=_environment(model, seed, pooling),
        per_item=make_columns(
            subjects["original"].parts(),
            subjects["patched"].parts(),
            name_items(items, count),
            labels,
            class_names,
            (subjects["original"].transcripts, subjects["patched"].transcripts),
            transcripts,
        ),
        sources=() if items is None else items,
    )


def _same_modules(subject: Subject) -> Callable[[str, nn.Module], bool]:
    """The `where` of `patch` that means the modules which are patched in this copy."""
    names = {row.name for row in subject.report.patched} if subject.report is not None else set()
    return lambda name, module: name in names


def control_configs(config: AstroConfig | Plan, causal: bool = False) -> dict[str, AstroConfig]:
    """The controls that every comparison shows beside `config`; beside a plan, those of its widest heads."""
    heads = _changed_heads(config)
    controls = {"uniform": UNIFORM}
    if entries := max((head.entries for head in heads if head.hidden == "streaming"), default=0):
        controls["newest and mean"] = replace(UNIFORM, near=entries)
        return controls | {"random": AstroConfig(hidden="random", near=0)}
    if isinstance(config, Plan):
        near, neurons = (max((getattr(head, name) for head in heads), default=0) for name in ("near", "num_hidden"))
        config = AstroConfig(near=near, num_hidden=max(neurons, 1))
    if config.near and not causal:  # which needs a static layer beside the near field
        controls["near alone"] = replace(config, hidden="none", exact_keys=0, key_error=0.0)
    # Where the length decides how many neurons there are, random features get the most that can be.
    neurons = MOST_HIDDEN if config.num_hidden < 0 else config.num_hidden
    return controls | {"random": AstroConfig(hidden="random", num_hidden=neurons, near=0, seed=config.seed)}


def budget_configs(config: AstroConfig | Plan, meter: CostMeter) -> dict[str, AstroConfig]:
    """The controls with as many positions as the patched model attends to in the batch that the meter has seen last.

    A window of them, or of causal attention the newest of them and the mean of the others; and near and exact keys in
    place of hidden neurons. They have at most so many, as near to it as can be.
    """
    heads, budget = _changed_heads(config), meter.attended()
    if not budget or not heads:
        return {}

    def most(make: Callable[[int], AstroConfig]) -> AstroConfig:
        """The config with the largest number that is within the budget."""
        return make(max(1, bisect_right(range(1, meter.longest), budget, key=lambda n: meter.would_attend(make(n)))))

    if meter.causal:
        if any(head.hidden == "streaming" for head in heads):
            return {}  # `control_configs` has it
        return {"newest and mean": replace(UNIFORM, near=max(1, round(budget) - 1))}
    near = max(heads, key=lambda head: head.near).near
    base = config if isinstance(config, AstroConfig) else AstroConfig(near=near)
    return {
        "window, same budget": most(lambda n: AstroConfig(hidden="none", near=n, exact_keys=0, tiles="position")),
        "exact keys, same budget": most(lambda n: replace(base, hidden="none", exact_keys=n, key_error=0.0)),
    }


def _changed_heads(config: AstroConfig | Plan) -> list[AstroConfig]:
    """The configs of heads that are not exact."""
    heads = [config] if isinstance(config, AstroConfig) else [head for mine in config.modules.values() for head in mine]
    return [head for head in heads if head.hidden != "exact"]


def _with_place(layers: Iterable[LayerFidelity], subject: Subject) -> tuple[LayerFidelity, ...]:
    """Layers with their index, and their share of all products; the calls of one module cost the same."""
    found = tuple(layers)
    calls = Counter(layer.name for layer in found)
    shares = {name.removesuffix(".astrocyte"): share for name, share in subject.meter.cost_shares().items()}
    index = {} if subject.report is None else {row.name: row.index for row in subject.report.rows}
    return tuple(
        replace(layer, index=index.get(layer.name), cost_share=shares[layer.name] / calls[layer.name])
        for layer in found
    )


def _summarise(
    subjects: dict[str, Subject],
    labels: Sequence[int] | None,
    scores: Sequence[float] | None,
    transcripts: Sequence[str] | None,
    seed: int,
) -> tuple[dict[str, Row], list[str]]:
    rows: dict[str, Row] = {}
    notes: list[str] = []
    first = subjects["original"]
    original = first.parts()
    if labels is not None and "correct1" not in original:
        notes.append("labels were not used: the model gives no logits with one prediction per item")
    if scores is not None and "embedding" not in original:
        notes.append("scores were not used: the model gives no hidden states to make embeddings of")
    if transcripts is not None and not first.transcripts:
        notes.append("transcripts were not used: the model writes none, or no tokenizer was given")
    if first.transcripts:
        notes.append(
            "time, memory, positions and cost are those of the encoder; transcripts are written outside of them"
        )
    for title, subject in subjects.items():
        parts = original if subject is first else subject.parts()
        values = {"nonfinite": Value(float(subject.nonfinite))} if subject.nonfinite else {}
        if subject.nonfinite:
            notes.append(f"{title}: {subject.nonfinite} items gave NaN or infinity, so none of its scores are given")
        elif subject is first or not first.nonfinite:
            if "correct1" in parts:
                values |= metrics.summarise_labels(parts, original)
            if scores is not None and "embedding" in parts:
                values |= metrics.score_pairs(parts["embedding"], np.asarray(scores, dtype=float), seed)
            if "kl" in parts:
                values |= metrics.summarise_logits(parts, seed)
            if "hidden_error" in parts:
                values |= metrics.summarise_frames(parts, seed)
            if subject.transcripts and subject is not first:
                values["word_error"] = word_error(subject.transcripts, first.transcripts, seed)
            if subject.transcripts and transcripts is not None:
                values["transcript_error"] = word_error(subject.transcripts, transcripts, seed)
            if "embedding" in parts and subject is not first:
                values |= metrics.summarise_embeddings(parts["embedding"], original["embedding"], seed)
        values |= subject.costs()
        values["time"] = Value(values["seconds"].value / first.costs()["seconds"].value)
        rows[title] = Row(_plain(subject.config), values)
        if subject.config is None and subject is not first:
            notes.append(f"{title}: as many as the patched model reads of each batch, {_describe_numbers(subject)}")
    keys = rows["patched"].values.get("keys")
    if keys is not None:
        rows["original"].values.update(keys=keys, positions=keys, cost=Value(1.0))
    if subjects["patched"].peak_bytes == first.peak_bytes:
        notes.append("the peak of the memory is the original's: it is reached outside attention")
    return rows, notes


def _describe_numbers(subject: Subject) -> str:
    """Which numbers the configs of the batches have."""
    numbers = [max(config.near, config.exact_keys) for config in subject.configs if isinstance(config, AstroConfig)]
    return f"from {min(numbers)} to {max(numbers)} keys"


def _plain(config: AstroConfig | Plan | None) -> dict[str, Any] | None:
    if config is None:
        return None
    return config.to_dict() if isinstance(config, Plan) else asdict(config)


def _patch_notes(subject: Subject) -> list[str]:
    """What the tables of the patched model leave out."""
    notes = []
    totals, longest = subject.meter.totals(), subject.meter.longest
    if longest and totals["positions"] == totals["keys"] and subject.config and _changed_heads(subject.config):
        notes.append(
            f"nothing was replaced: in sequences of up to {longest} tokens every key is exact, as in softmax; compare "
            "on longer ones (a long text is cut into chunks by --tokens 512)"
        )
    if subject.report is not None and (names := left_exact(subject.report)):
        notes.append(f"{len(names)} attention modules are exact, as in the original: {', '.join(names)}")
    for name, reasons in fallbacks(subject.model).items():
        notes += [f"{name}: {count} calls, not in positions and cost: {reason}" for reason, count in reasons.items()]
    return notes


def _difference(checked: Outputs, original: Outputs, mask: Tensor | None) -> float:
    """Relative difference between two passes that should agree: of the logits, or of the hidden states."""
    if checked.logits is not None and original.logits is not None:
        mine, theirs = checked.logits, original.logits
    elif checked.hidden is not None and original.hidden is not None:
        mine, theirs = checked.hidden, original.hidden
    else:
        return float("nan")
    if mask is not None and mine.shape[:2] == mask.shape:
        mine, theirs = mine[mask], theirs[mask]
    return float((mine.double() - theirs.double()).norm() / theirs.double().norm())


def _environment(model: nn.Module, seed: int, pooling: str) -> dict[str, Any]:
    weight = next(model.parameters())
    return {
        "versions": describe_versions(),
        "device": describe_device(weight.device),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "seed": seed,
        "pooling": pooling,
        "memory": MEMORY_METHODS[weight.device.type == "cuda"],
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
