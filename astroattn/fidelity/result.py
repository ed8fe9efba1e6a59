"""The result of a comparison: tables for people, JSON for programs, a figure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from astroattn.fidelity.diagnosis import LayerFidelity
from astroattn.fidelity.items import save_items
from astroattn.fidelity.metrics import METRICS, SCALES, Value
from astroattn.fidelity.verdict import Verdict, judge

TABLE_WIDTH = 132


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
        Path(path).write_text(text, encoding="utf-8")

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

    def __rich__(self) -> Group:
        parts: list[Any] = [f"{self.model}: {self.items} items of {self.data}", _summary_table(self)]
        if self.layers:
            parts.append(_layer_table(self))
        parts += [f"note: {note}" for note in self.notes]
        return Group(*parts)

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=TABLE_WIDTH, markup=False, highlight=False).print(self)
        return text.getvalue().rstrip()


def _summary_table(result: Fidelity) -> Table:
    table = Table(caption=r"\[low, high]: 95 % interval", caption_justify="left")
    table.add_column("")
    for name in result.rows:
        table.add_column(name, justify="right")
    for key, metric in METRICS.items():
        cells = [_show(key, row.values.get(key), interval=name == "patched") for name, row in result.rows.items()]
        if any(cells):
            table.add_row(metric.label, *cells)
    return table


def _show(key: str, value: Value | None, interval: bool) -> str:
    if value is None:
        return ""
    if not math.isfinite(value.value):
        return "not finite"
    form, scale = METRICS[key].form, SCALES.get(key, 1.0)
    text = form.format(value.value * scale)
    if interval and value.low is not None and value.high is not None:
        text += f"\n[{form.format(value.low * scale)}, {form.format(value.high * scale)}]"
    return text


def _layer_table(result: Fidelity) -> Table:
    table = Table(
        title=f"per layer, on {result.diagnosed} items: relative error of the attention output against softmax",
        title_justify="left",
        caption="alone: the layer reads the original's queries, keys and values. together: all layers are patched.",
        caption_justify="left",
    )
    table.add_column("layer")
    for name in ("alone", "worst head", "cosine", "|log normaliser|", "together", "cosine", "hidden state"):
        table.add_column(name, justify="right")
    repeated = any(layer.call for layer in result.layers)
    for layer in result.layers:
        worst = max(range(len(layer.isolated_error)), key=lambda head: layer.isolated_error[head])
        table.add_row(
            f"{layer.name} ({layer.call})" if repeated else layer.name,
            _mean(layer.isolated_error),
            f"{layer.isolated_error[worst]:.3f} (head {worst})",
            _mean(layer.isolated_cosine),
            _mean(layer.normaliser_error),
            _mean(layer.together_error),
            _mean(layer.together_cosine),
            "" if layer.hidden_error is None else f"{layer.hidden_error:.3f}",
        )
    return table


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
