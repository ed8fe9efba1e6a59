"""What may be around a model, or done to it, before or after it is patched."""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import astroattn
from astroattn.attention import AstrocyteAttention

COMPILED = ("compile", "aot", "compile_inside", "export")  # no hook of Python runs in a graph


class Wrapped(NamedTuple):
    """A module that can be patched and unpatched, and how it is called."""

    module: nn.Module
    call: Callable[..., Any]


def wrap(name: str, model: nn.Module, fresh: Callable[[], nn.Module]) -> Wrapped:
    """The wrapper around a model. `fresh` makes another one that is not patched."""
    return _WRAPPERS[name](model, fresh)


def _none(model: nn.Module, *_: Any) -> Wrapped:
    return Wrapped(model, model)


def _deepcopy(model: nn.Module, *_: Any) -> Wrapped:
    return _none(copy.deepcopy(model))


def _pickle(model: nn.Module, *_: Any) -> Wrapped:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return _none(torch.load(file, weights_only=False))


def _functional(model: nn.Module, *_: Any) -> Wrapped:
    def call(**arguments: Any) -> Any:
        return functional_call(model, dict(model.named_parameters()) | dict(model.named_buffers()), (), arguments)

    return Wrapped(model, call)


def _one_process() -> None:
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)


def _ddp(model: nn.Module, *_: Any) -> Wrapped:
    _one_process()
    return _none(nn.parallel.DistributedDataParallel(model, find_unused_parameters=True))


def _fsdp(model: nn.Module, *_: Any) -> Wrapped:
    _one_process()
    fully_shard(model)
    return _none(model)


def _offload(model: nn.Module, *_: Any) -> Wrapped:
    from accelerate import cpu_offload

    cpu_offload(model, torch.device("cpu"))
    return _none(model)


def _compile(backend: str) -> Callable[..., Wrapped]:
    def around(model: nn.Module, *_: Any) -> Wrapped:
        torch.compiler.reset()
        return _none(torch.compile(model, backend=backend))

    return around


def _compile_inside(model: nn.Module, *_: Any) -> Wrapped:
    """Every block of the longest list of blocks, as training scripts do."""
    torch.compiler.reset()
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList)]
    for block in max(lists, key=len, default=[]):
        block.compile(backend="eager")
    return _none(model)


def _peft(model: nn.Module, *_: Any) -> Wrapped:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    skip = [
        name for name, each in model.named_modules() if isinstance(each, (nn.MultiheadAttention, AstrocyteAttention))
    ]
    targets = [
        name
        for name, each in model.named_modules()
        if isinstance(each, nn.Linear) and not any(name.startswith(inside) for inside in skip)
    ]
    if not targets:  # the model is one attention
        return _none(model)
    return _none(get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights="gaussian")))


def _checkpointing(model: nn.Module, *_: Any) -> Wrapped:
    """What the library of the model has for it."""
    for name in ("gradient_checkpointing_enable", "set_grad_checkpointing"):
        if hasattr(model, name) and getattr(model, "supports_gradient_checkpointing", True):
            getattr(model, name)()
    return _none(model)


def _checkpoint_around(model: nn.Module, *_: Any) -> Wrapped:
    return Wrapped(model, lambda **arguments: checkpoint(model, use_reentrant=False, **arguments))


class _Same(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def _parametrized(model: nn.Module, *_: Any) -> Wrapped:
    """Every linear layer but those whose weights an attention of torch reads by itself."""
    for module in list(model.modules()):
        if type(module) is nn.Linear:
            parametrize.register_parametrization(module, "weight", _Same())
    return _none(model)


def _moved(model: nn.Module, *_: Any) -> Wrapped:
    """To double and back, and through the state dict."""
    dtype = next(model.parameters()).dtype
    model.double().to(dtype).cpu()
    model.load_state_dict(model.state_dict())
    return _none(model)


def _saved(model: nn.Module, fresh: Callable[[], nn.Module]) -> Wrapped:
    if not any(isinstance(each, AstrocyteAttention) for each in model.modules()):
        return _none(model)
    again = fresh()
    with tempfile.TemporaryDirectory() as folder:
        astroattn.save(model, folder)
        astroattn.load(again, folder)
    return _none(again)


def _threads(model: nn.Module, *_: Any) -> Wrapped:
    """Two at once; the answer of one."""

    def call(**arguments: Any) -> Any:
        inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        autocast = torch.is_autocast_enabled("cpu")

        def work(_: int) -> Any:
            with torch.inference_mode(inference), torch.set_grad_enabled(grad), torch.autocast("cpu", enabled=autocast):
                return model(**arguments)

        with ThreadPoolExecutor(2) as pool:
            first, _ = pool.map(work, range(2))
        return first

    return Wrapped(model, call)


def _export(model: nn.Module, *_: Any) -> Wrapped:
    def call(**arguments: Any) -> Any:
        return torch.export.export(model, (), arguments, strict=False).module()(**arguments)

    return Wrapped(model, call)


_WRAPPERS: dict[str, Callable[..., Wrapped]] = {
    "none": _none,
    "deepcopy": _deepcopy,
    "pickle": _pickle,
    "functional": _functional,
    "data_parallel": lambda model, *_: _none(nn.DataParallel(model)),
    "ddp": _ddp,
    "fsdp": _fsdp,
    "offload": _offload,
    "compile": _compile("eager"),
    "aot": _compile("aot_eager"),
    "compile_inside": _compile_inside,
    "peft": _peft,
    "checkpointing": _checkpointing,
    "checkpoint_around": _checkpoint_around,
    "parametrized": _parametrized,
    "moved": _moved,
    "saved": _saved,
    "threads": _threads,
    "export": _export,
}
