"""Hidden layers and an oracle for the tests of attention through static hidden layers."""

from __future__ import annotations

import torch

from astroattn.config import ACTIVATIONS as NAMES
from astroattn.ops.reference import feature_attention
from astroattn.ops.static import Hidden

POSITIVE = tuple(name for name in NAMES if name not in ("cosine", "linear"))


def hidden(activation: str, m: int = 12, size: int = 2, dim: int = 6, dtype: torch.dtype = torch.float64) -> Hidden:
    weight = torch.randn(size, m, dim, dtype=torch.float64)
    return Hidden(weight.to(dtype), (torch.rand(size, m, dtype=torch.float64) * 6.28).to(dtype), activation)


def oracle(qkv: list, layer: Hidden, exact: torch.Tensor | None = None, mask: torch.Tensor | None = None) -> tuple:
    query, key, _ = qkv
    exact = torch.zeros(len(key), query.shape[1], key.shape[1], dtype=torch.bool) if exact is None else exact
    out, normaliser = feature_attention(*qkv, layer.weight, layer.phase, layer.activation, exact, mask)
    return out.masked_fill((normaliser == -torch.inf)[..., None], 0), normaliser  # no neuron responds: zeros, not 0 / 0


def check(ours: tuple, theirs: tuple, rows: torch.Tensor | None = None) -> None:
    """Equal to 1e-9; a normaliser that is not positive has no logarithm in either."""
    for mine, other in zip(ours, theirs, strict=True):
        mine, other = (mine, other) if rows is None else (mine[rows], other[rows])
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9, equal_nan=True)
