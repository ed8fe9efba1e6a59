"""What is needed to patch another copy of a model in the same way, as plain values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import nn

from astroattn.patching.site import CORE, site_of

RECORD_VERSION = 1
CONFIG_RECORD = "astroattn"  # the attribute of the config of a patched transformers model that holds the record


def describe(model: nn.Module) -> dict[str, Any]:
    """The class of a model and its astrocytes: `{"format", "model", "modules": [{"name", "class", ...}]}`.

    Every astrocyte has the name and class of the module it hangs on, its heads, head dimension and config, and the
    names of the tensors it has learned, which lie below the module's name. No modules: the model is not patched.
    """
    modules = []
    for name, module in model.named_modules():
        site = site_of(module)
        if site is None:
            continue
        core = getattr(module, CORE)
        modules.append(
            {
                "name": name,
                "class": site.class_name,
                "heads": core.num_heads,
                "head_dim": core.head_dim,
                "config": asdict(core.config),
                "tensors": sorted(core.state_dict()),
            }
        )
    return {"format": RECORD_VERSION, "model": type(model).__name__, "modules": modules}
