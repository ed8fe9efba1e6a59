"""The neuron-astrocyte network in discrete time: one token after the other is written, then read.

The letters are the paper's where they are known; docs/science.md has the table, and says what is inferred.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from astroattn.simulation.hidden import HiddenNeurons

LETTERS = ("h", "p", "H", "g")


@dataclass(frozen=True)
class Trace:
    """What was recorded, one entry per token on the axis N; None where it was not asked for.

    Attributes:
        h_writing, h_reading: activity of the hidden neurons [B, H, N, m].
        p: calcium of the astrocyte process while reading [B, H, N].
        H: synapses from hidden to last layer after the token was written [B, H, N, Dv, m].
        g: synapses from neurons to astrocyte after the token was written [B, H, N, m].
    """

    h_writing: Tensor | None = None
    h_reading: Tensor | None = None
    p: Tensor | None = None
    H: Tensor | None = None
    g: Tensor | None = None


class NeuronAstrocyteNetwork:
    """Three layers of neurons, and the astrocyte that ensheathes the synapses from the hidden to the last layer.

        writing (r = 0)   h = phi(W k),  l = v      H <- (1 - leak) H + l h^T     (Hebbian plasticity)
                                                    g <- (1 - leak) g + h         (presynaptic plasticity)
        reading (r = 1)   h = phi(W q)              p = g.h                       (calcium of the process)
                          P = 1 / p                 l = (H * P) h + x             (the process divides the synapses)

    k, v and q are what the first layer sends for a token x. After all tokens are written, l - x is linear attention;
    with `CompetitiveNeurons(key)` it is softmax attention. Each head has synapses and a process of its own; the state
    is [B, H, ...]. `run` computes in float64, `write` and `read` in the dtype of the token.

    Args:
        hidden: the hidden neurons. leak: share of H and g that is forgotten per token written, in [0, 1).

    Attributes:
        H: [B, H, Dv, m]. g: [B, H, m]. Both are None until something is written.

    Raises:
        ValueError: a leak out of range.

    Source: Kozachkov, Kastanenka & Krotov, PNAS 2023, after the authors' notebooks and restatements; the leak is ours.
    """

    H: Tensor | None
    g: Tensor | None

    def __init__(self, hidden: HiddenNeurons, *, leak: float = 0.0) -> None:
        if not 0 <= leak < 1:
            raise ValueError(f"leak: {leak}; must be at least 0 and less than 1")
        self.hidden = hidden
        self.leak = leak
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.H = self.g = None

    def write(self, key: Tensor, value: Tensor) -> Tensor:
        """The writing phase of one token: key [B, H, D] times sqrt(scale), value [B, H, Dv]; gives h [B, H, m].

        Raises:
            ValueError: the response of the hidden neurons is not finite.
        """
        h = self.hidden.write(key)
        _require_finite("key", h)
        if self.H is None or self.g is None:
            self.H, self.g = torch.zeros_like(value[..., None] * h[..., None, :]), torch.zeros_like(h)
        self.H = (1 - self.leak) * self.H + value[..., None] * h[..., None, :]
        self.g = (1 - self.leak) * self.g + h
        return h

    def read(self, query: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The reading phase of one token: query [B, H, D] times sqrt(scale), x [B, H, Dv] (None: nothing is added).

        Returns:
            The last layer l [B, H, Dv], the calcium p [B, H] and the hidden neurons h [B, H, m].

        Raises:
            ValueError: nothing has been written; the response of the hidden neurons is not finite.
        """
        if self.H is None or self.g is None:
            raise ValueError("read: nothing has been written yet")
        h = self.hidden.read(query)
        _require_finite("query", h)
        p = (self.g * h).sum(-1)
        P = 1 / p
        last = ((self.H * P[..., None, None]) @ h[..., None])[..., 0]
        return last if x is None else last + x, p, h

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        x: Tensor | None = None,
        *,
        causal: bool = False,
        scale: float | None = None,
        record: Collection[str] = ("p",),
    ) -> tuple[Tensor, Trace]:
        """Forget, then stream a sequence: all tokens are written, then all are read; or each is written and read.

        Args:
            query: [B, H, N, D].
            key: [B, H, N, D].
            value: [B, H, N, Dv].
            x: [B, H, N, Dv], added to the last layer.
            causal: read each token as soon as it is written.
            scale: multiplies q.k (its root multiplies q and k); None is D^-0.5.
            record: letters of what to keep: "h", "p", "H", "g". H takes N Dv m numbers per head.

        Returns:
            The last layer [B, H, N, Dv] and the trace.

        Raises:
            ValueError: shapes that do not fit, an unknown letter, a response that is not finite.
        """
        check_sequence(query, key, value, x)
        unknown = sorted(set(record) - set(LETTERS))
        if unknown:
            raise ValueError(f"record: {unknown}; must be among {', '.join(LETTERS)}")
        root = (query.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
        query, key, value = query.double() * root, key.double() * root, value.double()
        kept: dict[str, list[Tensor]] = {name: [] for name in Trace.__dataclass_fields__}

        def write(t: int) -> None:
            h = self.write(key[:, :, t], value[:, :, t])
            assert self.H is not None
            assert self.g is not None
            for letter, name, what in (("h", "h_writing", h), ("H", "H", self.H), ("g", "g", self.g)):
                if letter in record:
                    kept[name].append(what)

        def read(t: int) -> Tensor:
            last, p, h = self.read(query[:, :, t], None if x is None else x[:, :, t])
            for letter, name, what in (("h", "h_reading", h), ("p", "p", p)):
                if letter in record:
                    kept[name].append(what)
            return last

        self.reset()
        outputs = []
        for t in range(key.shape[2]):
            write(t)
            if causal:
                outputs.append(read(t))
        if not causal:
            outputs = [read(t) for t in range(query.shape[2])]
        trace = Trace(**{name: torch.stack(values, 2) for name, values in kept.items() if values})
        return torch.stack(outputs, 2), trace


def check_sequence(query: Tensor, key: Tensor, value: Tensor, x: Tensor | None) -> None:
    """Raise ValueError, naming the argument, unless the shapes are those of one sequence of tokens."""
    if query.ndim != 4 or not query.shape[2]:
        raise ValueError(f"query: shape {tuple(query.shape)}; expected [B, H, N, D] with at least one token")
    if key.shape != query.shape:
        raise ValueError(f"key: shape {tuple(key.shape)}; expected that of query, {tuple(query.shape)}")
    if value.shape[:3] != key.shape[:3] or value.ndim != 4:
        raise ValueError(f"value: shape {tuple(value.shape)}; expected {(*key.shape[:3], 'Dv')}")
    if x is not None and x.shape != value.shape:
        raise ValueError(f"x: shape {tuple(x.shape)}; expected that of value, {tuple(value.shape)}")


def _require_finite(name: str, h: Tensor) -> None:
    if not h.isfinite().all():
        raise ValueError(f"{name}: the hidden neurons' response is not finite: the vectors are too long")
