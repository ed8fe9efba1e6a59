"""Registered operators: what PyTorch checks of them, graphs without a break, exports, and which backend is chosen."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from core_cases import EVERY, draw, module, padding_mask, relative
from patching_models import ALL, build
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import astroattn
from astroattn import AstroConfig, AstrocyteAttention
from astroattn.ops import backends
from astroattn.ops.layout import Budget
from astroattn.ops.library import NearFar, linear_attention
from astroattn.ops.native import library as native
from astroattn.ops.plain import near_far_given

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SMALL = AstroConfig(num_hidden=3, near=1, exact_keys=2, tile=4)
# Backends besides "torch", and a configuration that they have kernels for.
KERNELS = {
    "native": (AstroConfig(num_hidden=4, near=2, exact_keys=3, tile=8, backend="native"), False),
    "native, by position": (
        AstroConfig(num_hidden=4, near=6, exact_keys=0, tiles="position", tile=12, backend="native"),
        False,
    ),
    "native linear": (AstroConfig(hidden="random", backend="native"), False),
    "triton": (AstroConfig(num_hidden=4, near=2, exact_keys=3, tile=8, backend="triton"), False),
    "triton linear": (AstroConfig(hidden="random", backend="triton"), False),
    "triton causal": (AstroConfig(hidden="random", near=3, backend="triton"), True),
}


def inputs(tokens: int = 33, dim: int = 16, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [x.to(device).requires_grad_() for x in draw(2, 2, tokens, dim, dtype=dtype)]


def gradients(attend: Callable, qkv: list[Tensor]) -> list[Tensor]:
    """The output, log p, and gradients that go through both."""
    out, log_p = attend(*qkv)
    seen = log_p.isfinite()
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    loss = (out.float() * weight).sum() + log_p[seen].square().mean()
    return [out, log_p.masked_fill(~seen, 0), *torch.autograd.grad(loss, qkv, materialize_grads=True)]


# What PyTorch checks: schema, fakes of the right shapes, strides and dtypes, autograd, tracing with dynamic shapes.


ON_BACKENDS = pytest.mark.parametrize(
    ("backend", "device"), [("native", "cpu"), ("triton", "cpu"), pytest.param("triton", "cuda", marks=pytest.mark.gpu)]
)
# Sequences, of different lengths, a grid, and the memory of [B, N, H, D]: what else than tensors the operators take.
BUDGETS = {
    "sequence": (None, None, 0, 8, True, 1, 3, 4, 1, False, 0),
    "by length": (None, None, 0, -1, True, -1, 3, -1, 1, False, 20_000),
    "lengths": ([33, 9], None, 1, 8, False, 6, 3, 4, 1, False, 100_000),
    "grid": (None, (4, 8), 1, 4, True, 6, 3, 4, 1, False, 500_000),
    "strided": (None, None, 0, 8, False, 1, 0, 4, 1, False, 0),
}
CROSSING = {
    "fewer queries": ([33, 9], None, 0, 8, True, 0, 3, 4, 1, True, 0),
    "more queries": (None, None, 0, -1, False, 0, 3, -1, 1, True, 50_000),
}


def given(case: str, device: str) -> tuple[list[Tensor], tuple]:
    lengths, *rest = (BUDGETS | CROSSING)[case]
    qkv = inputs(33, device=device)
    if case in CROSSING:
        qkv[0] = inputs(14 if case == "fewer queries" else 50, device=device)[0]
    lengths = None if lengths is None else torch.tensor(lengths, device=device)
    return strided(qkv) if case == "strided" else qkv, (lengths, *rest)


@pytest.mark.parametrize(
    ("backend", "device"), [("native", "cpu"), ("torch", "cpu"), pytest.param("torch", "cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("case", BUDGETS | CROSSING)
def test_near_far_operator(case: str, biased: bool, backend: str, device: str) -> None:
    qkv, budget = given(case, device)
    shape = (1, 2, qkv[0].shape[2], 33)
    bias = torch.randn(shape, device=device, requires_grad=case != "grid") if biased else None
    torch.library.opcheck(torch.ops.astroattn.near_far_attention.default, (*qkv, bias, *budget, 0.25, backend))


@pytest.mark.parametrize("alone", [False, True], ids=["", "alone"])
@pytest.mark.parametrize("shape", [(2, 2), (1, 2), (2, 1), (1, 1)])
@pytest.mark.parametrize("attend", [NearFar.apply, torch.ops.astroattn.near_far_attention], ids=["eager", "operator"])
def test_a_bias_of_the_cpu_kernels_has_a_gradient(attend: Callable, shape: tuple[int, int], alone: bool) -> None:
    """That of plain PyTorch given what the kernels chose, in the dtype of the bias; also where it alone wants one."""
    qkv, (lengths, *budget) = given("lengths", "cpu")
    bias = torch.randn(*shape, 33, 33, dtype=torch.bfloat16).requires_grad_()
    out, log_p, *chosen = attend(*(x.requires_grad_(not alone) for x in qkv), bias, lengths, *budget, 0.25, "native")
    exact = [x.detach().double().requires_grad_() for x in (*qkv, bias)]
    expected = near_far_given(*exact, *chosen, lengths, Budget(*budget), 0.25)
    d_out, d_log_p = torch.randn_like(out), torch.randn_like(log_p).masked_fill(log_p.isinf(), 0)
    first = 3 * alone
    ours = torch.autograd.grad((out, log_p), (*qkv, bias)[first:], (d_out, d_log_p))
    theirs = torch.autograd.grad(expected, exact[first:], (d_out.double(), d_log_p.double()))
    assert [x.dtype for x in ours] == [x.dtype for x in (*qkv, bias)[first:]]
    for mine, other in zip(ours, theirs, strict=True):
        assert relative(mine, other) < (4e-3 if mine.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", BUDGETS)
def test_near_linear_operator(case: str, device: str) -> None:
    qkv, budget = given(case, device)
    weight, phase = (x.to(device) for x in layer())
    args = (*qkv, weight.requires_grad_(case != "grid"), phase, *budget[:-4], 0, 1, False, 0, "positive_exp", 0.25)
    torch.library.opcheck(torch.ops.astroattn.near_linear_attention.default, args)


@ON_BACKENDS
@pytest.mark.parametrize("masked", [False, True])
def test_linear_operator(masked: bool, backend: str, device: str) -> None:
    weight, phase = (x.to(device) for x in layer())
    mask = padding_mask(22)[:2].to(device) if masked else None
    qkv = strided(inputs(22, device=device)) if masked else inputs(22, device=device)
    args = (*qkv, weight.requires_grad_(masked), phase, mask, "positive_exp", 0.5, backend)
    torch.library.opcheck(torch.ops.astroattn.linear_attention.default, args)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("near", [0, 3])
def test_causal_operator(backend: str, near: int, device: str) -> None:
    weight, phase = (x.to(device) for x in layer())
    mask = padding_mask(22)[:2].to(device) if near else None
    args = (
        *inputs(22, device=device),
        weight.requires_grad_(bool(near)),
        phase,
        mask,
        "positive_exp",
        near,
        0.5,
        backend,
    )
    torch.library.opcheck(torch.ops.astroattn.causal_attention.default, args)


def strided(tensors: list[Tensor]) -> list[Tensor]:
    """The same numbers in the memory of [B, N, H, D], as models have them."""
    return [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in tensors]


def layer(heads: int = 2, m: int = 8, dim: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randn(1, heads, m, dim), torch.rand(1, heads, m)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_used_and_agree_with_plain_pytorch(
    name: str, masked: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, causal = KERNELS[name]
    if device == "cuda" and config.backend == "native":
        pytest.skip("kernels for the CPU")
    qkv, mask = inputs(25, device=device), padding_mask(25)[:2].to(device) if masked else None
    attention = module(config, dim=16).to(device)
    plain = module(dataclasses.replace(config, backend="torch"), dim=16).to(device)
    theirs = gradients(lambda *x: plain.with_normaliser(*x, key_mask=mask, causal=causal), qkv)
    monkeypatch.setattr("astroattn.ops.library.plain", None)
    ours = gradients(lambda *x: attention.with_normaliser(*x, key_mask=mask, causal=causal), qkv)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("near", [0, 3])
def test_kernels_decode(near: int, device: str) -> None:
    """As plain PyTorch does, with states that either can go on from; where a gradient is wanted, by plain PyTorch."""
    config = AstroConfig(hidden="random", near=near, backend="triton")
    kernels, plain = (
        module(dataclasses.replace(config, backend=name), dim=16).to(device) for name in ("triton", "torch")
    )
    qkv, mask = [x.detach() for x in inputs(9, device=device)], torch.ones(2, 9, dtype=torch.bool, device=device)
    mask[0, :2] = False
    whole = plain(*qkv, causal=True, key_mask=mask)
    state = None
    for attention, part in ((plain, slice(0, 4)), (kernels, slice(4, 5)), (kernels, slice(5, 8)), (plain, slice(8, 9))):
        piece = [x[:, :, part] for x in qkv]
        out, state = attention.decode(*piece, state, key_mask=mask[:, part])
        torch.testing.assert_close(out, whole[:, :, part], rtol=1e-3, atol=2e-4)
    assert kernels.decode(*inputs(9, device=device))[0].requires_grad


# Graphs.


@pytest.mark.parametrize(
    "name",
    [
        "hebbian",
        "hebbian, by position, plain",
        "hebbian, exact queries",
        "hebbian, by length",
        "hebbian, by length, plain",
        "near alone",
        "random",
        "random, near",
        "random, content",
        "causal",
        "causal, near",
    ],
)
def test_one_graph_for_every_length(name: str) -> None:
    """fullgraph, forward and backward, and no second compilation for other lengths."""
    config, causal = EVERY[name]
    attention, counter = module(config, dim=16), torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(attention.with_normaliser, backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for tokens in (50, 71, 190):
        qkv = inputs(tokens)
        ours, theirs = (
            gradients(lambda *x, f=f: f(*x, causal=causal), qkv) for f in (compiled, attention.with_normaliser)
        )
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("config", [SMALL, AstroConfig(hidden="random")], ids=["hebbian", "random"])
def test_inductor(config: AstroConfig) -> None:
    attention, qkv = module(config, dim=16), inputs()
    torch.compiler.reset()
    compiled = torch.compile(attention.with_normaliser, fullgraph=True)
    for mine, other in zip(gradients(compiled, qkv), gradients(attention.with_normaliser, qkv), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


MODELS = {
    "bert": SMALL,
    "bert, plain": dataclasses.replace(SMALL, backend="torch"),
    "bert, random": AstroConfig(hidden="random"),
    "vit": SMALL,
    "timm vit": SMALL,
    "timm vit, random, near": AstroConfig(hidden="random", near=4, exact_keys=2),
    "bert, random, near": AstroConfig(hidden="random", near=2, exact_keys=2),
    "gpt2": AstroConfig(hidden="random"),
    "llama": AstroConfig(hidden="random", near=4),
}


def patched_model(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    tiny = ALL[name.split(",")[0]]
    model = build(tiny)
    astroattn.patch(model, MODELS[name])
    return model, tiny.inputs()


def tensors(result: object) -> list[Tensor]:
    values = [result] if isinstance(result, Tensor) else list(result.values())
    return [each for each in values if isinstance(each, Tensor) and each.is_floating_point()]


@pytest.mark.parametrize("name", MODELS)
def test_a_patched_model_is_one_graph(name: str) -> None:
    model, given = patched_model(name)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = tensors(model(**given))
        for mine, other in zip(tensors(compiled(**given)), expected, strict=True):
            torch.testing.assert_close(mine, other)
        astroattn.unpatch(model)
        assert relative(tensors(model(**given))[0], expected[0]) > 1e-4


@pytest.mark.parametrize("name", ["bert", "bert, random", "bert, random, near", "timm vit", "gpt2"])
def test_a_patched_model_is_exported(name: str) -> None:
    model, given = patched_model(name)
    given |= {"use_cache": False} if name == "gpt2" else {}
    with torch.no_grad():
        expected = tensors(model(**given))
    program = torch.export.export(model, (), given)
    for mine, other in zip(tensors(program.module()(**given)), expected, strict=True):
        torch.testing.assert_close(mine, other)
    operators = {str(node.target) for node in program.graph.nodes}
    assert any(each.startswith("astroattn.") for each in operators)


def test_a_patched_model_is_trained_in_one_graph() -> None:
    model, given = patched_model("bert")
    plain = torch.autograd.grad(model(**given)[0].square().sum(), model.parameters(), materialize_grads=True)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ours = torch.autograd.grad(compiled(**given)[0].square().sum(), model.parameters(), materialize_grads=True)
    for mine, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


# Around a module: autocast, checkpointing, functional use, higher derivatives, CUDA graphs.


@pytest.mark.parametrize("name", ["native", "native linear", "triton linear"])
def test_autocast_and_checkpointing(name: str) -> None:
    config, causal = KERNELS[name]
    attention, qkv = module(config, dim=16), inputs()

    def project(*x: Tensor) -> tuple[Tensor, Tensor]:
        """Products that autocast rounds come before attention, as in a model."""
        return attention.with_normaliser(*(each @ torch.eye(16) for each in x), causal=causal)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = gradients(project, qkv)
        again = gradients(lambda *x: checkpoint(project, *x, use_reentrant=False), qkv)
    assert cast[0].dtype == torch.bfloat16
    assert cast[1].dtype == torch.float32
    assert torch.equal(cast[0], attention(*(x.bfloat16() for x in qkv), causal=causal))
    for mine, other in zip(again, cast, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["hebbian", "hebbian, plain", "random", "causal, near"])
def test_functional_use(name: str) -> None:
    """torch.func.grad and functional_call give what autograd gives."""
    config, causal = EVERY[name]
    attention, qkv = module(config), inputs(dim=8)

    def loss(*x: Tensor) -> Tensor:
        return torch.func.functional_call(attention, {}, x, {"causal": causal}).square().sum()

    expected = torch.autograd.grad(attention(*qkv, causal=causal).square().sum(), qkv)
    for mine, other in zip(torch.func.grad(loss, (0, 1, 2))(*(x.detach() for x in qkv)), expected, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("config", [SMALL, AstroConfig(hidden="random")], ids=["hebbian", "random"])
def test_plain_pytorch_has_second_derivatives(config: AstroConfig) -> None:
    attention = module(dataclasses.replace(config, backend="torch"), 1, 2)
    qkv = [x.requires_grad_() for x in draw(1, 1, 9, 2, scale=0.5)]
    assert torch.autograd.gradgradcheck(lambda v: attention(*qkv[:2], v), qkv[2:])


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in KERNELS if not name.startswith("native")])
def test_cuda_graphs(name: str) -> None:
    config, causal = KERNELS[name]
    attention, qkv = module(config, dim=16).cuda(), [x.detach() for x in inputs(197, device="cuda")]
    with torch.no_grad():
        attention(*qkv, causal=causal)  # compiles the kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = attention(*qkv, causal=causal)
        for x in qkv:
            x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(captured, attention(*qkv, causal=causal))


# Which backend.


def test_a_named_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(
        name: str, config: AstroConfig, dtype: torch.dtype = torch.float32, dim: int = 16, causal: bool = False
    ) -> str:
        with pytest.raises(ValueError, match=f"^backend: '{name}' cannot run here; ") as raised:
            module(dataclasses.replace(config, backend=name), dim=dim)(*inputs(dim=dim, dtype=dtype), causal=causal)
        return str(raised.value)

    random, near = AstroConfig(hidden="random"), AstroConfig(hidden="random", near=4)
    assert "no kernel for this attention (causal)" in reason("native", random, causal=True)
    assert "(near_linear)" in reason("triton", near)
    assert "not torch.float64" in reason("native", SMALL, torch.float64)
    assert "at most 256, not 257" in reason("triton", SMALL, dim=257)
    assert "not torch.float64" in reason("triton", random, torch.float64)
    assert "at most 256, not 257" in reason("triton", random, dim=257)
    monkeypatch.setattr(backends, "_INTERPRETED", False)
    assert "CUDA device, not on cpu" in reason("triton", random)
    monkeypatch.setattr(backends, "_TRITON", False)
    assert "triton is not installed" in reason("triton", random)
    monkeypatch.setattr(backends, "_NO_NATIVE", "they were not built")
    assert "they were not built" in reason("native", SMALL)


def test_auto_without_the_cpu_kernels_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, (weight, phase) = inputs(), layer()
    given = {"activation": "positive_exp", "scale": 0.25}
    expected = linear_attention(*qkv, weight, phase, backend="torch", **given)
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(backends, "_NO_NATIVE", native._library.__wrapped__())
    monkeypatch.setattr(backends, "_warned", False)
    with pytest.warns(UserWarning, match=r"plain PyTorch stands in .* not built; install a C\+\+ compiler"):
        ours = linear_attention(*qkv, weight, phase, **given)
    assert torch.equal(ours[0], expected[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_attention(*qkv, weight, phase, **given)
        module(AstroConfig(backend="torch"))(*draw(1, 2, 40, 8))


@pytest.mark.parametrize(
    ("operation", "dtype", "expected"),
    [
        ("near_far", torch.float64, "torch"),
        ("near_far", torch.float32, "native"),
        ("linear", torch.bfloat16, "native"),
        ("causal", torch.float32, "torch"),
        ("near_linear", torch.float32, "torch"),
    ],
)
def test_auto_on_a_cpu(operation: str, dtype: torch.dtype, expected: str) -> None:
    query, value = draw(1, 1, 4, 4, count=2, dtype=dtype)
    assert backends.choose_backend("auto", operation, query, value) == expected


@pytest.mark.parametrize("backend", ["native", "torch", "triton"])
def test_a_short_row_of_a_batch_is_exact(backend: str) -> None:
    """Where the length decides it has all of its keys, more than a sub-tile of the longest row has."""
    query, key, value = draw(2, 2, 133, 16, dtype=torch.float32)
    real = torch.arange(133) < torch.tensor([[67], [133]])
    out = AstrocyteAttention(2, 16, AstroConfig(backend=backend))(query, key, value, key_mask=real)
    expected = torch.nn.functional.scaled_dot_product_attention(*(x[:1, :, :67] for x in (query, key, value)))
    assert relative(out[:1, :, :67], expected) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", backends.DTYPES, ids=str)
def test_auto_on_a_gpu_is_triton(dtype: torch.dtype) -> None:
    query, value = (x.cuda() for x in draw(1, 1, 4, 4, count=2, dtype=dtype))
    for operation in ("near_far", "linear", "causal", "streaming"):
        assert backends.choose_backend("auto", operation, query, value) == "triton"
    assert backends.choose_backend("auto", "near_linear", query, value) == "torch"


@pytest.mark.parametrize(
    ("hip", "capability", "reason"),
    [("6.4", (9, 0), "ROCm"), (None, (7, 5), "Tesla T4 has 7.5"), (None, (8, 0), None), (None, (12, 0), None)],
)
def test_gpus_that_are_not_served(
    hip: str | None, capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused by name, and under "auto" plain PyTorch stands in and says so once."""
    major, minor = capability
    found = SimpleNamespace(major=major, minor=minor, name="Tesla T4")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    monkeypatch.setattr(backends, "_TRITON", True)
    monkeypatch.setattr(backends, "_warned", False)
    tensor: Any = SimpleNamespace(dtype=torch.float32, device="cuda:0", is_cuda=True, shape=(1, 1, 4, 4))
    if reason is None:
        assert backends.choose_backend("auto", "linear", tensor, tensor) == "triton"
        tensor.shape = (1, 1, 4, 256)
        assert backends.choose_backend("auto", "near_far", tensor, tensor) == "triton"
        expected = "torch" if capability == (12, 0) else "triton"  # by shared memory
        assert backends.choose_backend("auto", "causal", tensor, tensor) == expected
        return
    with pytest.raises(ValueError, match=reason):
        backends.choose_backend("triton", "linear", tensor, tensor)
    with pytest.warns(UserWarning, match=f"stands in for the GPU kernels.*{reason}"):
        assert backends.choose_backend("auto", "linear", tensor, tensor) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose_backend("auto", "causal", tensor, tensor) == "torch"


def test_native_is_used_by_the_default_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("astroattn.ops.library.plain", None)
    assert AstrocyteAttention(2, 16)(*inputs(150)).isfinite().all()
