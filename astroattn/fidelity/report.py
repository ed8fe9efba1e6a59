"""One comparison as one page: the verdict, the cost, where the error is, what it did, and how to have less of it."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from astroattn.fidelity.diagnosis import LayerFidelity
from astroattn.fidelity.figure import ALONE, BARS, LOWER_IS_BETTER, TOGETHER, draw_bars, draw_layers
from astroattn.fidelity.metrics import METRICS, Array
from astroattn.fidelity.page import Chart, Table, draw_chart, show_both, write_page
from astroattn.fidelity.result import Fidelity
from astroattn.fidelity.verdict import MEASURED, judge
from astroattn.files import check_output
from astroattn.imports import needs

with needs("eval"):
    import numpy as np

WORST_LAYERS = 3
WORST_ITEMS = 12
MOST_HEADS = 4000  # rows of the table of heads: less than 1 MB
MOST_LETTERS = 600  # of a text that is shown
PIXELS = 176  # of the longer side of a photo that is shown
COSTS = ("positions", "keys", "cost", "seconds", "peak_bytes")


class Item(NamedTuple):
    """One item of which the patched model made something else."""

    name: str
    photo: str | None  # a data URI
    text: str | None
    changed: bool
    table: Table
    facts: Sequence[tuple[str, str]]


class Cure(NamedTuple):
    """The worst layers, and what to say so that they stay exact."""

    names: Sequence[str]
    where: str
    layers: str


def write_report(result: Fidelity, path: str | Path, metric: str = "auto", tolerance: float | None = None) -> None:
    """Write a comparison as one HTML page, without anything that a network would have to bring.

    Raises:
        ValueError: a path that is not of an HTML file in an existing folder; as `judge`.
    """
    check_output("report", Path(path), (".html",), force=True)
    verdict = judge(result, metric, tolerance)
    order = _rank(result)
    changed = _changed(result)
    write_page(
        path,
        "comparison.html",
        result=result,
        verdict=verdict,
        label=METRICS[MEASURED[verdict.metric]].label,
        shown={name: show_both(MEASURED[verdict.metric], row.values.get(MEASURED[verdict.metric]), name == "patched")
               for name, row in result.rows.items() if name != "original"},
        costs=_cost_table(result),
        charts=_layer_charts(result.layers),
        layers=_layer_table(result),
        heads=_head_table(result),
        cures=_cures(result.layers),
        items=[_item(result, number) for number in order[:WORST_ITEMS]],
        changed=None if changed is None else int(changed.sum()),
        controls=_control_table(result),
        bars=_control_charts(result),
        meanings=[(each.label, each.note) for key, each in METRICS.items() if key in result.rows["patched"].values],
        environment=_environment(result),
    )  # fmt: skip


def decibels(error: float) -> str:
    """The ratio of signal to quantisation noise, -20 log10 of a relative error, in dB."""
    return "∞" if error == 0 else f"{-20 * math.log10(error):.1f}" if math.isfinite(error) else "not finite"


def _cost_table(result: Fidelity) -> Table:
    base = result.rows["original"].values["seconds"].value
    columns = ["model", *(METRICS[key].label for key in COSTS), "time / original"]
    rows = []
    for name, row in result.rows.items():
        seconds = row.values["seconds"].value
        ratio = f"{seconds / base:.2f}" if base else ""
        rows.append([name, *(show_both(key, row.values.get(key)) for key in COSTS), ratio])
    return Table("Cost of a pass", columns, rows)


def _control_table(result: Fidelity) -> Table:
    rows = []
    for key, metric in METRICS.items():
        cells = [show_both(key, row.values.get(key), name == "patched") for name, row in result.rows.items()]
        if any(cells) and key not in COSTS:
            rows.append([metric.label, *cells])
    return Table("Fidelity and task, with 95 % intervals", ["figure", *result.rows], rows)


def _control_charts(result: Fidelity) -> list[Chart]:
    found: tuple[str, ...] = next((pair for pair in BARS if pair[0] in result.rows["patched"].values), ())

    def draw(axes: Any, key: str) -> None:
        draw_bars(axes, result, key)
        axes.set_title("", loc="left")
        axes.set_xlabel("lines: 95 % intervals", fontsize=8)

    height = 1.2 + 0.5 * len(result.rows)
    return [
        draw_chart(
            f"bars{number}",
            f"{METRICS[key].label} ({'lower' if key in LOWER_IS_BETTER else 'higher'} is better)",
            f"{METRICS[key].label} of the patched model and of the controls; the figures are in the table.",
            partial(draw, key=key),
            height,
        )
        for number, key in enumerate(found)
        if any(key in row.values for name, row in result.rows.items() if name != "original")
    ]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _title(layer: LayerFidelity, layers: Sequence[LayerFidelity]) -> str:
    return f"{layer.name} ({layer.call})" if any(each.call for each in layers) else layer.name


def _layer_table(result: Fidelity) -> Table:
    rows = []
    for layer in result.layers:
        alone, together = _mean(layer.isolated_error), _mean(layer.together_error)
        worst = int(np.argmax(layer.isolated_error))
        rows.append(
            [
                _title(layer, result.layers),
                f"{alone:.4f}",
                decibels(alone),
                f"{_mean(layer.isolated_cosine):.4f}",
                f"{layer.isolated_error[worst]:.4f} (head {worst})",
                f"{together:.4f}",
                decibels(together),
                "" if layer.hidden_error is None else f"{layer.hidden_error:.4f}",
            ]
        )
    columns = ["layer", "error alone", "SQNR, dB", "cosine", "worst head", "error together", "SQNR, dB", "hidden state"]
    return Table("Every layer, mean of its heads", columns, rows, sortable=True)


def _head_table(result: Fidelity) -> Table:
    rows = []
    for layer in result.layers:
        for head, error in enumerate(layer.isolated_error):
            cells = (layer.isolated_cosine[head], layer.normaliser_error[head], layer.together_error[head])
            row = [_title(layer, result.layers), str(head), f"{error:.4f}", decibels(error)]
            rows.append((error, [*row, *(f"{cell:.4f}" for cell in cells)]))
    caption = "Every head"
    if len(rows) > MOST_HEADS:
        caption = f"The {MOST_HEADS:,} heads of {len(rows):,} with the largest error"
        rows = sorted(rows, key=lambda row: -row[0])[:MOST_HEADS]
    columns = ["layer", "head", "error alone", "SQNR, dB", "cosine", "|log normaliser|", "error together"]
    return Table(caption, columns, [row for _, row in rows], sortable=True)


def _layer_charts(layers: tuple[LayerFidelity, ...]) -> list[Chart]:
    if not layers:
        return []

    def draw_depth(axes: Any) -> None:
        draw_layers(axes, layers)
        axes.set_title("", loc="left")
        axes.set_ylabel("attention layer")
        axes.invert_yaxis()
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))

    def draw_histogram(axes: Any) -> None:
        alone = np.concatenate([layer.isolated_error for layer in layers])
        together = np.concatenate([layer.together_error for layer in layers])
        both = np.concatenate([alone, together])
        bins = np.linspace(0, 1.0001 * max(both[np.isfinite(both)], default=1e-6) + 1e-9, 25)
        axes.hist(alone, bins, color=ALONE, label="the layer alone")
        axes.hist(together, bins, histtype="step", linewidth=1.6, color=TOGETHER, label="all layers together")
        axes.set_xlabel("relative L2 error of the attention output")
        axes.set_ylabel("heads")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)

    heads = sum(len(layer.isolated_error) for layer in layers)
    return [
        draw_chart("depth", "Error along the depth", "The figures are in the table of layers.", draw_depth, 4),
        draw_chart(
            "heads", f"Errors of {heads} heads", "How many heads err by how much; see the table.", draw_histogram, 4
        ),
    ]


def _cures(layers: Sequence[LayerFidelity]) -> list[Cure]:
    """For the worst one, two and three layers, alone, the choice of layers that leaves them exact."""
    errors: dict[str, float] = {}
    index: dict[str, int] = {}
    for layer in layers:
        if layer.index is not None:
            index[layer.name] = layer.index
            errors[layer.name] = max(errors.get(layer.name, 0.0), _mean(layer.isolated_error))
    worst = [name for name in sorted(errors, key=lambda name: -errors[name]) if errors[name] > 0]
    cures = []
    for count in range(1, min(WORST_LAYERS, len(index) - 1, len(worst)) + 1):
        rest = sorted(index[name] for name in index if name not in worst[:count])
        cures.append(Cure([f"{name} ({errors[name]:.4f})" for name in worst[:count]], str(rest), ranges(rest)))
    return cures


def ranges(numbers: Sequence[int]) -> str:
    """Sorted indices as `--layers` takes them: 0-2,5."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _column(result: Fidelity, name: str) -> Array | None:
    """A column of numbers, NaN for what is None."""
    values = result.per_item.get(name)
    return None if values is None else np.array(values, dtype=float)


def _changed(result: Fidelity) -> Array | None:
    """Per item, whether its one prediction, or what was written, is another; None where there is neither."""
    row = result.per_item
    for before, after in (("original_text", "patched_text"), ("original", "patched")):
        if before in row:
            return np.array([one != other for one, other in zip(row[before], row[after], strict=True)])
    return None


def _rank(result: Fidelity) -> list[int]:
    """All items, those first of which the patched model made something else, then by how far off it is."""
    changed = _changed(result)
    kl, cosine, words = (_column(result, name) for name in ("kl", "cosine", "word_errors"))
    how_far = next(
        (x for x in (words, kl, None if cosine is None else -cosine, _column(result, "hidden_error")) if x is not None),
        None,
    )
    if how_far is None:
        return []
    how_far = np.nan_to_num(how_far, nan=np.inf)
    order = np.lexsort((-how_far, np.zeros(len(how_far)) if changed is None else ~changed))
    return [int(number) for number in order]


FACTS = {
    "label": "label",
    "kl": METRICS["kl"].label,
    "top1": "share of tokens with the same first choice",
    "cosine": METRICS["embedding_cosine"].label,
    "neighbour": METRICS["same_neighbour"].label,
    "logit_error": METRICS["logit_error"].label,
    "hidden_error": METRICS["hidden_error"].label,
    "original_text": "original wrote",
    "patched_text": "patched wrote",
    "transcript": "what is said",
}


def _item(result: Fidelity, number: int) -> Item:
    row = {name: values[number] for name, values in result.per_item.items()}
    source = result.sources[number] if result.sources else None
    text = source if isinstance(source, str) else None
    if text is not None and len(text) > MOST_LETTERS:
        text = text[: MOST_LETTERS - 1] + "…"
    if text is None and "digest" in row:
        text = row["name"]
    changed = _changed(result)
    pairs = {"first choice": "", "logit margin": "_margin", "correct": "_correct"}
    rows = [
        [title, *(_plain(row[f"{model}{end}"]) for model in ("original", "patched"))]
        for title, end in pairs.items()
        if f"original{end}" in row
    ]
    single = "original" in row
    if row.get("neighbour") is not None:
        row["neighbour"] = bool(row["neighbour"])
    facts = [
        (title, _plain(row[key]))
        for key, title in FACTS.items()
        if row.get(key) is not None and not (key == "top1" and single)
    ]
    name = f"item {number}" if text is not None or row["name"] == str(number) else row["name"]
    table = Table(f"{name}, before and after", ["", "original", "patched"], rows)
    return Item(name, _photo(source), text, bool(changed is not None and changed[number]), table, facts)


def _plain(value: Any) -> str:
    if value is None:
        return "not finite"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _photo(source: Any) -> str | None:
    """A photo as a small JPEG in a data URI; None for what is no photo."""
    from PIL import Image

    image = source if isinstance(source, Image.Image) else source.open() if hasattr(source, "open") else None
    if not isinstance(image, Image.Image):
        return None
    image = image.convert("RGB")
    image.thumbnail((PIXELS, PIXELS))
    data = BytesIO()
    image.save(data, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def _environment(result: Fidelity) -> list[tuple[str, str]]:
    plain = dict(result.environment)
    versions = plain.pop("versions", {})
    plain.pop("command", None)
    rows = [(name, str(value)) for name, value in plain.items()]
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)))
    if result.exact_check is not None:
        rows.append(("check", f"with exact attention the patched model differs by {result.exact_check:.1e} (rounding)"))
    config = result.rows["patched"].config or {}
    kind = (
        f"a plan for {len(config['modules'])} modules"
        if "modules" in config
        else ", ".join(f"{name} {value}" for name, value in config.items())
    )
    return [*rows, ("patched with", kind)]
