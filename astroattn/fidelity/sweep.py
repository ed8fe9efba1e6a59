"""Comparisons of one model that differ in one setting."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from astroattn.fidelity.metrics import METRICS, show
from astroattn.fidelity.result import Fidelity
from astroattn.files import write_json
from astroattn.tables import Block, Table, render

SHOWN = (  # those that were measured
    "logit_error", "kl", "top1_agreement", "hidden_error", "word_error", "embedding_cosine", "same_neighbour",
    "positions", "cost", "time",
)  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """One comparison for each value of a setting.

    Args:
        setting: a field of `AstroConfig`.
        values: its values.
        results: the comparisons, in the same order, without controls and layers.
    """

    setting: str
    values: tuple[int | float | str | bool, ...]
    results: tuple[Fidelity, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        results = [result.to_dict() for result in self.results]
        return {"setting": self.setting, "values": list(self.values), "results": results}

    def save_json(self, path: str | Path) -> None:
        """Write `to_dict` as JSON, whole or not at all."""
        write_json(path, self.to_dict())

    def blocks(self) -> list[Block]:
        """What is printed of it, for `astroattn.tables`: a line for each value."""
        first = self.results[0]
        keys = [key for key in SHOWN if any(key in result.rows["patched"].values for result in self.results)]
        rows = []
        for value, result in zip(self.values, self.results, strict=True):
            found = result.rows["patched"].values
            cells = [show(key, found.get(key)) for key in keys]
            rows.append((str(value), *cells))
        notes = dict.fromkeys(note for result in self.results for note in result.notes)
        return [
            f"{first.model}: {first.items} items of {first.data}",
            "",
            Table((self.setting, *(METRICS[key].label for key in keys)), rows),
            *(f"note: {note}" for note in notes),
        ]

    def __str__(self) -> str:
        return render(self.blocks())
