"""Count the launches of our kernels, and the variants of each that many lengths compile, without a GPU.

    python -m tests.gpu_launches [sequences of random length, 1,000 unless told]
    python -m tests.gpu_launches --time

The launchers run on CPU tensors, and each launch is turned into a record of what Triton compiles a kernel anew for:
the types of its arguments, whether they are 1 or divisible by 16, and its constants. Each call is made twice, and what
is launched without Triton's search (`kernels.launching`) must be what it would have found. JSON on stdout, for each
kind of input: the kernels that each attention and pass launches at 4,096 tokens, in order, and how many variants a
kernel has.

--time: the least microseconds of Python that a call takes before its kernels run, by Triton's search and without it, at
1,024 tokens and 12 heads of 64 in bfloat16; launching itself is left out, Triton's binding of the arguments is not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from astroattn.ops.layout import ROOT, Budget, Layout
from tests.gpu_compile import Driver

MOST_TOKENS = 4096
HEADS, HIDDEN = 2, 64
TIMED_TOKENS, TIMED_HEADS, RUNS = 1024, 12, 300


class Kind(NamedTuple):
    """What inputs are like; padded: of a batch of two, the second of which has half as many tokens."""

    dtype: torch.dtype
    dim: int
    padded: bool

    def draw(self, tokens: int, heads: int = HEADS) -> Tensor:
        """[B, H, N, D]; without padding as models lay it out, with tokens and heads exchanged."""
        if self.padded:
            return torch.randn(2, heads, tokens, self.dim).to(self.dtype)
        return torch.randn(1, tokens, heads, self.dim).to(self.dtype).transpose(1, 2)

    def lengths(self, tokens: int) -> Tensor | None:
        return torch.tensor([tokens, (tokens + 1) // 2]) if self.padded else None

    def mask(self, tokens: int) -> Tensor | None:
        lengths = self.lengths(tokens)
        return None if lengths is None else torch.arange(tokens) < lengths[:, None]

    def layer(self, heads: int = HEADS) -> tuple[Tensor, Tensor]:
        return torch.zeros(1, heads, HIDDEN, self.dim), torch.zeros(1, heads, HIDDEN)


KINDS = {
    "bfloat16, heads of 64": Kind(torch.bfloat16, 64, padded=False),
    "float32, heads of 40, padded": Kind(torch.float32, 40, padded=True),
}


@contextmanager
def recording() -> Iterator[list[tuple[str, str]]]:
    """Launches become records: the kernel, and the key of its variant."""
    import triton
    from triton.compiler import CompiledKernel

    from astroattn.ops.kernels import launching

    launches: list[tuple[str, str]] = []
    driver = Driver(90)

    def key_of(kernel: Any, args: tuple[object, ...], options: dict[str, object]) -> str:
        binder = kernel.device_caches[driver.get_current_device()][-1]
        return str(binder(*args, **options)[1:])

    class Variant(CompiledKernel):
        """Stands for what Triton has compiled; checks that it is launched with what it was compiled for."""

        def __init__(self, kernel: Any, key: str, options: dict[str, object]) -> None:
            self.module = None
            self.kernel, self.key = kernel, key
            self.options = {name: x for name, x in options.items() if name not in kernel.arg_names}

        def __getitem__(self, grid: object) -> Callable[..., None]:
            return self.launch

        def launch(self, *args: object) -> None:
            found = key_of(self.kernel, args, self.options)
            assert found == self.key, f"{self.kernel}: {found}, compiled for {self.key}"
            launches.append((name_of(self.kernel), PLANNED))

    def record(self: Any, *args: object, grid: object, warmup: bool, **options: object) -> Variant:
        key = key_of(self, args, options)
        launches.append((name_of(self), key))
        return Variant(self, key, options)

    triton.runtime.driver.set_active(driver)
    launching._steps.cache_clear()
    with (
        mock.patch.object(triton.JITFunction, "run", record),
        mock.patch.object(launching, "_is_compiled_for", always),
    ):
        yield launches


PLANNED = "without Triton's search"


def always(x: Tensor) -> bool:
    return True


def never(x: Tensor) -> bool:
    return False


def name_of(kernel: Any) -> str:
    return f"{kernel.module.rpartition('.')[2]}.{kernel.__name__}"


def static(kind: Kind, tokens: int) -> Iterator[str]:
    from astroattn.ops.kernels.static import linear_attention_backward, linear_attention_forward

    q, k, v, d_out = (kind.draw(tokens) for _ in range(4))
    given = (q, k, v, *kind.layer(), kind.mask(tokens), "positive_exp", 0.5)
    results = linear_attention_forward(*given)
    yield "static forward"
    linear_attention_backward(d_out, results[1], *given, *results)
    yield "static backward"


def causal(kind: Kind, tokens: int) -> Iterator[str]:
    from astroattn.ops.kernels.causal import causal_attention_backward, causal_attention_forward, recurrent_step

    q, k, v, d_out = (kind.draw(tokens) for _ in range(4))
    more = ("positive_exp", 192, 0.5)
    given = (q, k, v, *kind.layer(), kind.mask(tokens), *more)
    out, log_p, state = causal_attention_forward(*given)
    yield "causal forward"
    causal_attention_backward(d_out, log_p, *given, out, log_p)
    yield "causal backward"
    recurrent_step(*(kind.draw(1) for _ in range(3)), *kind.layer(), kind.mask(1), *more, state)
    yield "causal step"


def any_order(query: Tensor, key: Tensor, coordinates: object, layout: Layout) -> Tensor:
    """In the place of `choosing.find_order`, which is plain PyTorch and takes most of the time."""
    return torch.arange(query.shape[1]).expand(len(key), -1)


def any_clusters(points: Tensor, mass: Tensor, num_clusters: int, steps: int) -> Tensor:
    """In the place of `learn_clusters`, which takes most of the rest."""
    return (torch.arange(points.shape[1]) % num_clusters).repeat(len(points), 1)


def near_far(kind: Kind, tokens: int) -> Iterator[str]:
    from astroattn.ops.kernels.near_far import near_far_backward, near_far_forward

    q, k, v, d_out = (kind.draw(tokens) for _ in range(4))
    budget = Budget(None, 0, ROOT, by_content=True, near=ROOT, exact_keys=ROOT, num_hidden=ROOT, steps=1)
    given = (kind.lengths(tokens), budget, 0.125)
    order, clusters = "astroattn.ops.choosing.find_order", "astroattn.ops.clustering.learn_clusters"
    with mock.patch(order, any_order), mock.patch(clusters, any_clusters):
        out, log_p, *chosen = near_far_forward(q, k, v, None, *given)
    yield "near + far forward"
    near_far_backward(d_out, torch.zeros_like(log_p), q, k, v, None, out, log_p, *chosen, *given)
    yield "near + far backward"


def streaming(kind: Kind, tokens: int) -> Iterator[str]:
    from astroattn.ops.kernels.streaming import open_memory, stream_in_place
    from astroattn.ops.streaming import empty_memory

    for number, name in ((tokens, "streaming, a text"), (1, "streaming step")):
        q, k, v = kind.draw(number, 4 * HEADS).unflatten(1, (HEADS, 4)), kind.draw(number), kind.draw(number)
        stream_in_place(q, k, v, open_memory(empty_memory(q, k, v), 128), 64, kind.lengths(number))
        yield name


CASES: tuple[Callable[[Kind, int], Iterator[str]], ...] = (static, causal, near_far, streaming)


def count(kind: Kind, sequences: int) -> dict[str, dict[str, Any]]:
    """The launches of each attention and pass, how many a second call makes without search; variants of each kernel."""
    launched: dict[str, list[str]] = {}
    planned: dict[str, int] = {}
    variants: dict[str, set[str]] = {}
    draws = random.Random(0)
    lengths = [MOST_TOKENS, *(round(MOST_TOKENS ** draws.random()) for _ in range(sequences))]
    for number, tokens in enumerate(lengths):
        for case in CASES:
            with recording() as launches:
                start = 0
                for name in case(kind, tokens):
                    if number == 0:
                        launched[name] = [kernel for kernel, _ in launches[start:]]
                    start = len(launches)
                for name in case(kind, tokens):
                    if number == 0:
                        planned[name] = [key for _, key in launches[start:]].count(PLANNED)
                    start = len(launches)
            for kernel, key in launches:
                if key != PLANNED:
                    variants.setdefault(kernel, set()).add(key)
    numbers = {kernel: len(keys) for kernel, keys in variants.items()}
    return {"launches": launched, "planned": planned, "variants": numbers}


@contextmanager
def unlaunched() -> Iterator[None]:
    """Kernels are neither compiled nor launched; all that comes before it is done."""
    import triton
    from triton.compiler import CompiledKernel

    class Nothing(CompiledKernel):
        def __init__(self, src: Any, target: object, options: object) -> None:
            assert src.fn.cache_key  # it collects the constants that Triton compares before every launch
            self.src, self.name = src, ""
            self.module = self.function = self.packed_metadata = None

        def run(self, *args: object) -> None:
            pass

        def _init_handles(self) -> None:
            pass

    triton.runtime.driver.set_active(Driver(90))
    with mock.patch("triton.compiler.compile", Nothing):
        yield


def timed_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """A call of each launcher whose launches are planned."""
    from astroattn.ops.kernels import causal, static
    from astroattn.ops.kernels.streaming import open_memory, stream_in_place
    from astroattn.ops.streaming import empty_memory

    kind = KINDS["bfloat16, heads of 64"]
    q, k, v, d_out = (kind.draw(TIMED_TOKENS, TIMED_HEADS) for _ in range(4))
    given = (q, k, v, *kind.layer(TIMED_HEADS), None, "positive_exp", 0.5)
    yield "static forward", partial(static.linear_attention_forward, *given)
    results = static.linear_attention_forward(*given)
    yield "static backward", partial(static.linear_attention_backward, d_out, None, *given, *results, with_weight=False)
    given = (*given[:-1], 192, 0.5)
    yield "causal forward", partial(causal.causal_attention_forward, *given, with_state=False)
    out, log_p, state = causal.causal_attention_forward(*given)
    more = {"with_weight": False}
    yield "causal backward", partial(causal.causal_attention_backward, d_out, None, *given, out, log_p, **more)
    one = (x[:, :, :1] for x in (q, k, v))
    yield "causal step", partial(causal.recurrent_step, *one, *given[3:], state)
    q, k, v = kind.draw(1, 4 * TIMED_HEADS).unflatten(1, (-1, 4)), kind.draw(1, TIMED_HEADS), kind.draw(1, TIMED_HEADS)
    memory = open_memory(empty_memory(q, k, v), 128)
    yield "streaming step", partial(stream_in_place, q, k, v, memory, 64)


def time_calls() -> dict[str, dict[str, float]]:
    """The least microseconds of each call, by Triton's search and without it."""
    from astroattn.ops.kernels import launching

    found: dict[str, dict[str, float]] = {}
    with unlaunched():
        for name, call in timed_calls():
            for how, answer in (("searched", never), ("planned", always)):
                with mock.patch.object(launching, "_is_compiled_for", answer):
                    call()
                    least = min(time_once(call) for _ in range(RUNS))
                found.setdefault(name, {})[how] = round(1e6 * least, 1)
    return found


def time_once(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("sequences", nargs="?", type=int, default=1000, help="of random length")
    parser.add_argument("--time", action="store_true", help="the Python before a launch")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    found = time_calls() if options.time else {name: count(kind, options.sequences) for name, kind in KINDS.items()}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
