"""Sliding windows: the operator against dense softmax, and models that have them."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as t
from patching_models import ALL, build, outputs, text
from torch import Tensor, nn

from astroattn import AstroConfig, AstrocyteAttention, patch, unpatch
from astroattn.distillation.rows import softmax_rows
from astroattn.fidelity.calls import AttentionCall, CostMeter
from astroattn.ops.window import LEAST_BLOCK, window_attention
from astroattn.patching import fallbacks

STATIC = AstroConfig(hidden="random", near=4)
FULL = AstroConfig(hidden="random", near=4096)
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SHAPE |= {"intermediate_size": 64, "vocab_size": 99}
CONFIGS = {
    "mistral": (t.MistralForCausalLM, t.MistralConfig(**SHAPE, sliding_window=8)),
    "qwen2": (
        t.Qwen2ForCausalLM,
        t.Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    ),
    "gemma3": (
        t.Gemma3ForCausalLM,
        t.Gemma3TextConfig(**SHAPE, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    ),
}


def dense(query: Tensor, key: Tensor, value: Tensor, window: int, causal: bool, mask: Tensor | None) -> list[Tensor]:
    """Output and log p by N x N, zeros and -inf where a query sees no key."""
    queries, keys = query.shape[2], key.shape[2]
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    seen = (distance <= window) & (distance >= (0 if causal else -window))
    if mask is not None:
        seen = seen & mask[:, None, None]
    logits = (query @ key.mT * 0.5).masked_fill(~seen, -torch.inf)
    return [logits.softmax(-1).nan_to_num() @ value, logits.logsumexp(-1)]


def draw(queries: int, keys: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries)
    return [torch.randn(2, 3, n, 4, generator=generator, dtype=torch.float64) for n in (queries, keys, keys)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("tokens", "window"), [(1, 0), (9, 3), (9, 20), (LEAST_BLOCK + 1, 5), (500, 0), (500, 130)])
def test_the_operator_is_softmax_within_the_window(tokens: int, window: int, causal: bool, masked: bool) -> None:
    tensors = [each.requires_grad_() for each in draw(tokens, tokens)]
    mask = torch.rand(2, tokens, generator=torch.Generator().manual_seed(0)) < 0.6 if masked else None
    options = {"causal": causal, "scale": 0.5, "key_mask": mask, "with_normaliser": True}
    found = window_attention(*tensors, window, **options)
    expected = dense(*tensors, window, causal, mask)
    torch.testing.assert_close(found, tuple(expected))
    slope = torch.randn(found[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients, truth = (torch.autograd.grad((out * slope).sum(), tensors) for out in (found[0], expected[0]))
    torch.testing.assert_close(gradients, tuple(each.nan_to_num() for each in truth))


@pytest.mark.parametrize("queries", [1, 5])
def test_the_last_queries_of_a_longer_sequence(queries: int) -> None:
    query, key, value = draw(queries, 30)
    found = window_attention(query, key, value, 7, causal=True, scale=0.5)[0]
    torch.testing.assert_close(found, dense(query, key, value, 7, True, None)[0])


def test_the_module_takes_a_window() -> None:
    query, key, value = draw(40, 40)
    expected, log_p = dense(query, key, value, 7, False, None)
    for config in (AstroConfig(), STATIC, AstroConfig(hidden="exact")):
        core = AstrocyteAttention(3, 4, config).double()
        torch.testing.assert_close(core(query, key, value, scale=0.5, window=7), expected)
        torch.testing.assert_close(core.with_normaliser(query, key, value, scale=0.5, window=7)[1], log_p)
        core.exact = True
        torch.testing.assert_close(core(query, key, value, scale=0.5, window=7), expected)
    call = AttentionCall(query, key, value, {"scale": 0.5, "window": 7})
    torch.testing.assert_close(softmax_rows(call) @ value, expected)


@pytest.mark.parametrize(
    ("window", "options", "error", "message"),
    [
        (True, {}, TypeError, "window: True of type bool"),
        (2.0, {}, TypeError, "window: 2.0 of type float"),
        (-1, {}, ValueError, "window: -1; must be at least 0"),
        (3, {"grid": (3, 3)}, ValueError, "window: 3; a patch grid takes none"),
    ],
)
def test_a_bad_window_is_named(window: object, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AstrocyteAttention(3, 4)(*draw(9, 9), window=window, **options)


def test_a_bidirectional_window_needs_as_many_queries_as_keys() -> None:
    with pytest.raises(ValueError, match=r"^cross: None; cross attention has no window"):
        AstrocyteAttention(3, 4)(*draw(2, 9), window=3)


def test_the_cost_of_a_window_grows_no_more_with_the_sequence() -> None:
    core = AstrocyteAttention(3, 4)
    costs = [core.cost(tokens, tokens, causal=True, window=255) for tokens in (1000, 2000)]
    assert [cost.positions for cost in costs] == [256, 256]
    assert costs[0].products == costs[1].products == 2 * 510
    assert core.cost(9, 9, causal=True, window=255).products == 2 * 9


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    cls, config = CONFIGS[request.param]
    torch.manual_seed(0)
    found = cls(config).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return found


@pytest.mark.parametrize("host", ["sdpa", "eager"])
def test_a_causal_model_is_equal_beyond_its_window(model: nn.Module, host: str) -> None:
    model.set_attn_implementation(host)
    before = outputs(model, text())
    report = patch(model, FULL)
    windowed = [row for row in report.patched if "sliding window of 8 tokens: exact in longer" in row.reason]
    assert len(report.patched) == 2
    assert windowed
    assert not any("not checked" in row.reason for row in windowed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(outputs(model, text()), before, rtol=1e-4, atol=1e-4)
    unpatch(model)
    assert all(map(torch.equal, outputs(model, text()), before))


def test_within_its_window_a_layer_does_what_its_config_says(model: nn.Module) -> None:
    patch(model, STATIC, where=0 if model.config.model_type != "qwen2" else 1)
    calls: list[dict] = []
    core = next(each for each in model.modules() if isinstance(each, AstrocyteAttention))
    core.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    ids = text()["input_ids"]
    for tokens in (8, 9, 20):
        model(input_ids=ids[:, :tokens], use_cache=False)
    assert [call["window"] for call in calls] == [None, 7, 7]


def test_generating_follows_the_original(model: nn.Module) -> None:
    """Left padded; the window's cache keeps its last tokens only."""
    ids = text()["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    settings |= {"eos_token_id": None}
    before = model.generate(ids, **settings)
    patch(model, FULL)
    assert torch.equal(model.generate(ids, **settings), before)
    assert not fallbacks(model)


def test_a_bidirectional_window_is_equal_and_padding_moves_nothing() -> None:
    model = build(ALL["modernbert"])
    inputs = text()
    before = outputs(model, inputs)
    report = patch(model, FULL)
    assert sum("sliding window" in row.reason for row in report.patched) == 2
    torch.testing.assert_close(outputs(model, inputs), before, rtol=1e-4, atol=1e-4)
    meter = CostMeter(model)
    with meter.watch():
        model(**inputs)
    meter.add(None)
    assert meter.totals()["positions"] < meter.totals()["keys"]  # 9 of the window in two of four layers
    other = inputs | {"input_ids": torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 7)}
    torch.testing.assert_close(outputs(model, other), outputs(model, inputs), rtol=1e-5, atol=1e-5)


def test_a_long_window_is_not_checked_beyond_and_the_report_says_so() -> None:
    report = patch(t.MistralForCausalLM(t.MistralConfig(**SHAPE, sliding_window=4096)).eval(), STATIC)
    assert all(row.reason.endswith("; not checked in longer ones") for row in report.patched)


def test_the_mask_of_a_window_is_the_hosts_own(model: nn.Module) -> None:
    """A layer that stays exact beside it gets what it always got."""
    before = outputs(model, text())
    patch(model, STATIC, where=1 if model.config.model_type != "qwen2" else 0)
    core = next(each for each in model.modules() if isinstance(each, AstrocyteAttention))
    core.exact = True
    torch.testing.assert_close(outputs(model, text()), before, rtol=1e-5, atol=1e-5)
