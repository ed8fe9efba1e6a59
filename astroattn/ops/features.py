"""The activations phi of a static hidden layer, after the paper's authors' notebooks, kept apart from overflow.

A hidden neuron's response is phi_j(x) = exp(gain_j(x)) base_j(x). The gains are kept as logarithms, because a
query's features may be multiplied by any positive number, and a feature by any positive number in the keys if it is
divided by it in the queries, without changing attention: the largest gain is always subtracted first.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log, pi

import torch
import torch.nn.functional as F
from torch import Tensor

# (W x [Z, N, m], |x|^2 / 2 [Z, N, 1], phase [Z, 1, m], m) -> (gain [Z, N, m or 1], base [Z, N, m])
Activation = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def positive_exp(drive: Tensor, half_square: Tensor, phase: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """exp(W x - |x|^2 / 2) / sqrt(m): E[phi(q).phi(k)] = exp(q.k). The notebooks' `performer`, the paper's default."""
    return drive - half_square - log(m) / 2, torch.ones_like(drive)


def cosine(drive: Tensor, half_square: Tensor, phase: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """sqrt(2 / m) cos(W x + b) exp(|x|^2 / 2), b uniform: E[phi(q).phi(k)] = exp(q.k). Not positive."""
    return half_square + log(2 / m) / 2, torch.cos(drive + phase)


def positive_cosine(drive: Tensor, half_square: Tensor, phase: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """sqrt(2 / (pi m)) max(0, cos(W x + b)) exp(|x|^2 / 2)."""
    return half_square + log(2 / (pi * m)) / 2, torch.cos(drive + phase).clamp(min=0)


def clipped_sine(drive: Tensor, half_square: Tensor, phase: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """max(0, sin(W x + b)) / sqrt(m): bounded neurons. (The notebooks' constants for it are not known to us.)"""
    return torch.full_like(half_square, -log(m) / 2), torch.sin(drive + phase).clamp(min=0)


def linear(drive: Tensor, half_square: Tensor, phase: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """1 + h, h = W x - |x|^2 / 2 - log(m) / 2: the exponential to first order. Not positive."""
    return torch.zeros_like(half_square), 1 + drive - half_square - log(m) / 2


def truncated_exp(drive: Tensor, half_square: Tensor, phase: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """min(exp(W x), 150) / sqrt(m): the exponential of a neuron that saturates."""
    return drive.clamp(max=log(150.0)) - log(m) / 2, torch.ones_like(drive)


def elu1(drive: Tensor, half_square: Tensor, phase: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """(elu(W x) + 1) / sqrt(m), the feature map of the first linear transformers."""
    return torch.full_like(half_square, -log(m) / 2), F.elu(drive) + 1


def constant(drive: Tensor, half_square: Tensor, phase: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """1 / sqrt(m) whatever the input: uniform attention, the control."""
    return torch.full_like(half_square, -log(m) / 2), torch.ones_like(drive)


def exp(drive: Tensor, half_square: Tensor, phase: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """exp(W x + b) / sqrt(m): any positive kernel, where W and b are learned."""
    return drive + phase - log(m) / 2, torch.ones_like(drive)


ACTIVATIONS: dict[str, Activation] = {
    f.__name__: f
    for f in (positive_exp, cosine, positive_cosine, clipped_sine, linear, truncated_exp, elu1, constant, exp)
}

POSITIVE = frozenset(ACTIVATIONS) - {"cosine", "linear"}  # these know the logarithm of what they sum to


def respond(x: Tensor, weight: Tensor, phase: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gain and base of the hidden layer's response to x [Z, N, D] with weights [Z, m, D] and phases [Z, m]."""
    half_square = x.square().sum(-1, keepdim=True) / 2
    return ACTIVATIONS[activation](x @ weight.mT, half_square, phase[:, None], weight.shape[1])


def features(x: Tensor, weight: Tensor, phase: Tensor, activation: str) -> Tensor:
    """phi(x) [Z, N, m] as it is defined, without protection from overflow."""
    gain, base = respond(x, weight, phase, activation)
    return gain.exp() * base
