"""Static hidden layers: their weights. (The Hebbian layer learns its weights from each sequence and keeps none.)"""

from __future__ import annotations

from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from astroattn.config import AstroConfig
from astroattn.ops.static import Hidden


class RandomHidden(nn.Module):
    """The paper's hidden layer: W drawn once, the same for queries and keys.

    w_j ~ N(0, I), independent or, with `orthogonal`, orthogonal within blocks of head_dim rows with the same law for
    each row. Source: the authors' notebooks (`get_phi`), where W is independent.

    Attributes:
        weight: W [H, m, D]. phase: b [H, m], uniform in [0, 2 pi), used by the cosines and the sine. Both are buffers
            outside the state_dict: the seed draws them again.
    """

    weight: Tensor
    phase: Tensor

    def __init__(self, num_heads: int, head_dim: int, config: AstroConfig) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(config.seed)
        shape = (num_heads, config.num_hidden, head_dim)
        draw = draw_orthogonal if config.orthogonal else draw_independent
        self.register_buffer("weight", draw(shape, generator), persistent=False)
        phase = torch.rand(shape[:2], generator=generator, dtype=torch.float64, device="cpu") * 2 * pi
        self.register_buffer("phase", phase.float(), persistent=False)
        self.activation = config.activation

    def expand(self, batch: int, dtype: torch.dtype) -> Hidden:
        """The layer for `batch` sequences, flattened over batch and heads."""
        weight = self.weight.to(dtype).repeat(batch, 1, 1)
        return Hidden(weight, self.phase.to(dtype).repeat(batch, 1), self.activation)

    def inputs(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the operators take: query, key, W [1, H, m, D] and b [1, H, m]."""
        return query, key, self.weight[None], self.phase[None]


class LearnedHidden(nn.Module):
    """A hidden layer to be trained: phi(k) = exp(W_k k) / sqrt(m) while writing, phi(q) = exp(W_q q) / sqrt(m) reading.

    Both start as the same random weights. In the paper's terms the weights from first to hidden layer are W_k times the
    key projection while writing, and W_q times the query projection while reading.

    Attributes:
        key_weight, query_weight: W_k, W_q [H, m, D], parameters.
    """

    phase: Tensor
    activation = "exp"

    def __init__(self, num_heads: int, head_dim: int, config: AstroConfig) -> None:
        super().__init__()
        start = RandomHidden(num_heads, head_dim, config)
        self.key_weight = nn.Parameter(start.weight.clone())
        self.query_weight = nn.Parameter(start.weight.clone())
        self.register_buffer("phase", torch.zeros_like(start.phase), persistent=False)

    def inputs(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the operators take: queries and keys [B, H, N, 2 D], W [1, H, m, 2 D] and b [1, H, m].

        The operators have one W for both: with q' = (q, q), k' = (k, 0) and W' = (W_k, W_q - W_k) is W' k' = W_k k,
        W' q' = W_q q and q'.k' = q.k.
        """
        weight = torch.cat([self.key_weight, self.query_weight - self.key_weight], -1)
        query, key = torch.cat([query, query], -1), F.pad(key, (0, key.shape[-1]))
        return query, key, weight[None], self.phase[None]


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
