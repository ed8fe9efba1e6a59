"""Checks of what a caller of `AstrocyteAttention` passes, before anything is computed."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from astroattn.config import CROSSING, is_tiled
from astroattn.ops.causal import CausalState
from astroattn.ops.streaming import Memories, Memory, block_of, each_of

if TYPE_CHECKING:
    from astroattn.attention import AstrocyteAttention
    from astroattn.config import AstroConfig

CROSS = (
    "cross attention is for the Hebbian layer, or for a static one without near, exact_keys and exact_queries; "
    "hidden='none' needs exact_keys for it"
)
CROSS_CAUSAL = "cross attention is not causal: the queries are those of another sequence than the keys"
CROSS_IN_WINDOW = "cross attention has no window and no grid: its queries have no place among the keys"
SOFT_CAP = "soft cap on the attention logits, which no cluster of keys has"
SOFT_CAP_IN_WINDOW = "soft cap on the attention logits within a sliding window"
BIAS = "a bias for every query and key, which neither a static layer nor a streaming memory has"
BIAS_CAUSAL = "a bias for every query and key in causal attention, which no astrocyte has"
BIAS_BESIDE = "a bias for every query and key within a window or beside a soft cap"
LOST_WEIGHTS = "the learned weights are on the meta device, which holds none; load them"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_traceable(query: object) -> None:
    """Raise TypeError inside a symbolic trace of `torch.fx`, which has neither the sizes nor the dtypes of a call."""
    if isinstance(query, torch.fx.Proxy):
        raise TypeError(
            "query: a torch.fx.Proxy; astrocytes decide by sizes and dtypes, which torch.fx.symbolic_trace does not "
            "know; use torch.export or torch.compile, or call astroattn.unpatch(model) first"
        )


def check_call(
    module: AstrocyteAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    causal: bool,
    scale: float | None,
    grid: tuple[int, int] | None,
    window: int | None = None,
    sink: Tensor | None = None,
    soft_cap: float | None = None,
    bias: Tensor | None = None,
    cross: bool | None = None,
) -> None:
    """Raise TypeError or ValueError with the argument's name, what came and what is allowed."""
    check_traceable(query)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_tensor(name, tensor, query, module.num_heads, module.shares_keys and name != "query")
    if key.shape[1] != value.shape[1]:
        raise ValueError(f"value: {value.shape[1]} heads; key has {key.shape[1]}")
    groups = module.num_heads // key.shape[1]
    if any(each != module.configs[head // groups * groups] for head, each in enumerate(module.configs) if groups > 1):
        raise ValueError(f"key: {key.shape[1]} heads, each read by {groups}; these need one config, and theirs differ")
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
        if key_mask.shape != (key.shape[0], num_keys):
            expected = (key.shape[0], num_keys)
            raise ValueError(f"key_mask: shape {tuple(key_mask.shape)}; expected [B, Nk] = {expected}")
    if not isinstance(causal, bool):
        raise TypeError(f"causal: {type(causal).__name__}; expected bool")
    if cross is not None and not isinstance(cross, bool):
        raise TypeError(f"cross: {type(cross).__name__}; expected bool or None")
    for name, number in (("scale", scale), ("soft_cap", soft_cap)):
        if number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{name}: {type(number).__name__}; expected a number or None")
        if not 0 < number < inf:
            raise ValueError(f"{name}: {number}; must be positive and finite")
    if causal and num_queries > num_keys:
        raise ValueError(f"query: {num_queries} tokens, more than the {num_keys} keys; causal needs at most as many")
    check_grid(grid, num_keys)
    if grid is not None and (key_mask is not None or causal):
        raise ValueError(f"grid: {tuple(grid)}; a patch grid takes neither key_mask nor causal")
    check_window(window)
    if window is not None and grid is not None:
        raise ValueError(f"window: {window}; a patch grid takes none")
    if sink is not None:
        if not isinstance(sink, Tensor) or not sink.is_floating_point():
            came = sink.dtype if isinstance(sink, Tensor) else type(sink).__name__
            raise TypeError(f"sink: {came}; expected a floating-point tensor")
        if sink.shape != (module.num_heads,) or sink.device != query.device:
            expected_sink = f"[H] = {(module.num_heads,)} on {query.device}"
            raise ValueError(f"sink: shape {tuple(sink.shape)} on {sink.device}; expected {expected_sink}")
    if bias is not None:
        _check_bias(bias, query, num_keys)
    counts = {"num_queries": num_queries, "num_keys": num_keys}
    beside = {"window": window, "soft_cap": soft_cap, "bias": bias is not None, "cross": cross, "grid": grid}
    reason = module.refusal(causal=causal, **counts, **beside)  # type: ignore[arg-type]
    if reason in (BIAS, BIAS_BESIDE, BIAS_CAUSAL):
        raise ValueError(f"bias: given with this config; {reason}")
    if reason in (SOFT_CAP, SOFT_CAP_IN_WINDOW):
        raise ValueError(f"soft_cap: {soft_cap} with this config; {reason}")
    if reason in (CROSS_CAUSAL, CROSS_IN_WINDOW):
        raise ValueError(f"cross: {cross}; {reason}")
    if reason is not None and causal:
        raise ValueError(f"causal: True with this config; {reason}")
    if reason is not None:
        raise ValueError(f"query: {num_queries} tokens and {num_keys} keys; {reason}")
    if module.hidden is not None and module.hidden.is_lost(query.device):
        raise ValueError(f"query: on {query.device}; {LOST_WEIGHTS}")


def fits_scores(bias: Tensor, query: Tensor, num_keys: int, *, one_row: bool = False) -> bool:
    """Whether a bias is [1 or B, 1 or H, Nq, Nk] where the query is; with `one_row` Nq may be 1, for all queries."""
    if bias.dim() != 4 or bias.device != query.device or bias.dtype not in DTYPES:
        return False
    rows, heads, queries, keys = bias.shape
    batch, count, tokens, _ = query.shape
    alike = queries == tokens or (one_row and queries == 1)
    return rows in (1, batch) and heads in (1, count) and alike and bool(keys == num_keys)


def _check_bias(bias: object, query: Tensor, num_keys: int) -> None:
    """TypeError or ValueError for a bias that is none for these queries and so many keys."""
    if not isinstance(bias, Tensor) or bias.dtype not in DTYPES:
        came = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(f"bias: {came}; expected a tensor of one of {', '.join(map(str, DTYPES))}")
    if not fits_scores(bias, query, num_keys):
        batch, heads, tokens, _ = query.shape
        expected = f"[1 or {batch}, 1 or {heads}, {tokens}, {num_keys}] on {query.device}"
        raise ValueError(f"bias: shape {tuple(bias.shape)} on {bias.device}; expected {expected}")


def check_memories(
    module: AstrocyteAttention, state: object, query: Tensor, key: Tensor, value: Tensor
) -> Memories | None:
    """The state; TypeError or ValueError for one that is none, or of another module, batch, dimension or device."""
    if state is None:
        return None
    budgets = module.budgets
    wanted = isinstance(state, Memory if len(budgets) == 1 else tuple)
    parts: tuple[object, ...] = each_of(state) if wanted else ()  # type: ignore[arg-type]
    if len(parts) != len(budgets) or not all(isinstance(part, Memory) for part in parts):
        raise TypeError(f"state: {type(state).__name__}; expected what decode has returned, or None")
    groups = query.shape[1] // key.shape[1]
    for part, (config, count) in zip(each_of(state), budgets, strict=True):  # type: ignore[arg-type]
        _check_memory(part, config.entries, count // groups, query, key, value)
    return state  # type: ignore[return-value]


def _check_memory(memory: Memory, most: int, heads: int, query: Tensor, key: Tensor, value: Tensor) -> None:
    """ValueError for a memory that is not one of so many key heads with at most so many entries, and these tokens."""
    batch, groups, dim, columns = key.shape[0], query.shape[1] // key.shape[1], key.shape[3], value.shape[3]
    width = memory.key.shape[2]
    entries, means = (batch, heads, width), {"query": (groups, dim), "square": (dim,), "output": (columns,)}
    expected = {
        "key": (*entries, dim),
        "value": (*entries, columns),
        "log_weight": (*entries, groups),
        "counts": (batch, 3),
        "weight": (batch,),
        **dict.fromkeys(("attention", "age", "block_attention"), entries),
        **{name: (batch, heads, *shape) for name, shape in means.items()},
        **{f"block_{name}": (batch, heads, *shape) for name, shape in means.items()},
    }
    _check_shapes(memory, expected)
    work = torch.promote_types(query.dtype, torch.float32)
    for name, x in zip(memory._fields, memory, strict=True):
        if x.dtype != (needed := torch.long if name == "counts" else work):
            raise ValueError(f"state: {name} of {x.dtype}; these tokens need {needed}")
    if width > most:
        raise ValueError(f"state: {width} entries; this module has entries={most}")
    if memory.key.device != key.device:
        raise ValueError(f"state: on {memory.key.device}; key is on {key.device}")
    block = block_of(most)
    for stored, written, _ in memory.counts.tolist():
        whole = stored - written  # at the start of the block
        if not (0 <= written < block and whole % block == 0 and 0 <= whole <= most - block and stored <= width):
            came = f"{stored} entries, {written} tokens of a block"
            raise ValueError(f"state: counts say {came}; this module with entries={most} has blocks of {block}")


def check_state(module: AstrocyteAttention, state: object, query: Tensor, value: Tensor) -> CausalState | None:
    """The state; TypeError or ValueError for one that is none, or of another module, batch or value dimension."""
    if state is None:
        return None
    if not isinstance(state, CausalState):
        raise TypeError(f"state: {type(state).__name__}; expected what decode has returned, or None")
    config, shape = module.configs[0], tuple(query.shape[:2])  # heads with a hidden layer share one config
    expected = {
        "kv_state": (*shape, config.num_hidden, value.shape[3]),
        "key": (*shape, max(config.near - 1, 0), query.shape[3]),
    }
    _check_shapes(state, expected)
    return state


def _check_shapes(state: object, expected: dict[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        came = tuple(getattr(state, name).shape)
        if came != shape:
            raise ValueError(f"state: {name} of shape {came}; these tokens and this module need {shape}")


def _check_tensor(name: str, tensor: Tensor, query: Tensor, num_heads: int, shared: bool) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: {type(tensor).__name__}; expected a tensor [B, H, N, D]")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: {tensor.dtype}; expected one of {', '.join(map(str, DTYPES))}")
    if tensor.dim() != 4:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}; expected [B, H, N, D]")
    if tensor.dtype != query.dtype or tensor.device != query.device:
        raise ValueError(f"{name}: {tensor.dtype} on {tensor.device}; query is {query.dtype} on {query.device}")
    if shared and (tensor.shape[1] == 0 or num_heads % tensor.shape[1]):
        raise ValueError(f"{name}: {tensor.shape[1]} heads; the module's num_heads={num_heads} must be a multiple")
    if not shared and tensor.shape[1] != num_heads:
        raise ValueError(f"{name}: {tensor.shape[1]} heads; this module has num_heads={num_heads}")
    if tensor.shape[0] != query.shape[0]:
        raise ValueError(f"{name}: batch {tensor.shape[0]}; query has {query.shape[0]}")
    if tensor.shape[3] == 0:
        raise ValueError(f"{name}: vectors of length 0; needs at least 1")


def is_cross(num_queries: int | None, num_keys: int | None, causal: bool, cross: bool | None) -> bool:
    """Whether queries are those of another sequence than the keys: as it was said, else where their numbers differ."""
    return bool(num_queries != num_keys and not causal) if cross is None else cross


def reads_any_queries(config: AstroConfig) -> bool:
    """Whether the queries need not be those of the keys' own tokens."""
    if config.hidden in CROSSING:
        return config.hidden != "none" or config.exact_keys != 0
    return config.hidden == "exact" or not (is_tiled(config) or config.exact_queries)


def check_grid(grid: tuple[int, int] | None, num_keys: int | None = None) -> None:
    """Raise TypeError or ValueError for a patch grid that is none, or that has more patches than there are keys."""
    if grid is None:
        return
    if not isinstance(grid, (tuple, list)) or len(grid) != 2 or any(type(side) is not int for side in grid):
        raise TypeError(f"grid: {grid!r}; expected (rows, columns), two ints")
    rows, columns = grid
    if rows < 1 or columns < 1 or (num_keys is not None and rows * columns > num_keys):
        most = "" if num_keys is None else f", at most {num_keys} patches"
        raise ValueError(f"grid: {(rows, columns)}; needs rows and columns of at least 1{most}")


def check_window(window: int | None) -> None:
    """Raise TypeError or ValueError for a window that is none."""
    if window is None:
        return
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"window: {window!r} of type {type(window).__name__}; expected int or None")
    if window < 0:
        raise ValueError(f"window: {window}; must be at least 0")


def check_size(name: str, size: int) -> None:
    """Raise TypeError or ValueError unless a size is a positive int."""
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{name}: {size!r} of type {type(size).__name__}; expected int")
    if size < 1:
        raise ValueError(f"{name}: {size}; must be at least 1")
