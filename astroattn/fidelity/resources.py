"""Time and peak memory of one pass, measured without hooks on any attention."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Result = TypeVar("Result")


def measure_time(run: Callable[[], Result]) -> tuple[Result, float]:
    """The result of `run` and its seconds, device work included."""
    synchronise()
    start = time.perf_counter()
    result = run()
    synchronise()
    return result, time.perf_counter() - start


def synchronise() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


MEMORY_METHODS = {
    True: "peak of torch.cuda.max_memory_allocated during one pass above what was allocated before it",
    False: "peak of bytes in tensors alive at once that one pass made, summed op by op; scratch memory inside an op is"
    " not seen",
}


def measure_memory(run: Callable[[], Any], device: torch.device) -> int:
    """Peak bytes that one pass needs beyond what was there before; the method is `MEMORY_METHODS[is CUDA]`."""
    if device.type == "cuda":
        run()  # the first run also allocates what stays, such as the workspace of matrix products
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        peak: int = torch.cuda.max_memory_allocated(device)
        return peak - before
    live = _LiveBytes()
    with live:
        run()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        old = {value.untyped_storage()._cdata for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)}
        for value in tree_iter(output):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in old | self._known:
                    self._add(storage)
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
