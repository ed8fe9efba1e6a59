"""What was measured so far, in a file: a calibration that was interrupted goes on from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from astroattn.calibration.effects import Measured
from astroattn.config import AstroConfig
from astroattn.files import replacing


class State:
    """The effects and costs of the choosing items, one after the other, in a safetensors file with JSON metadata.

    Args:
        path: of the file, read where it is there; None keeps nothing.
        identity: what the file must have been made for, in words, by the name of the argument.

    Raises:
        ValueError: the file cannot be read, or was made for something else, which is named.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, str]) -> None:
        self._path, self._identity = path, dict(identity)
        self.items: list[Measured] = []
        self.notes: list[str] = []
        if path is None:
            return
        if not path.parent.is_dir():
            raise ValueError(f"state: there is no folder {str(path.parent)!r}")
        if path.exists():
            self._read(path)

    def add(self, measured: Measured) -> None:
        """Keep what was measured of the next item."""
        from safetensors.torch import save_file

        self.items.append(measured)
        if self._path is None:
            return
        fields = zip(*self.items, strict=True)
        tensors = {name: torch.stack(parts) for name, parts in zip(Measured._fields, fields, strict=True)}
        about = {"identity": json.dumps(self._identity), "notes": json.dumps(self.notes)}
        with replacing(self._path) as part:
            save_file(tensors, part, metadata=about)

    def _read(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = [file.get_tensor(name) for name in Measured._fields]
            identity = json.loads(metadata["identity"])
            self.notes = [str(note) for note in json.loads(metadata["notes"])]
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise ValueError(f"state: {str(path)!r} is not a state of calibrate: {error}") from None
        wrong = [name for name, value in self._identity.items() if identity.get(name) != value]
        if wrong:
            raise ValueError(f"state: {str(path)!r} was made with another {wrong[0]}; delete it or name another file")
        self.items = [Measured(*parts) for parts in zip(*tensors, strict=True)]


def identify(
    model: nn.Module, modules: Mapping[str, int], menu: Sequence[AstroConfig], items: Sequence[Any], **rest: Any
) -> dict[str, str]:
    """What the measurements depend on, by name; the weights and the items as digests."""
    return {
        "model": type(model).__name__,
        "weights": _digest([*model.parameters(), *model.buffers()]),
        "modules": json.dumps(dict(modules)),
        "menu": json.dumps([asdict(config) for config in menu]),
        "batches": _digest(items),
    } | {name: str(value) for name, value in rest.items()}


def _digest(values: Any) -> str:
    digest = hashlib.sha256()
    _feed(digest, values)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for name in value:
            digest.update(str(name).encode())
            _feed(digest, value[name])
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for each in value:
            _feed(digest, each)
    else:
        digest.update(repr(value).encode())
