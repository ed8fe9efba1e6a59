"""From the name of a source to items in batches."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from astroattn.choices import PYTHON_DOCS
from astroattn.data import clips, photos, texts
from astroattn.data.clips import Clip
from astroattn.data.hub import read_dataset
from astroattn.data.photos import Photo
from astroattn.data.texts import Texts

DATASETS = "datasets:"
HALVES = {"even": 0, "odd": 1}
FINDERS: dict[str, Callable[[Path], list[Photo] | list[Clip]]] = {
    "image": photos.find_photos,
    "audio": clips.find_clips,
}


@dataclass(frozen=True)
class Data:
    """Items to run a model on: texts, lists of token ids, photos, or recordings of speech.

    Args:
        name: what it is, for tables.
        items: the items; for scored pairs the sentences 2i and 2i + 1 are pair i.
        labels: class index of every item, or None.
        scores: score of every pair, or None.
        transcripts: what is said in every recording, or None.
        class_names: of the classes, by their index, where the source has them.
        notes: how the source was understood.
    """

    name: str
    items: Sequence[str | list[int] | Photo | Clip]
    labels: Sequence[int] | None = None
    scores: Sequence[float] | None = None
    transcripts: Sequence[str] | None = None
    class_names: Mapping[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def batches(self, encode: Callable[[list[Any]], Any], batch_size: int) -> Batches:
        """The items in order, `batch_size` at a time, as `encode` makes them; files are opened in their turn."""
        if batch_size < 1:
            raise ValueError(f"batch_size: must be at least 1, got {batch_size}")
        return Batches(self.items, encode, batch_size)


class Batches(Sequence[Any]):
    """Batches that are made when they are asked for."""

    def __init__(self, items: Sequence[Any], encode: Callable[[list[Any]], Any], batch_size: int) -> None:
        self._items, self._encode, self._size = items, encode, batch_size

    def __len__(self) -> int:
        return -(-len(self._items) // self._size)

    def __getitem__(self, index: Any) -> Any:
        number = range(len(self))[index]
        items = self._items[number * self._size : (number + 1) * self._size]
        return self._encode([item.open() if isinstance(item, Photo | Clip) else item for item in items])


def load_data(
    source: str,
    kind: str,
    *,
    tokenizer: Any = None,
    tokens: int = 0,
    max_tokens: int = 0,
    classes: str | Path | None = None,
    class_names: Mapping[str, int] | None = None,
    num_classes: int = 0,
    half: str | None = None,
    limit: int | None = None,
) -> Data:
    """Find the items of a source.

    Args:
        source: a folder or tar file of photos; a folder of .wav files, with a `transcripts.tsv` (file name, tab, words)
            if there is one; a text file, CSV or TSV, or a folder of .txt files; `datasets:NAME`, with `:SPLIT` if
            wanted; `python-docs` for docstrings of Python's standard library.
        kind: `"text"`, `"image"` or `"audio"`, what the model reads.
        tokenizer: of the model, for `tokens`.
        tokens: cut long texts into chunks of so many tokens; 0 does not cut.
        max_tokens: most tokens that the model takes, 0 for any number.
        classes: a list of classes for photos, as `classes.tsv` (which is found by itself beside them).
        class_names: class index by lower-case name, as the model knows them.
        num_classes: number of classes that the model predicts.
        half: `"even"` or `"odd"`: every second item, so that choices can be made on one half and reported on the other.
        limit: most items (pairs count once), after `half`.

    Raises:
        ValueError: a source that is missing, empty, unreadable or of the wrong kind.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: must be at least 1, got {limit}")
    if half is not None and half not in HALVES:
        raise ValueError(f"half: must be even or odd, got {half!r}")
    wanted = None if limit is None else limit * (2 if half else 1)
    found: list[Photo] | list[Clip] | Texts | list[list[int]]
    if tokens and kind != "text":
        raise ValueError(f"tokens: is for texts, this model reads {kind}")
    if source.startswith(DATASETS):
        found = read_dataset(source.removeprefix(DATASETS), wanted)
    elif kind == "text":
        found = _read_text(source, tokenizer, tokens, max_tokens)
    else:
        found = FINDERS[kind](_existing(source))
    name = Path(source).name if Path(source).exists() else source
    chosen = slice(HALVES[half] if half else 0, None, 2 if half else 1)
    if half:
        name += f", {half} half"
    if isinstance(found, Texts):
        _require(kind, "text", source)
        return _text_data(name, found, chosen, limit, class_names or {})
    if isinstance(found[0], Photo):
        _require(kind, "image", source)
        folders = sorted({str(photo.label) for photo in found if isinstance(photo.label, str)})
        named = dict(class_names or {})
        if len(folders) == num_classes and not set(map(str.lower, folders)) <= named.keys():
            named = {folder.lower(): index for index, folder in enumerate(folders)}
        return _photo_data(name, source, found[chosen][:limit], classes, named)
    if isinstance(found[0], Clip):
        _require(kind, "audio", source)
        return _clip_data(name, [clip for clip in found[chosen][:limit] if isinstance(clip, Clip)])
    if source == PYTHON_DOCS:
        name += f" {platform.python_version()}"
    items = found[chosen][:limit]
    return Data(f"{name}, chunks of {tokens} tokens", _not_empty(items))


def _read_text(source: str, tokenizer: Any, tokens: int, max_tokens: int) -> Texts | list[list[int]]:
    if not tokens:
        if source == PYTHON_DOCS:
            raise ValueError(f"tokens: {PYTHON_DOCS} is long text, say into how many tokens to cut it")
        path = _existing(source)
        if path.is_dir():
            return Texts([(line,) for text in texts.read_documents(path) for line in text.splitlines() if line.strip()])
        return texts.read_texts(path)
    if tokens < 8 or (max_tokens and tokens > max_tokens):
        raise ValueError(f"tokens: must be 8 to {max_tokens or 'any number'} for this model, got {tokens}")
    documents = texts.read_python_docs() if source == PYTHON_DOCS else texts.read_documents(_existing(source))
    chunks = texts.cut(documents, tokenizer, tokens)
    if not chunks:
        raise ValueError(f"tokens: no text of {source!r} has {tokens} tokens")
    return chunks


def _existing(source: str) -> Path:
    path = Path(source)
    if not path.exists():
        raise ValueError(f"data: there is no file or folder {source!r}; a dataset is written datasets:NAME")
    return path


def _require(kind: str, given: str, source: str) -> None:
    if kind != given:
        raise ValueError(f"data: the model reads {kind}, and {source!r} holds {given}")


def _not_empty(items: Sequence[Any]) -> Sequence[Any]:
    if not items:
        raise ValueError("data: no items are left")
    return items


def _text_data(name: str, found: Texts, chosen: slice, limit: int | None, class_names: Mapping[str, int]) -> Data:
    rows = _not_empty(found.rows[chosen][:limit])
    items = [text for row in rows for text in row]
    notes = (found.note,) if found.note else ()
    if found.scores is not None:
        return Data(name, items, scores=found.scores[chosen][:limit], notes=notes)
    data = Data(name, items, notes=notes)
    if found.labels is None:
        return data
    labels = [
        label if isinstance(label, int) else class_names.get(label.lower()) for label in found.labels[chosen][:limit]
    ]
    known = [label for label in labels if label is not None]
    if len(known) < len(labels):
        return replace(data, notes=(*notes, "labels are not used: their names are not those of the model's classes"))
    return replace(data, labels=known)


def _photo_data(
    name: str, source: str, items: list[Photo], classes: str | Path | None, named: Mapping[str, int]
) -> Data:
    data = Data(name, _not_empty(items))
    if all(isinstance(photo.label, int) for photo in items):
        return replace(data, labels=[photo.label for photo in items if isinstance(photo.label, int)])
    found = Path(classes) if classes else None if source.startswith(DATASETS) else photos.find_classes(Path(source))
    if found is not None:
        listed = photos.read_classes(found)
        labels, unknown = photos.label_photos(items, listed)
        if labels is None and classes:
            raise ValueError(f"classes: {str(found)!r} has no class {unknown!r}")
        if labels is not None:
            return replace(data, labels=labels, class_names=first_names(listed), notes=(f"classes from {found.name}",))
    labels, unknown = photos.label_photos(items, named)
    if labels is not None:
        return replace(
            data, labels=labels, class_names=first_names(named), notes=("classes by the names of the folders",)
        )
    return replace(data, notes=(f"no labels: no folder or name of a photo is a class of the model: {unknown!r}",))


def first_names(classes: Mapping[str, int]) -> dict[int, str]:
    """The name of every class, the first where there are several."""
    names: dict[int, str] = {}
    for name, index in classes.items():
        names.setdefault(index, name)
    return names


def _clip_data(name: str, items: list[Clip]) -> Data:
    data = Data(name, _not_empty(items))
    known = [clip.transcript for clip in items if clip.transcript is not None]
    if len(known) == len(items):
        return replace(data, transcripts=known)
    silent = next(clip.name for clip in items if clip.transcript is None)
    return replace(data, notes=(f"no transcripts: {silent!r} has none",))
