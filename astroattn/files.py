"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes that one's place at the end of the block, and goes if that fails."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    part = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any, indent: int = 1) -> None:
    """Write plain values as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def check_output(name: str, path: Path, suffixes: Sequence[str], *, force: bool) -> None:
    """ValueError, with the name of the option, where a file cannot be written, or is there already without `force`."""
    if path.suffix.lower() not in suffixes:
        listed = " or ".join(filter(None, (", ".join(suffixes[:-1]), suffixes[-1])))
        raise ValueError(f"{name}: must end in {listed}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"{name}: there is no folder {str(path.parent)!r}")
    if path.exists() and not path.is_file():
        raise ValueError(f"{name}: {str(path)!r} is no file")
    if path.exists() and not force:
        raise ValueError(f"{name}: {str(path)!r} is there already; --force writes over it")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{name}: the folder {str(path.parent)!r} cannot be written to")
