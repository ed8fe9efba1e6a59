"""`eval.distill_decoders`: texts are kept apart, trainings run and go on, and the page has the committed figures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from scripts import run
from torch import Tensor

from astroattn import AstroConfig
from astroattn.attention import AstrocyteAttention
from astroattn.distillation.weights import in_use
from astroattn.ops.streaming import Memory
from eval.distill_decoders import __main__ as script
from eval.distill_decoders import page, texts, training
from eval.distill_decoders.measuring import Loss, states_of
from eval.distill_decoders.training import LEARNED, NEAR, RANDOM, START, TRANSFER, TUNED, Settings, patched_copy
from eval.generate.reading import ORIGINAL, OURS, read
from eval.generate.subjects import Subject, read_texts

SETTINGS = Settings(16, 8, 4, 2, (2, 2))


def random_texts(count: int, tokens: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(5, 99, (count, 1, tokens), generator=generator))


def subject() -> Subject:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = t.LlamaConfig(**sizes, vocab_size=99, intermediate_size=64, initializer_range=0.3)
    model = t.LlamaForCausalLM(config).eval()
    return Subject("tiny", model, random_texts(2, 60, 1), 20, (32,), {}, lambda: random_texts(8, 60, 2))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The script with a tiny decoder and random texts."""
    some = texts.Texts(random_texts(6, 60, 3), random_texts(2, 60, 4))
    monkeypatch.setattr(script, "LOADERS", {"tiny": subject})
    monkeypatch.setattr(script, "SETTINGS", {"tiny": SETTINGS})
    monkeypatch.setattr(script, "load_texts", lambda subject, seed=0: some)
    return lambda *arguments: run(script.main, "--model", "tiny", *arguments)


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["rows"]
    return rows


def test_no_text_that_is_learned_from_is_reported() -> None:
    letters = 5_300  # that no 1,024 tokens of them have
    reported = [text[:letters] for text in read_texts()]
    learned_from = [*texts.read_modules(), *texts.read_reference()]
    assert len(learned_from) > 60
    for text in learned_from:
        assert len(text) > letters
        assert not any(text[start : start + 100] in other for start in range(0, letters, 50) for other in reported)


def test_news_need_the_data(monkeypatch: pytest.MonkeyPatch, data_dir: Path) -> None:
    monkeypatch.setenv("ASTROATTN_DATA", str(data_dir))
    news = texts.read_news()
    assert len(news) > 20
    assert all(len(text) > texts.LETTERS * texts.SHORT for text in news)
    monkeypatch.delenv("ASTROATTN_DATA")
    with pytest.raises(ValueError, match="ASTROATTN_DATA is not set"):
        texts.read_news()


def test_stories_of_a_decoder_are_its_own_and_others_for_every_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = subject()
    mine.model.config.bos_token_id = 1
    monkeypatch.setattr(texts, "STORY_TOKENS", 20)
    stories = [texts.write_stories(mine, 3, seed) for seed in (0, 0, 1)]
    assert stories[0].shape == (3, 20)
    assert torch.equal(stories[0], stories[1])
    assert not torch.equal(stories[0], stories[2])


def test_silent_neurons_leave_the_near_field_alone() -> None:
    """The outputs are those of softmax over the 16 newest tokens."""
    core = next(iter(in_use(patched_copy(subject(), NEAR, SETTINGS, 0)).values()))
    query, key, value = torch.randn(3, 1, 4, 50, 8, generator=torch.Generator().manual_seed(0))
    age = torch.arange(50)[:, None] - torch.arange(50)
    logits = (query @ key.mT * 8**-0.5).masked_fill((age < 0) | (age >= 16), -torch.inf)
    torch.testing.assert_close(core(query, key, value, causal=True), logits.softmax(-1) @ value)


def test_a_memory_has_no_more_numbers_than_the_layer_that_it_stands_beside() -> None:
    mine = subject()
    settings = Settings(64, 64, 1, 0, (1, 1))
    entries = script.entries_of(mine.model, settings)
    core = next(iter(in_use(patched_copy(mine, LEARNED, settings, 0)).values()))
    assert isinstance(core, AstrocyteAttention)
    _, state = core.decode(*torch.randn(3, 1, 4, 200, 8))
    near = 2 * (settings.near - 1) * 8 * 2  # keys and values, once for each of two key heads
    numbers = near + state.kv_state.numel() + state.z_state.numel() + state.top.numel()
    config = AstroConfig(hidden="streaming", entries=entries)
    _, memory = AstrocyteAttention(4, 8, config).decode(
        torch.randn(1, 4, 300, 8), torch.randn(1, 2, 300, 8), torch.randn(1, 2, 300, 8)
    )
    assert isinstance(memory, Memory)
    held = sum(x.numel() for x in memory[:-2])
    assert held <= numbers < held * (1 + 16 / entries)


def test_all_kinds_are_measured_at_every_stage(tiny: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    result = tiny("--seeds", "2", "--json", str(path))
    assert result.exit_code == 0, result.output
    rows = rows_of(path)
    found = {(row["attention"], row["training"], row["seed"]) for row in rows if row["measure"] == "loss"}
    trained = {LEARNED: (START, TRANSFER, TUNED), RANDOM: (START, TUNED), NEAR: (START, TUNED)}
    assert found == {(ORIGINAL, START, 0), (script.STREAMING, START, 0)} | {
        (name, stage, seed) for name, stages in trained.items() for stage in stages for seed in (0, 1)
    }
    steps = [row["steps"] for row in rows if (row["measure"], row["attention"], row["seed"]) == ("curve", LEARNED, 0)]
    assert steps == [0, 2, 4, 4, 6]
    mine = subject()
    (streaming,) = (row for row in rows if row["attention"] == script.STREAMING)
    scored = Loss(mine, mine.texts, mine.start)
    expected = scored(read(mine, OURS, streaming["entries"], mine.texts))
    assert streaming["nats above"] == expected["nats above"]
    assert streaming["texts"] == expected["texts"]
    assert streaming["scored"] == 2 * 39
    assert next(row for row in rows if row["attention"] == ORIGINAL)["KL"] == 0
    before = len(rows)
    assert tiny("--seeds", "2", "--attention", LEARNED, "--json", str(path)).exit_code == 0
    assert len(rows_of(path)) == before
    tables = page.format_loss(rows)
    assert tables.count("\n") == 1 + 1 + 3 + 2 + 2
    figure = page.plot({"tiny": rows})
    assert len(figure.axes[0].lines) == 6


def test_a_training_that_broke_off_goes_on(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are those of a training in one go."""
    paths, state = [tmp_path / "whole.json", tmp_path / "parts.json"], tmp_path / "state"
    arguments = ("--attention", LEARNED)
    assert tiny(*arguments, "--json", str(paths[0])).exit_code == 0
    add = training.Running._add

    def break_off(self: Any, step: int) -> None:
        add(self, step)
        if step == 2:
            raise RuntimeError("broken off")

    with monkeypatch.context() as patched:
        patched.setattr(training.Running, "_add", break_off)
        with pytest.raises(RuntimeError, match="broken off"):
            tiny(*arguments, "--json", str(paths[1]), "--state", str(state))
    assert len(rows_of(paths[1])) == 3  # as drawn, and two looks
    assert tiny(*arguments, "--json", str(paths[1]), "--state", str(state)).exit_code == 0
    whole, parts = (
        [{name: value for name, value in row.items() if "minutes" not in name} for row in rows_of(path)]
        for path in paths
    )
    assert parts == whole


def test_answers_are_those_of_the_needles(tiny: Callable[..., Any], tmp_path: Path, monkeypatch: Any) -> None:
    def with_words() -> Subject:
        long = [text.repeat(1, 20) for text in subject().texts]
        return replace(subject(), texts=long, encode=lambda text: [5 + ord(letter) % 94 for letter in text])

    monkeypatch.setattr(script, "LOADERS", {"tiny": with_words})
    path = tmp_path / "rows.json"
    arguments = ("--attention", NEAR, "--attention", ORIGINAL, "--tuning", "0", "--limit", "1")
    assert tiny(*arguments, "--needles", "1", "--json", str(path)).exit_code == 0
    rows = [row for row in rows_of(path) if row["measure"] == "recall"]
    assert [row["attention"] for row in rows] == [ORIGINAL] * 5 + [NEAR] * 5
    mine = with_words()
    needle = script.draw_needles(mine, script.SHORT, 1)[0]
    model = patched_copy(mine, NEAR, SETTINGS, 0)
    (states,) = states_of(model, [needle.text], "one")
    logits = model(needle.text).logits[0, -needle.digits - 1 : -1]
    expected = -torch.nn.functional.cross_entropy(logits, needle.text[0, -needle.digits :], reduction="sum")
    assert rows[5]["log p"] == pytest.approx(expected.item(), rel=1e-3)
    assert states.shape == (script.SHORT, 32)
    assert page.format_recall(rows).count("\n") == 3


@pytest.mark.parametrize("option", ["--model", "--attention", "--loss"])
def test_the_command_says_what_it_can_do(option: str) -> None:
    result = run(script.main, option, "none")
    assert result.exit_code == 2
    assert "'none'" in result.output


def test_a_decoder_of_stories_reads_no_numbers(tiny: Callable[..., Any]) -> None:
    assert "reads no numbers" in tiny("--needles", "1").output


def results() -> dict[str, list[dict[str, Any]]]:
    return {name: page.read_rows(path) for name, path in page.FILES.items()}


def test_the_page_has_the_committed_figures() -> None:
    found = results()
    assert all(found.values())
    written = page.PAGE.read_text("utf-8")
    assert page.fill(written, found) == written
    assert page.FIGURE.exists()


def test_what_the_page_says() -> None:
    means = {
        name: {
            (attention, stage): statistics.mean(row["nats above"] for row in rows if is_of(row, attention, stage))
            for attention, stage in {(row["attention"], row["training"]) for row in rows if row["measure"] == "loss"}
        }
        for name, rows in results().items()
    }
    stories, smol = means["stories"], means["smollm2"]
    text = " ".join(page.PAGE.read_text("utf-8").split())
    trained = [row for row in results()["smollm2"] if is_of(row, LEARNED, TRANSFER)]
    assert [row["seed"] for row in trained] == [0, 1, 2, 3, 4]
    ends = [[function(row[name] for row in trained) for function in (min, max)] for name in ("minutes", "nats above")]
    took = f"{ends[0][0]:.0f} to {ends[0][1]:.0f} CPU minutes"
    assert f"{smol[LEARNED, TRANSFER]:.2f} nats above the original after {took}" in text
    assert f"{ends[1][0]:.2f} to {ends[1][1]:.2f} in five of five seeds" in text
    assert ends[1][1] <= 0.35
    assert f"{smol[LEARNED, TUNED]:.2f} above after some more with adapters" in text
    assert f"the near field alone is {smol[NEAR, START]:.2f} above, and {smol[NEAR, TUNED]:.2f} with adapters" in text
    assert f"adapters alone {smol[NEAR, START] - smol[NEAR, TUNED]:.2f}" in text
    assert f"from {stories[NEAR, START]:.2f} to {stories[LEARNED, TRANSFER]:.2f}" in text
    assert f"to {stories[LEARNED, TUNED]:.2f} with adapters" in text
    assert smol[LEARNED, TRANSFER] <= min(0.35, smol[NEAR, START] / 2)
    assert 0.5 < smol[script.STREAMING, START] / smol[LEARNED, TUNED] < 0.6  # "little more than half"
    assert f"worth {smol[LEARNED, TUNED] - smol[script.STREAMING, START]:.2f} nats" in text
    assert stories[LEARNED, TUNED] < stories[LEARNED, TRANSFER] < stories[script.STREAMING, START] / 2
    assert stories[LEARNED, START] > 2 * stories[NEAR, START]  # as drawn it is worse than nothing
    assert smol[LEARNED, START] > smol[NEAR, START]
    each = [nats for row in trained for nats in row["texts"]]
    tuned = [nats for row in results()["smollm2"] if is_of(row, LEARNED, TUNED) for nats in row["texts"]]
    assert f"features take {smol[NEAR, START] - smol[RANDOM, START]:.2f} of the {smol[NEAR, START]:.2f} nats" in text
    assert f"from {min(each):.2f} to {max(each):.2f} nats in the four texts" in text
    assert f"from {min(tuned):.2f} to {max(tuned):.2f} with adapters" in text
    assert all(abs(stories[kind, START] - stories[kind, TUNED]) < 0.01 for kind in (NEAR, RANDOM))
    recalled = [row for row in results()["smollm2"] if row["measure"] == "recall"]
    assert {row["attention"] for row in recalled} == {script.STREAMING, NEAR, LEARNED}
    assert all(row["exact"] == 0 for row in recalled)


def is_of(row: dict[str, Any], attention: str, stage: str) -> bool:
    return (row["measure"], row["attention"], row.get("training")) == ("loss", attention, stage)
