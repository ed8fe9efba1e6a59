"""transformers: our name in its AttentionInterface and AttentionMaskInterface.

Import this module only where transformers is installed. While a model is patched, its configs name one of the two
attention implementations below, after the host implementation ("sdpa" or "eager") the model had. Modules with an
astrocyte are answered by it; all others run exactly what they ran before, on the mask they had before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from astroattn.checks import SOFT_CAP_IN_WINDOW, check_traceable
from astroattn.patching.dense_masks import Mask, for_batch, read_mask
from astroattn.patching.handwritten import HandwrittenSite
from astroattn.patching.masks import KeyMask, attention_mask, dense
from astroattn.patching.site import (
    CORE,
    RECORD,
    Call,
    Site,
    attend,
    begin,
    end,
    methods,
    names_in,
    site_of,
    unequal,
)
from astroattn.patching.streaming import find_layer, layer_of, release_layer

HOSTS = ("sdpa", "eager")
PREFIX = "astroattn_"
WEIGHTS_HANDLE = "astroattn_handle"  # the attribute of a patched model that holds the handle of `refuse_weights`

# an argument of the attention function that is not None, and what it means
REFUSED_ARGUMENTS = {
    "head_mask": "head mask",
    "layer_head_mask": "head mask",
    "cache": "paged cache",
    "sinks": "attention sinks",
    "indices": "keys chosen by the model (sparse attention)",
    "block_indices": "keys chosen by the model (sparse attention)",
}


@dataclass(eq=False)
class InterfaceSite(Site):
    """An attention module that looks its attention function up in `ALL_ATTENTION_FUNCTIONS`."""

    finds_cache = True

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        model = isinstance(module, PreTrainedModel)  # it only chooses the implementation
        return not model and _config(module) is not None and any(map(_lookup, type(module).__mro__))

    @classmethod
    def refusal(cls, name: str, module: nn.Module) -> str | None:
        host = _host(_config(module))
        if host not in HOSTS:
            return f"attention implementation {host!r} (set it to 'sdpa' or 'eager' before patching)"
        if _lookup(type(module)) is None:
            return "a subclass that computes attention by itself"
        if hasattr(module, "compressor"):  # None in some layers; all share a mask that must stay the host's
            return "keys of compressed tokens beside those of the sequence"
        return None

    @classmethod
    def crosses(cls, name: str, module: nn.Module) -> bool:
        parameters = inspect.signature(type(module).forward).parameters
        required = {key for key, value in parameters.items() if value.default is inspect.Parameter.empty}
        return super().crosses(name, module) or bool(required & {"key_value_states", "encoder_hidden_states"})

    @classmethod
    def shape(cls, module: nn.Module) -> tuple[int, int] | None:
        owners = (module, _config(module))
        heads = _first(owners, "num_attention_heads", "num_heads", "n_heads", "n_head")
        head_dim = _first(owners, "head_dim", "attention_head_size", "attention_head_dim", "dim_per_head")
        width = _first(owners, "embed_dim", "hidden_size")
        if heads is None or (head_dim is None and width is None):
            return None
        return heads, head_dim or width // heads

    @classmethod
    def is_causal(cls, module: nn.Module) -> bool:
        return _is_causal(module, None)

    @classmethod
    def settle(cls, model: nn.Module) -> None:
        used = {id(_config(module)) for module in model.modules() if isinstance(site_of(module), InterfaceSite)}
        for module in model.modules():
            config = _config(module)
            if config is None:
                continue
            host = _host(config)
            if id(config) in used:
                config._attn_implementation_internal = f"{PREFIX}{host}"
                if _lookup(type(module)) is not None:
                    _host_function(type(module), str(host))  # known before a graph is compiled
            elif config._attn_implementation != host:
                config._attn_implementation_internal = host
            if isinstance(module, PreTrainedModel):
                _refuse_weights_of(module)

    @classmethod
    def sees_patches(cls, module: nn.Module) -> bool:
        return hasattr(_config(module), "patch_size")

    def take(self, module: nn.Module) -> None:
        for hook in (check_route, begin):
            self.handles.append(module.register_forward_pre_hook(hook))
        self.handles.append(module.register_forward_hook(end))
        if getattr(module, CORE).shares_keys:
            self.handles.append(module.register_forward_pre_hook(find_layer, with_kwargs=True))
            self.handles.append(module.register_forward_hook(release_layer, always_call=True))


def check_route(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of a patched module: raise where its astrocyte would be passed by."""
    name = _config(module)._attn_implementation
    if not str(name).startswith(PREFIX):
        raise RuntimeError(
            f"{getattr(module, RECORD).name}: the attention implementation of this patched model was changed to "
            f"{name!r}, which would pass its astrocytes by; call astroattn.unpatch(model) and patch it again"
        )


def _refuse_weights_of(model: nn.Module) -> None:
    """Put the hook below on a model that has a patched module, and take it from one that has none."""
    if WEIGHTS_HANDLE in vars(model):
        vars(model)[WEIGHTS_HANDLE].remove()
        del vars(model)[WEIGHTS_HANDLE]  # not before, as this may be broken off
    if any(isinstance(site_of(module), (InterfaceSite, HandwrittenSite)) for module in model.modules()):
        vars(model)[WEIGHTS_HANDLE] = model.register_forward_pre_hook(refuse_weights, with_kwargs=True)


def refuse_weights(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a patched model: raise where attention weights are asked for, as none are formed."""
    if kwargs.get("output_attentions") or getattr(_config(model), "output_attentions", False):
        raise ValueError(
            "output_attentions=True: a patched model forms no attention weights; call astroattn.unpatch(model) first"
        )


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | KeyMask | None = None,
    *,
    host: str,
    **arguments: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls; see its AttentionInterface. Returns `([B, N, H, D], weights)`.

    Models pass every argument by its place or by its name; the host is given what they pass, and nothing else.
    """
    check_traceable(query)
    weights: Tensor | None = None

    def run_host() -> Tensor:
        nonlocal weights
        output: Tensor
        function = _host_function(type(module), host)
        output, weights = function(module, query, key, value, dense(attention_mask), **arguments)
        return output.transpose(1, 2)

    if hasattr(module, CORE):
        call = _read(module, query, key, value, attention_mask, host, arguments)
        output = attend(module, call, run_host)
        if getattr(module, RECORD).seen is not None and call.refusal is None:
            weights = None  # the probe is to see what a model makes of having none
    else:
        output = run_host()
    return output.transpose(1, 2).contiguous(), weights


def _read(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | KeyMask | None,
    host: str,
    arguments: dict[str, Any],
) -> Call:
    """The call in our words, or with the reason why it cannot be."""
    refused = [why for name, why in REFUSED_ARGUMENTS.items() if arguments.get(name) is not None]
    refusal = refused[0] if refused else None  # PyTorch 2.8 cannot compile next() with a default
    causal = mask is None and host == "sdpa" and _is_causal(module, arguments.get("is_causal"))
    window = None
    aligned = query.shape[2] == key.shape[2] or (causal and query.shape[2] == 1)
    if isinstance(mask, KeyMask):
        batch = query.shape[0]
        said = Mask(for_batch(mask.keys, batch), mask.causal, for_batch(mask.documents, batch))
        window = mask.window
        aligned = aligned or mask.causal
    else:
        said = read_mask(mask, query.shape[0], key.shape[2], getattr(module, RECORD).expected)
        refusal = refusal or said.refusal
    real, causal = said.real, causal or said.causal
    if not aligned and not getattr(module, RECORD).cross:
        refusal = refusal or unequal(query.shape[2], key.shape[2])
    site, core = getattr(module, RECORD), getattr(module, CORE)
    memory = layer_of(module) if core.shares_keys else None
    if memory is not None and real is not None:
        real = real[:, -key.shape[2] :]  # of the new tokens
    if not (core.shares_keys and site.seen is None):
        key, value = (_for_heads(each, query.shape[1]) for each in (key, value))
    scale, dropout = arguments.get("scaling"), arguments.get("dropout", 0.0)
    call = Call(query, key, value, real, causal, scale, dropout, window=window, refusal=refusal, memory=memory)
    call.documents, call.bias = said.documents, said.bias
    if (positions := arguments.get("position_bias")) is not None:
        call.bias = positions if call.bias is None else positions + call.bias
    call.soft_cap = arguments.get("softcap") if host == "eager" else None  # SDPA has none, and knows none
    if call.soft_cap is not None and window is not None:
        call.refusal = refusal or SOFT_CAP_IN_WINDOW
    call.sliding_window, call.sink = arguments.get("sliding_window"), arguments.get("s_aux")
    if call.sink is None and getattr(module, "sinks", None) is not None:
        call.refusal = refusal or "attention sinks that the attention function is not given"
    return call


def _for_heads(shared: Tensor, heads: int) -> Tensor:
    """Keys or values of that many heads; some models have fewer of either alone."""
    groups = heads // shared.shape[1]
    return shared.repeat_interleave(groups, 1) if groups > 1 else shared


def _is_causal(module: nn.Module, given: bool | None) -> bool:
    """SDPA's rule in transformers: what is given, else the module's attribute, else yes."""
    return bool(getattr(module, "is_causal", True) if given is None else given)


_lookups: dict[type, FunctionType | None] = {}
_host_functions: dict[tuple[type, str], Callable[..., Any]] = {}


def _lookup(cls: type) -> FunctionType | None:
    """The method that looks the attention function up, None for a class that does not."""
    if cls not in _lookups:
        users = (each for each in methods(cls) if "ALL_ATTENTION_FUNCTIONS" in names_in(each.__code__))
        _lookups[cls] = next(users, None)
    return _lookups[cls]


def _host_function(cls: type, host: str) -> Callable[..., Any]:
    """What a class runs under that attention implementation."""
    if (cls, host) not in _host_functions:
        method = _lookup(cls)
        assert method is not None
        # Every file has its own eager function; those of a few have another prefix before that name.
        eager = next((name for name in names_in(method.__code__) if name.endswith("eager_attention_forward")), "")
        scope = method.__globals__
        # not get_interface, which transformers 5.0 does not have
        _host_functions[cls, host] = scope["ALL_ATTENTION_FUNCTIONS"].get(host, scope.get(eager))
    return _host_functions[cls, host]


def _config(module: nn.Module) -> Any:
    """The config of a module of transformers, None for any other module."""
    config = getattr(module, "config", None)
    return config if hasattr(config, "_attn_implementation") else None


def _host(config: Any) -> str | None:
    """The attention implementation of a config before it was patched."""
    name = config._attn_implementation
    return name.removeprefix(PREFIX) if isinstance(name, str) else name


def _first(owners: tuple[Any, ...], *names: str) -> Any:
    """The first attribute of that kind that is an integer."""
    for owner in owners:
        for name in names:
            try:
                value = getattr(owner, name, None)
            except RuntimeError:  # a config that has another value for every layer
                continue
            if isinstance(value, int):
                return value
    return None


for _name in HOSTS:
    AttentionInterface.register(PREFIX + _name, partial(attention, host=_name))
    AttentionMaskInterface.register(PREFIX + _name, partial(attention_mask, host=_name))
