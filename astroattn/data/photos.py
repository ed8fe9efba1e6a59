"""Photos in a folder or a tar file, and their classes."""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from astroattn.imports import needs

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})


@dataclass(frozen=True)
class Photo:
    """One photo: its path inside the source, how to read its bytes, and its label where the source knows it."""

    name: str
    read: Callable[[], bytes]
    label: int | str | None = None

    def open(self) -> Any:
        """The photo as an RGB image of PIL; ValueError where its bytes are no image."""
        with needs("eval"):
            from PIL import Image

        try:
            return Image.open(io.BytesIO(self.read())).convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"data: {self.name!r} cannot be read as an image: {error}") from None


def find_photos(source: Path) -> list[Photo]:
    """All photos of a folder or of a tar file (never extracted), in the order of their names.

    The label of a photo in a subfolder is the name of that subfolder, as in `class/photo.jpg`.
    """
    readers = _read_folder(source) if source.is_dir() else _read_tar(source)
    names = sorted(name for name in readers if _is_photo(name))
    if not names:
        raise ValueError(f"data: no images in {str(source)!r} (looked for {', '.join(sorted(SUFFIXES))})")
    folders = [PurePosixPath(name).parts[0] if "/" in name else None for name in names]
    labelled = None not in folders and len(set(folders)) > 1
    return [
        Photo(name, readers[name], folder if labelled else None) for name, folder in zip(names, folders, strict=True)
    ]


def _is_photo(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _read_folder(folder: Path) -> dict[str, Callable[[], bytes]]:
    return {path.relative_to(folder).as_posix(): path.read_bytes for path in folder.rglob("*") if path.is_file()}


def _read_tar(path: Path) -> dict[str, Callable[[], bytes]]:
    try:
        with tarfile.open(path, "r:") as archive:
            members = [member for member in archive if member.isreg() and not member.issparse()]
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"data: {str(path)!r} is not a readable, uncompressed tar file: {error}") from None
    return {m.name.removeprefix("./"): partial(_read_part, path, m.offset_data, m.size) for m in members}


def _read_part(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


def read_classes(path: Path) -> dict[str, int]:
    """Class index by lower-case key, from a tab-separated list with the columns index, wnid and name.

    Keys are the wnid, `index_wnid`, and the name where only one class has it.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [(int(row["index"]), row["wnid"], row["name"]) for row in csv.DictReader(file, delimiter="\t")]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"classes: {str(path)!r} needs columns index, wnid and name, separated by tabs: {error}"
        ) from None
    names = [name.lower() for _, _, name in rows]
    classes = {name: index for (index, _, _), name in zip(rows, names, strict=True) if names.count(name) == 1}
    for index, wnid, _ in rows:
        classes |= {wnid.lower(): index, f"{index}_{wnid}".lower(): index}
    return classes


def find_classes(source: Path) -> Path | None:
    """A `classes.tsv` in the folder or beside the folder or file."""
    return next((path for path in (source / "classes.tsv", source.parent / "classes.tsv") if path.is_file()), None)


def label_photos(photos: Sequence[Photo], classes: Mapping[str, int]) -> tuple[list[int] | None, str | None]:
    """The class index of every photo, by the name of its folder or of its file; INDEX_WNID may begin with zeros.

    Without an index for every photo there are no labels; then the first name that is not known comes back too.
    """
    labels = []
    for photo in photos:
        word = str(photo.label) if photo.label is not None else PurePosixPath(photo.name).stem
        known = next((key for key in (word.lower(), _strip_zeros(word).lower()) if key in classes), None)
        if known is None:
            return None, word
        labels.append(classes[known])
    return labels, None


def _strip_zeros(stem: str) -> str:
    index, _, rest = stem.partition("_")
    return f"{int(index)}_{rest}" if index.isdecimal() else stem
