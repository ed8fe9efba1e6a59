"""Real inputs: photos, speech, texts, sentence pairs; from folders, tar files, tables and the `datasets` library."""

from astroattn.choices import PYTHON_DOCS
from astroattn.data.loading import Data, load_data

__all__ = ["PYTHON_DOCS", "Data", "load_data"]
