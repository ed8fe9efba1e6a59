"""Recordings of speech in a folder of .wav files, and their transcripts."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from astroattn.imports import needs

if TYPE_CHECKING:
    from numpy.typing import NDArray

TRANSCRIPTS = "transcripts.tsv"


@dataclass(frozen=True)
class Clip:
    """One recording: its path inside the source, how to read its bytes, and what is said where the source knows it."""

    name: str
    read: Callable[[], bytes]
    transcript: str | None = None

    def open(self) -> tuple[NDArray[Any], int]:
        """Samples [T] of -1 to 1, the mean of all channels, and samples per second; ValueError where it is no .wav."""
        with needs("eval"):
            from scipy.io import wavfile

        try:
            with warnings.catch_warnings():  # other chunks than sound (tags, cues) are passed over
                warnings.simplefilter("ignore", wavfile.WavFileWarning)
                rate, samples = wavfile.read(io.BytesIO(self.read()))
        except (OSError, ValueError, EOFError, struct.error, UnboundLocalError) as error:  # the last: it has no samples
            raise ValueError(f"data: {self.name!r} cannot be read as a .wav file: {error}") from None
        if not samples.size:
            raise ValueError(f"data: {self.name!r} holds no sound")
        return _scale(samples).reshape(len(samples), -1).mean(1), int(rate)


def _scale(samples: NDArray[Any]) -> NDArray[Any]:
    """Any width of sample as float32 of -1 to 1; 24 bits arrive as the upper part of 32, and 8 bits without a sign."""
    if samples.dtype.kind == "f":
        return samples.astype("float32")
    half = 2.0 ** (8 * samples.dtype.itemsize - 1)
    centred = samples.astype("float64") - (half if samples.dtype.kind == "u" else 0)
    return (centred / half).astype("float32")


def find_clips(source: Path) -> list[Clip]:
    """All .wav files of a folder, in the order of their names, with the transcripts of its `transcripts.tsv`."""
    paths = [path for path in source.rglob("*") if path.suffix.lower() == ".wav" and not path.name.startswith(".")]
    names = {path.relative_to(source).as_posix(): path for path in paths if path.is_file()}
    if not names:
        raise ValueError(f"data: no .wav files in {str(source)!r}")
    listed = source / TRANSCRIPTS
    transcripts = read_transcripts(listed) if listed.is_file() else {}
    if missing := sorted(transcripts.keys() - names.keys()):
        raise ValueError(f"data: {str(listed)!r} names {missing[0]!r}, and there is no such .wav file")
    return [Clip(name, names[name].read_bytes, transcripts.get(name)) for name in sorted(names)]


def read_transcripts(path: Path) -> dict[str, str]:
    """What is said in each file, from lines of a file name, a tab and the words."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data: cannot read {str(path)!r}: {error}") from None
    rows = [line.partition("\t") for line in lines]
    if wrong := [name for name, tab, _ in rows if not tab]:
        raise ValueError(f"data: {str(path)!r} has a line without a tab: {wrong[0]!r}")
    return {name.strip(): words.strip() for name, _, words in rows}
