"""Taking hold of the attention modules of a model, and letting go of them again."""

from astroattn.patching.blocks import attn_layer
from astroattn.patching.core import fallbacks, patch, patched, plan_parts, restored_on_error, unpatch
from astroattn.patching.handwritten import register
from astroattn.patching.report import NotPatched, PatchReport, Row

__all__ = [
    "NotPatched",
    "PatchReport",
    "Row",
    "attn_layer",
    "fallbacks",
    "patch",
    "patched",
    "plan_parts",
    "register",
    "restored_on_error",
    "unpatch",
]
