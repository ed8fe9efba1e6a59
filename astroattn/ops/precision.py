"""Autocast, which some devices do not know."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Asked before any call, as PyTorch 2.8 cannot ask while it compiles one.
_KNOWS_AUTOCAST = {kind: torch.amp.is_autocast_available(kind) for kind in ("cpu", "cuda", "mps", "xpu")}
_KNOWS_AUTOCAST["meta"] = False


def knows_autocast(kind: str) -> bool:
    """Whether there is autocast on devices of that type."""
    if kind not in _KNOWS_AUTOCAST:
        _KNOWS_AUTOCAST[kind] = torch.amp.is_autocast_available(kind)
    return _KNOWS_AUTOCAST[kind]


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which nothing on that device is cast."""
    return torch.autocast(device.type, enabled=False) if knows_autocast(device.type) else nullcontext()


def autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in autocast's dtype where that is on, as it does for `scaled_dot_product_attention`."""
    return [
        x.to(torch.get_autocast_dtype(x.device.type)) if isinstance(x, Tensor) and _is_cast(x) else x for x in tensors
    ]


def _is_cast(x: Tensor) -> bool:
    kind = x.device.type
    enabled = knows_autocast(kind) and torch.is_autocast_enabled(kind)
    return enabled and x.is_floating_point() and x.dtype != torch.float64
