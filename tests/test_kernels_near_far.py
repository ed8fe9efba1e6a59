"""Triton kernels of near + far attention: against plain PyTorch in float64, given the same choices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from astroattn import AstroConfig, AstrocyteAttention
from astroattn.ops import plain
from tests.core_cases import relative
from tests.test_native import CASES, budget_of, draw, given_choices

pytest.importorskip("triton")

from astroattn.ops.kernels import near_far

SMALL = [name for name in CASES if CASES[name][0] < 400 and name != "padding"]  # the interpreter is slow


def forward(name: str, device: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    tokens, dim, value_dim, changes, lengths = CASES[name]
    inputs = [x.to(device, dtype) for x in draw(tokens, dim, value_dim)]
    of_batch = None if lengths is None else torch.tensor(lengths, device=device)
    return inputs, list(near_far.near_far_forward(*inputs, None, of_batch, budget_of(changes), dim**-0.5))


@pytest.mark.parametrize("name", SMALL)
def test_forward_and_backward_equal_plain_pytorch(name: str, device: str) -> None:
    _, dim, _, changes, lengths = CASES[name]
    inputs, (out, log_p, *choices) = forward(name, device, torch.float32)
    exact = [x.double().requires_grad_() for x in inputs]
    expected, expected_log_p = given_choices(exact, choices, lengths, changes)
    assert relative(out, expected) < 2e-6
    torch.testing.assert_close(log_p.double(), expected_log_p, rtol=1e-5, atol=1e-5)

    d_out, d_log_p = torch.randn_like(out), torch.randn_like(log_p)
    real = expected_log_p > -torch.inf
    of_batch = None if lengths is None else torch.tensor(lengths, device=device)
    given = (*inputs, None, out, log_p, *choices, of_batch, budget_of(changes), dim**-0.5)
    grads = near_far.near_far_backward(d_out, d_log_p * real, *given)
    wanted = torch.autograd.grad([expected, expected_log_p[real]], exact, [d_out.double(), d_log_p[real].double()])
    for ours, theirs in zip(grads, wanted, strict=True):
        assert relative(ours, theirs) < 4e-6


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str)
def test_low_precision(dtype: torch.dtype, bound: float, device: str) -> None:
    """As near to plain PyTorch in float64 on the rounded inputs as the products' operands are rounded."""
    inputs, (out, log_p, *choices) = forward("ViT", device, dtype)
    expected, expected_log_p = given_choices([x.double() for x in inputs], choices, None, CASES["ViT"][3])
    assert out.dtype == dtype
    assert relative(out.double(), expected) < bound
    assert (log_p - expected_log_p).abs().max() < 5 * bound


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
