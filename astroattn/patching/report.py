"""What patching did to every attention module of a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from astroattn.attention import AstrocyteAttention
from astroattn.config import AstroConfig
from astroattn.cost import covered_length
from astroattn.hidden import LearnedHidden
from astroattn.ops.native import library
from astroattn.tables import Block, Table, render

# Tokens from which on the default took less time than SDPA, forward, with the C++ kernels for such CPUs or with plain
# PyTorch; docs/results/benchmark.json, benchmark_avx512.json.
FASTER_FROM = {"avx2": 1024, "avx512": 1024, "torch": None}


@dataclass(frozen=True)
class Row:
    """One attention module: what it is now ("astrocyte" or "exact"), and why it is not all it could be."""

    name: str
    class_name: str
    status: str
    reason: str
    heads: int | None
    head_dim: int | None
    index: int | None  # what `where` calls it; None for cross attention and pooling
    kinds: int = 1  # distinct configs among its heads


class NotPatched(ValueError):
    """No module can be patched; `report` says why of each."""

    report: PatchReport


@dataclass(frozen=True)
class PatchReport:
    """Every attention module of a patched model, in module order, how the probe forward went, and what to know."""

    model: str
    rows: tuple[Row, ...]
    probe: str
    notes: tuple[str, ...] = ()

    @property
    def patched(self) -> list[Row]:
        """The modules an astrocyte answers for."""
        return [row for row in self.rows if row.status == "astrocyte"]

    @property
    def exact(self) -> list[Row]:
        """The modules that were left as they were."""
        return [row for row in self.rows if row.status == "exact"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        return render(self.blocks())

    def blocks(self) -> list[Block]:
        """What is printed of it, for `astroattn.tables`."""
        head = f"{self.model}: {len(self.patched)} of {len(self.rows)} attention modules are astrocytes"
        return [head, _table(self.rows), f"probe: {self.probe}", *(f"note: {note}" for note in self.notes)]


def _table(rows: tuple[Row, ...]) -> Table:
    cells = []
    for row in rows:
        heads = f"{row.heads} x {row.head_dim}" if row.heads else "-"
        why = "; ".join(filter(None, (f"its heads have {row.kinds} configs" if row.kinds > 1 else "", row.reason)))
        index = "-" if row.index is None else str(row.index)
        cells.append((index, row.name or "(the model itself)", row.class_name, heads, row.status, why))
    return Table(("#", "module", "class", "heads", "now", "why"), cells, names=1, remarks=5)


def make_notes(model: nn.Module) -> tuple[str, ...]:
    """What to know about the astrocytes of a model before it is used: no training, short sequences, no gain in time."""
    cores = [module for module in model.modules() if isinstance(module, AstrocyteAttention)]
    notes = []
    if untrained := sum(_is_untrained(core) for core in cores):
        notes.append(f"the learned hidden layers of {untrained} modules are untrained: distill the model first")
    configs = {config for core in cores for config in core.configs if config.hidden != "exact"}
    if short := min((covered_length(config) for config in configs), default=0):
        notes.append(f"sequences of up to {short:,} tokens are answered by softmax attention: there every key is exact")
    devices = {parameter.device.type for parameter in model.parameters()}
    if configs == {AstroConfig()} and devices == {"cpu"}:
        notes.append(_time_note())
    return tuple(notes)


def _is_untrained(core: AstrocyteAttention) -> bool:
    """Both weights of a learned layer start alike, and no training keeps them so."""
    layer = core.hidden
    if not isinstance(layer, LearnedHidden) or layer.key_weight.is_meta or layer.query_weight.is_meta:
        return False
    return torch.equal(layer.key_weight, layer.query_weight)


def _time_note() -> str:
    capability = torch.backends.cpu.get_cpu_capability().lower()
    if library.refusal(torch.float32):
        return (
            "on the CPUs that were measured the default's attention, in plain PyTorch, was slower than softmax's at "
            "every length up to 4,096 tokens"
        )
    start = FASTER_FROM.get(capability)
    if start is None:
        return "the time of the default's attention beside softmax's was not measured on such a CPU"
    return (
        f"on a CPU with {capability.upper()} the default's attention, in C++, was faster than softmax's from {start:,} "
        "tokens on, and slower in shorter ones"
    )
