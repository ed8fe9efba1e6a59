"""Tiny models with random weights for the patching tests: every one with a few layers and several heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
import transformers as t
from packaging.version import Version
from torch import Tensor, nn

TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
IMAGE = {"image_size": 32, "patch_size": 8}
CAUSAL = TEXT | {"num_key_value_heads": 2, "max_position_embeddings": 64}


@dataclass
class Tiny:
    """How to build a model and its inputs, and how many of its attention modules become astrocytes."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    patched: int
    exact: int = 0
    reason: str = ""  # part of the reason of those that stay exact
    causal: bool = False
    padded: bool = field(default=False)
    since: str = "5.0"  # the first transformers whose class has its attention and its mask from the interfaces


def text() -> dict[str, Tensor]:
    ids = torch.randint(5, 90, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 14:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def image(size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": image()}


def audio() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(1))}


def whisper() -> nn.Module:
    config = t.WhisperConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=16,
        max_source_positions=20,
        max_target_positions=64,
        vocab_size=99,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return t.WhisperModel(config)


def clip() -> nn.Module:
    text_config = TEXT | {"max_position_embeddings": 64, "eos_token_id": 98, "bos_token_id": 97}
    return t.CLIPModel(t.CLIPConfig(text_config=text_config, vision_config=VISION | IMAGE, projection_dim=16))


def siglip() -> nn.Module:
    text_config = TEXT | {"max_position_embeddings": 64}
    return t.SiglipModel(t.SiglipConfig(text_config=text_config, vision_config=VISION | IMAGE))


def of(model: type[nn.Module], config: type, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: model(config(**settings))


def timm_model(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=10, **settings)


def timm_image(size: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"x": image((size, size))}


SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 4}
TIMM_VIT = SMALL | {"img_size": 32, "patch_size": 8}

BIDIRECTIONAL = {
    "bert": Tiny(of(t.BertModel, t.BertConfig, **TEXT), text, 2, padded=True),
    "roberta": Tiny(of(t.RobertaModel, t.RobertaConfig, **TEXT), text, 2, padded=True),
    "albert": Tiny(of(t.AlbertModel, t.AlbertConfig, **TEXT, embedding_size=16), text, 1, padded=True),
    "distilbert": Tiny(
        of(t.DistilBertModel, t.DistilBertConfig, dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=99),
        text,
        2,
        padded=True,
    ),
    "electra": Tiny(of(t.ElectraModel, t.ElectraConfig, **TEXT, embedding_size=16), text, 2, padded=True),
    "modernbert": Tiny(
        of(
            t.ModernBertModel,
            t.ModernBertConfig,
            **TEXT | {"num_hidden_layers": 4},
            global_attn_every_n_layers=2,
            local_attention=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        ),
        text,
        4,
        padded=True,
        since="5.1",
    ),
    "vit": Tiny(of(t.ViTModel, t.ViTConfig, **VISION, **IMAGE), pixels, 2),
    "deit": Tiny(of(t.DeiTModel, t.DeiTConfig, **VISION, **IMAGE), pixels, 2),
    "dinov2 with registers": Tiny(
        of(t.Dinov2WithRegistersModel, t.Dinov2WithRegistersConfig, **VISION, **IMAGE, num_register_tokens=4), pixels, 2
    ),
    "dinov3": Tiny(of(t.DINOv3ViTModel, t.DINOv3ViTConfig, **VISION, **IMAGE, num_register_tokens=4), pixels, 2),
    "siglip": Tiny(siglip, lambda: text() | pixels(), 4, 1, "one query", padded=True, since="5.2"),
}

CAUSAL_MODELS = {
    "gpt2": Tiny(
        of(t.GPT2LMHeadModel, t.GPT2Config, n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=99),
        text,
        2,
        causal=True,
        padded=True,
    ),
    "llama": Tiny(of(t.LlamaForCausalLM, t.LlamaConfig, **CAUSAL), text, 2, causal=True, padded=True),
    "qwen3": Tiny(of(t.Qwen3ForCausalLM, t.Qwen3Config, **CAUSAL, head_dim=8), text, 2, causal=True, padded=True),
}

MIXED = {  # bidirectional and causal attention in one model
    "clip": Tiny(clip, lambda: text() | pixels(), 4, causal=True, padded=True),
    "whisper": Tiny(
        whisper, lambda: audio() | {"decoder_input_ids": text()["input_ids"]}, 4, 2, "cross attention", causal=True
    ),
    "whisper encoder": Tiny(lambda: whisper().encoder, audio, 2),
}


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    model: nn.Module = t.T5Model(t.T5Config(**sizes, vocab_size=99, decoder_start_token_id=0))
    return model


TIMM = {
    "timm vit": Tiny(timm_model("vit_tiny_patch16_224", **TIMM_VIT), timm_image(32), 2),
    "timm deit": Tiny(timm_model("deit_tiny_distilled_patch16_224", **TIMM_VIT), timm_image(32), 2),
    "timm eva02": Tiny(timm_model("eva02_tiny_patch14_224", **SMALL, img_size=56), timm_image(56), 2),
    "timm dinov2 with registers": Tiny(
        timm_model("vit_small_patch14_reg4_dinov2", **SMALL, img_size=56), timm_image(56), 2
    ),
    "timm dinov3": Tiny(timm_model("vit_small_patch16_dinov3", **SMALL, img_size=64), timm_image(64), 2),
    "timm siglip": Tiny(
        timm_model("vit_base_patch16_siglip_224", **TIMM_VIT), timm_image(32), 2, 1, "one query (attention pooling)"
    ),
}

BIASED = {  # a bias for every query and key: of relative positions, learned, in a table or as products
    "t5 encoder": Tiny(lambda: t5().encoder, text, 2, padded=True),
    "t5": Tiny(t5, lambda: text() | {"decoder_input_ids": text()["input_ids"]}, 2, 4, "attention", since="5.20"),
    "mpnet": Tiny(of(t.MPNetModel, t.MPNetConfig, **TEXT), text, 2, padded=True),
    "deberta-v2": Tiny(
        of(t.DebertaV2Model, t.DebertaV2Config, **TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"]),
        text,
        2,
        padded=True,
    ),
    "layoutlmv3": Tiny(
        of(t.LayoutLMv3Model, t.LayoutLMv3Config, **TEXT, visual_embed=False, coordinate_size=6, shape_size=4),
        text,
        2,
        padded=True,
        since="5.9",
    ),
    "beit": Tiny(
        of(t.BeitModel, t.BeitConfig, **VISION, **IMAGE, use_relative_position_bias=True), pixels, 2, since="5.9"
    ),
    "timm beit": Tiny(timm_model("beit_base_patch16_224", **TIMM_VIT), timm_image(32), 2),
    "timm relpos": Tiny(timm_model("vit_relpos_small_patch16_224", **TIMM_VIT), timm_image(32), 2),
    "timm sam": Tiny(
        timm_model("samvit_base_patch16", **TIMM_VIT, global_attn_indexes=(0, 1), neck_chans=0), timm_image(32), 2
    ),
}

LEFT_EXACT = {  # nothing an astrocyte represents: patching raises, with the reason
    "timm swin": Tiny(
        timm_model("swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1), num_heads=(2, 4), img_size=56),
        timm_image(56),
        0,
        2,
        "within small windows",
    ),
    "timm swinv2": Tiny(
        timm_model("swinv2_tiny_window8_256", embed_dim=24, depths=(1, 1), num_heads=(2, 4), img_size=64),
        timm_image(64),
        0,
        2,
        "within small windows",
    ),
    "t5 decoder": Tiny(lambda: t5().decoder, text, 0, 2, "in causal attention", since="5.20"),
    "bloom": Tiny(
        of(t.BloomModel, t.BloomConfig, hidden_size=32, n_layer=2, n_head=4, vocab_size=99),
        text,
        0,
        2,
        "in causal attention",
    ),
}

PATCHED = BIDIRECTIONAL | CAUSAL_MODELS | MIXED | TIMM
ALL = PATCHED | BIASED | LEFT_EXACT


def need_transformers(version: str) -> None:
    """Skip the test where an older transformers is installed, whose model has an attention of its own."""
    if Version(t.__version__) < Version(version):
        pytest.skip(f"this model uses the attention and mask interfaces from transformers {version} on")


def build(tiny: Tiny) -> nn.Module:
    """The model in eval mode, with weights large enough for attention to be far from uniform."""
    need_transformers(tiny.since)
    torch.manual_seed(0)
    model = tiny.build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
            elif "gamma" in name or "lambda" in name:  # layer scale
                parameter.fill_(1.0)
            if "rel_pos" in name or "relative_position_bias_table" in name:  # zero before they are trained
                parameter.normal_(std=0.3)
    return model


def outputs(model: nn.Module, inputs: dict[str, Any], real_only: bool = True) -> list[Tensor]:
    """The floating-point tensors a model puts out; those over tokens at real tokens only."""
    with torch.no_grad():
        result = model(**inputs)
    if isinstance(result, Tensor):
        return [result]
    mask = inputs.get("attention_mask") if real_only else None
    tensors = [value for value in result.values() if isinstance(value, Tensor) and value.is_floating_point()]
    if mask is None:
        return tensors
    return [each[mask.bool()] if each.shape[:2] == mask.shape else each for each in tensors]
