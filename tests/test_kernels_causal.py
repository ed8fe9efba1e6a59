"""Triton kernels of causal attention through a static hidden layer: against dense matrices in float64, and PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from astroattn.config import ACTIVATIONS
from astroattn.ops.causal import causal_linear_attention
from astroattn.ops.reference import feature_attention
from astroattn.ops.static import Hidden

pytest.importorskip("triton")

from astroattn.ops.kernels import causal
from astroattn.ops.kernels.causal import (
    Blocks,
    causal_attention_backward,
    causal_attention_forward,
    new_state,
    recurrent_step,
)

NAMES = ("out", "log_p", "query", "key", "value", "weight")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small blocks and chunks, so that short sequences have several."""
    sizes = {key: Blocks(32, 16, 4, 1) for key in causal.FORWARD}
    monkeypatch.setattr(causal, "TABLE", {"forward": sizes, "backward": sizes})
    monkeypatch.setattr(causal, "LEAST_CHUNK", 32)
    monkeypatch.setattr(causal, "MOST_CHUNK", 32)
    causal._options_for.cache_clear()
    yield
    causal._options_for.cache_clear()


class Problem(NamedTuple):
    """Inputs, and weights of the sum of results that is differentiated."""

    query: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    phase: Tensor
    key_mask: Tensor | None
    activation: str
    near: int
    scale_root: float
    d_out: Tensor
    d_log_p: Tensor


def draw(
    device: str,
    activation: str = "positive_exp",
    *,
    batch: int = 1,
    heads: int = 1,
    tokens: int = 63,
    near: int = 5,
    dim: int = 12,
    value_dim: int = 12,
    m: int = 20,
    masked: bool = False,
    own_weights: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Problem:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    layers = batch if own_weights else 1
    real = torch.rand(batch, tokens) < 0.6
    real[0, :20] = False  # longer than a near field and a block
    return Problem(
        normal(batch, heads, tokens, dim).to(device, dtype),
        normal(batch, heads, tokens, dim).to(device, dtype),
        normal(batch, heads, tokens, value_dim).to(device, dtype),
        normal(layers, heads, m, dim).to(device, dtype),
        (torch.rand(layers, heads, m) * 6.28).to(device, dtype),
        real.to(device) if masked else None,
        activation,
        near,
        dim**-0.25,
        normal(batch, heads, tokens, value_dim).to(device, dtype),
        normal(batch, heads, tokens).to(device, torch.float32),
    )


def ours(problem: Problem) -> dict[str, Tensor]:
    """The kernels' results and gradients."""
    inputs = problem[:-2]
    out, log_p, _ = causal_attention_forward(*inputs)
    grads = causal_attention_backward(*problem[-2:], *inputs, out, log_p)
    return dict(zip(NAMES, (out, log_p, *grads), strict=True))


def flat(problem: Problem, leaves: list[Tensor]) -> tuple[list[Tensor], Hidden]:
    """Queries, keys, values and the layer, flattened over batch and heads."""
    q, k, v = (x.flatten(0, 1) for x in (leaves[0] * problem.scale_root, leaves[1] * problem.scale_root, leaves[2]))
    layer = (x.expand(len(leaves[0]), *x.shape[1:]).flatten(0, 1) for x in (leaves[3], problem.phase.to(q.dtype)))
    return [q, k, v], Hidden(*layer, problem.activation)


def dense(problem: Problem, leaves: list[Tensor]) -> tuple[Tensor, Tensor]:
    """By full matrices; zeros and -inf where no key has come yet."""
    qkv, layer = flat(problem, leaves)
    tokens = problem.query.shape[2]
    seen = torch.ones(len(qkv[0]), tokens, tokens, dtype=torch.bool, device=qkv[0].device).tril()
    exact = seen & ~seen.tril(-problem.near) if problem.near else torch.zeros_like(seen)
    if problem.key_mask is not None:
        seen = seen & problem.key_mask.repeat_interleave(problem.query.shape[1], 0)[:, None]
    some = seen.any(-1)
    out, log_p = feature_attention(*qkv, *layer, exact, seen | ~some[..., None])
    return out.masked_fill(~some[..., None], 0), log_p.masked_fill(~some, -torch.inf)


def plain(problem: Problem, leaves: list[Tensor]) -> tuple[Tensor, Tensor]:
    """By `ops.causal`, one token after the other, which can neither overflow nor underflow."""
    qkv, layer = flat(problem, leaves)
    real = None if problem.key_mask is None else problem.key_mask.repeat_interleave(problem.query.shape[1], 0)
    return causal_linear_attention(*qkv, layer, near=problem.near, key_mask=real, chunk=1)[:2]


def differentiated(problem: Problem, attend: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Results and gradients of PyTorch."""
    leaves = [x.to(dtype).requires_grad_() for x in problem[:4]]
    out, log_p = (x.unflatten(0, problem.query.shape[:2]) for x in attend(problem, leaves))
    some = log_p != -torch.inf
    total = (out * problem.d_out.to(dtype)).sum() + (log_p * problem.d_log_p.to(dtype))[some].sum()
    grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return {name: x.detach() for name, x in zip(NAMES, (out, log_p, *grads), strict=True)}


def error(x: Tensor, true: Tensor) -> float:
    """L2 error relative to the truth, over what is finite there."""
    some = true.isfinite()
    true = true[some]
    return float((x.double()[some] - true).norm() / true.norm().clamp(min=1e-30))


def check(problem: Problem, least: float = 2e-6) -> None:
    """Not more than twice the error of PyTorch in the same precision, thrice for gradients, or `least`.

    Of PyTorch's two ways the worse counts: where features change signs and a row's sum almost cancels, either may be
    right by luck.
    """
    mine = ours(problem)
    true = differentiated(problem, dense, torch.float64)
    others = [differentiated(problem, way, problem.query.dtype) for way in (dense, plain)]
    assert torch.equal(mine["log_p"].isnan(), true["log_p"].isnan())
    assert torch.equal(mine["log_p"] == -torch.inf, true["log_p"] == -torch.inf)
    for name, result in mine.items():
        assert result.dtype == (torch.float32 if name == "log_p" else problem.query.dtype)
        factor = 2 if name in ("out", "log_p") else 3
        bounds = [factor * error(other[name], true[name]) for other in others]
        assert error(result, true[name]) <= max(least, *bounds), name  # plain float16 may be NaN, which max passes over


SHAPES = {
    "one token": {"tokens": 1, "near": 0, "m": 5},
    "one token, near": {"tokens": 1, "near": 3, "dim": 64, "value_dim": 16},
    "nothing near": {"tokens": 40, "near": 0, "m": 40, "masked": True},
    "itself near": {"batch": 2, "heads": 2, "tokens": 20, "near": 1, "value_dim": 21},
    "two chunks near": {"near": 70, "tokens": 63, "masked": True},
    "masked": {"tokens": 40, "m": 40, "masked": True},
    "own weights": {"batch": 2, "heads": 1, "tokens": 20, "m": 70, "own_weights": True, "masked": True},
    "long": {"tokens": 197, "near": 3, "dim": 24, "m": 12},
}
ALSO = {"nothing near": ("positive_exp", "cosine", "elu1"), "masked": ACTIVATIONS}
CASES = [(shape, activation) for shape in SHAPES for activation in ALSO.get(shape, ("positive_exp",))]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("shape", "activation"), CASES)
def test_equals_dense_matrices(shape: str, activation: str, device: str) -> None:
    check(draw(device, activation, **SHAPES[shape]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["positive_exp", "elu1"])
def test_in_every_dtype(dtype: torch.dtype, activation: str, device: str) -> None:
    """With the blocks that a GPU gets."""
    check(draw(device, activation, tokens=70, near=40, dim=40, value_dim=48, m=33, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "m"), [(64, 64), (64, 300), (128, 64), (256, 64)])
def test_several_chunks(dtype: torch.dtype, dim: int, m: int) -> None:
    """With the blocks and chunks that a GPU gets."""
    problem = draw("cuda", heads=2, tokens=1500, near=100, dim=dim, value_dim=dim, m=m, masked=True, dtype=dtype)
    check(problem, least=2e-3 if dtype == torch.float16 else 1e-5)


@pytest.mark.gpu
def test_a_cuda_graph_repeats_steps() -> None:
    problem = draw("cuda", heads=2, tokens=20, near=4)
    layer = (*problem[3:5], None, *problem[6:9])
    out, _, _ = causal_attention_forward(*problem[:-2])
    state = new_state(problem.key, problem.value, 20, 4)
    now = [x[:, :, :1].clone() for x in problem[:3]]
    recurrent_step(*now, *layer, new_state(problem.key, problem.value, 20, 4))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, _ = recurrent_step(*now, *layer, state)
    for token in range(20):
        for x, tokens in zip(now, problem[:3], strict=True):
            x.copy_(tokens[:, :, token : token + 1])
        graph.replay()
        torch.testing.assert_close(found, out[:, :, token : token + 1], rtol=2e-5, atol=2e-5)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("near", "masked"), [(0, False), (1, False), (5, False), (5, True)])
def test_huge_gains(near: int, masked: bool, device: str) -> None:
    """Tokens of very different norms: a later key must not drown what an earlier query sees (it underflows)."""
    problem = draw(device, tokens=40, near=near, dim=6, masked=masked)
    norm = torch.tensor([30.0, 1.0, 12.0, 0.1, 20.0], device=device)[torch.arange(40) % 5]
    norm[:2] = torch.tensor([40.0, 30.0])
    problem = problem._replace(key=problem.key * norm[:, None])
    mine, true = ours(problem), differentiated(problem, plain, torch.float64)
    for name, result in mine.items():
        assert error(result, true[name]) < 1e-3, name
    seen = mine["log_p"] > -torch.inf
    assert mine["out"].abs().sum(-1)[seen].all()  # no query reads nothing
    first = int(problem.key_mask[0].nonzero()[0]) if masked else 0
    torch.testing.assert_close(mine["out"][0, 0, first], problem.value[0, 0, first])  # it sees itself alone


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("near", "masked"), [(0, False), (0, True), (1, True), (2, False), (9, True), (40, False)])
def test_is_continued_from_its_state(near: int, masked: bool, device: str) -> None:
    """In some calls, and one token after the other; with the state that PyTorch comes to."""
    m = 40 if near == 2 else 20
    problem = draw(device, "elu1" if near == 1 else "positive_exp", batch=2, tokens=37, near=near, m=m, masked=masked)
    inputs = problem[:-2]
    out, log_p, state = causal_attention_forward(*inputs)

    def part(start: int, stop: int) -> tuple:
        mask = None if problem.key_mask is None else problem.key_mask[:, start:stop]
        return *(x[:, :, start:stop] for x in problem[:3]), *problem[3:5], mask, *inputs[6:]

    pieces, now = [], None
    for start, stop in ((0, 1), (1, 4), (4, 36), (36, 37)):
        *results, now = causal_attention_forward(*part(start, stop), now)
        pieces.append(results)
    steps, moved = [], new_state(problem.key, problem.value, m, near)
    for token in range(37):
        steps.append(recurrent_step(*part(token, token + 1), moved))
    for results, last in ((pieces, now), (steps, moved)):
        for i, whole in enumerate((out, log_p)):
            found = torch.cat([each[i] for each in results], 2)
            torch.testing.assert_close(found, whole, rtol=2e-5, atol=2e-5, equal_nan=True)
        for mine, other in zip(last, state, strict=True):
            torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-5)

    qkv, layer = flat(problem, list(problem[:4]))
    *_, theirs = causal_linear_attention(*qkv, layer, near=near, key_mask=problem.key_mask)
    real = state.real.flatten(0, 1)
    assert torch.equal(real, theirs.real)
    torch.testing.assert_close(state.top.flatten(0, 1), theirs.top[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.kv_state.flatten(0, 1), theirs.kv_state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.z_state.flatten(0, 1), theirs.z_state, rtol=1e-4, atol=1e-4)
    recent = state.key.flatten(0, 1) * problem.scale_root
    torch.testing.assert_close(recent[real], theirs.key[real])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_step_in_low_precision(dtype: torch.dtype, device: str) -> None:
    problem = draw(device, tokens=20, near=3, dtype=dtype)
    state = new_state(problem.key, problem.value, 20, 3)
    steps = [
        recurrent_step(*(x[:, :, i : i + 1] for x in problem[:3]), *problem[3:5], None, *problem[6:9], state)[0]
        for i in range(20)
    ]
    true, other = (differentiated(problem, dense, kind)["out"] for kind in (torch.float64, dtype))
    assert error(torch.cat(steps, 2), true) <= 2 * error(other, true)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("near", [0, 5])
def test_a_later_token_changes_no_earlier_output(near: int, device: str) -> None:
    problem = draw(device, near=near)
    inputs = problem[:-2]
    before = causal_attention_forward(*inputs)[:2]
    for later, scale in ((40, 1.0), (40, 40.0), (1, 30.0)):
        changed = [x.clone() for x in problem[:3]]
        for x in changed:
            x[:, :, later:] = torch.randn_like(x[:, :, later:]) * scale
        after = causal_attention_forward(*changed, *inputs[3:])[:2]
        for mine, other in zip(after, before, strict=True):
            torch.testing.assert_close(mine[:, :, :later], other[:, :, :later], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small")
def test_equal_inputs_give_equal_bits(device: str) -> None:
    problem = draw(device, heads=2, m=40, masked=True)
    for first, second in zip(ours(problem).values(), ours(problem).values(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.usefixtures("small")
def test_strides_do_not_matter(device: str) -> None:
    problem = draw(device, batch=2, heads=2, tokens=20)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in problem[:3]]
    strided[1] = problem.key.mT.contiguous().mT  # the last stride is not 1
    other = ours(
        Problem(*strided, *problem[3:-2], problem.d_out.mT.contiguous().mT, problem.d_log_p.mT.contiguous().mT)
    )
    for name, result in ours(problem).items():
        assert torch.equal(result, other[name])


def test_log_p_need_not_be_used(device: str) -> None:
    problem = draw(device, tokens=20)
    inputs = problem[:-2]
    out, log_p, state = causal_attention_forward(*inputs, with_state=False)
    assert state is None
    unused = causal_attention_backward(problem.d_out, None, *inputs, out, log_p, with_weight=False)
    zero = causal_attention_backward(problem.d_out, torch.zeros_like(log_p), *inputs, out, log_p)
    assert unused[3] is None
    assert all(torch.equal(*pair) for pair in zip(unused[:3], zero[:3], strict=True))


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


def test_nothing_of_size_tokens_times_neurons_is_stored(device: str) -> None:
    problem = draw(device, tokens=300, near=3, dim=2, value_dim=2, m=64)
    with LargestTensor() as largest:
        ours(problem)
    assert 300 * 2 <= largest.numbers < 300 * 64 / 4


def test_what_cannot_be_computed_is_refused(device: str) -> None:
    problem = draw(device, tokens=2, near=3)
    *_, state = causal_attention_forward(*problem[:-2])
    with pytest.raises(ValueError, match=r"^near: 4; the state keeps the latest 2 keys, not 3"):
        causal_attention_forward(*problem[:7], 4, 1.0, state)
    one = [x[:, :, :1] for x in problem[:3]]
    with pytest.raises(ValueError, match=r"^near: 0; the state keeps the latest 2 keys, not 0"):
        recurrent_step(*one, *problem[3:7], 0, 1.0, state)
    with pytest.raises(ValueError, match=r"^query: 2 tokens;"):
        recurrent_step(*problem[:-2], state)
    wide = draw(device, tokens=2, dim=257)
    with pytest.raises(ValueError, match=r"^head_dim: 257; the kernels take at most 256"):
        causal_attention_forward(*wide[:-2])
