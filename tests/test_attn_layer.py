"""Models of timm whose attention is given as `attn_layer`: what `patch` makes of them, from the start."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import astroattn
from astroattn import AstroConfig, Plan

CONFIG = AstroConfig(num_hidden=4, near=4, exact_keys=4, tile=4)
FULL = AstroConfig(near=65)
GRID = (8, 8)
pytestmark = pytest.mark.filterwarnings("ignore:attn_layer. left to the model's own attention")


def make(**kwargs: Any) -> Any:
    if "attn_layer" not in inspect.signature(VisionTransformer).parameters:
        pytest.skip("this timm makes every attention itself")
    torch.manual_seed(0)
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **sizes | kwargs).eval()
    for block in model.blocks:
        block.attn.qkv.weight.data *= 10  # new ones attend all tokens alike
    return model


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64)


@torch.no_grad()
@pytest.mark.parametrize(
    "config", [CONFIG, AstroConfig(hidden="random", num_hidden=8), AstroConfig(hidden="none", near=9, exact_keys=0)]
)
def test_it_is_what_patching_makes(config: AstroConfig, images: Tensor) -> None:
    built, patched = make(attn_layer=astroattn.attn_layer(config, grid=GRID)), make()
    original = patched(images)
    assert built.load_state_dict(patched.state_dict()).missing_keys == []
    astroattn.patch(patched, config)
    assert torch.equal(built(images), patched(images))
    assert not torch.allclose(built(images), original, atol=1e-6)
    assert not astroattn.fallbacks(built)


@torch.no_grad()
def test_a_full_near_field_is_the_original(images: Tensor) -> None:
    built, original = make(attn_layer=astroattn.attn_layer(FULL, grid=GRID)), make()
    built.load_state_dict(original.state_dict())
    torch.testing.assert_close(built(images), original(images), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_a_grid_it_is_a_sequence_until_the_model_is_patched(images: Tensor) -> None:
    built, original = make(attn_layer=astroattn.attn_layer(CONFIG)), make()
    sequence = built(images)
    before = built.blocks[0].attn.astrocyte
    report = astroattn.patch(built, CONFIG)
    assert len(report.patched) == 2
    assert built.blocks[0].attn.astrocyte is before  # the same config: only the grid was found
    assert not torch.equal(built(images), sequence)
    astroattn.unpatch(built)
    assert type(built.blocks[0].attn) is Attention
    assert torch.equal(built(images), original(images))
    astroattn.patch(built, FULL)
    assert built.blocks[0].attn.astrocyte.config == FULL


@torch.no_grad()
def test_a_grid_that_does_not_fit_is_said(images: Tensor) -> None:
    built = make(attn_layer=astroattn.attn_layer(CONFIG, grid=GRID, prefix=0))
    with pytest.warns(UserWarning, match="attn_layer: patch grid not found: tokens are treated as a sequence"):
        wrong = built(images)
    assert set(astroattn.fallbacks(built)) == {"blocks.0.attn", "blocks.1.attn"}
    assert torch.equal(wrong, make(attn_layer=astroattn.attn_layer(CONFIG))(images))


@torch.no_grad()
def test_masks_are_honoured_or_answered_by_softmax() -> None:
    layer, x = astroattn.attn_layer(CONFIG), torch.randn(2, 65, 32)
    torch.manual_seed(0)
    built = layer(32, num_heads=2).eval()
    original = Attention(32, num_heads=2).eval()
    original.load_state_dict(built.state_dict())
    real = torch.arange(65) < torch.tensor([[65], [40]])
    masked = built(x, attn_mask=real[:, None, None])
    torch.testing.assert_close(masked[1, :40], built(x[1:, :40])[0])
    assert not astroattn.fallbacks(built)
    dense = torch.rand(2, 1, 65, 65) > 0.2
    causal = [{"is_causal": True}] if "is_causal" in inspect.signature(Attention.forward).parameters else []
    calls = [{"attn_mask": dense}, *causal]
    for call in calls:
        assert torch.equal(built(x, **call), original(x, **call))
    assert [list(each.values()) for each in astroattn.fallbacks(built).values()] == [[1] * len(calls)]


@torch.no_grad()
def test_it_is_copied_pickled_and_saved(images: Tensor, tmp_path: Path) -> None:
    built = make(attn_layer=astroattn.attn_layer(CONFIG, grid=GRID))
    expected = built(images)
    for twin in (copy.deepcopy(built), pickle.loads(pickle.dumps(built))):  # noqa: S301
        assert torch.equal(twin(images), expected)
    save_for_hf(built, str(tmp_path), safe_serialization=True)
    assert "attn_layer" not in json.loads((tmp_path / "config.json").read_text())["model_args"]
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    astroattn.load(again, tmp_path)
    assert torch.equal(again(images), expected)


def test_it_trains_from_scratch(images: Tensor) -> None:
    built = make(attn_layer=astroattn.attn_layer(AstroConfig(hidden="learned"), grid=GRID)).train()
    built.set_grad_checkpointing()
    built(images).square().mean().backward()
    assert all(each.grad is not None and bool(each.grad.any()) for each in built.blocks[1].attn.parameters())
    added = built.state_dict().keys() - make().state_dict().keys()
    assert {name.rpartition(".")[0] for name in added} == {f"blocks.{n}.attn.astrocyte.hidden" for n in (0, 1)}


def test_a_block_may_be_made_on_another_device() -> None:
    make()  # skips the test where timm knows no attn_layer
    layer = astroattn.attn_layer(AstroConfig(hidden="learned"))
    block = timm.models.vision_transformer.Block(32, 2, attn_layer=layer, device="meta")
    assert all(each.is_meta for each in block.parameters())
    assert issubclass(layer, nn.Module) is False  # timm asks so what it is; what it makes is of timm's own class
    assert isinstance(layer(32, num_heads=2), Attention)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"config": 3}, TypeError, "config: expected"),
        ({"config": "fats"}, ValueError, "config: 'fats'; must be one of fast, "),
        ({"config": Plan(model="", modules={"a": (CONFIG,)})}, TypeError, "config: a plan is of a whole model"),
        ({"config": AstroConfig(hidden="streaming")}, ValueError, "config: a streaming memory .* causal"),
        ({"grid": 14}, TypeError, r"grid: 14; expected \(rows, columns\), two ints"),
        ({"grid": (0, 14)}, ValueError, r"grid: \(0, 14\); needs rows and columns of at least 1$"),
        ({"prefix": -1}, ValueError, "prefix: -1; must be an int of at least 0"),
        ({"prefix": True}, ValueError, "prefix: True; must be"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        astroattn.attn_layer(**arguments)
