"""Other people's attention in the benchmark: how each is called, who is left out and why; plain PyTorch stands in."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.benchmark import attention, peers, timing
from eval.benchmark.contestants import Contestant, GateError, Problem, softmax
from eval.benchmark.peers import PEERS, find_peers, reported_rows
from eval.benchmark.rows import _print_peers, select

TOKENS, HEADS, DIM = 40, 2, 16


def problem(dtype: torch.dtype = torch.float16) -> Problem:
    return Problem(batch=1, heads=HEADS, head_dim=DIM, dtype=dtype, device=torch.device("cpu"), seed=0)


def install(name: str, monkeypatch: pytest.MonkeyPatch, **functions: Callable[..., Any]) -> None:
    """A module of this name, and the packages above it."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:end]))
        module.__spec__ = ModuleSpec(module.__name__, None, is_package=True)
        if end == len(parts) or module.__name__ not in sys.modules:
            monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update(functions)


def rows_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of [B, N, H, D]."""
    assert q.shape == k.shape == v.shape
    assert q.shape[2:] == (HEADS, DIM)
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def heads_first(q: Tensor, k: Tensor, v: Tensor, *, tensor_layout: str, is_causal: bool) -> Tensor:
    assert tensor_layout == "HND"
    assert not is_causal
    assert q.shape[1::2] == (HEADS, DIM)
    return F.scaled_dot_product_attention(q, k, v)


def chunk_linear_attn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
    assert q.shape[2] == HEADS  # [B, N, H, m]
    assert q.is_contiguous()
    shares = torch.einsum("bihd,bjhd->bhij", q, k).tril()
    return torch.einsum("bhij,bjhd->bihd", shares / shares.sum(-1, keepdim=True), v), None


FUNCTIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "flash_attn": {"flash_attn_func": rows_last},
    "flash_attn_interface": {"flash_attn_func": lambda *x: (rows_last(*x), None)},
    "flash_attn.cute": {"flash_attn_func": lambda *x: (rows_last(*x), None)},
    "sageattention": {"sageattn": heads_first},
    "spas_sage_attn": {"spas_sage2_attn_meansim_topk_cuda": heads_first},
    "fla.ops.linear_attn": {"chunk_linear_attn": chunk_linear_attn},
}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, in place of their kernels plain PyTorch; cuDNN's is SDPA's on a CPU."""
    for name, functions in FUNCTIONS.items():
        install(name, monkeypatch, **functions)
    monkeypatch.setattr(peers, "SDPBackend", types.SimpleNamespace(CUDNN_ATTENTION=torch.nn.attention.SDPBackend.MATH))
    monkeypatch.setattr(peers, "GATE_LENGTHS", (TOKENS,))


@pytest.mark.usefixtures("installed")
def test_each_is_called_as_it_wants_to_be() -> None:
    found, rows = find_peers(problem(), backward=False)
    assert [each.name for each in found] == [peer.name for peer in PEERS]
    assert [row["name"] for row in rows] == [peer.name for peer in PEERS]
    assert all(row["reason"] is None for row in rows)
    trained, _ = find_peers(problem(), backward=True)
    assert [each.name for each in trained] == [peer.name for peer in PEERS[:-1]]  # FlexAttention's need a GPU
    inputs = problem(torch.float32).draw(TOKENS)[0]
    for contestant, peer in zip(found, PEERS, strict=True):
        torch.testing.assert_close(contestant.attend(*inputs), peer.plain(problem())(*inputs), rtol=1e-4, atol=1e-5)


def test_without_any_package_there_is_what_comes_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "GATE_LENGTHS", (TOKENS,))
    found, rows = find_peers(problem(torch.float32), backward=False)
    reasons = {row["name"]: row["reason"] for row in rows}
    assert [each.name for each in found] == ["FlexAttention, near 129"]
    assert found[0].kernel == f"torch {metadata.version('torch')}"
    assert reasons.pop("FlexAttention, near 129") is None
    assert reasons.pop("cuDNN") == "does not take float32"
    assert set(reasons.values()) == {"not installed"}


def test_who_fails_the_gate_or_raises_is_left_out_and_told(
    installed: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> Tensor:
        raise AssertionError("needs Hopper\nand more")

    install("flash_attn", monkeypatch, flash_attn_func=lambda *x: rows_last(*x) * 1.2)
    install("flash_attn.cute", monkeypatch, flash_attn_func=refuse)
    install("sageattention", monkeypatch, sageattn=lambda *x, **_: heads_first(*x, **_) * torch.nan)
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    found, rows = find_peers(problem(), backward=False)
    reasons = {row["name"]: row["reason"] for row in rows}
    assert reasons["flash-attn 2"].startswith("GateError: flash-attn 2")
    assert reasons["flash-attn 4"] == "AssertionError: needs Hopper"
    assert "a constant value" in reasons["SageAttention"]
    assert reasons["flash-attn 3"] == "not installed"
    assert {"flash-attn 2", "flash-attn 4", "SageAttention", "flash-attn 3"}.isdisjoint(each.name for each in found)
    _print_peers([row | {"dtype": "float16"} for row in rows] + reported_rows())
    printed = capsys.readouterr().out
    assert "not installed, and so without a row: flash-attn 3\n" in printed
    assert "flash-attn 4, float16, of an unknown version: AssertionError: needs Hopper" in printed
    assert "reported by MonarchAttention's README on H100, float16, batch 1, 12 heads of 64, forward" in printed
    assert "16,384: 0.105" in printed


@pytest.mark.usefixtures("installed")
def test_wrong_results_of_an_exact_one_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def shuffled(*x: Tensor) -> Tensor:
        return rows_last(x[0].flip(1), *x[1:])

    install("flash_attn_interface", monkeypatch, flash_attn_func=shuffled)
    reasons = {row["name"]: row["reason"] for row in find_peers(problem(), backward=False)[1]}
    assert reasons["flash-attn 3"].startswith("GateError: flash-attn 3")


def measured(contestant: Contestant, backward: bool) -> list[dict]:
    """The rows of a cell with this contestant beside SDPA."""
    given = problem(torch.float32)
    sdpa = Contestant("SDPA", "torch.nn", "sdpa", F.scaled_dot_product_attention)
    ceilings = {"bytes per second": 1.0, "operations per second": 1.0}
    return attention._measure_cell(given, [sdpa, contestant], TOKENS, backward, timing.Effort(3, 1), ceilings)


def test_who_has_no_gradients_is_not_timed_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_peak_of", lambda *_: 1)
    sage = Contestant("SageAttention", "peer", "sage 2", softmax, has_backward=False)
    assert [row["name"] for row in measured(sage, backward=False)] == ["SDPA", "SageAttention"]
    assert [row["name"] for row in measured(sage, backward=True)] == ["SDPA"]


def test_a_peer_that_is_wrong_at_one_length_has_no_row_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_peak_of", lambda *_: 1)
    wrong = Contestant("SageAttention", "peer", "sage 2", lambda *x: softmax(*x) * 2)
    with pytest.warns(UserWarning, match="SageAttention, 40 tokens: .*a constant value"):
        assert [row["name"] for row in measured(wrong, backward=False)] == ["SDPA"]
    with pytest.raises(GateError):
        measured(replace(wrong, backend="auto"), backward=False)


def test_approximations_have_an_error_and_others_none() -> None:
    given = problem(torch.float32)
    rough = Contestant("a", "peer", "a", lambda *x: softmax(*x) * 1.5, approximates=True)
    assert attention.measure_error(rough, given) == pytest.approx(0.5, rel=1e-4)
    assert attention.measure_error(replace(rough, approximates=False), given) is None


def test_reported_numbers_are_not_among_the_measured() -> None:
    rows = reported_rows()
    assert select(rows, "attention") == []
    assert all(row["source"].startswith("reported by MonarchAttention's README on ") for row in rows)
    assert len(rows) == 25
