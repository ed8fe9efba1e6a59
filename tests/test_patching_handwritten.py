"""Attention written out by hand: what is read as softmax attention, and that everything else is left to its class."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as t
from torch import Tensor, nn

from astroattn import AstroConfig, patch, unpatch
from astroattn.patching import PatchReport, fallbacks, probe

BATCH, HEADS, TOKENS, DIM = 2, 4, 9, 8
WIDTH = HEADS * DIM
LEAST = torch.finfo(torch.float32).min

FULL = AstroConfig(hidden="random", near=64, exact_keys=0)  # softmax attention, by construction
STATIC = AstroConfig(hidden="random", near=0, exact_keys=0, num_hidden=8)

Between = Callable[["WrittenAttention", Tensor, Tensor, Tensor, "Tensor | None"], Any]


class WrittenAttention(nn.Module):
    """Projections, and between them whatever a test writes: `between(self, q, k, v, real)` gives `[B, H, N, D]`."""

    def __init__(self, between: Between) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.between = between

    def forward(self, x: Tensor, real: Tensor | None = None) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
        attended = self.between(self, q, k, v, real)
        if isinstance(attended, tuple):
            return self.out(attended[0].transpose(1, 2).flatten(2)), *attended[1:]
        return self.out(attended.transpose(1, 2).flatten(2))

    def softmax_of(self, scores: Tensor) -> Tensor:
        return F.dropout(F.softmax(scores, dim=-1), 0.5, self.training)


class Model(nn.Module):
    """Two of them, and what is needed for two tokens to be told apart."""

    def __init__(self, between: Between) -> None:
        super().__init__()
        self.layers = nn.ModuleList(WrittenAttention(between) for _ in range(2))

    def forward(self, x: Tensor, real: Tensor | None = None) -> Any:
        for layer in self.layers:
            y = layer(x, real)
            x = x + (y[0] if isinstance(y, tuple) else y)
        return x


@pytest.fixture(autouse=True)
def inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "make_inputs", lambda model: {"x": tokens(), "real": keys()})


def tokens(count: int = TOKENS) -> Tensor:
    return torch.randn(BATCH, count, WIDTH, generator=torch.Generator().manual_seed(1))


def keys(count: int = TOKENS) -> Tensor:
    real = torch.ones(BATCH, count, dtype=torch.bool)
    real[1, -3:] = False
    return real


def model_of(between: Between) -> Model:
    torch.manual_seed(0)
    model = Model(between).eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.qkv.weight.mul_(3.0)
    return model


def bias_of(real: Tensor | None, least: float = LEAST) -> Tensor:
    assert real is not None
    return torch.zeros(real.shape).masked_fill(~real, least)[:, None, None, :]


def causal(count: int) -> Tensor:
    return torch.ones(count, count, dtype=torch.bool).tril()


def packed(count: int) -> Tensor:
    """Two documents side by side."""
    first = torch.arange(count) < 4
    return first[:, None] == first


def fold(x: Tensor) -> Tensor:
    return x.reshape(BATCH * HEADS, *x.shape[2:])


def unfold(x: Tensor) -> Tensor:
    return x.view(BATCH, HEADS, *x.shape[1:])


# Bidirectional attention in every way that is common; all of them mask the padding.


def scale_after(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    return m.softmax_of(torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(DIM) + bias_of(real)) @ v


def scale_before(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    return m.softmax_of(q * DIM**-0.5 @ k.mT + bias_of(real, -math.inf)) @ v


def scale_of_both(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    scores = (q / DIM**0.25) @ (k / DIM**0.25).transpose(2, 3)
    return m.softmax_of(bias_of(real, -10000.0) + scores) @ v


def scale_in_a_tensor(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) / torch.tensor(DIM**0.5)
    return m.softmax_of(scores - 1e30 * (~real)[:, None, None, :]) @ v  # type: ignore[operator]


def scale_by_head(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    scale = torch.linspace(0.2, 0.5, HEADS)[:, None, None]
    return m.softmax_of(q @ k.mT * scale[None] + bias_of(real)) @ v


def masked_fill(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    scores = (q @ k.mT).masked_fill(~real[:, None, None, :], torch.finfo(q.dtype).min)  # type: ignore[index]
    return m.softmax_of(scores) @ v


def in_place(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    scores = q @ k.mT
    scores *= 0.35
    mask = (real == 0).view(BATCH, 1, 1, -1).expand_as(scores)  # type: ignore[union-attr]
    scores.masked_fill_(mask, torch.finfo(scores.dtype).min)
    weights = F.softmax(scores.float(), dim=-1).type_as(scores)
    return F.dropout(weights, 0.5, m.training) @ v


def where(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    scores = q @ k.mT
    scores = torch.where(real[:, None, None, :], scores, torch.tensor(LEAST))  # type: ignore[index]
    return m.softmax_of(torch.max(scores, torch.tensor(LEAST))) @ v


def dense_padding(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    both = real[:, None, :, None] & real[:, None, None, :]  # type: ignore[index]
    return m.softmax_of((q @ k.mT).masked_fill(~both, LEAST)) @ v


def bmm(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    scores = torch.bmm(fold(q), fold(k).transpose(1, 2))
    assert scores.size() == (BATCH * HEADS, TOKENS, TOKENS)
    scores = scores.view(BATCH, HEADS, TOKENS, TOKENS) + bias_of(real)
    weights = m.softmax_of(scores.view(BATCH * HEADS, TOKENS, TOKENS))
    return unfold(torch.bmm(weights, fold(v)))


def baddbmm(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    bias = bias_of(real)[:, 0].repeat_interleave(HEADS, 0)
    scores = bias.baddbmm(batch1=fold(q), batch2=fold(k).mT, beta=1.0, alpha=0.35).view(BATCH, HEADS, TOKENS, TOKENS)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype).view(BATCH * HEADS, TOKENS, -1)
    return unfold(torch.bmm(weights, fold(v)))


def baddbmm_in_zeros(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    """Room for the products, of every head its own, and no bias."""
    room = torch.zeros(BATCH * HEADS, q.shape[2], q.shape[2])
    scores = torch.baddbmm(room, fold(q), fold(k).mT, beta=1.0, alpha=0.35).view(BATCH, HEADS, q.shape[2], q.shape[2])
    return m.softmax_of(scores + bias_of(real)) @ v


def einsum(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bind,bjnd->bnij", q, k) + bias_of(real)
    return torch.einsum("bnij,bjnd->bind", m.softmax_of(scores), v).transpose(1, 2)


def flipped(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    """Values times transposed weights, as of images."""
    weights = torch.softmax(q @ k.mT + bias_of(real), dim=3).permute(0, 1, 3, 2)
    return (v.mT @ weights).mT


BIDIRECTIONAL = [
    *(scale_after, scale_before, scale_of_both, scale_in_a_tensor, scale_by_head, masked_fill, where),
    *(dense_padding, bmm, baddbmm, baddbmm_in_zeros, einsum, flipped),
]


def packed_masked(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    scores = (q @ k.mT).masked_fill(~packed(q.shape[2]), LEAST)
    return m.softmax_of(scores + bias_of(real)) @ v


# Causal attention.


def causal_where(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    scores = torch.where(causal(q.shape[2]), q @ k.mT, LEAST)
    return m.softmax_of(scores + bias_of(real)) @ v


def causal_factor(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    seen = causal(q.shape[2])[None, None].float()
    scores = q @ k.mT / DIM**0.5
    return m.softmax_of(scores * seen + -1e4 * (1 - seen) + bias_of(real)) @ v


def causal_dense(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    seen = causal(q.shape[2]) & real[:, None, None, :]  # type: ignore[index]
    return m.softmax_of(q @ k.mT + torch.zeros(seen.shape).masked_fill(~seen, LEAST)) @ v


def causal_fused(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    seen = causal(q.shape[2]) & real[:, None, None, :]  # type: ignore[index]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def causal_packed(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    seen = causal(q.shape[2]) & packed(q.shape[2]) & real[:, None, None, :]  # type: ignore[index]
    return m.softmax_of(torch.where(seen, q @ k.mT, LEAST)) @ v


CAUSAL = [causal_packed, causal_where, causal_factor, causal_dense, causal_fused]


def report_of(model: Model, config: AstroConfig = FULL) -> PatchReport:
    report = patch(model, config)
    assert len(report.patched) == 2, str(report)
    assert {(row.heads, row.head_dim) for row in report.patched} == {(HEADS, DIM)}
    return report


@pytest.mark.parametrize("between", [*BIDIRECTIONAL, in_place, packed_masked, *CAUSAL])
@torch.no_grad()
def test_what_is_softmax_attention_becomes_an_astrocyte(between: Between) -> None:
    model, real = model_of(between), keys()
    expected = model(tokens(), real)
    state = model.state_dict()
    report_of(model)
    torch.testing.assert_close(model(tokens(), real)[real], expected[real], atol=1e-5, rtol=1e-5)
    report_of(model, STATIC)
    changed = model(tokens(), real)
    assert not torch.allclose(changed[real], expected[real], atol=1e-3)
    assert fallbacks(model) == {}
    assert model.state_dict().keys() == state.keys()
    other = tokens()
    other[1, -3:] = 7.0  # the padding
    torch.testing.assert_close(model(other, real)[real], changed[real], atol=1e-6, rtol=1e-5)
    if between in CAUSAL:
        other[:, 5] += 1.0
        torch.testing.assert_close(model(other, real)[:, :5], changed[:, :5], atol=1e-6, rtol=1e-5)
        assert not torch.allclose(model(other, real)[:, 5], changed[:, 5], atol=1e-3)
    unpatch(model)
    assert torch.equal(model(tokens(), real), expected)
    assert all(type(layer) is WrittenAttention for layer in model.layers)


class Watcher(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest number of elements of what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if isinstance(output, Tensor):
            self.largest = max(self.largest, output.untyped_storage().nbytes() // output.element_size())
        return output


@pytest.mark.parametrize("between", [scale_after, masked_fill, einsum, flipped])
@torch.no_grad()
def test_no_matrix_of_queries_and_keys_is_formed(between: Between) -> None:
    model, count = model_of(between), 300
    with Watcher() as watcher:
        model(tokens(count), keys(count))
    assert watcher.largest >= BATCH * HEADS * count**2
    report_of(model, STATIC)
    with Watcher() as watcher:
        model(tokens(count), keys(count))
    assert watcher.largest < BATCH * count**2
    assert fallbacks(model) == {}


# A bias for every query and key


def position_bias(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    count = q.shape[2]
    return m.softmax_of(q @ k.mT + torch.arange(float(count**2)).view(count, count).sin() + bias_of(real)) @ v


def position_keys(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    count = q.shape[2]
    positions = torch.einsum("bhld,lrd->bhlr", q, torch.ones(count, count, 8).cumsum(0).sin())
    return m.softmax_of(q @ k.mT + 0.2 * positions + bias_of(real)) @ v


def alibi(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    slopes = torch.linspace(0.1, 1, HEADS)[None, :, None, None] * torch.arange(float(q.shape[2]))
    return m.softmax_of((q @ k.mT + slopes).masked_fill(~real[:, None, None], LEAST)) @ v  # type: ignore[index]


def zero_bias_by_head(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    """As it is before it is trained."""
    return m.softmax_of(q @ k.mT + torch.zeros(HEADS, q.shape[2], q.shape[2]) + bias_of(real)) @ v


def joined_bias(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    """With the mask in the same numbers, and padding that sees nothing."""
    count = q.shape[2]
    bias = torch.arange(float(count**2)).view(count, count).cos() + bias_of(real)
    return m.softmax_of(q @ k.mT + bias.masked_fill(~real[:, None, :, None], LEAST)) @ v  # type: ignore[index]


def fused_bias(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    count = q.shape[2]
    bias = torch.arange(float(HEADS * count**2)).view(HEADS, count, count).sin() + bias_of(real)
    return F.scaled_dot_product_attention(q, k, v, bias)


BIASED = [position_bias, position_keys, alibi, zero_bias_by_head, joined_bias, fused_bias]
TILED = AstroConfig(near=0, exact_keys=32, num_hidden=8, tile=8)


@pytest.mark.parametrize("between", BIASED)
@torch.no_grad()
def test_a_bias_is_added_to_the_logits(between: Between) -> None:
    model, real = model_of(between), keys()
    expected = model(tokens(), real)
    report_of(model, AstroConfig(near=64))
    torch.testing.assert_close(model(tokens(), real)[real], expected[real], atol=1e-5, rtol=1e-5)
    unpatch(model)
    assert torch.equal(model(tokens(), real), expected)
    many, real = tokens(60), keys(60)
    expected = model(many, real)
    report_of(model, TILED)
    changed = model(many, real)
    error = (changed - expected)[real].norm() / (expected - many)[real].norm()
    assert 1e-4 < error < 0.4
    many[1, -3:] = 7.0  # the padding
    torch.testing.assert_close(model(many, real)[real], changed[real], atol=1e-5, rtol=1e-4)
    assert fallbacks(model) == {}


@pytest.mark.filterwarnings("ignore:.*left to the model's own attention")
@pytest.mark.parametrize("between", BIASED)
@torch.no_grad()
def test_a_static_layer_has_no_bias(between: Between) -> None:
    model, reason = model_of(between), "a bias for every query and key, which neither a static layer"
    expected = model(tokens(), keys())
    with pytest.raises(ValueError, match=reason):
        patch(model, STATIC)
    assert torch.equal(model(tokens(), keys()), expected)
    other = model_of(scale_after)
    report_of(other, STATIC)
    for layer in other.layers:
        layer.between = between
    assert torch.equal(other(tokens(), keys()), expected)
    assert [reason in each for count in fallbacks(other).values() for each in count] == [True, True]


def torn_bias(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    """A bias and a mask that is not the same for every query, written with a moderate number, as in Swin."""
    count = q.shape[2]
    far = (torch.arange(count)[:, None] // 20 != torch.arange(count) // 20) * -100.0
    return m.softmax_of(q @ k.mT + torch.arange(float(count**2)).view(count, count).sin() + far + bias_of(real)) @ v


@pytest.mark.filterwarnings("ignore:.*left to the model's own attention")
@torch.no_grad()
def test_a_mask_in_a_bias_is_the_hosts_where_keys_are_not_all_exact() -> None:
    model, many, real = model_of(torn_bias), tokens(60), keys(60)
    expected = model(many, real)
    report_of(model, AstroConfig(near=64))
    torch.testing.assert_close(model(many, real)[real], expected[real], atol=1e-5, rtol=1e-5)
    assert fallbacks(model) == {}
    report_of(model, TILED)
    assert torch.equal(model(many, real), expected)
    assert ["dense mask" in each for count in fallbacks(model).values() for each in count] == [True, True]


# What is more than softmax attention, and what the report says of it.


def mask_by_window(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    """As in Swin, whose scores have one axis more while the mask of a shift is put on them."""
    scores = q @ k.mT + torch.randn(HEADS, 9, 9, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(BATCH, 9, 9).masked_fill(~causal(9), -100.0)
    scores = scores.view(1, BATCH, HEADS, 9, 9) + mask[None, :, None]
    return m.softmax_of(scores.view(BATCH, HEADS, 9, 9)) @ v


def window(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    near = causal(9) & ~causal(9).tril(-3)
    return m.softmax_of((q @ k.mT).masked_fill(~near, LEAST)) @ v


def mask_by_head(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    mask = torch.zeros(1, HEADS, 1, 9, dtype=torch.bool)
    mask[:, 1, :, 4] = True
    return m.softmax_of((q @ k.mT).masked_fill(mask, LEAST)) @ v


def soft_cap(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    return m.softmax_of(5 * torch.tanh(q @ k.mT / 5)) @ v


def sinks(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    scores = torch.cat([q @ k.mT, torch.ones(BATCH, HEADS, 9, 1)], -1)
    return scores.softmax(-1)[..., :-1] @ v


def talking_heads(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    mixed = F.linear((q @ k.mT).permute(0, 2, 3, 1), torch.ones(HEADS, HEADS).tril()).permute(0, 3, 1, 2)
    return mixed.softmax(-1) @ v


def head_mask(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    return (q @ k.mT).softmax(-1) * torch.tensor([1.0, 0, 1, 1]).view(1, -1, 1, 1) @ v


def cosine(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    return (q @ k.mT).abs().softmax(-1) @ v


def over_queries(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    return (q @ k.mT).softmax(-2) @ v


def no_softmax(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    return (q @ k.mT).sigmoid() @ v


def used_later(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return weights @ v + weights.amax(-1, keepdim=True)


def two_products(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    return (q @ k.mT + k @ q.mT).softmax(-1) @ v


def strided(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    return (q @ k[:, :, ::2].mT).softmax(-1) @ v[:, :, ::2]


def windows(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    q, k, v = (x.unflatten(2, (3, 3)) for x in (q, k, v))
    return ((q @ k.mT).softmax(-1) @ v).flatten(2, 3)


MORE = [
    (window, "a dense mask"),
    (mask_by_head, "a dense mask"),
    (mask_by_window, "a dense mask"),
    (soft_cap, "soft cap"),
    (sinks, "attention sinks"),
    (talking_heads, "heads are mixed"),
    (head_mask, "a factor on its attention weights"),
    (cosine, "more with its scores than softmax attention (abs)"),
    (over_queries, "more with its scores than softmax attention (softmax)"),
    (no_softmax, "more with its scores than softmax attention (sigmoid)"),
    (used_later, "used for more than the values"),
    (two_products, "sum of several products"),
    (strided, "keys of another length than the queries (pooled or strided)"),
    (windows, "attention within small windows"),
]


@pytest.mark.parametrize(("between", "reason"), MORE)
@torch.no_grad()
def test_what_is_more_than_softmax_attention_stays_as_it_is(between: Between, reason: str) -> None:
    model = model_of(between)
    expected = model(tokens(), keys())
    with pytest.raises(ValueError, match=re.escape(reason)):
        patch(model, FULL)
    assert torch.equal(model(tokens(), keys()), expected)
    assert all(type(layer) is WrittenAttention for layer in model.layers)


@pytest.mark.filterwarnings("ignore:.*left to the model's own attention")
@pytest.mark.parametrize(("between", "reason"), MORE)
@torch.no_grad()
def test_what_turns_out_to_be_more_is_answered_by_the_class_itself(between: Between, reason: str) -> None:
    model = model_of(scale_after)
    report_of(model, STATIC)
    for layer in model.layers:
        layer.between = between
    if between is not used_later:
        assert torch.equal(model(tokens(), keys()), model_of(between)(tokens(), keys()))
    else:
        model(tokens(), keys())
    assert [reason in each for count in fallbacks(model).values() for each in count] == [True, True]


@torch.no_grad()
def test_weights_that_are_put_out_are_none() -> None:
    def always(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Any:
        weights = (q @ k.mT).softmax(-1)
        return weights @ v, weights, {"scores": weights.view(BATCH * HEADS, TOKENS, TOKENS)}

    model = model_of(always)
    layer = model.layers[0]
    expected = layer(tokens())
    report_of(model, STATIC)
    output, *weights = layer(tokens())
    assert weights == [None, {"scores": None}]
    assert not torch.equal(output, expected[0])


@pytest.mark.filterwarnings("ignore:.*left to the model's own attention")
@pytest.mark.parametrize("config", [AstroConfig(near=64), TILED], ids=["softmax", "tiles"])
def test_a_bias_is_trained(config: AstroConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    bias = nn.Parameter(torch.zeros(60, 60))

    def biased(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
        return m.softmax_of(q @ k.mT + bias * 1) @ v

    model = model_of(biased)
    model(tokens(60)).pow(2).sum().backward()
    assert bias.grad is not None
    expected, bias.grad = bias.grad, None
    with monkeypatch.context() as patcher:
        patcher.setattr(probe, "make_inputs", lambda model: {"x": tokens(60), "real": keys(60)})
        report_of(model, config)
    model(tokens(60)).pow(2).sum().backward()
    assert bias.grad is not None
    assert (bias.grad - expected).norm() < (1e-4 if config.near else 0.5) * expected.norm()
    assert fallbacks(model) == {}


def test_gradients_are_those_of_softmax_attention() -> None:
    model = model_of(scale_after)
    grads = []
    for _ in range(2):
        model.zero_grad()
        (model(tokens(), keys())[keys()] ** 2).mean().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])  # type: ignore[union-attr]
        report_of(model)
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_dropout_of_weights_drops_keys_in_training_alone() -> None:
    model = model_of(scale_after)
    report_of(model)
    expected = model(tokens(), keys())
    assert not torch.equal(model.train()(tokens(), keys()), expected)
    assert torch.equal(model.eval()(tokens(), keys()), expected)
    assert fallbacks(model) == {}


@pytest.mark.parametrize("between", [scale_after, causal_dense])
@torch.no_grad()
def test_one_graph(between: Between) -> None:
    torch._dynamo.reset()
    model = model_of(between)
    report_of(model, STATIC)
    expected = model(tokens(), keys())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=torch.__version__ >= (2, 9))
    torch.testing.assert_close(compiled(tokens(), keys())[keys()], expected[keys()], atol=1e-5, rtol=1e-5)
    assert fallbacks(model) == {}


def test_a_symbolic_trace_is_refused() -> None:
    model = model_of(scale_before)
    report_of(model)
    with pytest.raises(TypeError, match="Proxy"):
        torch.fx.symbolic_trace(model)


@torch.no_grad()
def test_copies_and_pickles() -> None:
    model = model_of(scale_after)
    report_of(model, STATIC)
    expected = model(tokens(), keys())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert torch.equal(copied(tokens(), keys()), expected)
        unpatch(model)
        assert torch.equal(copied(tokens(), keys()), expected)
        unpatch(copied)
        assert torch.equal(copied(tokens(), keys()), model(tokens(), keys()))
        report_of(model, STATIC)


@torch.no_grad()
def test_autocast_and_low_precision() -> None:
    model = model_of(masked_fill)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(tokens(), keys())
        report_of(model)
        output = model(tokens(), keys())
    assert output.dtype == expected.dtype
    assert (output - expected)[keys()].abs().max() < 5e-2 * expected.abs().max()
    assert fallbacks(model) == {}


@torch.no_grad()
def test_the_next_token_after_those_of_a_cache() -> None:
    def cached(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
        count = q.shape[2]
        new = last[-1]
        seen = torch.ones(count, count, dtype=torch.bool).tril()[-new:]
        return F.pad((q[:, :, -new:] @ k.mT).masked_fill(~seen, LEAST).softmax(-1) @ v, (0, 0, count - new, 0))

    last = [TOKENS]
    model = model_of(cached)
    report_of(model)
    for new in (1, 3):
        last.append(new)
        expected = model_of(cached)(tokens())
        torch.testing.assert_close(model(tokens()), expected, atol=1e-5, rtol=1e-5)
    assert fallbacks(model) == {}


@torch.no_grad()
def test_another_tensor_that_changes_does_not_matter() -> None:
    def changing(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
        scores = q @ k.mT
        torch.ones(3).zero_()
        return scores.softmax(-1) @ v

    report_of(model_of(changing))


@torch.no_grad()
def test_a_tensor_that_changes_after_it_was_noted() -> None:
    def changing(m: WrittenAttention, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
        scores = q @ k.mT
        k.zero_()
        return scores.softmax(-1) @ v

    model = model_of(changing)
    expected = model(tokens())
    with pytest.raises(ValueError, match="changed in place"):
        patch(model, FULL)
    assert torch.equal(model(tokens()), expected)


# Real classes. What a checkpoint may turn on is turned on.

TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
SMALL = {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_words": 99, "vocab_size": 99}
REAL: dict[str, Callable[[], nn.Module]] = {
    "rembert": lambda: t.RemBertModel(t.RemBertConfig(**TEXT, input_embedding_size=16)),
    "roformer": lambda: t.RoFormerModel(t.RoFormerConfig(**TEXT, embedding_size=32)),
    "xlm": lambda: t.XLMModel(t.XLMConfig(**SMALL)),
    "openai-gpt": lambda: t.OpenAIGPTModel(t.OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=99)),
    "gpt-neo": lambda: t.GPTNeoModel(
        t.GPTNeoConfig(hidden_size=32, num_layers=2, num_heads=4, vocab_size=99, attention_types=[[["global"], 2]])
    ),
    "falcon": lambda: t.FalconModel(t.FalconConfig(**TEXT, new_decoder_architecture=False)),
    "squeezebert": lambda: t.SqueezeBertModel(t.SqueezeBertConfig(**TEXT, embedding_size=32, **GROUPS)),
}
GROUPS = {f"{name}_groups": 1 for name in ("q", "k", "v", "post_attention", "intermediate", "output")}
WIDE = {"hidden_size": 32, "vocab_size": 99}
CAUSAL_AND_BIASED: dict[str, Callable[[], nn.Module]] = {
    "bloom": lambda: t.BloomModel(t.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=99)),
    "falcon": lambda: t.FalconModel(t.FalconConfig(**TEXT, alibi=True)),
}


def text() -> dict[str, Tensor]:
    ids = torch.randint(5, 90, (2, 20), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(ids)
    real[1, 14:] = 0
    return {"input_ids": ids, "attention_mask": real}


def real_model(build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.undo()  # the library makes up the inputs
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    return model


@pytest.mark.parametrize("name", REAL)
@torch.no_grad()
def test_real_classes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = real_model(REAL[name], monkeypatch), text()
    real = given["attention_mask"].bool()
    expected = model(**given)[0]
    report = patch(model, FULL)
    assert len(report.patched) == 2, str(report)
    torch.testing.assert_close(model(**given)[0][real], expected[real], atol=1e-4, rtol=1e-4)
    patch(model, STATIC)
    changed = model(**given)[0]
    assert not torch.allclose(changed[real], expected[real], atol=1e-2)
    assert fallbacks(model) == {}
    given["input_ids"][1, 14:] = 7
    torch.testing.assert_close(model(**given)[0][real], changed[real], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="output_attentions"):
        model(**given, output_attentions=True)
    unpatch(model)
    assert torch.equal(model(**text())[0], expected)


@pytest.mark.parametrize("config", [FULL, AstroConfig()], ids=["static", "default"])
@pytest.mark.parametrize("name", CAUSAL_AND_BIASED)
@torch.no_grad()
def test_causal_classes_that_add_a_bias_stay_as_they_are(
    name: str, config: AstroConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = real_model(CAUSAL_AND_BIASED[name], monkeypatch)
    expected = model(**text())[0]
    with pytest.raises(ValueError, match="a bias for every query and key in causal attention, which no astrocyte has"):
        patch(model, config)
    assert torch.equal(model(**text())[0], expected)
