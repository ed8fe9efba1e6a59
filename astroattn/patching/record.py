"""What is needed to patch another copy of a model in the same way, as plain values and files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from astroattn.imports import needs
from astroattn.patching.site import CORE, site_of
from astroattn.plan import number_configs
from astroattn.version import __version__

RECORD_VERSION = 3
SETTINGS, TENSORS = "astroattn.json", "astroattn.safetensors"
PUT_OVER = ("torch.nn.utils.parametrize", "torch.distributed.")  # where classes come from that are put over another


def describe(model: nn.Module, adapter: str | None = None) -> dict[str, Any]:
    """The class of a model and its astrocytes: `{"format", "model", "configs", "modules": [{"name", "class", ...}]}`.

    Every astrocyte has the name and class of the module it hangs on, for each of its heads the number of its config
    among the distinct ones, its head dimension, and the names of the tensors it has learned, which lie below the
    module's name. `exact` are the other modules of those classes, by name: what the model was, to know another by. No
    modules: the model is not patched. `adapter` is the one of peft whose tensors are meant, the active one by default.
    """
    sites = {name: (site, module) for name, module in model.named_modules() if (site := site_of(module)) is not None}
    cores = {name: unwrapped(getattr(module, CORE), adapter) for name, (_, module) in sites.items()}
    configs, heads = number_configs(core.configs for core in cores.values())
    modules = [
        {
            "name": name,
            "class": sites[name][0].class_name,
            "heads": numbers,
            "head_dim": core.head_dim,
            "tensors": sorted(learned(core, adapter)),
        }
        for (name, core), numbers in zip(cores.items(), heads, strict=True)
    ]
    same = of_classes(model, {row["class"] for row in modules})
    return {
        "format": RECORD_VERSION,
        "astroattn": __version__,
        "model": class_name(model),
        "configs": configs,
        "modules": modules,
        "exact": {name: kind for name, kind in same.items() if name not in sites},
    }


def of_classes(model: nn.Module, classes: set[str]) -> dict[str, str]:
    """The modules of a model that are of one of these classes: their classes by name."""
    found = ((name, class_name(module)) for name, module in model.named_modules())
    return {name: kind for name, kind in found if kind in classes}


def learned(core: Any, adapter: str | None = None) -> dict[str, Tensor]:
    """The tensors an astrocyte has learned, by name, whether or not peft keeps them for its adapters."""
    core = unwrapped(core, adapter)
    if core.hidden is None:
        return {}
    return {f"hidden.{name}": tensor for name, tensor in unwrapped(core.hidden, adapter).state_dict().items()}


def learned_by(model: nn.Module, record: Mapping[str, Any], adapter: str | None = None) -> dict[str, Tensor]:
    """The tensors that the astrocytes of a record have learned, by full name."""
    return {
        join(row["name"], CORE, name): tensor
        for row in record["modules"]
        for name, tensor in learned(getattr(model.get_submodule(row["name"]), CORE), adapter).items()
    }


def tensor_names(record: Mapping[str, Any]) -> list[str]:
    """The full names of the tensors that a record says were learned."""
    return [join(row["name"], CORE, name) for row in record["modules"] for name in row["tensors"]]


def unwrapped(module: Any, adapter: str | None = None) -> Any:
    """The copy of a module that an adapter of peft trains and saves (`modules_to_save`); any other module itself."""
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return module
    name = module.active_adapters[0] if adapter is None else adapter
    return copies[name] if name in copies else module.original_module  # noqa: SIM401 (a ModuleDict has no get)


def write_record(model: nn.Module, record: dict[str, Any], folder: Path, adapter: str | None = None) -> None:
    """Write `astroattn.json`, and `astroattn.safetensors` where something was learned."""
    tensors = learned_by(model, record, adapter)
    if tensors:
        with needs("train"):
            import numpy  # noqa: F401 (safetensors writes with it)
            from safetensors.torch import save as to_bytes
        content = to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TENSORS).write_bytes(content)
        record = record | {"sha256": hashlib.sha256(content).hexdigest()}
    else:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TENSORS).unlink(missing_ok=True)  # of another record
    (folder / SETTINGS).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def class_name(model: nn.Module) -> str:
    """The name of the class a model was made with; patching, parametrizations and sharding put one over it."""
    site = site_of(model)
    if site is not None:
        return site.class_name
    return next(cls for cls in type(model).__mro__ if not cls.__module__.startswith(PUT_OVER)).__name__


def join(*names: str) -> str:
    """The name of a module or tensor from its parts; that of the model itself is empty."""
    return ".".join(filter(None, names))
