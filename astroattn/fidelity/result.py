"""The result of a comparison: tables for people, JSON for programs, a figure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from astroattn.fidelity.diagnosis import LayerFidelity
from astroattn.fidelity.items import save_items
from astroattn.fidelity.metrics import METRICS, Value, show, show_interval
from astroattn.fidelity.verdict import Verdict, judge
from astroattn.files import write_text
from astroattn.tables import Block, Table, render

INTERVAL = "95 % interval"  # of the patched model's figures
WORST = 5  # layers


@dataclass(frozen=True)
class Row:
    """One column of the table: a model, its config (None for the original) and what was measured."""

    config: dict[str, Any] | None
    values: dict[str, Value]


@dataclass(frozen=True)
class Fidelity:
    """What changed when softmax attention was replaced; made by `compare`.

    Args:
        model: name of the model.
        data: what the inputs were.
        items: number of items (rows of the batches).
        rows: `original`, `patched` and the controls; `METRICS` says what each value is.
        layers: per layer and head, in the order of their calls.
        diagnosed: number of items that `layers` was measured on.
        exact_check: relative difference between the patched model with exact attention and the original; rounding only.
        notes: what a reader must know (figures left out, modules left exact ...).
        environment: versions, device, dtype, seed, pooling, command, date, how memory was measured.
        per_item: one row per item (the first `items.MOST_ITEMS`) in columns: see `items.make_columns`.
        sources: the items themselves, as far as they were given to `compare`, for the report; not saved.
    """

    model: str
    data: str
    items: int
    rows: Mapping[str, Row]
    layers: tuple[LayerFidelity, ...]
    diagnosed: int
    exact_check: float | None
    notes: tuple[str, ...]
    environment: Mapping[str, Any] = field(default_factory=dict)
    per_item: Mapping[str, list[Any]] = field(default_factory=dict, repr=False)
    sources: Sequence[Any] = field(default=(), repr=False, compare=False)

    def value(self, metric: str, row: str = "patched") -> float:
        """One figure, by its name in `METRICS`; KeyError, naming those there are, where it was not measured."""
        values = self.rows[row].values
        if metric not in values:
            raise KeyError(f"metric: {metric!r} was not measured for {row!r}; there are {', '.join(values)}")
        return values[metric].value

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a value that is not finite becomes None."""
        plain: dict[str, Any] = _finite(asdict(replace(self, sources=())))
        del plain["sources"]
        return plain

    def save_json(self, path: str | Path) -> None:
        """Write everything but the items themselves; `load_result` reads it."""
        plain = self.to_dict()
        lines = [f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in plain.pop("per_item").items()]
        head = json.dumps(plain, indent=1).removesuffix("\n}")
        columns = ",\n".join(lines)  # each on one line
        text = head + ',\n "per_item": {\n' + columns + "\n }\n}\n"
        write_text(path, text)

    def save_items(self, path: str | Path) -> None:
        """Write `per_item` to a Parquet file; `load_items` reads it."""
        save_items(dict(self.per_item), path)

    def verdict(self, metric: str = "auto", tolerance: float | None = None) -> Verdict:
        """Hold a figure against a tolerance; metrics, choice and errors are those of `judge`."""
        return judge(self, metric, tolerance)

    def report(self, path: str | Path, metric: str = "auto", tolerance: float | None = None) -> None:
        """Write one HTML page with everything, which needs no network; the verdict is that of `verdict`."""
        from astroattn.fidelity.report import write_report

        write_report(self, path, metric, tolerance)

    def figure(self, path: str | Path) -> None:
        """Draw the error per layer and head, per layer alone and together, and the controls; PNG, PDF or SVG."""
        from astroattn.fidelity.figure import draw

        draw(self, path)

    def blocks(self) -> list[Block]:
        """What is printed of it, for `astroattn.tables`."""
        blocks: list[Block] = [f"{self.model}: {self.items} items of {self.data}", "", _summary_table(self), ""]
        if self.layers:
            blocks += [_layer_table(self), ""]
            if (table := _worst_table(self.layers)) is not None:
                blocks += [table, ""]
        return blocks[:-1] + [f"note: {note}" for note in self.notes]

    def __str__(self) -> str:
        return render(self.blocks())


def _summary_table(result: Fidelity) -> Table:
    """A line for each figure; the interval of the patched model's is a column of its own."""
    columns = [""]
    for name in result.rows:
        columns += [name, INTERVAL] if name == "patched" else [name]
    lines = []
    for key, metric in METRICS.items():
        cells = []
        for name, row in result.rows.items():
            value = row.values.get(key)
            cells.append(show(key, value))
            if name == "patched":
                cells.append(show_interval(key, value))
        if any(cells):
            lines.append((metric.label, *cells))
    return Table(columns, lines)


def _layer_table(result: Fidelity) -> Table:
    names = _layer_names(result.layers)
    rows = []
    for name, layer in zip(names, result.layers, strict=True):
        worst = max(range(len(layer.isolated_error)), key=lambda head: layer.isolated_error[head])
        rows.append(
            (
                name,
                _mean(layer.isolated_error),
                f"{layer.isolated_error[worst]:.3f} ({worst})",
                _mean(layer.isolated_cosine),
                _mean(layer.normaliser_error),
                _mean(layer.together_error),
                _mean(layer.together_cosine),
                "" if layer.hidden_error is None else f"{layer.hidden_error:.3f}",
            )
        )
    return Table(
        ("layer", "alone", "worst head", "cosine", "|log normaliser|", "together", "cosine", "hidden state"),
        rows,
        title=f"per layer, on {result.diagnosed} items: relative error of the attention output against softmax",
        caption="alone: the layer reads the original's queries, keys and values. together: all layers are patched.",
        names=0,
    )


def _worst_table(layers: tuple[LayerFidelity, ...]) -> Table | None:
    """The layers that are paid for most and lose most; None where the cost of layers is not known."""
    scored = []
    for name, layer in zip(_layer_names(layers), layers, strict=True):
        error, share = sum(layer.isolated_error) / len(layer.isolated_error), layer.cost_share
        if share is not None and math.isfinite(error):
            scored.append((error * share, error, share, name))
    if len(scored) < 2:
        return None
    rows = [
        (name, f"{error:.3f}", f"{share:.1%}", f"{product:.4f}")
        for product, error, share, name in sorted(scored, reverse=True)[:WORST]
    ]
    return Table(
        ("layer", "alone", "share of all cost", "product"),
        rows,
        title="layers that cost and lose most: error alone x share of the cost",
        names=0,
    )


def _layer_names(layers: tuple[LayerFidelity, ...]) -> list[str]:
    repeated = any(layer.call for layer in layers)
    return [f"{layer.name} ({layer.call})" if repeated else layer.name for layer in layers]


def _mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.3f}"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
