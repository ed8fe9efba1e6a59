"""Plans: one config per head, as a file and in a model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import astroattn
from astroattn import AstroConfig, AstrocyteAttention, Plan
from astroattn.fidelity import compare, control_configs
from astroattn.fidelity.calls import find_astrocytes
from astroattn.plan import HeadShare, Promise

KEYS = AstroConfig(exact_keys=4, num_hidden=4)
NEAR = AstroConfig(hidden="none", near=8)
EXACT = AstroConfig(hidden="exact")
HEADS = (KEYS, EXACT, KEYS, NEAR)
NAMES = [f"encoder.layer.{number}.attention.self" for number in range(3)]
IDS = torch.arange(80).reshape(2, 40) + 7


def make_bert() -> BertModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 32}
    return BertModel(BertConfig(vocab_size=99, **sizes)).eval()


def make_vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5).eval()


def make_plan(**changes: Any) -> Plan:
    shares = {
        NAMES[0]: tuple(HeadShare(0.1 * n, 0.2, 0.1) for n in range(4)),
        NAMES[2]: (HeadShare(1, 0.05, 0.15),) * 4,
    }
    promise = Promise(metric="cosine", tolerance=0.9, value=0.97, low=0.95, high=0.99, level=0.9, items=30)
    fields = {
        "model": "BertModel",
        "modules": {NAMES[0]: HEADS, NAMES[2]: (KEYS,) * 4},
        "shares": shares,
        "cost": 0.4,
        "promise": promise,
        "provenance": {"seed": 3, "versions": {"torch": "2"}},
        "notes": ("one",),
    }
    return Plan(**fields | changes)


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    return model(IDS).last_hidden_state


def attention_input(tokens: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = torch.randn(3, 2, 4, tokens, 8).unbind(0)
    return query, key, value


@pytest.mark.parametrize(
    "options",
    [{}, {"scale": 0.7}, {"grid": (7, 7)}, {"key_mask": torch.arange(50)[None] < torch.tensor([[50], [33]])}],
    ids=["plain", "scale", "grid", "padding"],
)
def test_each_head_does_what_a_module_of_its_own_would(options: dict[str, Any]) -> None:
    mixed = AstrocyteAttention(4, 8, HEADS)
    query, key, value = attention_input()
    out, normaliser = mixed.with_normaliser(query, key, value, **options)
    assert torch.equal(mixed(query, key, value, **options), out)
    for head, config in enumerate(HEADS):
        mine = (x[:, head : head + 1] for x in (query, key, value))
        alone, log_p = AstrocyteAttention(1, 8, config).with_normaliser(*mine, **options)
        torch.testing.assert_close(out[:, head : head + 1], alone)
        torch.testing.assert_close(normaliser[:, head : head + 1], log_p)


def test_heads_that_are_alike_run_together() -> None:
    alike = AstrocyteAttention(4, 8, [KEYS] * 4)
    assert alike.config == KEYS
    assert not dict(alike.named_buffers())
    inputs = attention_input()
    assert torch.equal(alike(*inputs), AstrocyteAttention(4, 8, KEYS)(*inputs))
    assert "heads" not in alike.extra_repr().replace("num_heads", "")


def test_a_module_of_different_heads() -> None:
    mixed = AstrocyteAttention(4, 8, HEADS)
    assert mixed.config == mixed.configs == HEADS
    assert not mixed.state_dict()
    assert "heads [0, 2]: AstroConfig(hidden='hebbian'" in repr(mixed)
    costs = [AstrocyteAttention(1, 8, config).cost(200, 200) for config in HEADS]
    assert mixed.cost(200, 200).products == pytest.approx(sum(cost.products for cost in costs) / 4)
    assert mixed.cost(200, 200).positions == pytest.approx(sum(cost.positions for cost in costs) / 4)
    assert "static layer" in (mixed.refusal(causal=True) or "")
    inputs = attention_input()
    with pytest.raises(ValueError, match="causal: True with this config"):
        mixed(*inputs, causal=True)
    with pytest.raises(ValueError, match="decode: this module has no causal state; causal attention needs"):
        mixed.decode(*inputs)
    with pytest.raises(ValueError, match="decode: this module has no causal state; it is softmax attention"):
        AstrocyteAttention(4, 8, EXACT).decode(*inputs)
    mixed.exact = True
    assert torch.equal(mixed(*inputs), torch.nn.functional.scaled_dot_product_attention(*inputs))


def test_exact_heads_are_softmax_attention_of_any_lengths() -> None:
    query, key, value = attention_input()
    attention = AstrocyteAttention(4, 8, EXACT)
    expected = torch.nn.functional.scaled_dot_product_attention(query[:, :, -3:], key, value)
    torch.testing.assert_close(attention(query[:, :, -3:], key, value), expected)
    causal = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(attention(query, key, value, causal=True), causal)
    assert attention.cost(50, 50).ratio == 1


def test_different_heads_compile_and_have_gradients() -> None:
    mixed = AstrocyteAttention(4, 8, HEADS)
    inputs = [x.requires_grad_() for x in attention_input()]
    expected = mixed(*inputs)
    torch.testing.assert_close(torch.compile(mixed, fullgraph=True, backend="eager")(*inputs), expected)
    gradients = torch.autograd.grad(expected.square().sum(), inputs)
    assert all(each.isfinite().all() and each.abs().sum(-1).gt(0).all() for each in gradients)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ([KEYS] * 3, ValueError, "config: 3 of them; this module has num_heads=4"),
        ([], ValueError, "config: no heads"),
        ([KEYS, EXACT, KEYS, AstroConfig(hidden="random")], ValueError, "heads that differ must be of hebbian, none"),
        ([KEYS, EXACT, KEYS, 3], TypeError, "config: int for head 3; expected AstroConfig"),
        ({"near": 3}, TypeError, "config: dict; expected AstroConfig or one per head"),
    ],
)
def test_configs_that_no_module_can_have(config: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AstrocyteAttention(4, 8, config)


def test_a_plan_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for plan in (make_plan(), make_plan(shares={}, promise=None, cost=None)):
        plan.save(path)
        assert Plan.load(path) == plan
    configs = json.loads(path.read_text())["configs"]
    assert len(configs) == 3  # every one once


def test_a_plan_says_what_every_head_does() -> None:
    text = str(make_plan())
    assert "plan for BertModel: 2 modules, 8 heads, 40.0% of softmax's products" in text
    lines = text.splitlines()
    first = next(line for line in lines if line.startswith(NAMES[0]))
    assert first.split() == [NAMES[0], "a", "0,2", "10.0%", "40.0%", "20.0%"]
    assert "b: softmax attention itself (1 head)" in lines
    assert "a: num_hidden=4, exact_keys=4 (6 heads)" in lines
    assert "is at least 0.9500 with 90% confidence (0.9700 on 30 unseen items); asked for: at least 0.9" in text
    assert lines[-1] == "note: one"
    assert "of all cost" not in str(make_plan(shares={}))


def damage(table: dict[str, Any], path: str, value: Any) -> None:
    """Set one value deep in a table; None removes it."""
    *parents, last = path.split(".")
    for name in parents:
        table = table[int(name)] if isinstance(table, list) else table[name]
    if value is None:
        del table[last]
    else:
        table[int(last) if isinstance(table, list) else last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", 9, "format: 9; this version of astroattn reads 1"),
        ("model", None, "model: is missing"),
        ("cost", "1", "cost: '1'; must be float or int or null"),
        ("cost", float("nan"), "cost: nan; must be"),
        ("speed", 3, "speed: is not known; there are format, model"),
        ("modules", [], "modules: none; a plan needs"),
        ("modules.0", 3, r"modules\[0\]: is not a table"),
        ("modules.1.name", NAMES[0], "modules: two of them have one name"),
        ("modules.0.heads", [0, 1, 7, 0], r"modules\[0\].heads: 7; must be numbers of configs, 0 to 2"),
        ("modules.0.heads", [0, True, 0, 0], r"modules\[0\].heads: True"),
        ("modules.0.heads", [], r"modules\[0\].heads: nothing"),
        ("modules.0.cost", [0.1], r"modules\[0\].cost: 1 values; must be 4 numbers"),
        ("modules.0.error_share", [0, 0, 0, -1], r"modules\[0\].error_share: -1; must be 4 numbers"),
        ("modules.0.cost", None, r"modules\[0\].cost: is missing"),
        ("configs.0", 3, r"configs\[0\]: is not a table"),
        ("configs.0.num_hidden", 0, r"configs\[0\]: is not a config: num_hidden: 0"),
        ("configs.0.temperature", 1, r"configs\[0\]: is not a config: .*temperature"),
        ("configs.1.hidden", "random", "modules: 'encoder.layer.0.attention.self': config: heads that differ"),
        ("promise.low", None, "promise.low: is missing"),
        ("promise.items", 2.5, "promise.items: 2.5; must be int"),
        ("promise", 3, "promise: 3; must be dict or null"),
    ],
)
def test_what_is_wrong_with_a_plan_is_named(path: str, value: Any, message: str, tmp_path: Path) -> None:
    table = make_plan().to_dict()
    damage(table, path, value)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=rf"^plan: .*plan\.json': {message}"):
        Plan.load(file)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot read it"), ("{", "is not JSON"), ("[1]", "the file: is")]
)
def test_a_file_that_is_no_plan(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=rf"^plan: .*plan\.json': {message}"):
        Plan.load(file)


def test_patching_with_a_plan() -> None:
    model, plan = make_bert(), make_plan()
    expected = run(model)
    report = astroattn.patch(model, plan)
    assert [core.configs for core in find_astrocytes(model).values()] == [HEADS, (KEYS,) * 4]
    assert [row.kinds for row in report.patched] == [3, 1]
    assert [row.reason for row in report.exact] == ["not in the plan"]
    assert "its heads have 3 configs" in str(report)
    before, cores = run(model), list(find_astrocytes(model).values())
    assert not torch.equal(before, expected)
    astroattn.patch(model, plan)
    assert list(find_astrocytes(model).values()) == cores  # nothing was done again
    assert torch.equal(run(copy.deepcopy(model)), before)
    astroattn.unpatch(model)
    assert torch.equal(run(model), expected)


def test_a_plan_leaves_the_other_modules_exact() -> None:
    model, plan = make_bert(), make_plan()
    astroattn.patch(model, KEYS)
    astroattn.patch(model, plan, where=[0, 1])
    found = find_astrocytes(model)
    assert {name.removesuffix(".astrocyte"): core.configs for name, core in found.items()} == {
        NAMES[0]: HEADS,
        NAMES[2]: (KEYS,) * 4,  # not selected, so as it was
    }
    with astroattn.patched(model, plan) as report:
        assert [row.name for row in report.patched] == [NAMES[0], NAMES[2]]
    assert find_astrocytes(model).keys() == found.keys()


def test_a_plan_of_exact_heads_is_the_original() -> None:
    model = make_bert()
    expected = run(model)
    astroattn.patch(model, Plan(model="BertModel", modules=dict.fromkeys(NAMES, (EXACT,) * 4)))
    torch.testing.assert_close(run(model), expected)


def test_a_plan_for_a_vision_model() -> None:
    model = make_vit()
    image = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    plan = Plan(model="AnyName", modules={"blocks.1.attn": (AstroConfig(num_hidden=2, exact_keys=2), EXACT, NEAR)})
    astroattn.patch(model, plan)
    assert model(image).isfinite().all()


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (
            {"encoder.layer.9.attention.self": HEADS},
            "BertModel has no attention module 'encoder.layer.9.attention.self'",
        ),
        ({NAMES[0]: HEADS[:3]}, "'encoder.layer.0.attention.self' has 4 heads; the plan has configs for 3"),
    ],
)
@pytest.mark.parametrize("patched", [False, True])
def test_a_plan_that_does_not_fit_changes_nothing(modules: dict[str, Any], message: str, patched: bool) -> None:
    model = make_bert()
    if patched:
        astroattn.patch(model, KEYS, where=[0])
    before, cores = run(model), list(find_astrocytes(model).values())
    with pytest.raises(ValueError, match=message):
        astroattn.patch(model, Plan(model="BertModel", modules={NAMES[1]: (KEYS,) * 4} | modules))
    assert list(find_astrocytes(model).values()) == cores
    assert torch.equal(run(model), before)


def test_a_plan_for_a_module_that_stays_exact_here() -> None:
    model = make_vit()
    attention = model.blocks[1].attn
    attention.forward = attention.forward
    with pytest.raises(ValueError, match=r"plan: 'blocks.1.attn' cannot be patched here: its forward was replaced"):
        astroattn.patch(model, Plan(model="m", modules={f"blocks.{n}.attn": (KEYS, EXACT, KEYS) for n in range(2)}))
    assert not find_astrocytes(model)


def test_compare_shows_the_controls_beside_a_plan() -> None:
    plan = make_plan()
    result = compare(make_bert(), [IDS], plan, progress=False)
    controls = ["uniform", "near alone", "random", "window, same budget", "exact keys, same budget"]
    assert list(result.rows) == ["original", "patched", *controls]
    assert result.rows["patched"].config == plan.to_dict()
    assert result.value("embedding_cosine") > result.value("embedding_cosine", "uniform")
    assert "1 attention modules are exact" in result.notes[0]
    costs = {name: result.value("keys", name) for name in ("patched", "near alone")}
    assert costs["patched"] == costs["near alone"]
    json.dumps(result.to_dict())


def test_the_controls_of_a_plan_are_those_of_its_widest_heads() -> None:
    controls = control_configs(make_plan())
    assert controls["random"].num_hidden == max(head.num_hidden for head in (KEYS, NEAR))
    assert controls["near alone"].near == NEAR.near
    assert "near alone" not in control_configs(Plan(model="m", modules={"a": (EXACT,)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules": {}}, "modules: none"),
        ({"modules": {"a": (KEYS, AstroConfig(hidden="learned"))}}, "modules: 'a': config: heads that differ"),
        ({"shares": {NAMES[0]: (HeadShare(1, 1, 1),)}}, "shares: must have the modules and heads of the plan"),
    ],
)
def test_plans_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(**change)
