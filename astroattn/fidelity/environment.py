"""Where a measurement was made: versions and devices."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from astroattn.ops.native.library import refusal

PACKAGES = ("astroattn", "torch", "triton", "transformers", "timm", "datasets")


def describe_versions() -> dict[str, str | None]:
    """The version of Python and of every package that matters, None where it is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def describe_device(device: torch.device) -> str:
    """The name of a GPU, or the kind of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def describe_cpu_kernels() -> str:
    """The instructions that the CPU kernels use here, or why there are none."""
    return refusal(torch.float32) or f"built, {torch.backends.cpu.get_cpu_capability()}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
