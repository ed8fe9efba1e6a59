"""Autocast: as `scaled_dot_product_attention` does, an astrocyte takes queries, keys and values in autocast's dtype."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers as t
from core_cases import EVERY, draw, module
from patching_models import ALL, TEXT, TIMM_VIT, Tiny, build, image, of, outputs, text
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward

from astroattn import AstroConfig, AstrocyteAttention, fallbacks, patch
from astroattn.patching.interface import attention

EXACT = AstroConfig(hidden="random", near=100_000)
STATIC = AstroConfig(hidden="random", near=4)
EUROBERT = {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "mask_token_id": 3}
# Rotary embeddings and norms of the queries and keys leave them in float32, beside values in bfloat16.
MIXED = {
    "eurobert": Tiny(lambda: of(t.EuroBertModel, t.EuroBertConfig, **TEXT | EUROBERT)(), text, 2, since="5.3"),
    "llama": ALL["llama"],
    "qwen3": ALL["qwen3"],
    "dinov3": ALL["dinov3"],
    "timm eva02": ALL["timm eva02"],
    "timm dinov3": ALL["timm dinov3"],
    "timm qk norm": Tiny(
        lambda: timm.create_model("vit_tiny_patch16_224", **TIMM_VIT, qk_norm=True), lambda: {"x": image()}, 2
    ),
}
ALIKE = {name: ALL[name] for name in ("bert", "gpt2", "vit", "timm vit", "whisper encoder")}


def note_dtypes(model: nn.Module) -> list[tuple[torch.dtype, ...]]:
    """The dtypes of queries, keys, values and outputs of every call of an astrocyte from now on."""
    found: list[tuple[torch.dtype, ...]] = []
    for each in model.modules():
        if isinstance(each, AstrocyteAttention):
            each.register_forward_hook(lambda _, args, output: found.append((*(x.dtype for x in args), output.dtype)))
    return found


@pytest.mark.parametrize("host", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*MIXED, *ALIKE])
def test_models_run_as_the_original(name: str, host: str) -> None:
    tiny = (MIXED | ALIKE)[name]
    model, inputs = build(tiny), tiny.inputs()
    if host == "eager":
        if not hasattr(model, "set_attn_implementation"):
            pytest.skip("patching takes hold of the SDPA of timm")
        model.set_attn_implementation("eager")
    with torch.autocast("cpu", torch.bfloat16):
        before = outputs(model, inputs)
        patch(model, EXACT)
        dtypes = note_dtypes(model)
        after = outputs(model, inputs)
        assert dtypes == [(torch.bfloat16,) * 4] * tiny.patched
        assert fallbacks(model) == {}
        for one, other in zip(before, after, strict=True):
            assert one.dtype == other.dtype
            assert (one - other).float().norm() <= 0.03 * one.float().norm()
        patch(model, STATIC)
        assert all(each.isfinite().all() for each in outputs(model, inputs))
        assert fallbacks(model) == {}


@pytest.mark.parametrize("name", MIXED)
def test_training_under_autocast(name: str) -> None:
    tiny = MIXED[name]
    model, inputs = build(tiny), tiny.inputs()
    patch(model, STATIC)
    with torch.autocast("cpu", torch.bfloat16):
        result = model(**inputs)
        loss = (result if isinstance(result, Tensor) else result[0]).float().square().mean()
    loss.backward()
    assert fallbacks(model) == {}
    assert all(each.grad.isfinite().all() for each in model.parameters() if each.grad is not None)


@pytest.mark.parametrize("name", EVERY)
def test_the_module_casts_as_by_hand(name: str) -> None:
    config, causal = EVERY[name]
    attention, qkv = module(config), draw(2, 2, 40, 8, dtype=torch.float32)
    expected = attention(*(x.bfloat16() for x in qkv), causal=causal)
    mixed = [qkv[0], qkv[1], qkv[2].bfloat16()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for given in (qkv, mixed):
            assert torch.equal(attention(*given, causal=causal), expected)
        out, log_p = attention.with_normaliser(*qkv, causal=causal)
    assert torch.equal(out, expected)
    assert log_p.dtype == torch.float32


def test_decoding_casts_too() -> None:
    attention, qkv = AstrocyteAttention(2, 8, STATIC), draw(2, 2, 10, 8, dtype=torch.float32)
    expected, state = attention.decode(*(x.bfloat16() for x in qkv))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = attention.decode(*qkv)
        further, _ = attention.decode(*(x[:, :, -1:] for x in qkv), state)
    assert torch.equal(out, expected)
    assert further.dtype == torch.bfloat16


def test_doubles_stay_doubles() -> None:
    attention, qkv = AstrocyteAttention(2, 8, STATIC), draw(2, 2, 40, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.scaled_dot_product_attention(*qkv).dtype == torch.float64
        assert torch.equal(attention(*qkv), attention(*qkv).double())


def test_mixed_dtypes_without_autocast_are_the_hosts() -> None:
    """SDPA refuses them; the eager function of GPT-2 does not, and answers."""
    model = build(ALL["gpt2"])
    patch(model, STATIC)
    module = model.transformer.h[0].attn
    query, key, value = draw(2, 4, 20, 8, dtype=torch.float32)
    expected = eager_attention_forward(module, query, key, value.double(), None)[0]
    with pytest.warns(UserWarning, match="of different dtypes"):
        found, _ = attention(module, query, key, value.double(), host="eager")
    assert torch.equal(found, expected)
    assert [sum(reasons.values()) for reasons in fallbacks(model).values()] == [1]
