"""The simulated network against dense oracles, and against every fast form of the same attention."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from astroattn import AstroConfig, AstrocyteAttention
from astroattn.config import ACTIVATIONS
from astroattn.ops import static
from astroattn.ops.causal import causal_linear_attention
from astroattn.ops.features import features
from astroattn.ops.reference import feature_attention, softmax_attention
from astroattn.ops.static import Hidden
from astroattn.simulation import CompetitiveNeurons, NeuronAstrocyteNetwork, StaticNeurons

B, H, N, D, DV, M = 2, 3, 37, 8, 5, 20
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture
def tokens() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(B, H, N, d, generator=generator, dtype=torch.float64) for d in (D, D, DV))
    return query, key, value


def make(activation: str = "positive_exp") -> tuple[NeuronAstrocyteNetwork, AstrocyteAttention]:
    config = AstroConfig(hidden="random", num_hidden=M, near=0, activation=activation, seed=5)
    return NeuronAstrocyteNetwork(StaticNeurons.random(H, D, config)), AstrocyteAttention(H, D, config)


def oracle(attention: AstrocyteAttention, tokens: tuple[Tensor, ...], causal: bool) -> tuple[Tensor, Tensor]:
    """The dense form: all N x N products of features; output and log p."""
    hidden = attention.hidden
    assert hidden is not None
    layer = [x.double().repeat(B, *[1] * (x.ndim - 1)) for x in (hidden.weight, hidden.phase)]
    query, key, value = (x.flatten(0, 1) for x in tokens)
    nothing = torch.zeros(B * H, N, N, dtype=torch.bool)
    mask = torch.ones_like(nothing).tril() if causal else None
    root = D**-0.25
    out, log_p = feature_attention(query * root, key * root, value, *layer, attention.config.activation, nothing, mask)
    return out.unflatten(0, (B, H)), log_p.unflatten(0, (B, H))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bidirectional_forms_agree(
    activation: str, tokens: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, attention = make(activation)
    dense, log_p = oracle(attention, tokens, causal=False)
    simulated, trace = network.run(*tokens)
    parallel, fast_log_p = attention.with_normaliser(*tokens)
    monkeypatch.setattr(static, "FEATURES", 1)  # chunks of 16 tokens
    chunked = attention(*tokens)
    torch.testing.assert_close(simulated, dense, **CLOSE)
    torch.testing.assert_close(parallel, simulated, **CLOSE)
    torch.testing.assert_close(chunked, simulated, **CLOSE)
    assert trace.p is not None
    positive = trace.p > 0
    assert positive.any()
    torch.testing.assert_close(trace.p[positive].log(), log_p[positive], **CLOSE)
    torch.testing.assert_close(fast_log_p[positive], log_p[positive], **CLOSE)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_causal_forms_agree(activation: str, tokens: tuple[Tensor, ...]) -> None:
    network, attention = make(activation)
    dense, _ = oracle(attention, tokens, causal=True)
    simulated, _ = network.run(*tokens, causal=True)
    torch.testing.assert_close(simulated, dense, **CLOSE)
    torch.testing.assert_close(attention(*tokens, causal=True), simulated, **CLOSE)

    state, steps = None, []  # one token at a time, with a state of constant size
    for t in range(N):
        out, state = attention.decode(*(x[:, :, t : t + 1] for x in tokens), state)
        steps.append(out)
    torch.testing.assert_close(torch.cat(steps, 2), simulated, **CLOSE)

    assert attention.hidden is not None
    hidden = Hidden(*attention.hidden.expand(B, torch.float64))
    query, key, value = (x.flatten(0, 1) for x in tokens)
    root = D**-0.25
    for chunk in (1, 5, N):
        out, _, _ = causal_linear_attention(query * root, key * root, value, hidden, chunk=chunk)
        torch.testing.assert_close(out.unflatten(0, (B, H)), simulated, **CLOSE)


@pytest.mark.parametrize("causal", [False, True])
def test_one_neuron_per_token_is_softmax_attention(causal: bool, tokens: tuple[Tensor, ...]) -> None:
    query, key, value = tokens
    scale = 0.7
    out, trace = NeuronAstrocyteNetwork(CompetitiveNeurons(key * scale**0.5)).run(
        query, key, value, causal=causal, scale=scale, record="pg"
    )
    mask = torch.ones(N, N, dtype=torch.bool).tril() if causal else None
    softmax, log_p = softmax_attention(query * scale, key, value, mask)
    torch.testing.assert_close(out, softmax, **CLOSE)
    assert trace.p is not None
    torch.testing.assert_close(trace.p.log(), log_p, **CLOSE)
    assert trace.g is not None
    torch.testing.assert_close(trace.g[:, :, -1], torch.ones(B, H, N, dtype=torch.float64))


def test_fewer_competing_neurons_read_each_key_as_its_centre(tokens: tuple[Tensor, ...]) -> None:
    query, key, value = tokens
    centres = key[:, :, :4]
    winners = torch.cdist(key, centres).argmin(-1)
    read_as = centres.gather(2, winners[..., None].expand(-1, -1, -1, D))
    out, _ = NeuronAstrocyteNetwork(CompetitiveNeurons(centres)).run(query, key, value, scale=1.0)
    torch.testing.assert_close(out, softmax_attention(query, read_as, value)[0], **CLOSE)


def test_the_trace_holds_every_token(tokens: tuple[Tensor, ...]) -> None:
    network, _ = make()
    _, _, value = tokens
    out, trace = network.run(*tokens, record="hpHg")
    assert trace.H is not None
    assert trace.g is not None
    assert trace.h_writing is not None
    assert trace.h_reading is not None
    assert trace.p is not None
    assert trace.H.shape == (B, H, N, DV, M)
    for t, u in itertools.product((0, 7, N - 1), (0, 11)):
        written = trace.h_writing[:, :, : t + 1]
        torch.testing.assert_close(trace.g[:, :, t], written.sum(2), **CLOSE)
        torch.testing.assert_close(trace.H[:, :, t], value[:, :, : t + 1].mT @ written, **CLOSE)
        torch.testing.assert_close(trace.p[:, :, u], (trace.g[:, :, -1] * trace.h_reading[:, :, u]).sum(-1), **CLOSE)
    read = torch.einsum("bhvm,bhnm->bhnv", trace.H[:, :, -1], trace.h_reading) / trace.p[..., None]
    torch.testing.assert_close(out, read, **CLOSE)
    assert network.run(*tokens, record=())[1].p is None


def test_x_is_added_to_the_last_layer(tokens: tuple[Tensor, ...]) -> None:
    network, _ = make()
    x = torch.ones(B, H, N, DV, dtype=torch.float64)
    torch.testing.assert_close(network.run(*tokens, x)[0], network.run(*tokens)[0] + 1, **CLOSE)


def test_a_leak_forgets_at_its_rate(tokens: tuple[Tensor, ...]) -> None:
    neurons = StaticNeurons.random(H, D, AstroConfig(hidden="random", num_hidden=M))
    leak = 0.2
    out, trace = NeuronAstrocyteNetwork(neurons, leak=leak).run(*tokens, causal=True)
    query, key, value = tokens
    phi_query, phi_key = (
        features(x * D**-0.25, neurons.weight, neurons.phase, neurons.activation) for x in (query, key)
    )
    age = (torch.arange(N)[:, None] - torch.arange(N)).double()
    shares = (phi_query @ phi_key.mT) * ((1 - leak) ** age.clamp(min=0)).tril()
    assert trace.p is not None
    torch.testing.assert_close(trace.p, shares.sum(-1), **CLOSE)
    torch.testing.assert_close(out, shares @ value / shares.sum(-1, keepdim=True), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_of_low_precision_are_streamed_in_float64(dtype: torch.dtype, tokens: tuple[Tensor, ...]) -> None:
    low = [x.to(dtype) for x in tokens]
    for hidden in (make()[0].hidden, CompetitiveNeurons(low[1])):
        out, _ = NeuronAstrocyteNetwork(hidden).run(*low)
        torch.testing.assert_close(out, NeuronAstrocyteNetwork(hidden).run(*(x.double() for x in low))[0])


def test_tokens_can_be_streamed_by_hand(tokens: tuple[Tensor, ...]) -> None:
    network, _ = make()
    query, key, value = tokens
    expected, _ = network.run(*tokens, scale=1.0)
    network.reset()
    for t in range(N):
        network.write(key[:, :, t], value[:, :, t])
    last, _, _ = network.read(query[:, :, 4])
    torch.testing.assert_close(last, expected[:, :, 4], **CLOSE)


def test_bad_input_is_named(tokens: tuple[Tensor, ...]) -> None:
    network, _ = make()
    query, key, value = tokens
    for leak in (-0.1, 1.0):
        with pytest.raises(ValueError, match="leak"):
            NeuronAstrocyteNetwork(network.hidden, leak=leak)
    with pytest.raises(ValueError, match="query: shape"):
        network.run(query[0], key[0], value[0])
    with pytest.raises(ValueError, match="key: shape"):
        network.run(query, key[:, :, 1:], value)
    with pytest.raises(ValueError, match="value: shape"):
        network.run(query, key, value[:, :, 1:])
    with pytest.raises(ValueError, match="x: shape"):
        network.run(query, key, value, value[..., 1:])
    with pytest.raises(ValueError, match=r"record: .*'q'"):
        network.run(query, key, value, record="pq")
    with pytest.raises(ValueError, match="nothing has been written"):
        make()[0].read(query[:, :, 0])
    with pytest.raises(ValueError, match=r"key: .* not finite"):
        network.run(query, key * torch.nan, value)
    exact = NeuronAstrocyteNetwork(CompetitiveNeurons(key))
    with pytest.raises(ValueError, match=r"query: .* not finite"):
        exact.run(query * 1e3, key, value)
