"""Compile every kernel that our launchers launch for GPUs, without a GPU.

    python -m tests.gpu_compile [--all | --arch 86 ...] [part of a case's name ...]

It takes heads of 64 and 256 for sm_86 and sm_90, which takes some minutes, or every case in whose name all parts are
found; --all is every case for every architecture, and takes an hour. The launchers run on CPU tensors, and their
launches are turned into compilations. For each kernel the table shows the registers of a thread, its stack in bytes
(spills, and the slow path of sine and cosine), shared memory, instructions, and which of them are of matrices. It fails
where a kernel does not compile or needs more shared memory than a block of that GPU may have.

A case is a function without arguments that calls launchers. To add some, write a function that yields (name, case),
importing its kernels in the case itself, and add it to `SOURCES`.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch

# A100; GeForce 30 and A10; GeForce 40, L4 and L40; H100 and H200; B200; GeForce 50
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
DEFAULT = (86, 90)
SHORT = r"D=(64|256) .*(float16|float32|N=1)$"
JOBS = 2  # processes
Case = Callable[[], object]


def static_cases() -> Iterator[tuple[str, Case]]:
    """Bidirectional attention through a static hidden layer."""
    for dtype in ("bfloat16", "float32"):
        for dim in (32, 64, 128, 256):
            yield f"static D={dim} m=64 {dtype}", partial(static, dim, 64, dtype)
    yield "static D=256 m=64 float16", partial(static, 256, 64, "float16")
    yield "static D=64 m=256 bfloat16", partial(static, 64, 256, "bfloat16")
    yield "static D=64 m=64 bfloat16 d_weight", partial(static, 64, 64, "bfloat16", with_weight=True)
    yield "static D=64 m=64 bfloat16 mask", partial(static, 64, 64, "bfloat16", masked=True)
    yield "static D=64 m=64 bfloat16 cosine", partial(static, 64, 64, "bfloat16", "cosine")
    yield "static D=40 m=300 float16", partial(static, 40, 300, "float16", masked=True, with_weight=True)


def static(
    dim: int,
    m: int,
    dtype: str,
    activation: str = "positive_exp",
    *,
    masked: bool = False,
    with_weight: bool = False,
) -> None:
    from astroattn.ops.kernels.static import linear_attention_backward, linear_attention_forward

    q, k, v, d_out = (torch.zeros(1, 12, 4096, dim, dtype=getattr(torch, dtype)) for _ in range(4))
    layer = (torch.zeros(1, 12, m, dim), torch.zeros(1, 12, m), torch.ones(1, 4096).bool() if masked else None)
    results = linear_attention_forward(q, k, v, *layer, activation, 0.5)
    linear_attention_backward(d_out, results[1], q, k, v, *layer, activation, 0.5, *results, with_weight=with_weight)


def causal_cases() -> Iterator[tuple[str, Case]]:
    """Causal attention through a static hidden layer, with a near field and without, and the step of one token."""
    for dtype in ("bfloat16", "float32"):
        for dim in (32, 64, 128, 256):
            yield f"causal D={dim} m=64 {dtype}", partial(causal, dim, 64, dtype)
    yield "causal D=256 m=64 float16", partial(causal, 256, 64, "float16")
    yield "causal D=64 m=64 bfloat16 near=0", partial(causal, 64, 64, "bfloat16", near=0)
    yield "causal D=64 m=256 bfloat16 d_weight", partial(causal, 64, 256, "bfloat16", with_weight=True)
    yield "causal D=64 m=64 bfloat16 d_weight", partial(causal, 64, 64, "bfloat16", with_weight=True)
    yield "causal D=40 m=300 float16 cosine mask", partial(causal, 40, 300, "float16", "cosine", masked=True)


def causal(
    dim: int,
    m: int,
    dtype: str,
    activation: str = "positive_exp",
    *,
    near: int = 192,
    masked: bool = False,
    with_weight: bool = False,
) -> None:
    from astroattn.ops.kernels.causal import causal_attention_backward, causal_attention_forward, recurrent_step

    q, k, v, d_out = (torch.zeros(1, 12, 4096, dim, dtype=getattr(torch, dtype)) for _ in range(4))
    layer = (torch.zeros(1, 12, m, dim), torch.zeros(1, 12, m), torch.ones(1, 4096).bool() if masked else None)
    inputs = (q, k, v, *layer, activation, near, 0.5)
    out, log_p, state = causal_attention_forward(*inputs)
    causal_attention_backward(d_out, log_p, *inputs, out, log_p, with_weight=with_weight)
    mask = None if layer[2] is None else layer[2][:, :1]
    recurrent_step(*(x[:, :, :1] for x in (q, k, v)), *layer[:2], mask, activation, near, 0.5, state)


def near_far_cases() -> Iterator[tuple[str, Case]]:
    """Near + far attention, choosing included, forward and backward."""
    for dtype in ("bfloat16", "float32"):
        for dim in (32, 64, 128, 256):
            yield f"near_far D={dim} {dtype}", partial(near_far, dim, dtype)
    for dim in (64, 128, 256):
        yield f"near_far D={dim} float16", partial(near_far, dim, "float16")
    yield "near_far D=64 bfloat16 no far field", partial(near_far, 64, "bfloat16", num_hidden=0)
    yield "near_far D=40 float16 small tiles", partial(near_far, 40, "float16", tile=16)
    for tokens in (4096, 16384, 65536):
        yield f"near_far D=64 bfloat16 {tokens} tokens", partial(near_far, 64, "bfloat16", tokens=tokens, heads=1)


def near_far(dim: int, dtype: str, *, num_hidden: int = 64, tile: int = 64, tokens: int = 512, heads: int = 2) -> None:
    from astroattn.ops.kernels.near_far import near_far_backward, near_far_forward
    from astroattn.ops.layout import Budget

    keys = 48 if tokens < 4096 else 384
    budget = Budget(None, 1, tile, by_content=True, near=4, exact_keys=keys, num_hidden=num_hidden, steps=1)
    q, k, v, d_out = (torch.randn(1, heads, tokens + 1, dim).to(getattr(torch, dtype)) for _ in range(4))
    given = (None, budget, dim**-0.5)
    out, log_p, *chosen = near_far_forward(q, k, v, None, *given)
    near_far_backward(d_out, torch.zeros_like(log_p), q, k, v, None, out, log_p, *chosen, *given)


def streaming_cases() -> Iterator[tuple[str, Case]]:
    """The streaming memory: the step of one token, and many tokens."""
    for count in (1, 512):
        for dim in (64, 128, 256):
            yield f"streaming D={dim} entries=128 N={count}", partial(streaming, dim, 128, 4, count)
        yield (
            f"streaming D=80 entries=32 heads=1 bfloat16 mask N={count}",
            partial(streaming, 80, 32, 1, count, "bfloat16", masked=True),
        )
        yield f"streaming D=64 entries=1024 heads=71 N={count}", partial(streaming, 64, 1024, 71, count)
        yield f"streaming D=256 entries=128 soft cap N={count}", partial(streaming, 256, 128, 2, count, soft_cap=50.0)


def streaming(
    dim: int,
    entries: int,
    groups: int,
    count: int,
    dtype: str = "float32",
    *,
    masked: bool = False,
    soft_cap: float | None = None,
) -> None:
    from astroattn.ops.kernels.streaming import open_memory, stream_in_place
    from astroattn.ops.streaming import empty_memory

    shapes = ((groups, count), (count,), (count,))
    tokens = [torch.zeros(1, 8, *shape, dim, dtype=getattr(torch, dtype)) for shape in shapes]
    lengths = torch.tensor([count]) if masked else None
    stream_in_place(*tokens, open_memory(empty_memory(*tokens), entries), entries // 2, lengths, soft_cap)


SOURCES: list[Callable[[], Iterator[tuple[str, Case]]]] = [
    causal_cases,
    near_far_cases,
    static_cases,
    streaming_cases,
]


def cases(*parts: str) -> dict[str, Case]:
    """The cases in whose names every part, a regular expression, is found."""
    return {name: case for source in SOURCES for name, case in source() if all(re.search(part, name) for part in parts)}


class Row(NamedTuple):
    """What the compiler made of one kernel."""

    kernel: str
    warps: int
    registers: int
    stack: int
    shared: int
    instructions: int
    matrix: str


class Driver:
    """Stands for the driver of a GPU that is not there."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_case(arch: int, name: str) -> list[Row]:
    """Run a case with its launches turned into compilations: one row per kernel."""
    import triton

    from astroattn.ops.kernels import device

    run = triton.JITFunction.run
    kernels: dict[int, Any] = {}

    def compile_only(self: Any, *args: object, grid: object, warmup: bool, **options: object) -> object:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kernels[id(kernel)] = kernel
        return kernel

    triton.runtime.driver.set_active(Driver(arch))
    triton.JITFunction.run = compile_only
    device.WITHOUT_GPU = divmod(arch, 10)
    try:
        cases()[name]()
    finally:
        triton.JITFunction.run = run
    assert kernels, "nothing was launched"
    return [describe(kernel) for kernel in kernels.values()]


def describe(kernel: Any) -> Row:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    matrix = [word for word in ("wgmma", "mma.sync", "tcgen05.mma") if word in kernel.asm["ptx"]]
    instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/.*;", usage, re.MULTILINE))
    sizes = (kernel.metadata.num_warps, registers, stack, kernel.metadata.shared, instructions)
    return Row(kernel.name, *sizes, " ".join(matrix))


def attempt(arch: int, name: str) -> tuple[str, list[Row], str, float]:
    """Compile a case: its name, rows, error (empty if none) and seconds."""
    start = time.perf_counter()
    try:
        rows, error = compile_case(arch, name), ""
    except Exception:
        rows, error = [], traceback.format_exc()
    return name, rows, error, time.perf_counter() - start


def served(arch: int, name: str) -> bool:
    """Whether a GPU gets the kernels of a case: `backends._refusal` keeps large heads in float32 from small blocks."""
    from astroattn.ops.kernels.device import LEAST_SHARED, shared_memory

    refused = re.search(r"(static|causal) D=256 .*float32", name)
    return refused is None or shared_memory(divmod(arch, 10)) > LEAST_SHARED


def main() -> int:
    from astroattn.ops.kernels.device import shared_memory

    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("parts", nargs="*", help="regular expressions that a case's name must have in it")
    parser.add_argument(
        "--arch", type=int, action="append", choices=ARCHITECTURES, help="of an architecture, 90: sm_90"
    )
    parser.add_argument("--all", action="store_true", help="all cases and architectures")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    names = list(cases(*(options.parts or ([] if options.all else [SHORT]))))
    tasks = [
        (arch, name)
        for arch in options.arch or (ARCHITECTURES if options.all else DEFAULT)
        for name in names
        if served(arch, name)
    ]
    failures = 0 if tasks else 1
    with ProcessPoolExecutor(JOBS) as pool:
        for (arch, _), (name, rows, error, seconds) in zip(
            tasks, pool.map(attempt, *zip(*tasks, strict=True)), strict=True
        ):
            print(f"sm_{arch} {name} ({seconds:.1f} s)\n{error}", end="", flush=True)
            failures += bool(error)
            for row in rows:
                fits = row.shared <= shared_memory(divmod(arch, 10))
                failures += not fits
                print(
                    f"    {row.kernel:24} warps {row.warps}  registers {row.registers:3}  stack {row.stack:5}  shared "
                    f"{row.shared:6}{'' if fits else ' TOO MUCH'}  instructions {row.instructions:6}  {row.matrix}",
                    flush=True,
                )
    print(f"{len(tasks)} cases, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
