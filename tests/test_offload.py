"""Weights that are elsewhere than the call, or nowhere: offloaded, on meta, emptied, made in inference mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import transformers as t
from core_cases import draw
from patching_models import ALL, TEXT, TIMM_VIT, build, image, text
from torch import Tensor, nn

from astroattn import AstroConfig, AstrocyteAttention, Plan, fallbacks, patch
from astroattn.hidden import LearnedHidden
from astroattn.ops import library

RANDOM = AstroConfig(hidden="random")
LEARNED = AstroConfig(hidden="learned")
CONFIGS = {"random": RANDOM, "random, near": replace(RANDOM, near=2), "learned": LEARNED}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: build(ALL["bert"]),
    "gpt2": lambda: build(ALL["gpt2"]).transformer,
    "timm vit": lambda: build(ALL["timm vit"]),
    "torch": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval(),
}


def cores(model: nn.Module) -> list[AstrocyteAttention]:
    return [module for module in model.modules() if isinstance(module, AstrocyteAttention)]


def patch_and_train(model: nn.Module, config: AstroConfig) -> nn.Module:
    """With learned weights that are not those it started with."""
    patch(model, config)
    with torch.no_grad():
        for core in cores(model):
            if isinstance(core.hidden, LearnedHidden):
                core.hidden.query_weight.mul_(0.5)
    return model


def inputs(name: str) -> Tensor:
    if name == "timm vit":
        return image()
    return torch.ones(2, 20, 32).cumsum(1).sin() if name == "torch" else text()["input_ids"]


def answer(model: nn.Module, name: str) -> Tensor:
    output = model(inputs(name))
    return output if isinstance(output, Tensor) else output[0]


def run(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return answer(model, name)


def same_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def born_on_meta(name: str) -> nn.Module:
    try:
        with torch.device("meta"):
            return same_model(name)
    except RuntimeError as error:
        pytest.skip(f"this timm makes no model there: {error}")


def offload(model: nn.Module, way: str, folder: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    if way == "disk":
        accelerate.disk_offload(model, folder, torch.device("cpu"))
    else:
        accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=way == "cpu, with buffers")


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("way", ["cpu", "cpu, with buffers", "disk"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("first", ["patch", "offload"])
def test_offloading_changes_nothing(name: str, way: str, config: str, first: str, tmp_path: Path) -> None:
    if name == "torch" and first == "offload":
        model = same_model(name)
        offload(model, way, tmp_path)
        with pytest.raises(ValueError, match="its forward was replaced on the instance"):
            patch(model, CONFIGS[config])
        return
    expected = run(patch_and_train(same_model(name), CONFIGS[config]), name)
    model = same_model(name)
    if first == "offload":
        offload(model, way, tmp_path)
    patch_and_train(model, CONFIGS[config])
    if first == "patch":
        offload(model, way, tmp_path)
    torch.testing.assert_close(run(model, name), expected, rtol=0, atol=0)
    assert fallbacks(model) == {}


@pytest.mark.parametrize("config", [RANDOM, LEARNED], ids=["random", "learned"])
def test_a_model_that_is_loaded_onto_the_disk(config: AstroConfig, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = t.BertModel(t.BertConfig(**TEXT)).eval()
    model.save_pretrained(tmp_path / "model")
    offloaded = t.AutoModel.from_pretrained(
        tmp_path / "model", device_map={"": "disk"}, offload_folder=str(tmp_path / "disk")
    ).eval()
    if run(offloaded, "bert").is_meta:
        pytest.skip("this transformers fetches nothing from the disk where all of a model lies there")
    patch(model, config)
    patch(offloaded, config)
    assert torch.equal(run(offloaded, "bert"), run(model, "bert"))
    assert fallbacks(offloaded) == {}


def put_back_buffers(model: nn.Module, name: str) -> None:
    """The host's own buffers, which are in no state_dict."""
    for each, buffer in same_model(name).named_buffers():
        owner, _, key = each.rpartition(".")
        model.get_submodule(owner)._buffers[key] = buffer


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", ["born on meta", "to meta", "to_empty", "to_empty from meta"])
def test_weights_that_were_nowhere(name: str, way: str, config: str) -> None:
    trained = patch_and_train(same_model(name), CONFIGS[config])
    expected, weights = run(trained, name), {key: value.clone() for key, value in trained.state_dict().items()}
    if way == "born on meta":
        model = born_on_meta(name)
        patch(model, CONFIGS[config])
    else:
        model = patch_and_train(same_model(name), CONFIGS[config])
    if "to meta" in way or "from meta" in way:
        model.to("meta")
    if "to_empty" in way:
        junk = [torch.full((4, 16, 8), torch.nan) for _ in range(50)]  # what is in that memory then
        del junk
        model.to_empty(device="cpu")
    model.load_state_dict(weights, assign="meta" in way and "to_empty" not in way)
    put_back_buffers(model, name)
    assert torch.equal(run(model.eval(), name), expected)
    assert fallbacks(model) == {}


def test_heads_that_differ_find_their_places_again() -> None:
    configs = (AstroConfig(near=1, exact_keys=2), AstroConfig(near=2, exact_keys=0, num_hidden=4)) * 2
    attention, qkv = AstrocyteAttention(4, 8, configs), draw(2, 4, 60, 8, dtype=torch.float32)
    expected = attention(*qkv)
    assert attention.state_dict() == {}
    attention.to_empty(device="cpu")
    assert torch.equal(attention(*qkv), expected)
    attention.to("meta")
    assert torch.equal(attention(*qkv), expected)
    model = timm.create_model("vit_tiny_patch16_224", **TIMM_VIT).eval()
    plan = Plan(model=type(model).__name__, modules={"blocks.0.attn": configs})
    patch(model, plan)
    before = model(image())
    model.to("meta")
    model.to_empty(device="cpu")
    assert [core.heads.order.tolist() for core in cores(model)] == [[0, 2, 1, 3]]
    assert before.shape == (2, 1000)


def test_random_weights_come_back_from_any_move() -> None:
    attention, qkv = AstrocyteAttention(4, 8, RANDOM), draw(2, 4, 60, 8, dtype=torch.float32)
    weight, expected = attention.hidden.weight.clone(), attention(*qkv)
    assert torch.equal(attention.to(torch.bfloat16).float().hidden.weight, weight)
    attention.to("meta")
    assert attention.hidden.weight.is_meta
    assert torch.equal(attention(*qkv), expected)
    attention.to_empty(device="cpu")
    assert torch.equal(attention.hidden.weight, weight)


@pytest.mark.parametrize("causal", [False, True])
def test_learned_weights_on_meta_are_no_result(causal: bool) -> None:
    attention, qkv = AstrocyteAttention(4, 8, LEARNED).to("meta"), draw(2, 4, 60, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match="the learned weights are on the meta device"):
        attention(*qkv, causal=causal)
    with pytest.raises(ValueError, match="the learned weights are on the meta device"):
        attention.decode(*qkv)
    attention.to_empty(device="cpu")  # as if it were new
    assert torch.equal(attention(*qkv, causal=causal), AstrocyteAttention(4, 8, LEARNED)(*qkv, causal=causal))


@pytest.mark.parametrize("name", MODELS)
def test_learned_weights_that_no_file_had_are_the_hosts(name: str) -> None:
    original = same_model(name)
    model = born_on_meta(name)
    patch(model, LEARNED)
    model.load_state_dict(original.state_dict(), assign=True, strict=False)
    put_back_buffers(model, name)
    with pytest.warns(UserWarning, match="learned weights are on the meta device"):
        found = run(model.eval(), name)
    torch.testing.assert_close(found, run(original, name), rtol=1e-4, atol=1e-4)
    assert len(fallbacks(model)) == 2


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_operators_compute_on_one_device(backend: str) -> None:
    query, key, value = draw(1, 2, 40, 8, dtype=torch.float32)
    weight, phase = torch.zeros(1, 2, 4, 8, device="meta"), torch.zeros(1, 2, 4)
    settings = {"activation": "exp", "scale": 1.0, "backend": backend}
    calls = [
        lambda: library.linear_attention(query, key, value, weight, phase, **settings),
        lambda: library.causal_attention(query, key, value, weight, phase, near=2, **settings),
        lambda: library.decode(query, key, value, weight, phase, near=2, **settings),
        lambda: torch.ops.astroattn.linear_attention(query, key, value, weight, phase, None, "exp", 1.0, "native"),
        lambda: torch.ops.astroattn.causal_attention(query, key, value, weight, phase, None, "exp", 2, 1.0, "torch"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="tensors on different devices: cpu, meta"):
            call()


# Made in inference mode; patched again


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_patched_in_inference_mode_then_trained(name: str, config: str) -> None:
    model, twin = same_model(name), same_model(name)
    with torch.inference_mode():
        patch(model, CONFIGS[config])
        run(model, name)
    patch(twin, CONFIGS[config])
    for each in (model, twin):
        answer(each, name).square().sum().backward()
    grads = [{key: x.grad for key, x in each.named_parameters() if x.grad is not None} for each in (model, twin)]
    assert any("query_weight" in key for key in grads[0]) == (config == "learned")
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("changes", [{"backend": "torch"}, {"near": 2}, {"exact_queries": 1}])
@pytest.mark.parametrize("name", ["bert", "timm vit", "torch"])
def test_patching_again_keeps_what_was_learned(name: str, changes: dict) -> None:
    model = patch_and_train(same_model(name), LEARNED)
    weights = {key: x for key, x in model.named_parameters() if "astrocyte" in key}
    trained = {key: x.detach().clone() for key, x in weights.items()}
    patch(model, replace(LEARNED, **changes))
    assert [core.config for core in cores(model)] == [replace(LEARNED, **changes)] * 2
    now = {key: x for key, x in model.named_parameters() if "astrocyte" in key}
    assert all(now[key] is weights[key] for key in weights)  # an optimizer goes on with them
    assert all(torch.equal(now[key], trained[key]) for key in trained)
    assert len(now) == 6


def test_patching_again_with_another_layer_starts_anew() -> None:
    for changes in ({"num_hidden": 8}, {"seed": 1}, {"orthogonal": False}):
        config = replace(LEARNED, **changes)
        again, fresh = patch_and_train(same_model("bert"), LEARNED), same_model("bert")
        patch(again, config)
        patch(fresh, config)
        assert torch.equal(run(again, "bert"), run(fresh, "bert"))


def test_a_failed_patch_keeps_what_was_learned() -> None:
    model = patch_and_train(same_model("bert"), LEARNED)
    expected = run(model, "bert")
    with pytest.raises(ValueError, match="matches none"):
        patch(model, replace(LEARNED, near=2), where="nowhere")
    assert torch.equal(run(model, "bert"), expected)
