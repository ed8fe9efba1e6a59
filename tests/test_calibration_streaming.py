"""Calibration of streaming memories: budgets of key heads for a size of the memory or a tolerance in nats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import astroattn
from astroattn import AstroConfig, Plan, calibrate
from astroattn.calibration import effects
from astroattn.calibration.menu import check_streaming_menu, streaming_menu
from astroattn.fidelity.calls import find_astrocytes
from astroattn.patching.streaming import load_memory, save_memory

TOKENS = 64


def make_llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.35, bos_token_id=1)).eval()


def make_batches(items: int = 16) -> list[dict[str, Tensor]]:
    ids = torch.randint(2, 40, (items, TOKENS), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": part} for part in ids.split(8)]


def plan_for(model: nn.Module, **options: Any) -> Plan:
    return calibrate(model, make_batches(), progress=False, **options)


def divergence(model: nn.Module, plan: Plan | AstroConfig) -> float:
    """KL to the original's predictions per token, on texts that are not those of `make_batches`."""
    ids = torch.randint(2, 40, (4, TOKENS), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        theirs = model(ids).logits.log_softmax(-1)
        with astroattn.patched(model, plan):
            ours = model(ids).logits.log_softmax(-1)
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def test_the_effects_of_tokens_are_their_kl_divergence() -> None:
    """The sum over one module's heads at once cannot be had from heads one by one; so one module with one key head."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 20}
    config = LlamaConfig(**sizes, num_attention_heads=1, num_key_value_heads=1, initializer_range=0.3)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 20, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    small = AstroConfig(hidden="streaming", entries=40)
    with torch.no_grad():
        theirs = model(ids).logits.log_softmax(-1)
        with astroattn.patched(model, small):
            ours = model(ids).logits.log_softmax(-1)
    expected = float((theirs.exp() * (theirs - ours)).sum())
    astroattn.patch(model, small)
    measured = effects.measure(model, {"input_ids": ids}, [small], "auto", 0, directions=100)
    assert float(measured.effect[0, 0]) / 2 == pytest.approx(expected, rel=0.3)
    assert expected > 0


def test_a_plan_gives_key_heads_budgets_of_their_own_and_beats_one_for_all() -> None:
    model = make_llama()
    plan = plan_for(model, entries=44)
    assert plan.entries is not None
    assert 36 <= plan.entries <= 44
    assert len({config.entries for heads in plan.modules.values() for config in heads}) > 1
    for heads in plan.modules.values():
        assert heads[0] == heads[1]  # which read one key head
        assert heads[2] == heads[3]
    assert plan.promise is not None
    assert plan.promise.metric == "kl"
    assert not find_astrocytes(model)  # it was not touched
    assert divergence(model, plan) < divergence(model, AstroConfig(hidden="streaming", entries=40))
    assert "entries in the mean" in str(plan)


def test_a_tolerance_in_nats() -> None:
    model = make_llama()
    plan = plan_for(model, tolerance=0.05)
    assert plan.promise is not None
    assert plan.promise.kept
    assert plan.promise.high <= 0.05
    assert plan.entries is not None
    assert plan.entries < TOKENS
    assert divergence(model, plan) < 0.05
    whole = plan_for(model, tolerance=1e-9)
    assert {config.entries for heads in whole.modules.values() for config in heads} == {64}
    assert any("memories of whole texts" in note for note in whole.notes)


def test_a_model_with_a_plan_generates_and_its_memory_goes_on(tmp_path: Path) -> None:
    model = make_llama()
    names = ("model.layers.0.self_attn", "model.layers.1.self_attn")
    budgets = ((64, 32), (32, 32))
    modules = {
        name: tuple(AstroConfig(hidden="streaming", entries=entries) for entries in mine for _ in range(2))
        for name, mine in zip(names, budgets, strict=True)
    }
    plan = Plan(model="LlamaForCausalLM", modules=modules)
    plan.save(tmp_path / "plan.json")
    astroattn.patch(model, Plan.load(tmp_path / "plan.json"))
    ids = torch.randint(2, 40, (2, 70), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, 60:]
        cache = model(ids[:, :60]).past_key_values
        save_memory(cache, tmp_path / "memory.safetensors")
        for again in (cache, load_memory(tmp_path / "memory.safetensors")):
            torch.testing.assert_close(model(ids[:, 60:], past_key_values=again).logits, expected)
        for layer, mine in zip(cache.layers, budgets, strict=True):
            memories = layer.memory if isinstance(layer.memory[0], tuple) else (layer.memory,)
            sizes = [memory.key.shape[2] for memory in memories]
            assert all(size <= most for size, most in zip(sizes, sorted(set(mine), reverse=True), strict=True))
        beams = model.generate(ids[:, :50], num_beams=3, max_new_tokens=30, do_sample=False)
        alone = model.generate(ids[1:, :50], num_beams=3, max_new_tokens=30, do_sample=False)
        padded, mask = torch.cat([ids[:, :50], ids[:, :50]]), torch.ones(4, 50, dtype=torch.long)
        mask[2:, :7] = 0
        out = model.generate(padded, attention_mask=mask, max_new_tokens=20, do_sample=False)
        short = model.generate(ids[:, 7:50], max_new_tokens=20, do_sample=False)
    assert torch.equal(beams[1:], alone)
    assert torch.equal(out[2:, 50:], short[:, 43:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"entries": 8}, "entries: 8; a streaming memory has at least 16"),
        ({"entries": 500}, "entries: 500; this menu has 16 to 64 here"),
        ({"cost": 0.5}, "cost: of products; a streaming memory has a number of entries"),
        ({"entries": 64, "menu": [AstroConfig()]}, "entries: 64, but menu has no streaming memory"),
        ({"entries": 64, "menu": [AstroConfig(hidden="streaming"), AstroConfig()]}, "these texts have at most 64"),
        ({"entries": 64, "tolerance": 0.1}, "tolerance, cost, entries: give exactly one"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_for(make_llama(), **options)


def test_an_encoder_has_no_streaming_memory() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 40}
    model = BertModel(BertConfig(**sizes, num_attention_heads=2)).eval()
    with pytest.raises(ValueError, match="none of the selected attention modules"):
        plan_for(model, entries=64)


@pytest.mark.parametrize("tokens", [1, 32, 33, 5000])
def test_a_menu_ends_with_a_memory_of_whole_texts(tokens: int) -> None:
    menu = streaming_menu(tokens)
    assert menu == check_streaming_menu(menu, tokens)
    assert menu[-1].entries >= tokens
    assert all(config.entries < tokens for config in menu[:-1])
