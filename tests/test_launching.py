"""Launches without Triton's search: which calls share them, and when Triton searches all the same; no kernel runs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from triton.compiler import CompiledKernel  # noqa: E402

from astroattn.ops.kernels import launching  # noqa: E402
from astroattn.ops.kernels.launching import Launches  # noqa: E402


class Compiled(CompiledKernel):
    """What Triton has compiled, which notes what it is launched with."""

    def __init__(self, log: list[Any]) -> None:
        self.module, self.log = None, log

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args: self.log.append(("compiled", grid, args))


class Kernel:
    """A kernel of Triton whose last two arguments are constants."""

    arg_names = ("x", "size", "WIDE", "ACTIVATION")

    def __init__(self, made: Callable[[list[Any]], object] = Compiled) -> None:
        self.log: list[Any] = []
        self.made, self.pre_run_hooks = made, []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        def run(*args: object, **options: object) -> object:
            self.log.append(("searched", grid, args))
            return self.made(self.log)

        return run


class Pair(NamedTuple):
    key: Tensor
    count: int


OPTIONS = {"WIDE": 8, "num_warps": 4, "ACTIVATION": "exp"}


@pytest.fixture(autouse=True)
def planned(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Launches of CPU tensors are planned, on the device that this names."""
    driver = SimpleNamespace(device=0, get_current_device=lambda: driver.device)
    monkeypatch.setattr(launching, "driver", SimpleNamespace(active=driver))
    monkeypatch.setattr(launching, "_is_compiled_for", lambda x: True)
    launching._steps.cache_clear()
    return driver


def call(kernel: Kernel, x: Tensor, *more: object, launcher: object = "attention") -> list[str]:
    """Two launches of a call, one of them with twice as many programs: how each was made."""
    start = len(kernel.log)
    launch = Launches(launcher, x, *more)
    launch(kernel, 3, (x, len(x)), OPTIONS)
    launch(kernel, 6, (x, len(x)), OPTIONS)
    return [how for how, *_ in kernel.log[start:]]


def test_the_second_call_launches_what_was_compiled() -> None:
    kernel, x, other = Kernel(), torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    assert call(kernel, x) == ["searched", "searched"]
    assert call(kernel, other) == ["compiled", "compiled"]
    assert kernel.log[2:] == [
        ("compiled", (3, 1, 1), (other, 2, 8, "exp")),  # the constants behind the arguments, in the kernel's order
        ("compiled", (6, 1, 1), (other, 2, 8, "exp")),
    ]


X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    "changed",
    [
        (X.bfloat16(), None, 1, 0.5, Pair(X, 1)),
        (torch.zeros(2, 3, 5), None, 1, 0.5, Pair(X, 1)),
        (X.transpose(0, 1).contiguous().transpose(0, 1), None, 1, 0.5, Pair(X, 1)),
        (X, X, 1, 0.5, Pair(X, 1)),
        (X, None, 2, 0.5, Pair(X, 1)),
        (X, None, 1.0, 0.5, Pair(X, 1)),
        (X, None, True, 0.5, Pair(X, 1)),
        (X, None, 1, 0.25, Pair(X, 1)),
        (X, None, 1, 0.5, Pair(X, 2)),
        (X, None, 1, 0.5, Pair(X[:1], 1)),
        (X, None, 1, 0.5, (Pair(X, 1),)),
        (X, None, 1, 0.5, None),
    ],
)
def test_another_call_is_searched_for(changed: tuple[Any, ...]) -> None:
    kernel = Kernel()
    assert call(kernel, X, None, 1, 0.5, Pair(X, 1)) == ["searched", "searched"]
    assert call(kernel, *changed) == ["searched", "searched"]
    assert call(kernel, *changed) == ["compiled", "compiled"]
    assert call(kernel, X, None, 1, 0.5, Pair(X, 1)) == ["compiled", "compiled"]


def test_so_is_that_of_another_launcher_device_or_kernel(planned: SimpleNamespace) -> None:
    kernel = Kernel()
    call(kernel, X)
    assert call(kernel, X, launcher="its gradient") == ["searched", "searched"]
    planned.device = 1
    assert call(kernel, X) == ["searched", "searched"]
    planned.device = 0
    assert call(Kernel(), X) == ["searched", "searched"]


@pytest.mark.parametrize("where", ["first", "within a tuple"])
def test_data_that_begins_elsewhere_is_searched_for_every_time(where: str) -> None:
    kernel, odd = Kernel(), torch.zeros(25)[1:].view(2, 3, 4)
    assert odd.data_ptr() % 16
    given = (odd,) if where == "first" else (X, Pair(odd, 1))
    for _ in range(2):
        assert call(kernel, *given) == ["searched", "searched"]


@pytest.mark.parametrize(
    "seen", ["before every run", "debug", "another version", "still compiling", "the interpreter", "instrumented"]
)
def test_triton_searches_where_it_must(seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where someone looks on, or nothing is known of what has been compiled."""
    kernel = Kernel(made=(lambda log: None) if seen == "still compiling" else Compiled)
    call(kernel, X)
    if seen == "before every run":
        kernel.pre_run_hooks.append(print)
    elif seen == "debug":
        monkeypatch.setattr(triton.knobs.runtime, "debug", True)
    elif seen == "another version":
        monkeypatch.setattr(launching, "PLANNED", False)
    elif seen == "the interpreter":
        monkeypatch.setattr(launching, "_is_compiled_for", lambda x: x.is_cuda)
    elif seen == "instrumented":
        monkeypatch.setattr(triton.knobs.compilation, "instrumentation_mode", "consan", raising=False)
    assert call(kernel, X) == ["searched", "searched"]


def test_the_installed_triton_is_planned_for() -> None:
    """If not, see whether `CompiledKernel.__getitem__` still takes what `JITFunction.run` passes on, then say so."""
    assert launching.PLANNED


def test_a_call_that_broke_off_is_completed() -> None:
    kernel, launch = Kernel(), Launches("attention", X)
    launch(kernel, 3, (X, 2), OPTIONS)
    assert call(kernel, X) == ["compiled", "searched"]
    assert call(kernel, X) == ["compiled", "compiled"]
