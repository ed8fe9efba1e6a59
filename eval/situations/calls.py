"""What a model is called with in a situation: tokens, mask and dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eval.coverage.inputs import noise
from eval.situations.drawing import Situation
from eval.situations.models import Arguments, build

TOKENS = ("input_ids", "decoder_input_ids", "src", "query", "key", "value")  # [B, N] or [B, N, C]
TORCH_MASKS = {"src": ("src_key_padding_mask", "mask"), "query": ("key_padding_mask", "attn_mask")}


class Given(NamedTuple):
    """What a model is called with, and which of its tokens [B, N] are real (None: all, or it has no mask)."""

    arguments: Arguments
    real: Tensor | None


def give(situation: Situation) -> Given:
    """The arguments of a call. A mask that the model cannot take is none."""
    arguments = dict(build(situation.model)[1])
    takes_mask = "input_ids" in arguments
    arguments.pop("attention_mask", None)
    rows = torch.arange(situation.batch) % 2
    cut: dict[int, Tensor] = {}  # what is one tensor stays one
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            part = value[:, : situation.tokens] if name in TOKENS else value
            arguments[name] = cut.setdefault(id(value), _cast(part[rows], situation.dtype))
    real = None
    first = next(iter(arguments))
    if first in TORCH_MASKS:
        real = _mask_torch(arguments, TORCH_MASKS[first], arguments[first], situation)
        if situation.model.endswith("sequence_first"):
            arguments[first] = arguments[first].transpose(0, 1).contiguous()
    elif takes_mask and situation.mask != "none":
        real = _real(situation.mask, *arguments["input_ids"].shape)
        arguments["attention_mask"] = _mask(situation, real)
    return Given(arguments, real)


def with_other_padding(situation: Situation, given: Given) -> Given | None:
    """The same call with other tokens in the place of padding, None where there is no padding."""
    name = next((each for each in ("input_ids", "src", "query") if each in given.arguments), None)
    if name is None or given.real is None or given.real.all() or situation.mask == "row":
        return None
    value = given.arguments[name]
    sequence_first = situation.model.endswith("sequence_first")
    real = given.real.T if sequence_first else given.real
    other = (
        torch.where(real[..., None], value, value + 3) if value.dim() == 3 else value.where(real, value.flatten()[0])
    )
    other = other.clone(memory_format=torch.contiguous_format)  # laid out alike, so that rounding is
    same = {key: other for key, each in given.arguments.items() if each is value}
    return Given(given.arguments | same, given.real)


def at_real_tokens(situation: Situation, given: Given, output: Tensor) -> Tensor:
    """The part of an output [B, N, ...] that padding may not touch; of others the rows whose first token is real."""
    if given.real is None:
        return output
    if situation.model.endswith("sequence_first"):
        output = output.transpose(0, 1)
    if output.shape[:2] == given.real.shape:
        return output[given.real]
    return output[given.real[:, 0]] if output.shape[:1] == given.real.shape[:1] else output


def _cast(value: Tensor, dtype: str) -> Tensor:
    kind = torch.float32 if dtype == "autocast" else getattr(torch, dtype)
    return value.to(kind) if value.is_floating_point() else value


def _real(mask: str, batch: int, tokens: int) -> Tensor:
    """[B, N], True for a real token; the last sequence is the one with padding."""
    real = torch.ones(batch, tokens, dtype=torch.bool)
    third = tokens // 3
    last = real[-1:]
    if mask == "row":
        last[:] = False
    elif mask == "left":
        last[:, :third] = False
    elif mask == "both":
        last[:, : third // 2] = last[:, tokens - third :] = False
    elif mask == "holes":
        last[:, 1::3] = False
    elif mask in ("right", "bool", "float", "bool_keys", "float_keys", "bias_padded"):
        last[:, tokens - third :] = False
    return real


def _mask(situation: Situation, real: Tensor) -> Tensor:
    """The attention mask of transformers, in one of the forms that its models take."""
    mask, (batch, tokens) = situation.mask, real.shape
    bias = noise(batch, 1, tokens, tokens)
    dense = (bias > -0.5) | torch.eye(tokens, dtype=torch.bool)
    forms = {
        "bool": real,
        "float": real.float(),
        "bool_keys": real[:, None, None],
        "float_keys": _additive(real[:, None, None], situation.dtype),
        "dense_bool": dense,
        "dense_float": _additive(dense, situation.dtype),
        "packed_bool": _packed(tokens)[None, None],
        "packed_float": _additive(_packed(tokens)[None, None], situation.dtype),
        "bias": _cast(bias, situation.dtype),
        "bias_padded": _cast(bias, situation.dtype) + _additive(real[:, None, None], situation.dtype),
    }
    return forms.get(mask, real.long())


def _packed(tokens: int) -> Tensor:
    """[N, N], True where query and key are of the same of two documents."""
    first = torch.arange(tokens) < tokens // 3
    return first[:, None] == first


def _additive(mask: Tensor, dtype: str) -> Tensor:
    zero = _cast(torch.zeros(()), dtype)
    return torch.where(mask, zero, torch.finfo(zero.dtype).min)


def _mask_torch(arguments: Arguments, names: tuple[str, str], tokens: Tensor, situation: Situation) -> Tensor | None:
    """Put a mask of torch.nn among the arguments, where True is padding, and return the real tokens."""
    mask, (batch, count) = situation.mask, tokens.shape[:2]
    real = _real(mask, batch, count)
    if mask in ("dense_bool", "dense_float", "packed_bool", "packed_float", "bias"):
        bias = noise(count, count)
        dense = (bias > -0.5) | torch.eye(count, dtype=torch.bool)
        forms = {"dense_bool": ~dense, "dense_float": _additive(dense, situation.dtype)}
        forms |= {"packed_bool": ~_packed(count), "packed_float": _additive(_packed(count), situation.dtype)}
        arguments[names[1]] = forms.get(mask, _cast(bias, situation.dtype))
        return real
    if mask == "none":
        return None
    arguments[names[0]] = _additive(real, situation.dtype) if mask.startswith("float") else ~real
    return real
