"""Whole models: one row for the original and each patched copy, at each size, batch and way to launch it.

Models are built from their configurations with random weights, which take as long as trained ones.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import astroattn
from eval.benchmark.contestants import CONFIGS, GateError
from eval.benchmark.rows import Row
from eval.benchmark.timing import Call, Effort, capture, quartiles, ratios, time_in_turns
from eval.common import relative_error

PIXELS = (224, 384, 512, 1024)
TOKENS = (512, 1024, 2048, 4096, 8192)
PATCHED = ("default", "near 64, m = 64")
MODELS = {"cpu": ("ViT-tiny/16", "MiniLM"), "cuda": ("ViT-tiny/16", "ViT-base/16", "MiniLM", "BERT-base")}
# Latency is that of one input; throughput that of as many as have so many tokens together, and at most 32.
BATCH_TOKENS = {"cpu": 4096, "cuda": 262_144}
MOST_BATCH = 32
LEAST_CALLS = 5  # in a CUDA graph
WORSE = 1.5  # how much farther from the original's output than by plain PyTorch
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


class Case(NamedTuple):
    """A model at one size of its inputs, of so many tokens."""

    model: str
    size: str
    tokens: int
    build: Callable[[], nn.Module]
    draw: Callable[[int], Tensor]


def make_cases(device: str, limit: int) -> list[Case]:
    """The cases of a kind of device, up to so many tokens."""
    cases = []
    for model in MODELS[device]:
        if model in VITS:
            sizes = [(f"{pixels} px", (pixels // 16) ** 2 + 1, pixels) for pixels in PIXELS]
            makers = partial(_build_vit, VITS[model]), _draw_images
        else:
            sizes = [(f"{tokens} tokens", tokens, tokens) for tokens in TOKENS]
            makers = partial(_build_bert, *BERTS[model]), _draw_tokens
        build, draw = makers
        cases += [
            Case(model, size, tokens, partial(build, number), partial(draw, number))
            for size, tokens, number in sizes
            if tokens <= limit
        ]
    return cases


VITS = {"ViT-tiny/16": "vit_tiny_patch16_224", "ViT-base/16": "vit_base_patch16_224"}
BERTS = {"MiniLM": (6, 384, 1536), "BERT-base": (12, 768, 3072)}  # layers, width, width of the feed-forward part


def _build_vit(name: str, pixels: int) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, img_size=pixels)
    return model


def _build_bert(layers: int, width: int, inner: int, tokens: int) -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=inner,
        max_position_embeddings=max(TOKENS),
        attn_implementation="sdpa",
    )
    return BertModel(config, add_pooling_layer=False)


def _draw_images(pixels: int, batch: int) -> Tensor:
    return torch.randn(batch, 3, pixels, pixels)


def _draw_tokens(tokens: int, batch: int) -> Tensor:
    return torch.randint(1000, 30000, (batch, tokens))


def measure_models(
    dtype: torch.dtype,
    device: torch.device,
    limit: int,
    effort: Effort,
    seed: int,
    keep: Callable[[list[Row]], None],
) -> None:
    """Gate, then time, the models of a kind of device; `keep` is given rows as soon as there are some.

    Raises:
        GateError: a patched model is farther from the original than plain PyTorch puts it.
    """
    name = str(dtype).removeprefix("torch.")
    gated = set()
    for case in tqdm(make_cases(device.type, limit), f"models, {name}", leave=False):
        torch.manual_seed(seed)
        original = case.build().to(device, dtype).eval()
        models = {"original": original}
        for config in PATCHED:
            models[config] = deepcopy(original)
            astroattn.patch(models[config], CONFIGS[config])
        same = {"part": "models", "dtype": name, "model": case.model, "size": case.size, "tokens": case.tokens}
        with torch.inference_mode():
            if case.model not in gated:  # at the smallest size
                _check(models, case.draw(1), dtype, device)
                gated.add(case.model)
            for batch in sorted({1, max(1, min(MOST_BATCH, BATCH_TOKENS[device.type] // case.tokens))}):
                rows = _time_models(models, case.draw(batch), dtype, device, effort)
                keep([same | {"batch": batch} | row for row in rows])


def _time_models(
    models: dict[str, nn.Module], inputs: Tensor, dtype: torch.dtype, device: torch.device, effort: Effort
) -> list[Row]:
    inputs = _move(inputs, dtype, device)
    calls: dict[tuple[str, str], Call] = {}
    for name, model in models.items():
        run = partial(model, inputs)
        if not _output(run()).isfinite().all():
            raise GateError(f"{name}: the output of {type(model).__name__} is not finite")
        calls[name, "eager"] = Call(run)
        if device.type == "cuda" and len(inputs) == 1:
            replay = capture(run, LEAST_CALLS, name)
            calls |= {(name, "graph"): replay} if replay else {}
    times = time_in_turns(calls, device, effort)
    rows = []
    for (name, launch), mine in times.items():
        seconds, theirs = quartiles(mine), times.get(("original", launch))
        rows.append(
            {
                "launch": launch,
                "name": name,
                "seconds": seconds,
                "times original": theirs and ratios(mine, theirs),
                "per second": len(inputs) / seconds["median"],
            }
        )
    return rows


def _check(models: dict[str, nn.Module], inputs: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """A patched model may differ from the original as far as plain PyTorch puts it, and half as much again."""
    inputs = _move(inputs, dtype, device)
    original = models["original"]
    right = _output(original(inputs))
    for name in PATCHED:
        with astroattn.patched(original, replace(CONFIGS[name], backend="torch")):
            plain = _output(original(inputs))
        error, allowed = (relative_error(x, right) for x in (_output(models[name](inputs)), plain))
        allowed = WORSE * allowed + ROUNDING[dtype]
        if not error <= allowed:
            kind = type(original).__name__
            raise GateError(f"{kind}, {name}: {error:.1e} from the original, allowed {allowed:.1e}")


def _move(inputs: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return inputs.to(device, dtype) if inputs.is_floating_point() else inputs.to(device)


def _output(result: Any) -> Tensor:
    output: Tensor = result if isinstance(result, Tensor) else result.last_hidden_state
    return output
