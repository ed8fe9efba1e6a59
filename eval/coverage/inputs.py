"""Inputs for a model of transformers, whatever the type: made up from the names of its arguments and its config.

A batch of two. Where a model takes an attention mask, the second sequence is padded, a text at both ends. Lengths are
odd, and long enough for the default config of astroattn not to be softmax.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from astroattn.patching import probe

TOKENS = 163
DECODER_TOKENS = 37
SIDE = 14  # patches of an image that comes as a row of patches
SAMPLES = 52_401  # of a waveform: 163 frames of 320
MISMATCH = re.compile(r"(image|video|audio|multimodal) features and.*?features:?\s*(\d+)", re.IGNORECASE | re.DOTALL)

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Inputs:
    """What a model is called with.

    Attributes:
        arguments: by keyword.
        real: [2, N] bool, True for a real token; None where nothing is padded.
        padded: the arguments [2, N, ...] that hold the padding.
    """

    arguments: Arguments
    real: Tensor | None = None
    padded: tuple[str, ...] = ()

    def with_other_padding(self) -> Inputs:
        """The same with other tokens where the padding is."""
        assert self.real is not None
        changed = {}
        for name in self.padded:
            value = self.arguments[name]
            real = self.real.view(*self.real.shape, *[1] * (value.dim() - 2))
            changed[name] = torch.where(real, value, value + 3 if value.is_floating_point() else value[0, -2])
        return replace(self, arguments=self.arguments | changed)


def noise(*shape: int) -> Tensor:
    """Normal numbers, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def candidates(model: nn.Module) -> Iterator[Inputs]:
    """Inputs that the model may run on, the one that reaches most of it first."""
    config, parameters = model.config, inspect.signature(model.forward).parameters
    names = set(parameters)
    media = [part for name, make in MEDIA.items() if name in names for part in make(config, names)]
    needed = {name for name, each in parameters.items() if each.default is inspect.Parameter.empty}
    rest = {name: make(config) for name, make in OTHERS.items() if name in needed}
    rest |= {name: make(config) for name, make in WELCOME.items() if name in names}
    if "input_ids" in names:
        text = _text(config, names)
        for part in media:
            yield replace(text, arguments=rest | text.arguments | part)
        yield replace(text, arguments=rest | text.arguments)
    for part in media:
        yield _padded(rest | part, names)
    try:
        yield Inputs(probe.make_inputs(model))
    except probe.NoProbe:
        return


def with_placeholders(model: nn.Module, inputs: Inputs, error: Exception) -> Inputs | None:
    """The text with as many tokens for images or sounds as the model says that it needs, None if it says nothing."""
    match = MISMATCH.search(str(error))
    if match is None or "input_ids" not in inputs.arguments:
        return None
    kind, features = match[1].lower(), int(match[2])
    found = [find(model.config, f"{each}_token_{part}") for each in (kind, "image") for part in ("id", "index")]
    token = next((each for each in found if isinstance(each, int)), None)
    if token is None:
        return None
    ids = inputs.arguments["input_ids"].clone()
    ids = torch.cat([ids[:, :4], ids.new_full((2, -(-features // 2)), token), ids[:, 4:]], 1)
    real = torch.ones_like(ids, dtype=torch.bool)
    real[1, -60:] = False
    given = {name: real.long() for name in ("attention_mask",) if name in inputs.arguments}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        given["mm_token_type_ids"] = (ids == token).long()
    return replace(inputs, arguments=inputs.arguments | {"input_ids": ids} | given, real=real)


def find(config: Any, *names: str) -> Any:
    """The first of these settings that the config, or a config in it, has."""
    parts = [getattr(config, key, None) for key in getattr(config, "sub_configs", {})]
    for name in names:
        if isinstance(config, dict):
            return None
        if (value := getattr(config, name, None)) is not None:
            return value
    return next((value for part in parts if part is not None and (value := find(part, *names)) is not None), None)


def _ids(config: Any, tokens: int) -> Tensor:
    vocabulary = find(config, "vocab_size", "text_vocab_size") or 100
    special = {value for key, value in _settings(config) if re.search(r"token_(id|index)$|_index$", key)}
    plain = [token for token in range(min(vocabulary, 2000)) if token not in special]
    order = torch.randint(len(plain), (2, tokens), generator=torch.Generator().manual_seed(1))
    return torch.tensor(plain)[order]


def _settings(config: Any) -> Iterator[tuple[str, Any]]:
    for key, value in vars(config).items():
        if isinstance(value, int):
            yield key, value
    for key in getattr(config, "sub_configs", {}):
        if hasattr(part := getattr(config, key, None), "to_dict"):
            yield from _settings(part)


def _text(config: Any, names: set[str]) -> Inputs:
    longest = find(config, "max_position_embeddings")
    bounded = isinstance(longest, int) and longest > 3  # -1 means that there is no bound
    ids = _ids(config, min(TOKENS, longest - 3) if bounded else TOKENS)
    real = torch.ones_like(ids, dtype=torch.bool)
    if "attention_mask" in names:
        real[1, :3] = real[1, -60:] = False
    end, padding = find(config, "eos_token_id"), find(config, "pad_token_id")
    if isinstance(end, int) and 0 <= end < (find(config, "vocab_size", "text_vocab_size") or 0) and end != padding:
        for row in (0, 1):
            ids[row, real[row].nonzero()[-1, 0]] = end  # where some models pool
    if "attention_mask" not in names:
        return Inputs({"input_ids": ids})
    return Inputs({"input_ids": ids, "attention_mask": real.long()}, real, ("input_ids",))


def _padded(arguments: Arguments, names: set[str]) -> Inputs:
    """Padding at the end of the second sequence, for sounds and series; an image has none."""
    for name, value in arguments.items():
        mask = next((each for each in ("attention_mask", "padding_mask", f"{name}_mask") if each in names), None)
        if name in ("input_features", "input_values") and mask:
            time = max(range(1, value.dim()), key=lambda axis: value.shape[axis])
            real = torch.ones(2, value.shape[time], dtype=torch.bool)
            real[1, int(0.6 * value.shape[time]) :] = False
            padded = (name,) if time == 1 else ()
            return Inputs(arguments | {mask: real.long()}, real if padded else None, padded)
    return Inputs(arguments)


def _side(config: Any) -> tuple[int, int]:
    size = find(config, "image_size", "img_size", "input_size") or 224
    height, *width = size if isinstance(size, (list, tuple)) else [size]
    return height, width[-1] if width else height


def _images(config: Any, names: set[str]) -> Iterator[Arguments]:
    channels = find(config, "num_channels", "in_channels", "in_chans") or 3
    height, width = _side(config)
    frames = find(config, "num_frames", "frames_per_clip")
    patch = find(config, "patch_size") or 4
    patch = patch[-1] if isinstance(patch, (list, tuple)) else patch
    flat = channels * patch**2
    extra: Arguments = {}
    if "image_sizes" in names:
        extra["image_sizes"] = torch.tensor([[height, width]] * 2)
    for name in [each for each in ("image_grid_thw", "grid_thw") if each in names]:
        more: Arguments = {name: torch.tensor([[1, SIDE, SIDE]] * 2)}
        if "merge_sizes" in names:
            more["merge_sizes"] = torch.ones(2, dtype=torch.long)
        temporal = find(config, "temporal_patch_size") or 1
        for size in dict.fromkeys((flat * temporal, flat, 2 * flat)):
            yield {"pixel_values": noise(2 * SIDE**2, size)} | more
        yield {"pixel_values": noise(2 * SIDE**2, channels, patch, patch)} | more
    if frames:
        yield {"pixel_values": noise(2, frames, channels, height, width)} | extra
    if {"pixel_attention_mask", "spatial_shapes"} <= names:
        mask = torch.ones(2, SIDE**2, dtype=torch.long)
        shapes = torch.tensor([[SIDE, SIDE]] * 2)
        yield {"pixel_values": noise(2, SIDE**2, flat), "pixel_attention_mask": mask, "spatial_shapes": shapes}
    if "pixel_position_ids" in names or "image_position_ids" in names:
        name = "pixel_position_ids" if "pixel_position_ids" in names else "image_position_ids"
        where = torch.cartesian_prod(torch.arange(12), torch.arange(12)).expand(2, -1, -1)
        yield {"pixel_values": noise(2, 144, flat), name: where}
    for side in dict.fromkeys(((height, width), (224, 224))):
        yield from ({"pixel_values": noise(2, channels, *side)} | more for more in ([extra, {}] if extra else [{}]))
    yield {"pixel_values": noise(2, 1, channels, height, width)} | extra


def _patches(config: Any, names: set[str]) -> Iterator[Arguments]:
    """A vision tower that is given its patches."""
    if "grid_thw" not in names:
        yield {"hidden_states": noise(2, TOKENS, find(config, "hidden_size", "d_model") or 64)}
        return
    for part in _images(config, names):
        if "grid_thw" in part:
            yield {"hidden_states": part["pixel_values"], "grid_thw": part["grid_thw"]}


def _videos(config: Any, names: set[str]) -> Iterator[Arguments]:
    if "pixel_values" in names:
        return
    height, width = _side(config)
    for frames in dict.fromkeys((find(config, "num_frames", "frames_per_clip") or 4, 4)):
        yield {"pixel_values_videos": noise(2, frames, 3, height, width)}


def _features(config: Any, names: set[str]) -> Iterator[Arguments]:
    bins = find(config, "num_mel_bins", "feature_projection_input_dim", "input_feat_size", "feature_size", "input_dim")
    frames = find(config, "max_source_positions")
    length = 2 * frames if isinstance(frames, int) else 4 * TOKENS
    for size in dict.fromkeys(each for each in (bins, find(config, "hidden_size"), 80, 128, 160, 320) if each):
        yield {"input_features": noise(2, size, length)}
        yield {"input_features": noise(2, length, size)}
        yield {"input_features": noise(2, 1, length, size)}


def _values(config: Any, names: set[str]) -> Iterator[Arguments]:
    bins, frames = find(config, "num_mel_bins"), find(config, "max_length")
    if bins and frames:
        yield {"input_values": noise(2, frames, bins)}
    yield {"input_values": noise(2, SAMPLES)}
    yield {"input_values": noise(2, 1, SAMPLES)}


def _series(config: Any, names: set[str]) -> Iterator[Arguments]:
    length = find(config, "context_length") or TOKENS
    lags = max(find(config, "lags_sequence") or [0])
    size = find(config, "num_input_channels") or 1
    values = noise(2, length + lags, size)
    if "past_observed_mask" in names and "past_time_features" in names:
        features = find(config, "num_time_features") or 0
        ahead = find(config, "prediction_length") or 1
        yield {
            "past_values": values[..., 0] if size == 1 else values,
            "past_time_features": noise(2, length + lags, features),
            "past_observed_mask": torch.ones(2, length + lags),
            "future_values": noise(2, ahead),
            "future_time_features": noise(2, ahead, features),
        }
    yield {"past_values": values}
    if "past_values_padding" in names:
        yield {
            "past_values": values[..., 0],
            "past_values_padding": torch.zeros(2, length),
            "freq": torch.zeros(2, 1, dtype=torch.long),
        }


# Arguments, and how each may look. Every model is tried with these in turn.
MEDIA: dict[str, Callable[[Any, set[str]], Iterator[Arguments]]] = {
    "pixel_values": _images,
    "pixel_values_videos": _videos,
    "hidden_states": _patches,
    "input_features": _features,
    "input_values": _values,
    "past_values": _series,
}
WELCOME: dict[str, Callable[[Any], Tensor]] = {  # given where the model takes them
    "decoder_input_ids": lambda config: _ids(config, DECODER_TOKENS),
    "bbox": lambda config: torch.zeros(2, TOKENS, 4, dtype=torch.long),
}
OTHERS: dict[str, Callable[[Any], Tensor]] = {  # given where the model needs them
    "qformer_input_ids": lambda config: _ids(config, DECODER_TOKENS),
    "query_embeds": lambda config: noise(2, 8, find(config, "hidden_size")),
    "inputs_embeds": lambda config: noise(2, TOKENS, find(config, "hidden_size", "d_model")),
}
