"""transformers: what our mask function makes of a mask, and how to make of it what the host would have been given.

Import this module only where transformers is installed. A plain padding mask reaches the attention modules as keys
only, never as N x N:

    None                  nothing is padded; under "sdpa" the module's own `is_causal` decides, as it does for SDPA
    bool  [B, 1, 1, K]    the keys that are real tokens; complete, as every bool mask is for SDPA
    uint8 [B, 1, 1, K]    the same under a causal mask aligned bottom-right, which is still to be added

Everything else (sliding windows, packed sequences, static caches, masks of the user) is the host's own mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function, causal_mask_function
from transformers.utils import is_tracing

CAUSAL = torch.uint8  # the dtype that marks a mask of keys as causal


def attention_mask(
    *,
    host: str,
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function that transformers calls in place of the host's; see its AttentionMaskInterface."""
    q_length, q_offset, device = _queries(kwargs, kv_length)
    causal = mask_function is causal_mask_function and allow_is_causal_skip
    plain = causal or (mask_function is bidirectional_mask_function and allow_is_bidirectional_skip)
    whole = isinstance(q_offset, int) and kv_offset == 0 and (not causal or q_offset + q_length == kv_length)
    fits = attention_mask is None or (attention_mask.dim() == 2 and attention_mask.shape[-1] == kv_length)
    if not (plain and whole and fits):
        mask: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[host](
            batch_size=batch_size,
            kv_length=kv_length,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            **kwargs,
        )
        return mask
    if attention_mask is not None and not is_tracing(attention_mask) and bool(attention_mask.all()):
        attention_mask = None
    if attention_mask is None:
        if not causal or (host == "sdpa" and q_length in (1, kv_length)):
            return None
        attention_mask = torch.ones(batch_size, kv_length, device=device)
    return attention_mask[:, None, None, :].to(CAUSAL if causal else torch.bool)


def _queries(given: dict[str, Any], kv_length: int) -> tuple[int, int | Tensor, torch.device | str]:
    """Number of queries, position of the first (a tensor where it cannot be read) and device, from what was given.

    transformers gives `q_length`, `q_offset` and `device` from 5.4 on; 5.0 to 5.3 give the positions as the tensor
    `cache_position`.
    """
    positions = given.get("cache_position")
    if positions is None:
        return given["q_length"], given.get("q_offset", 0), given.get("device", "cpu")
    q_length = positions.shape[0]
    if q_length == kv_length:
        return q_length, 0, positions.device  # nothing is cached
    first = positions[0]
    return q_length, first if is_tracing(first) else int(first), positions.device


def host_mask(mask: Tensor | None, query: Tensor, key: Tensor, host: str) -> Tensor | None:
    """The mask that the host would have been given for these queries and keys, from a mask as above."""
    if mask is None or mask.is_floating_point():
        return mask
    queries, keys = query.shape[2], key.shape[2]
    if mask.dtype == CAUSAL:
        causal = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        mask = causal & mask.bool()
    if mask.dim() == 4:
        mask = mask.expand(query.shape[0], -1, queries, -1)
    if host == "eager":
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        return torch.where(mask, zero, torch.finfo(query.dtype).min)
    return mask
