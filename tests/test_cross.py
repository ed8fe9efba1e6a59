"""Cross attention: queries of another sequence than the keys, by the operators, the module and in patched models."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import astroattn
from astroattn import AstroConfig, AstrocyteAttention
from astroattn.checks import CROSS
from astroattn.fidelity.calls import AttentionCall
from astroattn.ops import plain
from astroattn.ops.layout import LEAST_QUERIES, ROOT, Budget
from astroattn.ops.native import near_far as native
from astroattn.patching import fallbacks
from astroattn.patching.site import CROSS_IN_ORDER
from tests.core_cases import draw, layout, near_far_oracle, relative
from tests.native_variants import REFUSAL

FEW = AstroConfig(num_hidden=8, exact_keys=8, tile=16)
# queries, keys, D, Dv, what differs from `budget_of`, lengths of the keys
CASES: dict[str, tuple[int, int, int, int, dict[str, Any], list[int] | None]] = {
    "fewer queries": (70, 300, 32, 32, {}, None),
    "more queries": (300, 70, 32, 24, {"exact_keys": 6}, None),
    "as many": (96, 96, 16, 16, {"exact_keys": 6}, [96, 50]),
    "one query": (1, 200, 16, 16, {"exact_keys": 6}, None),
    "three queries by position": (3, 150, 17, 5, {"by_content": False, "exact_keys": 6}, [150, 3]),
    "one key": (20, 1, 8, 8, {"exact_keys": 1, "num_hidden": 2}, None),
    "padding": (90, 331, 40, 24, {"exact_keys": 12}, [331, 150]),
    "nothing real": (67, 90, 16, 16, {"exact_keys": 8, "num_hidden": 5}, [0, 90]),
    "no far field": (100, 150, 17, 3, {"exact_keys": 6, "num_hidden": 0}, [150, 40]),
    "no exact keys": (100, 150, 17, 3, {"exact_keys": 0, "num_hidden": 6}, None),
    "more neurons than keys": (90, 9, 8, 8, {"tile": 4, "exact_keys": 1, "num_hidden": 40}, None),
    "blocks of queries": (2500, 130, 16, 16, {"exact_keys": 9}, None),
    "blocks of keys": (40, 2500, 16, 16, {"exact_keys": 9}, [2500, 1030]),
}
needs_kernels = pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))


def budget_of(changes: dict[str, Any]) -> Budget:
    values = {"prefix": 0, "tile": ROOT, "by_content": True, "near": 0, "exact_keys": ROOT, "num_hidden": ROOT}
    return Budget(**{"grid": None, **values, "steps": 2, "cross": True} | changes)


def tokens_of(queries: int, keys: int, dim: int, value_dim: int) -> list[Tensor]:
    """Query, key and value [2, 2, N, D] in float32, laid out as [batch, tokens, heads, D]."""
    shapes = (queries, dim), (keys, dim), (keys, value_dim)
    return [1.5 * torch.randn(2, count, 2, width).transpose(1, 2) for count, width in shapes]


@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("num_hidden", [0, 1, 7])
@pytest.mark.parametrize(("queries", "keys"), [(1, 40), (5, 63), (63, 20), (130, 200), (40, 40)])
def test_equals_dense_matrices(queries: int, keys: int, num_hidden: int, biased: bool) -> None:
    query = draw(3, queries, 6, scale=1.3, count=1)[0]
    key, value = draw(3, keys, 6, scale=1.3, count=2)
    bias = draw(3, queries, keys, scale=2.0, count=1)[0] if biased else None
    where = layout(num_hidden=num_hidden, near=0, tile=min(8, 4 * -(-queries // 4)))
    ours = plain.near_far.near_far_attention(query, key, value, where, bias)
    for mine, theirs in zip(ours, near_far_oracle(query, key, value, where, bias=bias), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@needs_kernels
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_equal_plain_pytorch(name: str, biased: bool, variant: str) -> None:
    """Padding holds NaN in the bias, which may not be read."""
    queries, keys, dim, value_dim, changes, given_lengths = CASES[name]
    inputs, budget, scale = tokens_of(queries, keys, dim, value_dim), budget_of(changes), dim**-0.5
    lengths = None if given_lengths is None else torch.tensor(given_lengths)
    bias = 2 * torch.randn(1, 2, queries, keys) if biased else None
    if bias is not None and lengths is not None:
        bias = bias.masked_fill(torch.arange(keys) >= lengths[:, None, None, None], torch.nan)
    out, log_p, *choices = native.near_far_forward(*inputs, bias, lengths, budget, scale)
    exact = [x.double().requires_grad_() for x in inputs]
    wide = None if bias is None else bias.double()
    expected, expected_log_p = plain.near_far_given(*exact, wide, *choices, lengths, budget, scale)
    assert relative(out, expected) < 2e-6
    torch.testing.assert_close(log_p.double(), expected_log_p, rtol=1e-5, atol=1e-5)

    real = expected_log_p > -torch.inf
    d_out, d_log_p = torch.randn_like(out), torch.randn_like(log_p)
    given = (*inputs, bias, out, log_p, *choices, lengths, budget, scale)
    grads = native.near_far_backward(d_out, d_log_p, *given)
    wanted = torch.autograd.grad([expected, expected_log_p[real]], exact, [d_out.double(), d_log_p[real].double()])
    for ours, theirs in zip(grads, wanted, strict=True):
        assert relative(ours, theirs) < 4e-6


@needs_kernels
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][5] is None])
def test_the_kernels_choose_as_well_as_plain_pytorch(name: str, variant: str) -> None:
    queries, keys, dim, value_dim, changes, _ = CASES[name]
    inputs = tokens_of(queries, keys, dim, value_dim)
    ours, _, order, winners, mass, chosen = native.near_far_forward(*inputs, None, None, budget_of(changes), dim**-0.5)
    exact = [x.double() for x in inputs]
    theirs, _, *choices = plain.near_far_forward(*exact, None, None, budget_of(changes), dim**-0.5)
    assert [x.shape for x in (order, winners, mass, chosen)] == [x.shape for x in choices]
    assert torch.equal(order.sort(-1).values, torch.arange(queries).expand_as(order).int())
    assert (chosen < keys).all()
    softmax = F.scaled_dot_product_attention(*exact)
    assert relative(ours, softmax) < 1.1 * relative(theirs, softmax) + 1e-4


@needs_kernels
@settings(max_examples=30, deadline=None)
@given(
    queries=st.integers(1, 150),
    keys=st.integers(1, 150),
    dim=st.integers(1, 70),
    tile=st.integers(1, 40),
    by_content=st.booleans(),
    exact_keys=st.integers(0, 9),
    num_hidden=st.integers(1, 20),
    steps=st.integers(0, 3),
)
def test_any_settings(queries: int, keys: int, dim: int, **changes: int) -> None:
    inputs, lengths = tokens_of(queries, keys, dim, dim), torch.tensor([keys - keys // 3, keys // 2])
    budget = budget_of(changes)
    out, log_p, *choices = native.near_far_forward(*inputs, None, lengths, budget, dim**-0.5)
    exact = [x.double() for x in inputs]
    expected, expected_log_p = plain.near_far_given(*exact, None, *choices, lengths, budget, dim**-0.5)
    assert relative(out, expected) < 5e-6
    torch.testing.assert_close(log_p.double(), expected_log_p, rtol=1e-4, atol=1e-4)


# The module


def crossing(queries: int = 150, keys: int = 200, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(2, 2, count, 8, dtype=dtype) for count in (queries, keys, keys)]


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_where_every_key_is_exact_it_is_softmax(backend: str, dtype: torch.dtype) -> None:
    """Of a layer that is told to have as many exact keys as there are, and of few keys or queries."""
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[0, 5:90] = False
    every = AstrocyteAttention(2, 8, AstroConfig(exact_keys=200, backend=backend))
    default = AstrocyteAttention(2, 8, AstroConfig(backend=backend))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for attention, queries in ((every, 150), (default, LEAST_QUERIES - 1), (default, 1)):
        tokens = crossing(queries, dtype=dtype)
        for key_mask in (None, mask):
            hidden = None if key_mask is None else key_mask[:, None, None]
            expected = F.scaled_dot_product_attention(*tokens, hidden)
            torch.testing.assert_close(attention(*tokens, key_mask=key_mask), expected, rtol=tolerance, atol=tolerance)
    tokens = crossing(300, 128, dtype=dtype)
    expected = F.scaled_dot_product_attention(*tokens)
    torch.testing.assert_close(default(*tokens), expected, rtol=tolerance, atol=tolerance)
    assert relative(default(*crossing(300, 400)), F.scaled_dot_product_attention(*crossing(300, 400))) > 0.01


@pytest.mark.parametrize("where", ["left", "right", "holes", "none real"])
@pytest.mark.parametrize("queries", [150, 200])
def test_hidden_keys_are_not_read_and_no_query_is_padding(queries: int, where: str) -> None:
    """Also where there are as many queries as keys: the mask says nothing of them then."""
    attention, (query, key, value) = AstrocyteAttention(2, 8, FEW), crossing(queries)
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[1, {"left": slice(60), "right": slice(140, None), "holes": slice(None, None, 3)}.get(where, slice(None))] = 0
    options: dict[str, Any] = {"key_mask": mask, "cross": True}
    out, log_p = attention.with_normaliser(query, key, value, **options)
    hidden = ~mask[:, None, :, None]
    other = attention(query, key.masked_fill(hidden, torch.nan), value.masked_fill(hidden, 1e30), **options)
    if where == "none real":
        assert (out[1] == 0).all()
        assert (log_p[1] == -torch.inf).all()
        return
    assert torch.equal(attention(query, key.masked_fill(hidden, 7.0), value.masked_fill(hidden, 1e3), **options), out)
    assert (out.abs().amax(-1) > 0).all()
    alone = attention(query[1:], key[1:, :, mask[1]], value[1:, :, mask[1]], cross=True)  # padding moves nothing
    torch.testing.assert_close(out[1:], alone)
    assert other.shape == out.shape


def test_a_near_field_and_exact_queries_are_of_self_attention() -> None:
    tokens = crossing()
    one = AstrocyteAttention(2, 8, AstroConfig(num_hidden=8, exact_keys=8, near=0))
    two = AstrocyteAttention(2, 8, AstroConfig(num_hidden=8, exact_keys=8, near=9, exact_queries=3))
    assert torch.equal(one(*tokens), two(*tokens))
    assert one.cost(150, 200) == two.cost(150, 200)


def test_heads_of_several_configs_and_a_bias() -> None:
    configs = [FEW, AstroConfig(hidden="none", exact_keys=30, near=0)]
    both, tokens = AstrocyteAttention(2, 8, configs), crossing()
    bias = torch.randn(1, 2, 150, 200)
    out = both(*tokens, bias=bias)
    for head, config in enumerate(configs):
        mine = [x[:, head : head + 1] for x in tokens]
        alone = AstrocyteAttention(1, 8, config)(*mine, bias=bias[:, head : head + 1])
        torch.testing.assert_close(out[:, head : head + 1], alone)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_gradients_are_those_of_float64(backend: str) -> None:
    """With positional tiles and every key exact but one, whose cluster it has for itself: nothing to choose."""
    attention = AstrocyteAttention(2, 8, AstroConfig(num_hidden=200, exact_keys=199, tile=16, backend=backend))
    tokens = [x.requires_grad_() for x in crossing()]
    d_out = torch.randn(2, 2, 150, 8)
    grads = torch.autograd.grad(attention(*tokens), tokens, d_out)
    exact = [x.detach().double().requires_grad_() for x in tokens]
    wanted = torch.autograd.grad(F.scaled_dot_product_attention(*exact), exact, d_out.double())
    for ours, theirs in zip(grads, wanted, strict=True):
        assert relative(ours, theirs) < 1e-2


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"cross": True, "causal": True}, "^cross: True; .*not causal"),
        ({"window": 4}, "^cross: None; .*no window"),
        ({"grid": (10, 20)}, "^cross: None; .*no grid"),
    ],
)
def test_what_has_no_meaning_raises(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        AstrocyteAttention(2, 8)(*crossing(), **options)


@pytest.mark.parametrize(
    "config",
    [
        AstroConfig(hidden="random", near=4),
        AstroConfig(hidden="random", exact_queries=1),
        AstroConfig(hidden="none", near=5, exact_keys=0),
    ],
)
def test_configs_that_cannot_cross_raise(config: AstroConfig) -> None:
    with pytest.raises(ValueError, match=r"^query: 150 tokens and 200 keys; cross attention is for"):
        AstrocyteAttention(2, 8, config)(*crossing())


def test_cross_of_a_wrong_type_raises() -> None:
    with pytest.raises(TypeError, match="cross: int"):
        AstrocyteAttention(2, 8)(*crossing(), cross=1)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool) -> None:
    attention = AstrocyteAttention(2, 8, FEW)
    compiled = torch.compile(attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for queries, keys in ((150, 200), (170, 220)) if dynamic else ((150, 200),):
        tokens = [x.requires_grad_() for x in crossing(queries, keys)]
        mine = torch.autograd.grad(compiled(*tokens).sum(), tokens)
        for ours, theirs in zip(mine, torch.autograd.grad(attention(*tokens).sum(), tokens), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_cost_counts_choosing_among_the_keys_for_few_queries() -> None:
    attention = AstrocyteAttention(2, 64)
    assert attention.cost(100, 4096).ratio == 1
    ratios = [attention.cost(queries, 4096).ratio for queries in (128, 512, 4096)]
    assert 0.4 > ratios[0] > ratios[1] > ratios[2] > 0.04
    assert attention.cost(512, 512, cross=True) != attention.cost(512, 512)


def test_calls_know_whether_they_cross() -> None:
    mask = torch.arange(200)[None] < 150
    tokens = crossing(200)
    assert AttentionCall(*tokens, {"key_mask": mask}).real_queries().sum() == 300
    assert AttentionCall(*tokens, {"key_mask": mask, "cross": True}).real_queries().all()
    assert AttentionCall(*crossing(), {"key_mask": mask}).real_queries().all()


# Patched models


def perceiver(**changes: int) -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    sizes = {"num_latents": 140, "d_latents": 16, "d_model": 12, "num_blocks": 1, "num_self_attends_per_block": 1}
    sizes |= {"num_self_attention_heads": 2, "num_cross_attention_heads": 2, "qk_channels": 16, "v_channels": 16}
    torch.manual_seed(0)
    model = transformers.PerceiverModel(transformers.PerceiverConfig(**sizes | changes)).eval()
    for weight in model.parameters():  # else attention is uniform
        weight.data.mul_(5.0)
    inputs = {"inputs": torch.randn(2, 300, 12), "attention_mask": torch.ones(2, 300)}
    inputs["attention_mask"][1, 250:] = 0
    return model, inputs


@torch.no_grad()
def test_a_perceiver_reads_its_input_through_an_astrocyte() -> None:
    model, inputs = perceiver()
    before = model(**inputs).last_hidden_state
    report = astroattn.patch(model, AstroConfig(exact_keys=300), inputs=inputs)
    assert [row.status for row in report.rows] == ["astrocyte", "astrocyte"]
    assert [row.index for row in report.rows] == [None, 0]
    assert "cross attention" in report.rows[0].reason
    torch.testing.assert_close(model(**inputs).last_hidden_state, before, rtol=1e-3, atol=1e-3)

    astroattn.patch(model, FEW, "encoder.cross_attention*", inputs=inputs)
    after = model(**inputs).last_hidden_state
    assert relative(after, before) > 1e-3
    inputs["inputs"][1, 250:] = 9.0  # padding
    torch.testing.assert_close(model(**inputs).last_hidden_state, after)
    assert fallbacks(model) == {}
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(**inputs).last_hidden_state, after)
    astroattn.unpatch(model)
    assert torch.equal(model(**inputs).last_hidden_state, before)


@torch.no_grad()
def test_as_many_latents_as_inputs_are_still_another_sequence() -> None:
    model, inputs = perceiver(num_latents=300)
    before = model(**inputs).last_hidden_state
    astroattn.patch(model, AstroConfig(exact_keys=299), "encoder.cross_attention*", inputs=inputs)
    after = model(**inputs).last_hidden_state
    assert relative(after, before) < 1e-2  # and no latent is taken for padding
    assert fallbacks(model) == {}


@pytest.mark.parametrize("name", ["bart", "t5", "whisper"])
def test_decoders_read_their_encoder_exactly(name: str) -> None:
    """In a tile a token would see something of later ones."""
    transformers = pytest.importorskip("transformers")
    small: dict[str, Any] = {"d_model": 16, "vocab_size": 99}
    layers = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 16))}
    layers |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model = {
        "bart": lambda: transformers.BartModel(transformers.BartConfig(**small, **layers, **special)),
        "t5": lambda: transformers.T5Model(
            transformers.T5Config(**small, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
        ),
        "whisper": lambda: transformers.WhisperModel(
            transformers.WhisperConfig(**small, **layers, **special, max_source_positions=20, num_mel_bins=8)
        ),
    }[name]()
    report = astroattn.patch(model.eval())
    crossing = [row for row in report.rows if row.index is None]
    assert [row.reason for row in crossing] == [CROSS_IN_ORDER]
    assert report.rows[0].status == "astrocyte"


def test_a_static_layer_beside_exact_keys_says_why_it_cannot() -> None:
    model, inputs = perceiver()
    report = astroattn.patch(model, AstroConfig(hidden="random", near=3), inputs=inputs)
    assert [row.reason for row in report.exact] == [CROSS]


@torch.no_grad()
def test_multihead_attention_whose_name_says_so() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cross_attn = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, latents: Tensor, tokens: Tensor, hidden: Tensor | None = None) -> Tensor:
            out: Tensor = self.cross_attn(latents, tokens, tokens, key_padding_mask=hidden, need_weights=False)[0]
            return out

    model = Reader().eval()
    inputs = {"latents": 9 * torch.randn(2, 140, 16), "tokens": torch.randn(2, 300, 16)}
    inputs["hidden"] = torch.arange(300).expand(2, -1) > 250
    before = model(**inputs)
    astroattn.patch(model, AstroConfig(exact_keys=300), inputs=inputs)
    torch.testing.assert_close(model(**inputs), before, rtol=1e-4, atol=1e-5)
    astroattn.patch(model, FEW, inputs=inputs)
    assert 1e-3 < relative(model(**inputs), before) < 0.5
    assert fallbacks(model) == {}


def test_a_decoder_that_was_not_seen_to_be_causal_reads_its_encoder_exactly() -> None:
    """FSMT's is causal only where it keeps no cache."""
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"langs": ["en", "de"], "src_vocab_size": 60, "tgt_vocab_size": 60, "d_model": 16}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 16}
    report = astroattn.patch(transformers.FSMTModel(transformers.FSMTConfig(**sizes)).eval())
    assert [row.reason for row in report.rows if row.index is None] == [CROSS_IN_ORDER]


class CrossAttention(nn.Module):
    """Two heads of 8, by SDPA or written out."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.fused = 2, fused
        self.parts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        tokens = [part(z).unflatten(-1, (2, 8)).transpose(1, 2) for part, z in zip(self.parts, (x, y, y), strict=True)]
        if self.fused:
            out = F.scaled_dot_product_attention(*tokens, mask)
        else:
            scores = tokens[0] @ tokens[1].transpose(-1, -2) * 8**-0.5
            if mask is not None:
                scores = scores.masked_fill(~mask, -1e9) if mask.dtype == torch.bool else scores + mask
            out = scores.softmax(-1) @ tokens[2]
        return out.transpose(1, 2).flatten(2)


class Crossing(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.cross_attn = CrossAttention(fused)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        out: Tensor = self.cross_attn(x, y, mask)
        return out


REAL = torch.arange(300) < torch.tensor([300, 200])[:, None, None, None]
MASKS = {
    "none": lambda queries: None,
    "keys": lambda queries: REAL,
    "dense": lambda queries: REAL.expand(2, 1, queries, 300).contiguous(),
    "added": lambda queries: torch.zeros(2, 1, queries, 300).masked_fill(~REAL, torch.finfo(torch.float32).min),
    "bias": lambda queries: torch.randn(1, 2, queries, 300),
    "of each query": lambda queries: torch.rand(2, 1, queries, 300) > 0.5,
}


@pytest.mark.parametrize("queries", [140, 300])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", MASKS)
@torch.no_grad()
def test_masks_hide_keys_or_are_left_to_the_host(kind: str, fused: bool, queries: int) -> None:
    model, mask = Crossing(fused).eval(), MASKS[kind](queries)
    inputs = {"x": 5 * torch.randn(2, queries, 16), "y": torch.randn(2, 300, 16)}
    before = model(**inputs, mask=mask)
    report = astroattn.patch(model, AstroConfig(exact_keys=300), inputs=inputs | {"mask": None})
    assert report.rows[0].index is None
    with pytest.warns(UserWarning, match="dense mask") if kind == "of each query" else nullcontext():
        torch.testing.assert_close(model(**inputs, mask=mask), before, rtol=1e-4, atol=1e-5)
    astroattn.patch(model, AstroConfig(num_hidden=16, exact_keys=32), inputs=inputs | {"mask": None})
    with pytest.warns(UserWarning, match="dense mask") if kind == "of each query" else nullcontext():
        after = model(**inputs, mask=mask)
    assert (fallbacks(model) != {}) == (kind == "of each query")
    assert relative(after, before) < (1e-5 if kind == "of each query" else 0.3)
    assert torch.equal(after, before) == (kind == "of each query")


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_where_no_sequence_has_a_real_key_gradients_are_zero(backend: str) -> None:
    attention, tokens = AstrocyteAttention(2, 8, AstroConfig(backend=backend)), crossing()
    tokens = [x.requires_grad_() for x in tokens]
    out = attention(*tokens, key_mask=torch.zeros(2, 200, dtype=torch.bool))
    assert not out.any()
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), tokens))
