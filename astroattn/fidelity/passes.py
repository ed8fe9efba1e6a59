"""One pass of a model over one batch: what goes in and what comes out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from astroattn.models import FRAME_MASK, SPEECH_INPUTS


class Outputs(NamedTuple):
    """What a model gave for a batch; `None` where it has no such output."""

    logits: Tensor | None  # [B, C], or [B, N, C] with one prediction per token
    hidden: Tensor | None  # [B, N, D], the last hidden state
    pooled: Tensor | None  # [B, D], by the model's own pooling


def to_model(model: nn.Module, inputs: Any) -> Any:
    """The inputs on the device of the model, floating point ones in its dtype."""
    weight = next(model.parameters())

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(weight.device, weight.dtype if value.is_floating_point() else value.dtype)

    if isinstance(inputs, Mapping):
        return {name: move(value) for name, value in inputs.items()}
    if isinstance(inputs, Tensor):
        return move(inputs)
    raise TypeError(f"batches: each must be a tensor or a mapping of keyword inputs, got {type(inputs).__name__}")


def count_items(inputs: Any) -> int:
    """The number of rows of a batch."""
    tensors = [v for v in (inputs.values() if isinstance(inputs, Mapping) else [inputs]) if isinstance(v, Tensor)]
    if not tensors or not tensors[0].shape or not tensors[0].shape[0]:
        raise ValueError("batches: a batch without rows")
    return tensors[0].shape[0]


def take(batch: Any, rows: Sequence[int]) -> Any:
    """These items of a batch."""
    if isinstance(batch, Tensor):
        return batch[list(rows)]
    count = count_items(batch)

    def pick(value: Any) -> Any:
        return value[list(rows)] if isinstance(value, Tensor) and value.shape[:1] == (count,) else value

    return {name: pick(value) for name, value in batch.items()} if isinstance(batch, Mapping) else batch


def to_patch(model: nn.Module, batch: Any) -> Any:
    """The first item of a batch, for `patch`; None of recordings, of which only the encoder runs."""
    inputs = to_model(model, batch)
    count_items(inputs)  # there is a first one
    inputs = take(inputs, [0])
    if find_speech_encoder(model) is not None:
        return None
    return {name: x for name, x in inputs.items() if name != FRAME_MASK} if isinstance(inputs, Mapping) else inputs


def token_mask(inputs: Any) -> Tensor | None:
    """Bool [B, N], True for a real token; None where the batch has no padding mask, or one of recordings.

    The mask of a recording counts the steps of the input, not the frames that attention sees; see `frame_mask`.
    """
    if isinstance(inputs, Mapping) and not is_speech(inputs):
        real, padding = inputs.get("attention_mask"), inputs.get("src_key_padding_mask")
        if isinstance(real, Tensor):
            return real.bool()
        if isinstance(padding, Tensor):
            return ~padding.bool()
    return None


def is_speech(inputs: Any) -> bool:
    """Whether a batch holds recordings, as features or samples."""
    return isinstance(inputs, Mapping) and any(name in inputs for name in SPEECH_INPUTS)


def frame_mask(inputs: Mapping[str, Any], name: str, frames: int) -> Tensor | None:
    """A mask of a batch of recordings, over the frames [B, N] of the hidden states; None where the batch has none.

    A frame is real if its share of the input begins before the recording ends.
    """
    mask = inputs.get(name)
    if not isinstance(mask, Tensor):
        return None
    ends = mask.sum(1, keepdim=True) * frames / mask.shape[1]
    return torch.arange(frames, device=mask.device) < ends


def find_speech_encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of a model that turns speech into text; None for any other model."""
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", None) in SPEECH_INPUTS and getattr(config, "is_encoder_decoder", False):
        encoder: nn.Module = model.get_encoder()  # type: ignore[operator]
        return encoder
    return None


def call(model: nn.Module, inputs: Any) -> Any:
    """Run the model; a decoder without a cache, which nobody reads and which its attention would answer through."""
    takes_cache = "use_cache" in inspect.signature(model.forward).parameters
    options = {"use_cache": False} if takes_cache else {}
    if not isinstance(inputs, Mapping):
        return model(inputs, **options)
    return model(**options | {name: value for name, value in inputs.items() if name != FRAME_MASK})


def forward(model: Any, inputs: Any) -> Outputs:
    """Run the model as its users do and keep what it computed on the way to its result.

    timm models run as `forward_head(forward_features(x))`, which is their `forward`. Models of transformers run as they
    are; below a task head the output of the base model is kept. Of a model that turns speech into text only the encoder
    runs. Any other module may return logits [B, C] or hidden states [B, N, D].
    """
    model = find_speech_encoder(model) or model
    if hasattr(model, "forward_features") and hasattr(model, "forward_head"):
        features = model.forward_features(inputs)
        logits = model.forward_head(features)
        return Outputs(logits if getattr(model, "num_classes", 0) else None, features, None)
    inner: list[Any] = []
    base = getattr(model, "base_model", model)
    handle = None
    if isinstance(base, nn.Module) and base is not model:
        handle = base.register_forward_hook(lambda module, args, output: inner.append(output))
    try:
        output = call(model, inputs)
    finally:
        if handle is not None:
            handle.remove()
    if isinstance(output, Tensor):
        return Outputs(output, None, None) if output.ndim == 2 else Outputs(None, output, None)
    source = inner[-1] if inner else output
    return Outputs(
        getattr(output, "logits", None),
        getattr(source, "last_hidden_state", None),
        getattr(source, "pooler_output", None),
    )


def pool(model: Any, outputs: Outputs, mask: Tensor | None, pooling: str) -> Tensor | None:
    """The embedding [B, D] of every item, in float32.

    `mean`: the mean of the last hidden state over real tokens; `cls`: its first token; `model`: the model's own pooling
    (timm's `pre_logits`, the `pooler_output` of transformers). `auto` is `mean` for token batches and `model` for
    others, or `cls` where the model has no pooling of its own.
    """
    hidden = outputs.hidden
    is_timm = hasattr(model, "forward_head")
    if pooling == "auto":
        pooling = "mean" if mask is not None else "model" if is_timm or outputs.pooled is not None else "cls"
    if pooling == "model" and is_timm:
        embedding: Tensor = model.forward_head(hidden, pre_logits=True)
        return embedding.float()
    if pooling == "model":
        if outputs.pooled is None:
            raise ValueError(
                "pooling: 'model' was asked for, but the model has no pooling of its own; use 'mean' or 'cls'"
            )
        return outputs.pooled.float()
    if hidden is None:
        return None
    if hidden.ndim != 3:
        raise ValueError(f"pooling: {pooling!r} needs hidden states [B, N, D], the model gives {tuple(hidden.shape)}")
    if pooling == "cls":
        return hidden[:, 0].float()
    if mask is None:
        return hidden.float().mean(1)
    # a select, as a product would spread NaN from padding
    return hidden.float().masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True)


def predictions(logits: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Logits, or hidden states, as [predictions, C]: the items, or the real tokens where there are [B, N, C]."""
    if logits is None or logits.ndim == 2:
        return logits
    return logits.flatten(0, 1) if mask is None else logits[mask]
