"""What is needed to patch another copy of a model in the same way, as plain values."""

from __future__ import annotations

from typing import Any

from torch import nn

from astroattn.patching.site import CORE, site_of
from astroattn.plan import number_configs

RECORD_VERSION = 2
CONFIG_RECORD = "astroattn"  # the attribute of the config of a patched transformers model that holds the record


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
    return {"format": RECORD_VERSION, "model": type(model).__name__, "configs": configs, "modules": modules}
