"""`eval.generate`: the caches it compares do what their papers say, and the page has the committed figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as t
from scripts import run
from torch import Tensor

from eval.generate.__main__ import OURS, main, measure_loss, plot
from eval.generate.caches import NAMES, SCORES, Entries, attend
from eval.generate.page import format_table
from eval.generate.speed import measure_speed
from eval.generate.subjects import Subject

ROOT = Path(__file__).parent.parent
COMMITTED = ROOT / "docs" / "results" / "generate.json"


def tokens(count: int = 90) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 3, count, 8), torch.randn(2, count, 8), torch.randn(2, count, 5)


def subject() -> Subject:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = t.LlamaConfig(**sizes, vocab_size=99, intermediate_size=64, initializer_range=0.3)
    texts = [torch.randint(5, 99, (1, 120), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    return Subject("tiny", t.LlamaForCausalLM(config).eval(), texts, 60, (32,))


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


def test_rows_have_every_cache_and_the_model_is_left_as_it_was() -> None:
    mine = subject()
    before = mine.model(mine.texts[0]).logits
    rows = list(measure_loss(mine, (*NAMES, OURS)))
    assert [row["cache"] for row in rows] == [*NAMES, OURS]
    assert all(row["scored"] == 2 * 59 and row["KL"] > 0 for row in rows)
    assert torch.equal(mine.model(mine.texts[0]).logits, before)
    assert plot(rows).axes
    assert format_table(rows).count("\n") == len(NAMES) + 2


def test_steps_are_timed_side_by_side() -> None:
    rows = list(measure_speed(subject(), 1024))
    original, ours = ([row for row in rows if row["cache"] == name] for name in ("original", OURS))
    assert [row["tokens"] for row in original] == [row["tokens"] for row in ours] == [128, 256, 512, 1024]
    assert original[-1]["cache MB"] > 7 * original[0]["cache MB"]
    assert ours[-1]["cache MB"] < 1.2 * ours[0]["cache MB"]


def test_the_command_says_what_it_can_do() -> None:
    result = run(main, "--cache", "none")
    assert result.exit_code == 2
    assert "'none'" in result.output


def test_the_page_has_the_committed_figures() -> None:
    rows = json.loads(COMMITTED.read_text("utf-8"))["rows"]
    assert format_table(rows) in (ROOT / "docs" / "generation.md").read_text("utf-8")
    for entries, most in ((32, 0.06), (64, 0.013), (128, 0.004)):
        assert find(rows, "stories260K", entries)[OURS]["nats above"] <= most
    for entries, least in ((64, 0.79), (128, 0.87), (256, 0.93)):
        assert find(rows, "SmolLM2-135M", entries)[OURS]["agreement"] >= least
    for model, entries in {(row["model"], row["entries"]) for row in rows}:
        found = {name: row["nats above"] for name, row in find(rows, model, entries).items()}
        assert min(found, key=lambda name: found[name]) == OURS


def find(rows: list[dict[str, Any]], model: str, entries: int) -> dict[str, dict[str, Any]]:
    return {row["cache"]: row for row in rows if (row["model"], row["entries"]) == (model, entries)}
