"""Checks of what a caller of `AstrocyteAttention` passes, before anything is computed."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from astroattn.attention import AstrocyteAttention

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_call(
    module: AstrocyteAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    causal: bool,
    scale: float | None,
    grid: tuple[int, int] | None,
) -> None:
    """Raise TypeError or ValueError with the argument's name, what came and what is allowed."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_tensor(name, tensor, query, module.num_heads)
    for name, tensor in (("query", query), ("key", key)):
        if tensor.shape[3] != module.head_dim:
            raise ValueError(f"{name}: head dimension {tensor.shape[3]}; this module has head_dim={module.head_dim}")
    num_queries, num_keys = query.shape[2], key.shape[2]
    if value.shape[2] != num_keys:
        raise ValueError(f"value: {value.shape[2]} tokens; key has {num_keys}")
    if num_keys == 0:
        raise ValueError("key: no tokens; needs at least 1")
    if key_mask is not None:
        if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
            came = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
            raise TypeError(f"key_mask: {came}; expected a bool tensor, True for real tokens")
        if key_mask.shape != (len(key), num_keys):
            raise ValueError(f"key_mask: shape {tuple(key_mask.shape)}; expected [B, Nk] = {(len(key), num_keys)}")
    if scale is not None and not (isfinite(scale) and scale > 0):
        raise ValueError(f"scale: {scale}; must be positive and finite")
    if causal and num_queries > num_keys:
        raise ValueError(f"query: {num_queries} tokens, more than the {num_keys} keys; causal needs at most as many")
    config = module.config
    if num_queries != num_keys and not causal and not module.exact and (config.hidden != "random" or config.near):
        raise ValueError(
            f"query: {num_queries} tokens and {num_keys} keys; tiles and Hebbian learning need self-attention "
            "(as many queries as keys); hidden='random' with near=0 does not"
        )
    _check_grid(grid, num_keys, key_mask, causal)


def _check_tensor(name: str, tensor: Tensor, query: Tensor, num_heads: int) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: {type(tensor).__name__}; expected a tensor [B, H, N, D]")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: {tensor.dtype}; expected one of {', '.join(map(str, DTYPES))}")
    if tensor.dim() != 4:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}; expected [B, H, N, D]")
    if tensor.dtype != query.dtype or tensor.device != query.device:
        raise ValueError(f"{name}: {tensor.dtype} on {tensor.device}; query is {query.dtype} on {query.device}")
    if tensor.shape[1] != num_heads:
        raise ValueError(f"{name}: {tensor.shape[1]} heads; this module has num_heads={num_heads}")
    if tensor.shape[0] != query.shape[0]:
        raise ValueError(f"{name}: batch {tensor.shape[0]}; query has {query.shape[0]}")
    if tensor.shape[3] == 0:
        raise ValueError(f"{name}: vectors of length 0; needs at least 1")


def _check_grid(grid: tuple[int, int] | None, num_keys: int, key_mask: Tensor | None, causal: bool) -> None:
    if grid is None:
        return
    rows, columns = grid
    if rows < 1 or columns < 1 or rows * columns > num_keys:
        raise ValueError(f"grid: {(rows, columns)}; needs rows and columns of at least 1, at most {num_keys} patches")
    if key_mask is not None or causal:
        raise ValueError(f"grid: {(rows, columns)}; a patch grid takes neither key_mask nor causal")
