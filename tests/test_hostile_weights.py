"""Weights that are no plain tensors: quantised, sharded over processes, parametrized, averaged, on the meta device."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import debug_launcher
from hostile_cases import FULL, LEARNED, MODELS, SHORT, STATIC, answer, cores
from patching_models import ALL, build, text
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.utils import parametrizations, parametrize
from torch.torch_version import TorchVersion

from astroattn import fallbacks, patch, unpatch

CONFIGS = {"short": SHORT, "static": STATIC, "learned": LEARNED}


# quantised


def dynamic(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


def by_torchao(model: nn.Module) -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def by_quanto(model: nn.Module) -> nn.Module:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


def by_bitsandbytes(model: nn.Module) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                quantised = bnb.nn.Linear8bitLt(
                    child.in_features, child.out_features, child.bias is not None, has_fp16_weights=False
                )
                quantised.load_state_dict(child.state_dict())
                setattr(module, name, quantised.to("cpu"))
    return model


QUANTISED = {"torch": dynamic, "torchao": by_torchao, "quanto": by_quanto, "bitsandbytes": by_bitsandbytes}


@pytest.mark.parametrize("first", ["patch", "quantise"])
@pytest.mark.parametrize("way", QUANTISED)
@pytest.mark.parametrize("name", ["bert", "timm vit", "torch"])
@torch.no_grad()
def test_quantised(name: str, way: str, first: str) -> None:
    """The same whichever comes first; with a full near field the quantised original, and that again unpatched."""
    make, given = MODELS[name]
    original, inputs = QUANTISED[way](make()), given()
    try:
        expected = answer(original, inputs)
    except Exception as error:  # torch.nn reads the weights of its layers by itself, which these are not
        pytest.skip(f"the original does not run when it is quantised: {error}")
    for config in (FULL, SHORT, STATIC, LEARNED):
        model = make()
        if first == "patch":
            patch(model, config)
            model = QUANTISED[way](model)
        else:
            model = QUANTISED[way](model)
            patch(model, config)
        assert len(cores(model)) == 2
        found = answer(model, inputs)
        if config is FULL:
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        else:
            assert found.isfinite().all()
            assert not torch.allclose(found, expected)
        assert not fallbacks(model)
        unpatch(model)
        torch.testing.assert_close(answer(model, inputs), expected)


# parametrized and averaged


@pytest.mark.parametrize("way", [parametrizations.spectral_norm, parametrizations.weight_norm])
@pytest.mark.parametrize("name", ["bert", "timm vit"])
def test_weights_that_are_computed(name: str, way: Callable[..., Any]) -> None:
    make, given = MODELS[name]
    model, inputs = make(), given()
    for module in list(model.modules()):
        if type(module) is nn.Linear:
            way(module, "weight")
    model.eval()
    with torch.no_grad():
        expected = answer(model, inputs)
        patch(model, FULL)
        torch.testing.assert_close(answer(model, inputs), expected, rtol=1e-4, atol=1e-4)
    patch(model.train(), LEARNED)
    answer(model.eval(), inputs).square().sum().backward()
    grads = [each.grad for key, each in model.named_parameters() if "parametrizations" in key]
    assert sum(each is not None and bool(each.any()) for each in grads) > 4
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    unpatch(model)
    assert not cores(model)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_averaged_models(name: str, config: str) -> None:
    make, given = MODELS[name]
    model, inputs = make(), given()
    patch(model, CONFIGS[config])
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert torch.equal(answer(averaged, inputs), answer(model, inputs))
    unpatch(averaged)
    assert len(cores(model)) == 2
    assert torch.equal(answer(averaged, inputs), answer(make(), inputs))


# nowhere


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_built_on_meta_and_filled_afterwards(name: str, config: str) -> None:
    make, given = MODELS[name]
    original = make()
    model = copy.deepcopy(original).to("meta")
    report = patch(model, CONFIGS[config])
    assert len(report.patched) == 2
    assert "meta device" in report.probe
    model.to_empty(device="cpu")
    model.load_state_dict(original.state_dict(), strict=config != "learned")
    for key, buffer in original.named_buffers():  # those that no state dict has
        model.get_buffer(key).copy_(buffer)
    patch(original, CONFIGS[config])
    torch.testing.assert_close(answer(model, given()), answer(original, given()))


# over processes


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


PLANS = {
    "bert": {
        "encoder.layer.*.attention.self.query": ColwiseParallel,
        "encoder.layer.*.attention.self.key": ColwiseParallel,
        "encoder.layer.*.attention.self.value": ColwiseParallel,
        "encoder.layer.*.attention.output.dense": RowwiseParallel,
    },
    "llama": {
        "model.layers.*.self_attn.q_proj": ColwiseParallel,
        "model.layers.*.self_attn.k_proj": ColwiseParallel,
        "model.layers.*.self_attn.v_proj": ColwiseParallel,
        "model.layers.*.self_attn.o_proj": RowwiseParallel,
    },
}


def parallelize(name: str, model: nn.Module, processes: int) -> None:
    mesh = distributed.init_device_mesh("cpu", (processes,))
    parallelize_module(model, mesh, {key: style() for key, style in PLANS[name].items()})


def tensor_parallel(name: str, processes: int) -> None:
    """Checks in every process; an error there is one of the test."""
    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    given = text()
    for config in (FULL, STATIC):
        for first in ("patch", "parallelize"):
            original, model = build(ALL[name]), build(ALL[name])
            if first == "patch":
                patch(model, config)
                parallelize(name, model, processes)
            else:
                parallelize(name, model, processes)
                assert any(isinstance(each, DTensor) for each in model.parameters())
                patch(model, config)
            patch(original, config)
            with torch.no_grad(), warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                expected, found = answer(original, given), answer(model, given)
            if fallbacks(model):  # each process has a part of the heads: said, and exact
                assert any("another number of heads" in str(each.message) for each in said)
                unpatch(original)
                expected = answer(original, given)
            elif config is STATIC and processes > 1:  # every process draws the weights of its own heads from the seed
                assert found.isfinite().all()
                continue
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", PLANS)
def test_a_plan_of_tensor_parallelism(name: str) -> None:
    tensor_parallel(name, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_tensors_in_two_processes(name: str) -> None:
    if name == "bert" and TorchVersion(torch.__version__) < "2.9":
        pytest.skip("PyTorch 2.8 cannot run a BERT that is cut so, patched or not")
    debug_launcher(tensor_parallel, (name, 2), num_processes=2)
