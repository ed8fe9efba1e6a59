"""transformers: a mask over keys that stands for the host's own, dense one until something needs that.

Import this module only where transformers is installed. A plain padding mask travels through a patched model as a
`KeyMask`, never as N x N, with or without the causal mask beside it. Whatever is not an astrocyte (a module that was
put in after patching, a model's own code) gets from it what the host would have been given. So does a sliding window,
alone or beside either, and so do packed documents, whose mask the host makes all the same. Everything else (static
caches, masks of the user) is the host's own mask from the start.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.utils import is_tracing

from astroattn.patching.dense_masks import read_blocks, visible


class KeyMask:
    """The real keys [B, Nk] of `queries` tokens, the last ones; `causal`: a query sees no later key either.

    `window`, where it is not None: a query sees no key more than so many tokens away. `documents`: as in
    `dense_masks.Mask`. `given`: the mask that the host has made, where it has.

    PyTorch's functions and whatever is asked of it get the dense mask [B, 1, Nq, Nk] in its place: bool for SDPA
    (`dtype` None), else 0 and the least number of `dtype`.
    """

    def __init__(
        self,
        keys: Tensor,
        queries: int,
        causal: bool,
        dtype: torch.dtype | None,
        window: int | None = None,
        documents: Tensor | None = None,
        given: Tensor | None = None,
    ) -> None:
        self.keys = keys
        self.queries = queries
        self.causal = causal
        self.window = window
        self.dtype_of_bias = dtype
        self.documents = documents
        self.given = given

    def dense(self) -> Tensor:
        """The host's own mask."""
        if self.given is not None:
            return self.given
        batch, count = self.keys.shape
        mask = self.keys[:, None, None, :].expand(batch, 1, self.queries, count)
        if self.causal or self.window is not None:
            first, reach = count - self.queries, count if self.window is None else self.window
            seen = torch.ones(self.queries, count, dtype=torch.bool, device=mask.device)
            mask = mask & seen.tril(first + (0 if self.causal else reach)).triu(first - reach)
        if self.dtype_of_bias is None:
            return mask
        zero = torch.zeros((), dtype=self.dtype_of_bias, device=mask.device)
        return torch.where(mask, zero, torch.finfo(self.dtype_of_bias).min)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """To a device it goes as it is: accelerate moves what a layer is given."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None or device is None:
            return self.dense().to(*args, **kwargs)
        keys, documents, given = (None if x is None else x.to(device) for x in (self.keys, self.documents, self.given))
        assert keys is not None
        return KeyMask(keys, self.queries, self.causal, self.dtype_of_bias, self.window, documents, given)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return function(*map(dense, args), **{key: dense(value) for key, value in (kwargs or {}).items()})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of Python's protocols (copies, pickles), not of a tensor
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[index]

    def __invert__(self) -> Tensor:
        return ~self.dense()

    def __eq__(self, other: object) -> Any:
        return self.dense() == dense(other)

    def __ne__(self, other: object) -> Any:
        return self.dense() != dense(other)

    __hash__ = object.__hash__


def dense(mask: Any) -> Any:
    """What the host would have been given in place of a `KeyMask`, also in a list; anything else as it is."""
    if type(mask) in (list, tuple):
        return type(mask)(map(dense, mask))
    return mask.dense() if isinstance(mask, KeyMask) else mask


def attention_mask(
    *,
    host: str,
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | KeyMask | None = None,
    dtype: torch.dtype = torch.float32,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | KeyMask | None:
    """The mask function that transformers calls in place of the host's; see its AttentionMaskInterface.

    None under "sdpa" leaves it to the module's own `is_causal`, as it does for SDPA.
    """
    if isinstance(attention_mask, KeyMask):
        return attention_mask  # made by a model around this one; transformers takes a mask that is dense as it is
    q_length, q_offset, device = _queries(kwargs, kv_length)
    shape = read_mask_function(mask_function, kwargs.get("local_size"))
    causal, window = shape or (False, None)
    plain = shape is not None and (allow_is_causal_skip if causal else allow_is_bidirectional_skip)
    tokens = kv_length + kv_offset  # a cache of a window has lost the first
    latest = isinstance(q_offset, int) and (not causal or q_offset + q_length == tokens)
    whole = latest and isinstance(kv_offset, int) and (kv_offset == 0 or window is not None)
    fits = attention_mask is None or (attention_mask.dim() == 2 and attention_mask.shape[-1] == tokens)
    if not (plain and whole and fits):
        mask: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[host](
            batch_size=batch_size,
            kv_length=kv_length,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            dtype=dtype,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            **kwargs,
        )
        return _packed(mask, kwargs.get("local_size"), None if host == "sdpa" else dtype)
    if attention_mask is not None:
        attention_mask = attention_mask[:, kv_offset:]
        if not is_tracing(attention_mask) and bool(attention_mask.all()):
            attention_mask = None
    if window is not None and window >= tokens - 1:
        window = None  # it holds the whole sequence
    if attention_mask is None:
        if window is None and (not causal or (host == "sdpa" and q_length in (1, kv_length))):
            return None
        attention_mask = torch.ones(batch_size, kv_length, device=device)
    return KeyMask(attention_mask.bool(), q_length, causal, None if host == "sdpa" else dtype, window)


def _packed(mask: Any, size: int | None, dtype: torch.dtype | None) -> Tensor | KeyMask | None:
    """The mask that a host has made, as a `KeyMask` where it keeps packed documents apart; else as it is."""
    square = isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[2] == mask.shape[3] > 1
    if not square or is_tracing(mask):
        return mask  # type: ignore[no-any-return]
    seen = visible(mask)
    for window in (None,) if size is None else (None, size - 1, size):  # causal ones hold the query's own token
        said = read_blocks(seen, window)
        if said is not None:
            keys = torch.ones_like(seen[:, 0]) if said.real is None else said.real
            return KeyMask(keys, mask.shape[2], said.causal, dtype, window, said.documents, mask)
    return mask  # type: ignore[no-any-return]


def read_mask_function(function: Callable[..., Any], size: int | None) -> tuple[bool, int | None] | None:
    """Whether a mask function of transformers is causal, and how far away a key may be; None for any other function.

    A window is a closure: it is one if it is made of what transformers makes of this `size`.
    """
    if function is causal_mask_function or function is bidirectional_mask_function:
        return function is causal_mask_function, None
    if isinstance(size, int):
        if _parts(function) == _parts(sliding_window_causal_mask_function(size)):
            return True, size - 1
        both_sides = getattr(masking_utils, "sliding_window_bidirectional_mask_function", None)  # not in the oldest
        if both_sides is not None and _parts(function) == _parts(both_sides(size)):
            return False, size
    return None


def _parts(function: Any) -> Any:
    """What a function is made of: its code and what it closes over, down to plain values."""
    if not isinstance(function, FunctionType):
        return tuple(map(_parts, function)) if isinstance(function, tuple) else function
    return function.__code__, tuple(_parts(cell.cell_contents) for cell in function.__closure__ or ())


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
