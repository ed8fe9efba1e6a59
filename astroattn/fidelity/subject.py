"""One model of a comparison, and what was seen of it batch after batch."""

from __future__ import annotations

import copy
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from astroattn.config import AstroConfig
from astroattn.fidelity import metrics
from astroattn.fidelity.calls import CostMeter
from astroattn.fidelity.metrics import Array, Value
from astroattn.fidelity.passes import Outputs, forward, frame_mask, is_speech, pool, predictions, token_mask
from astroattn.fidelity.resources import measure_memory, measure_time
from astroattn.imports import needs
from astroattn.models import FRAME_MASK
from astroattn.patching import PatchReport, patch
from astroattn.plan import Plan

with needs("eval"):
    import numpy as np


class Reading(NamedTuple):
    """What is compared of one batch: logits with one prediction per row, embeddings, and the outputs themselves."""

    logits: Tensor | None
    embedding: Tensor | None
    outputs: Outputs


class Subject:
    """A copy of a model that shares the original's weights, patched with `config` unless that is None."""

    def __init__(
        self, model: nn.Module, config: AstroConfig | Plan | None = None, where: Any = None, inputs: Any = None
    ) -> None:
        self.configs = [] if config is None else [config]  # the last is that of now
        self.model = share_weights(model)
        self.report = None if config is None else patch(self.model, config, where, inputs=inputs)
        self.transcripts: list[str] = []
        self.nonfinite = 0
        self.peak_bytes: int | None = None
        self.meter = CostMeter(self.model, [] if self.report is None else left_exact(self.report))
        self._seconds: list[float] = []
        self._parts: dict[str, list[Array]] = defaultdict(list)

    @property
    def config(self) -> AstroConfig | Plan | None:
        """What it is patched with; None of the original, and where batches had configs of their own."""
        first = next(iter(self.configs), None)
        return first if all(each == first for each in self.configs) else None

    def change(self, config: AstroConfig) -> None:
        """Patch the same modules with this config from the next batch on."""
        if self.report is None or config == self.configs[-1]:
            return
        names = {row.name for row in self.report.patched}
        self.report = patch(self.model, config, lambda name, module: name in names)
        self.meter.follow(self.model, left_exact(self.report))
        self.configs.append(config)

    def run(self, inputs: Any, pooling: str, original: Reading | None, labels: Sequence[int] | None) -> Reading:
        """One clean pass over a batch; `original` is what the original gave, None for the original itself."""
        if self.peak_bytes is None:  # the first pass also warms up, so it is not timed
            device = next(self.model.parameters()).device
            self.peak_bytes = measure_memory(lambda: forward(self.model, inputs), device)
        mask = token_mask(inputs)
        with self.meter.watch():
            outputs, seconds = measure_time(lambda: forward(self.model, inputs))
        self.meter.add(mask)
        self._seconds.append(seconds)
        speech = is_speech(inputs)
        embedding = None if speech else pool(self.model, outputs, mask, pooling)
        reading = Reading(predictions(outputs.logits, mask), embedding, outputs)
        self._keep(reading, mask, original, labels)
        if speech and original is not None:
            self._compare_frames(inputs, outputs.hidden, original.outputs.hidden)
        return reading

    def _compare_frames(self, inputs: Any, hidden: Tensor | None, original: Tensor | None) -> None:
        if hidden is None or original is None:
            return
        seen, speech = (frame_mask(inputs, name, hidden.shape[1]) for name in ("attention_mask", FRAME_MASK))
        for name, values in metrics.compare_frames(hidden, original, seen, speech).items():
            self._parts[name].append(values)

    def _keep(
        self, reading: Reading, mask: Tensor | None, original: Reading | None, labels: Sequence[int] | None
    ) -> None:
        logits, embedding, outputs = reading
        if embedding is not None:
            self._parts["embedding"].append(embedding.cpu().numpy())
        checked = next((states for states in (embedding, logits, outputs.hidden) if states is not None), None)
        if checked is not None:
            self.nonfinite += int((~checked.flatten(1).isfinite().all(-1)).sum())
        parts: dict[str, Array] = {}
        if logits is not None and original is not None and original.logits is not None:
            parts |= metrics.compare_logits(logits, original.logits)
        if logits is not None and outputs.logits is not None:
            if outputs.logits.ndim == 2:
                parts["predictions"] = np.ones(len(logits), dtype=int)
                if logits.shape[-1] > 1:
                    parts |= metrics.choose(logits)
                if labels is not None:
                    parts |= metrics.score_logits(logits, labels)
            elif outputs.logits.ndim == 3:
                rows, tokens, _ = outputs.logits.shape
                parts["predictions"] = np.full(rows, tokens) if mask is None else mask.sum(1).cpu().numpy()
        for name, values in parts.items():
            self._parts[name].append(values)

    def parts(self) -> dict[str, Array]:
        return {name: np.concatenate(values) for name, values in self._parts.items()}

    def costs(self) -> dict[str, Value]:
        """What it takes to run: positions, cost, time, memory."""
        values = {name: Value(value) for name, value in self.meter.totals().items()}
        values["seconds"] = Value(statistics.median(self._seconds))
        values["peak_bytes"] = Value(float(self.peak_bytes or 0))
        return values


def left_exact(report: PatchReport) -> list[str]:
    """Names of the self-attention modules that patching left as they were."""
    return [row.name for row in report.exact if row.index is not None]


def share_weights(model: nn.Module) -> nn.Module:
    """A copy of a model in evaluation mode whose parameters and buffers are those of the original, not copies."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared).eval()
