"""Attention sinks: one more key of each head whose value is zero, in the normaliser alone."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as t
from patching_models import outputs, text
from torch import Tensor, nn

from astroattn import AstroConfig, AstrocyteAttention, patch, unpatch
from astroattn.patching import fallbacks

CONFIGS = [
    AstroConfig(hidden="exact"),
    AstroConfig(hidden="random", near=64),
    AstroConfig(hidden="random", near=4),
    AstroConfig(near=2, exact_keys=4, num_hidden=8),
]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_sink_is_a_key_without_a_value(config: AstroConfig, window: int | None) -> None:
    """Against the same attention and its own normaliser: exact whatever approximates that."""
    core = AstrocyteAttention(3, 8, config).double()
    query, key, value = draw(3, 2, 3, 40, 8)
    sink = torch.tensor([-50.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    plain, log_p = core.with_normaliser(query, key, value, window=window)
    out, log_p_with = core.with_normaliser(query, key, value, window=window, sink=sink)
    p = log_p.exp() + sink.exp()[:, None]
    torch.testing.assert_close(out, plain * (log_p.exp() / p)[..., None])
    torch.testing.assert_close(log_p_with, p.log())
    torch.testing.assert_close(out, core(query, key, value, window=window, sink=sink))
    torch.testing.assert_close(out[:, 0], plain[:, 0])
    (gradient,) = torch.autograd.grad(out.sum(), sink)
    assert gradient.isfinite().all()
    assert gradient[1:].abs().min() > 0


@pytest.mark.parametrize("causal", [False, True])
def test_it_is_a_softmax_over_one_more_logit(causal: bool) -> None:
    """With padding before the tokens, where a causal query of the padding sees no key; gradients stay finite."""
    core = AstrocyteAttention(3, 8, AstroConfig(hidden="exact")).double()
    query, key, value = (each.requires_grad_() for each in draw(3, 2, 3, 20, 8))
    mask = torch.arange(20)[None] >= torch.tensor([[0], [5]])
    sink = torch.tensor([-1.0, 0.5, 3.0], dtype=torch.float64)
    logits = (query @ key.mT * 8**-0.5).masked_fill(~mask[:, None, None], -torch.inf)
    if causal:
        logits = logits.masked_fill(~torch.ones(20, 20, dtype=torch.bool).tril(), -torch.inf)
    column = sink[None, :, None, None].expand(2, -1, 20, 1)
    expected = torch.cat([logits, column], -1).softmax(-1)[..., :-1] @ value
    out = core(query, key, value, key_mask=mask, causal=causal, sink=sink)
    torch.testing.assert_close(out, expected)
    for found, true in zip(*(torch.autograd.grad(x.sum(), (query, key, value)) for x in (out, expected)), strict=True):
        torch.testing.assert_close(found, true)


@pytest.mark.parametrize(
    ("sink", "error", "message"),
    [
        (1.0, TypeError, "sink: float; expected a floating-point tensor"),
        (torch.zeros(3, dtype=torch.int64), TypeError, "sink: torch.int64"),
        (torch.zeros(2), ValueError, r"sink: shape \(2,\) on cpu; expected \[H\] = \(3,\)"),
    ],
)
def test_a_bad_sink_is_named(sink: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AstrocyteAttention(3, 8).double()(*draw(3, 2, 3, 9, 8), sink=sink)


@pytest.fixture
def gpt_oss() -> nn.Module:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"intermediate_size": 64, "vocab_size": 99, "head_dim": 8, "sliding_window": 8}
    config = t.GptOssConfig(**shape, num_local_experts=2, num_experts_per_tok=1, attn_implementation="eager")
    torch.manual_seed(0)
    model = t.GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (1.0 if "sinks" in name else 0.3))
    return model


def test_a_model_with_sinks_is_equal(gpt_oss: nn.Module) -> None:
    """One of its layers has a sliding window too."""
    before = outputs(gpt_oss, text())
    assert len(patch(gpt_oss, AstroConfig(hidden="random", near=4096)).patched) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(outputs(gpt_oss, text()), before, rtol=1e-4, atol=1e-4)
    assert not fallbacks(gpt_oss)
    unpatch(gpt_oss)
    assert all(map(torch.equal, outputs(gpt_oss, text()), before))


def test_sinks_train_with_an_astrocyte(gpt_oss: nn.Module) -> None:
    patch(gpt_oss, AstroConfig(hidden="random", near=4))
    gpt_oss(**text()).logits.square().mean().backward()
    for layer in gpt_oss.model.layers:
        assert layer.self_attn.sinks.grad.isfinite().all()
        assert layer.self_attn.sinks.grad.abs().max() > 0
