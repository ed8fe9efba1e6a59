"""What a comparison keeps of every item, in columns of plain values, and the Parquet file of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from astroattn.fidelity import metrics
from astroattn.fidelity.metrics import Array
from astroattn.fidelity.speech import count_word_errors
from astroattn.files import replacing
from astroattn.imports import needs

with needs("eval"):
    import numpy as np

MOST_ITEMS = 50_000  # the first so many have a row: some 10 MB of JSON
MOST_LETTERS = 160  # of a text that is the name of an item

Columns = dict[str, list[Any]]


def make_columns(
    original: Mapping[str, Array],
    patched: Mapping[str, Array],
    names: Columns,
    labels: Sequence[int] | None = None,
    class_names: Mapping[int, str] | None = None,
    written: tuple[Sequence[str], Sequence[str]] = ((), ()),
    transcripts: Sequence[str] | None = None,
) -> Columns:
    """One row per item from what was seen of the original and of the patched model; `written` is by the two.

    `name` and, of a text, `digest` say which item it is. Figures have the names of `plan.METRICS` where they are
    there: `top1` is 1 or 0, or the share of the tokens of a model that predicts each. Errors are relative; with
    `logit_norm` and `hidden_norm` of the original they add up to those of all items.
    """
    count = len(names["name"])
    columns: Columns = dict(names)
    if "choice" in original and "choice" in patched:
        title = class_names or {}
        if labels is not None and "correct1" in original:
            columns["label"] = [title.get(int(label), str(label)) for label in labels]
        for model, parts in (("original", original), ("patched", patched)):
            columns[model] = [title.get(int(choice), str(int(choice))) for choice in parts["choice"]]
            columns[f"{model}_margin"] = _plain(parts["margin"])
            if "correct1" in parts:
                columns[f"{model}_correct"] = [bool(hit) for hit in parts["correct1"]]
    if "kl" in patched and "predictions" in patched:
        predictions = patched["predictions"]
        items = np.repeat(np.arange(count), predictions)
        sums = {key: np.bincount(items, patched[key], count) for key in ("same1", "kl", "error", "norm")}
        for name, key in (("top1", "same1"), ("kl", "kl")):
            columns[name] = _plain(sums[key] / np.maximum(predictions, 1))
        columns |= _error_columns("logit", sums["error"], sums["norm"])
    if "embedding" in patched and "embedding" in original:
        columns["cosine"] = _plain(metrics.compare_embeddings(patched["embedding"], original["embedding"]))
        if count >= 3:
            same = metrics.compare_neighbours(patched["embedding"], original["embedding"])
            columns["neighbour"] = [float(hit) for hit in same] + [None] * (count - len(same))
    for name in ("hidden", "speech"):
        if f"{name}_error" in patched:
            columns |= _error_columns(name, patched[f"{name}_error"], patched[f"{name}_norm"])
    before, after = written
    if before and after:
        columns |= {"original_text": list(before), "patched_text": list(after)}
        errors, words = count_word_errors(after, before)
        columns |= {"word_errors": errors.tolist(), "words": words.tolist()}
        if transcripts is not None:
            columns["transcript"] = list(transcripts)
    return {name: values[:MOST_ITEMS] for name, values in columns.items()}


def _error_columns(name: str, error: Array, norm: Array) -> Columns:
    relative = np.sqrt(error / np.maximum(norm, np.finfo(float).tiny))
    return {f"{name}_error": _plain(relative), f"{name}_norm": _plain(np.sqrt(norm))}


def _plain(values: Array) -> list[float | None]:
    """Six digits are enough, and shorter; None for what is not finite."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]


def name_items(items: Sequence[Any] | None, count: int) -> Columns:
    """The column `name` and, of texts, `digest`; without items their numbers from 0 are their names."""
    if items is None:
        return {"name": [str(number) for number in range(count)]}
    columns: Columns = {"name": [_name(item, number) for number, item in enumerate(items)]}
    if items and all(isinstance(item, str) for item in items):
        columns["digest"] = [hashlib.sha256(text.encode()).hexdigest()[:12] for text in items]
    return columns


def _name(item: Any, number: int) -> str:
    if isinstance(item, str):
        return item if len(item) <= MOST_LETTERS else item[: MOST_LETTERS - 1] + "…"
    name = getattr(item, "name", None)
    return name if isinstance(name, str) and name else str(number)


def save_items(columns: Columns, path: str | Path) -> None:
    """Write the rows to a Parquet file, which pandas, polars, DuckDB and `datasets` read."""
    with needs("eval"):
        import pyarrow as pa
        from pyarrow import parquet

    with replacing(path) as part:
        parquet.write_table(pa.table(columns), part)


def load_items(path: str | Path) -> Columns:
    """The columns that `save_items` wrote.

    Raises:
        ValueError: a file that cannot be read as Parquet.
    """
    with needs("eval"):
        import pyarrow as pa
        from pyarrow import parquet

    try:
        columns: Columns = parquet.read_table(path).to_pydict()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"items: cannot read {str(path)!r}: {error}") from None
    return columns
