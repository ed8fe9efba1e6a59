"""CUDA graphs: nothing on the way of the Triton kernels waits for the GPU or takes numbers from the CPU.

Without a GPU tensors that stand for one (PyTorch's fake ones) go through the launchers, and what PyTorch is asked for
is watched; with one, whole patched models are captured and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from patching_models import ALL, build
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import astroattn
from astroattn import AstroConfig
from astroattn.ops.kernels import device as gpu
from astroattn.ops.layout import ROOT, Budget

triton = pytest.importorskip("triton")

# Operators whose result, or its size, the CPU has to have.
WAITING = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique", "equal.default")


class Watch(TorchDispatchMode):
    """Notes what waits for a GPU, or takes numbers from the CPU to it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        by_bool = "index" in str(func) and any(x.dtype == torch.bool for x in given[1:2])
        if by_bool or any(name in str(func) for name in WAITING):
            self.seen.append(str(func))
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in (*given, *tree_leaves(out)) if isinstance(x, Tensor)]
        if "copy" not in str(func):
            tensors = [x for x in tensors if x.is_cuda or x.dim()]  # a number of Python's goes with the launch
        if len({x.device.type for x in tensors}) > 1:
            self.seen.append(f"{func}, between devices")
        return out


@contextmanager
def fake_gpu(capturing: bool = True) -> Iterator[Watch]:
    """Tensors on a GPU that is not there, and launches that launch nothing."""
    from astroattn.ops.kernels import launching, static

    with (
        mock.patch.object(type(static.write_kernel), "run", return_value=None),
        mock.patch.object(launching, "_is_compiled_for", return_value=False),
        mock.patch.object(gpu, "capability_of", return_value=(9, 0)),
        mock.patch.object(static, "_processors", return_value=132),
        mock.patch("torch.cuda.is_current_stream_capturing", return_value=capturing),
        FakeTensorMode(allow_non_fake_inputs=True),
        Watch() as watch,
    ):
        yield watch


def draw(tokens: int = 300, heads: int = 3) -> Tensor:
    return torch.empty(2, heads, tokens, 64, device="cuda", dtype=torch.bfloat16)


def layer() -> tuple[Tensor, Tensor]:
    return torch.empty(1, 3, 64, 64, device="cuda"), torch.empty(1, 3, 64, device="cuda")


def static() -> None:
    from astroattn.ops.kernels.static import linear_attention_backward, linear_attention_forward

    given = (*(draw() for _ in range(3)), *layer(), torch.ones(2, 300, dtype=torch.bool, device="cuda"), "linear", 0.5)
    results = linear_attention_forward(*given)
    linear_attention_backward(draw(), results[1], *given, *results)


def causal() -> None:
    from astroattn.ops.kernels.causal import causal_attention_backward, causal_attention_forward, recurrent_step

    given, more = (*(draw() for _ in range(3)), *layer(), None), ("cosine", 192, 0.5)
    out, log_p, state = causal_attention_forward(*given, *more)
    causal_attention_backward(draw(), log_p, *given, *more, out, log_p)
    recurrent_step(*(draw(1) for _ in range(3)), *layer(), None, *more, state)


def near_and_far(budget: Budget, lengths: Tensor | None = None) -> None:
    from astroattn.ops.kernels.near_far import near_far_backward, near_far_forward

    given = tuple(draw() for _ in range(3))
    out, log_p, *chosen = near_far_forward(*given, None, lengths, budget, 0.125)
    near_far_backward(draw(), log_p, *given, None, out, log_p, *chosen, lengths, budget, 0.125)


DEFAULT = Budget(None, 0, ROOT, by_content=True, near=ROOT, exact_keys=ROOT, num_hidden=ROOT, steps=1)


def by_content() -> None:
    near_and_far(DEFAULT)


def on_a_grid() -> None:
    near_and_far(Budget((13, 23), 1, 16, by_content=False, near=9, exact_keys=8, num_hidden=16, steps=1, key_error=9))


def streaming() -> None:
    from astroattn.ops.kernels.streaming import open_memory, stream_in_place
    from astroattn.ops.streaming import Memory, empty_memory

    tokens = draw(1, 12).unflatten(1, (3, 4)), draw(1), draw(1)
    with _disable_current_modes():
        memory = open_memory(empty_memory(*(torch.empty(x.shape) for x in tokens)), 128)
    buffers = Memory(*(torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in memory))
    stream_in_place(*tokens, buffers, 64)


@pytest.mark.parametrize("call", [static, causal, by_content, on_a_grid, streaming])
def test_launchers_ask_nothing_of_the_gpu(call: Callable[[], None]) -> None:
    with fake_gpu() as watch:
        call()
    assert watch.seen == []


def test_without_a_graph_near_and_far_asks_for_one_number() -> None:
    """How many keys a tile reads exactly; so it does not have to take the bound."""
    with fake_gpu(capturing=False) as watch, pytest.raises(DataDependentOutputException):
        by_content()
    assert watch.seen == ["aten._local_scalar_dense.default"]


SMALL = AstroConfig(near=2, exact_keys=4, tile=4, num_hidden=4)


def test_padding_with_near_and_far_is_refused_with_the_reason() -> None:
    with fake_gpu(), pytest.raises(RuntimeError, match="a CUDA graph cannot hold tiles of padded rows"):
        near_and_far(DEFAULT, torch.empty(2, dtype=torch.int64, device="cuda"))


MODELS = {
    "bert": AstroConfig(),
    "bert, random": AstroConfig(hidden="random"),
    "bert, random, near": AstroConfig(hidden="random", near=2, exact_keys=2),
    "vit": SMALL,
    "timm vit": SMALL,
    "timm vit, random": AstroConfig(hidden="random"),
}
# Whose dense masks only `torch.compile` reads without looking at their numbers.
DECODERS = {"gpt2": AstroConfig(hidden="random"), "llama": AstroConfig(hidden="random", near=4)}


def patched_model(name: str, backend: str = "auto") -> tuple[nn.Module, dict[str, Any]]:
    """A model, and its inputs, without padding: the eager ways of padding and of dense masks look at their numbers."""
    tiny = ALL[name.split(",")[0]]
    model, given = build(tiny), tiny.inputs()
    astroattn.patch(model, replace((MODELS | DECODERS)[name], backend=backend))
    if tiny.causal:  # without one transformers' graphs have a dense mask, which stays softmax
        given["attention_mask"] = torch.ones_like(given["attention_mask"])
    else:
        given.pop("attention_mask", None)
    if name.startswith("bert"):
        given["input_ids"] = torch.randint(5, 90, (2, 200))  # more than those of which every key is exact
    return model, given | ({"use_cache": False} if tiny.causal else {})


@pytest.mark.parametrize("name", MODELS)
def test_patched_models_ask_nothing_of_the_gpu(name: str) -> None:
    model, given = patched_model(name)
    with fake_gpu() as watch, torch.no_grad():
        given = {key: x.to("cuda") if isinstance(x, Tensor) else x for key, x in given.items()}
        model = model.to("cuda")
        watch.seen.clear()
        model(**given)
    assert watch.seen == []


KERNELS = [name for name in MODELS | DECODERS if name != "bert, random, near"]  # which no kernel has


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a CUDA device")
@pytest.mark.parametrize("name", KERNELS)
def test_a_patched_model_is_one_graph_with_the_kernels(name: str) -> None:
    """Of which `mode="reduce-overhead"` makes one CUDA graph; each attention is one node, on the Triton kernels."""
    from astroattn.ops.kernels.static import write_kernel

    model, given = patched_model(name, backend="triton")
    nodes = []

    def keep(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        nodes.append([node for node in graph.graph.nodes if "astroattn" in str(node.target)])
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=keep, fullgraph=True)
    with mock.patch.object(type(write_kernel), "run", return_value=None), torch.no_grad():
        compiled(**given)
    assert len(nodes) == 1
    assert len(nodes[0]) == ALL[name.split(",")[0]].patched
    assert all("triton" in node.args for node in nodes[0])


# On a GPU: whole patched models.


def capture(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of a call, and what its replays write to; on a stream of its own, as capturing always is."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles the kernels
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    return graph, captured


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def on_gpu(name: str) -> tuple[nn.Module, dict[str, Any]]:
    model, given = patched_model(name)
    return model.cuda(), {key: x.cuda() if isinstance(x, Tensor) else x for key, x in given.items()}


def change(given: dict[str, Any]) -> None:
    """Other numbers in the same memory."""
    for key, x in given.items():
        if isinstance(x, Tensor) and key != "attention_mask":
            x.copy_(torch.randn_like(x) if x.is_floating_point() else torch.randint_like(x, 5, 90))


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["", "autocast"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_graph_of_a_model_is_replayed(name: str, autocast: torch.dtype | None) -> None:
    model, given = on_gpu(name)

    def run() -> Tensor:
        with torch.autocast("cuda", autocast, enabled=autocast is not None, cache_enabled=False):
            return first(model(**given))

    graph, captured = capture(run)
    for _ in range(2):
        change(given)
        graph.replay()
        found = captured.clone()
        torch.testing.assert_close(found, run(), rtol=1e-3, atol=1e-3 if autocast is None else 3e-2)
        graph.replay()
        assert torch.equal(captured, found)  # the same input twice, the same bits


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_model_runs_on_another_stream_and_another_gpu(name: str) -> None:
    """Second calls included, whose launches are planned: they are those of the stream and the device of the moment."""
    model, given = on_gpu(name)
    expected = [first(model(**given)) for _ in range(2)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.cuda._sleep(10_000_000)  # a launch on the default stream would come before what it reads
            late = {key: x.clone() if isinstance(x, Tensor) else x for key, x in given.items()}
            torch.testing.assert_close(first(model(**late)), expected[1], rtol=1e-3, atol=1e-3)
    torch.cuda.synchronize()
    if torch.cuda.device_count() > 1:  # the current device stays the first one
        model, there = model.cuda(1), {key: x.cuda(1) if isinstance(x, Tensor) else x for key, x in given.items()}
        for _ in range(2):
            torch.testing.assert_close(first(model(**there)).cuda(0), expected[1], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS | DECODERS)
@torch.no_grad()
def test_reduced_overhead(name: str) -> None:
    """`torch.compile` captures the whole of a model, and replays it."""
    model, given = on_gpu(name)
    torch.compiler.reset()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        change(given)
        torch.compiler.cudagraph_mark_step_begin()
        found = first(compiled(**given)).clone()
        torch.testing.assert_close(found, first(model(**given)), rtol=1e-3, atol=1e-3)
