"""The models of the situations, and what they are called with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import timm
import torch
from torch import nn

from eval.coverage.inputs import noise
from eval.coverage.subjects import draw_weights, subjects

Arguments = dict[str, Any]
TYPES = (
    "bert",
    "roberta",
    "albert",
    "distilbert",
    "electra",
    "modernbert",
    "esm",
    "gpt2",
    "llama",
    "qwen3",
    "mistral",
    "gpt_neox",
    "opt",
    "vit",
    "dinov2",
    "dinov3_vit",
    "clip",
    "siglip",
    "whisper",
    "bart",
    "t5",
    "mpnet",
    "deberta-v2",
)
CAUSAL = ("gpt2", "llama", "qwen3", "mistral", "gpt_neox", "opt")
TINY = {"embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 10}


def _of_transformers(kind: str) -> tuple[nn.Module, Arguments]:
    subject = next(each for each in subjects() if (each.library, each.type) == ("transformers", kind))
    model, inputs = subject.build()
    return model, inputs.arguments


def _of_timm(name: str, size: int, patch_size: int) -> tuple[nn.Module, Arguments]:
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=size, patch_size=patch_size, **TINY).eval()
    return draw_weights(model), {"x": noise(2, 3, size, size)}


def _of_torch(batch_first: bool) -> tuple[nn.Module, Arguments]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first).eval()
    return draw_weights(model), {"src": noise(2, 163, 32)}


def _attention() -> tuple[nn.Module, Arguments]:
    torch.manual_seed(0)
    tokens = noise(2, 163, 32)
    model = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    return draw_weights(model), {"query": tokens, "key": tokens, "value": tokens, "need_weights": False}


MODELS: dict[str, Callable[[], tuple[nn.Module, Arguments]]] = {
    **{kind: partial(_of_transformers, kind) for kind in TYPES},
    "timm_vit": partial(_of_timm, "vit_tiny_patch16_224", 52, 4),
    "timm_beit": partial(_of_timm, "beit_base_patch16_224", 52, 4),
    "timm_eva02": partial(_of_timm, "eva02_tiny_patch14_224", 52, 4),
    "torch_encoder": partial(_of_torch, True),
    "torch_encoder_sequence_first": partial(_of_torch, False),
    "torch_attention": _attention,
}


@cache
def build(name: str) -> tuple[nn.Module, Arguments]:
    """A model in eval mode, with a batch of two of the greatest length. Not to be changed: copies of it are."""
    return MODELS[name]()
