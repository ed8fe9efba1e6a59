"""Memory that grows with the sequence only, and life as an nn.Module: copies, dtypes, compile."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from math import isqrt

import pytest
import torch
from core_cases import BIDIRECTIONAL, EVERY, draw, module, relative
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from astroattn import AstroConfig, AstrocyteAttention
from astroattn.config import is_tiled
from astroattn.ops import plain, static


class Largest(TorchDispatchMode):
    """Notes the largest storage that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numbers = max([self.numbers, *(x.untyped_storage().nbytes() // x.element_size() for x in made)])
        return out


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("backward", [False, True])
def test_no_tensor_grows_as_the_square_of_the_length(
    name: str, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tiles of a length's root, as N^1.5: each tile reads all keys, a query the keys of its tile; else as N."""
    config, causal = EVERY[name]
    monkeypatch.setattr(plain, "WORKSPACE", 2**14)  # one head at a time

    def largest(tokens: int) -> int:
        qkv = [x.requires_grad_(backward) for x in draw(1, 2, tokens, 8, dtype=torch.float32)]
        attention = module(dataclasses.replace(config, tile=isqrt(tokens), backend="torch"))
        with Largest() as mode:
            out = attention(*qkv, causal=causal)
            if backward:
                torch.autograd.grad(out.sum(), qkv, materialize_grads=True)
        return mode.numbers

    few, many = largest(1024), largest(4096)
    assert many < 4096**2 / 12
    assert many <= 1.05 * few * 4 ** (1.5 if is_tiled(config) or config.exact_queries else 1)


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_no_tensor_grows_with_the_number_of_heads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the inputs themselves: 16 heads are taken one by one where the workspace holds no more."""
    config = dataclasses.replace(BIDIRECTIONAL[name], backend="torch")
    qkv = draw(1, 16, 256, 2, dtype=torch.float32)
    monkeypatch.setattr(plain, "WORKSPACE", 1)
    monkeypatch.setattr(static, "FEATURES", 1)
    with Largest() as sliced:
        module(config, 16, 2)(*qkv)
    monkeypatch.setattr(plain, "WORKSPACE", 2**40)
    monkeypatch.setattr(static, "FEATURES", 2**40)
    with Largest() as whole:
        module(config, 16, 2)(*qkv)
    inputs = qkv[0].numel()
    assert sliced.numbers == inputs or sliced.numbers < whole.numbers / 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [AstroConfig(), AstroConfig(backend="torch"), AstroConfig(hidden="random")],
    ids=["default", "default, plain", "random"],
)
def test_65536_tokens(config: AstroConfig) -> None:
    """An N x N matrix would take 16 GiB."""
    qkv = draw(1, 1, 65_536, 16, dtype=torch.float32)
    with torch.no_grad(), Largest() as mode:
        out = AstrocyteAttention(1, 16, config)(*qkv)
    assert out.isfinite().all()
    assert mode.numbers <= 2**27


@pytest.mark.parametrize("name", EVERY)
def test_copies_attend_alike(name: str) -> None:
    config, causal = EVERY[name]
    attention, qkv = module(config), draw(2, 2, 40, 8, dtype=torch.float32)
    out = attention(*qkv, causal=causal)
    saved = io.BytesIO()
    torch.save(attention, saved)
    saved.seek(0)
    for copied in (
        copy.deepcopy(attention),
        pickle.loads(pickle.dumps(attention)),  # noqa: S301
        torch.load(saved, weights_only=False),
        module(config),
    ):
        assert torch.equal(copied(*qkv, causal=causal), out)
    assert attention.state_dict() == {}
    assert list(attention.parameters()) == []
    assert str(config) in repr(attention)


@pytest.mark.parametrize("name", EVERY)
def test_moves_to_other_dtypes(name: str) -> None:
    config, causal = EVERY[name]
    attention, qkv = module(config), draw(2, 2, 40, 8, dtype=torch.float32)
    out = attention(*qkv, causal=causal)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 0.1)):
        moved = copy.deepcopy(attention).to(dtype)(*(x.to(dtype) for x in qkv), causal=causal)
        assert moved.dtype == dtype
        rounded = dtype == torch.bfloat16 or (config.backend == "auto" and config.exact_keys)
        if config.hidden == "random" or not rounded:  # the others' choices depend on rounding
            assert relative(moved, out) < tolerance


@pytest.mark.parametrize("name", EVERY)
def test_gradient_checkpointing(name: str) -> None:
    config, causal = EVERY[name]
    attention, qkv = module(config), [x.requires_grad_() for x in draw(2, 2, 40, 8, dtype=torch.float32)]
    plain = torch.autograd.grad(attention(*qkv, causal=causal).square().sum(), qkv, materialize_grads=True)
    again = checkpoint(lambda *x: attention(*x, causal=causal), *qkv, use_reentrant=False)
    for ours, theirs in zip(torch.autograd.grad(again.square().sum(), qkv, materialize_grads=True), plain, strict=True):
        torch.testing.assert_close(ours, theirs)
