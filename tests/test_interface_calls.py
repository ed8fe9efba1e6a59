"""How the models of transformers call their attention function, and what masks reach what is not an astrocyte."""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as t
from patching_models import ALL, VISION, build, need_transformers
from torch import Tensor, nn
from transformers.models.glm4v.configuration_glm4v import Glm4vVisionConfig
from transformers.models.glm4v.modeling_glm4v import Glm4vVisionModel
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoder
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from astroattn import AstroConfig, AstrocyteAttention, fallbacks, patch
from astroattn.patching.interface import attention
from astroattn.patching.masks import KeyMask, attention_mask

FULL = AstroConfig(hidden="random", near=100_000)
SHORT = AstroConfig(hidden="random", near=2)


def calls_of_attention() -> Iterator[tuple[str, ast.Call]]:
    """Every call of a looked-up attention function in the installed transformers."""
    for path in Path(t.__file__).parent.glob("models/*/modeling_*.py"):
        source = path.read_text("utf-8")
        for start in (found.start() for found in re.finditer(r"\battention_interface\(", source)):
            ends = (place.end() for place in re.finditer(r"\)", source[start:]))
            text = next(part for end in ends if (part := source[start : start + end]).count("(") == part.count(")"))
            yield path.parent.name, ast.parse(text, mode="eval").body


def test_every_call_in_transformers_fits() -> None:
    signature, found = inspect.signature(functools.partial(attention, host="sdpa")), 0
    for model, call in calls_of_attention():
        names = [each.arg for each in call.keywords if each.arg is not None]
        bound = signature.bind(*call.args, **dict.fromkeys(names)).arguments
        assert {"module", "query", "key", "value"} <= set(bound), model
        assert ("attention_mask" in bound) == (len(call.args) > 4 or "attention_mask" in names), model
        found += 1
    assert found > 100


def patches(count: int, size: int) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(1))


def grids() -> dict[str, Tensor]:
    return {"hidden_states": patches(2 * 64, 3 * 2 * 16), "grid_thw": torch.tensor([[1, 8, 8], [1, 8, 8]])}


def photos() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def sound() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 160, 16, generator=torch.Generator().manual_seed(1))}


VL = {"depth": 2, "num_heads": 4, "patch_size": 4, "hidden_size": 32}
FUSED = VL | {"out_hidden_size": 32, "intermediate_size": 64}
PHOTO = VISION | {"image_size": 32, "patch_size": 4}
# Models that pass the mask by its name, every argument by its name, or no mask; and how many astrocytes they get.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], int]] = {
    "blip-2": (lambda: t.Blip2VisionModel(t.Blip2VisionConfig(**PHOTO)), photos, 2),
    "instructblip": (lambda: t.InstructBlipVisionModel(t.InstructBlipVisionConfig(**PHOTO)), photos, 2),
    "qwen2-vl": (
        lambda: Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(**VL, embed_dim=32, mlp_ratio=2)),
        grids,
        2,
    ),
    "qwen2.5-vl": (
        lambda: Qwen2_5_VisionTransformerPretrainedModel(
            Qwen2_5_VLVisionConfig(**FUSED, window_size=16, fullatt_block_indexes=[1])
        ),
        grids,
        2,
    ),
    "glm-4v": (lambda: Glm4vVisionModel(Glm4vVisionConfig(**FUSED, image_size=32)), grids, 2),
    "parakeet": (
        lambda: ParakeetEncoder(t.ParakeetEncoderConfig(**VISION, num_mel_bins=16, subsampling_conv_channels=8)),
        sound,
        2,
    ),
    "siglip": (lambda: build(ALL["siglip"]).vision_model, photos, 2),
    "dinov3": (lambda: build(ALL["dinov3"]), photos, 2),
}


def floats(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else []
    return [tensor for part in parts for tensor in floats(part)]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("host", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_reproduced_however_they_pass_arguments(family: str, host: str, wrapped: bool) -> None:
    need_transformers("5.9")  # the first in which all of them use the interface
    make, inputs, patched = FAMILIES[family]
    torch.manual_seed(0)
    tower = make().eval()
    tower.set_attn_implementation(host)
    with torch.no_grad():
        for parameter in tower.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
        before = floats(tower(**inputs()))
        whole = nn.ModuleList([tower]) if wrapped else tower  # wrapped, the tower is checked alone
        config = AstroConfig(near=100_000) if family == "parakeet" else FULL  # its positions are a bias on every pair
        report = patch(whole, config)
        assert len(report.patched) == patched, str(report)
        calls: list[int] = []
        for each in tower.modules():
            if isinstance(each, AstrocyteAttention):
                each.register_forward_hook(lambda *_: calls.append(1))
        after = floats(tower(**inputs()))
    assert len(calls) >= patched
    assert not fallbacks(tower)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


def test_the_mask_of_keys_may_stand_in_a_list() -> None:
    mask = KeyMask(torch.tensor([[True, False]]), 2, True, None)
    assert torch.equal(torch.cat([mask, mask], -1), torch.cat([mask.dense()] * 2, -1))


# What is not an astrocyte in a patched model


class Foreign(nn.Module):
    """An attention layer that transformers knows nothing of: as `BertSelfAttention`, or as `GPT2Attention`."""

    def __init__(self, original: nn.Module, by_hand: bool) -> None:
        super().__init__()
        self.original = original
        self.by_hand = by_hand

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        given = [each for each in (*args, *kwargs.values()) if isinstance(each, (Tensor, KeyMask)) and each.dim() == 4]
        mask = given[0] if given else None
        if hasattr(self.original, "c_attn"):
            parts = self.original.c_attn(x).chunk(3, dim=-1)
        else:
            parts = tuple(layer(x) for layer in (self.original.query, self.original.key, self.original.value))
        query, key, value = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in parts)
        if not self.by_hand:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:
            mask = mask[:, :, :, : key.shape[2]]  # as older models do
            logits = query @ key.mT * 8**-0.5
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
            out = logits.softmax(-1) @ value
        out = out.transpose(1, 2).flatten(2)
        return (self.original.c_proj(out) if hasattr(self.original, "c_proj") else out), None


def padded(rows: int = 2, count: int = 60) -> dict[str, Tensor]:
    ids = torch.randint(5, 90, (rows, count), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, 50:] = 0
    mask[1, 37:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def last_layer(model: nn.Module) -> tuple[nn.Module, str]:
    """Where the last attention module of a model hangs."""
    if hasattr(model, "h"):
        return model.h[1], "attn"
    return model.encoder.layer[1].attention, "self"


def make(name: str, host: str) -> nn.Module:
    model = build(ALL[name])
    model = getattr(model, "transformer", model)
    model.set_attn_implementation(host)
    if name == "gpt2":
        model.config.use_cache = False
    return model


def real(output: Any, inputs: dict[str, Tensor]) -> Tensor:
    return output[0][inputs["attention_mask"].bool()]


@pytest.mark.parametrize("host", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("kind", ["copy", "the same config", "sdpa", "by hand"])
def test_a_layer_put_back_is_exact(name: str, host: str, kind: str) -> None:
    """As far as the model was before it was patched; the other layer is softmax through a full near field."""
    model, inputs = make(name, host), padded()
    parent, attribute = last_layer(model)
    original = getattr(parent, attribute)
    with torch.no_grad():
        before = real(model(**inputs), inputs)
        keep = copy.deepcopy(original)  # with a copy of the config
        patch(model, FULL)
        if kind == "the same config":
            keep.config = model.config
        elif kind in ("sdpa", "by hand"):
            keep = Foreign(keep, kind == "by hand")
        setattr(parent, attribute, keep)
        after = real(model(**inputs), inputs)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


@pytest.mark.parametrize("host", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_layer_put_back_is_exact_in_a_graph(name: str, host: str) -> None:
    model, inputs = make(name, host), padded()
    parent, attribute = last_layer(model)
    keep = copy.deepcopy(getattr(parent, attribute))
    with torch.no_grad():
        before = real(model(**inputs), inputs)
        patch(model, FULL)
        setattr(parent, attribute, keep)
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        after = real(compiled(**inputs), inputs)
        exported = torch.export.export(model, (), inputs, strict=False).module()
        torch.testing.assert_close(real(exported(**inputs), inputs), after)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


@pytest.mark.parametrize("host", ["sdpa", "eager"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_key_mask_is_the_hosts_own_mask_for_everything_else(host: str, causal: bool) -> None:
    from transformers.masking_utils import (
        ALL_MASK_ATTENTION_FUNCTIONS,
        bidirectional_mask_function,
        causal_mask_function,
    )

    keys = torch.arange(6) < torch.tensor([6, 4])[:, None]
    given = {"batch_size": 2, "kv_length": 6, "attention_mask": keys}
    if (
        "cache_position" in inspect.signature(ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]).parameters
    ):  # transformers 5.0 to 5.3
        given["cache_position"] = torch.arange(2, 6)
    else:
        given |= {"q_length": 4, "q_offset": 2}
    given["mask_function"] = causal_mask_function if causal else bidirectional_mask_function
    given["allow_is_causal_skip"], given["allow_is_bidirectional_skip"] = causal, not causal
    theirs = ALL_MASK_ATTENTION_FUNCTIONS[host](**given)
    mask = attention_mask(host=host, **given)
    assert isinstance(mask, KeyMask)
    assert torch.equal(mask.dense(), theirs)
    assert mask.shape == theirs.shape
    assert mask.dtype == theirs.dtype
    assert torch.equal(mask[:, :, -1:], theirs[:, :, -1:])
    assert torch.equal(torch.zeros(2, 3, 4, 6) + mask, torch.zeros(2, 3, 4, 6) + theirs)
    assert torch.equal(mask == 0, theirs == 0)
    assert isinstance(mask.to("cpu", non_blocking=True), KeyMask)  # accelerate moves it so
    assert torch.equal(mask.to(torch.float64), theirs.to(torch.float64))
    assert torch.equal(copy.deepcopy(mask).dense(), theirs)
    if host == "sdpa":
        assert torch.equal(~mask, ~theirs)


TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "intermediate_size": 64, "vocab_size": 99}  # fmt: skip


@pytest.mark.parametrize("host", ["sdpa", "eager"])
def test_a_mask_that_a_model_hands_to_the_one_inside_it(host: str) -> None:
    """PaliGemma makes the masks of its language model, which makes masks of what it is given; a dense one it takes."""
    vision = PHOTO | {"model_type": "siglip_vision_model", "projection_dim": 32}
    text = TEXT | {"model_type": "gemma"}
    config = t.PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=98, projection_dim=32)
    config._attn_implementation = host
    torch.manual_seed(0)
    model = t.PaliGemmaModel(config).eval()
    ids = torch.randint(5, 90, (2, 150), generator=torch.Generator().manual_seed(1))
    ids[:, :64] = 98  # as many image tokens as patches
    mask = torch.ones_like(ids)
    mask[1, 140:] = 0
    given = photos() | {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        expected = model(**given).last_hidden_state
        report = patch(model, FULL)
        output = model(**given).last_hidden_state
    assert sum(row.name.startswith("language_model") for row in report.patched) == 2
    real = mask.bool()
    torch.testing.assert_close(output[real], expected[real], rtol=1e-4, atol=1e-4)


def test_a_model_that_puts_out_its_attention_weights_is_refused() -> None:
    """BridgeTower does, asked or not; patched it would put out fewer tensors."""
    vision = {"hidden_size": 64, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
    config = t.BridgeTowerConfig(
        hidden_size=64, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64,
        text_config=TEXT | {"hidden_size": 64}, vision_config=vision,
    )  # fmt: skip
    model = t.BridgeTowerModel(config).eval()
    ids, pixels = torch.randint(5, 90, (1, 12)), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        if "attentions" not in model(input_ids=ids, pixel_values=pixels, pixel_mask=torch.ones(1, 32, 32)):
            pytest.skip("in this transformers only where it is asked for")
    with pytest.raises(ValueError, match="attention weights, which no astrocyte forms"):
        patch(model, FULL)
