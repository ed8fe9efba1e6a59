"""The CPU kernels against plain PyTorch in float64, given the kernels' own choices; and their build."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from astroattn.ops import plain
from astroattn.ops.layout import ROOT, Budget
from astroattn.ops.native import build, library
from astroattn.ops.native import near_far as native
from tests.core_cases import relative
from tests.native_variants import REFUSAL

pytestmark = pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))

# (tokens, D, Dv, what differs from `settings_of`, lengths)
CASES = {
    "ViT": (197, 64, 64, {"grid": (14, 14), "prefix": 1}, None),
    "grid that does not divide": (5 * 7 + 2, 24, 40, {"grid": (5, 7), "prefix": 2, "exact_keys": 5, "near": 6}, None),
    "sequence": (300, 32, 32, {}, None),
    "by position": (300, 32, 32, {"by_content": False, "tile": 16, "near": 9, "exact_keys": 5}, None),
    "grid by position": (197, 32, 32, {"grid": (14, 14), "prefix": 1, "by_content": False, "near": 9}, None),
    "padding": (331, 40, 24, {"prefix": 2}, [331, 150]),
    "padding, all keys exact": (133, 24, 24, {}, [67, 133]),
    "padding by position": (131, 40, 24, {"prefix": 2, "exact_keys": 8, "by_content": False}, [131, 50]),
    "nothing real": (67, 16, 16, {"exact_keys": 8, "num_hidden": 5}, [0, 67]),
    "padding, prefix alone real": (67, 16, 16, {"prefix": 3, "exact_keys": 8, "num_hidden": 5}, [2, 67]),
    "large tiles": (500, 64, 64, {"tile": 64, "near": 16, "num_hidden": 64, "exact_keys": 0}, None),
    "one tile": (190, 16, 16, {"tile": 190, "near": 0, "exact_keys": 0, "num_hidden": 7}, None),
    "no near field": (190, 16, 16, {"near": 0, "exact_keys": 9, "num_hidden": 7}, None),
    "no far field": (100, 17, 3, {"near": 5, "exact_keys": 6, "num_hidden": 0}, None),
    "near alone": (63, 8, 8, {"near": 5, "exact_keys": 0, "num_hidden": 0, "by_content": False}, None),
    "more neurons than tokens": (9, 8, 8, {"tile": 4, "near": 1, "exact_keys": 1, "num_hidden": 40}, None),
    "three tokens": (3, 8, 8, {"near": 1, "exact_keys": 1, "num_hidden": 2}, None),
    "many tokens": (2500, 16, 16, {"exact_keys": 9}, None),
    "wide heads": (70, 300, 270, {"exact_keys": 9, "num_hidden": 6, "prefix": 1}, None),
}


def budget_of(changes: dict[str, object]) -> Budget:
    values = {"grid": None, "prefix": 0, "tile": ROOT, "by_content": True, "near": ROOT, "exact_keys": ROOT}
    return Budget(**{**values, "num_hidden": ROOT, "steps": 2} | changes)


def draw(tokens: int, dim: int, value_dim: int, batch: int = 2, scale: float = 1.5) -> list[Tensor]:
    """Query, key and value [2, 2, N, D], laid out as [batch, tokens, heads, D]."""
    return [torch.randn(batch, tokens, 2, d).transpose(1, 2) * scale for d in (dim, dim, value_dim)]


def by_distance(tokens: int) -> Tensor:
    """A bias as models learn it: smooth in the distance, of several units, and other in every head [1, 2, N, N]."""
    place = torch.arange(tokens)
    distance = place[:, None] - place
    return torch.stack([-2 * distance.abs().add(1).log(), 3 * (distance / 10).sin()])[None]


# What a bias may look like, made from any numbers [B, H, N, N].
BIASES: dict[str, Callable[[Tensor], Tensor]] = {
    "of each": lambda x: x,
    "of sequences": lambda x: x[:, :1],
    "of heads": lambda x: x[:1],
    "of all": lambda x: x[:1, :1],
    "transposed": lambda x: x.mT.contiguous().mT,
    "rows with gaps": lambda x: F.pad(x, (3, 4))[..., 3:-4],
    "expanded": lambda x: x[:1].expand_as(x),
    "bfloat16": lambda x: x.bfloat16(),
    "float16": lambda x: x.half()[:, :1].mT.contiguous().mT,
}


def forward(
    inputs: list[Tensor], lengths: list[int] | None, changes: dict[str, object], bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    lengths = None if lengths is None else torch.tensor(lengths)
    return native.near_far_forward(*inputs, bias, lengths, budget_of(changes), inputs[0].shape[-1] ** -0.5)


def backward(
    d_out: Tensor,
    d_log_p: Tensor,
    inputs: list[Tensor],
    results: tuple[Tensor, ...],
    lengths: list[int] | None,
    changes: dict[str, object],
    bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    lengths = None if lengths is None else torch.tensor(lengths)
    scale = inputs[0].shape[-1] ** -0.5
    return native.near_far_backward(d_out, d_log_p, *inputs, bias, *results, lengths, budget_of(changes), scale)


def given_choices(
    inputs: list[Tensor],
    choices: list[Tensor],
    lengths: list[int] | None,
    changes: dict[str, object],
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch in float64 with the same order, winners, mass and keys."""
    lengths = None if lengths is None else torch.tensor(lengths)
    query, key, value = (x.double() for x in inputs)
    bias = None if bias is None else bias.double()
    given = (query, key, value, bias, *choices, lengths, budget_of(changes), query.shape[-1] ** -0.5)
    return plain.near_far_given(*given)


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_equal_plain_pytorch(name: str, variant: str) -> None:
    check_forward_and_backward(name, None)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "of each") for name in CASES if name != "many tokens"]
    + [(name, kind) for kind in BIASES for name in ("ViT", "by position")]
    + [(name, kind) for kind in ("transposed", "of sequences", "float16") for name in ("padding", "no far field")],
)
def test_a_bias_is_added_to_the_logits(name: str, kind: str, variant: str) -> None:
    """Keys that are padding have a bias of -inf, queries that are padding one of NaN; neither may be read."""
    tokens, *_, lengths = CASES[name]
    bias = 2 * torch.randn(2, 2, tokens, tokens) + by_distance(tokens)
    if lengths is not None:
        padding = torch.arange(tokens) >= torch.tensor(lengths)[:, None, None, None]
        bias = bias.masked_fill(padding, -torch.inf).masked_fill(padding.mT, torch.nan)
    check_forward_and_backward(name, BIASES[kind](bias))


def check_forward_and_backward(name: str, bias: Tensor | None) -> None:
    tokens, dim, value_dim, changes, lengths = CASES[name]
    inputs = draw(tokens, dim, value_dim)
    results = out, log_p, *choices = forward(inputs, lengths, changes, bias)
    exact = [x.double().requires_grad_() for x in inputs]
    expected, expected_log_p = given_choices(exact, choices, lengths, changes, bias)
    assert relative(out, expected) < 2e-6
    real = expected_log_p > -torch.inf
    torch.testing.assert_close(log_p.double(), expected_log_p, rtol=1e-5, atol=1e-5)

    d_out, d_log_p = torch.randn_like(out), torch.randn_like(log_p)
    grads = backward(d_out, d_log_p, inputs, results, lengths, changes, bias)
    wanted = torch.autograd.grad([expected, expected_log_p[real]], exact, [d_out.double(), d_log_p[real].double()])
    for ours, theirs in zip(grads, wanted, strict=True):
        assert relative(ours, theirs) < 4e-6


@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][4] is None])
def test_choices_are_as_good_as_those_of_plain_pytorch(name: str, biased: bool, variant: str) -> None:
    """Rounding turns a tree's cuts and whatever is as good as equal the other way, so the outputs are compared."""
    tokens, dim, value_dim, changes, _ = CASES[name]
    inputs, bias = draw(tokens, dim, value_dim), by_distance(tokens) if biased else None
    ours, _, order, winners, mass, keys = forward(inputs, None, changes, bias)
    budget, exact = budget_of(changes), [x.double() for x in inputs]
    exact_bias = None if bias is None else bias.double()
    theirs, _, *choices = plain.near_far_forward(*exact, exact_bias, None, budget, dim**-0.5)
    assert [x.shape for x in (order, winners, mass, keys)] == [x.shape for x in choices]
    body = torch.arange(tokens - budget.prefix)
    assert torch.equal(order.sort(-1).values, body.expand_as(order).int())  # each query once
    assert mass.min() >= 0
    chosen = keys.sort(-1).values
    assert not ((chosen[..., 1:] == chosen[..., :-1]) & (chosen[..., 1:] >= 0)).any()  # no key twice
    softmax = F.scaled_dot_product_attention(*exact, attn_mask=exact_bias)
    assert relative(ours, softmax) < 1.1 * relative(theirs, softmax) + 1e-4


@pytest.mark.parametrize("name", ["by position", "grid by position"])
def test_what_a_bias_differs_by_in_a_tile_counts_in_the_choices(name: str, variant: str) -> None:
    """The order of these tiles is given, so nearly all exact keys are those of plain PyTorch."""
    tokens, dim, value_dim, changes, _ = CASES[name]
    inputs, bias = draw(tokens, dim, value_dim), 2 * torch.randn(1, 2, tokens, tokens)
    ours = forward(inputs, None, changes, bias)[-1]
    exact = [x.double() for x in (*inputs, bias)]
    theirs = plain.near_far_forward(*exact, None, budget_of(changes), dim**-0.5)[-1]
    same = (ours[..., None] == theirs[..., None, :]).any(-1)
    assert same[ours >= 0].float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ViT", "by position", "large tiles"])
def test_low_precision_errs_no_more_than_pytorch(name: str, dtype: torch.dtype, variant: str) -> None:
    tokens, dim, value_dim, changes, lengths = CASES[name]
    inputs = [x.to(dtype) for x in draw(tokens, dim, value_dim)]
    results = out, log_p, *choices = forward(inputs, lengths, changes)
    exact = [x.double().requires_grad_() for x in inputs]
    expected, _ = given_choices(exact, choices, lengths, changes)
    low = [x.detach().requires_grad_() for x in inputs]
    softmax = F.scaled_dot_product_attention(*low)
    softmax_exact = F.scaled_dot_product_attention(*exact)
    assert out.dtype == dtype
    assert relative(out, expected) < 2 * relative(softmax, softmax_exact)

    d_out = torch.randn_like(out)
    grads = backward(d_out, torch.zeros_like(log_p), inputs, results, lengths, changes)
    wanted = torch.autograd.grad(expected, exact, d_out.double())
    plain_low = torch.autograd.grad(softmax, low, d_out)
    plain_exact = torch.autograd.grad(softmax_exact, exact, d_out.double())
    for ours, theirs, low_grad, exact_grad in zip(grads, wanted, plain_low, plain_exact, strict=True):
        assert relative(ours, theirs) < 3 * relative(low_grad, exact_grad)


@pytest.mark.parametrize("scale", [5.0, 20.0, 60.0])
def test_large_logits_lose_no_digits(scale: float, variant: str) -> None:
    """Logits in the hundreds: what the clusters give too much is not subtracted, so only the logits are rounded."""
    inputs = draw(260, 32, 32, scale=scale**0.5)
    inputs[2] /= scale**0.5
    results = out, log_p, *choices = forward(inputs, None, {})
    exact = [x.double().requires_grad_() for x in inputs]
    expected, _ = given_choices(exact, choices, None, {})
    largest = (inputs[0] @ inputs[1].mT * 32**-0.5).abs().max()
    assert relative(out, expected) < 4e-7 * largest + 2e-6

    d_out = torch.randn_like(out)
    grads = backward(d_out, torch.zeros_like(log_p), inputs, results, None, {})
    for ours, theirs in zip(grads, torch.autograd.grad(expected, exact, d_out.double()), strict=True):
        assert relative(ours, theirs) < 1e-6 * largest + 4e-6


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(12, 150),
    dim=st.integers(1, 70),
    tile=st.integers(1, 40),
    by_content=st.booleans(),
    near=st.integers(0, 12),
    exact_keys=st.integers(0, 9),
    num_hidden=st.integers(1, 20),
    steps=st.integers(0, 3),
    prefix=st.integers(0, 3),
)
def test_any_settings(tokens: int, dim: int, **changes: int) -> None:
    inputs = draw(tokens, dim, dim, batch=1)
    lengths = [tokens - tokens // 3]
    out, log_p, *choices = forward(inputs, lengths, changes)
    expected, expected_log_p = given_choices(inputs, choices, lengths, changes)
    assert relative(out, expected) < 5e-6
    torch.testing.assert_close(log_p.double(), expected_log_p, rtol=1e-4, atol=1e-4)


def test_layout_of_the_inputs_and_threads_do_not_matter() -> None:
    inputs = draw(300, 32, 32, batch=3)
    threads = torch.get_num_threads()
    first = forward(inputs, None, {})
    try:
        for number, other in (
            (1, inputs),
            (2, [x.contiguous() for x in inputs]),
            (4, [x.mT.contiguous().mT for x in inputs]),
        ):
            torch.set_num_threads(number)
            for ours, theirs in zip(forward(other, None, {}), first, strict=True):
                assert torch.equal(ours, theirs)
    finally:
        torch.set_num_threads(threads)


def test_memory_that_is_kept_between_calls_holds_nothing_of_the_last() -> None:
    small, large = draw(70, 16, 16), draw(900, 16, 16)
    first = [forward(x, None, {"exact_keys": 8})[0] for x in (small, large)]
    poison = [torch.full_like(x, torch.nan) for x in large]
    assert forward(poison, None, {"exact_keys": 8})[0].isnan().all()
    again = [forward(x, None, {"exact_keys": 8})[0] for x in (small, large)]
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_and_infinity_come_out(bad: float, which: int, variant: str) -> None:
    inputs = draw(120, 16, 16)
    inputs[which][0, 0, 50] = bad
    out = forward(inputs, None, {"exact_keys": 8})[0]
    assert not out[0, 0, 50].isfinite().all()
    assert out[0, 1].isfinite().all()
    assert out[1].isfinite().all()


def test_large_logits_stay_finite(variant: str) -> None:
    inputs = draw(200, 32, 32, scale=20)
    out, log_p, *_ = forward(inputs, None, {})
    assert out.isfinite().all()
    assert log_p.isfinite().all()
    assert out.abs().max() <= 1.001 * inputs[2].abs().max()


def test_it_is_softmax_where_every_key_is_exact(variant: str) -> None:
    inputs = draw(60, 16, 16)
    out = forward(inputs, None, {"near": 20, "exact_keys": 40})[0]
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*inputs), rtol=1e-4, atol=1e-5)


def test_other_dtypes_are_refused() -> None:
    assert "float64" in library.refusal(torch.float64)


def test_build_says_what_the_compiler_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RuntimeError, match="failed"):
        build.build(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="no-such-compiler"):
        build.build(tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_a_build_the_reason_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    monkeypatch.setattr(library, "_library", library._library.__wrapped__)
    assert "astroattn.ops.native.build" in library.refusal(torch.float32)
    (tmp_path / "kernels_default.so").write_bytes(b"not a library")
    assert "cannot be loaded" in library.refusal(torch.float32)
    cc = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if cc is not None:  # a build of before the kernels had this function
        source = tmp_path / "old.c"
        source.write_text("int astroattn_near_far(void) { return 0; }")
        old = tmp_path / "old"
        old.mkdir()
        subprocess.run([cc, "-shared", "-fPIC", "-o", str(old / "kernels_default.so"), str(source)], check=True)
        monkeypatch.setattr(library, "FOLDER", old)
        assert "of an older version" in library.refusal(torch.float32)
        monkeypatch.setattr(library, "FOLDER", tmp_path)
    with pytest.raises(RuntimeError, match="cannot be loaded"):
        forward(draw(50, 16, 16), None, {"exact_keys": 8})
