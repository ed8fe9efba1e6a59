"""The variants of the CPU kernels that this machine can run."""

from __future__ import annotations

import ctypes

import torch

from astroattn.ops.native import build, library

_ORDER = ("default", "avx2", "avx512")
CAPABILITY = torch.backends.cpu.get_cpu_capability().lower()
HERE = [name for name in build.VARIANTS if name == "default" or _ORDER.index(name) <= _ORDER.index(CAPABILITY)]
REFUSAL = library.refusal(torch.float32)


def load(name: str) -> ctypes.CDLL:
    """One of them, which finds its working memory full of NaN: nothing that it held before may reach an answer."""
    kernels = ctypes.CDLL(str(library.FOLDER / f"kernels_{name}.so"))
    kernels.astroattn_spoil(1)
    return kernels
