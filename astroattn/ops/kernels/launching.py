"""How kernels are launched: as Triton does it the first time, and from then on by what it has compiled.

Most of the Python before a launch is Triton's search for the compiled kernel, by the types, alignments and values of
all arguments. They follow from what a launcher is given, which is looked up once for all of its launches.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

# Versions of Triton in which a compiled kernel takes all arguments of the kernel, constants too; with others every
# launch is Triton's.
OLDEST, NEWEST = (3, 4), (3, 8)
PLANNED = OLDEST <= tuple(map(int, triton.__version__.split(".")[:2])) <= NEWEST
ALIGNED = 16  # bytes: Triton compiles anew for data that begins elsewhere, as no allocator's does
MOST_PLANS = 1024


class Step(NamedTuple):
    """A launch that has been made: the kernel, what Triton compiled for it, and its last arguments, the constants."""

    kernel: Any
    compiled: CompiledKernel
    constants: tuple[Any, ...]


class Launches:
    """The launches of one call of a launcher, in their order.

    Another call of the same launcher with arguments of the same types, dtypes, shapes, strides and values (of what is
    no tensor) makes the same launches, and everything in them that is no tensor is the same.
    """

    def __init__(self, launcher: Any, first: Tensor, *others: Any) -> None:
        """A launcher and all of its arguments: tensors on one device, tuples of such, and what can be hashed."""
        key: list[Any] = [launcher]
        usable = PLANNED and _is_compiled_for(first) and not _is_inspected() and _describe((first, *others), key)
        self._steps = _steps(driver.active.get_current_device(), *key) if usable else None
        self._number = 0

    def __call__(self, kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """`kernel[(programs,)](*arguments, **options)`; options: the kernel's last arguments, and how it is compiled.

        The current device and stream are those of the call, and the hooks of profilers are called.
        """
        if self._steps is None or kernel.pre_run_hooks:
            kernel[(programs,)](*arguments, **options)
            return
        step = self._steps.get(self._number)
        if step is not None and step.kernel is kernel:
            step.compiled[programs, 1, 1](*arguments, *step.constants)
        else:
            compiled = kernel[(programs,)](*arguments, **options)
            if isinstance(compiled, CompiledKernel):  # not one that is still being compiled
                constants = tuple(options[name] for name in kernel.arg_names[len(arguments) :])
                self._steps[self._number] = Step(kernel, compiled, constants)
        self._number += 1


def _describe(given: tuple[Any, ...], key: list[Any]) -> bool:
    """Add all but the data of tensors to a key; whether those are aligned."""
    for x in given:
        if isinstance(x, Tensor):
            if x.data_ptr() % ALIGNED:
                return False
            key += (x.dtype, x.shape, x.stride())
        elif isinstance(x, tuple):
            key.append(len(x))
            if not _describe(x, key):
                return False
        else:
            key += (type(x), x)
    return True


def _is_compiled_for(x: Tensor) -> bool:
    return x.is_cuda  # the interpreter's CPU tensors have nothing compiled


def _is_inspected() -> bool:
    """Whether Triton is to compile otherwise than before, for someone who looks for errors."""
    knobs = triton.knobs
    return bool(
        knobs.runtime.debug
        or getattr(knobs.compilation, "instrumentation_mode", "")
        or getattr(knobs.runtime, "add_stages_inspection_hook", None)
    )


@lru_cache(MOST_PLANS)
def _steps(*key: Any) -> dict[int, Step]:
    return {}
