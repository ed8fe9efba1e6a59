"""Static hidden layers: their weights. (The Hebbian layer learns its weights from each sequence and keeps none.)"""

from __future__ import annotations

from collections.abc import Callable
from math import pi
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from astroattn.config import AstroConfig
from astroattn.ops.static import Hidden


class Constants(nn.Module):
    """Buffers outside the state_dict whose values follow from the config, so that nothing can lose them.

    They go where the module goes, and get their values back from every move that has none (`to_empty`, from `meta`).
    """

    def __init__(self, **values: Tensor) -> None:
        super().__init__()
        self._values = values  # on the CPU
        for name, value in values.items():
            self.register_buffer(name, value, persistent=False)

    def on(self, device: torch.device) -> list[Tensor]:
        """The tensors on the device of a call, wherever the module is: offloading does not move all that it should."""
        found = []
        for name, value in self._values.items():
            buffer = self.get_buffer(name)
            found.append(buffer if buffer.device == device else value.to(device, buffer.dtype))
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for name, value in self._values.items():
                if not (buffer := self.get_buffer(name)).is_meta:
                    buffer.copy_(value)
        return self


class RandomHidden(Constants):
    """The paper's hidden layer: W drawn once, the same for queries and keys.

    w_j ~ N(0, I), independent or, with `orthogonal`, orthogonal within blocks of head_dim rows with the same law for
    each row. Source: the authors' notebooks (`get_phi`), where W is independent.

    Attributes:
        weight: W [H, m, D]. phase: b [H, m], uniform in [0, 2 pi), used by the cosines and the sine; of exp 0.
    """

    weight: Tensor
    phase: Tensor

    def __init__(self, num_heads: int, head_dim: int, config: AstroConfig) -> None:
        generator = torch.Generator().manual_seed(config.seed)
        shape = (num_heads, config.num_hidden, head_dim)
        draw = draw_orthogonal if config.orthogonal else draw_independent
        weight = draw(shape, generator)
        phase = torch.rand(shape[:2], generator=generator, dtype=torch.float64, device="cpu") * 2 * pi
        if config.activation == "exp":
            phase.zero_()  # it would be a bias
        super().__init__(weight=weight, phase=phase.float())
        self.activation = config.activation

    def expand(self, batch: int, dtype: torch.dtype) -> Hidden:
        """The layer for `batch` sequences, flattened over batch and heads."""
        weight = self.weight.to(dtype).repeat(batch, 1, 1)
        return Hidden(weight, self.phase.to(dtype).repeat(batch, 1), self.activation)

    def forward(self, query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the operators take: query, key, W [1, H, m, D] and b [1, H, m]."""
        weight, phase = self.on(query.device)
        return query, key, weight[None], phase[None]

    def is_lost(self, device: torch.device) -> bool:
        """Whether a call on a device would find no weights: never, the seed has them."""
        return False


class LearnedHidden(nn.Module):
    """A hidden layer to be trained: phi(k) = exp(W_k k + b) / sqrt(m) while writing, exp(W_q q) / sqrt(m) reading.

    W_k and W_q start as the same random weights, b as 0. In the paper's terms the weights from first to hidden layer
    are W_k times the key projection while writing, and W_q times the query projection while reading. The bias b says
    how much a neuron counts: beside a near field, which is exact, the size of phi matters.

    Attributes:
        key_weight, query_weight: W_k, W_q [H, m, D], parameters.
        bias: b [H, m], a parameter.
    """

    activation = "exp"

    def __init__(self, num_heads: int, head_dim: int, config: AstroConfig) -> None:
        super().__init__()
        start = AstroConfig(
            hidden="learned", num_hidden=config.num_hidden, orthogonal=config.orthogonal, seed=config.seed
        )
        self.start = num_heads, head_dim, start  # all that the starting weights depend on
        self.key_weight = nn.Parameter(self._draw())
        self.query_weight = nn.Parameter(self._draw())
        self.bias = nn.Parameter(self.key_weight.new_zeros(num_heads, config.num_hidden))

    def forward(self, query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the operators take: queries and keys [B, H, N, 2 D], W [1, H, m, 2 D] and b [1, H, m].

        The operators have one W for both: with q' = (q, q), k' = (k, 0) and W' = (W_k, W_q - W_k) is W' k' = W_k k,
        W' q' = W_q q and q'.k' = q.k. Half of b counts while writing, half while reading. They know no gradient of b:
        where that is wanted, q' ends in 0, k' in 1 and W' in b (divided by r = sqrt(scale), which multiplies both).
        """
        key_weight, query_weight, bias = (x.to(query.device) for x in (self.key_weight, self.query_weight, self.bias))
        weight = torch.cat([key_weight, query_weight - key_weight], -1)
        query, key = torch.cat([query, query], -1), F.pad(key, (0, key.shape[-1]))
        if not (torch.is_grad_enabled() and bias.requires_grad):
            return query, key, weight[None], bias[None] / 2
        weight = torch.cat([weight, bias[..., None]], -1)
        query, key = F.pad(query, (0, 1)), F.pad(key, (0, 1), value=scale**-0.5)
        return query, key, weight[None], torch.zeros_like(bias)[None]

    def is_lost(self, device: torch.device) -> bool:
        """Whether a call on a device would find no weights: they are on `meta`, and nothing knows what was learned."""
        fetched = "_hf_hook" in self.__dict__  # by accelerate, when the layer is called
        return device.type != "meta" and not fetched and any(weight.is_meta for weight in self.parameters())

    def _draw(self) -> Tensor:
        return RandomHidden(*self.start).weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        lost = self.key_weight.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if lost and not self.key_weight.is_meta:  # `to_empty` has left whatever was in that memory
            with torch.no_grad():
                self.key_weight.copy_(self._draw())
                self.query_weight.copy_(self._draw())
                self.bias.zero_()
        return self


STATIC: dict[str, type[RandomHidden] | type[LearnedHidden]] = {"random": RandomHidden, "learned": LearnedHidden}


def draw_independent(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """W [H, m, D] with independent standard normal entries, float32."""
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").float()


def draw_orthogonal(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """W [H, m, D], rows orthogonal within blocks of D, each row distributed as N(0, I), float32.

    The Q of a QR decomposition is uniform over the rotations only if each column takes the sign of R's diagonal;
    without that positive features come out biased. Each row gets the length of an independent normal vector.
    """
    heads, m, dim = shape
    blocks = -(-m // dim)
    gaussian = torch.randn(heads, blocks, dim, dim, generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(gaussian)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    lengths = torch.randn(heads, blocks, dim, dim, generator=generator, dtype=torch.float64, device="cpu").norm(dim=-1)
    weight: Tensor = (q.mT * lengths[..., None]).flatten(1, 2)[:, :m].float()
    return weight
