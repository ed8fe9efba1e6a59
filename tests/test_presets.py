"""The words that stand for a config: what each is, where they are taken, and that a wrong one is told."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from scripts import run
from transformers import BertConfig, BertModel

import astroattn
from astroattn import PRESETS, AstroConfig, AstrocyteAttention
from astroattn.config import BY_LENGTH, HALF_BY_LENGTH, Preset
from astroattn.cost import count_cost
from astroattn.fidelity import compare
from astroattn.fidelity.calls import find_astrocytes
from astroattn.ops.layout import Budget
from astroattn.ops.noting import ExactKeys, listening
from eval import presets

DOCS = Path(__file__).parent.parent / "docs"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def make_bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=99, max_position_embeddings=600, initializer_range=0.3, **SIZES)).eval()


def test_the_words() -> None:
    assert tuple(PRESETS) == get_args(Preset)
    assert PRESETS["balanced"] == AstroConfig()
    with pytest.raises(TypeError):
        PRESETS["fast"] = AstroConfig()  # type: ignore[index]


@pytest.mark.parametrize("tokens", [512, 785, 1500])
@pytest.mark.parametrize("dim", [32, 64])
def test_they_are_a_dial(tokens: int, dim: int) -> None:
    """On inputs whose queries ask for a few of some tens of clusters of keys, as their inputs decide what they cost."""
    torch.manual_seed(0)
    centres = torch.randn(2, 40, dim)
    query, key = (2 * x[:, torch.randint(40, (tokens,))] + torch.randn(2, tokens, dim) for x in (centres, centres))
    value, costs, errors = torch.randn(1, 2, tokens, dim), [], []
    truth = torch.nn.functional.scaled_dot_product_attention(query[None], key[None], value)
    for config in PRESETS.values():
        module, told = AstrocyteAttention(2, dim, config), list[ExactKeys]()
        with listening(told.append):
            out = module(query[None], key[None], value)
        errors.append(float((out - truth).norm()))
        costs.append(module.cost(tokens, tokens, exact_keys={config: float(told[0].numbers().mean())}).ratio)
    assert costs[0] < costs[1] < costs[2]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("tokens", [512, 785, 1500, 4097, 8192])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_none_costs_more_than_softmax_whatever_the_inputs(tokens: int, dim: int) -> None:
    assert all(count_cost(each, dim, tokens, tokens, False, None).ratio < 1 for each in PRESETS.values())


def test_short_sequences_are_softmax_in_all_of_them() -> None:
    query, key, value = torch.randn(3, 1, 2, 256, 16)
    truth = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    errors = [(AstrocyteAttention(2, 16, config)(query, key, value) - truth).norm() for config in PRESETS.values()]
    assert errors[0] > errors[1] > 1e-3 > 1e-6 > errors[2]
    short = slice(0, 128)
    for config in PRESETS.values():
        assert count_cost(config, 16, 128, 128, False, None).ratio == 1
        mine = AstrocyteAttention(2, 16, config)(query[:, :, short], key[:, :, short], value[:, :, short])
        softmax = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, short], key[:, :, short], value[:, :, short]
        )
        torch.testing.assert_close(mine, softmax)


@pytest.mark.parametrize(("tokens", "dim"), [(129, 64), (197, 64), (512, 32), (785, 64), (5000, 64), (50_000, 64)])
def test_half_by_length(tokens: int, dim: int) -> None:
    def at(number: int) -> tuple[int, int]:
        layout = Budget(None, 0, BY_LENGTH, True, 0, number, number, 2).at(tokens, dim)
        return layout.exact_keys, layout.num_hidden

    (keys, neurons), (half_keys, half_neurons) = at(BY_LENGTH), at(HALF_BY_LENGTH)
    assert half_keys == keys // 2
    assert half_neurons % 8 == 0
    assert abs(half_neurons - neurons / 2) <= 6


@pytest.mark.parametrize("word", PRESETS)
def test_a_word_is_its_config_wherever_it_is_taken(word: Preset) -> None:
    model, config = make_bert(), PRESETS[word]

    def found() -> set[Any]:
        return {core.config for core in find_astrocytes(model).values()}

    with astroattn.patched(model, word) as report:
        assert found() == {config}
        assert len(report.patched) == 2
    astroattn.patch(model, word, [1])
    assert found() == {config}
    astroattn.unpatch(model)
    batch = {"input_ids": torch.randint(0, 99, (2, 300))}
    result = compare(model, [batch], word, diagnose=0, controls=False, progress=False)
    assert result.rows["patched"].config == dataclasses.asdict(config)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ("fats", ValueError, r"config: 'fats'; must be one of fast, balanced, exact; did you mean 'fast'\?"),
        ("Balanced", ValueError, r".*did you mean 'balanced'\?"),
        ("", ValueError, "config: ''; must be one of fast, balanced, exact"),
        (3, TypeError, "config: expected an AstroConfig, a Plan, a word or None, got int"),
    ],
)
def test_another_word_is_one_error_and_changes_nothing(given: Any, kind: type[Exception], message: str) -> None:
    model = make_bert()
    for call in (astroattn.patch, lambda model, word: compare(model, [], word)):
        with pytest.raises(kind, match=f"^{message}$"):
            call(model, given)
    assert not find_astrocytes(model)


def test_docs_have_what_was_measured(tmp_path: Path) -> None:
    choose = (DOCS / "choose.md").read_text("utf-8")
    rows = json.loads((DOCS / "results" / "presets.json").read_text("utf-8"))["rows"]
    assert presets.format_markdown(rows) in choose
    for model in {row["model"] for row in rows}:
        fast, balanced, exact = (row for row in rows if row["model"] == model)
        assert fast["error"] >= balanced["error"] >= exact["error"]
        assert fast["cost"] < balanced["cost"]
    told = dict(re.findall(r'^\| "(\w+)" \| `(.*?)` \|', choose, re.M))
    assert {word: eval(text, vars(astroattn) | {"AstroConfig": AstroConfig}) for word, text in told.items()} == PRESETS


def test_the_script(tmp_path: Path) -> None:
    path = tmp_path / "presets.json"
    done = run(presets.main, "--model", "digits", "--limit", "3", "--json", str(path))
    assert done.exit_code == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["preset"] for row in rows] == list(PRESETS)
    assert rows[-1]["error"] < 1e-5 < rows[0]["error"]  # 197 tokens, so exact is softmax
    assert rows[-1]["cost"] == 1
    assert presets.format_markdown(rows) in done.output
