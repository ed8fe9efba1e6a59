"""The shared library of the CPU kernels: which one this machine takes, and how its functions are called."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
Strides = ctypes.c_int64 * 3
INTEGER, POINTER = ctypes.c_int64, ctypes.c_void_p
BUILD = "install a C++ compiler (Debian, Ubuntu: `apt install g++`) and run `python -m astroattn.ops.native.build`"
FUNCTIONS = ("near_far", "near_far_backward", "linear", "linear_backward", "stream")


@cache
def _library() -> ctypes.CDLL | str:
    """The kernels for this CPU, or why there are none."""
    path = FOLDER / f"kernels_{torch.backends.cpu.get_cpu_capability().lower()}.so"
    if not path.exists():
        path = FOLDER / "kernels_default.so"
    if not path.exists():
        return f"the CPU kernels are not built; {BUILD}"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the CPU kernels cannot be loaded: {error}"
    if not all(hasattr(library, f"astroattn_{function}") for function in FUNCTIONS):
        return f"the CPU kernels are those of an older version; {BUILD}"
    return library


def refusal(dtype: torch.dtype) -> str | None:
    """Why the CPU kernels cannot serve this dtype, or None."""
    if dtype not in TYPES:
        return f"the CPU kernels take {', '.join(map(str, TYPES))}, not {dtype}"
    library = _library()
    return library if isinstance(library, str) else None


def run(function: str, *structures: ctypes.Structure) -> None:
    """Call one of `FUNCTIONS`.

    Raises:
        RuntimeError: the kernels are not there, or not enough memory.
    """
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(library)
    if getattr(library, f"astroattn_{function}")(*map(ctypes.byref, structures)):
        raise RuntimeError("not enough memory for the CPU kernels")


def strides(*tensors: Tensor) -> tuple[ctypes.Array[ctypes.c_int64], ...]:
    """Of batch, head and token, in numbers."""
    return tuple(Strides(*x.stride()[:3]) for x in tensors)


def pointers(*tensors: Tensor | None) -> tuple[int | None, ...]:
    """Where the numbers are; None stays None."""
    return tuple(None if x is None else x.data_ptr() for x in tensors)
