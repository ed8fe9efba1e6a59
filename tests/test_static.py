"""Static hidden layers: linear and with exact keys, against N x N matrices."""

from __future__ import annotations

import pytest
import torch
from core_cases import draw, exact_mask, layout
from static_cases import POSITIVE, check, hidden, oracle
from torch.autograd import gradcheck

from astroattn.config import ACTIVATIONS as NAMES
from astroattn.ops.choosing import choose
from astroattn.ops.features import ACTIVATIONS, features
from astroattn.ops.reference import softmax_attention
from astroattn.ops.static import Hidden, linear_attention, near_linear_attention


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
        {"tokens": 63, "near": 0, "exact_keys": 5, "tile": 12},
        {"tokens": 63, "prefix": 3, "near": 0, "tile": 60, "exact_keys": 0},
        {"tokens": 64, "grid": (7, 9), "prefix": 1, "by_content": False, "near": 4},
        {"tokens": 5, "by_content": False, "near": 2, "exact_keys": 1},
    ],
    ids=str,
)
def test_near_linear_attention(activation: str, shape: dict) -> None:
    shape = dict(shape)
    qkv, layer = draw(2, shape.pop("tokens"), 6), hidden(activation)
    where = layout(num_hidden=0, **shape)
    exact = exact_mask(choose(*qkv, where), where)
    check(near_linear_attention(*qkv, layer, where), oracle(qkv, layer, exact))


@pytest.mark.parametrize("activation", POSITIVE)
@pytest.mark.parametrize("near", [0, 6])
def test_weights_sum_to_one(activation: str, near: int) -> None:
    query, key, _ = draw(2, 50, 6)
    layer, eye = hidden(activation, m=40), torch.eye(50, dtype=torch.float64).expand(2, -1, -1)
    where = layout(near=near, exact_keys=3, num_hidden=0)
    for weights in (
        linear_attention(query, key, eye, layer)[0],
        near_linear_attention(query, key, eye, layer, where)[0],
    ):
        assert weights.min() > -1e-12
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 50, dtype=torch.float64))


def test_constant_is_uniform_attention() -> None:
    query, key, value = draw(2, 50, 6)
    out, _ = linear_attention(query, key, value, hidden("constant", m=1))
    torch.testing.assert_close(out, value.mean(1, keepdim=True).expand_as(out))


@pytest.mark.parametrize("activation", NAMES)
def test_is_softmax_attention_where_every_key_is_near(activation: str) -> None:
    qkv, layer = draw(2, 40, 6, scale=2.0), hidden(activation)
    for where in (
        layout(near=40, exact_keys=0, num_hidden=0),
        layout(near=4, exact_keys=40, num_hidden=0),
        layout(near=30, exact_keys=40, num_hidden=0, by_content=False),
    ):
        check(near_linear_attention(*qkv, layer, where), softmax_attention(*qkv))


@pytest.mark.parametrize("activation", NAMES)
def test_exact_keys_are_alone_where_nothing_is_left(activation: str) -> None:
    """In float32, with logits far below what phi makes of them: what the subtraction leaves is only rounding."""
    query, key, value = draw(2, 24, 6, scale=4.0)
    key = key - query.mean(1, keepdim=True) * 3
    layer = Hidden(*(x.float() for x in hidden(activation)[:2]), activation)
    qkv = [x.float() for x in (query, key, value)]
    out, _ = near_linear_attention(*qkv, layer, layout(near=8, exact_keys=24, num_hidden=0))
    oracle, _ = softmax_attention(*(x.double() for x in qkv))
    torch.testing.assert_close(out.double(), oracle, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("activation", ["positive_exp", "truncated_exp", "elu1", "cosine"])
def test_gradients_equal_finite_differences(activation: str) -> None:
    qkv = [x.requires_grad_() for x in draw(1, 9, 3, scale=0.5)]
    layer = hidden(activation, m=4, size=1, dim=3)
    where = layout(exact_keys=2, tile=4, prefix=1, num_hidden=0)
    ways = {
        "linear": lambda *x: linear_attention(*x, layer),
        "near": lambda *x: near_linear_attention(*x, layer, where),
    }
    for attend in ways.values():  # the normaliser's share is checked too
        assert gradcheck(lambda *x, attend=attend: attend(*x)[:1] if activation == "cosine" else attend(*x), qkv)


def test_gradients_equal_those_of_dense_matrices() -> None:
    qkv, layer = [x.requires_grad_() for x in draw(2, 40, 6)], hidden("positive_exp")
    reader = torch.randn(2, 40, 6, dtype=torch.float64)

    def gradients(out: torch.Tensor, normaliser: torch.Tensor) -> tuple:
        return torch.autograd.grad((out * reader).sum() + (normaliser * reader[..., 0]).sum(), qkv)

    check(gradients(*linear_attention(*qkv, layer)), gradients(*oracle(qkv, layer)))
    where = layout(num_hidden=0)
    mask = exact_mask(choose(*qkv, where), where)
    check(gradients(*near_linear_attention(*qkv, layer, where)), gradients(*oracle(qkv, layer, mask)))
