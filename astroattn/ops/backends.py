"""Which backend computes an attention: plain PyTorch, Triton on a GPU, or C++ on a CPU."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from astroattn.ops.kernels.device import LEAST_SHARED, shared_memory
from astroattn.ops.native import library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the kernels
MOST_DIM = 256  # of a head, in the Triton kernels
LEAST_CAPABILITY = (8, 0)  # of a GPU: for older ones Triton makes no matrix instructions, and blocks do not fit
LARGE = ("linear", "causal")  # gradients of float32 heads above 128 do not fit into the least shared memory

# The kernels of each backend, by operation. Plain PyTorch computes all of them, and "near_linear" besides.
MODULES = {
    ("triton", "near_far"): "astroattn.ops.kernels.near_far",
    ("triton", "linear"): "astroattn.ops.kernels.static",
    ("triton", "causal"): "astroattn.ops.kernels.causal",
    ("triton", "step"): "astroattn.ops.kernels.causal_step",
    ("triton", "streaming"): "astroattn.ops.kernels.streaming",
    ("native", "near_far"): "astroattn.ops.native.near_far",
    ("native", "near_far with a bias"): "astroattn.ops.native.near_far",
    ("native", "near_far across sequences"): "astroattn.ops.native.near_far",
    ("native", "linear"): "astroattn.ops.native.linear",
    ("native", "streaming"): "astroattn.ops.native.streaming",
}
# Read once: a compiler can trace constants, but neither imports nor ctypes.
_TRITON = find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_NO_NATIVE = library.refusal(torch.float32)
_warned = False


def check_devices(tensors: Iterable[Any]) -> None:
    """Raise ValueError unless the tensors among these are on one device.

    PyTorch would run the fake of an operator, which computes nothing, where one of them is on meta.
    """
    devices = {x.device for x in tensors if isinstance(x, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"tensors on different devices: {', '.join(sorted(map(str, devices)))}; needs one")


def choose_backend(backend: str, operation: str, query: Tensor, value: Tensor) -> str:
    """The backend for an operation ("near_far", "linear", "causal", "streaming" ...) on such tensors.

    "auto" takes Triton on a GPU and C++ on a CPU where they can run, else plain PyTorch. It warns once where the C++
    kernels would serve but are not there, and on a GPU that the Triton kernels do not serve at all.

    Raises:
        ValueError: the backend was named and cannot run, with the reason.
    """
    if backend == "torch":
        return backend
    if backend == "auto":
        backend = "triton" if query.is_cuda else "native"
        reason = _refusal(backend, operation, query, value)
        if reason is None:
            return backend
        if reason is _NO_NATIVE:
            _warn_once(f"the CPU kernels, and takes some three times as long: {reason}")
        elif backend == "triton" and reason == _refused_gpu(query):
            _warn_once(f"the GPU kernels: {reason}")
        return "torch"
    reason = _refusal(backend, operation, query, value)
    if reason is not None:
        raise ValueError(f"backend: {backend!r} cannot run here; {reason}")
    return backend


def run_kernel(backend: str, operation: str, function: str, tensor: Tensor, *args: Any, **settings: bool) -> Any:
    """Call a function of a backend's kernels on the device of its first tensor; their module is imported by then."""
    kernels = import_module(MODULES[backend, operation])
    with torch.cuda.device_of(tensor):  # Triton launches on the current device, whatever its tensors are on
        return getattr(kernels, function)(tensor, *args, **settings)


def _refusal(backend: str, operation: str, query: Tensor, value: Tensor) -> str | None:
    """Why a backend with kernels cannot compute an operation on such tensors, or None."""
    if (backend, operation) not in MODULES:
        return f"it has no kernel for this attention ({operation})"
    if query.dtype not in DTYPES:
        return f"its kernels take {', '.join(map(str, DTYPES))}, not {query.dtype}"
    if backend == "native":
        return _NO_NATIVE if query.device.type == "cpu" else f"its kernels run on the CPU, not on {query.device}"
    if not _TRITON:
        return "the package triton is not installed"
    if not query.is_cuda and not _INTERPRETED:
        return f"its kernels run on a CUDA device, not on {query.device}"
    if query.is_cuda and (reason := _refused_gpu(query)) is not None:
        return reason
    dim = max(query.shape[-1], value.shape[-1])
    if dim > MOST_DIM:
        return f"its kernels take heads of at most {MOST_DIM}, not {dim}"
    large = dim > MOST_DIM // 2 and query.dtype == torch.float32 and operation in LARGE
    if large and query.is_cuda and torch.cuda.is_available():
        found = torch.cuda.get_device_properties(query.device)
        if shared_memory((found.major, found.minor)) == LEAST_SHARED:
            return f"its kernels take heads of at most {MOST_DIM // 2} in float32 on {found.name}, not {dim}"
    return None


def _refused_gpu(query: Tensor) -> str | None:
    """Why the Triton kernels serve nothing on the GPU of a tensor, or None."""
    if torch.version.hip is not None:  # whose devices PyTorch calls "cuda" too
        return "its kernels are made for NVIDIA's GPUs, and this PyTorch is built for ROCm"
    if not torch.cuda.is_available():  # a tensor that stands for one elsewhere
        return None
    found = torch.cuda.get_device_properties(query.device)
    if (found.major, found.minor) < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        return f"its kernels need compute capability {least}, and {found.name} has {found.major}.{found.minor}"
    return None


def _warn_once(whose: str) -> None:
    global _warned
    if not _warned and not torch.compiler.is_compiling():  # a graph has no such side effects
        _warned = True
        warnings.warn(
            f"astroattn: plain PyTorch stands in for {whose} (backend='torch' says that they are not wanted)",
            stacklevel=6,
        )
