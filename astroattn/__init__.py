from astroattn.attention import AstrocyteAttention
from astroattn.config import AstroConfig

__version__ = "0.1.0"
