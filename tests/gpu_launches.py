"""Count the launches of our kernels, and the variants of each that many lengths compile, without a GPU.

    python -m tests.gpu_launches [sequences of random length, 1,000 unless told]

The launchers run on CPU tensors, and each launch is turned into a record of what Triton compiles a kernel anew for:
the types of its arguments, whether they are 1 or divisible by 16, and its constants. JSON on stdout, for each kind of
input: the kernels that each attention and pass launches at 4,096 tokens, in order, and how many variants a kernel has.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from astroattn.ops.layout import ROOT, Budget, Layout
from tests.gpu_compile import Driver

MOST_TOKENS = 4096
HEADS, HIDDEN = 2, 64


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

    def layer(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(1, HEADS, HIDDEN, self.dim), torch.zeros(1, HEADS, HIDDEN)


KINDS = {
    "bfloat16, heads of 64": Kind(torch.bfloat16, 64, padded=False),
    "float32, heads of 40, padded": Kind(torch.float32, 40, padded=True),
}


@contextmanager
def recording() -> Iterator[list[tuple[str, str]]]:
    """Launches become records: the kernel, and the key of its variant."""
    import triton

    launches: list[tuple[str, str]] = []
    run, driver = triton.JITFunction.run, Driver(90)

    def record(self: Any, *args: object, grid: object, warmup: bool, **options: object) -> None:
        binder = self.device_caches[driver.get_current_device()][-1]
        _, *key = binder(*args, **options)
        launches.append((f"{self.module.rpartition('.')[2]}.{self.__name__}", str(key)))

    triton.runtime.driver.set_active(driver)
    triton.JITFunction.run = record
    try:
        yield launches
    finally:
        triton.JITFunction.run = run


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
    """In the place of `near_far.find_order`, which is plain PyTorch and takes most of the time."""
    return torch.arange(query.shape[1]).expand(len(key), -1)


def any_clusters(points: Tensor, mass: Tensor, num_clusters: int, steps: int) -> Tensor:
    """In the place of `learn_clusters`, which takes most of the rest."""
    return (torch.arange(points.shape[1]) % num_clusters).repeat(len(points), 1)


def near_far(kind: Kind, tokens: int) -> Iterator[str]:
    from astroattn.ops.kernels.near_far import near_far_backward, near_far_forward

    q, k, v, d_out = (kind.draw(tokens) for _ in range(4))
    budget = Budget(None, 0, ROOT, by_content=True, near=ROOT, exact_keys=ROOT, num_hidden=ROOT, steps=1)
    given = (kind.lengths(tokens), budget, 0.125)
    place = "astroattn.ops.near_far"
    with mock.patch(f"{place}.find_order", any_order), mock.patch(f"{place}.learn_clusters", any_clusters):
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
    """The launches of each attention and pass, and the variants of each kernel."""
    launched: dict[str, list[str]] = {}
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
            for kernel, key in launches:
                variants.setdefault(kernel, set()).add(key)
    return {"launches": launched, "variants": {kernel: len(keys) for kernel, keys in variants.items()}}


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sequences = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    print(json.dumps({name: count(kind, sequences) for name, kind in KINDS.items()}, indent=1))
