"""Soft caps on the logits (Gemma 2): c tanh(q.k / c) in streaming memories and in softmax attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t
from patching_models import text
from torch import Tensor, nn

import astroattn
from astroattn import AstroConfig, AstrocyteAttention, patch, unpatch
from astroattn.distillation.rows import softmax_rows
from astroattn.fidelity.calls import AttentionCall
from astroattn.patching import fallbacks

CAP = 2.0
HEADS, DIM = 4, 8


def draw(count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [3 * torch.randn(2, HEADS, count, DIM, generator=generator, dtype=dtype) for _ in range(3)]


def dense(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, cap: float = CAP) -> tuple[Tensor, Tensor]:
    """Softmax of capped logits, and log p; zeros where a query sees no key."""
    logits = cap * (query @ key.mT * DIM**-0.5 / cap).tanh()
    logits = logits.masked_fill(~seen, -torch.inf)
    return logits.softmax(-1).nan_to_num() @ value, logits.logsumexp(-1)


def causal(count: int) -> Tensor:
    return torch.ones(count, count, dtype=torch.bool).tril()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_softmax_attention_with_a_cap(is_causal: bool, padded: bool) -> None:
    query, key, value = (x.requires_grad_() for x in draw(17))
    real = torch.ones(2, 17, dtype=torch.bool)
    if padded:
        real[0, :3] = False
        real[1] = False
    core = AstrocyteAttention(HEADS, DIM, AstroConfig(hidden="exact"))
    mask = real if padded else None
    found = core.with_normaliser(query, key, value, key_mask=mask, causal=is_causal, soft_cap=CAP)
    seen = real[:, None, None] & (causal(17) if is_causal else torch.ones(17, 17, dtype=torch.bool))
    expected = dense(query, key, value, seen)
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn_like(found[0])
    gradients = [torch.autograd.grad(out[0], (query, key, value), cotangent) for out in (found, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs.nan_to_num())
    assert not torch.allclose(found[0], core(query, key, value, key_mask=mask, causal=is_causal), rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_memory_that_holds_everything_is_softmax(dtype: torch.dtype) -> None:
    core = AstrocyteAttention(HEADS, DIM, AstroConfig(hidden="streaming", entries=64))
    tokens = draw(60)
    expected = dense(*tokens, causal(60))[0]
    found, _ = core.decode(*(x.to(dtype) for x in tokens), soft_cap=CAP)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_a_full_memory_goes_by_the_capped_logits() -> None:
    """It errs less than one that does not know of the cap, also where entries were merged; cuts do not matter."""
    core = AstrocyteAttention(HEADS, DIM, AstroConfig(hidden="streaming", entries=32))
    tokens = draw(200)
    expected = dense(*tokens, causal(200))[0][:, :, 60:]
    found = core(*tokens, causal=True, soft_cap=CAP)
    error, without = ((x[:, :, 60:] - expected).norm() for x in (found, core(*tokens, causal=True)))
    assert error < 0.6 * without
    state, parts = None, []
    for piece in zip(*(x.split(30, 2) for x in tokens), strict=True):
        out, state = core.decode(*piece, state, soft_cap=CAP)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), found)
    torch.testing.assert_close(core(*tokens, causal=True, soft_cap=1e9), core(*tokens, causal=True))


@pytest.mark.parametrize(
    ("config", "options", "error", "message"),
    [
        (AstroConfig(), {}, ValueError, r"soft_cap: 2.0 with this config; soft cap on the attention logits"),
        (AstroConfig(hidden="random"), {"causal": True}, ValueError, "soft_cap: 2.0 with this config"),
        (AstroConfig(hidden="streaming"), {"causal": True, "window": 3}, ValueError, "soft_cap: 2.0 with this config"),
        (AstroConfig(hidden="exact"), {"soft_cap": 0}, ValueError, "soft_cap: 0; must be positive and finite"),
        (AstroConfig(hidden="exact"), {"soft_cap": "2"}, TypeError, "soft_cap: str; expected a number or None"),
    ],
)
def test_what_has_no_cap_says_so(
    config: AstroConfig, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    tokens = draw(300, torch.float32)
    with pytest.raises(error, match=message):
        AstrocyteAttention(HEADS, DIM, config)(*tokens, **{"soft_cap": CAP} | options)


def test_rows_of_softmax_are_capped() -> None:
    query, key, value = draw(12)
    rows = softmax_rows(AttentionCall(query, key, value, {"soft_cap": CAP, "causal": True}))
    torch.testing.assert_close(rows @ value, dense(query, key, value, causal(12))[0])


# Gemma 2


def gemma() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 64, "vocab_size": 99, "head_dim": 8, "query_pre_attn_scalar": 8}
    config = t.Gemma2Config(**sizes, sliding_window=8, attn_logit_softcapping=0.5, attn_implementation="eager")
    model = t.Gemma2ForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight.data *= 20.0
    return model


@torch.no_grad()
def test_the_global_layers_of_gemma_2_have_streaming_memories() -> None:
    model, ids = gemma(), text()["input_ids"]
    before = model(ids, use_cache=False).logits
    report = patch(model, AstroConfig(hidden="streaming", entries=32))
    assert [row.status for row in report.rows] == ["exact", "astrocyte"]
    assert report.rows[0].reason == "soft cap on the attention logits within a sliding window"
    torch.testing.assert_close(model(ids, use_cache=False).logits, before, rtol=1e-4, atol=1e-4)
    cache = model(ids[:, :15]).past_key_values
    torch.testing.assert_close(model(ids[:, 15:], past_key_values=cache).logits, before[:, 15:], rtol=1e-4, atol=1e-4)
    assert not fallbacks(model)
    core = model.model.layers[1].self_attn.astrocyte
    forward = AstrocyteAttention.forward
    core.forward = lambda *args, **options: forward(core, *args, **options | {"soft_cap": None})
    assert not torch.allclose(model(ids, use_cache=False).logits, before, rtol=1e-3, atol=1e-3)
    del core.forward
    patch(model, AstroConfig(hidden="streaming", entries=16))
    longer = model.generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(longer, model.generate(ids, max_new_tokens=20, do_sample=False))
    assert not fallbacks(model)
    unpatch(model)
    assert torch.equal(model(ids, use_cache=False).logits, before)


def test_other_configs_leave_gemma_2_exact_and_say_why() -> None:
    with pytest.raises(ValueError, match=r"soft cap on the attention logits"):
        patch(gemma(), AstroConfig(hidden="random", near=4))
    model = gemma()
    report = patch(model, AstroConfig(hidden="streaming", entries=16))
    assert len(report.patched) == 1
    with pytest.raises(ValueError, match="soft cap"):
        astroattn.patch(model, AstroConfig(hidden="random", near=4), where=[1])
    assert model.model.layers[1].self_attn.astrocyte.config.hidden == "streaming"  # as it was
