"""Rows of the `datasets` library: by name from its hub, or a local file or folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from astroattn.data.clips import Clip
from astroattn.data.photos import Photo
from astroattn.data.texts import Texts, read_records
from astroattn.imports import needs

BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
TRANSCRIPT_COLUMNS = ("text", "transcription", "transcript", "sentence")  # of a dataset of speech
SPLITS = ("validation", "test", "train")  # the first there is, where none is named


def read_dataset(source: str, limit: int | None) -> list[Photo] | list[Clip] | Texts:
    """The first rows of a dataset, streamed, so that nothing is written to a cache.

    Args:
        source: `NAME` or `NAME:SPLIT`; NAME is an id on the hub, a folder, or a CSV, JSON, Parquet or text file.
        limit: most rows to read; None is all.
    """
    with needs("eval"):
        import datasets

    name, _, split = source.partition(":")
    builder = BUILDERS.get(Path(name).suffix.lower()) if Path(name).is_file() else None
    try:
        if builder:
            loaded = datasets.load_dataset(builder, data_files=name, streaming=True)
        else:
            loaded = datasets.load_dataset(name, streaming=True)
    except Exception as error:  # the library raises many kinds, some of its own
        raise ValueError(f"data: datasets cannot load {name!r}: {str(error).splitlines()[0]}") from None
    split = split or next((split for split in SPLITS if split in loaded), next(iter(loaded)))
    if split not in loaded:
        raise ValueError(f"data: {name!r} has no split {split!r}; there are {', '.join(loaded)}")
    rows = loaded[split]
    features = dict(rows.features or {})
    image = next((column for column, kind in features.items() if isinstance(kind, datasets.Image)), None)
    if image:
        return _read_photos(rows.cast_column(image, datasets.Image(decode=False)), image, features, limit)
    audio = next((column for column, kind in features.items() if isinstance(kind, datasets.Audio)), None)
    if audio:
        return _read_clips(rows.cast_column(audio, datasets.Audio(decode=False)), audio, features, limit)
    records = list(islice(rows, limit))
    if not records:
        raise ValueError(f"data: {name!r} has no rows in {split!r}")
    return read_records(records, list(records[0]), name)


def _read_photos(rows: Any, image: str, features: dict[str, Any], limit: int | None) -> list[Photo]:
    label = next((column for column in ("label", "labels") if column in features), None)
    names = getattr(features[label], "names", None) if label else None
    photos = []
    for row, name, read in _read_files(rows, image, limit):
        value = row.get(label) if label else None
        photos.append(Photo(name, read, names[value] if names and value is not None else value))
    if not photos:
        raise ValueError("data: the dataset has no images")
    return photos


def _read_clips(rows: Any, audio: str, features: dict[str, Any], limit: int | None) -> list[Clip]:
    said = next((column for column in TRANSCRIPT_COLUMNS if column in features), None)
    clips = [Clip(name, read, row[said] if said else None) for row, name, read in _read_files(rows, audio, limit)]
    if not clips:
        raise ValueError("data: the dataset has no recordings")
    return clips


def _read_files(rows: Any, column: str, limit: int | None) -> Iterator[tuple[dict[str, Any], str, Callable[[], bytes]]]:
    """Every row with the name of the file in one of its columns, and how to read it."""
    for number, row in enumerate(islice(rows, limit)):
        cell = row[column]
        name = cell.get("path") or f"row {number}"
        yield row, name, Path(name).read_bytes if cell.get("bytes") is None else partial(_same, cell["bytes"])


def _same(content: bytes) -> bytes:
    return content
