"""The random hidden layer: its law, its estimate of exp(q.k), and how its error falls with m."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from astroattn import AstroConfig
from astroattn.hidden import RandomHidden, draw_independent, draw_orthogonal
from astroattn.ops.features import features
from astroattn.ops.reference import softmax_attention
from astroattn.ops.static import Hidden, linear_attention

DRAWS = {"independent": draw_independent, "orthogonal": draw_orthogonal}
DIM = 16


def vectors(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A query and a key of length 1 to 1.25: the same along the diagonal, or in any two directions."""
    if kind == "diagonal":
        same = torch.full((DIM,), 1.25 / DIM**0.5, dtype=torch.float64)
        return same, same
    pair = torch.randn(2, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return tuple(pair / pair.norm(dim=1, keepdim=True))


def standard_errors(draw: object, activation: str, kind: str, layers: int = 8000) -> float:
    """Distance of the mean estimate of exp(q.k) over `layers` hidden layers of m = D from the truth."""
    generator = torch.Generator().manual_seed(0)
    weight = draw((layers, DIM, DIM), generator).double()
    phase = torch.rand(layers, DIM, generator=generator, dtype=torch.float64) * 2 * math.pi
    query, key = vectors(kind)
    response = [features(x.expand(layers, 1, -1), weight, phase, activation)[:, 0] for x in (query, key)]
    estimates = (response[0] * response[1]).sum(-1)
    return float((estimates.mean() - (query @ key).exp()) / (estimates.std() / layers**0.5))


@pytest.mark.parametrize("kind", ["diagonal", "any"])
@pytest.mark.parametrize(
    ("draw", "activation"),
    [
        ("independent", "positive_exp"),
        ("orthogonal", "positive_exp"),
        ("independent", "cosine"),
        ("orthogonal", "cosine"),
    ],
)
def test_estimate_is_unbiased(draw: str, activation: str, kind: str) -> None:
    assert abs(standard_errors(DRAWS[draw], activation, kind)) < 4


def test_estimate_is_biased_without_the_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above finds the bias of a plain QR decomposition, whose Q is not uniform over the rotations."""
    qr = torch.linalg.qr

    def without_signs(matrix: torch.Tensor) -> tuple:
        q, r = qr(matrix)
        return q, r.abs()

    monkeypatch.setattr(torch.linalg, "qr", without_signs)
    assert standard_errors(draw_orthogonal, "positive_exp", "diagonal") < -8


@pytest.mark.parametrize("draw", DRAWS)
def test_weights_are_standard_normal(draw: str) -> None:
    weight = DRAWS[draw]((2000, 20, DIM), torch.Generator().manual_seed(1))
    assert weight.dtype == torch.float32
    for row in (0, 7, 15, 16, 19):  # the last ones are of a second, unfinished block
        assert stats.kstest(weight[:, row].flatten().numpy(), "norm").pvalue > 1e-3
        assert stats.kstest(weight[:, row].square().sum(-1).numpy(), stats.chi2(DIM).cdf).pvalue > 1e-3
        assert stats.kstest(weight[:, row, row % DIM].numpy(), "norm").pvalue > 1e-3


def test_rows_are_orthogonal_within_blocks() -> None:
    weight = draw_orthogonal((3, 40, DIM), torch.Generator().manual_seed(1)).double()
    directions = weight / weight.norm(dim=-1, keepdim=True)
    cosines = directions @ directions.mT
    for block in (slice(0, 16), slice(16, 32), slice(32, 40)):
        inside = cosines[:, block, block]
        torch.testing.assert_close(inside, torch.eye(inside.shape[-1]).double().expand_as(inside), atol=1e-6, rtol=0)
    assert cosines[:, :16, 16:].abs().amax() > 0.3  # blocks are independent
    assert cosines[0, 0, 0] - (directions[0, 0] @ directions[1, 0]) > 0.1  # and so are heads


@pytest.mark.parametrize("orthogonal", [True, False])
def test_seed_gives_the_weights(orthogonal: bool) -> None:
    def layer(seed: int, m: int = 24) -> RandomHidden:
        return RandomHidden(2, 8, AstroConfig(hidden="random", num_hidden=m, orthogonal=orthogonal, seed=seed))

    torch.manual_seed(5)
    first = layer(3)
    state = torch.get_rng_state()
    torch.manual_seed(6)
    assert torch.equal(first.weight, layer(3).weight)
    assert torch.equal(first.phase, layer(3).phase)
    assert not torch.equal(first.weight, layer(4).weight)
    assert not torch.equal(first.weight[0], first.weight[1])
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    assert first.state_dict() == {}
    assert 0 <= first.phase.min() <= first.phase.max() < 2 * math.pi


def test_error_falls_as_the_root_of_m() -> None:
    """Relative error of the output against softmax on unit vectors, m = 2^6 to 2^14, independent weights."""
    generator = torch.Generator().manual_seed(0)
    sizes, layers, tokens = [2**power for power in range(6, 15, 2)], 4, 64
    query, key = (torch.randn(layers, tokens, DIM, generator=generator) for _ in range(2))
    query, key = (x / x.norm(dim=-1, keepdim=True) for x in (query, key))
    value = torch.randn(layers, tokens, DIM, generator=generator)
    exact, _ = softmax_attention(query, key, value)
    errors = []
    for m in sizes:
        layer = Hidden(draw_independent((layers, m, DIM), generator), torch.zeros(layers, m), "positive_exp")
        errors.append(float((linear_attention(query, key, value, layer)[0] - exact).norm() / exact.norm()))
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert -0.6 < slope < -0.4
    assert errors[-1] < 0.1
