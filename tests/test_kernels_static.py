"""Triton kernels of attention through a static hidden layer: against dense matrices in float64, and plain PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from astroattn.config import ACTIVATIONS
from astroattn.ops.reference import feature_attention

pytest.importorskip("triton")

from astroattn.ops.kernels import static
from astroattn.ops.kernels.static import linear_attention_backward, linear_attention_forward


class Problem(NamedTuple):
    """Inputs, and weights of the sum of results that is differentiated."""

    query: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    phase: Tensor
    key_mask: Tensor | None
    activation: str
    scale_root: float
    d_out: Tensor
    d_log_p: Tensor


def draw(
    device: str,
    activation: str,
    *,
    batch: int = 1,
    heads: int = 2,
    queries: int = 63,
    keys: int = 63,
    dim: int = 16,
    value_dim: int = 16,
    m: int = 20,
    masked: bool = False,
    own_weights: bool = False,
    dtype: torch.dtype = torch.float32,
    size: float = 1.0,
) -> Problem:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    layers = batch if own_weights else 1
    return Problem(
        (normal(batch, heads, queries, dim) * size).to(device, dtype),
        (normal(batch, heads, keys, dim) * size).to(device, dtype),
        normal(batch, heads, keys, value_dim).to(device, dtype),
        normal(layers, heads, m, dim).to(device, dtype),
        (torch.rand(layers, heads, m) * 6.28).to(device, dtype),
        (torch.rand(batch, keys) < 0.6).to(device) if masked else None,
        activation,
        dim**-0.25,
        normal(batch, heads, queries, value_dim).to(device, dtype),
        normal(batch, heads, queries).to(device, torch.float32),
    )


def ours(problem: Problem, **options: Any) -> dict[str, Tensor]:
    """The kernels' results and gradients."""
    inputs = problem[:-2]
    results = linear_attention_forward(*inputs)
    grads = linear_attention_backward(*problem[-2:], *inputs, *results, **options)
    return dict(zip(("out", "log_p", "query", "key", "value", "weight"), (*results[:2], *grads), strict=True))


def dense(problem: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same by full matrices in PyTorch, in another precision."""
    leaves = [x.to(dtype).requires_grad_() for x in problem[:4]]
    batch, heads, queries, _ = problem.query.shape
    keys = problem.key.shape[2]
    q, k, v = (x.flatten(0, 1) for x in (leaves[0] * problem.scale_root, leaves[1] * problem.scale_root, leaves[2]))
    layer = [x.to(dtype).expand(batch, -1, *x.shape[2:]).flatten(0, 1) for x in (leaves[3], problem.phase)]
    mask = None
    if problem.key_mask is not None:
        mask = problem.key_mask[:, None, None].expand(-1, heads, queries, -1).flatten(0, 1)
    exact = torch.zeros(len(q), queries, keys, dtype=torch.bool, device=q.device)
    out, log_p = feature_attention(q, k, v, *layer, problem.activation, exact, mask)
    d_out, d_log_p = (x.to(dtype).flatten(0, 1) for x in (problem.d_out, problem.d_log_p))
    grads = torch.autograd.grad([out, log_p], leaves, [d_out, d_log_p], allow_unused=True, materialize_grads=True)
    results = (out.unflatten(0, (batch, heads)), log_p.unflatten(0, (batch, heads)), *grads)
    names = ("out", "log_p", "query", "key", "value", "weight")
    return {name: x.detach() for name, x in zip(names, results, strict=True)}


def error(x: Tensor, true: Tensor) -> float:
    """L2 error relative to the truth, over what is not NaN there (log p is, where p is negative)."""
    some = ~true.isnan()
    true = true[some]
    return float((x.double()[some] - true).norm() / true.norm().clamp(min=1e-30))


def check(problem: Problem, least: float = 2e-6) -> None:
    """Not more than twice the error of plain PyTorch in the same precision, thrice for gradients, or `least`."""
    mine, true, plain = ours(problem), dense(problem, torch.float64), dense(problem, problem.query.dtype)
    assert torch.equal(mine["log_p"].isnan(), true["log_p"].isnan())
    for name, result in mine.items():
        assert result.dtype == (torch.float32 if name == "log_p" else problem.query.dtype)
        bound = (2 if name in ("out", "log_p") else 3) * error(plain[name], true[name])
        assert error(result, true[name]) <= max(bound, least), name


# In order: one block of neurons, several; one chunk of keys, several; one of queries, several.
SHAPES = {
    "odd": {"batch": 2, "m": 20},
    "one token": {"queries": 1, "keys": 1, "dim": 64, "value_dim": 64, "m": 5},
    "cross, masked": {"batch": 2, "queries": 9, "keys": 197, "dim": 40, "value_dim": 24, "m": 33, "masked": True},
    "wide": {"heads": 1, "queries": 70, "keys": 65, "dim": 72, "value_dim": 130, "m": 64, "own_weights": True},
    "many neurons": {"batch": 2, "heads": 1, "queries": 33, "keys": 70, "m": 70, "own_weights": True, "masked": True},
    "long": {"heads": 1, "queries": 500, "keys": 500, "m": 16, "masked": True},
}
ALSO = {"odd": ACTIVATIONS, "many neurons": ("positive_exp", "cosine", "linear", "elu1")}
CASES = [(shape, activation) for shape in SHAPES for activation in ALSO.get(shape, ("positive_exp",))]


@pytest.mark.parametrize(("shape", "activation"), CASES)
def test_equals_dense_matrices(shape: str, activation: str, device: str) -> None:
    check(draw(device, activation, **SHAPES[shape]))


@pytest.mark.parametrize(
    ("dtype", "activation"),
    [(torch.bfloat16, name) for name in ACTIVATIONS]
    + [(torch.float16, name) for name in ("positive_exp", "positive_cosine", "truncated_exp")],
)
def test_low_precision_errs_little_more_than_plain_pytorch(dtype: torch.dtype, activation: str, device: str) -> None:
    many = activation in ("positive_exp", "elu1")  # of the blocks of neurons
    problem = draw(
        device, activation, heads=1, keys=130, dim=40, value_dim=40, m=80 if many else 64, dtype=dtype, size=0.5
    )
    check(problem, least=torch.finfo(dtype).eps)


@pytest.mark.parametrize("m", [20, 100])
def test_p_may_be_negative(m: int, device: str) -> None:
    """Then log p is NaN, and output and gradients are what they are."""
    problem = draw(device, "cosine", heads=1, m=m)
    assert dense(problem, torch.float64)["log_p"].isnan().any()
    check(problem)


@pytest.mark.parametrize("activation", ["positive_exp", "truncated_exp", "cosine"])
def test_huge_gains(activation: str, device: str) -> None:
    """Logits in the hundreds neither overflow nor vanish. Truth is float64, with exponents far beyond float32's."""
    problem = draw(device, activation, heads=1, queries=20, keys=150)
    norm = torch.linspace(0.1, 8, 150, device=device)[:, None]
    long = problem._replace(query=problem.query * 8, key=problem.key * norm)
    mine, true = ours(long), dense(long, torch.float64)
    for name in ("out", "log_p", "value"):
        assert error(mine[name], true[name]) < 1e-3, name
    for result in mine.values():
        assert result[~result.isnan()].isfinite().all()


@pytest.mark.parametrize("activation", ["positive_exp", "cosine"])
def test_without_a_real_key_everything_is_zero(activation: str, device: str) -> None:
    problem = draw(device, activation, batch=2, heads=1, m=70)
    mask = torch.ones(2, 63, dtype=torch.bool, device=device)
    mask[1] = False
    mine = ours(problem._replace(key_mask=mask))
    assert not mine["out"][1].any()
    assert (mine["log_p"][1] == -torch.inf).all()
    assert not any(mine[name][1].any() for name in ("query", "key", "value"))
    alone = ours(Problem(*(x[:1] if isinstance(x, Tensor) else x for x in problem)))
    for name in ("out", "log_p", "query", "key", "value", "weight"):
        torch.testing.assert_close(mine[name][:1], alone[name], rtol=1e-4, atol=1e-4, equal_nan=True)


def test_padding_changes_nothing(device: str) -> None:
    problem = draw(device, "positive_exp", keys=80)
    mask = (torch.arange(80) < 63).to(device)[None]
    short = problem._replace(key=problem.key[:, :, :63], value=problem.value[:, :, :63])
    padded, short = ours(problem._replace(key_mask=mask)), ours(short)
    for name in ("key", "value"):
        assert not padded[name][:, :, 63:].any()
        padded[name] = padded[name][:, :, :63]
    for name, result in padded.items():
        torch.testing.assert_close(result, short[name], rtol=1e-5, atol=1e-6)


def test_any_strides(device: str) -> None:
    problem = draw(device, "positive_exp", batch=2, queries=70, keys=70)
    packed = torch.stack(problem[:3], 3).permute(0, 2, 1, 3, 4).contiguous()  # [B, N, H, 3, D], as models have them
    query, key, value = packed.permute(3, 0, 2, 1, 4)
    d_out = problem.d_out[:, :1, :1].expand_as(problem.d_out)
    columns_first = problem.value.mT.contiguous().mT
    plain = ours(problem._replace(d_out=d_out.contiguous()))
    for other in (value, columns_first):
        strided = problem._replace(query=query, key=key, value=other, d_out=d_out)
        for name, result in ours(strided).items():
            assert torch.equal(result, plain[name]), name
    assert ours(problem._replace(query=query))["out"].transpose(1, 2).is_contiguous()


def test_any_number_of_chunks(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = draw(device, "positive_exp", heads=1, queries=100, keys=1100, m=16)
    whole = ours(problem)
    monkeypatch.setattr(static, "CHUNKS", dict.fromkeys(static.CHUNKS, (1, 64)))
    assert static._split("write", 1100, 1, 1, 64, problem.key)[1] > 16  # `combine_kernel` adds 16 at once
    for name, result in ours(problem).items():
        torch.testing.assert_close(result, whole[name], rtol=1e-4, atol=1e-5)


def test_the_same_input_gives_the_same_bits(device: str) -> None:
    problem = draw(device, "positive_exp", heads=1, queries=63, keys=300, m=70, dtype=torch.bfloat16)
    first, second = ours(problem), ours(problem)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_not_asked_for(device: str) -> None:
    problem = draw(device, "positive_exp")
    some = ours(problem._replace(d_log_p=None), with_weight=False)
    assert some["weight"] is None
    every = ours(problem._replace(d_log_p=torch.zeros_like(problem.d_log_p)))
    for name in ("out", "log_p", "query", "key", "value"):
        assert torch.equal(some[name], every[name]), name


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.size = max(self.size, result.numel())
        return result


def test_nothing_as_large_as_all_features(device: str) -> None:
    problem = draw(device, "positive_exp", heads=1, queries=300, keys=500, m=128)
    with Largest() as largest:
        ours(problem)
    assert largest.size < 300 * 128


def test_head_dim_too_large(device: str) -> None:
    with pytest.raises(ValueError, match=r"^head_dim: 257;"):
        ours(draw(device, "positive_exp", dim=257, queries=2, keys=2))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [16, 64, 128, 256])
@pytest.mark.parametrize("m", [64, 1024])
def test_large_on_a_gpu(dim: int, m: int) -> None:
    """Right, and the same bits twice and in a CUDA graph."""
    problem = draw("cuda", "positive_exp", queries=4096, keys=4096, dim=dim, value_dim=dim, m=m, dtype=torch.bfloat16)
    problem = problem._replace(query=problem.query * 0.5, key=problem.key * 0.5)
    check(problem, least=torch.finfo(torch.bfloat16).eps)
    first, second = ours(problem), ours(problem)
    assert all(torch.equal(first[name], second[name]) for name in first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ours(problem)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(first[name], captured[name]) for name in first)


@pytest.mark.gpu
def test_memory_on_a_gpu() -> None:
    """Less than the features alone would take."""
    problem = draw("cuda", "positive_exp", heads=1, queries=2**16, keys=2**16, m=1024, dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours(problem)
    assert torch.cuda.max_memory_allocated() - before < 2**16 * 1024 * problem.key.element_size()


@pytest.mark.slow
def test_compiles_for_a_gpu() -> None:
    """Without a GPU: forward and backward, at the main head dims, for the smallest blocks and an H100."""
    command = [sys.executable, "-m", "tests.gpu_compile", "static D=(32|64|128) m=64 (bfloat16|float32)$"]
    run = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "12 cases, 0 failures" in run.stdout
    assert "wgmma" in run.stdout
