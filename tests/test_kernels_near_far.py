"""Triton kernels of near + far attention: against plain PyTorch in float64, given their choices, and dense matrices."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from core_cases import near_far_oracle, relative
from torch import Tensor

from astroattn.ops.near_far import Choice, attend, choose
from astroattn.ops.tiles import Layout, make_tiles

pytest.importorskip("triton")

import triton
import triton.language as tl

from astroattn.ops.kernels.near_far import near_far_backward, near_far_forward
from astroattn.ops.kernels.tiles import tiles_near

SETTINGS = {
    "prefix": 0, "tile": 4, "near": 4, "exact_keys": 0, "groups": 256, "num_hidden": 5, "steps": 2, "lengths": None,
    "grid": None,
}  # fmt: skip
SIZES = {"batch": 1, "heads": 1, "tokens": 37, "dim": 8, "value_dim": 8}
CASES: dict[str, dict[str, Any]] = {
    "one token": {"tokens": 1},
    "63 tokens, two heads": {"tokens": 63, "heads": 2, "near": 9, "tile": 8},
    "prefix": {"prefix": 3, "tile": 5, "near": 7, "exact_keys": 4, "dim": 11, "value_dim": 13},
    "no step": {"tokens": 21, "steps": 0, "exact_keys": 3},
    "one tile": {"tokens": 70, "tile": 70, "near": 0},
    "blocks of clusters": {"tokens": 80, "dim": 40, "tile": 16, "near": 24, "num_hidden": 35},
    "shared": {"groups": 4, "near": 6, "exact_keys": 3},
    "shared, blocks of clusters": {"tokens": 80, "groups": 2, "dim": 40, "tile": 16, "near": 20, "num_hidden": 35},
    "lengths": {"batch": 4, "groups": 5, "tokens": 30, "exact_keys": 2, "lengths": (30, 13, 1, 0)},
    "lengths, prefix": {"batch": 3, "groups": 4, "tokens": 29, "prefix": 3, "near": 5, "lengths": (29, 9, 2)},
    "grid": {"grid": (5, 7), "prefix": 2, "tile": 6, "near": 5, "exact_keys": 2},
    "grid, shared": {"grid": (6, 6), "prefix": 1, "near": 9, "groups": 3, "exact_keys": 2},
    "grid, long tile": {"grid": (3, 20), "tile": 32, "near": 16},
    "near alone": {"tokens": 50, "num_hidden": 0, "prefix": 1},
    "keys alone": {"num_hidden": 0, "exact_keys": 4, "groups": 3},
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a CUDA device")
    return request.param


class Problem(NamedTuple):
    """Queries, keys, values and the weights of the results in a sum; the settings, for kernels and plain PyTorch."""

    qkv: list[Tensor]
    d_out: Tensor
    d_log_p: Tensor
    settings: dict[str, Any]
    layout: Layout

    def forward(self) -> tuple[Tensor, ...]:
        return near_far_forward(*self.qkv, **self.settings)

    def backward(self, *results: Tensor) -> tuple[Tensor, ...]:
        given = {name: x for name, x in self.settings.items() if name not in ("exact_keys", "steps")}
        return near_far_backward(self.d_out, self.d_log_p, *self.qkv, *results, **given)

    def flat(self) -> tuple[Tensor, ...]:
        """Scaled queries, keys and values in float64 on the CPU, [B * H, N, D]."""
        query, key, value = (x.cpu().double().flatten(0, 1) for x in self.qkv)
        return query * self.settings["scale"], key, value

    def plain(self, winners: Tensor, mass: Tensor, keys: Tensor, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Output, log p and gradients of plain PyTorch on the CPU, given the choices."""
        qkv = [x.detach().cpu().to(dtype).requires_grad_() for x in self.qkv]
        choice = Choice(*(x.cpu().flatten(0, 1) for x in (winners.long(), mass, keys.long())))
        query, key, value = (x.flatten(0, 1) for x in qkv)
        out, log_p = attend(
            query * self.settings["scale"], key, value, self.layout, choice, self.settings["num_hidden"]
        )
        out, log_p = (x.unflatten(0, winners.shape[:2]) for x in (out, log_p))
        weights = self.d_out.cpu().to(dtype), self.d_log_p.cpu().to(dtype)
        loss = (out * weights[0]).sum() + (log_p.masked_fill(log_p.isinf(), 0) * weights[1]).sum()
        return [out, log_p, *torch.autograd.grad(loss, qkv)]


def draw(device: str, *, dtype: torch.dtype = torch.float32, size: float = 1.0, **changes: Any) -> Problem:
    sizes = SIZES | {name: x for name, x in changes.items() if name in SIZES}
    settings = SETTINGS | {name: x for name, x in changes.items() if name in SETTINGS}
    if settings["grid"] and "tokens" not in changes:
        sizes["tokens"] = settings["prefix"] + settings["grid"][0] * settings["grid"][1]
    batch, heads, tokens, dim, value_dim = sizes.values()
    # As heads lie behind a projection, [B, N, H, D].
    *qkv, d_out = ((torch.randn(batch, tokens, heads, d) * size).to(dtype) for d in (dim, dim, value_dim, value_dim))
    *qkv, d_out = (x.transpose(1, 2).to(device) for x in (*qkv, d_out))
    lengths = None if settings["lengths"] is None else torch.tensor(settings["lengths"])
    rest = {name: settings[name] for name in ("grid", "prefix", "tile", "near", "exact_keys", "groups")}
    layout = Layout(**rest, lengths=None if lengths is None else lengths.repeat_interleave(heads))
    settings |= {"lengths": None if lengths is None else lengths.to(device), "scale": dim**-0.5}
    return Problem(qkv, d_out, torch.randn(batch, heads, tokens, device=device), settings, layout)


@cache
def solve(device: str, name: str) -> tuple[Problem, tuple[Tensor, ...]]:
    """A case and what the forward pass makes of it, for several tests."""
    torch.manual_seed(0)
    problem = draw(device, **CASES[name])
    return problem, problem.forward()


def assert_close(ours: Iterable[Tensor], theirs: Iterable[Tensor], limit: float) -> None:
    for mine, wanted in zip(ours, theirs, strict=True):
        assert mine.shape == wanted.shape
        assert torch.equal(mine.cpu().isinf(), wanted.isinf())
        assert relative(mine.cpu().nan_to_num(neginf=0), wanted.nan_to_num(neginf=0)) < limit


@pytest.mark.parametrize("name", CASES)
def test_equals_plain_pytorch_given_the_choices(device: str, name: str) -> None:
    problem, results = solve(device, name)
    theirs = problem.plain(*results[2:])
    assert_close([*results[:2], *problem.backward(*results)], theirs, 2e-6)
    assert not results[0].cpu()[theirs[1].isinf()].any()


@pytest.mark.parametrize("name", CASES)
def test_equals_dense_matrices(device: str, name: str) -> None:
    problem, results = solve(device, name)
    query, key, value = problem.flat()
    hidden, steps = problem.settings["num_hidden"], problem.settings["steps"]
    wanted = near_far_oracle(query, key, value, problem.layout, hidden, steps)
    assert_close((x.flatten(0, 1) for x in results[:2]), wanted, 2e-6)


@pytest.mark.parametrize("name", CASES)
def test_chooses_what_plain_pytorch_chooses(device: str, name: str) -> None:
    problem, results = solve(device, name)
    check_choices(problem, results)


def test_chooses_among_many_clusters(device: str) -> None:
    problem = draw(device, tokens=150, tile=64, near=64, num_hidden=70, dim=4)
    check_choices(problem, problem.forward())


def check_choices(problem: Problem, results: tuple[Tensor, ...]) -> None:
    settings, layout, (query, key, value) = problem.settings, problem.layout, problem.flat()
    winners, mass, keys = (x.cpu().flatten(0, 1) for x in results[2:])
    wanted = choose(query, key, value, layout, num_hidden=settings["num_hidden"], steps=settings["steps"])
    real = torch.ones(winners.shape, dtype=torch.bool)
    if layout.lengths is not None:
        real = layout.real(key.shape[1])[:, layout.prefix :]
    assert winners.dtype == keys.dtype == torch.int32
    assert torch.equal(winners[real], wanted.winners[real].int())
    assert int(winners.min()) >= 0
    assert int(winners.max()) < max(1, settings["num_hidden"])
    assert not mass[~real].any()
    of = torch.nn.functional.one_hot(winners.long(), max(1, settings["num_hidden"])).double()
    for z in range(len(winners)):  # the same up to a factor of each cluster's own
        ours, theirs = (x[z].double()[:, None] * of[z] * real[z][:, None] for x in (mass, wanted.mass))
        torch.testing.assert_close(ours * theirs.sum(0), theirs * ours.sum(0), atol=1e-7, rtol=1e-4)
    tiles = make_tiles(layout, key.shape[1], key.device)
    for z in range(len(keys)):
        row = min(z, len(tiles.group) - 1)
        used = tiles.group[row][tiles.slot_mask[row].any(-1)].unique()  # groups with a real query
        assert torch.equal(keys[z, used].sort(-1)[0], wanted.keys[z, used].sort(-1)[0].int())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": 150, "dim": 32, "value_dim": 32, "tile": 16, "near": 24, "num_hidden": 16},
        {"tokens": 64, "dim": 16, "value_dim": 16, "exact_keys": 4, "groups": 5, "prefix": 1},
    ],
    ids=["long", "shared"],
)
def test_low_precision_errs_as_plain_pytorch_does(device: str, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    problem = draw(device, dtype=dtype, **changes)
    out, log_p, *choice = results = problem.forward()
    assert out.dtype == dtype
    assert log_p.dtype == torch.float32
    exact, plain = problem.plain(*choice), problem.plain(*choice, dtype=dtype)
    ours = [out, log_p, *problem.backward(*results)]
    for mine, theirs, wanted, most in zip(ours, plain, exact, (2, 2, 3, 3, 3), strict=True):
        assert relative(mine.cpu(), wanted) < most * relative(theirs, wanted)


def test_large_logits(device: str) -> None:
    """Logits in the hundreds, of which float32 keeps five digits."""
    problem = draw(device, size=9.0, exact_keys=3)
    results = problem.forward()
    assert_close([*results[:2], *problem.backward(*results)], problem.plain(*results[2:]), 1e-3)


def test_padding_is_not_read(device: str) -> None:
    problem, clean = solve(device, "lengths, prefix")
    gradients = problem.backward(*clean)
    padded = problem._replace(qkv=[x.clone() for x in problem.qkv], d_out=problem.d_out.clone())
    for z, length in enumerate(CASES["lengths, prefix"]["lengths"]):
        for x in (*padded.qkv, padded.d_out):
            x[z, :, length:] = float("nan")
        assert not any(x[z, :, length:].any() for x in gradients)
    dirty = padded.forward()
    for before, after in zip((*clean, *gradients), (*dirty, *padded.backward(*dirty)), strict=True):
        assert torch.equal(before, after)


def test_same_bits_again_for_any_strides(device: str) -> None:
    problem, results = solve(device, "prefix")
    query, key, value = problem.qkv
    other = [query.contiguous(), key.clone(), torch.stack([value] * 2, -1)[..., 0]]  # a last stride of 2
    again = problem._replace(qkv=other)
    others = again.forward()
    gradients = problem.backward(*results), again.backward(*others)
    assert all(map(torch.equal, (*results, *gradients[0]), (*others, *gradients[1])))
    assert all(x.stride() == y.stride() for x, y in zip(problem.qkv, gradients[0], strict=True))  # laid out like them


@triton.jit
def _ranges(begin, stop, end, count, SIZE: tl.constexpr, WINDOW: tl.constexpr, KEYS: tl.constexpr):
    key = tl.arange(0, KEYS)
    first, last = tiles_near(key, key, end, count, SIZE, WINDOW)
    tl.store(begin + key, first)
    tl.store(stop + key, last)


@pytest.mark.parametrize(("tile", "near"), [(4, 4), (4, 20), (5, 7), (16, 6), (3, 64), (7, 200)])
def test_range_of_tiles_near_a_key(device: str, tile: int, near: int) -> None:
    tokens = 200
    tiles = make_tiles(Layout(None, 0, tile, near, 0, 256), tokens, torch.device("cpu"))
    begin, stop = torch.zeros(2, 256, dtype=torch.int32, device=device)
    _ranges[(1,)](begin, stop, tokens, len(tiles.slots), SIZE=tile, WINDOW=near, KEYS=256)
    for key in range(tokens):
        holders = (tiles.near[0] == key).any(-1).nonzero()[:, 0].tolist()
        held = range(int(begin[key]), int(stop[key]))
        assert set(holders) <= set(held) <= set(range(len(tiles.slots)))
        assert len(held) <= 2 * near // tile + 4


def test_output_is_laid_out_like_the_query(device: str) -> None:
    problem, results = solve(device, "63 tokens, two heads")
    assert results[0].stride() == problem.qkv[0].stride()
