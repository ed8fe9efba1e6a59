"""Static hidden layers: linear, with a near field, causal in chunks and step by step, against N x N matrices."""

from __future__ import annotations

import pytest
import torch
from core_cases import draw, exact_mask, layout
from torch.autograd import gradcheck

from astroattn.config import ACTIVATIONS as NAMES
from astroattn.ops.features import ACTIVATIONS, features
from astroattn.ops.reference import feature_attention, softmax_attention
from astroattn.ops.static import (
    Hidden,
    causal_linear_attention,
    linear_attention,
    near_linear_attention,
    read,
    recurrent_step,
)

POSITIVE = tuple(name for name in NAMES if name not in ("cosine", "linear"))
EXPONENTIAL = ("positive_exp", "truncated_exp")


def hidden(activation: str, m: int = 12, size: int = 2, dim: int = 6, dtype: torch.dtype = torch.float64) -> Hidden:
    weight = torch.randn(size, m, dim, dtype=torch.float64)
    return Hidden(weight.to(dtype), (torch.rand(size, m, dtype=torch.float64) * 6.28).to(dtype), activation)


def oracle(qkv: list, layer: Hidden, exact: torch.Tensor | None = None, mask: torch.Tensor | None = None) -> tuple:
    query, key, _ = qkv
    exact = torch.zeros(len(key), query.shape[1], key.shape[1], dtype=torch.bool) if exact is None else exact
    out, normaliser = feature_attention(*qkv, layer.weight, layer.phase, layer.activation, exact, mask)
    return out.masked_fill((normaliser == -torch.inf)[..., None], 0), normaliser  # no neuron responds: zeros, not 0 / 0


def check(ours: tuple, theirs: tuple, rows: torch.Tensor | None = None) -> None:
    """Equal to 1e-9; a normaliser that is not positive has no logarithm in either."""
    for mine, other in zip(ours, theirs, strict=True):
        mine, other = (mine, other) if rows is None else (mine[rows], other[rows])
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9, equal_nan=True)


def triangle(queries: int, keys: int | None = None) -> torch.Tensor:
    keys = queries if keys is None else keys
    return torch.ones(2, queries, keys, dtype=torch.bool).tril(keys - queries)


def test_every_activation_is_tested() -> None:
    assert tuple(ACTIVATIONS) == NAMES


def test_features_by_hand() -> None:
    """Each phi for one neuron with w = (1, 2), b = 0.5 and one input x = (0.3, -0.4): W x = -0.5, |x|^2 / 2 = 0.125."""
    x, weight, phase = torch.tensor([[[0.3, -0.4]]]), torch.tensor([[[1.0, 2.0]]]), torch.tensor([[0.5]])
    expected = {
        "positive_exp": 0.535261,  # exp(-0.625)
        "cosine": 1.602514,  # sqrt(2) cos(0) exp(0.125)
        "positive_cosine": 0.904123,  # sqrt(2 / pi) exp(0.125)
        "clipped_sine": 0.0,
        "linear": 0.375,
        "truncated_exp": 0.606531,
        "elu1": 0.606531,  # exp(-0.5)
        "constant": 1.0,
    }
    for name, value in expected.items():
        assert features(x.double(), weight.double(), phase.double(), name).item() == pytest.approx(value, abs=2e-6)
        several = features(x, weight.expand(1, 4, 2), phase.expand(1, 4), name)[0, 0, 0].item()
        share = {"linear": value - torch.tensor(4.0).log().item() / 2}.get(name, value / 2)
        assert several == pytest.approx(share, abs=1e-5)
    assert features(x * -300, weight, phase, "truncated_exp").item() == pytest.approx(150, rel=1e-5)
    assert features(x * -3, weight, phase, "elu1").item() == pytest.approx(2.5)
    assert features(x * -3, weight, phase, "clipped_sine").item() == pytest.approx(0.909297, abs=1e-5)  # sin(2)


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (63, 63), (5, 40), (40, 3)])
def test_linear_attention(activation: str, queries: int, keys: int) -> None:
    layer = hidden(activation)
    qkv = draw(2, queries, 6, count=1) + draw(2, keys, 6, count=2)
    check(linear_attention(*qkv, layer), oracle(qkv, layer))
    mask = torch.rand(2, keys) < 0.7
    mask[:, 0] = True
    masked = linear_attention(*qkv, layer, key_mask=mask)
    check(masked, oracle(qkv, layer, mask=mask[:, None].expand(-1, queries, -1)))


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize(
    "shape",
    [
        {"tokens": 63},
        {"tokens": 63, "prefix": 3, "near": 0, "tile": 60, "exact_keys": 0},
        {"tokens": 64, "grid": (7, 9), "prefix": 1, "groups": 4},
        {"tokens": 63, "near": 6, "groups": 3, "lengths": [63, 30]},
    ],
    ids=str,
)
def test_near_linear_attention(activation: str, shape: dict) -> None:
    shape = dict(shape)
    qkv, layer = draw(2, shape.pop("tokens"), 6), hidden(activation)
    where = layout(**(shape | ({"lengths": torch.tensor(shape["lengths"])} if "lengths" in shape else {})))
    real = where.real(qkv[0].shape[1])
    exact = exact_mask(*qkv, where, 0, 0)[0]
    mask = None if real is None else real[:, None].expand_as(exact)
    check(near_linear_attention(*qkv, layer, where), oracle(qkv, layer, exact, mask), real)


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("near", [0, 1, 7, 30])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_causal_linear_attention(activation: str, near: int, chunk: int) -> None:
    qkv, layer = draw(2, 63, 6), hidden(activation)
    seen = triangle(63)
    exact = seen & ~seen.tril(-near) if near else None
    ours = causal_linear_attention(*qkv, layer, near=near, chunk=chunk)[:2]
    check(ours, oracle(qkv, layer, exact, seen))
    real = torch.rand(2, 63) < 0.6
    ours = causal_linear_attention(*qkv, layer, near=near, chunk=chunk, key_mask=real)[:2]
    mask = seen & real[:, None]
    rows = mask.any(-1)
    check(ours, oracle(qkv, layer, exact, mask), rows)
    assert not ours[0][~rows].any()
    assert (ours[1][~rows] == -torch.inf).all()


@pytest.mark.parametrize("activation", NAMES)
def test_causal_is_resumed_from_its_state_anywhere(activation: str) -> None:
    qkv, layer = draw(2, 63, 6), hidden(activation)
    whole = causal_linear_attention(*qkv, layer)
    for cut in (1, 7, 62):
        first = causal_linear_attention(*(x[:, :cut] for x in qkv), layer)
        second = causal_linear_attention(*(x[:, cut:] for x in qkv), layer, state=first[2], chunk=5)
        check(tuple(torch.cat(pair, 1) for pair in zip(first[:2], second[:2], strict=True)), whole[:2])
        check(read(qkv[0], second[2], layer), read(qkv[0], whole[2], layer))
    with pytest.raises(ValueError, match=r"^near: 3;"):
        causal_linear_attention(*qkv, layer, near=3, state=whole[2])


@pytest.mark.parametrize("activation", NAMES)
def test_step_by_step_equals_causal(activation: str) -> None:
    qkv, layer = draw(2, 20, 6), hidden(activation)
    *whole, _ = causal_linear_attention(*qkv, layer)
    steps = [causal_linear_attention(*(x[:, :1] for x in qkv), layer)]
    state = steps[0][2]
    for now in range(1, 20):
        steps.append(recurrent_step(*(x[:, now : now + 1] for x in qkv), layer, state))
        state = steps[-1][2]
    check(tuple(torch.cat([step[i] for step in steps], 1) for i in range(2)), tuple(whole))


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("near", [0, 5])
def test_a_later_token_changes_no_earlier_output(activation: str, near: int) -> None:
    qkv, layer = draw(2, 63, 6), hidden(activation)
    before = causal_linear_attention(*qkv, layer, near=near)[:2]
    for later, scale in ((40, 1.0), (40, 40.0), (62, 0.0), (1, 30.0)):
        changed = [x.clone() for x in qkv]
        for x in changed:
            x[:, later:] = torch.randn_like(x[:, later:]) * scale
        after = causal_linear_attention(*changed, layer, near=near)[:2]
        check(tuple(x[:, :later] for x in after), tuple(x[:, :later] for x in before))


@pytest.mark.parametrize("near", [0, 5])
@pytest.mark.parametrize("activation", EXPONENTIAL)
def test_causal_in_single_precision_with_huge_gains(activation: str, near: int) -> None:
    """Tokens of very different norms: a later key must not drown what an earlier query sees (it underflows)."""
    qkv, layer = draw(2, 63, 6), hidden(activation)
    norm = torch.tensor([30.0, 1.0, 12.0, 0.1, 20.0])[torch.arange(63) % 5]
    norm[:2] = torch.tensor([40.0, 30.0])
    qkv[1] = qkv[1] * norm[:, None]
    single = [x.float() for x in qkv]
    layer32 = Hidden(layer.weight.float(), layer.phase.float(), activation)
    ours = causal_linear_attention(*single, layer32, near=near)[:2]
    double = [x.double() for x in single]
    layer64 = Hidden(layer32.weight.double(), layer32.phase.double(), activation)
    steps = causal_linear_attention(*double, layer64, near=near, chunk=1)[:2]
    assert ours[0].abs().sum(-1).all()  # no query reads nothing
    torch.testing.assert_close(ours[0].double(), steps[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours[1].double(), steps[1], rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(ours[0][:, 0], single[2][:, 0])  # the first token sees itself alone


@pytest.mark.parametrize(
    ("activation", "scale", "norms"),
    [("cosine", 1.0, (0.1, 30.0)), ("cosine", 12.0, (0.1, 30.0)), ("elu1", 14.0, (1, 1))],
)
def test_near_keys_are_not_measured_by_what_phi_makes_of_them(activation: str, scale: float, norms: tuple) -> None:
    """A key that is near has no share in the hidden layer yet, so its gain must neither drown logits nor overflow."""
    query, _, value = (x.float() for x in draw(2, 40, 6))
    query = (query / query.norm(dim=-1, keepdim=True) * scale).requires_grad_()
    key = (-query.detach() * torch.tensor(norms).repeat(20)[:, None]).requires_grad_()
    layer = Hidden(*(x.float() for x in hidden(activation)[:2]), activation)
    out, _, _ = causal_linear_attention(query, key, value, layer, near=5)
    oracle, _ = softmax_attention(query.double(), key.double(), value.double(), triangle(40))
    torch.testing.assert_close(out[:, :5].double(), oracle[:, :5], rtol=1e-3, atol=1e-3)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out[:, :5].sum(), [query, key]))


@pytest.mark.parametrize("activation", POSITIVE)
@pytest.mark.parametrize("near", [0, 6])
def test_weights_sum_to_one(activation: str, near: int) -> None:
    query, key, _ = draw(2, 50, 6)
    layer, eye = hidden(activation, m=40), torch.eye(50, dtype=torch.float64).expand(2, -1, -1)
    where = layout(near=near, exact_keys=3)
    for weights in (
        linear_attention(query, key, eye, layer)[0],
        near_linear_attention(query, key, eye, layer, where)[0],
        causal_linear_attention(query, key, eye, layer, near=near)[0],
    ):
        assert weights.min() > -1e-12
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 50, dtype=torch.float64))
    assert not weights.triu(1).any()


def test_constant_is_uniform_attention() -> None:
    query, key, value = draw(2, 50, 6)
    out, _ = linear_attention(query, key, value, hidden("constant", m=1))
    torch.testing.assert_close(out, value.mean(1, keepdim=True).expand_as(out))


@pytest.mark.parametrize("activation", NAMES)
def test_is_softmax_attention_where_every_key_is_near(activation: str) -> None:
    qkv, layer = draw(2, 40, 6, scale=2.0), hidden(activation)
    for where in (layout(near=40, exact_keys=0), layout(near=4, exact_keys=36)):
        check(near_linear_attention(*qkv, layer, where), softmax_attention(*qkv))
    causal = causal_linear_attention(*qkv, layer, near=40)[:2]
    check(causal, softmax_attention(*qkv, triangle(40)))


@pytest.mark.parametrize("activation", NAMES)
def test_exact_keys_are_alone_where_nothing_is_left(activation: str) -> None:
    """In float32, with logits far below what phi makes of them: what the subtraction leaves is only rounding."""
    query, key, value = draw(2, 24, 6, scale=4.0)
    key = key - query.mean(1, keepdim=True) * 3
    layer = Hidden(*(x.float() for x in hidden(activation)[:2]), activation)
    qkv = [x.float() for x in (query, key, value)]
    out, _ = near_linear_attention(*qkv, layer, layout(near=8, exact_keys=24))
    oracle, _ = softmax_attention(*(x.double() for x in qkv))
    torch.testing.assert_close(out.double(), oracle, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("activation", ["positive_exp", "truncated_exp", "elu1", "cosine"])
def test_gradients_equal_finite_differences(activation: str) -> None:
    qkv = [x.requires_grad_() for x in draw(1, 9, 3, scale=0.5)]
    layer = hidden(activation, m=4, size=1, dim=3)
    where = layout(near=3, exact_keys=2, tile=2, prefix=1)
    ways = {
        "linear": lambda *x: linear_attention(*x, layer),
        "near": lambda *x: near_linear_attention(*x, layer, where),
        "causal": lambda *x: causal_linear_attention(*x, layer, chunk=4)[:2],
        "causal near": lambda *x: causal_linear_attention(*x, layer, near=2, chunk=4)[:2],
    }
    for attend in ways.values():  # the normaliser's share is checked too
        assert gradcheck(lambda *x, attend=attend: attend(*x)[:1] if activation == "cosine" else attend(*x), qkv)


@pytest.mark.parametrize("near", [0, 4])
def test_gradients_equal_those_of_dense_matrices(near: int) -> None:
    qkv, layer = [x.requires_grad_() for x in draw(2, 40, 6)], hidden("positive_exp")
    seen = triangle(40)
    exact = seen & ~seen.tril(-near) if near else None
    reader = torch.randn(2, 40, 6, dtype=torch.float64)

    def gradients(out: torch.Tensor, normaliser: torch.Tensor) -> tuple:
        return torch.autograd.grad((out * reader).sum() + (normaliser * reader[..., 0]).sum(), qkv)

    check(
        gradients(*causal_linear_attention(*qkv, layer, near=near, chunk=9)[:2]),
        gradients(*oracle(qkv, layer, exact, seen)),
    )
    check(gradients(*linear_attention(*qkv, layer)), gradients(*oracle(qkv, layer)))
    where = layout(near=4)
    mask = exact_mask(*(x.detach() for x in qkv), where, 0, 0)[0]
    check(gradients(*near_linear_attention(*qkv, layer, where)), gradients(*oracle(qkv, layer, mask)))
