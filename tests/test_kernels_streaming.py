"""Triton kernels of the streaming memory: against plain PyTorch, in float64, which decides the same where none tie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from astroattn import AstroConfig, AstrocyteAttention
from astroattn.ops import streaming as plain
from astroattn.ops.streaming import ENTRIES, Memory, empty_memory

pytest.importorskip("triton")

from astroattn.ops.kernels import streaming
from astroattn.ops.kernels.streaming import close_memory, open_memory, stream, stream_in_place


class Tokens(NamedTuple):
    """[B, H, G, N, D], [B, H, N, D], [B, H, N, Dv]."""

    query: Tensor
    key: Tensor
    value: Tensor

    def part(self, start: int, stop: int) -> Tokens:
        return Tokens(*(x[..., start:stop, :] for x in self))


def draw(
    device: str,
    count: int,
    *,
    batch: int = 1,
    heads: int = 1,
    groups: int = 1,
    dim: int = 8,
    columns: int = 8,
    dtype: torch.dtype = torch.float32,
) -> Tokens:
    shapes = ((heads, groups, count, dim), (heads, count, dim), (heads, count, columns))
    query, key, value = (torch.randn(batch, *shape).to(device, dtype) for shape in shapes)
    return Tokens(1.5 * query, key, value)


def check(
    found: tuple[Tensor, Tensor, Memory], expected: tuple[Tensor, Tensor, Memory], tolerance: float = 2e-5
) -> None:
    """The same outputs, and the same memory as far as it is stored."""
    close = {"rtol": tolerance, "atol": tolerance}
    for mine, true in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(mine.double(), true, **close)
    check_memory(found[2], expected[2])


def check_memory(found: Memory, expected: Memory) -> None:
    assert torch.equal(found.counts, expected.counts)
    stored = expected.counts[:, 0].tolist()
    assert found.key.shape[2] == max(stored)
    for name, true in expected._asdict().items():
        mine = getattr(found, name)
        pairs = [(mine, true)]
        if name in ENTRIES:
            pairs = [(mine[row, :, :count], true[row, :, :count]) for row, count in enumerate(stored)]
        for pair in pairs:
            torch.testing.assert_close(pair[0].to(pair[1].dtype), pair[1], rtol=2e-5, atol=2e-5, msg=f"memory: {name}")


def double(tokens: Tokens) -> Tokens:
    return Tokens(*(x.double() for x in tokens))


CASES: dict[str, tuple[int, int, int, dict[str, int], list[int] | None]] = {  # tokens, entries, newest, shape, lengths
    "less than a block": (3, 16, 4, {}, None),
    "several key heads": (21, 16, 4, {"heads": 2}, None),
    "three query heads, odd sizes, padding": (50, 32, 16, {"batch": 2, "groups": 3, "dim": 9, "columns": 5}, [50, 23]),
    "blocks of eight, many query heads": (66, 64, 24, {"groups": 17, "dim": 6}, None),
    "several tiles and parts": (70, 64, 16, {"dim": 40, "columns": 33}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_plain_pytorch(case: str, device: str) -> None:
    count, entries, newest, shape, lengths = CASES[case]
    tokens = draw(device, count, **shape)
    real = None if lengths is None else torch.tensor(lengths)
    expected = plain.stream(*double(tokens), empty_memory(*double(tokens)), entries, newest, real)
    check(stream(*tokens, empty_memory(*tokens), entries, newest, real), expected)


@pytest.mark.parametrize("soft_cap", [0.5, 20.0])
def test_a_soft_cap(soft_cap: float, device: str) -> None:
    tokens = draw(device, 50, batch=2, groups=3, dim=9, columns=5)
    real = torch.tensor([50, 23])
    expected = plain.stream(*double(tokens), empty_memory(*double(tokens)), 32, 16, real, soft_cap)
    check(stream(*tokens, empty_memory(*tokens), 32, 16, real, soft_cap), expected)


def test_goes_on_from_a_given_memory_and_leaves_it(device: str) -> None:
    """One that plain PyTorch has made, of rows in different blocks, of which one gets no token."""
    before, tokens = draw(device, 30, batch=3), draw(device, 13, batch=3)
    first, more = torch.tensor([30, 7, 18]), torch.tensor([9, 13, 0])
    true = plain.stream(*double(before), empty_memory(*double(before)), 16, 4, first)[2]
    given = Memory(*(x.to(torch.float32) if x.is_floating_point() else x for x in true))
    copy = Memory(*(x.clone() for x in given))
    check(stream(*tokens, given, 16, 4, more), plain.stream(*double(tokens), true, 16, 4, more))
    for mine, other in zip(given, copy, strict=True):
        assert torch.equal(mine, other)


def test_steps_in_place_are_the_stream(device: str) -> None:
    """With rows in different blocks; nothing else moves on the buffers."""
    tokens = draw(device, 26, batch=2, groups=2)
    memory = stream(*tokens.part(0, 6), empty_memory(*tokens), 16, 4, torch.tensor([6, 3]))[2]
    expected = plain.stream(*double(tokens.part(6, 26)), Memory(*_doubled(memory)), 16, 4)
    buffers = open_memory(memory, 16)
    places = [x.data_ptr() for x in buffers]
    steps = [stream_in_place(*tokens.part(i, i + 1), buffers, 4) for i in range(6, 26)]
    assert [x.data_ptr() for x in buffers] == places
    out, log_p = (torch.cat([each[i] for each in steps], -2 + i) for i in range(2))
    check((out, log_p, close_memory(buffers)), expected)


def _doubled(memory: Memory) -> Iterator[Tensor]:
    return (x.double() if x.is_floating_point() else x for x in memory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_that_of_the_tokens_alone(dtype: torch.dtype, device: str) -> None:
    tokens = draw(device, 20, dtype=dtype)
    found = stream(*tokens, empty_memory(*tokens), 16, 4)
    assert found[0].dtype == dtype
    assert {x.dtype for x in found[2][:-1]} == {torch.float32}
    out, log_p, memory = plain.stream(*double(tokens), empty_memory(*double(tokens)), 16, 4)
    torch.testing.assert_close(found[0].double(), out, rtol=torch.finfo(dtype).eps, atol=1e-5)
    torch.testing.assert_close(found[1].double(), log_p, rtol=2e-5, atol=2e-5)
    check_memory(found[2], memory)


class Operations(TorchDispatchMode):
    """Notes what PyTorch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_step_is_one_launch(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing of PyTorch that computes, copies or waits; also where a block ends and entries are merged."""
    launches = []
    kernel = streaming.stream_kernel

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(streaming, "stream_kernel", Counted())
    tokens = draw(device, 16, heads=2)
    buffers = open_memory(stream(*tokens.part(0, 15), empty_memory(*tokens), 16, 4)[2], 16)
    launches.clear()
    with Operations() as operations:
        stream_in_place(*tokens.part(15, 16), buffers, 4)
    assert close_memory(buffers).counts.tolist() == [[12, 0, 16]]
    assert launches == [(2,)]
    if device == "cuda":  # the interpreter copies what it runs on
        assert set(operations.names) <= {"view", "_unsafe_view", "unsqueeze", "new_empty", "empty", "alias"}


@pytest.mark.parametrize("bad", [float("nan"), 1e30])
def test_a_row_that_overflows_harms_no_other(bad: float, device: str) -> None:
    tokens = draw(device, 20, batch=2)
    expected = stream(*(x[1:] for x in tokens), empty_memory(*(x[1:] for x in tokens)), 16, 8)
    tokens.key[0, :, 7:12] = bad
    out, log_p, memory = stream(*tokens, empty_memory(*tokens), 16, 8)
    assert torch.equal(out[1:], expected[0])
    assert torch.equal(log_p[1:], expected[1])
    assert torch.equal(memory.key[1:], expected[2].key)
    assert memory.counts.tolist() == [[12, 0, 20]] * 2
    assert torch.equal(memory.key[0, :, -4:], tokens.key[0, :, -4:])  # what is lost is numbers, not the schedule


def test_strides_do_not_matter(device: str) -> None:
    tokens = draw(device, 6, batch=2, heads=2, groups=2)
    strided = [x.transpose(-3, -2).contiguous().transpose(-3, -2) for x in tokens]
    strided[1] = tokens.key.mT.contiguous().mT  # the last stride is not 1
    found, other = (stream(*x, empty_memory(*tokens), 16, 4) for x in (tokens, strided))
    for mine, theirs in zip((*found[:2], *found[2]), (*other[:2], *other[2]), strict=True):
        assert torch.equal(mine, theirs)


def test_what_cannot_be_computed_is_refused(device: str) -> None:
    tokens = draw(device, 20)
    memory = stream(*tokens, empty_memory(*tokens), 32, 8)[2]
    with pytest.raises(ValueError, match=r"^memory: 20 entries; there is room for entries=16"):
        stream(*tokens, memory, 16, 4)
    with pytest.raises(ValueError, match=r"^query, key, value or memory: one needs gradients"):
        stream(tokens.query.requires_grad_(), *tokens[1:], memory, 32, 8)
    wide = draw(device, 2, columns=257)
    with pytest.raises(ValueError, match=r"^head_dim: 257; the kernels take at most 256"):
        stream(*wide, empty_memory(*wide), 16, 4)


@pytest.mark.gpu
def test_a_cuda_graph_repeats_steps() -> None:
    tokens = draw("cuda", 60, batch=2, heads=2, groups=3)
    expected = stream(*tokens, empty_memory(*tokens), 16, 4)
    now = [x[..., :1, :].clone() for x in tokens]
    stream_in_place(*now, open_memory(empty_memory(*tokens), 16), 4)  # compiles
    buffers = open_memory(empty_memory(*tokens), 16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, log_p = stream_in_place(*now, buffers, 4)
    for token in range(60):
        for x, new in zip(now, tokens.part(token, token + 1), strict=True):
            x.copy_(new)
        graph.replay()
        torch.testing.assert_close(out, expected[0][..., token : token + 1, :], rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(log_p, expected[1][..., token : token + 1], rtol=2e-5, atol=2e-5)
    check_memory(close_memory(buffers), Memory(*_doubled(expected[2])))


@pytest.mark.gpu
@pytest.mark.parametrize(("dim", "groups"), [(64, 1), (64, 71), (128, 4), (256, 8)])
def test_in_the_sizes_of_real_models(dim: int, groups: int) -> None:
    """Over 600 tokens some costs tie as float32 computes them, so it is held to softmax, as PyTorch is."""
    tokens = draw("cuda", 600, heads=2, groups=groups, dim=dim, columns=dim)
    tokens = tokens._replace(query=tokens.query * dim**-0.5)
    out, _, memory = stream(*tokens, empty_memory(*tokens), 128, 64)
    wanted = plain.stream(*double(tokens), empty_memory(*double(tokens)), 128, 64)
    torch.testing.assert_close(out[..., :136, :].double(), wanted[0][..., :136, :], rtol=2e-5, atol=2e-5)
    assert torch.equal(memory.counts, wanted[2].counts)
    query, key, value = (x.double() for x in tokens)
    true = F.scaled_dot_product_attention(query, key[:, :, None], value[:, :, None], is_causal=True, scale=1)
    errors = [float((x.double() - true).norm() / true.norm()) for x in (out, wanted[0])]
    assert errors[0] <= 1.02 * errors[1]
    constant = stream(*tokens._replace(value=torch.ones_like(tokens.value)), empty_memory(*tokens), 128, 64)[0]
    torch.testing.assert_close(constant, torch.ones_like(constant), rtol=2e-5, atol=2e-5)


def test_a_module_takes_the_backend_that_it_is_told(device: str) -> None:
    tokens = draw(device, 45, heads=2, groups=2)
    query, key, value = tokens.query.flatten(1, 2), tokens.key, tokens.value
    config = AstroConfig(hidden="streaming", entries=32, backend="triton")
    core = AstrocyteAttention(4, 8, config)
    with torch.no_grad():
        expected = AstrocyteAttention(4, 8, AstroConfig(hidden="streaming", entries=32))(
            query.double(), key.double(), value.double(), causal=True
        )
        first, memory = core.decode(query[:, :, :40], key[:, :, :40], value[:, :, :40])
        rest, _ = core.decode(query[:, :, 40:], key[:, :, 40:], value[:, :, 40:], memory)
    torch.testing.assert_close(torch.cat([first, rest], 2).double(), expected, rtol=2e-5, atol=2e-5)
