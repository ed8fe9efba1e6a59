"""The network in continuous time, whose limit of fast neurons and a slower astrocyte is the discrete network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from astroattn.imports import needs
from astroattn.simulation.network import NeuronAstrocyteNetwork, check_sequence

with needs("science"):
    import numpy as np
    import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class TimeConstants:
    """Time constants of the network, in units of the time for which a token is shown in one phase.

    Args:
        neuron: tau_n, of the hidden and the last layer.
        astrocyte: tau_p, of the process's calcium. (That of plasticity is 1: it adds up one token while it is shown.)

    Raises:
        ValueError: a time that is not positive.
    """

    neuron: float = 0.01
    astrocyte: float = 0.05

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"{field.name}: {getattr(self, field.name)}; must be positive")


@dataclass(frozen=True)
class Motion:
    """The network's course over S moments.

    Attributes:
        time: [S], in units of a token. r: the gate [S], 0 writing, 1 reading. token: index of the token shown [S].
        h: hidden neurons [S, B, H, m]. l: last layer [S, B, H, Dv]. p: calcium [S, B, H].
    """

    time: Tensor
    r: Tensor
    token: Tensor
    h: Tensor
    l: Tensor  # noqa: E741 - the paper's letter for the last layer
    p: Tensor


def integrate(
    network: NeuronAstrocyteNetwork,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    x: Tensor | None = None,
    *,
    constants: TimeConstants | None = None,
    causal: bool = False,
    scale: float | None = None,
    samples: int = 50,
) -> tuple[Tensor, Motion]:
    """Show each token for one unit of time while the neurons, the calcium and the synapses move.

        tau_n dh/dt = -h + (1 - r) phi(W k) + r phi(W q)
        tau_n dl/dt = -l + (1 - r) v + r ((H * P) h + x),   P = 1 / p
        tau_p dp/dt = -p + g.h
              dH/dt = (1 - r) (l h^T + log(1 - leak) H)
              dg/dt = (1 - r) (h + log(1 - leak) g)

    The gate r(t) is 0 while all tokens are written and then 1 while all are read; `causal` shows each token twice, to
    be written and then to be read. As the ratios tau_n : tau_p : 1 fall, what the last layer holds at the end of each
    reading approaches `network.run`: the error of writing is of the order of tau_n, that of reading of
    exp(-1 / tau_p) times the calcium before over the calcium now. Integrated by SciPy's `solve_ivp`, token by token,
    with a relative tolerance of 1e-8.

    Args:
        network: its hidden neurons and its leak are used; its state is not changed.
        query: as in `NeuronAstrocyteNetwork.run`, as are the next five; all are taken in float64.
        key: [B, H, N, D].
        value: [B, H, N, Dv].
        x: [B, H, N, Dv], or None.
        causal: read each token as soon as it is written.
        scale: multiplies q.k; None is D^-0.5.
        constants: tau_n and tau_p; None is the default of `TimeConstants`.
        samples: moments kept per token and phase, the last one at its end.

    Returns:
        The last layer at the end of each reading [B, H, N, Dv], and the motion.

    Raises:
        ValueError: shapes that do not fit; calcium that is not positive while reading (activations may be negative).

    Source: inferred; docs/science.md says what is known of the paper's time scales.
    """
    check_sequence(query, key, value, x)
    if samples < 1:
        raise ValueError(f"samples: {samples}; must be at least 1")
    constants = TimeConstants() if constants is None else constants
    root = (query.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    query, key, value = query.double() * root, key.double() * root, value.double()
    shown = torch.zeros_like(value) if x is None else x.double()
    tokens = range(query.shape[2])
    order = [(t, r) for t in tokens for r in (0, 1)] if causal else [(t, r) for r in (0, 1) for t in tokens]

    heads, dim_value = query.shape[:2], value.shape[-1]
    m = network.hidden.write(key[:, :, 0]).shape[-1]
    fade = float(np.log1p(-network.leak))
    shapes = [(*heads, m), (*heads, dim_value), heads, (*heads, dim_value, m), (*heads, m)]
    state = [np.zeros(shape) for shape in shapes]  # h, l, p, H, g
    outputs, parts = [], []
    moments = np.linspace(0, 1, samples + 1)[1:]
    for start, (token, r) in enumerate(order):
        neurons = network.hidden.read(query[:, :, token]) if r else network.hidden.write(key[:, :, token])
        drive, own = neurons.numpy(), (shown if r else value)[:, :, token].numpy()
        *_, p, H, g = state
        if r and ((p <= 0).any() or ((g * drive).sum(-1) <= 0).any()):
            raise ValueError("hidden: the calcium p is not positive while reading; use positive activations")

        if r:
            course = _solve(partial(_read, H=H, g=g, drive=drive, x=own, constants=constants), state[:3], moments)
        else:
            course = _solve(partial(_write, drive=drive, value=own, fade=fade, constants=constants), state, moments)
        state = [part[-1] for part in course] + state[len(course) :]
        parts.append((start + moments, np.full(samples, r), np.full(samples, token), *course[:3]))
        if r:
            outputs.append(torch.from_numpy(state[1]))
    columns = [torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)]
    return torch.stack(outputs, 2), Motion(*columns)


def _write(
    h: Array,
    last: Array,
    p: Array,
    H: Array,
    g: Array,
    *,
    drive: Array,
    value: Array,
    fade: float,
    constants: TimeConstants,
) -> tuple[Array, ...]:
    """The velocities of h, l, p, H and g while r = 0."""
    dH = last[..., None] * h[..., None, :] + fade * H
    dg = h + fade * g
    return *_move(h, last, p, g, drive, value, constants), dH, dg


def _read(
    h: Array, last: Array, p: Array, *, H: Array, g: Array, drive: Array, x: Array, constants: TimeConstants
) -> tuple[Array, ...]:
    """The velocities of h, l and p while r = 1; the synapses rest."""
    P = 1 / p
    target = ((H * P[..., None, None]) @ h[..., None])[..., 0] + x
    return _move(h, last, p, g, drive, target, constants)


def _move(
    h: Array, last: Array, p: Array, g: Array, drive: Array, target: Array, constants: TimeConstants
) -> tuple[Array, Array, Array]:
    dh = (drive - h) / constants.neuron
    dl = (target - last) / constants.neuron
    dp = ((g * h).sum(-1) - p) / constants.astrocyte
    return dh, dl, dp


def _solve(velocity: Callable[..., tuple[Array, ...]], start: list[Array], moments: Array) -> list[Array]:
    """The course of several arrays from time 0, at the moments [S]: [S, ...] each."""
    with needs("science"):
        from scipy.integrate import solve_ivp

    ends = np.cumsum([part.size for part in start])

    def flat(_: float, state: Array) -> Array:
        parts = (part.reshape(like.shape) for part, like in zip(np.split(state, ends[:-1]), start, strict=True))
        return np.concatenate([part.ravel() for part in velocity(*parts)])

    done = solve_ivp(
        flat, (0, 1), np.concatenate([part.ravel() for part in start]), "LSODA", moments, rtol=1e-8, atol=1e-10
    )
    if not done.success:
        raise ValueError(f"constants: they cannot be integrated; {done.message}")
    courses = np.split(done.y.T, ends[:-1], axis=1)
    return [course.reshape(-1, *part.shape) for course, part in zip(courses, start, strict=True)]
