"""`eval.generate`: the caches it compares do what their papers say, and the page has the committed figures."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as t
from scripts import run
from torch import Tensor

from astroattn import Plan, patched
from eval.generate import copying, distance, kinds, loss, plans, reading, recall, speed
from eval.generate.__main__ import TASKS, main
from eval.generate.caches import NAMES, SCORES, Entries, attend
from eval.generate.figure import plot
from eval.generate.page import FORMATS, MISSING, fill, load_results
from eval.generate.reading import ORIGINAL, OURS, PLANNED, UNREAD, WITH_PLAN, lose, predict, read
from eval.generate.subjects import Subject

PAGE = Path(__file__).parent.parent / "docs" / "generation.md"


def tokens(count: int = 90) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 3, count, 8), torch.randn(2, count, 8), torch.randn(2, count, 5)


def subject() -> Subject:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = t.LlamaConfig(**sizes, vocab_size=99, intermediate_size=64, initializer_range=0.3)
    texts = [torch.randint(5, 99, (1, 120), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    model = t.LlamaForCausalLM(config).eval()
    return Subject(
        "tiny",
        model,
        texts,
        60,
        (32,),
        {},
        lambda: texts,
        lambda: dict(zip(("one", "another"), texts, strict=True)),
        lambda text: [5 + ord(letter) % 94 for letter in text],
    )


def assert_drawn(task: str, rows: list[dict[str, Any]], lines: int) -> None:
    """One panel with a line for each cache, all of which the legend names."""
    figure = plot({task: rows})
    (axes,) = figure.axes
    assert task in axes.get_title()
    assert axes.axison
    assert len(axes.lines) == len(figure.legends[0].get_texts()) == lines
    assert all(len(line.get_xdata()) for line in axes.lines)


@pytest.mark.parametrize("name", NAMES)
def test_with_room_for_all_a_cache_is_softmax_and_without_it_knows_no_future(name: str) -> None:
    query, key, value = tokens()
    shared = (x[:, None].expand(-1, 3, -1, -1) for x in (key, value))
    expected = F.scaled_dot_product_attention(query, *shared, is_causal=True, scale=1.0)
    torch.testing.assert_close(attend(name, query, key, value, 104, 8), expected)
    out = attend(name, query, key, value, 32, 8)
    assert not torch.allclose(out, expected)
    torch.testing.assert_close(out[:, :, :32], expected[:, :, :32])
    key[:, 70:] += 1
    torch.testing.assert_close(attend(name, query, key, value, 32, 8)[:, :, :70], out[:, :, :70])


def test_a_window_holds_the_newest_tokens_and_streaming_llm_the_first_four_too() -> None:
    query, key, value = tokens()
    shared = [x[:, None].expand(-1, 3, -1, -1) for x in (key, value)]
    last = query[:, :, -1:]
    # 90 tokens in blocks of 8: after 88, 24 are kept; two more have come
    newest = F.scaled_dot_product_attention(last, *(x[:, :, -26:] for x in shared), scale=1.0)
    torch.testing.assert_close(attend("window", query, key, value, 32, 8)[:, :, -1:], newest)
    kept = torch.tensor([0, 1, 2, 3, *range(68, 90)])
    sinks = F.scaled_dot_product_attention(last, *(x[:, :, kept] for x in shared), scale=1.0)
    torch.testing.assert_close(attend("StreamingLLM", query, key, value, 32, 8)[:, :, -1:], sinks)


def test_scores_keep_what_their_papers_keep() -> None:
    place = torch.arange(40)[None]
    total = torch.linspace(1, 0, 40)[None]
    recent = torch.zeros(1, 40, 4)
    recent[0, 6, 2] = 9.0
    held = Entries(torch.zeros(1, 40, 1), torch.zeros(1, 40, 1), place, total, total.flip(1), recent)
    kept = {name: set(score(held, 20).topk(20).indices[0].tolist()) for name, score in SCORES.items()}
    assert kept["window"] == set(range(20, 40))
    assert kept["StreamingLLM"] == {0, 1, 2, 3, *range(24, 40)}
    assert kept["H2O"] == {*range(10), *range(30, 40)}
    assert kept["TOVA"] == set(range(20, 40))  # the latest query looks at the end
    assert {4, 5, 6, 7, 8, *range(30, 40)} <= kept["SnapKV-like"]


def test_losses_are_those_of_whole_predictions() -> None:
    mine = subject()
    text = torch.cat(mine.texts, 1).repeat(1, 2)  # more tokens than are predicted at once
    truth, states = (read(mine, name, 32, [text])[0] for name in (ORIGINAL, "window"))
    losses = lose(mine.model, text, truth, states)
    theirs = mine.model(text).logits[0, :-1].log_softmax(-1)
    expected = F.cross_entropy(theirs, text[0, 1:], reduction="none")
    torch.testing.assert_close(losses.original, expected)
    ours = predict(mine.model, states)[:-1]
    torch.testing.assert_close(losses.above, F.cross_entropy(ours, text[0, 1:], reduction="none") - expected)
    torch.testing.assert_close(losses.kl, F.kl_div(ours, theirs, log_target=True, reduction="none").sum(1))
    assert torch.equal(losses.same.bool(), theirs.argmax(1) == ours.argmax(1))
    assert losses.above[:31].abs().max() < 1e-4 < losses.above.abs().max()


def test_rows_have_every_cache_and_the_model_is_left_as_it_was() -> None:
    mine = subject()
    before = mine.model(mine.texts[0]).logits
    rows = list(loss.measure(mine, (*NAMES, OURS), (120,), None))
    assert [row["cache"] for row in rows] == [*NAMES, OURS]
    assert all(row["scored"] == 2 * 59 and row["KL"] > 0 for row in rows)
    assert torch.equal(mine.model(mine.texts[0]).logits, before)
    # the axis is logarithmic, and an untrained model may lose less than nothing
    assert_drawn("loss", [row | {"nats above": abs(row["nats above"])} for row in rows], len(NAMES) + 1)
    assert FORMATS["loss"](rows).count("\n") == len(NAMES) + 2


def test_a_planned_memory_is_that_of_its_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mine = subject()
    batches = [torch.randint(5, 99, (4, 50), generator=torch.Generator().manual_seed(3))]
    monkeypatch.setattr(plans, "FOLDER", tmp_path)
    monkeypatch.setattr(plans, "LOADERS", {"tiny": lambda: dataclasses.replace(mine, samples=lambda: list(batches))})
    with pytest.raises(ValueError, match="cannot read it"):
        read(mine, PLANNED, 40, mine.texts)
    result = run(plans.main, "--entries", "40", "--folder", str(tmp_path))
    assert result.exit_code == 0, result.output
    plan = Plan.load(tmp_path / "tiny_40.json")
    assert plan.entries is not None
    assert 32 < plan.entries <= 40
    with patched(mine.model, plan), torch.no_grad():
        expected = [mine.model.base_model(text, use_cache=False).last_hidden_state[0] for text in mine.texts]
    found, alike = read(mine, PLANNED, 40, mine.texts), read(mine, OURS, 40, mine.texts)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found[0], alike[0])


def test_a_long_text_is_read_once_for_all_lengths() -> None:
    mine = dataclasses.replace(subject(), budgets=(32, 64))
    rows = {(row["entries"], row["tokens"]): row for row in loss.measure(mine, (OURS,), (120, 100), None)}
    assert set(rows) == {(32, 100), (64, 100), (64, 120)}  # the smaller budget reads the shorter text alone
    alone = next(loss.measure(dataclasses.replace(mine, budgets=(64,)), (OURS,), (100,), None))
    assert alone == rows[64, 100]


def test_kinds_of_texts_add_up_to_the_loss() -> None:
    mine = subject()
    rows = list(kinds.measure(mine, (OURS, "H2O"), (120,), None))
    assert [(row["cache"], row["text"]) for row in rows] == [
        (cache, text) for cache in (OURS, "H2O") for text in ("one", "another")
    ]
    whole = next(loss.measure(mine, (OURS,), (120,), None))
    assert sum(row["scored"] for row in rows[:2]) == whole["scored"]
    assert (rows[0]["nats above"] + rows[1]["nats above"]) / 2 == pytest.approx(whole["nats above"], rel=1e-3)
    assert rows[0]["nats above"] != rows[1]["nats above"]
    assert FORMATS["kinds"](rows).count("32 entries: astroattn") == 1
    assert_drawn("kinds", rows, 2)


def test_distance_adds_up_to_the_loss() -> None:
    mine = dataclasses.replace(subject(), start=0)
    rows = list(distance.measure(mine, (OURS,), (112,), None))
    assert [row["from"] for row in rows] == list(range(0, 112, 7))
    whole = next(loss.measure(mine, (OURS,), (112,), None))
    assert sum(row["scored"] for row in rows) == whole["scored"] == 2 * 111
    mean = sum(row["nats above"] * row["scored"] for row in rows) / whole["scored"]
    assert mean == pytest.approx(whole["nats above"], rel=1e-3)
    assert all(abs(row["nats above"]) < 1e-4 for row in rows if row["from"] < 28)  # the memory is not full yet
    assert FORMATS["distance"](rows).count("56 to 105 | 105 to 112") == 1
    assert_drawn("distance", rows, 1)


def test_a_needle_is_where_it_should_be_and_its_answer_last() -> None:
    mine = dataclasses.replace(subject(), texts=[torch.full((1, 400), 98), torch.full((1, 400), 97)])
    assert mine.encode is not None
    for seed in (0, 1):
        (_, text, digits), (_, untold, _) = (recall.draw(mine, 300, depth, seed) for depth in (0.5, None))
        assert text.shape == untold.shape == (1, 300)
        ids = text[0].tolist()
        answer = ids[-digits:]
        needle = mine.encode(recall.NEEDLE)[:6]
        places = [place for place in range(300) if ids[place : place + 6] == needle]
        assert len(places) == 1
        assert places[0] == round(0.5 * ids.count(98 - seed))
        assert sum(ids[place : place + digits] == answer for place in range(300)) == 2
        ids = untold[0].tolist()
        assert sum(ids[place : place + digits] == answer for place in range(300)) == 1


def test_recall_is_the_probability_of_the_answer_and_what_is_generated() -> None:
    mine = subject()
    mine = dataclasses.replace(mine, texts=[text.repeat(1, 3) for text in mine.texts])
    rows = list(recall.measure(mine, ("window", OURS), (180,), 2))
    assert [(row["cache"], row["depth"]) for row in rows[:6]] == [
        (UNREAD, None), *((ORIGINAL, depth) for depth in recall.DEPTHS)
    ]  # fmt: skip
    assert len(rows) == 6 + 2 * len(recall.DEPTHS)
    log_p, right = 0.0, 0
    for seed in (0, 1):
        _, text, digits = recall.draw(mine, 180, 0.1, seed)
        expected = mine.model(text).logits[0, -digits - 1 : -1].log_softmax(-1).detach()
        log_p += float(expected.gather(1, text[0, -digits:, None]).sum()) / 2
        prompt = text[:, :-digits]
        written = mine.model.generate(prompt, max_new_tokens=digits, do_sample=False, pad_token_id=0, eos_token_id=None)
        right += int(torch.equal(written, text))
    assert rows[1]["log p"] == pytest.approx(log_p, rel=1e-3)
    assert rows[1]["exact"] == right / 2
    assert FORMATS["recall"](rows).count("\n") == 2 + 3
    assert_drawn("recall", rows, 4)


def test_a_greedy_answer_counts_where_it_is_right() -> None:
    mine = subject()
    mine.model.lm_head.weight.data.zero_()
    mine = dataclasses.replace(mine, encode=lambda text: [0] * len(text))  # the first of equals is the most likely
    rows = list(recall.measure(mine, (OURS,), (110,), 1))
    assert all(row["exact"] == 1 for row in rows)
    assert rows[0]["log p"] == pytest.approx(-5 * math.log(99), rel=1e-3)


def test_copy_says_what_a_first_reading_was_worth() -> None:
    mine = subject()
    ours, other = copying.draw(mine, 16, 3), copying.draw(mine, 16, 3, repeated=False)
    passage = slice(copying.LEAD, copying.LEAD + copying.PASSAGE)
    assert torch.equal(ours[:, passage], ours[:, -copying.PASSAGE :])
    assert not torch.equal(other[:, passage], other[:, -copying.PASSAGE :])
    same = torch.ones_like(ours, dtype=torch.bool)
    same[:, passage] = False
    assert torch.equal(ours[same], other[same])
    rows = list(copying.measure(mine, ("window", OURS), (16, 64), 2))
    assert [(row["gap"], row["cache"]) for row in rows] == [
        (gap, name) for gap in (16, 64) for name in (UNREAD, "window", OURS)
    ]
    for gap in (16, 64):
        unread, *others = (row for row in rows if row["gap"] == gap)
        assert unread["lost"] == 1
        assert all(
            row["lost"] == pytest.approx(row["nats above"] / unread["nats above"], rel=1e-3, abs=1e-3) for row in others
        )
    roomy = list(copying.measure(dataclasses.replace(mine, budgets=(256,)), (OURS,), (16,), 2))
    assert abs(roomy[1]["lost"]) < 1e-3  # nothing was merged
    assert FORMATS["copy"](rows).count("\n") == 2 + 2
    assert_drawn("copy", rows, 3)


def test_steps_are_timed_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "STEPS", 24)
    monkeypatch.setattr(speed, "FIRST", 64)
    assert speed.lengths_up_to(300) == [64, 128, 256, 300]
    monkeypatch.setattr(speed, "ORIGINAL_MOST", 256)
    rows = list(speed.measure(subject(), (OURS,), (300,), None))
    original, ours = ([row for row in rows if row["cache"] == name] for name in (ORIGINAL, OURS))
    assert [row["tokens"] for row in original] == [64, 128, 256]
    assert [row["tokens"] for row in ours] == [64, 128, 256, 300]
    # keys and values of every token: 2 layers, 2 key heads of 8, float32
    assert [row["cache MB"] for row in original] == [
        pytest.approx(row["tokens"] * 2 * 2 * 2 * 8 * 4 / 1e6) for row in original
    ]
    assert ours[-1]["cache MB"] < 1.2 * ours[0]["cache MB"]
    assert ours[0]["growth"] is None
    assert ours[1]["growth"] == 1
    assert ours[3]["growth"] == pytest.approx(ours[3]["step ms"] / ours[1]["step ms"], rel=1e-3)
    assert FORMATS["speed"](rows).count("\n") == 1 + 2
    assert_drawn("speed", rows, 2)


@pytest.mark.parametrize("option", ["--cache", "--task", "--model"])
def test_the_command_says_what_it_can_do(option: str) -> None:
    result = run(main, option, "none")
    assert result.exit_code == 2
    assert "'none'" in result.output


def test_the_command_refuses_what_a_text_does_not_have(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mine = dataclasses.replace(subject(), tokens={"copy": (16,), "loss": (120,)})
    monkeypatch.setattr("eval.generate.__main__.LOADERS", {"tiny": lambda: mine})
    result = run(main, "--task", "loss", "--tokens", "121")
    assert result.exit_code == 2
    assert "121" in result.output
    assert "120" in result.output
    assert run(main, "--task", "recall").exit_code == 2  # nobody takes part
    assert "--limit" in run(main, "--task", "speed", "--limit", "1").output
    path = tmp_path / "rows.json"
    result = run(main, "--task", "copy", "--cache", OURS, "--limit", "1", "--json", str(path))
    assert result.exit_code == 0
    rows = json.loads(path.read_text("utf-8"))["rows"]
    assert [row["cache"] for row in rows] == [UNREAD, OURS]
    assert {row["scored"] for row in rows} == {copying.PASSAGE - 1}


@pytest.mark.parametrize("task", TASKS)
def test_the_page_has_the_committed_figures(task: str) -> None:
    results, page = load_results(), PAGE.read_text("utf-8")
    assert fill(page, results) == page
    assert fill(page, {}).count(MISSING) == len(TASKS)
    if task not in results:
        pytest.skip("not measured yet")
    assert FORMATS[task](results[task]) in page


def test_what_the_page_says_of_8192_tokens() -> None:
    rows = [row for row in load_results()["loss"] if row["tokens"] == 8192]
    found = {row["cache"]: row["nats above"] for row in rows}
    others = [value for name, value in found.items() if name not in (OURS, PLANNED)]
    assert found[PLANNED] < found[OURS] < min(others)
    said = f"lose {found[OURS]:.3f} nats, planned {found[PLANNED]:.3f}, and the best of the five others"
    flat = " ".join(PAGE.read_text("utf-8").split())
    assert f"{said} that were tried there {min(others):.3f}." in flat
    assert len(others) == 5


def test_what_the_page_says_of_the_loss() -> None:
    rows = [row for row in load_results()["loss"] if row["tokens"] <= loss.SHORT]
    wanted = {
        ("stories260K", OURS): ((32, 0.06, 0.93), (64, 0.013, 0.96), (128, 0.004, 0.98)),
        ("SmolLM2-135M", OURS): ((64, 0.28, 0.79), (128, 0.17, 0.87), (256, 0.09, 0.93)),
        ("SmolLM2-135M", PLANNED): ((64, 0.28, 0.79), (128, 0.13, 0.87), (256, 0.04, 0.93)),
    }
    for (model, name), all_of_them in wanted.items():
        for entries, nats, agreement in all_of_them:
            row = find(rows, model, entries)[name]
            assert row["nats above"] <= nats
            assert row["agreement"] >= agreement
    for model, entries in {(row["model"], row["entries"]) for row in rows}:
        found = {name: row["nats above"] for name, row in find(rows, model, entries).items()}
        alike = {name: value for name, value in found.items() if not name.endswith(WITH_PLAN)}
        assert min(alike, key=lambda name: alike[name]) == OURS
        assert found[PLANNED] == min(found.values())


def test_what_the_page_says_of_plans() -> None:
    ratios = []
    for entries in (64, 128, 256):
        row = find(load_results()["loss"], "SmolLM2-135M", entries)
        found = {name: row[name]["nats above"] for name in row}
        planned = {name: found[name] for name in found if name.endswith(WITH_PLAN) and name != PLANNED}
        assert len(planned) == 4
        assert all(
            value < found[name.removesuffix(WITH_PLAN)] for name, value in planned.items() if "window" not in name
        )
        ratios.append(f"{min(planned.values()) / found[PLANNED]:.1f}")
    assert f"loses {ratios[0]}, {ratios[1]} and {ratios[2]} times" in " ".join(PAGE.read_text("utf-8").split())


def test_what_the_page_says_of_the_speed() -> None:
    rows = load_results()["speed"]
    step = {(row["cache"], row["tokens"]): row["step ms"] for row in rows if row["model"] == "SmolLM2-135M"}
    last = {row["model"]: row for row in rows if row["cache"] == OURS}  # the longest of each model comes last
    assert [row["tokens"] for row in last.values()] == [8192, 100_000]
    assert all(row["growth"] <= 1.1 for row in last.values())
    assert step[OURS, 1024] > step[ORIGINAL, 1024]
    assert all(step[OURS, tokens] < step[ORIGINAL, tokens] for tokens in (4096, 8192))


def test_what_the_page_says_of_the_distance() -> None:
    """In the second half of the texts of 4,096 tokens, as at every place that the table has beyond the first."""
    rows = [row for row in load_results()["distance"] if row["tokens"] == 4096 and row["from"] >= 2048]
    lost = {name: [row["nats above"] for row in rows if row["cache"] == name] for name in (*NAMES, OURS, PLANNED)}
    mean = {name: sum(values) / len(values) for name, values in lost.items()}
    assert sorted(mean, key=lambda name: mean[name])[:2] == [PLANNED, OURS]


def test_the_page_says_what_was_measured() -> None:
    found = {name: row["nats above"] for name, row in find(load_results()["loss"], "SmolLM2-135M", 128).items()}
    best = min(found[name] for name in NAMES)
    page = " ".join(PAGE.read_text("utf-8").split())
    assert f"is {found[OURS]:.2f} nats a token above its own loss with 128 entries for every key head" in page
    assert f"and {found[PLANNED]:.2f} with a plan of 128 in the mean" in page
    assert f"without a plan, is {best:.2f} above" in page


def test_a_planned_peer_gives_each_head_its_number() -> None:
    tensors = torch.randn(1, 4, 60, 8), torch.randn(1, 2, 60, 8), torch.randn(1, 2, 60, 8)
    reading._peer.update(name="H2O", sizes=lambda module, heads: [32, 64])
    out = reading._attention(torch.nn.Module(), *tensors, None)[0].transpose(1, 2)
    query, key, value = tensors
    few = attend("H2O", query[:, :2] * 8**-0.5, key[:, 0], value[:, 0], 32, 4)
    torch.testing.assert_close(out[:, :2], few)
    shared = (x[:, 1:].expand(-1, 2, -1, -1) for x in (key, value))
    torch.testing.assert_close(out[:, 2:], F.scaled_dot_product_attention(query[:, 2:], *shared, is_causal=True))


def find(rows: list[dict[str, Any]], model: str, entries: int) -> dict[str, dict[str, Any]]:
    return {row["cache"]: row for row in rows if (row["model"], row["entries"]) == (model, entries)}


def test_what_the_page_says_of_the_last_sixteenth() -> None:
    rows = [row for row in load_results()["distance"] if row["tokens"] == 8192]
    last = [row for row in rows if row["from"] == 7680]
    assert len(last) == 3
    assert all(round(row["nats above"], 1) in (1.3, 1.4) and round(row["original"], 2) == 1.3 for row in last)
    page = " ".join(PAGE.read_text("utf-8").split())
    found = []
    for name in (OURS, PLANNED):
        before = [row for row in rows if row["cache"] == name and 4096 <= row["from"] < 7680]
        found.append(sum(row["nats above"] * row["scored"] for row in before) / sum(row["scored"] for row in before))
    assert f"without it 256 entries lose {found[0]:.3f} nats, planned {found[1]:.3f}" in page


def test_what_the_page_says_of_kinds_of_text() -> None:
    rows = load_results()["kinds"]
    for entries, most, agreement in ((128, 0.13, 0.87), (256, 0.04, 0.93)):
        mine = {row["text"]: row for row in rows if (row["entries"], row["cache"]) == (entries, OURS)}
        middles = {name for name in mine if name.endswith("middle")}
        assert len(mine) == 6
        assert set(sorted(mine, key=lambda name: mine[name]["nats above"])[-2:]) == middles
        others = [row for name, row in mine.items() if name not in middles]
        assert sum(row["nats above"] for row in others) / 4 <= most
        assert sum(row["agreement"] for row in others) / 4 >= agreement
    assert all(row["nats above"] < 0.01 for name, row in mine.items() if "news" in name)
