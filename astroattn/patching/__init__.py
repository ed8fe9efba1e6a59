"""Taking hold of the attention modules of a model, and letting go of them again."""

from astroattn.patching.core import fallbacks, patch, patched, unpatch
from astroattn.patching.report import PatchReport, Row

__all__ = ["PatchReport", "Row", "fallbacks", "patch", "patched", "unpatch"]
