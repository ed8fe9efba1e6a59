"""Causal attention through static hidden layers: in chunks, on from a state, step by step, against N x N matrices."""

from __future__ import annotations

import pytest
import torch
from core_cases import draw
from static_cases import POSITIVE, check, hidden, oracle
from torch import Tensor
from torch.autograd import gradcheck

from astroattn.config import ACTIVATIONS as NAMES
from astroattn.ops.causal import CausalState, causal_linear_attention
from astroattn.ops.reference import softmax_attention
from astroattn.ops.static import Hidden


def causal_masks(near: int, tokens: int, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Which keys a query reads exactly, and which it sees at all [2, N, N]."""
    seen = torch.ones(2, tokens, tokens, dtype=torch.bool).tril()
    exact = seen & ~seen.tril(-near) if near else torch.zeros_like(seen)
    return exact, seen if real is None else seen & real[:, None]


def some_real(tokens: int) -> Tensor:
    """Holes; one sequence begins with padding, longer than a near field."""
    real = torch.rand(2, tokens) < 0.6
    real[1, :9] = False
    return real


def continued(qkv: list, layer: Hidden, cuts: tuple[int, ...], near: int, real: Tensor | None) -> tuple:
    """The results of one call for each part of the sequence, and the last state."""
    parts, state = [], None
    for start, stop in zip((0, *cuts), (*cuts, qkv[0].shape[1]), strict=True):
        mask = None if real is None else real[:, start:stop]
        part = [x[:, start:stop] for x in qkv]
        parts.append(causal_linear_attention(*part, layer, near=near, key_mask=mask, state=state, chunk=5))
        state = parts[-1][2]
    return *(torch.cat([part[i] for part in parts], 1) for i in range(2)), state


def written(state: CausalState) -> tuple:
    """What a state holds, whatever its sums are measured from, and with zeros for what is no token."""
    rise = state.top.exp()
    recent = (x.masked_fill(~state.real[..., None], 0) for x in (state.key, state.value))
    return state.kv_state * rise.mT, state.z_state * rise[:, 0], *recent


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("near", [0, 1, 7, 30, 70])
@pytest.mark.parametrize(("tokens", "chunk"), [(1, 64), (63, 1), (63, 7), (197, 64)])
def test_causal_linear_attention(activation: str, near: int, tokens: int, chunk: int) -> None:
    qkv, layer = draw(2, tokens, 6), hidden(activation)
    ours = causal_linear_attention(*qkv, layer, near=near, chunk=chunk)[:2]
    check(ours, oracle(qkv, layer, *causal_masks(near, tokens)))
    real = some_real(tokens)
    exact, seen = causal_masks(near, tokens, real)
    ours = causal_linear_attention(*qkv, layer, near=near, chunk=chunk, key_mask=real)[:2]
    rows = seen.any(-1)
    check(ours, oracle(qkv, layer, exact, seen), rows)
    assert not ours[0][~rows].any()
    assert (ours[1][~rows] == -torch.inf).all()


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("near", [0, 1, 2, 9, 40])
@pytest.mark.parametrize("padded", [False, True])
def test_is_continued_from_its_state_anywhere(activation: str, near: int, padded: bool) -> None:
    """In two calls, in some, and one token after the other."""
    qkv, layer = draw(2, 33, 6), hidden(activation)
    real = some_real(33) if padded else None
    whole = causal_linear_attention(*qkv, layer, near=near, key_mask=real)
    for cuts in ((1,), (7,), (32,), (3, 4, 20), tuple(range(1, 33))):
        parts = continued(qkv, layer, cuts, near, real)
        check(parts[:2], whole[:2])
        check(written(parts[2]), written(whole[2]))
        assert torch.equal(parts[2].real, whole[2].real)
        assert [x.shape for x in parts[2]] == [x.shape for x in whole[2]]


def test_state_has_the_same_size_after_any_number_of_tokens() -> None:
    layer = hidden("positive_exp")
    for tokens in (1, 3, 50):
        *_, state = causal_linear_attention(*draw(2, tokens, 6), layer, near=8)
        assert [list(x.shape) for x in state] == [[2, 12, 6], [2, 12], [2, 1, 12], [2, 7, 6], [2, 7, 6], [2, 7]]
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in state)  # no view that keeps all tokens
        assert state.real.sum(1).tolist() == [min(tokens, 7)] * 2


def test_a_state_of_another_near_field_is_refused() -> None:
    qkv, layer = draw(2, 9, 6), hidden("positive_exp")
    for near, other in ((0, 3), (3, 4), (3, 0)):
        *_, state = causal_linear_attention(*qkv, layer, near=near)
        with pytest.raises(ValueError, match=rf"^near: {other};"):
            causal_linear_attention(*qkv, layer, near=other, state=state)


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


@pytest.mark.parametrize("near", [0, 1, 5])
@pytest.mark.parametrize("activation", ["positive_exp", "truncated_exp"])
def test_in_single_precision_with_huge_gains(activation: str, near: int) -> None:
    """Tokens of very different norms: a later key must not drown what an earlier query sees (it underflows)."""
    qkv, layer = draw(2, 63, 6), hidden(activation)
    norm = torch.tensor([30.0, 1.0, 12.0, 0.1, 20.0])[torch.arange(63) % 5]
    norm[:2] = torch.tensor([40.0, 30.0])
    qkv[1] = qkv[1] * norm[:, None]
    single = [x.float() for x in qkv]
    layer32 = Hidden(layer.weight.float(), layer.phase.float(), activation)
    double = [x.double() for x in single]
    layer64 = Hidden(layer32.weight.double(), layer32.phase.double(), activation)
    steps = causal_linear_attention(*double, layer64, near=near, chunk=1)[:2]
    for cuts in ((), (1,), (2, 31)):
        ours = continued(single, layer32, cuts, near, None) if cuts else None
        ours = causal_linear_attention(*single, layer32, near=near) if ours is None else ours
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
    oracle, _ = softmax_attention(query.double(), key.double(), value.double(), causal_masks(0, 40)[1])
    torch.testing.assert_close(out[:, :5].double(), oracle[:, :5], rtol=1e-3, atol=1e-3)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out[:, :5].sum(), [query, key]))


@pytest.mark.parametrize("activation", POSITIVE)
@pytest.mark.parametrize("near", [0, 6])
def test_weights_sum_to_one(activation: str, near: int) -> None:
    query, key, _ = draw(2, 50, 6)
    eye = torch.eye(50, dtype=torch.float64).expand(2, -1, -1)
    weights, _, _ = causal_linear_attention(query, key, eye, hidden(activation, m=40), near=near)
    assert weights.min() > -1e-12
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 50, dtype=torch.float64))
    assert not weights.triu(1).any()


@pytest.mark.parametrize("activation", NAMES)
def test_is_softmax_attention_where_every_key_is_near(activation: str) -> None:
    qkv, layer = draw(2, 40, 6, scale=2.0), hidden(activation)
    ours = causal_linear_attention(*qkv, layer, near=40)[:2]
    check(ours, softmax_attention(*qkv, causal_masks(0, 40)[1]))


@pytest.mark.parametrize("activation", ["positive_exp", "truncated_exp", "elu1", "cosine"])
@pytest.mark.parametrize("near", [0, 2])
def test_gradients_equal_finite_differences(activation: str, near: int) -> None:
    qkv = [x.requires_grad_() for x in draw(1, 9, 3, scale=0.5)]
    layer = hidden(activation, m=4, size=1, dim=3)
    results = 1 if activation == "cosine" else 2  # of an indefinite normaliser the logarithm may be NaN
    assert gradcheck(lambda *x: causal_linear_attention(*x, layer, near=near, chunk=4)[:results], qkv)


@pytest.mark.parametrize("near", [0, 4])
@pytest.mark.parametrize("cuts", [(), (3, 20)])
def test_gradients_equal_those_of_dense_matrices(near: int, cuts: tuple[int, ...]) -> None:
    """Of every input, the normaliser's share with them, through states, too."""
    layer = hidden("positive_exp")
    inputs = [x.requires_grad_() for x in (*draw(2, 40, 6), layer.weight)]
    reader = torch.randn(2, 40, 6, dtype=torch.float64)

    def gradients(out: Tensor, normaliser: Tensor) -> tuple:
        return torch.autograd.grad((out * reader).sum() + (normaliser * reader[..., 0]).sum(), inputs)

    ours = continued(inputs[:3], layer, cuts, near, None)[:2]
    check(gradients(*ours), gradients(*oracle(inputs[:3], layer, *causal_masks(near, 40))))
