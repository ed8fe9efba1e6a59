"""The hidden layer of the simulated network: how its neurons answer to a token while writing, and while reading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from astroattn.config import AstroConfig
from astroattn.hidden import RandomHidden
from astroattn.ops.features import features


class HiddenNeurons(Protocol):
    """The response h [B, H, m] of m hidden neurons to what the first layer sends, [B, H, D], times sqrt(scale)."""

    def write(self, key: Tensor) -> Tensor: ...

    def read(self, query: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class StaticNeurons:
    """The paper's hidden layer: h = phi(W k) while writing, h = phi(W q) while reading, the same W for both.

    Args:
        weight: W [H, m, D]. phase: b [H, m], used by the cosines and the sine. activation: the name of phi.

    Source: the authors' notebooks (`get_phi`).
    """

    weight: Tensor
    phase: Tensor
    activation: str

    @classmethod
    def random(cls, num_heads: int, head_dim: int, config: AstroConfig) -> StaticNeurons:
        """The weights that `AstrocyteAttention` draws for this config with `hidden="random"`."""
        hidden = RandomHidden(num_heads, head_dim, config)
        return cls(hidden.weight.double(), hidden.phase.double(), config.activation)

    def write(self, key: Tensor) -> Tensor:
        weight, phase = self.weight.to(key.dtype), self.phase.to(key.dtype)
        return features(key[..., None, :], weight, phase, self.activation)[..., 0, :]

    read = write


@dataclass(frozen=True)
class CompetitiveNeurons:
    """Hidden neurons that compete: writing, only the nearest fires, h_j = 1; reading, h_j = exp(w_j.q).

    With one neuron per token, W = K, the network is softmax attention exactly: H_j = v_j, g_j = 1 and
    p = sum_j exp(q.k_j). So it is the kernel exp(q.k) itself, which random neurons only approach. With fewer neurons,
    the centres of clusters of keys, it is a Hebbian layer. This layer is ours, not the paper's.

    Args:
        weight: W [B, H, m, D].
    """

    weight: Tensor

    def write(self, key: Tensor) -> Tensor:
        distance = (self.weight.to(key.dtype) - key[..., None, :]).square().sum(-1)
        winner = distance.argmin(-1, keepdim=True)
        return torch.zeros_like(distance).scatter(-1, winner, 1.0)

    def read(self, query: Tensor) -> Tensor:
        response: Tensor = (self.weight.to(query.dtype) @ query[..., None])[..., 0].exp()
        return response
