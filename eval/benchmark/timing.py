"""Times in turns, peak memory and what the machine can do at most, on a CPU and on a CUDA device."""

from __future__ import annotations

import ctypes
import itertools
import math
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from astroattn.fidelity.resources import measure_memory

LEAST_TURNS = 3
TICK = 2e-3  # seconds of GPU work between two events, so that their own cost does not count
LONG = 0.5  # seconds after which one run is warm-up enough
MOST_SETS = 64
STATUS = Path("/proc/self/status")
Name = TypeVar("Name")


class Call(NamedTuple):
    """Something to time: `run` computes it `count` times."""

    run: Callable[[], Any]
    count: int = 1


class Effort(NamedTuple):
    """At most so many turns, and no more than take so many seconds, but three."""

    repeats: int
    seconds: float


def quartiles(values: list[float]) -> dict[str, float]:
    """The median of some measurements and their quartiles."""
    low, median, high = np.percentile(values, (25, 50, 75)).tolist()
    return {"median": median, "low": low, "high": high}


def ratios(some: list[float], others: list[float]) -> dict[str, float]:
    """The quartiles of one's measurements over the other's, turn by turn."""
    return quartiles([one / other for one, other in zip(some, others, strict=True)])


def time_in_turns(calls: dict[Name, Call], device: torch.device, effort: Effort) -> dict[Name, list[float]]:
    """Seconds of one computation of each, turn by turn: a turn times all of them, one after the other.

    A CPU is timed by `time.perf_counter`, a GPU by events around as many runs as take `TICK`.
    """
    runs, expected = {}, 0.0
    for name, call in calls.items():
        once = _time(call.run, 1, device)
        if once < LONG or device.type == "cuda":  # the first run may have compiled something
            once = _time(call.run, 1, device)
        runs[name] = 1 if device.type == "cpu" else max(1, min(200, math.ceil(TICK / once)))
        expected += once * runs[name]
    turns = min(effort.repeats, max(LEAST_TURNS, int(effort.seconds / expected)))
    times: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            times[name].append(_time(call.run, runs[name], device) / call.count)
    return times


def _time(run: Callable[[], Any], number: int, device: torch.device) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(number):
            run()
        return (time.perf_counter() - start) / number
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record()
    for _ in range(number):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / number


def count_sets(size: int, device: torch.device) -> int:
    """How many sets of inputs of so many bytes to take in turns, so that a GPU does not find them in its L2 cache."""
    if device.type == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MOST_SETS, math.ceil(2 * cache / size)))


def rotate(run: Callable[..., Any], sets: list[tuple[Tensor, ...]]) -> Callable[[], Any]:
    """A call of `run` on the next set of inputs."""
    turn = itertools.cycle(sets)
    return lambda: run(*next(turn))


def capture(run: Callable[[], Any], count: int, name: str) -> Call | None:
    """The replay of a CUDA graph of so many runs: the GPU's own time, without Python's and that of launches.

    None, with a warning, where a run does what a graph cannot hold, such as waiting for the GPU.
    """
    try:
        return Call(_capture(run, count), count)
    except RuntimeError as error:
        torch.cuda.synchronize()
        warnings.warn(f"{name}: no CUDA graph; {str(error).splitlines()[0]}", stacklevel=2)
        return None


def _capture(run: Callable[[], Any], count: int) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            run()
    replay: Callable[[], None] = graph.replay
    return replay


def measure_ceilings(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Bytes per second, read and written, of a large copy; operations per second of a large matrix product."""
    copied, width = (2**30, 8192) if device.type == "cuda" else (2**28, 2048)
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    left, right = torch.randn(2, width, width, device=device).to(dtype)
    product = torch.empty_like(left)
    with torch.inference_mode():
        calls = {
            "copy": Call(lambda: target.copy_(source)),
            "product": Call(lambda: torch.mm(left, right, out=product)),
        }
        best = {name: min(times) for name, times in time_in_turns(calls, device, Effort(10, 5)).items()}
    return {"bytes per second": 2 * copied / best["copy"], "operations per second": 2 * width**3 / best["product"]}


def measure_peak(run: Callable[[], Any], device: torch.device) -> int:
    """Peak bytes that one pass needs beyond what was there before.

    On Linux's CPUs this is what the resident memory of the process grows by, scratch memory inside an operator
    included: to be called in a fresh process, where `run` has run on small inputs. Elsewhere as `measure_memory`.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return measure_memory(run, device)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s*(\d+) kB", STATUS.read_text())
    assert found
    return int(found[1]) * 1024
