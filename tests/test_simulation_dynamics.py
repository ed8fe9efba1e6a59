"""The network in continuous time approaches the discrete one as the ratios of its time constants fall."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from astroattn import AstroConfig
from astroattn.simulation import (
    CompetitiveNeurons,
    HiddenNeurons,
    NeuronAstrocyteNetwork,
    StaticNeurons,
    TimeConstants,
    integrate,
)

B, H, N, D, DV = 1, 2, 4, 6, 3


@pytest.fixture
def tokens() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(B, H, N, d, generator=generator, dtype=torch.float64) for d in (D, D, DV))
    return query, key, value


def random_neurons(activation: str = "positive_exp") -> StaticNeurons:
    return StaticNeurons.random(H, D, AstroConfig(hidden="random", num_hidden=8, near=0, activation=activation))


def error(network: NeuronAstrocyteNetwork, tokens: tuple[Tensor, ...], causal: bool, **constants: float) -> float:
    out, _ = network.run(*tokens, causal=causal)
    moved, _ = integrate(network, *tokens, constants=TimeConstants(**constants), causal=causal, samples=1)
    return ((moved - out).norm() / out.norm()).item()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("leak", [0.0, 0.3])
def test_error_falls_in_proportion_to_the_neurons_time(causal: bool, leak: float, tokens: tuple[Tensor, ...]) -> None:
    network = NeuronAstrocyteNetwork(random_neurons(), leak=leak)
    errors = [error(network, tokens, causal, neuron=neuron, astrocyte=0.04) for neuron in (1e-2, 1e-3, 1e-4)]
    assert errors[0] < 0.1
    for slower, faster in itertools.pairwise(errors):
        assert slower / faster == pytest.approx(10, rel=0.2)


def test_error_falls_exponentially_with_the_astrocytes_speed(tokens: tuple[Tensor, ...]) -> None:
    network = NeuronAstrocyteNetwork(random_neurons())
    errors = [error(network, tokens, False, neuron=1e-5, astrocyte=astrocyte) for astrocyte in (0.25, 0.125)]
    assert errors[0] / errors[1] == pytest.approx(math.exp(1 / 0.125 - 1 / 0.25), rel=0.3)


def test_the_exact_kernel_moves_too(tokens: tuple[Tensor, ...]) -> None:
    _, key, _ = tokens
    hidden: HiddenNeurons = CompetitiveNeurons(key * D**-0.25)
    assert error(NeuronAstrocyteNetwork(hidden), tokens, False, neuron=1e-4, astrocyte=0.04) < 1e-3


def test_the_motion_is_recorded(tokens: tuple[Tensor, ...]) -> None:
    network = NeuronAstrocyteNetwork(random_neurons())
    _, trace = network.run(*tokens, record="hp")
    network.reset()
    out, motion = integrate(network, *tokens, constants=TimeConstants(neuron=1e-4, astrocyte=0.04), samples=5)
    assert network.H is None  # its state is its own
    assert motion.h.shape == (2 * N * 5, B, H, 8)
    assert motion.time[-1] == 2 * N
    assert (motion.time.diff() > 0).all()
    torch.testing.assert_close(motion.r, (motion.time > N).long())
    torch.testing.assert_close(motion.token, torch.arange(N).repeat_interleave(5).repeat(2))
    assert trace.p is not None
    assert trace.h_writing is not None
    torch.testing.assert_close(motion.l[-1], out[:, :, -1])
    torch.testing.assert_close(motion.p[N * 5 + 4 :: 5].movedim(0, 2), trace.p, rtol=1e-3, atol=0)
    torch.testing.assert_close(motion.h[4 : N * 5 : 5].movedim(0, 2), trace.h_writing, rtol=1e-6, atol=1e-9)


def test_x_reaches_the_last_layer(tokens: tuple[Tensor, ...]) -> None:
    network, constants = NeuronAstrocyteNetwork(random_neurons()), TimeConstants(neuron=1e-3, astrocyte=0.04)
    x = torch.ones(B, H, N, DV, dtype=torch.float64)
    without, _ = integrate(network, *tokens, constants=constants)
    with_x, _ = integrate(network, *tokens, x, constants=constants)
    torch.testing.assert_close(with_x, without + 1, rtol=1e-6, atol=1e-6)


def test_bad_input_is_named(tokens: tuple[Tensor, ...]) -> None:
    query, key, value = tokens
    for name in ("neuron", "astrocyte"):
        with pytest.raises(ValueError, match=f"{name}: 0; must be positive"):
            TimeConstants(**{name: 0})
    network = NeuronAstrocyteNetwork(random_neurons())
    with pytest.raises(ValueError, match="key: shape"):
        integrate(network, query, key[:, :, 1:], value)
    with pytest.raises(ValueError, match="samples: 0"):
        integrate(network, query, key, value, samples=0)
    with pytest.raises(ValueError, match="calcium p is not positive"):  # phi(k) is about -|k|^2 / 2, phi(q) about 1
        integrate(NeuronAstrocyteNetwork(random_neurons("linear")), query * 0.1, key * 9, value)
