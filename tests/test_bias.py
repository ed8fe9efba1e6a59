"""A bias of every query on every key (relative positions): softmax attention has it, and heads with clusters."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from core_cases import BIDIRECTIONAL, draw, module, padding_mask, relative
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck

from astroattn import AstroConfig, AstrocyteAttention
from astroattn.config import MIXABLE

EXACT = AstroConfig(hidden="exact")
CONFIGS: dict[str, Any] = {name: config for name, config in BIDIRECTIONAL.items() if config.hidden in MIXABLE}
CONFIGS |= {"exact": EXACT, "heads": (BIDIRECTIONAL["hebbian"], AstroConfig(hidden="none", near=3, exact_keys=4))}
CONFIGS |= {"heads, one exact": (EXACT, BIDIRECTIONAL["hebbian, by position"])}


def draw_bias(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Smooth in the distance, of several units and other in every head, as T5 learns it [B, H, N, N]; and noise."""
    place = torch.arange(shape[-1])
    distance = (place[:, None] - place).double()
    heads = torch.linspace(1, 3, shape[1])[:, None, None]
    smooth = -heads * distance.abs().add(1).log() + distance.sign() * heads
    return (smooth + 0.1 * torch.randn(shape)).to(dtype)


def hide(bias: Tensor, mask: Tensor, filler: float) -> Tensor:
    """The bias of padding, of queries and of keys, is that number."""
    return bias.masked_fill(~(mask[:, None, :, None] & mask[:, None, None]), filler)


# Where every key is exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("name", ["exact", "covered", "switched"])
def test_it_is_softmax_attention_with_a_mask_of_numbers(
    name: str, masked: bool, causal: bool, dtype: torch.dtype
) -> None:
    attention = module(EXACT if name == "exact" else AstroConfig())
    attention.exact = name == "switched"
    qkv, bias = [x.to(dtype) for x in draw(6, 2, 40, 8)], draw_bias(1, 2, 40, 40)
    mask = padding_mask() if masked else torch.ones(6, 40, dtype=torch.bool)
    out, log_p = attention.with_normaliser(*qkv, key_mask=mask if masked else None, causal=causal, bias=bias)
    seen = mask[:, None, None] & torch.ones(40, 40, dtype=torch.bool).tril(0 if causal else 40)
    told = seen.any(-1, keepdim=True)
    expected = F.scaled_dot_product_attention(*qkv, attn_mask=bias.masked_fill(~seen, -1e4).to(dtype))
    torch.testing.assert_close(out * told, expected * told)
    assert not out[~mask.any(1)].any()
    logits = qkv[0].double() @ qkv[1].double().mT * 8**-0.5 + bias
    expected = logits.masked_fill(~seen, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(log_p.double(), expected, rtol=1e-5, atol=1e-5)


def test_other_queries_than_keys_where_every_key_is_exact() -> None:
    query, (key, value) = draw(2, 2, 7, 8, count=1)[0], draw(2, 2, 40, 8, count=2)
    bias = draw(2, 1, 7, 40, count=1)[0]
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    torch.testing.assert_close(module(EXACT)(query, key, value, bias=bias), expected)


# Padding, batches and heads


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tokens", [40, 150])
@pytest.mark.parametrize("kind", ["right", "left", "holes"])
def test_a_row_padded_in_a_batch_gives_what_it_gives_alone(name: str, tokens: int, kind: str) -> None:
    """Whatever the bias of padding is; so are the gradients, though to those of exact heads NaN comes, and -inf not."""
    attention, qkv = module(CONFIGS[name]), draw(1, 2, tokens, 8, dtype=torch.float32)
    bias, longest = draw_bias(1, 2, tokens, tokens), tokens + 57
    places = {
        "right": torch.arange(tokens),
        "left": torch.arange(57, longest),
        "holes": torch.randperm(longest)[:tokens].sort().values,
    }[kind]
    mask = torch.ones(3, longest, dtype=torch.bool)
    mask[1], mask[1, places], mask[2, 3:] = False, True, False
    padded = draw(3, 2, longest, 8, scale=5.0, dtype=torch.float32)
    for x, alone in zip(padded, qkv, strict=True):
        x[1, :, places] = alone[0]
    whole = draw_bias(3, 2, longest, longest)
    whole[1, :, places[:, None], places] = bias[0]
    alone = [x.requires_grad_() for x in (*qkv, bias)]
    padded = [x.requires_grad_() for x in (*padded, hide(whole, mask, -torch.inf))]
    expected = attention.with_normaliser(*alone[:3], bias=alone[3])
    together = attention.with_normaliser(*padded[:3], key_mask=mask, bias=padded[3])
    spoiled = attention.with_normaliser(*padded[:3], key_mask=mask, bias=hide(whole, mask, torch.nan))
    for found in (together, spoiled):
        for mine, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(mine[1, :, places], wanted[0], rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(expected[0])
    theirs = torch.autograd.grad((expected[0] * weight).sum() + expected[1].sum(), alone)
    ours = torch.autograd.grad((together[0][1:2, :, places] * weight).sum() + together[1][1, :, places].sum(), padded)
    for mine, wanted in zip(ours[:3], theirs[:3], strict=True):
        torch.testing.assert_close(mine[1, :, places], wanted[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[3][1, :, places[:, None], places], theirs[3][0], rtol=1e-4, atol=1e-4)
    ours[3][1, :, places[:, None], places] = 0
    assert not ours[3].any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_bias_for_all_heads_or_sequences(name: str, shape: tuple[int, int]) -> None:
    """It is the same as one for each, and has the sum of their gradients."""
    attention, qkv = module(CONFIGS[name]), draw(2, 2, 60, 8, dtype=torch.float32)
    few = draw_bias(*shape, 60, 60).requires_grad_()
    each = few.detach().expand(2, 2, -1, -1).clone().requires_grad_()
    ours, theirs = (attention.with_normaliser(*qkv, bias=x) for x in (few, each))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(attention(*qkv, bias=few), ours[0])
    weight = torch.randn_like(ours[0])
    mine, other = (
        torch.autograd.grad((found[0] * weight).sum() + found[1].sum(), x)[0]
        for found, x in ((ours, few), (theirs, each))
    )
    torch.testing.assert_close(mine, other.sum_to_size(mine.shape), rtol=1e-4, atol=1e-5)


def test_heads_with_configs_of_their_own_have_the_bias_of_their_own() -> None:
    names = ("hebbian", "near and keys", "hebbian, by position")
    configs = [CONFIGS[name] for name in names]
    qkv, bias = draw(2, 4, 60, 8, dtype=torch.float32), draw_bias(1, 4, 60, 60)
    together = AstrocyteAttention(4, 8, (*configs, EXACT))(*qkv, bias=bias)
    for head, config in enumerate((*configs, EXACT)):
        own = slice(head, head + 1)
        alone = AstrocyteAttention(1, 8, config)(*(x[:, own] for x in qkv), bias=bias[:, own])
        torch.testing.assert_close(together[:, own], alone)


# What it is for


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("tiles", ["content", "position"])
def test_it_is_heard(tiles: str, backend: str) -> None:
    """Without it the default answers something else."""
    qkv, bias = draw(1, 2, 400, 16, dtype=torch.float32), draw_bias(1, 2, 400, 400)
    attention = module(AstroConfig(tiles=tiles, backend=backend), dim=16)
    softmax = F.scaled_dot_product_attention(*qkv, attn_mask=bias)
    error = relative(attention(*qkv, bias=bias), softmax)
    assert 0 < error < 0.1 * relative(attention(*qkv), softmax)


# Gradients


def test_the_gradient_equals_finite_differences() -> None:
    """Where no mass moves, which is left out of every gradient."""
    attention = module(AstroConfig(hidden="none", near=1, exact_keys=4, tile=4), dim=4)
    inputs = [x.requires_grad_() for x in (*draw(1, 2, 12, 4), draw_bias(1, 2, 12, 12, dtype=torch.float64))]
    mask = torch.arange(12)[None] > 0

    def attend(*x: Tensor) -> Tensor:
        return attention(*x[:3], bias=x[3], key_mask=mask)

    assert gradcheck(attend, inputs, eps=1e-7, atol=1e-5, fast_mode=True)


# Graphs and autocast


@pytest.mark.parametrize(
    ("name", "masked"),
    [("hebbian", False), ("hebbian", True), ("hebbian, by length, plain", True), ("exact", True), ("heads", True)],
)
def test_one_graph_for_all_sizes(name: str, masked: bool) -> None:
    attention, graphs = module(CONFIGS[name]), []

    def count(graph: torch.fx.GraphModule, examples: list) -> Any:
        graphs.append(graph)
        return aot_eager(graph, examples)

    def gradients(attend: Any, inputs: list[Tensor], mask: Tensor | None) -> tuple[Tensor, ...]:
        out, log_p = attend(*inputs[:3], bias=inputs[3], key_mask=mask)
        loss = out.square().sum() + log_p.masked_fill(log_p.isinf(), 0).sum()
        return out, log_p, *torch.autograd.grad(loss, inputs)

    torch.compiler.reset()
    compiled = torch.compile(attention.with_normaliser, backend=count, dynamic=True, fullgraph=True)
    for rows, tokens in ((5, 140), (4, 170), (3, 190)):
        inputs = [*draw(rows, 2, tokens, 8, dtype=torch.float32), draw_bias(rows, 1, tokens, tokens)]
        inputs = [x.requires_grad_() for x in inputs]
        mask = padding_mask(tokens)[:rows] if masked else None
        theirs = gradients(attention.with_normaliser, inputs, mask)
        for mine, other in zip(gradients(compiled, inputs, mask), theirs, strict=True):
            torch.testing.assert_close(mine, other)
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["hebbian", "hebbian, by length, plain", "exact", "heads"])
def test_programs_serve_any_padding(name: str) -> None:
    """An export, and a trace whose example has its padding on the right, where nothing has to move."""

    class Attend(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = module(CONFIGS[name])

        def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
            return self.core(query, key, value, key_mask=mask, bias=bias)

    qkv, bias, attend = draw(2, 2, 60, 8, dtype=torch.float32), draw_bias(1, 2, 60, 60), Attend()
    right = torch.arange(60) < torch.tensor([[40], [55]])
    programs = [torch.export.export(attend, (*qkv, right, bias)).module()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        programs.append(torch.jit.trace(attend, (*qkv, right, bias), check_trace=False))
    for mask in (right, right.flip(1)):
        for program in programs:
            torch.testing.assert_close(program(*qkv, mask, bias), attend(*qkv, mask, bias))


def test_fake_tensors_have_a_bias() -> None:
    attend = module(CONFIGS["hebbian"])
    with FakeTensorMode() as mode:
        given = draw(2, 2, 60, 8, dtype=torch.float32), torch.ones(2, 60, dtype=torch.bool), draw_bias(1, 2, 60, 60)
        out = attend(*given[0], key_mask=given[1], bias=given[2])
    assert out.shape == (2, 2, 60, 8)
    assert out.fake_mode is mode


@pytest.mark.parametrize("name", CONFIGS)
def test_autocast_leaves_the_bias_as_it_is(name: str) -> None:
    attention, qkv = module(CONFIGS[name]), draw(2, 2, 60, 8, dtype=torch.float32)
    bias = draw_bias(1, 2, 60, 60).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out, log_p = attention.with_normaliser(*qkv, bias=bias)
    expected, expected_log_p = attention.with_normaliser(*(x.bfloat16() for x in qkv), bias=bias)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    torch.testing.assert_close(log_p, expected_log_p, rtol=1e-2, atol=3e-2)
    assert torch.autograd.grad(out.float().sum(), bias)[0].dtype == torch.float32


# What has none


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (AstroConfig(hidden="random"), {}, "given with this config; a bias for every query and key, which neither"),
        (AstroConfig(hidden="random", near=4, exact_keys=2), {}, "given with this config; .* which neither"),
        (AstroConfig(hidden="streaming"), {}, "given with this config; .* which neither"),
        (AstroConfig(hidden="streaming"), {"causal": True}, "given with this config; .* in causal attention"),
        (AstroConfig(), {"causal": True}, "given with this config; .* in causal attention"),
        (EXACT, {"window": 5}, "given with this config; .* within a window"),
        (AstroConfig(), {"window": 5}, "given with this config; .* within a window"),
        (EXACT, {"soft_cap": 3.0}, "given with this config; .* beside a soft cap"),
        (AstroConfig(), {"bias": torch.zeros(2, 300, 300)}, r"shape \(2, 300, 300\) .*; expected \[1 or 2, 1 or 4"),
        (AstroConfig(), {"bias": torch.zeros(1, 3, 300, 300)}, r"shape \(1, 3, 300, 300\)"),
        (AstroConfig(), {"bias": torch.zeros(3, 4, 300, 300)}, r"shape \(3, 4, 300, 300\)"),
        (AstroConfig(), {"bias": torch.zeros(2, 4, 300, 1)}, r"shape \(2, 4, 300, 1\)"),
        (EXACT, {"bias": torch.zeros(2, 4, 1, 300)}, r"shape \(2, 4, 1, 300\)"),
        (AstroConfig(), {"bias": torch.zeros(1, 1, 300, 300, device="meta")}, "shape .* on meta; expected .* on cpu"),
    ],
)
def test_what_has_no_bias_says_so(config: AstroConfig, options: dict[str, Any], message: str) -> None:
    attention = AstrocyteAttention(4, 8, config)
    options = {"bias": torch.zeros(1, 4, 300, 300)} | options
    for attend in (attention, attention.with_normaliser):
        with pytest.raises(ValueError, match=f"^bias: {message}"):
            attend(*draw(2, 4, 300, 8, dtype=torch.float32), **options)


@pytest.mark.parametrize(
    ("bias", "came"),
    [
        (2.0, "float"),
        ([[0.0]], "list"),
        (torch.zeros(1, 1, 300, 300, dtype=torch.bool), "torch.bool"),
        (torch.zeros(1, 1, 300, 300, dtype=torch.long), "torch.int64"),
    ],
)
def test_what_is_no_bias(bias: Any, came: str) -> None:
    with pytest.raises(TypeError, match=f"^bias: {came}; expected a tensor of one of torch.float32"):
        AstrocyteAttention(4, 8)(*draw(2, 4, 300, 8, dtype=torch.float32), bias=bias)


def test_triton_has_no_kernel_for_it() -> None:
    config = AstroConfig(num_hidden=5, near=1, exact_keys=6, tile=12, backend="triton")
    with pytest.raises(ValueError, match=r"backend: 'triton' cannot run here; .*\(near_far with a bias\)"):
        module(config)(*draw(1, 2, 60, 8, dtype=torch.float32), bias=draw_bias(1, 2, 60, 60))
