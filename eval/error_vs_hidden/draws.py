"""Static hidden weights, drawn neuron by neuron: the paper's random ones, and ones calibrated on sample data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import log

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from astroattn.distillation.transfer import draw_pairs
from astroattn.fidelity.calls import AttentionCall
from astroattn.hidden import draw_independent, draw_orthogonal
from eval.error_vs_hidden.streaming import Draw

RANDOM = {"independent": draw_independent, "orthogonal": draw_orthogonal}
PAIRS, CENTRES = 1024, 128  # sampled pairs per head, and their clusters
RIDGE = 1e-3  # of the mean of the diagonal


@lru_cache(maxsize=32)  # the layers of a model share their draws
def draw_random(name: str, num_hidden: int, dim: int, seed: int) -> Draw:
    """w ~ N(0, I) in float32, one draw for all heads."""
    weight = RANDOM[name]((1, num_hidden, dim), torch.Generator().manual_seed(seed))[0]
    return lambda start, stop: (weight[start:stop], weight.new_zeros(()))


@dataclass(frozen=True)
class Calibration:
    """What sample data say of the heads of a layer. Softmax attention is the same in its coordinates.

    The keys' mean is taken off, which softmax does not see; the queries' mean u becomes a weight exp(u.k) of each key;
    and (q, k) -> (q A, k A^-T), with the A for which the mean of |q|^2 + |k|^2 is least.

    Attributes:
        query_mean, key_mean: [H, 1, D]. query_map, key_map: A and A^-T [H, D, D].
        pairs: q + k of pairs sampled from softmax attention, in the new coordinates [H, PAIRS, D].
    """

    query_mean: Tensor
    key_mean: Tensor
    query_map: Tensor
    key_map: Tensor
    pairs: Tensor

    def transform(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys [B, H, N, D] in the new coordinates, and the keys' log weights u.k [B, H, N]."""
        return _transform(query, key, self.query_mean, self.key_mean, self.query_map, self.key_map)

    def log_normaliser_shift(self, query: Tensor) -> Tensor:
        """How much less log p is in the new coordinates, q.c for the keys' mean c [B, H, N]."""
        return (query * self.key_mean).sum(-1)

    def cluster(self, count: int, seed: int = 0) -> Tensor:
        """The centres [H, count, D] of clusters of the pairs, by k-means."""
        means = KMeans(count, n_init=1, max_iter=10, random_state=seed)
        centres = [torch.from_numpy(means.fit(pairs.double().numpy()).cluster_centers_) for pairs in self.pairs]
        return torch.stack(centres).to(self.pairs.dtype)


def calibrate(query: Tensor, key: Tensor, seed: int = 0) -> Calibration:
    """Learn the coordinates of each head and sample its pairs, from queries and keys [B, H, N, D]."""
    generator = torch.Generator().manual_seed(seed)
    means = [x.mean((0, 2))[:, None] for x in (query, key)]
    maps = _balance(*(_second_moment(x - mean) for x, mean in zip((query, key), means, strict=True)))
    asking, attended = draw_pairs(AttentionCall(query, key, key, {"scale": 1.0}), PAIRS, generator)
    asking, attended, _ = _transform(asking, attended, *means, *maps)
    return Calibration(*means, *maps, asking + attended)


def draw_calibrated(centres: Tensor, seed: int) -> Draw:
    """w ~ p(w) = mean_c N(w; mu_c, I) over the centres [H, C, D] and 0, with gains sqrt(N(w; 0, I) / p(w)).

    For any p the mean of phi(q).phi(k) is exp(q.k), and for one pair w ~ N(q + k, I) has no variance. The component at
    0 bounds the gains. Components take turns, in a random order per head. Every call continues the stream of neurons.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = torch.cat([centres, torch.zeros_like(centres[:, :1])], 1)
    heads, components, dim = centres.shape
    half = centres.square().sum(-1)[:, None] / 2
    order = torch.rand(heads, components, generator=generator).argsort(-1)

    def draw(start: int, stop: int) -> tuple[Tensor, Tensor]:
        index = order[:, torch.arange(start, stop) % components]
        noise = torch.randn(heads, stop - start, dim, generator=generator).to(centres.dtype)
        weight = noise + centres.gather(1, index[..., None].expand(-1, -1, dim))
        ratio = (weight @ centres.mT - half).logsumexp(-1) - log(components)  # log p(w) / N(w; 0, I)
        return weight, -ratio[:, None] / 2

    return draw


def _transform(
    query: Tensor, key: Tensor, query_mean: Tensor, key_mean: Tensor, query_map: Tensor, key_map: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    key = key - key_mean
    return (query - query_mean) @ query_map, key @ key_map, (key * query_mean).sum(-1)


def _second_moment(x: Tensor) -> Tensor:
    """E[x x^T] [H, D, D] over [B, H, N, D], with a ridge."""
    moment = torch.einsum("bhni,bhnj->hij", x, x) / (x.shape[0] * x.shape[2])
    ridge = RIDGE * moment.diagonal(dim1=1, dim2=2).mean(1)
    return moment + ridge[:, None, None] * torch.eye(x.shape[-1], dtype=x.dtype)


def _balance(query_moment: Tensor, key_moment: Tensor) -> tuple[Tensor, Tensor]:
    """A and A^-T with A^T C_q A = A^-1 C_k A^-T, a diagonal: A = L^-T U s^(1/4), C_q = L L^T, L^T C_k L = U s U^T."""
    factor = torch.linalg.cholesky(query_moment)
    squares, rotation = torch.linalg.eigh(factor.mT @ key_moment @ factor)
    roots = squares[:, None] ** 0.25
    return torch.linalg.solve_triangular(factor.mT, rotation * roots, upper=True), factor @ (rotation / roots)
