"""Checkpoints of a training run: a folder per epoch with safetensors and JSON, no pickle.

`model.safetensors` has the weights, `best.safetensors` those of the best epoch (with early stopping),
`optimizer.safetensors` the tensors of the optimizer, and `state.json` its numbers, the settings of the run and the log.
They are whole also where the model is sharded (FSDP), and independent of the number of processes.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

WEIGHTS, BEST, OPTIMIZER, STATE = "model.safetensors", "best.safetensors", "optimizer.safetensors", "state.json"


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the latest epoch in a folder."""
    found = {
        int(path.name.removeprefix("epoch-")): path for path in folder.glob("epoch-*") if path.name[6:].isdecimal()
    }
    return found[max(found)] if found else None


def save_checkpoint(
    folder: Path,
    weights: dict[str, Tensor],
    state: dict[str, Any],
    best: dict[str, Tensor],
    log: list[dict[str, Any]],
    run: dict[str, Any],
) -> None:
    """Write a checkpoint beside the last one and then delete that, so that there is always a whole one."""
    name = f"epoch-{len(log)}"
    fresh = folder / f"{name}.part"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    moments = {f"{name}.{key}": value for name, each in state["state"].items() for key, value in each.items()}
    for file, tensors in ((WEIGHTS, weights), (OPTIMIZER, moments), (BEST, best)):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, fresh / file)
    content = {"run": run, "log": log, "param_groups": state["param_groups"]}
    (fresh / STATE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder / name, ignore_errors=True)
    fresh.rename(folder / name)
    for old in folder.glob("epoch-*"):
        if re.fullmatch(r"epoch-\d+", old.name) and old.name != name:
            shutil.rmtree(old)


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: Any, run: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Put a checkpoint into model and optimizer; returns the log and the best weights until then."""
    content = json.loads((folder / STATE).read_text("utf-8"))
    differs = [
        f"{name} {content['run'].get(name)!r}" for name, value in run.items() if content["run"].get(name) != value
    ]
    if differs:
        raise ValueError(f"resume: {str(folder)!r} is of another run, with {', '.join(differs)}")
    moments: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in load_file(folder / OPTIMIZER).items():
        name, _, moment = key.rpartition(".")
        moments[name][moment] = tensor
    set_state_dict(
        model,
        optimizer.optimizer,
        model_state_dict=load_file(folder / WEIGHTS),
        optim_state_dict={"state": moments, "param_groups": content["param_groups"]},
        options=StateDictOptions(full_state_dict=True),
    )
    return content["log"], load_file(folder / BEST)
