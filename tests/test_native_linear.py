"""Linear attention of the CPU kernels against plain PyTorch in float64."""

from __future__ import annotations

from math import pi

import pytest
import torch
from torch import Tensor

from astroattn.ops import plain
from astroattn.ops.features import ACTIVATIONS
from astroattn.ops.native.linear import linear_attention_backward, linear_attention_forward
from tests.core_cases import relative
from tests.native_variants import REFUSAL

pytestmark = pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))

# (batch, queries, keys, D, Dv, m, weights per sequence, part of the keys that is real)
CASES = {
    "one token": (1, 1, 1, 8, 8, 5, False, 1.0),
    "ViT": (2, 197, 197, 64, 64, 64, False, 1.0),
    "padding, odd sizes": (2, 50, 131, 40, 24, 37, True, 0.7),
    "more queries than keys": (2, 500, 63, 17, 3, 100, True, 0.5),
    "many chunks": (1, 2500, 3000, 16, 16, 20, False, 0.9),
    "many neurons": (1, 63, 63, 128, 64, 300, False, 1.0),
}


def draw(name: str, scale: float = 1.0) -> tuple[list[Tensor], Tensor, Tensor | None, float]:
    """Query, key, value and weight; phase; key mask; square root of the scale."""
    batch, queries, keys, dim, value_dim, m, own_weights, part = CASES[name]
    inputs = [torch.randn(batch, n, 2, d).transpose(1, 2) for n, d in ((queries, dim), (keys, dim), (keys, value_dim))]
    weight = torch.randn(batch if own_weights else 1, 2, m, dim)
    mask = None
    if part < 1:
        mask = torch.rand(batch, keys) < part
        mask[:, 3] = True
    phase = torch.rand(*weight.shape[:3]) * 2 * pi
    return [*(x * scale for x in inputs), weight], phase, mask, dim**-0.25


def both(name: str, activation: str, dtype: torch.dtype, scale: float = 1.0) -> tuple[list[Tensor], ...]:
    """Output, log p and the gradients: of the kernels, of PyTorch in that dtype, of PyTorch in float64."""
    inputs, phase, mask, root = draw(name, scale)
    inputs = [*(x.to(dtype) for x in inputs[:3]), inputs[3]]
    out, log_p, *state = linear_attention_forward(*inputs, phase, mask, activation, root)
    seen = log_p.isfinite()
    d_out, d_log_p = torch.randn_like(out), torch.where(seen, torch.randn_like(log_p), 0)
    grads = linear_attention_backward(*(d_out, d_log_p, *inputs, phase, mask, activation, root, out, log_p, *state))
    answers = [[out, log_p[seen], *grads]]
    for precision in (dtype, torch.float64):
        low = [
            x.to(precision if n < 3 else max(precision, torch.float32, key=lambda t: t.itemsize))
            for n, x in enumerate(inputs)
        ]
        low = [x.detach().requires_grad_() for x in low]
        o, p = plain.linear_attention(*low, phase.to(low[3].dtype), mask, activation, root)
        given = [(o, d_out.to(o.dtype)), (p[seen], d_log_p[seen].to(p.dtype))]
        given = list(zip(*(pair for pair in given if pair[0].requires_grad), strict=True))  # log p may be a constant
        found = torch.autograd.grad(given[0], low, given[1], allow_unused=True)
        answers.append(
            [o, p[seen], *(torch.zeros_like(x) if g is None else g for x, g in zip(low, found, strict=True))]
        )
    return tuple(answers)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("activation", ["positive_exp", "positive_cosine", "truncated_exp", "elu1"])
def test_equal_to_plain_pytorch(name: str, activation: str, variant: str) -> None:
    ours, _, theirs = both(name, activation, torch.float32)
    for mine, exact in zip(ours, theirs, strict=True):
        exact = exact.detach()
        torch.testing.assert_close(mine.double(), exact.double(), rtol=1e-4, atol=2e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_errs_no_more_than_pytorch(activation: str, variant: str) -> None:
    # Where p comes near zero (cosine, linear) float32 itself loses digits: PyTorch in float32 is the measure.
    ours, plain_ones, theirs = both("padding, odd sizes", activation, torch.float32)
    for mine, plain_one, exact in zip(ours, plain_ones, theirs, strict=True):
        if activation == "constant" and mine is not ours[0] and mine is not ours[4]:
            continue  # the weights of uniform attention depend on nothing
        assert relative(mine, exact) < 3 * relative(plain_one, exact) + 2e-6


def test_uniform_attention_has_no_gradient_but_that_of_the_values(variant: str) -> None:
    ours, _, _ = both("ViT", "constant", torch.float32)
    assert [bool(grad.any()) for grad in ours[2:]] == [False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_no_more_than_pytorch(dtype: torch.dtype, variant: str) -> None:
    ours, plain_ones, theirs = both("ViT", "positive_exp", dtype)
    assert ours[0].dtype == dtype
    for mine, plain_one, exact in zip(ours, plain_ones, theirs, strict=True):
        assert relative(mine, exact) < 2 * relative(plain_one, exact) + 2e-6


def test_threads_and_layout_do_not_matter() -> None:
    inputs, phase, mask, root = draw("many chunks")
    threads = torch.get_num_threads()
    call = (phase, mask, "positive_exp", root)
    first = linear_attention_forward(*inputs, *call)
    try:
        for number, other in ((1, inputs), (4, [x.contiguous() for x in inputs])):
            torch.set_num_threads(number)
            assert all(map(torch.equal, linear_attention_forward(*other, *call), first))
    finally:
        torch.set_num_threads(threads)


def test_large_inputs_stay_finite(variant: str) -> None:
    inputs, phase, mask, root = draw("ViT", scale=30)
    out, log_p, *state = linear_attention_forward(*inputs, phase, mask, "positive_exp", root)
    assert out.isfinite().all()
    assert log_p.isfinite().all()
    call = (*inputs, phase, mask, "positive_exp", root)
    for grad in linear_attention_backward(torch.ones_like(out), torch.ones_like(log_p), *call, out, log_p, *state):
        assert grad.isfinite().all()


def test_nothing_real_gives_zeros(variant: str) -> None:
    inputs, phase, _, root = draw("ViT")
    mask = torch.tensor([[True] * 197, [False] * 197])
    out, log_p, *state = linear_attention_forward(*inputs, phase, mask, "positive_exp", root)
    assert not out[1].any()
    assert (log_p[1] == -torch.inf).all()
    d_log_p = torch.zeros_like(log_p)
    call = (*inputs, phase, mask, "positive_exp", root)
    *grads, _ = linear_attention_backward(torch.ones_like(out), d_log_p, *call, out, log_p, *state)
    assert not any(grad[1].any() for grad in grads)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_comes_out(which: int, variant: str) -> None:
    inputs, phase, _, root = draw("ViT")
    inputs[which][0, 0, 50] = torch.nan
    out = linear_attention_forward(*inputs, phase, None, "positive_exp", root)[0]
    assert out[0, 0, 50].isnan().all()
    assert out[0, 1].isfinite().all()
