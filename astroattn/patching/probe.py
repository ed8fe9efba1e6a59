"""A short forward on made-up input, to see what the attention modules of a model are really given."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from astroattn.ops.precision import without_autocast
from astroattn.patching.site import Seen

TOKENS = 9  # of a made-up text; its second row is padded at both ends
DECODER_TOKENS = 7
FRAMES = 64  # of a made-up sound, where no model bounds them
GRIDS = ("grid_thw", "image_grid_thw")  # arguments with the sizes of images whose patches come in one row
LONGEST_WINDOW = 256  # up to which a made-up text is longer than the model's sliding window

# Largest difference to the host, relative to its largest value, that is rounding.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class NoProbe(Exception):
    """No input can be made up for this model; the message says why."""


def make_inputs(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments for a short forward of the model.

    Raises:
        NoProbe: none can be made up.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise NoProbe("the weights are on the meta device")
    with torch.device("cpu"):  # whatever the caller's default is
        inputs = _inputs(model)
    first = next((each for each in model.parameters() if each.is_floating_point()), torch.empty(0))
    return {
        key: value.to(first.device, first.dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for key, value in inputs.items()
    }


def takes_tokens(module: nn.Module) -> bool:
    """Whether it is an attention module of diffusers, which runs alone."""
    return hasattr(module, "processor") and isinstance(getattr(module, "query_dim", None), int)


def make_run(model: nn.Module) -> tuple[dict[str, Any], list[Tensor]]:
    """Made-up inputs on which the model runs, and what it makes of them; see `run`.

    Raises:
        NoProbe: no input can be made up.
        Exception: what the model raises on the inputs that suit it best.
    """
    first, *others = _variants(make_inputs(model))
    try:
        return first, run(model, first)
    except Exception:
        for inputs in others:
            with suppress(Exception):
                return inputs, run(model, inputs)
        raise


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The floating-point tensors a model makes of a mapping of keyword arguments, or of one that is none.

    It runs in eval mode, with a fixed seed, and no state changes.

    The modes that the caller is in are off: autocast, whose rounding the tolerances are not for; inference mode, in
    which a sharded model would lay out weights that can never be trained; and the default device. All of these are the
    thread's own, so that models can be patched in several at once (the stance of torch.compile, for one, is not).
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with ExitStack() as modes:
        for mode in (_eval_mode(model), torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices)):
            modes.enter_context(mode)
        modes.enter_context(without_autocast(device))
        modes.enter_context(device)
        torch.manual_seed(0)  # some models draw a mask in eval mode
        output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
        return list(_tensors(output))


def differ(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two outputs of `run` differ by more than rounding."""
    if [each.shape for each in one] != [each.shape for each in other]:
        return True
    pairs = zip(one, other, strict=True)
    return not all(
        torch.allclose(a, b, rtol=0, atol=TOLERANCES[a.dtype] * _largest(a), equal_nan=True) for a, b in pairs
    )


def verdict(calls: list[Seen]) -> str | None:
    """Why a module must stay exact after what the probe forward saw of its calls, None if it need not."""
    if not calls:
        return "the forward that checks did not call it; patch(model, inputs=batch) checks it on yours"
    for seen in calls:
        if seen.refusal is not None:
            return seen.refusal
        if seen.queries == 1:
            return "one query (attention pooling)"
        if seen.difference > TOLERANCES[seen.dtype]:
            return f"plain softmax in its place differs by {seen.difference:.1e}: it does more than we read of it"
    if len({seen.shape for seen in calls}) > 1:
        return "its calls differ in heads or head dimension"
    return None


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in training:
            module.training = False
        yield
    finally:
        for module, flag in training:
            module.training = flag


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for each in output:
            yield from _tensors(each)


def _largest(tensor: Tensor) -> float:
    return float(tensor.nan_to_num().abs().max()) if tensor.numel() else 0.0


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _inputs(model: nn.Module) -> dict[str, Any]:
    if hasattr(model, "config") and hasattr(model, "main_input_name"):
        return _transformers_inputs(model)
    if isinstance(getattr(model, "pretrained_cfg", None), dict):
        return _timm_inputs(model)
    if isinstance(model, (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)):
        return _torch_inputs(model)
    if takes_tokens(model):
        width: Any = model.query_dim
        return {"hidden_states": _noise(2, TOKENS, width)}
    raise NoProbe(f"no input can be made up for a {type(model).__name__}")


def _torch_inputs(model: nn.Module) -> dict[str, Any]:
    attention = next(module for module in model.modules() if isinstance(module, nn.MultiheadAttention))
    tokens = _noise(TOKENS, TOKENS, attention.embed_dim)  # square, whatever batch_first says
    if model is attention:
        return {"query": tokens, "key": tokens, "value": tokens, "need_weights": False}
    return {"src": tokens}


def _timm_inputs(model: nn.Module) -> dict[str, Any]:
    cfg: Any = model.pretrained_cfg
    channels, *size = cfg.get("input_size", (3, 224, 224))
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or size
    conv = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    name = next(iter(inspect.signature(model.forward).parameters))
    return {name: _noise(1, conv.in_channels if conv is not None else channels, *size)}


def _transformers_inputs(model: nn.Module) -> dict[str, Any]:
    wanted = inspect.signature(model.forward).parameters
    if "input_ids" not in wanted and any(name in wanted for name in GRIDS):
        return _packed_patches(model, wanted)
    if "input_ids" not in wanted and {"pixel_attention_mask", "spatial_shapes"} <= wanted.keys():
        return _padded_patches(model)
    inputs: dict[str, Any] = {}
    for name, make in _MAKERS.items():
        if name in wanted:
            inputs |= make(model.config)
    if "input_ids" not in inputs:  # one image will do; a text has a padded row beside a whole one
        inputs = {key: value[:1] for key, value in inputs.items()}
    if model.main_input_name not in inputs:
        raise NoProbe(f"no {model.main_input_name} can be made up for a {type(model).__name__}")
    if "attention_mask" in inputs and "attention_mask" not in wanted:
        del inputs["attention_mask"]
    return inputs


def _find(config: Any, *names: str) -> Any:
    """The first of these settings that the config or one of its sub-configs has."""
    subs = [getattr(config, key, None) for key in getattr(config, "sub_configs", {})]
    for owner in (config, *filter(None, subs)):
        for name in names:
            if (value := getattr(owner, name, None)) is not None:
                return value
    return None


def _ids(config: Any, tokens: int) -> Tensor | None:
    vocabulary = _find(config, "vocab_size")
    if not isinstance(vocabulary, int):
        return None
    special = {_find(config, f"{kind}_token_id") for kind in ("pad", "bos", "eos", "sep", "cls", "mask")}
    plain = [token for token in range(min(vocabulary, 100)) if token not in special]
    longest = _find(config, "max_position_embeddings")
    tokens = min(tokens, longest) if isinstance(longest, int) else tokens
    return torch.tensor(plain)[torch.arange(2 * tokens) % len(plain)].view(2, tokens)


def _input_ids(config: Any) -> dict[str, Any]:
    window = _find(config, "sliding_window")
    beyond = window if isinstance(window, int) and window <= LONGEST_WINDOW else 0
    ids = _ids(config, TOKENS + beyond)
    if ids is None:
        return {}
    mask = torch.ones_like(ids)
    mask[1, 0] = mask[1, -1] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _decoder_input_ids(config: Any) -> dict[str, Any]:
    ids = _ids(config, DECODER_TOKENS)
    return {} if ids is None else {"decoder_input_ids": ids}


def _pixel_values(config: Any) -> dict[str, Any]:
    size = _find(config, "image_size")
    if size is None:
        cfg = getattr(config, "pretrained_cfg", None) or {}  # TimmWrapper
        return {"pixel_values": _noise(2, *cfg["input_size"])} if "input_size" in cfg else {}
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return {"pixel_values": _noise(2, _find(config, "num_channels") or 3, height, width)}


def _variants(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The inputs, and the same laid out as other models take them."""
    found = [inputs]
    if "input_features" in inputs:
        found.append(inputs | {"input_features": inputs["input_features"].mT})
    if any(name in inputs for name in GRIDS):
        found.append({name: each.flatten(1) if each.dim() > 2 else each for name, each in inputs.items()})
    return found


def _padded_patches(model: nn.Module) -> dict[str, Any]:
    """An image as a row of patches that are vectors, all of them real."""
    first = next(each for each in model.modules() if isinstance(each, nn.Linear))
    side = 4
    mask, shapes = torch.ones(1, side**2, dtype=torch.long), torch.tensor([[side, side]])
    patches = _noise(1, side**2, first.in_features)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _packed_patches(model: nn.Module, wanted: Iterable[str]) -> dict[str, Any]:
    """Two images as the rows of patches that their first layer takes, and the sizes of the images in patches."""
    first = next(each for each in model.modules() if isinstance(each, (nn.Linear, nn.Conv2d, nn.Conv3d)))
    grids = torch.tensor([[1, 4, 4], [1, 4, 8]])
    patches = _noise(int(grids.prod(1).sum()), first.weight[0].numel())
    if isinstance(first, nn.Conv2d):
        patches = patches.unflatten(1, first.weight.shape[1:])
    inputs = {name: patches for name in ("hidden_states", "pixel_values") if name in wanted}
    inputs |= {name: grids for name in GRIDS if name in wanted}
    return inputs | ({"merge_sizes": torch.ones(2, dtype=torch.long)} if "merge_sizes" in wanted else {})


def _input_features(config: Any) -> dict[str, Any]:
    bins = _find(config, "num_mel_bins", "feature_projection_input_dim")
    positions = _find(config, "max_source_positions") or FRAMES // 2
    return {"input_features": _noise(2, bins, 2 * positions)} if bins else {}


def _input_values(config: Any) -> dict[str, Any]:
    bins, frames = _find(config, "num_mel_bins"), _find(config, "max_length")
    return {"input_values": _noise(2, frames, bins) if bins and frames else _noise(2, 4000)}


_MAKERS = {
    "input_ids": _input_ids,
    "decoder_input_ids": _decoder_input_ids,
    "pixel_values": _pixel_values,
    "input_features": _input_features,
    "input_values": _input_values,
}
