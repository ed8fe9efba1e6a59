"""Triton kernels that choose for near + far attention: against plain PyTorch in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from astroattn.ops import choosing
from astroattn.ops.choosing import Choice
from astroattn.ops.layout import Layout
from tests.test_native import budget_of

pytest.importorskip("triton")

import triton
import triton.language as tl

from astroattn.ops.kernels import near_far as kernels
from astroattn.ops.kernels import near_far_choose
from astroattn.ops.kernels.near_far_selecting import rank_of, take_largest

# (tokens, D, what differs from `budget_of`); small, as the interpreter is slow.
CASES: dict[str, tuple[int, int, dict[str, object]]] = {
    "sequence": (90, 16, {}),
    "prefix": (70, 17, {"prefix": 3, "exact_keys": 5, "num_hidden": 12}),
    "limit of the error": (61, 16, {"exact_keys": 12, "num_hidden": 8, "key_error": 200_000}),
    "grid by position": (65, 8, {"grid": (8, 8), "prefix": 1, "by_content": False, "near": 9, "exact_keys": 4}),
    "no far field": (75, 8, {"near": 3, "exact_keys": 6, "num_hidden": 0}),
    "no near field": (60, 8, {"near": 0, "exact_keys": 4, "num_hidden": 7}),
    "no exact keys": (90, 8, {"exact_keys": 0, "num_hidden": 7}),
    "one tile": (50, 8, {"tile": 50, "exact_keys": 3, "num_hidden": 7}),
    "more candidates than keys": (20, 8, {"exact_keys": 15, "num_hidden": 4}),
    "three tokens": (3, 8, {"near": 1, "exact_keys": 1, "num_hidden": 2}),
}


def draw(tokens: int, dim: int, device: str) -> list[Tensor]:
    return [torch.randn(2, tokens, dim).to(device) for _ in range(3)]


def layout_of(tokens: int, dim: int, changes: dict[str, object]) -> Layout:
    return budget_of(changes).at(tokens, dim)


def chosen(choice: Choice) -> Tensor:
    """The exact keys of the sub-tiles in order; that within a sub-tile is of no account."""
    return choice.keys.long().sort(-1).values


def check(inputs: list[Tensor], layout: Layout) -> None:
    ours = near_far_choose.choose(*inputs, layout)
    theirs = choosing.choose(*(x.double() for x in inputs), layout)
    assert torch.equal(ours.order, theirs.order)
    assert torch.equal(ours.winners, theirs.winners)
    assert torch.equal(chosen(ours), chosen(theirs))
    torch.testing.assert_close(ours.mass.double(), theirs.mass, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_what_is_chosen_is_that_of_plain_pytorch(name: str, device: str) -> None:
    tokens, dim, changes = CASES[name]
    check(draw(tokens, dim, device), layout_of(tokens, dim, changes))


@pytest.mark.parametrize("num_hidden", [0, 6])
@pytest.mark.parametrize(("block", "exact_keys"), [(2, 12), (4, 4), (4, 20)])
def test_candidates_from_blocks_of_keys(
    block: int, exact_keys: int, num_hidden: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in long sequences; with more candidates than blocks too."""
    monkeypatch.setattr(near_far_choose, "block_of", lambda *_: block)
    changes: dict[str, object] = {"exact_keys": exact_keys, "num_hidden": num_hidden, "prefix": 1, "tile": 16}
    check(draw(91, 8, device), layout_of(91, 8, changes))


def test_blocks_are_as_many_as_one_program_holds() -> None:
    for exact_keys in (1, 48, 384, 2000):
        for body in (100, 4096, 5000, 16384, 16385, 100_000, 1_000_000):
            layout = layout_of(body, 64, {"exact_keys": exact_keys})
            block, most = near_far_choose.block_of(layout, body), layout.candidates(body)
            assert block in (1, 2, 4, 8, 16)
            assert (body if block == 1 else most * block) <= near_far_choose.MOST_SCORES
    too_many = layout_of(100_000, 64, {"exact_keys": 10_000})
    assert near_far_choose.block_of(too_many, 100_000) == 0


def test_more_than_one_program_holds_is_chosen_by_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_far_choose, "DIRECT", 32)
    monkeypatch.setattr(near_far_choose, "MOST_SCORES", 32)
    inputs, layout = draw(60, 8, "cpu"), layout_of(60, 8, {"exact_keys": 20})
    assert all(map(torch.equal, near_far_choose.choose(*inputs, layout), choosing.choose(*inputs, layout)))


def test_equal_inputs_give_equal_bits(device: str) -> None:
    inputs, layout = draw(70, 8, device), layout_of(70, 8, {"exact_keys": 5, "num_hidden": 5})
    once, again = (near_far_choose.choose(*inputs, layout) for _ in range(2))
    assert all(map(torch.equal, once, again))


def test_large_logits(device: str) -> None:
    """Where float32 is too coarse for some choices, they differ no more than those of plain PyTorch."""
    inputs, layout = draw(70, 8, device), layout_of(70, 8, {"exact_keys": 5, "num_hidden": 5})
    inputs[0] = inputs[0] * 8 + 60
    assert (inputs[0] @ inputs[1].mT).abs().max() > 200
    exact = chosen(choosing.choose(*(x.double() for x in inputs), layout))
    theirs, ours = (
        (chosen(choose(*inputs, layout)) != exact).double().mean()
        for choose in (choosing.choose, near_far_choose.choose)
    )
    assert ours < theirs + 0.02


def test_equal_keys(device: str) -> None:
    """Each of a sub-tile's keys once, and as many as there may be; clusters are empty."""
    query, key, value = draw(60, 8, device)
    layout = layout_of(60, 8, {"exact_keys": 5, "num_hidden": 6, "near": 2})
    choice = near_far_choose.choose(query, key[:, :1].expand_as(key).contiguous(), value, layout)
    keys = chosen(choice)
    assert ((keys[..., 1:] > keys[..., :-1]) | (keys[..., :-1] < 0)).all()
    assert ((keys >= 0).sum(-1) >= 5).all()
    assert choice.mass.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_and_infinity_come_to_an_end(bad: float, which: int, device: str) -> None:
    """With keys that exist, and the other sequence as it was."""
    inputs, layout = draw(24, 8, device), layout_of(24, 8, {"exact_keys": 4, "num_hidden": 4})
    clean = near_far_choose.choose(*inputs, layout)
    inputs[which][0, 17, 3] = bad
    choice = near_far_choose.choose(*inputs, layout)
    assert -1 <= choice.keys.min() <= choice.keys.max() < 24
    assert all(torch.equal(ours[1], theirs[1]) for ours, theirs in zip(choice, clean, strict=True))


@triton.jit
def _take_kernel(numbers, taken, most, limit, R: tl.constexpr, P: tl.constexpr):
    at = tl.arange(0, R)[:, None] * P + tl.arange(0, P)[None, :]
    tl.store(taken + at, take_largest(rank_of(tl.load(numbers + at)), most, rank_of(tl.load(limit))).to(tl.int8))


@pytest.mark.parametrize("most", [0, 1, 5, 40, 100])
@pytest.mark.parametrize("limit", [-torch.inf, -0.5])
def test_the_largest_above_a_limit(most: int, limit: float, device: str) -> None:
    """Of equal ones the first; zero is one number, whatever its sign."""
    numbers = torch.cat([torch.randn(2, 64), (3 * torch.randn(2, 64)).round()]).to(device)
    numbers[2:] += 0.0  # no -0.0
    numbers[0, 7], numbers[1, 3:9] = torch.inf, -torch.inf
    taken = torch.zeros(4, 64, dtype=torch.int8, device=device)
    _take_kernel[(1,)](numbers, taken, most, torch.tensor([limit], device=device), R=4, P=64)
    best = numbers.sort(dim=1, descending=True, stable=True).indices[:, :most]
    wanted = torch.zeros_like(taken).scatter(1, best, 1).bool() & (numbers > limit)
    assert torch.equal(taken.bool(), wanted)


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest new floating tensor has."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor) and x.is_floating_point() and not x._is_view():
                self.numbers = max(self.numbers, x.numel())
        return result


@contextmanager
def largest() -> Iterator[Largest]:
    with Largest() as found:
        yield found


def test_no_tensor_is_as_large_as_tiles_times_keys(device: str) -> None:
    changes: dict[str, object] = {"tile": 4, "exact_keys": 2, "near": 1, "num_hidden": 4}
    inputs, layout = draw(100, 4, device), layout_of(100, 4, changes)
    with largest() as ours:
        near_far_choose.choose(*inputs, layout)
    with largest() as theirs:
        choosing.choose(*inputs, layout)
    assert ours.numbers < 2 * 25 * 100 <= theirs.numbers


def test_nor_does_attention_make_one(device: str) -> None:
    changes: dict[str, object] = {"tile": 4, "exact_keys": 2, "near": 1, "num_hidden": 4}
    inputs = [x[:, None] for x in draw(180, 2, device)]
    given = None, budget_of(changes), 1.0
    with largest() as ours:
        out, log_p, *choices = kernels.near_far_forward(*inputs, None, *given)
        kernels.near_far_backward(torch.ones_like(out), log_p, *inputs, None, out, log_p, *choices, *given)
    assert ours.numbers < 2 * 45 * 180


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_chooses_by_it(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each length of a padded batch by itself."""
    inputs = [torch.randn(2, 1, 60, 8).to(device, dtype) for _ in range(3)]
    given = (None, torch.tensor([60, 41], device=device), budget_of({"exact_keys": 4, "num_hidden": 4}), 0.3)
    out, _, _, _, _, keys = kernels.near_far_forward(*inputs, *given)
    monkeypatch.setattr(kernels, "choose", choosing.choose)
    expected, _, _, _, _, their_keys = kernels.near_far_forward(*inputs, *given)
    assert torch.equal(keys.sort(-1).values, their_keys.sort(-1).values)
    torch.testing.assert_close(out, expected)
