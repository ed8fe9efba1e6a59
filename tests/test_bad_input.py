"""Whatever a caller may pass: a clear error that names the argument, or the documented result."""

from __future__ import annotations

import math

import pytest
import torch
from core_cases import EVERY, draw
from hypothesis import given, settings
from hypothesis import strategies as st

from astroattn import AstroConfig, AstrocyteAttention
from astroattn.config import is_tiled

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def call(**changes: object) -> torch.Tensor:
    """A call that is right but for the changes: 2 sequences, 3 heads, 50 tokens of length 8."""
    query, key, value = draw(2, 3, 50, 8, dtype=torch.float32)
    config = changes.pop("config", AstroConfig(num_hidden=4, near=1, exact_keys=4))
    arguments = {"query": query, "key": key, "value": value} | changes
    return AstrocyteAttention(3, 8, config)(**arguments)


def test_the_call_itself_is_right() -> None:
    assert call().shape == (2, 3, 50, 8)
    assert call(value=torch.zeros(2, 3, 50, 5)).shape == (2, 3, 50, 5)  # values of another length


BAD = [
    ("query", None, TypeError, "^query: NoneType; expected a tensor"),
    ("key", [[1.0]], TypeError, "^key: list; expected a tensor"),
    (
        "query",
        torch.zeros(2, 3, 50, 8, dtype=torch.long),
        TypeError,
        "^query: torch.int64; expected one of torch.float32",
    ),
    ("query", torch.zeros(2, 3, 50, 8, dtype=torch.cfloat), TypeError, "^query: torch.complex64"),
    ("value", torch.zeros(2, 3, 50, 8, dtype=torch.int8), TypeError, "^value: torch.int8"),
    (
        "key",
        torch.zeros(2, 3, 50, 8, dtype=torch.float64),
        ValueError,
        "^key: torch.float64 on cpu; query is torch.float32",
    ),
    ("value", torch.zeros(2, 3, 50, 8, device="meta"), ValueError, "^value: torch.float32 on meta; query is"),
    ("query", torch.zeros(3, 50, 8), ValueError, r"^query: shape \(3, 50, 8\); expected \[B, H, N, D\]"),
    ("value", torch.zeros(2, 3, 50), ValueError, r"^value: shape \(2, 3, 50\)"),
    ("query", torch.zeros(2, 6, 50, 8), ValueError, "^query: 6 heads; this module has num_heads=3"),
    ("key", torch.zeros(2, 1, 50, 8), ValueError, "^key: 1 heads"),
    ("key", torch.zeros(1, 3, 50, 8), ValueError, "^key: batch 1; query has 2"),
    ("query", torch.zeros(2, 3, 50, 16), ValueError, "^query: head dimension 16; this module has head_dim=8"),
    ("key", torch.zeros(2, 3, 50, 4), ValueError, "^key: head dimension 4"),
    ("value", torch.zeros(2, 3, 50, 0), ValueError, "^value: vectors of length 0"),
    ("value", torch.zeros(2, 3, 49, 8), ValueError, "^value: 49 tokens; key has 50"),
    ("key", torch.zeros(2, 3, 49, 8), ValueError, "^value: 50 tokens; key has 49"),
    ("cross", 1, TypeError, "^cross: int; expected bool or None"),
    ("key_mask", torch.ones(2, 50), TypeError, "^key_mask: torch.float32; expected a bool tensor"),
    ("key_mask", torch.ones(2, 50, dtype=torch.long), TypeError, "^key_mask: torch.int64"),
    ("key_mask", [[True] * 50] * 2, TypeError, "^key_mask: list"),
    ("key_mask", torch.ones(2, 49, dtype=torch.bool), ValueError, r"^key_mask: shape \(2, 49\); expected .* \(2, 50\)"),
    ("key_mask", torch.ones(50, dtype=torch.bool), ValueError, r"^key_mask: shape \(50,\)"),
    ("key_mask", torch.ones(2, 1, 50, 50, dtype=torch.bool), ValueError, r"^key_mask: shape \(2, 1, 50, 50\)"),
    ("causal", "no", TypeError, "^causal: str; expected bool"),
    ("causal", None, TypeError, "^causal: NoneType"),
    ("causal", True, ValueError, r"^causal: True with this config; .*hidden='streaming', 'random'"),
    ("scale", 0, ValueError, "^scale: 0; must be positive and finite"),
    ("scale", -1.0, ValueError, "^scale: -1.0"),
    ("scale", math.nan, ValueError, "^scale: nan"),
    ("scale", math.inf, ValueError, "^scale: inf"),
    ("scale", "0.5", TypeError, "^scale: str; expected a number or None"),
    ("scale", True, TypeError, "^scale: bool"),
    ("scale", torch.ones(3), TypeError, "^scale: Tensor"),
    ("grid", (0, 7), ValueError, r"^grid: \(0, 7\); needs rows and columns of at least 1, at most 50 patches"),
    ("grid", (-5, -5), ValueError, r"^grid: \(-5, -5\)"),
    ("grid", (7, 8), ValueError, r"^grid: \(7, 8\)"),
    ("grid", 49, TypeError, r"^grid: 49; expected \(rows, columns\), two ints"),
    ("grid", (7,), TypeError, r"^grid: \(7,\); expected"),
    ("grid", (7, 7, 1), TypeError, r"^grid: \(7, 7, 1\); expected"),
    ("grid", (7.0, 7.0), TypeError, r"^grid: \(7.0, 7.0\); expected"),
    ("grid", (True, 7), TypeError, r"^grid: \(True, 7\); expected"),
    ("config", {"near": 4}, TypeError, "^config: dict; expected AstroConfig"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD, ids=lambda each: str(each)[:40].replace("\n", ""))
def test_bad_arguments_are_named(name: str, value: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call(**{name: value})


def test_bad_combinations() -> None:
    mask = torch.ones(2, 50, dtype=torch.bool)
    for more in ({"key_mask": mask}, {"causal": True, "config": AstroConfig(hidden="random")}):
        with pytest.raises(ValueError, match=r"^grid: \(7, 7\); a patch grid takes neither key_mask nor causal"):
            call(grid=(7, 7), **more)
    query = torch.zeros(2, 3, 60, 8)
    with pytest.raises(ValueError, match=r"^query: 60 tokens, more than the 50 keys; causal needs at most as many"):
        call(query=query, causal=True, config=AstroConfig(hidden="random"))
    for tiled in ({"near": 3}, {"exact_keys": 3}, {"exact_queries": 3}):
        with pytest.raises(ValueError, match=r"^query: 60 tokens and 50 keys; cross attention is for"):
            call(query=query, config=AstroConfig(hidden="random", **tiled))
    for more in ({"window": 3}, {"grid": (7, 7)}):
        with pytest.raises(ValueError, match=r"^cross: True; cross attention has no window and no grid"):
            call(cross=True, **more)
    with pytest.raises(ValueError, match=r"^cross: True; cross attention is not causal"):
        call(cross=True, causal=True, config=AstroConfig(hidden="random"))
    empty = torch.zeros(2, 3, 0, 8)
    with pytest.raises(ValueError, match=r"^key: no tokens; needs at least 1"):
        call(key=empty, value=empty)


@pytest.mark.parametrize("name", ["num_heads", "head_dim"])
def test_bad_sizes(name: str) -> None:
    for size, error in ((0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError), (None, TypeError)):
        with pytest.raises(error, match=f"^{name}: {size}"):
            AstrocyteAttention(**({"num_heads": 2, "head_dim": 8} | {name: size}))


@pytest.mark.parametrize("name", ["num_queries", "num_keys"])
def test_bad_costs(name: str) -> None:
    attention = AstrocyteAttention(2, 8)
    for size, error in ((0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"^{name}: {size}"):
            attention.cost(**({"num_queries": 9, "num_keys": 9} | {name: size}))
    with pytest.raises(ValueError, match=r"^grid: \(4, 4\)"):
        attention.cost(9, 9, grid=(4, 4))


@pytest.mark.parametrize("name", EVERY)
def test_empty_batches_and_single_tokens(name: str) -> None:
    config, causal = EVERY[name]
    attention = AstrocyteAttention(3, 8, config)
    for shape in ((0, 3, 50, 8), (0, 3, 1, 8)):
        empty = torch.zeros(shape)
        out, normaliser = attention.with_normaliser(empty, empty, empty, causal=causal)
        assert (out.shape, normaliser.shape) == (empty.shape, empty.shape[:3])
    query, key, value = draw(2, 3, 1, 8)
    out, normaliser = attention.with_normaliser(query, key, value, causal=causal)
    torch.testing.assert_close(out, value)
    if is_tiled(config) or config.exact_queries:  # else it is read through random neurons
        torch.testing.assert_close(normaliser, (query * key).sum(-1) * 8**-0.5)
    none = torch.zeros(2, 1, dtype=torch.bool)
    assert not attention(query, key, value, causal=causal, key_mask=none).any()


def test_no_queries() -> None:
    attention = AstrocyteAttention(3, 8, AstroConfig(hidden="random"))
    key, value = draw(2, 3, 50, 8, count=2)
    for causal in (False, True):
        assert attention(key[:, :, :0], key, value, causal=causal).shape == (2, 3, 0, 8)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["query", "key", "value"])
def test_nan_and_infinity_are_not_hidden(name: str, bad: float, place: str) -> None:
    """The row that has them shows them: a query its own result, a key or value what reads it. No other row does."""
    config, causal = EVERY[name]
    if config.activation == "constant" and place != "value":
        pytest.skip("looks at no query and no key")
    qkv = dict(zip(("query", "key", "value"), draw(2, 3, 50, 8, dtype=torch.float32), strict=True))
    qkv[place][0, 1, 30, 2] = bad
    out = AstrocyteAttention(3, 8, config)(**qkv, causal=causal)
    assert not out[0, 1, 30].isfinite().all()
    assert out[1].isfinite().all()
    assert out[0, [0, 2]].isfinite().all()


@st.composite
def calls(drawn: st.DrawFn) -> dict:
    name = drawn(st.sampled_from(sorted(EVERY)))
    sizes = {"batch": st.integers(0, 3), "heads": st.integers(1, 2), "tokens": st.integers(1, 50)}
    sizes = {key: drawn(value) for key, value in sizes.items()}
    sizes |= {"dim": drawn(st.integers(1, 9)), "value_dim": drawn(st.integers(1, 9))}
    density = drawn(st.sampled_from([None, 0.0, 0.1, 0.6, 1.0]))
    return {"name": name, "density": density, "dtype": drawn(st.sampled_from(DTYPES)), **sizes} | {
        "scale": drawn(st.sampled_from([None, 0.01, 1.0, 30.0])),
        "seed": drawn(st.integers(0, 2**31)),
    }


@settings(max_examples=150, deadline=None)
@given(calls())
def test_any_call_gives_a_weighted_mean_of_the_values(case: dict) -> None:
    config, causal = EVERY[case["name"]]
    torch.manual_seed(case["seed"])
    shape = (case["batch"], case["heads"], case["tokens"])
    query, key = draw(*shape, case["dim"], dtype=case["dtype"], count=2)
    value = torch.cat([torch.ones(*shape, 1), torch.randn(*shape, case["value_dim"])], -1).to(case["dtype"])
    mask = None if case["density"] is None else torch.rand(case["batch"], case["tokens"]) < case["density"]
    attention = AstrocyteAttention(case["heads"], case["dim"], config)
    options = {"key_mask": mask, "causal": causal, "scale": case["scale"]}
    out, normaliser = attention.with_normaliser(query, key, value, **options)
    assert (out.shape, out.dtype) == (value.shape, case["dtype"])
    assert normaliser.shape == shape
    assert out.isfinite().all()
    assert not normaliser.isnan().any()
    torch.testing.assert_close(attention(query, key, value, **options), out)
    total = torch.ones(shape) if mask is None else mask[:, None].expand(shape).float()
    rows = total.bool()  # softmax attention gives padding a result, the others zeros
    torch.testing.assert_close(out[..., 0].float()[rows], total[rows], rtol=1e-2, atol=1e-2)
    if mask is not None:
        assert not out[~mask.any(1)].any()
        value = value.masked_fill(~mask[:, None, :, None], 0)
    largest = value.float().abs().amax((2, 3)) if case["batch"] else torch.zeros(shape[:2])
    assert (out.float().abs().amax((2, 3)) <= largest * 1.02 + 1e-6).all()
