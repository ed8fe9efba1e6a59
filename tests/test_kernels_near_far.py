"""Triton kernels of near + far attention: against plain PyTorch in float64, given the same choices.

In the interpreter the choice is plain PyTorch's, as kernels would take minutes: `test_kernels_choosing`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from astroattn import AstroConfig, AstrocyteAttention
from astroattn.ops import choosing, plain
from astroattn.ops import near_far as plain_near_far
from astroattn.ops.backends import MOST_DIM
from tests.core_cases import relative
from tests.test_native import CASES, budget_of, draw, given_choices

pytest.importorskip("triton")

from astroattn.ops.kernels import near_far, near_far_tiles

# The interpreter is slow.
SMALL = [name for name in CASES if CASES[name][0] < 400 and name != "padding" and CASES[name][1] <= MOST_DIM]


@pytest.fixture(autouse=True)
def _plain_choice(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        monkeypatch.setattr(near_far, "choose", choosing.choose)


def forward(name: str, device: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    tokens, dim, value_dim, _, _ = CASES[name]
    inputs = [x.to(device, dtype) for x in draw(tokens, dim, value_dim)]
    return inputs, list(near_far.near_far_forward(*given(name, inputs)))


def given(name: str, inputs: list[Tensor]) -> tuple[Any, ...]:
    _, dim, _, changes, lengths = CASES[name]
    of_batch = None if lengths is None else torch.tensor(lengths, device=inputs[0].device)
    return *inputs, None, of_batch, budget_of(changes), dim**-0.5


def backward(name: str, inputs: list[Tensor], results: list[Tensor], *gradients: Tensor) -> tuple[Tensor, ...]:
    _, dim, _, changes, lengths = CASES[name]
    of_batch = None if lengths is None else torch.tensor(lengths, device=inputs[0].device)
    return near_far.near_far_backward(*gradients, *inputs, None, *results, of_batch, budget_of(changes), dim**-0.5)


def check(name: str, inputs: list[Tensor], results: list[Tensor], bound: float, log_bound: float) -> None:
    """Against plain PyTorch in float64 on the same inputs, the gradients to twice the bound of the output."""
    _, _, _, changes, lengths = CASES[name]
    out, log_p, *choices = results
    exact = [x.double().requires_grad_() for x in inputs]
    expected, expected_log_p = given_choices(exact, choices, lengths, changes)
    real = expected_log_p > -torch.inf
    assert torch.equal(log_p > -torch.inf, real)
    assert relative(out, expected) < bound
    torch.testing.assert_close(log_p.double(), expected_log_p, rtol=1e-5, atol=log_bound)

    d_out, d_log_p = torch.randn_like(out), torch.randn_like(log_p)
    grads = backward(name, inputs, results, d_out, d_log_p * real)
    wanted = torch.autograd.grad([expected, expected_log_p[real]], exact, [d_out.double(), d_log_p[real].double()])
    for ours, theirs, like in zip(grads, wanted, inputs, strict=True):
        assert ours.dtype == like.dtype
        assert relative(ours, theirs) < 2 * bound


@pytest.mark.parametrize("name", SMALL)
def test_forward_and_backward_equal_plain_pytorch(name: str, device: str) -> None:
    check(name, *forward(name, device, torch.float32), bound=2e-6, log_bound=1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str)
@pytest.mark.parametrize("name", ["ViT", "no far field"])
def test_low_precision(name: str, dtype: torch.dtype, bound: float, device: str) -> None:
    """As near to plain PyTorch in float64 on the rounded inputs as the products' operands are rounded."""
    inputs, results = forward(name, device, dtype)
    assert results[0].dtype == dtype
    check(name, inputs, results, bound, 5 * bound)


def test_several_blocks_of_queries_and_of_neurons(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one tile, and of the clusters of one sequence."""
    case = (90, 16, 24, {"tile": 40, "exact_keys": 6, "num_hidden": 40, "near": 2}, [90, 61])
    monkeypatch.setitem(CASES, "blocks", case)
    monkeypatch.setattr(near_far, "BACKWARD", {key: near_far.Blocks(16, 16, 4, 1) for key in near_far.BACKWARD})
    monkeypatch.setattr(near_far, "SMALL", {})
    monkeypatch.setattr(near_far, "NEURONS", dict.fromkeys(near_far.NEURONS, 16))
    check("blocks", *forward("blocks", device, torch.float32), bound=2e-6, log_bound=1e-5)


def test_equal_inputs_give_equal_bits(device: str) -> None:
    inputs, results = forward("ViT", device, torch.bfloat16)
    gradients = torch.randn_like(results[0]), torch.randn_like(results[1])
    once, again = (backward("ViT", inputs, results, *gradients) for _ in range(2))
    assert all(map(torch.equal, once, again))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grid that does not divide", "no near field", "no far field"])
def test_the_bound_that_a_cuda_graph_takes_changes_no_bit(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On how many keys a tile reads exactly, which only a waiting CPU could know better."""
    inputs, results = forward(name, device, torch.float32)
    gradients = [torch.randn_like(x) for x in results[:2]]
    gradients[1][results[1].isinf()] = 0
    exact, sizes = backward(name, inputs, results, *gradients), []
    find_union = plain_near_far.find_union

    def watched(*args: Any) -> plain_near_far.Union:
        union = find_union(*args)
        sizes.append((union.keys.shape[-1], find_union(*args[:4]).keys.shape[-1]))
        return union

    monkeypatch.setattr(near_far_tiles, "_is_captured", lambda x: True)
    monkeypatch.setattr(plain_near_far, "find_union", watched)
    for ours, theirs in zip(near_far.near_far_forward(*given(name, inputs)), results, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(backward(name, inputs, results, *gradients), exact, strict=True):
        assert torch.equal(ours, theirs)
    assert all(bound > size for bound, size in sizes)


def test_large_heads_in_float32_are_differentiated_by_plain_pytorch(device: str) -> None:
    """Their products would spill registers."""
    inputs = [x.to(device) for x in draw(20, 136, 8, batch=1)]
    changes: dict[str, object] = {"exact_keys": 3, "num_hidden": 4, "tile": 8}
    results = near_far.near_far_forward(*inputs, None, None, budget_of(changes), 0.1)
    gradients = torch.randn_like(results[0]), torch.randn_like(results[1])
    ours = near_far.near_far_backward(*gradients, *inputs, None, *results, None, budget_of(changes), 0.1)
    theirs = plain.near_far_backward(*gradients, *inputs, None, *results[2:], None, budget_of(changes), 0.1)
    assert all(map(torch.equal, ours, theirs))


def test_large_logits_lose_no_digits(device: str) -> None:
    """A tile's mean logit, here hundreds, is subtracted before what differs within the tile is added."""
    inputs = [x.to(device) for x in draw(150, 16, 16, batch=1)]
    inputs[0] = inputs[0] + 60.0
    changes: dict[str, object] = {"exact_keys": 8, "num_hidden": 8, "tile": 16}
    out, log_p, *choices = near_far.near_far_forward(*inputs, None, None, budget_of(changes), 0.25)
    assert log_p.abs().max() > 100
    expected, _ = given_choices([x.double() for x in inputs], choices, None, changes)
    theirs = plain.near_far_given(*inputs, None, *choices, None, budget_of(changes), 0.25)[0]
    assert relative(out, expected) < 2 * relative(theirs, expected) + 1e-6


def test_the_module_runs_on_it(device: str) -> None:
    inputs = [x.to(device) for x in draw(200, 16, 16)]
    config = {"exact_keys": 8, "num_hidden": 8, "tile": 16}
    ours, theirs = (
        AstrocyteAttention(2, 16, AstroConfig(**config, backend=backend))(*inputs) for backend in ("triton", "torch")
    )
    assert not torch.equal(ours, theirs)
    assert relative(ours, theirs) < 1e-5
