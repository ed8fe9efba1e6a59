"""The streaming memory as a network that writes, reads and forgets, token by token."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from astroattn.config import AstroConfig
from astroattn.ops.streaming import FORGETTING, LEAST_MASS, QUERY_DECAY, SECOND_ORDER, SINKS, block_of


@dataclass
class Neuron:
    """A hidden neuron that answers h = exp(w.q), and its synapses.

    Attributes:
        w: what it answers to [D]. H: its synapse to the last layer [Dv]. g: its synapse to the astrocyte.
        use: the mean share of calcium it has had per token, the latest blocks most, times `age`, the sum of the
            weights in that mean. fresh: its shares in the block that is being written.
    """

    w: Tensor
    H: Tensor
    g: Tensor
    use: float = 0.0
    age: float = 0.0
    fresh: float = 0.0


@dataclass
class StreamingNetwork:
    """A neuron-astrocyte network with a limited number of hidden neurons, for one sequence and one head.

        writing     a new hidden neuron with w = k, H = v, g = 1
        reading     h_j = exp(w_j.q),   p = g.h,   l = H h / p
        forgetting  at the end of a block, where no neuron is left for the next one: some join others. Of their joint
                    neuron w and H / g are means with weights g_j exp(w_j.u), and for the mean query u it moves the last
                    layer and the astrocyte as they did together: g exp(w.u) = sum_j g_j exp(w_j.u), and the same of H.

    It is `ops.streaming` in the words of the network, where H = exp(b) v and g = exp(b); which neurons join is said
    there. `stream` computes in float64.

    Args:
        config: of hidden="streaming".

    Attributes:
        neurons: oldest first.

    Source: the network is that of Kozachkov, Kastanenka & Krotov (PNAS 2023); neurons that come and join are ours.
    """

    config: AstroConfig
    neurons: list[Neuron] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.config.hidden != "streaming":
            raise ValueError(f"config: hidden={self.config.hidden!r}; expected 'streaming'")
        self.block = block_of(self.config.entries)
        self._means: dict[str, Tensor] = {}  # of q, q^2 and the last layer: running, times their weight
        self._weight = 0.0
        self._read: list[tuple[Tensor, Tensor]] = []  # queries and last layers of the block

    def stream(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """Write and read tokens [N, D], [N, D], [N, Dv]: the last layer [N, Dv] and the calcium p [N]."""
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        last, calcium = [], []
        for q, k, v in zip(query.double() * scale, key.double(), value.double(), strict=True):
            self.write(k, v)
            layer, p = self.read(q)
            last.append(layer)
            calcium.append(p)
            if len(self._read) == self.block:
                self.forget()
        return torch.stack(last), torch.stack(calcium)

    def write(self, k: Tensor, v: Tensor) -> None:
        """A new neuron for a token."""
        self.neurons.append(Neuron(k, v, torch.ones((), dtype=k.dtype)))

    def read(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """The last layer and the calcium for a query times the scale."""
        h = torch.stack([neuron.w @ q for neuron in self.neurons]).exp()
        p = torch.stack([neuron.g for neuron in self.neurons]) @ h
        layer = torch.stack([neuron.H for neuron in self.neurons]).T @ h / p
        for neuron, response in zip(self.neurons, h, strict=True):
            neuron.fresh += float(neuron.g * response / p)
        self._read.append((q, layer))
        return layer, p

    def forget(self) -> None:
        """The end of a block: remember how the neurons were used, and make room."""
        fast, slow = (1 - FORGETTING / self.config.entries) ** self.block, QUERY_DECAY**self.block
        for neuron in self.neurons:
            neuron.use = fast * neuron.use + (1 - fast) * neuron.fresh / self.block
            neuron.age = fast * neuron.age + (1 - fast)
            neuron.fresh = 0.0
        queries, layers = (torch.stack(each).mean(0) for each in zip(*self._read, strict=True))
        squares = torch.stack([q.square() for q, _ in self._read]).mean(0)
        for name, new in (("query", queries), ("square", squares), ("layer", layers)):
            self._means[name] = slow * self._means.get(name, torch.zeros_like(new)) + (1 - slow) * new
        self._weight = slow * self._weight + (1 - slow)
        self._read.clear()
        if len(self.neurons) == self.config.entries:
            self._join()

    def _join(self) -> None:
        u = self._means["query"] / self._weight
        old = self.neurons[: len(self.neurons) - max(self.config.near - self.block, 0)]
        least = {j: min(self.cost(old[i], old[j]) for i in range(SINKS, j)) for j in range(SINKS + 1, len(old))}
        leaving = sorted(least, key=lambda j: least[j])[: self.block]
        staying = [j for j in range(SINKS, len(old)) if j not in leaving]
        groups: dict[int, list[int]] = {}
        for j in leaving:
            groups.setdefault(min(staying, key=lambda i: self.cost(old[i], old[j])), []).append(j)
        for i, others in groups.items():
            members = [old[i], *(old[j] for j in others)]
            share = torch.stack([neuron.g * (neuron.w @ u).exp() for neuron in members])
            w = share @ torch.stack([neuron.w for neuron in members]) / share.sum()
            v = share @ torch.stack([neuron.H / neuron.g for neuron in members]) / share.sum()
            g = share.sum() / (w @ u).exp()
            used, age = sum(neuron.use for neuron in members), max(neuron.age for neuron in members)
            old[i] = Neuron(w, g * v, g, used, age)
        kept = [neuron for j, neuron in enumerate(old) if j not in leaving]
        self.neurons = kept + self.neurons[len(old) :]

    def cost(self, one: Neuron, other: Neuron) -> float:
        """What joining two neurons would change in the last layer, squared: the formula of `ops.streaming`."""
        square = self._means["square"] / self._weight
        if len(square) % 2 == 0:  # the two axes of a rotary plane alike
            square = square.view(2, -1).mean(0).repeat(2)
        m, n = (neuron.use / neuron.age + LEAST_MASS for neuron in (one, other))
        turn = float(square @ (one.w - other.w).square())
        v, z = one.H / one.g, other.H / other.g
        joint = (m * v + n * z) / (m + n)
        off = float((joint - self._means["layer"] / self._weight).square().sum())
        return (m * n / (m + n)) ** 2 * turn * (float((v - z).square().sum()) + SECOND_ORDER * turn * off)
