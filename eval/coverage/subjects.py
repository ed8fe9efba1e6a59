"""The models: one of every type in transformers' AutoModel mapping and of every family of timm, and those of others.

Every one is tiny and has random weights, drawn so that attention is far from uniform and no bias or scale is trivial.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import timm
import torch
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING, MODEL_MAPPING_NAMES

from astroattn.patching import probe
from astroattn.patching.survey import survey
from eval.coverage.configs import small_configs
from eval.coverage.inputs import Inputs, candidates, noise, with_placeholders

MOST_WEIGHTS = 160_000_000  # of a model
SHARP = re.compile(
    r"(^|[._])(q|k|qkv|query|key|[qkv]+_proj|wqkv|query_key_value|[qk]_lin|c_attn|in_proj_weight)\b", re.I
)

SMALL = re.compile(r"test|atto|femto|pico|nano|xxs|tiny|_xs|_s\d?(_|$)|small|26t")  # in names of small models of timm
FIRST = 6  # so many of these are built to find the smallest with attention, and of the others every fourth


class CannotRun(Exception):
    """The model cannot be built, or no input was found that it runs on; the message says why."""


@dataclass(frozen=True)
class Subject:
    """A type of model. `build` gives one, in eval mode, with inputs that it runs on, or raises `CannotRun`."""

    library: str
    type: str
    build: Callable[[], tuple[nn.Module, Inputs]]


def draw_weights(model: nn.Module) -> nn.Module:
    """Weights of unit gain, those of queries and keys of twice that; biases that are not zero; no tiny layer scale."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.is_floating_point() or weight.numel() == 0:
                continue
            if weight.dim() > 1:
                gain = 2.0 if SHARP.search(name) else 1.0
                weight.normal_(0, gain / math.sqrt(weight[0].numel()), generator=generator)
            elif re.search("gamma|lambda|layer_?scale", name):
                weight.fill_(1.0)
            elif not weight.any():
                weight.normal_(0, 0.1, generator=generator)
    return model


def _ready(build: Callable[[], nn.Module]) -> nn.Module:
    """A model in float32 and eval mode. Raises CannotRun where it would be large."""
    with torch.device("meta"):
        try:
            weights = sum(each.numel() for each in build().parameters())
        except Exception:  # not every model can be built without weights
            weights = 0
    if weights > MOST_WEIGHTS:
        raise CannotRun(f"{weights:,} weights, more than {MOST_WEIGHTS:,}")
    torch.manual_seed(0)
    return build().float().eval()


def _settle(model: nn.Module, inputs: Inputs) -> bool:
    """Draw the weights, unless the outputs are finite only with those the model starts with."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    draw_weights(model)
    if not all(each.isfinite().all() for each in probe.run(model, inputs.arguments)):
        model.load_state_dict(before)
        return all(bool(each.isfinite().all()) for each in probe.run(model, inputs.arguments))
    return True


def _transformers_model(kind: str) -> tuple[nn.Module, Inputs]:
    config_class = CONFIG_MAPPING[kind]
    cls = MODEL_MAPPING[config_class]
    cls = cls[0] if isinstance(cls, (tuple, list)) else cls
    errors: list[str] = []
    for config in small_configs(config_class):
        try:
            model = _ready(lambda config=config: cls(config))  # type: ignore[misc]
        except Exception as error:  # whatever a class raises on a config that does not suit it
            errors.append(f"not built: {describe(error)}")
            continue
        for inputs in candidates(model):
            if (runs := _run(model, inputs, errors)) is None:
                continue
            if _settle(model, runs):
                return model, runs
            errors.append("not run: NaN or infinity comes out")
    raise CannotRun(errors[0] if errors else "no input can be made up")


def _run(model: nn.Module, inputs: Inputs, errors: list[str]) -> Inputs | None:
    """The inputs, with placeholders where the model asks for them, None where it does not run on them."""
    for _ in range(2):
        try:
            if probe.run(model, inputs.arguments):
                return inputs
            errors.append("not run: no tensor comes out")
            return None
        except Exception as error:  # whatever a model raises on input that does not suit it
            errors.append(f"not run: {describe(error)}")
            filled = with_placeholders(model, inputs, error)
            if filled is None:
                return None
            inputs = filled
    return None


def _timm_model(family: str) -> tuple[nn.Module, Inputs]:
    """A small model of a module of timm, with attention where it is found in any."""
    names = sorted(timm.list_models(module=family), key=lambda name: (not SMALL.search(name), len(name), name))
    name = _smallest(names[:FIRST]) or _smallest(names[FIRST::4]) or next(iter(names), None)
    if name is None:
        raise CannotRun("it has no model")
    model = _ready(lambda: timm.create_model(name, num_classes=10))
    argument = next(iter(inspect.signature(model.forward).parameters))
    inputs = Inputs({argument: noise(1, *model.pretrained_cfg["input_size"])})
    if not _settle(model, inputs):
        raise CannotRun("NaN or infinity comes out")
    return model, inputs


def _smallest(names: list[str]) -> str | None:
    """The one of these models of timm that has attention and the fewest weights."""
    weights = {}
    for name in names:
        with torch.device("meta"):
            try:
                model = timm.create_model(name)
            except Exception:  # some cannot be built without weights
                continue
        if survey(model):
            weights[name] = sum(each.numel() for each in model.parameters())
    return min(weights, key=weights.__getitem__) if weights else None


def _torch_encoder() -> tuple[nn.Module, Inputs]:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    real = torch.ones(2, 163, dtype=torch.bool)
    real[1, 101:] = False
    return draw_weights(model), Inputs({"src": noise(2, 163, 32), "src_key_padding_mask": ~real}, real, ("src",))


def _torchvision_model(name: str) -> tuple[nn.Module, Inputs]:
    _require("torchvision")
    import torchvision

    model = _ready(lambda: torchvision.models.get_model(name, weights=None))
    return draw_weights(model), Inputs({next(iter(inspect.signature(model.forward).parameters)): noise(1, 3, 224, 224)})


def _open_clip_model() -> tuple[nn.Module, Inputs]:
    _require("open_clip")
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=2, width=64, head_width=16, patch_size=4, image_size=52)
    text = CLIPTextCfg(context_length=77, vocab_size=200, width=64, heads=4, layers=2)
    model = _ready(lambda: CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text))
    words = torch.arange(2 * 77).view(2, 77)
    return draw_weights(model), Inputs({"image": noise(2, 3, 52, 52), "text": words})


def _diffusers_model() -> tuple[nn.Module, Inputs]:
    _require("diffusers")
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "num_layers": 2}
    model = _ready(lambda: DiTTransformer2DModel(**sizes, sample_size=13, patch_size=1, num_embeds_ada_norm=100))
    steps = {"timestep": torch.tensor([1, 2]), "class_labels": torch.tensor([1, 2])}
    return draw_weights(model), Inputs({"hidden_states": noise(2, 4, 13, 13)} | steps)


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise CannotRun(f"{package} is not installed")


def subjects() -> list[Subject]:
    """All of them, library by library."""
    found = [Subject("transformers", kind, partial(_transformers_model, kind)) for kind in MODEL_MAPPING_NAMES]
    found += [Subject("timm", family, partial(_timm_model, family)) for family in timm.list_modules()]
    found += [Subject("torch", "TransformerEncoder", _torch_encoder)]
    found += [Subject("torchvision", name, partial(_torchvision_model, name)) for name in ("vit_b_32", "swin_t")]
    found += [Subject("open_clip", "CLIP", _open_clip_model), Subject("diffusers", "DiT", _diffusers_model)]
    return found


def describe(error: BaseException) -> str:
    """An error in one line, without the paths of this machine."""
    text = re.sub(r"'?/[^\s']*/site-packages/", "'", str(error).strip())
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else ''}"
