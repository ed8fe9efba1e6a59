"""astroattn: softmax self-attention of pretrained models replaced by the neuron-astrocyte network.

    report = astroattn.patch(model)     # in place
    astroattn.unpatch(model)            # bit for bit the original again

Importing it imports nothing; the first use of a name imports torch, and nothing heavier. Models that transformers then
loads with `attn_implementation="astroattn"` come patched.
"""

from typing import TYPE_CHECKING, Any

from astroattn.imports import lazily, when_imported
from astroattn.version import __version__ as __version__

if TYPE_CHECKING:
    from astroattn.attention import AstrocyteAttention as AstrocyteAttention
    from astroattn.calibration import calibrate as calibrate
    from astroattn.checkpoint import from_pretrained as from_pretrained
    from astroattn.checkpoint import load as load
    from astroattn.checkpoint import save as save
    from astroattn.config import PRESETS as PRESETS
    from astroattn.config import AstroConfig as AstroConfig
    from astroattn.cost import Cost as Cost
    from astroattn.distillation import Distiller as Distiller
    from astroattn.distillation import DistillReport as DistillReport
    from astroattn.distillation import distill as distill
    from astroattn.distillation import parameter_groups as parameter_groups
    from astroattn.patching import PatchReport as PatchReport
    from astroattn.patching import attn_layer as attn_layer
    from astroattn.patching import fallbacks as fallbacks
    from astroattn.patching import patch as patch
    from astroattn.patching import patched as patched
    from astroattn.patching import register as register
    from astroattn.patching import unpatch as unpatch
    from astroattn.plan import Plan as Plan

_HOMES = {
    "AstroConfig": "config",
    "AstrocyteAttention": "attention",
    "Cost": "cost",
    "DistillReport": "distillation",
    "Distiller": "distillation",
    "PRESETS": "config",
    "PatchReport": "patching",
    "Plan": "plan",
    "attn_layer": "patching",
    "calibrate": "calibration",
    "distill": "distillation",
    "fallbacks": "patching",
    "from_pretrained": "checkpoint",
    "load": "checkpoint",
    "parameter_groups": "distillation",
    "patch": "patching",
    "patched": "patching",
    "register": "patching",
    "save": "checkpoint",
    "unpatch": "patching",
}
__all__ = ["__version__", *_HOMES]
__getattr__, __dir__ = lazily(__name__, _HOMES)


def _serve_transformers(library: Any) -> None:
    from astroattn.loading import serve

    serve(library)


when_imported("transformers.modeling_utils", _serve_transformers)
