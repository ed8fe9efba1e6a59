"""The state of a `Distiller` in a file: tensors in safetensors, all else as JSON in its header."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from astroattn.imports import needs

if TYPE_CHECKING:
    from astroattn.distillation.distiller import Distiller

FILE, FORMAT = "distiller.safetensors", 1


def save(distiller: Distiller, folder: Path) -> None:
    """What `Distiller.save` does."""
    with needs("train"):
        import numpy  # noqa: F401 (safetensors writes with it)
        from safetensors.torch import save_file

    updates = distiller.updates
    state = updates.optimiser.state_dict()
    tensors: dict[str, Tensor] = dict(_weights(distiller))
    numbers: dict[str, dict[str, Any]] = {}
    for index, mine in state["state"].items():
        numbers[str(index)] = {name: value for name, value in mine.items() if not isinstance(value, Tensor)}
        tensors |= {f"optimiser.{index}.{name}": x for name, x in mine.items() if isinstance(x, Tensor)}
    content = {
        "format": FORMAT,
        "settings": _settings(distiller),
        "step": distiller.step,
        "losses": distiller.losses,
        "position": distiller.position,
        "scale": updates.scale,
        "optimiser": numbers,
        "param_groups": state["param_groups"],
        "schedule": updates.schedule.state_dict(),
    }
    try:
        text = json.dumps(content)
    except TypeError as error:
        raise ValueError(f"optimiser: it or its schedule keeps more than tensors and numbers: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f"{FILE}.new"  # so that an interruption leaves the old or the new
    kept = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    save_file(kept, fresh, metadata={"distiller": text})
    os.replace(fresh, folder / FILE)


@torch.no_grad()
def load(distiller: Distiller, folder: Path) -> None:
    """What `Distiller.load` does."""
    from safetensors import SafetensorError, safe_open

    path, updates = folder / FILE, distiller.updates
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {})["distiller"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file is no dict)
        settings, position = content["settings"], tuple(content["position"])
        groups = [_tuples(group) for group in content["param_groups"]]
        moments = {int(index): dict(numbers) for index, numbers in content["optimiser"].items()}
        step, losses, scale, schedule = (content[name] for name in ("step", "losses", "scale", "schedule"))
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"folder: {str(path)!r} is no state of a Distiller: {error}") from None
    mine = json.loads(json.dumps(_settings(distiller)))
    if content["format"] != FORMAT:
        raise ValueError(f"folder: {str(path)!r} has format {content['format']}; this version reads {FORMAT}")
    if wrong := [name for name, value in mine.items() if settings.get(name) != value]:
        name = wrong[0]
        raise ValueError(f"folder: {str(path)!r} has {name} {settings.get(name)!r}; this Distiller has {mine[name]!r}")
    weights = dict(_weights(distiller))
    for name, weight in weights.items():
        if name not in tensors or tensors[name].shape != weight.shape:
            raise ValueError(f"folder: {str(path)!r} has no {name} of shape {tuple(weight.shape)}")
    for name in tensors.keys() - weights.keys():
        _, index, moment = name.split(".", 2)
        moments[int(index)][moment] = tensors[name]
    updates.optimiser.load_state_dict({"state": moments, "param_groups": groups})
    updates.schedule.load_state_dict(schedule)
    for name, weight in weights.items():
        weight.copy_(tensors[name])
    for weight, full in zip(updates.weights, updates.full, strict=True):
        if full is not weight:
            weight.copy_(full)
    updates.scale, distiller.step, distiller.losses, distiller.position = scale, step, losses, position


def _weights(distiller: Distiller) -> Iterator[tuple[str, Tensor]]:
    """The weights that are trained, in full precision, and the original's of those that are not hidden ones."""
    names = {weight: name for name, weight in distiller.model.named_parameters()}
    for weight, full in zip(distiller.updates.weights, distiller.updates.full, strict=True):
        yield f"weight.{names[weight]}", full
    for weight, original in distiller.originals.items():
        yield f"original.{names[weight]}", original


def _settings(distiller: Distiller) -> dict[str, Any]:
    return {
        "model": type(distiller.model).__name__,
        "optimiser": type(distiller.updates.optimiser).__name__,
        "schedule": type(distiller.updates.schedule).__name__,
        **asdict(distiller.settings),
    }


def _tuples(group: dict[str, Any]) -> dict[str, Any]:
    """A group as optimisers have it: JSON knows no tuples."""
    return {
        name: tuple(value) if isinstance(value, list) and name != "params" else value for name, value in group.items()
    }
