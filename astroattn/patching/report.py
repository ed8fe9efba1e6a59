"""What patching did to every attention module of a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from astroattn.tables import Block, Table, render


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
