"""What is needed to patch another copy of a model in the same way, as plain values, and how transformers saves it.

The record of a model of transformers lies in the header of its files of weights. It is made from the model as it is
when it is saved, nothing in memory holds it, and a file of weights that is written again without it has none.
"""

from __future__ import annotations

import functools
import json
import sys
from contextvars import ContextVar
from typing import Any

from torch import nn

from astroattn.patching.site import CORE, site_of
from astroattn.plan import number_configs

RECORD_VERSION = 2
RECORD_KEY = "astroattn"  # in the metadata of a safetensors file
PUT_OVER = ("torch.nn.utils.parametrize", "torch.distributed.")  # where classes come from that are put over another

_record: ContextVar[dict[str, str]] = ContextVar("astroattn_record", default={})  # noqa: B039 (never changed)


def describe(model: nn.Module) -> dict[str, Any]:
    """The class of a model and its astrocytes: `{"format", "model", "configs", "modules": [{"name", "class", ...}]}`.

    Every astrocyte has the name and class of the module it hangs on, for each of its heads the number of its config
    among the distinct ones, its head dimension, and the names of the tensors it has learned, which lie below the
    module's name. No modules: the model is not patched.
    """
    sites = {name: (site, module) for name, module in model.named_modules() if (site := site_of(module)) is not None}
    cores = {name: getattr(module, CORE) for name, (_, module) in sites.items()}
    configs, heads = number_configs(core.configs for core in cores.values())
    modules = [
        {
            "name": name,
            "class": sites[name][0].class_name,
            "heads": numbers,
            "head_dim": core.head_dim,
            "tensors": sorted(core.state_dict()),
        }
        for (name, core), numbers in zip(cores.items(), heads, strict=True)
    ]
    return {"format": RECORD_VERSION, "model": class_name(model), "configs": configs, "modules": modules}


def keep_records() -> None:
    """Have transformers, where it is imported, write the record of every patched model that it saves."""
    library: Any = sys.modules.get("transformers.modeling_utils")
    model = getattr(library, "PreTrainedModel", None)
    if model is None or hasattr(model.save_pretrained, RECORD_KEY):
        return
    model.save_pretrained = _noting_the_model(model.save_pretrained)
    library.safe_save_file = _adding_the_record(library.safe_save_file)


def _noting_the_model(save_pretrained: Any) -> Any:
    @functools.wraps(save_pretrained)
    def save(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        record = describe(self)
        token = _record.set({RECORD_KEY: json.dumps(record)} if record["modules"] else {})
        try:
            return save_pretrained(self, *args, **kwargs)
        finally:
            _record.reset(token)

    setattr(save, RECORD_KEY, True)
    return save


def _adding_the_record(save_file: Any) -> Any:
    @functools.wraps(save_file)
    def save(tensors: Any, filename: Any, metadata: dict[str, str] | None = None) -> None:
        save_file(tensors, filename, metadata={**(metadata or {}), **_record.get()})

    return save


def class_name(model: nn.Module) -> str:
    """The name of the class a model was made with; patching, parametrizations and sharding put one over it."""
    site = site_of(model)
    if site is not None:
        return site.class_name
    return next(cls for cls in type(model).__mro__ if not cls.__module__.startswith(PUT_OVER)).__name__
