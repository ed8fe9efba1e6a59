"""astroattn: softmax self-attention of pretrained models replaced by the neuron-astrocyte network.

    report = astroattn.patch(model)     # in place
    astroattn.unpatch(model)            # bit for bit the original again

Importing it imports torch and nothing heavier.
"""

from astroattn.attention import AstrocyteAttention
from astroattn.calibration import calibrate
from astroattn.checkpoint import from_pretrained, load, save
from astroattn.config import AstroConfig
from astroattn.cost import Cost
from astroattn.distillation import Distiller, DistillReport, distill, parameter_groups
from astroattn.patching import PatchReport, fallbacks, patch, patched, unpatch
from astroattn.plan import Plan
from astroattn.version import __version__

__all__ = [
    "AstroConfig",
    "AstrocyteAttention",
    "Cost",
    "DistillReport",
    "Distiller",
    "PatchReport",
    "Plan",
    "__version__",
    "calibrate",
    "distill",
    "fallbacks",
    "from_pretrained",
    "load",
    "parameter_groups",
    "patch",
    "patched",
    "save",
    "unpatch",
]
