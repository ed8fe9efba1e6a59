"""transformers: our name in its AttentionInterface and AttentionMaskInterface.

Import this module only where transformers is installed. While a model is patched, its configs name one of the two
attention implementations below, after the host implementation ("sdpa" or "eager") the model had. Modules with an
astrocyte are answered by it; all others run exactly what they ran before, on the mask they had before.

Masks. A plain padding mask reaches the attention modules as keys only, never as N x N:
    None                  nothing is padded; the module's own `is_causal` decides, as for SDPA
    bool  [B, 1, 1, K]    the keys that are real tokens; complete, as every bool mask is for SDPA
    uint8 [B, 1, 1, K]    the same under a causal mask aligned bottom-right, which is still to be added
Everything else (sliding windows, packed sequences, static caches, masks of the user) is the host's own mask.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function, causal_mask_function

from astroattn.patching.site import CORE, RECORD, Call, Site, attend, key_mask, site_of

HOSTS = ("sdpa", "eager")
PREFIX = "astroattn_"
WEIGHTS_HANDLE = "astroattn_handle"  # the attribute of a patched model that holds the handle of `refuse_weights`

CROSS_NAMES = re.compile(r"encoder_attn|encdec|cross_?att", re.IGNORECASE)
# an attribute of the module that is not None, False or 0, and what it means
REFUSED_ATTRIBUTES = {
    "is_cross_attention": "cross attention",
    "sliding_window": "sliding window",
    "sinks": "attention sinks",
    "attn_logit_softcapping": "soft cap on the attention logits",
    "relative_position_bias": "relative position bias",
    "relative_position_bias_table": "relative position bias",
    "relative_attention_bias": "relative position bias",
}
# an argument of the attention function that is not None, and what it means
REFUSED_ARGUMENTS = {
    "sliding_window": "sliding window",
    "s_aux": "attention sinks",
    "softcap": "soft cap on the attention logits",
    "position_bias": "relative position bias",
    "head_mask": "head mask",
    "layer_head_mask": "head mask",
    "cu_seqlens": "packed sequences (cu_seqlens)",
    "cu_seq_lens_q": "packed sequences (cu_seq_lens)",
    "cu_seq_lens_k": "packed sequences (cu_seq_lens)",
    "cache": "paged cache",
}


@dataclass(eq=False)
class InterfaceSite(Site):
    """An attention module that looks its attention function up in `ALL_ATTENTION_FUNCTIONS`."""

    library: ClassVar[str] = "transformers"
    handle: Any = None

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        config = getattr(module, "config", None)
        return (
            hasattr(config, "_attn_implementation")
            and not isinstance(module, PreTrainedModel)
            and _lookup(type(module)) is not None
        )

    @classmethod
    def refusal(cls, name: str, module: nn.Module) -> str | None:
        host = _host(module.config)
        if host not in HOSTS:
            return f"attention implementation {host!r} (set it to 'sdpa' or 'eager' before patching)"
        parameters = inspect.signature(type(module).forward).parameters
        required = {key for key, value in parameters.items() if value.default is inspect.Parameter.empty}
        if (
            "Cross" in type(module).__name__
            or CROSS_NAMES.search(name)
            or required & {"key_value_states", "encoder_hidden_states"}
        ):
            return "cross attention"
        for attribute, reason in REFUSED_ATTRIBUTES.items():
            value = getattr(module, attribute, None)
            if isinstance(value, (Tensor, nn.Module)) or value:
                return reason
        return None

    @classmethod
    def shape(cls, module: nn.Module) -> tuple[int, int] | None:
        config = module.config
        heads = _first((module, config), "num_attention_heads", "num_heads", "n_heads", "n_head")
        head_dim = _first((module, config), "head_dim", "attention_head_size", "attention_head_dim", "dim_per_head")
        width = _first((module, config), "embed_dim", "hidden_size")
        if heads is None or (head_dim is None and width is None):
            return None
        return heads, head_dim or width // heads

    @classmethod
    def is_causal(cls, module: nn.Module) -> bool:
        return _is_causal(module, None)

    @classmethod
    def settle(cls, model: nn.Module) -> None:
        used = {id(module.config) for module in model.modules() if isinstance(site_of(module), InterfaceSite)}
        for module in model.modules():
            config = getattr(module, "config", None)
            host = getattr(config, "_attn_implementation", None)
            if id(config) in used and host in HOSTS:
                config._attn_implementation_internal = PREFIX + host
            elif id(config) not in used and _host(config) != host:
                config._attn_implementation_internal = _host(config)
            if isinstance(module, PreTrainedModel):
                if (handle := vars(module).pop(WEIGHTS_HANDLE, None)) is not None:
                    handle.remove()
                if any(isinstance(site_of(part), InterfaceSite) for part in module.modules()):
                    setattr(module, WEIGHTS_HANDLE, module.register_forward_pre_hook(refuse_weights, with_kwargs=True))

    @classmethod
    def sees_patches(cls, module: nn.Module) -> bool:
        return hasattr(module.config, "patch_size")

    def take(self, module: nn.Module) -> None:
        self.handle = module.register_forward_pre_hook(check_route)

    def release(self, module: nn.Module) -> None:
        self.handle.remove()


def check_route(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of a patched module: raise where its astrocyte would be passed by."""
    name = module.config._attn_implementation
    if not str(name).startswith(PREFIX):
        raise RuntimeError(
            f"{getattr(module, RECORD).name}: the attention implementation of this patched model was changed to "
            f"{name!r}, which would pass its astrocytes by; call astroattn.unpatch(model) and patch it again"
        )


def refuse_weights(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a patched model: raise where attention weights are asked for, as none are formed."""
    if kwargs.get("output_attentions") or getattr(model.config, "output_attentions", False):
        raise ValueError(
            "output_attentions=True: a patched model forms no attention weights; call astroattn.unpatch(model) first"
        )


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    host: str,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls; see its AttentionInterface. Returns `([B, N, H, D], weights)`."""
    weights: Tensor | None = None

    def run_host() -> Tensor:
        nonlocal weights
        mask = _host_mask(module, query, key, attention_mask, is_causal, host)
        given = kwargs if is_causal is None else {**kwargs, "is_causal": is_causal}
        function = _host_function(type(module), host)
        output, weights = function(module, query, key, value, mask, dropout=dropout, scaling=scaling, **given)
        return output.transpose(1, 2)

    if hasattr(module, CORE):
        call = _read(module, query, key, value, attention_mask, is_causal, kwargs)
        call.scale, call.dropout = scaling, dropout
        output = attend(module, call, run_host)
    else:
        output = run_host()
    return output.transpose(1, 2).contiguous(), weights


def attention_mask(
    *,
    host: str,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function that transformers calls; see its AttentionMaskInterface and the head of this file."""
    causal = mask_function is causal_mask_function and allow_is_causal_skip
    plain = causal or (mask_function is bidirectional_mask_function and allow_is_bidirectional_skip)
    whole = isinstance(q_offset, int) and kv_offset == 0 and (not causal or q_offset + q_length == kv_length)
    fits = attention_mask is None or (attention_mask.dim() == 2 and attention_mask.shape[-1] == kv_length)
    if not (plain and whole and fits):
        return ALL_MASK_ATTENTION_FUNCTIONS[host](  # type: ignore[no-any-return]
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            **kwargs,
        )
    if attention_mask is not None and not torch.compiler.is_compiling() and bool(attention_mask.all()):
        attention_mask = None
    if not causal:
        return None if attention_mask is None else attention_mask[:, None, None, :].bool()
    if attention_mask is None:
        if q_length in (1, kv_length):
            return None  # SDPA's is_causal means the same
        device = kwargs.get("device", "cpu")
        return torch.ones(batch_size, 1, 1, kv_length, dtype=torch.uint8, device=device)
    return attention_mask[:, None, None, :].to(torch.uint8)


def _read(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> Call:
    """The call in our words, or with the reason why it cannot be."""
    queries, keys = query.shape[2], key.shape[2]
    causal = _is_causal(module, is_causal) if mask is None else mask.dtype == torch.uint8
    groups = query.shape[1] // key.shape[1]
    real, refusal = key_mask(mask.bool() if mask is not None and causal else mask, query.shape[0], keys)
    # a causal mask of ours is aligned bottom-right; without one, that is sure only for one query
    if refusal is None and queries != keys and not (causal and (mask is not None or queries == 1)):
        refusal = "keys of another length than the queries (cross attention or a static cache)"
    for argument, reason in REFUSED_ARGUMENTS.items():
        if kwargs.get(argument) is not None:
            refusal = reason
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return Call(query, key, value, real, causal, refusal=refusal)


def _is_causal(module: nn.Module, given: bool | None) -> bool:
    """SDPA's rule in transformers: what is given, else the module's attribute."""
    if given is None:
        given = getattr(module, "is_causal", getattr(module.config, "is_decoder", False))
    return bool(given)


def _host_mask(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool | None, host: str
) -> Tensor | None:
    """The mask that the host implementation would have been given."""
    queries, keys = query.shape[2], key.shape[2]
    causal = _is_causal(module, is_causal) and host == "eager" if mask is None else mask.dtype == torch.uint8
    if causal and queries > 1:
        allowed = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        mask = allowed[None, None] if mask is None else allowed & mask.bool()
    if mask is None or mask.is_floating_point():
        return mask
    mask = mask.bool()
    if mask.dim() == 4:
        mask = mask.expand(query.shape[0], -1, queries, -1)
    if host == "eager":
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        return torch.where(mask, zero, torch.finfo(query.dtype).min)
    return mask


@functools.cache
def _lookup(cls: type[nn.Module]) -> dict[str, Any] | None:
    """The globals of the method that looks the attention function up, None for a class that does not."""
    for base in cls.__mro__:
        for method in vars(base).values():
            code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
            if code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names:
                return inspect.unwrap(method).__globals__
    return None


_host_functions: dict[tuple[type, str], Callable[..., Any]] = {}


def _host_function(cls: type[nn.Module], host: str) -> Callable[..., Any]:
    """What a class runs under that attention implementation."""
    if (cls, host) not in _host_functions:
        scope = _lookup(cls)
        assert scope is not None
        eager = scope.get("eager_attention_forward")
        _host_functions[cls, host] = scope["ALL_ATTENTION_FUNCTIONS"].get_interface(host, eager)
    return _host_functions[cls, host]


def _host(config: Any) -> str | None:
    """The attention implementation of a config before it was patched."""
    name = getattr(config, "_attn_implementation", None)
    return name.removeprefix(PREFIX) if isinstance(name, str) else name


def _first(owners: tuple[Any, ...], *names: str) -> Any:
    """The first attribute of that kind that is an integer."""
    for owner in owners:
        for name in names:
            if isinstance(value := getattr(owner, name, None), int):
                return value
    return None


for _name in HOSTS:
    AttentionInterface.register(PREFIX + _name, functools.partial(attention, host=_name))
    AttentionMaskInterface.register(PREFIX + _name, functools.partial(attention_mask, host=_name))
