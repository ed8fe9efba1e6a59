"""Modules that something else has wrapped since they were patched: unpatching gives back what they compute."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from patching_models import ALL, build, image, text
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

from astroattn import AstroConfig, AstrocyteAttention
from astroattn.patching import patch, patched, unpatch
from astroattn.patching.site import site_of

SHORT = AstroConfig(near=2, exact_keys=0, tile=2, num_hidden=4)
OTHER = AstroConfig(near=4, exact_keys=0, tile=2, num_hidden=4)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    for parameter in model.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "timm vit": (lambda: build(ALL["timm vit"]), {"x": image()}),
    "timm eva02": (lambda: build(ALL["timm eva02"]), {"x": image((56, 56))}),
    "bert": (lambda: build(ALL["bert"]), text()),
    "vit": (lambda: build(ALL["vit"]), {"pixel_values": image()}),
    "torch": (encoder, {"src": torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(1))}),
}


def run(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    result = model(**inputs)
    return result if isinstance(result, torch.Tensor) else result[0]


def sites(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if site_of(module) is not None]


class Same(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def hook(module: nn.Module) -> None:
    add_hook_to_module(module, ModelHook())


def replace_forward(module: nn.Module) -> None:
    before = module.forward
    module.forward = lambda *args, **kwargs: before(*args, **kwargs)


def put_class_over(module: nn.Module) -> None:
    module.__class__ = type("Over", (type(module),), {})


def parametrize_own(module: nn.Module) -> None:
    """Its own weights, so that the module's class changes."""
    if not module._parameters:
        module.register_parameter("extra", nn.Parameter(torch.ones(3)))
    name = next(key for key, value in module._parameters.items() if value is not None)
    parametrize.register_parametrization(module, name, Same())


def compile_in_place(module: nn.Module) -> None:
    module.compile(backend="eager")


def shard(module: nn.Module) -> None:
    fully_shard(module)


WRAPS = [hook, replace_forward, put_class_over, parametrize_own, compile_in_place, shard]


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_unpatching_under_a_wrapper(name: str, wrap: Callable[[nn.Module], None]) -> None:
    torch._dynamo.reset()
    make, inputs = MODELS[name]
    model = make()
    expected = run(model, inputs)
    patch(model, SHORT)
    changed = run(model, inputs)
    assert not torch.allclose(changed, expected)
    for module in sites(model):
        wrap(module)
    assert torch.equal(run(model, inputs), changed)
    with patched(model, OTHER):
        assert not torch.allclose(run(model, inputs), changed)
    assert torch.equal(run(model, inputs), changed)
    unpatch(model)
    assert not any(isinstance(module, AstrocyteAttention) for module in model.modules())
    assert torch.equal(run(model, inputs), expected)


@pytest.mark.parametrize("name", ["timm vit", "torch", "vit"])
@torch.no_grad()
def test_a_wrapper_taken_off_afterwards(name: str) -> None:
    make, inputs = MODELS[name]
    model = make()
    expected = run(model, inputs)
    patch(model, SHORT)
    changed, taken = run(model, inputs), sites(model)
    for module in taken:
        hook(module)
        parametrize_own(module)
    unpatch(model)
    for module in taken:
        for weight in list(module.parametrizations):
            parametrize.remove_parametrizations(module, weight)
        remove_hook_from_module(module)
    assert torch.equal(run(model, inputs), expected)
    for module in taken:
        vars(module).pop("forward", None)  # accelerate leaves it, bound, on the instance
    patch(model, SHORT)
    assert torch.equal(run(model, inputs), changed)
    unpatch(model)
    assert torch.equal(run(model, inputs), expected)


@torch.no_grad()
def test_a_class_put_back_by_hand() -> None:
    model = build(ALL["timm vit"])
    expected = run(model, {"x": image()})
    patch(model, SHORT)
    for module in sites(model):
        module.__class__ = type(module).__bases__[0]
    unpatch(model)
    assert torch.equal(run(model, {"x": image()}), expected)


@torch.no_grad()
def test_lora_put_in_since() -> None:
    peft = pytest.importorskip("peft")
    for name, targets in (("timm vit", ["qkv", "proj"]), ("bert", ["query", "value"])):
        make, inputs = MODELS[name]
        model = make()
        expected = run(model, inputs)
        patch(model, SHORT)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets))
        unpatch(wrapped)
        assert torch.equal(run(wrapped, inputs), expected)


@torch.no_grad()
def test_a_patched_block_replaced_within_patched() -> None:
    model = build(ALL["timm vit"])
    patch(model, SHORT)
    changed = run(model, {"x": image()})
    with patched(model, OTHER):
        model.blocks[0], old = copy.deepcopy(model.blocks[0]), model.blocks[0]
    assert site_of(old.attn) is not None
    model.blocks[0] = old
    assert torch.equal(run(model, {"x": image()}), changed)
