"""The streaming memory of the CPU kernels against plain PyTorch, in float64 and in float32."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from astroattn import AstroConfig, AstrocyteAttention
from astroattn.ops import backends, streaming
from astroattn.ops.native import streaming as native
from astroattn.ops.streaming import ENTRIES, Memory
from tests.core_cases import relative
from tests.native_variants import REFUSAL

pytestmark = pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))

# (batch, key heads, query heads of each, tokens, D, Dv, entries, newest, lengths)
CASES = {
    "one token": (1, 2, 3, 1, 8, 8, 32, 16, None),
    "nothing is merged": (2, 1, 4, 32, 16, 16, 32, 16, None),
    "decoder": (1, 3, 3, 160, 64, 64, 128, 64, None),
    "odd sizes": (2, 2, 5, 90, 17, 5, 64, 30, None),
    "a query head each": (1, 3, 1, 80, 24, 40, 40, 0, None),
    "twelve query heads": (1, 1, 12, 100, 40, 16, 72, 56, None),
    "the smallest": (1, 2, 2, 80, 8, 8, 16, 8, None),
    "as many newest as can be": (1, 1, 2, 90, 8, 8, 64, 56, None),
    "padding": (4, 2, 2, 90, 8, 12, 32, 16, [90, 0, 33, 57]),
    "padding, no row full": (2, 1, 2, 20, 8, 8, 32, 16, [3, 18]),
}


def draw(name: str, scale: float = 1.5) -> tuple[list[Tensor], tuple[int, int], Tensor | None]:
    """Query, key and value, laid out as [batch, tokens, heads, D]; entries and newest; lengths."""
    batch, heads, groups, tokens, dim, columns, entries, newest, lengths = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    shapes = (heads * groups, dim), (heads, dim), (heads, columns)
    query, key, value = (torch.randn(batch, tokens, *s, generator=generator).transpose(1, 2) for s in shapes)
    query = scale * query.unflatten(1, (heads, groups))
    return [query, key, value], (entries, newest), None if lengths is None else torch.tensor(lengths)


@functools.cache
def plain_answer(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Memory]:
    inputs, sizes, lengths = draw(name)
    inputs = [x.to(dtype) for x in inputs]
    return streaming.stream(*inputs, start(inputs), *sizes, lengths)


def start(inputs: list[Tensor]) -> Memory:
    return streaming.empty_memory(*inputs)


def compare_memories(ours: Memory, exact: Memory, *, tolerance: float = 2e-5) -> None:
    """What a sequence has stored; what lies beyond is never read."""
    assert torch.equal(ours.counts, exact.counts)
    assert ours.key.shape[2] == int(exact.counts[:, 0].max())
    for name, mine, theirs in zip(Memory._fields, ours, exact, strict=True):
        assert mine.dtype == (torch.long if name == "counts" else torch.float32)
        for row, stored in enumerate(exact.counts[:, 0].tolist()):
            a, b = (x[row, :, :stored] if name in ENTRIES else x[row] for x in (mine, theirs))
            torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_equal_to_plain_pytorch(name: str, variant: str) -> None:
    inputs, sizes, lengths = draw(name)
    out, log_p, memory = native.stream(*inputs, start(inputs), *sizes, lengths)
    expected, expected_log_p, expected_memory = plain_answer(name, torch.float64)
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(log_p.double(), expected_log_p, rtol=2e-5, atol=2e-5)
    compare_memories(memory, expected_memory)
    if lengths is None:
        assert [x.shape for x in memory] == [x.shape for x in expected_memory]


@pytest.mark.parametrize("soft_cap", [0.3, 3.0, 50.0])
@pytest.mark.parametrize("name", ["decoder", "odd sizes", "a query head each", "padding"])
def test_a_soft_cap(name: str, soft_cap: float, variant: str) -> None:
    inputs, sizes, lengths = draw(name)
    out, log_p, memory = native.stream(*inputs, start(inputs), *sizes, lengths, soft_cap)
    exact = [x.double() for x in inputs]
    expected, expected_log_p, expected_memory = streaming.stream(*exact, start(exact), *sizes, lengths, soft_cap)
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(log_p.double(), expected_log_p, rtol=2e-5, atol=2e-5)
    compare_memories(memory, expected_memory)


@pytest.mark.parametrize("name", ["decoder", "odd sizes", "twelve query heads", "padding"])
def test_it_errs_no_more_than_plain_pytorch(name: str, variant: str) -> None:
    inputs, sizes, lengths = draw(name)
    ours = native.stream(*inputs, start(inputs), *sizes, lengths)[0]
    theirs, expected = (plain_answer(name, dtype)[0] for dtype in (torch.float32, torch.float64))
    assert relative(ours, expected) < relative(theirs, expected) + 1e-7


@pytest.mark.parametrize("name", ["decoder", "odd sizes", "a query head each"])
@pytest.mark.parametrize("cut", [1, 7, 16, 64])
def test_not_a_bit_depends_on_the_cuts(name: str, cut: int, variant: str) -> None:
    (query, key, value), sizes, _ = draw(name)
    expected, expected_log_p, expected_memory = native.stream(query, key, value, start([query, key, value]), *sizes)
    memory, outs, logs = start([query, key, value]), [], []
    for first in range(0, key.shape[2], cut):
        now = slice(first, first + cut)
        out, log_p, memory = native.stream(query[..., now, :], key[:, :, now], value[:, :, now], memory, *sizes)
        outs.append(out)
        logs.append(log_p)
    assert torch.equal(torch.cat(outs, 3), expected)
    assert torch.equal(torch.cat(logs, 3), expected_log_p)
    assert all(map(torch.equal, memory, expected_memory))


def test_rows_of_a_batch_are_what_they_are_alone() -> None:
    inputs, sizes, lengths = draw("padding")
    assert lengths is not None
    out, log_p, memory = native.stream(*inputs, start(inputs), *sizes, lengths)
    more = [x[..., :11, :] for x in draw("padding")[0]]
    after, _, memory = native.stream(*more, memory, *sizes)  # each goes on in its own block
    for row, length in enumerate(lengths.tolist()):
        alone = [x[row : row + 1, ..., :length, :] for x in inputs]
        expected, _, own = native.stream(*alone, start(alone), *sizes)
        assert torch.equal(out[row : row + 1, ..., :length, :], expected)
        assert not out[row, ..., length:, :].any()
        assert (log_p[row, ..., length:] == -torch.inf).all()
        expected, _, own = native.stream(*(x[row : row + 1] for x in more), own, *sizes)
        assert torch.equal(after[row : row + 1], expected)
        assert torch.equal(memory.counts[row : row + 1], own.counts)


def test_threads_and_layout_do_not_matter_and_the_given_memory_stays() -> None:
    inputs, sizes, _ = draw("decoder")
    _, _, memory = native.stream(*inputs, start(inputs), *sizes)
    before = [x.clone() for x in memory]
    out, log_p, first = native.stream(*inputs, memory, *sizes)
    threads = torch.get_num_threads()
    wide = [torch.cat([x, x], -1)[..., : x.shape[-1]] for x in inputs]  # rows further apart
    strided = Memory(*(torch.stack([x, x], -1)[..., 0] for x in memory))
    try:
        for number, other, given in (
            (1, inputs, memory),
            (2, [x.contiguous() for x in inputs], strided),
            (4, wide, memory),
        ):
            torch.set_num_threads(number)
            again = native.stream(*other, given, *sizes)
            assert all(map(torch.equal, (*again[:2], *again[2]), (out, log_p, *first)))
        with torch.device("meta"):  # the caller's default
            again = native.stream(*inputs, memory, *sizes)
        assert torch.equal(again[0], out)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, memory, before))


def test_large_logits_stay_finite(variant: str) -> None:
    inputs, sizes, _ = draw("decoder", scale=100)
    out, log_p, memory = native.stream(*inputs, start(inputs), *sizes)
    assert float(log_p.max()) > 1000
    for x in (out, log_p, *memory):
        assert x.isfinite().all()
    exact = [x.double() for x in inputs]
    expected = streaming.stream(*exact, start(exact), *sizes)[0]
    # the first 128 tokens are softmax; later ones may merge others where costs are alike
    torch.testing.assert_close(out[..., :128, :].double(), expected[..., :128, :], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_no_number_comes_out_as_none_from_where_it_was_on(which: int, number: float, variant: str) -> None:
    inputs, sizes, _ = draw("odd sizes")
    expected = native.stream(*inputs, start(inputs), *sizes)[0]
    head = (0, 0, 0) if which == 0 else (0, 0)
    inputs[which][(*head, 70)] = number
    out = native.stream(*inputs, start(inputs), *sizes)[0]
    assert not out[0, 0, 0, 70].isfinite().any()
    assert torch.equal(out[0, 0, 0, :70], expected[0, 0, 0, :70])  # also of its block
    assert torch.equal(out[1], expected[1])
    assert torch.equal(out[0, 1], expected[0, 1])


def test_values_too_large_to_be_squared_do_no_harm(variant: str) -> None:
    inputs, sizes, _ = draw("a query head each")
    inputs[2] = inputs[2] * 1e30  # every cost is infinite
    out, _, memory = native.stream(*inputs, start(inputs), *sizes)
    assert out.isfinite().all()
    for x in (memory.key, memory.value):
        assert torch.equal(x[:, :, :4], (inputs[1] if x is memory.key else inputs[2])[:, :, :4])  # sinks stay


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_module_takes_the_kernel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = native.stream
    monkeypatch.setattr(native, "stream", lambda *args: calls.append(1) or original(*args))
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(2, h, 100, 16, generator=generator).to(dtype) for h in (6, 2, 2)]
    mask = torch.ones(2, 100, dtype=torch.bool)
    mask[1, :40] = False
    config = {"hidden": "streaming", "entries": 64}
    ours, plain = (AstrocyteAttention(6, 16, AstroConfig(**config, backend=b)) for b in ("auto", "torch"))
    out = ours(*tokens, causal=True, key_mask=mask)
    assert calls
    assert out.dtype == dtype
    torch.testing.assert_close(out, plain(*tokens, causal=True, key_mask=mask))
    calls.clear()
    ours(*(x.double() for x in tokens), causal=True)
    assert not calls


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap, one row after the other
def test_derivatives_are_those_of_plain_pytorch() -> None:
    tokens = [torch.randn(1, h, 60, 8) for h in (6, 2, 2)]
    config = {"hidden": "streaming", "entries": 32}
    found = []
    for backend in ("native", "torch"):
        core = AstrocyteAttention(6, 8, AstroConfig(**config, backend=backend))
        inputs = [x.clone().requires_grad_() for x in tokens]
        out = core(*inputs, causal=True)
        tangent = torch.func.jvp(lambda v, core=core: core(*tokens[:2], v, causal=True), (tokens[2],), (tokens[2],))[1]
        many = torch.vmap(lambda *x, core=core: core(*x, causal=True))(*(torch.stack([x] * 2) for x in tokens))
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs), tangent, many])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    core = AstrocyteAttention(6, 8, AstroConfig(**config))
    value = tokens[2].clone().requires_grad_()
    _, memory = core.decode(*tokens[:2], value)
    core.decode(*tokens, memory)[0].sum().backward()  # through the memory alone
    assert value.grad is not None
    assert value.grad.any()


def test_without_kernels_the_named_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_NO_NATIVE", "they are not built")
    tokens = [torch.randn(1, h, 10, 8) for h in (6, 2, 2)]
    core = AstrocyteAttention(6, 8, AstroConfig(hidden="streaming", entries=32, near=0, backend="native"))
    with pytest.raises(ValueError, match="backend: 'native' cannot run here; they are not built"):
        core.decode(*tokens)
    double = AstrocyteAttention(6, 8, AstroConfig(hidden="streaming", entries=32, backend="native"))
    with pytest.raises(ValueError, match="float64"):
        double.decode(*(x.double() for x in tokens))
