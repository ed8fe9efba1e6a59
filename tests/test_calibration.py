"""Calibration: what it measures, what it chooses, and what it promises on inputs that were not used for that."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import astroattn
from astroattn import AstroConfig, AstrocyteAttention, Plan
from astroattn.calibration import calibrate, default_menu, effects, maker, verifying
from astroattn.calibration.choice import Choice
from astroattn.calibration.items import split
from astroattn.config import MIXABLE
from astroattn.fidelity import compare
from astroattn.fidelity.calls import CostMeter, find_astrocytes
from astroattn.fidelity.subject import share_weights

EXACT = AstroConfig(hidden="exact")
MENU = [AstroConfig(num_hidden=m, exact_keys=e, near=1, tile=16) for m, e in ((2, 0), (4, 0), (4, 4), (4, 12), (4, 24))]
TOKENS = 192
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": 99}


def make_bert(cls: type = BertForSequenceClassification, spread: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    return cls(BertConfig(**SIZES, num_labels=4, initializer_range=spread)).eval()


def make_whisper() -> nn.Module:
    torch.manual_seed(0)
    layers = {f"{part}_{what}": size for part in ("encoder", "decoder")
              for what, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 32))}  # fmt: skip
    tokens = {"vocab_size": 9, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(d_model=32, num_mel_bins=16, max_source_positions=160, init_std=0.3, **layers, **tokens)
    return WhisperForConditionalGeneration(config).eval()


def make_batches(items: int = 48, seed: int = 1) -> list[dict[str, Tensor]]:
    """Texts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 99, (items, TOKENS), generator=generator)
    lengths = torch.randint(TOKENS // 2, TOKENS + 1, (items, 1), generator=generator)
    mask = (torch.arange(TOKENS)[None] < lengths).long()
    return [{"input_ids": a, "attention_mask": b} for a, b in zip(ids.split(10), mask.split(10), strict=True)]


def plan_for(model: nn.Module, batches: Any = None, **options: Any) -> Plan:
    return calibrate(
        model, make_batches() if batches is None else batches, **{"menu": MENU, "progress": False} | options
    )


def test_the_effect_of_a_head_is_what_it_does_to_the_output() -> None:
    """To first order: the mean of (v . dy)^2 over v is |dy|^2, and heads are perturbed one at a time."""
    model, config = make_bert(spread=0.15), MENU[4]
    batch = make_batches()[0]
    item = {name: value[:1] for name, value in batch.items()}
    with torch.no_grad():
        expected = model(**item).logits.log_softmax(-1)
    subject = share_weights(model)
    astroattn.patch(subject, AstroConfig())
    measured = effects.measure(subject, item, [config, EXACT], "auto", 0, directions=400)
    assert measured.effect.shape == measured.products.shape == (2, 8)
    for head in range(8):
        heads = [config if number == head % 4 else EXACT for number in range(4)]
        plan = Plan(model="", modules={f"bert.encoder.layer.{head // 4}.attention.self": tuple(heads)})
        with torch.no_grad(), astroattn.patched(model, plan):
            change = (model(**item).logits.log_softmax(-1) - expected).square().sum()
        assert float(measured.effect[0, head]) == pytest.approx(float(change), rel=0.3, abs=1e-9)
    assert not measured.effect[1].any()
    assert torch.equal(measured.products[1], measured.softmax)
    real = int(item["attention_mask"].sum())
    assert float(measured.softmax[0]) == 2 * real**2
    core = AstrocyteAttention(4, 8, config)
    assert float(measured.products[0, 0]) == pytest.approx(real * core.cost(real, real).products)


def test_only_what_the_output_reads_matters() -> None:
    """The last layer of a ViT is read at its class token alone, so elsewhere its errors have no effect."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5).eval()
    astroattn.patch(model, AstroConfig())
    with effects.exact(model), effects.noted(model) as calls, torch.enable_grad():
        logits = model(torch.randn(1, 3, 64, 64))
    found = torch.autograd.grad(logits.sum(), [call.output for call in calls])
    assert found[1][:, :, 0].abs().sum() > 0
    assert not found[1][:, :, 1:].any()
    assert found[0].abs().sum((0, 1, 3)).gt(0).all()


def best(effect: np.ndarray, products: np.ndarray, budget: float) -> float:
    """The least sum of effects within a budget, by trying all mixtures."""
    heads = range(effect.shape[1])
    grid = np.stack(np.meshgrid(*[np.arange(len(effect))] * len(heads), indexing="ij"), -1).reshape(-1, len(heads))
    cost = sum(products[grid[:, head], head] for head in heads)
    sums = sum(effect[grid[:, head], head] for head in heads)
    return float(sums[cost <= budget].min())


@pytest.mark.parametrize("seed", range(5))
def test_the_mixture_is_nearly_the_best_there_is(seed: int) -> None:
    rng = np.random.default_rng(seed)
    products = np.vstack([np.sort(rng.uniform(0.1, 1, (4, 5)), 0), np.ones(5)])
    effect = np.vstack([np.sort(rng.exponential(1, (4, 5)), 0)[::-1] * rng.exponential(1, 5), np.zeros(5)])
    effect[0, 2] = np.inf
    choice, softmax = Choice(effect, products, np.ones(5)), np.ones(5)
    assert np.isfinite(effect[choice.within(choice.least), np.arange(5)]).all()
    for budget in np.linspace(choice.least, 1, 9):
        found = choice.within(float(budget))
        assert choice.cost(found) <= budget + 1e-6
        usable = np.where(np.isfinite(effect), effect, 1e9)
        least = best(usable, products, float(budget) * softmax.sum() + 1e-9)
        assert effect[found, np.arange(5)].sum() <= least + 0.35 * usable.min(0).sum() + 0.6 * np.median(effect[1])
    assert (choice.within(1.0) == 4).all()


@pytest.mark.parametrize("cost", [0.75, 0.9])
def test_a_cost_is_kept_and_the_plan_is_verified_on_other_items(cost: float) -> None:
    model, batches = make_bert(), make_batches()
    plan = plan_for(model, batches, cost=cost)
    assert plan.cost is not None
    assert plan.cost <= cost + 1e-6
    assert list(plan.modules) == [f"bert.encoder.layer.{number}.attention.self" for number in range(2)]
    assert plan.promise is not None
    assert (plan.promise.metric, plan.promise.items, plan.promise.tolerance, plan.promise.kept) == (
        "top1",
        24,
        None,
        None,
    )
    assert 0 < plan.promise.low <= plan.promise.value <= plan.promise.high <= 1
    shares = [share for heads in plan.shares.values() for share in heads]
    assert sum(share.cost_share for share in shares) == pytest.approx(1)
    assert sum(share.error_share for share in shares) == pytest.approx(1)
    result = compare(model, batches, plan, controls=False, progress=False)
    assert result.value("cost") == pytest.approx(plan.cost, rel=0.1)  # on other items, which are of other lengths


def test_more_cost_is_less_error() -> None:
    model, batches = make_bert(), make_batches()
    plans = [plan_for(model, batches, cost=cost) for cost in (0.7, 0.85)]
    errors = [compare(model, batches, plan, controls=False, progress=False).value("logit_error") for plan in plans]
    assert errors[1] < errors[0]
    assert plan_for(model, batches, cost=1).modules == dict.fromkeys(plans[0].modules, (EXACT,) * 4)


def test_a_tolerance_is_kept_on_unseen_items() -> None:
    model = make_bert()
    plan = plan_for(model, make_batches(64), tolerance=0.8)
    assert plan.promise is not None
    assert plan.promise.kept
    assert plan.promise.low >= 0.8
    assert plan.cost is not None
    assert plan.cost < 1
    result = compare(model, make_batches(64, seed=5), plan, controls=False, progress=False)
    assert result.value("top1_agreement") >= 0.8
    assert "asked for: at least 0.8" in str(plan)


@pytest.mark.parametrize(
    ("metric", "tolerance"), [("kl", 0.05), ("cosine", 0.99), ("neighbour", 0.7), ("function", 0.9)]
)
def test_tolerances_on_other_metrics(metric: str, tolerance: float) -> None:
    def keeps_all(patched: Any, original: Any) -> Tensor:
        return 1 / (1 + (patched.logits - original.logits).abs().amax(-1))

    chosen = keeps_all if metric == "function" else metric
    plan = plan_for(make_bert(), tolerance=tolerance, metric=chosen)
    assert plan.promise is not None
    assert plan.promise.metric == ("keeps_all" if metric == "function" else metric)
    assert plan.promise.kept
    falling = metric == "kl"
    assert (plan.promise.high <= tolerance) if falling else (plan.promise.low >= tolerance)
    assert METRIC_WORDS[metric] in str(plan)


METRIC_WORDS = {
    "kl": "in nats is at most",
    "cosine": "embedding is at least",
    "neighbour": "nearest other item is at least",
    "function": "the mean of keeps_all is at least",
}


def test_embeddings_where_there_are_no_logits() -> None:
    plan = plan_for(make_bert(BertModel), cost=0.8)
    assert plan.promise is not None
    assert plan.promise.metric == "cosine"
    with pytest.raises(ValueError, match="metric: 'top1' needs an output that a BertModel does not give"):
        plan_for(make_bert(BertModel), cost=0.8, metric="top1")


def test_recordings_are_compared_frame_by_frame() -> None:
    sound = torch.randn(16, 16, 320, generator=torch.Generator().manual_seed(1))
    batches = [{"input_features": part} for part in sound.split(5)]
    menu = [AstroConfig(num_hidden=2, exact_keys=e, near=2, tile=12) for e in (0, 4, 8)]
    plan = plan_for(make_whisper(), batches, cost=0.9, menu=menu)
    assert all(name.startswith("model.encoder.layers.") for name in plan.modules)
    assert plan.promise is not None
    assert plan.promise.metric == "cosine"
    assert 0.5 < plan.promise.value < 1


def test_the_plan_for_a_tolerance_is_one_whose_cheaper_neighbour_keeps_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cheapest of all that keep it was picked by its luck on the items it was tried on."""
    kept = {}

    def verify(self: maker.Maker, chosen: Any, title: str) -> Any:
        found = original(self, chosen, title)
        kept[round(self._choice.cost(chosen), 9)] = found[0].kept
        return found

    original = maker.Maker._verify
    monkeypatch.setattr(maker.Maker, "_verify", verify)
    plan = plan_for(make_bert(), make_batches(64), tolerance=0.8)
    assert plan.cost is not None
    assert plan.cost < 1
    assert sorted(cost for cost, keeps in kept.items() if keeps).index(round(plan.cost, 9)) == 1


def test_a_promise_that_only_the_original_keeps_is_said_to_be_one() -> None:
    def equal(patched: Any, original: Any) -> Tensor:
        return (patched.logits - original.logits).abs().amax(-1) < 1e-5

    plan = plan_for(make_bert(), tolerance=0.9, metric=equal, menu=MENU[:2])
    assert plan.cost == 1
    assert set(plan.modules.values()) == {(EXACT,) * 4}
    assert plan.notes[0] == "only exact attention keeps this tolerance, so the plan saves nothing"
    assert "the tolerance is not kept: at least 0.0000" in plan.notes[1]


@pytest.mark.parametrize("patched", [False, True])
def test_the_model_is_not_touched(patched: bool) -> None:
    model = make_bert().train()
    if patched:
        astroattn.patch(model, AstroConfig(exact_keys=4), where=[1])
    cores, weights = list(find_astrocytes(model).values()), copy.deepcopy(model.state_dict())
    plan_for(model, cost=0.8)
    assert model.training
    assert list(find_astrocytes(model).values()) == cores
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())


def test_a_seed_gives_one_plan() -> None:
    model = make_bert()
    first, again = (plan_for(model, cost=0.8, seed=3) for _ in range(2))
    assert first == again
    assert first.provenance["seed"] == 3
    assert {"choosing_items": 24, "verifying_items": 24}.items() <= first.provenance.items()
    assert plan_for(model, cost=0.8, seed=4) != first
    for weight in model.parameters():  # without gradients of the weights it is the same
        weight.requires_grad_(False)
    assert plan_for(model, cost=0.8, seed=3) == first


class Interruption(KeyboardInterrupt):
    """As by a person."""


def test_an_interrupted_calibration_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = make_bert(), tmp_path / "state.safetensors"
    expected = plan_for(model, cost=0.8)
    astroattn.patch(model, AstroConfig(exact_keys=4))
    cores = list(find_astrocytes(model).values())
    measure, calls = effects.measure, []

    def stop_at(limit: int) -> None:
        def counted(*args: Any, **options: Any) -> Any:
            if len(calls) == limit:
                raise Interruption
            calls.append(1)
            return measure(*args, **options)

        monkeypatch.setattr("astroattn.calibration.planning.measure", counted)

    stop_at(5)
    with pytest.raises(Interruption):
        plan_for(model, cost=0.8, state=path)
    assert list(find_astrocytes(model).values()) == cores
    assert load_file(path)["effect"].shape == (5, 6, 8)
    stop_at(-1)
    assert plan_for(model, cost=0.8, state=path) == expected
    assert len(calls) == 24
    assert plan_for(model, tolerance=0.5, state=path).promise is not None  # another wish, the same measurements
    assert len(calls) == 24
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_state_that_does_not_belong(tmp_path: Path) -> None:
    model, path = make_bert(), tmp_path / "state.safetensors"
    plan_for(model, cost=0.8, state=path)
    other = make_bert()
    with torch.no_grad():
        other.classifier.weight.add_(1)
    changes = [
        (other, {}, "weights"),
        (model, {"menu": MENU[:3]}, "menu"),
        (model, {"seed": 1}, "batches"),
        (model, {"batches": make_batches(seed=9)}, "batches"),
        (model, {"where": [0]}, "modules"),
        (make_bert(BertModel), {}, "model"),
    ]
    for changed, options, name in changes:
        with pytest.raises(ValueError, match=rf"state: .*made with another {name}"):
            plan_for(changed, cost=0.8, state=path, **options)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a state of calibrate"):
        plan_for(model, cost=0.8, state=path)
    with pytest.raises(ValueError, match="state: there is no folder"):
        plan_for(model, cost=0.8, state=tmp_path / "no" / "such")


def test_too_little_data_is_an_error_that_says_how_much_is_needed() -> None:
    with pytest.raises(ValueError, match=r"36 items are left .* 0.99 for 'top1' at 90% .* at least 230, so 259 in all"):
        plan_for(make_bert(), tolerance=0.99)
    with pytest.raises(ValueError, match=r"6 items are left .* at least 8, so 11 in all"):
        plan_for(make_bert(), make_batches(8), tolerance=0.5, metric="cosine")
    with pytest.raises(ValueError, match="batches: 3 items; needs at least 4"):
        plan_for(make_bert(), make_batches(3), cost=0.8)
    with pytest.raises(ValueError, match="batches: 0 items"):
        plan_for(make_bert(), [], cost=0.8)


def test_enough_data_is_what_the_error_says() -> None:
    for length in (1, 17, 96, 1000, 5000):
        found = split([torch.zeros(300, 1)], length, 0)
        least = 230
        total = least + min(found.wanted, -(-least // 3))
        assert split([torch.zeros(total, 1)], length, 0).verifying >= least
        assert split([torch.zeros(total - 2, 1)], length, 0).verifying < least


def test_items_choose_or_verify() -> None:
    batches = [torch.arange(50)[:, None], torch.arange(50, 57)[:, None]]
    parts = split(batches, 300, 0)
    assert len(parts.choosing) == 13
    assert sum(parts.tokens) == 3900
    both = torch.cat([*parts.choosing, *parts.unseen]).flatten()
    assert torch.equal(both.sort().values, torch.arange(57))
    assert len(split(batches, 2000, 0).choosing) == 8
    assert len(split(batches, 1, 0).choosing) == 14
    assert len(split(batches, 1, 0, 2).choosing) == 28


def test_a_plan_costs_no_more_on_items_that_did_not_choose_it() -> None:
    """Mixed texts ask for more exact keys than those of two words, which choose here."""
    torch.manual_seed(0)
    config = BertConfig(**SIZES | {"max_position_embeddings": 300}, num_labels=4, initializer_range=0.4)
    bert, ids = BertForSequenceClassification(config).eval(), torch.randint(5, 99, (8, 300))
    choosing = torch.cat([item["input_ids"] for item in split([{"input_ids": ids}], 300, 0, 2).choosing])
    chooses = (ids[:, None] == choosing).all(-1).any(1)
    ids[chooses] = torch.randint(5, 7, (4, 300))
    menu = [AstroConfig(num_hidden=8, exact_keys=150, key_error=error) for error in (0.3, 0.2, 0.1, 0.05, 0.02, 0.01)]
    plan = plan_for(bert, [{"input_ids": ids}], cost=0.6, menu=menu)
    with astroattn.patched(bert, plan), torch.no_grad():
        meter = CostMeter(bert)
        with meter.watch():
            bert(ids[~chooses])
        meter.add(None)
    found = meter.totals()["cost"]
    assert found <= 0.6 * 1.005
    assert plan.cost is not None
    assert plan.cost < found - 0.005  # or there was nothing to show
    assert not plan.notes


def test_half_of_a_few_items_choose_where_no_tolerance_is_verified() -> None:
    bert, batches = make_bert(), make_batches(12)
    for wish, choosing in (({"cost": 0.8}, 6), ({"tolerance": 1.0, "metric": "kl"}, 3)):
        assert plan_for(bert, batches, **wish).provenance["choosing_items"] == choosing


class Opaque(nn.Module):
    """A model whose output has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_bert()

    def forward(self, **inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return self.inner(**inputs).logits


def test_a_model_without_gradient_is_said_to_have_none(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    plan = plan_for(Opaque(), cost=0.8, state=path)
    assert plan.notes[0].startswith("the model has no gradient (")
    assert plan_for(Opaque(), cost=0.8, state=path) == plan


def test_an_original_that_is_not_finite() -> None:
    model = make_bert()
    with torch.no_grad():
        model.classifier.bias[0] = torch.nan
    with pytest.raises(ValueError, match="the original itself puts out NaN or infinity"):
        plan_for(model, cost=0.8)


def test_bounds_are_those_of_clopper_and_pearson() -> None:
    verifier = verifying.Verifier(make_bert(), make_batches(), "top1", 0.9, "auto", 0, progress=False)
    assert verifier._promise(np.ones(230)).low == pytest.approx(0.1 ** (1 / 230))
    some = verifier._promise(np.array([1.0] * 45 + [0.0] * 5))
    assert (some.value, some.low, some.high) == pytest.approx((0.9, 0.8221, 0.9502), abs=1e-3)


@pytest.mark.parametrize("metric", ["top1", "neighbour"])
def test_a_plan_that_changes_too_much_is_not_run_to_the_end(metric: str) -> None:
    """One of 48 items may change at a tolerance of 0.9: the lower bound of 47/48 is 0.921, that of 46/48 0.893."""
    assert verifying._most_changed(48, 0.9) == 1
    assert verifying._most_changed(229, 0.99) == -1
    model, other = make_bert(), make_bert(spread=0.6)
    verifier = verifying.Verifier(model, make_batches(), metric, 0.9, "auto", 0, progress=False)
    kept, lost = verifier.verify(model, ""), verifier.verify(other, "")
    assert (kept.value, kept.items, kept.kept) == (1, 48, True)
    assert lost.items < 48
    assert not lost.kept


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "tolerance, cost, entries: give exactly one"),
        ({"cost": 0.5, "tolerance": 0.9}, ValueError, "tolerance, cost, entries: give exactly one"),
        ({"cost": 0}, ValueError, "cost: 0; must be above 0 and at most 1"),
        ({"cost": 1.5}, ValueError, "cost: 1.5; must be"),
        ({"cost": "1"}, TypeError, "cost: str; expected a number"),
        ({"cost": 0.1}, ValueError, "cost: 0.1; the least that this menu has here is 0"),
        ({"tolerance": 1}, ValueError, "tolerance: 1; must be above 0 and below 1"),
        ({"tolerance": True}, TypeError, "tolerance: bool"),
        ({"tolerance": 0.0, "metric": "kl"}, ValueError, "tolerance: 0; must be above 0"),
        ({"tolerance": 0.9, "metric": "f1"}, ValueError, "metric: 'f1'; must be one of auto, top1, kl, cosine"),
        ({"cost": 0.8, "pooling": "max"}, ValueError, "pooling: must be one of"),
        ({"cost": 0.8, "menu": [3]}, TypeError, r"menu\[0\]: int"),
        ({"cost": 0.8, "menu": [AstroConfig(hidden="random")]}, ValueError, r"menu\[0\]: hidden='random' has"),
        ({"cost": 0.8, "where": [7]}, ValueError, "where: index 7"),
        ({"cost": 0.8, "metric": lambda a, b: 2 * a.logits[:, 0] ** 0}, ValueError, r"metric: .* one in \[0, 1\] for"),
    ],
)
def test_arguments_that_do_not_fit(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = make_bert()
    with pytest.raises(error, match=message):
        plan_for(model, **options)
    assert not find_astrocytes(model)


def test_batches_are_read_once() -> None:
    def stream() -> Iterator[dict[str, Tensor]]:
        yield from make_batches()

    assert plan_for(make_bert(), stream(), cost=0.8) == plan_for(make_bert(), cost=0.8)


@pytest.mark.parametrize("tokens", [17, 197, 512, 4097])
def test_the_default_menu_can_be_mixed(tokens: int) -> None:
    menu = default_menu(tokens)
    assert menu[-1] == EXACT
    assert len(set(menu)) == len(menu)
    assert {config.hidden for config in menu} <= set(MIXABLE)
    costs = [AstrocyteAttention(1, 64, config).cost(tokens, tokens).ratio for config in menu]
    assert min(costs) <= 1
