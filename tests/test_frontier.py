"""The frontier: who lies below our curve, peers in the place of astrocytes, and the script on the digits ViT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import run

from astroattn.fidelity.calls import find_astrocytes
from eval.benchmark.timing import Effort
from eval.frontier import contestants, measuring
from eval.frontier.__main__ import main
from eval.frontier.cases import EMBEDDING, LOGITS, SOURCES, choose_sources, load_case
from eval.frontier.comparing import dominated, format_markdown
from eval.frontier.contestants import ERRORS, PEERS, Peer
from eval.peers import block_sparse, uniform


def make_row(line: str, cost: float, error: float, **more: Any) -> dict[str, Any]:
    """A row as `measure` gives it."""
    row = {
        "model": "A",
        "tokens": 512,
        "items": 2,
        "what": "error",
        "line": line,
        "budget": "b",
        "ours": line == "ours",
    }
    return row | {"cost": cost, "time": 2 * cost, "error": error, "agreement": None} | more


OURS = [make_row("ours", 0.1, 0.1), make_row("ours", 0.3, 0.02), make_row("ours", 0.32, 0.5)]


@pytest.mark.parametrize(
    ("cost", "error", "below"),
    [
        (0.05, 0.09, True),  # cheaper than any of ours and better than our cheapest
        (0.05, 0.11, False),
        (0.1 * 3**0.5, 0.044, True),  # half-way in both logarithms the curve is at 0.0447
        (0.1 * 3**0.5, 0.0455, False),
        (0.35, 0.019, True),  # a point of ours that is worse than a cheaper one is not on the curve
        (0.35, 0.03, False),
        (0.5, 0.001, False),  # not cheap
    ],
)
def test_peers_below_our_curve_are_named(cost: float, error: float, below: bool) -> None:
    peer = make_row("peer", cost, error)
    assert dominated([*OURS, peer]) == ([peer] if below else [])
    short = [row | {"tokens": 197} for row in (*OURS, peer)]
    assert dominated(short) == []
    assert dominated([*(row | {"model": "B"} for row in OURS), peer]) == []


def test_the_best_of_all_our_lines_is_the_curve() -> None:
    plan = make_row("ours, plan", 0.1, 0.01, ours=True)
    assert dominated([*OURS, plan, make_row("peer", 0.2, 0.015)]) == []


def test_table_shows_the_best_cheap_point_of_a_method() -> None:
    rows = [*OURS, make_row("exact", 1.0, 0.001, agreement=0.5), make_row("other", 0.2, 0.4, model="B", tokens=197)]
    assert format_markdown(rows).splitlines() == [
        "| method | A | B |",
        "| --- | --- | --- |",
        "| ours | 0.02 (30%, 0.6) | - |",
        "| exact | 0.001, 50.0% (100%, 2) | - |",
        "| other | - | 0.4 (20%, 0.4) |",
    ]


def test_errors_and_agreement() -> None:
    truth = torch.tensor([[1.0, 0, 0], [0, 2, 0]])
    assert LOGITS.compare(truth, truth) == (0, 1)
    error, agreement = LOGITS.compare(truth.flip(0), truth)
    assert error == pytest.approx(2**0.5)
    assert agreement == 0
    embeddings = torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [0, 1, 0], [0, 0.9, 0.2]])
    error, agreement = EMBEDDING.compare(3 * embeddings, embeddings)
    assert error == pytest.approx(0, abs=1e-6)
    assert agreement == 1


def test_a_peer_answers_in_every_layer_and_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "TURNS", Effort(1, 0))
    case = load_case("digits", 4)
    batches = list(case.batches("odd"))
    full = {"query_block": 16, "key_block": 16, "mass": 100, "similarity": 0}
    with torch.inference_mode():
        truth = measuring.read_outputs(case, batches)
        calls = measuring.record_calls(case.model, batches[0][:1])
        assert len(calls) == 4
        found, cost, time = measuring._run_peer(Peer(block_sparse, lambda n: []), full, case, batches, calls)
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
        assert cost == pytest.approx((2 + 13 * 13 / 197 + 2 * 197) / (2 * 197))
        assert time > 0
        found, cost, _ = measuring._run_peer(Peer(uniform, lambda n: []), {}, case, batches, calls)
        assert not torch.allclose(found, truth, rtol=0.1)
        assert cost == pytest.approx(1 / (2 * 197))
        assert not find_astrocytes(case.model)
        assert torch.equal(measuring.read_outputs(case, batches), truth)


def test_a_peer_refuses_padding_and_causal_masks() -> None:
    stand = measuring.Stand(Peer(uniform, lambda n: []), {}, 2, 4)
    inputs = torch.randn(3, 2, 2, 5, 4)
    mask = torch.ones(2, 5, dtype=torch.bool)
    assert stand(*inputs, key_mask=mask).shape == (2, 2, 5, 4)
    mask[0, 4] = False
    for options in ({"key_mask": mask}, {"causal": True}):
        with pytest.raises(ValueError, match="no padding and no causal mask"):
            stand(*inputs, **options)


def test_without_data_the_digits_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASTROATTN_DATA", raising=False)
    assert choose_sources(None) == ["minilm512", "digits"]
    with pytest.raises(ValueError, match=r"vit448 needs the folder that ASTROATTN_DATA names"):
        choose_sources(["vit448"])
    monkeypatch.setenv("ASTROATTN_DATA", "somewhere")
    assert choose_sources(None) == [name for name in SOURCES if name != "digits"]


def test_script_measures_everyone_and_keeps_the_rows_of_other_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "TURNS", Effort(1, 0))
    path, figure = tmp_path / "rows.json", tmp_path / "figure.png"
    other = [*OURS, make_row("exact", 1.0, 0.001), make_row("peer", 0.2, 1e-3)]
    path.write_text(json.dumps({"rows": other}), "utf-8")
    done = run(main, "--model", "digits", "--limit", "4", "--json", str(path), "--figure", str(figure))
    assert done.exit_code == 0
    rows = json.loads(path.read_text("utf-8"))["rows"]
    assert [row["line"] for row in rows if row["below_ours"]] == ["peer"]
    assert "A: peer, b: error 0.0010 at 20.0%" in done.output
    mine, kept = rows[: -len(other)], rows[-len(other) :]
    assert [row | {"below_ours": None} for row in kept] == [row | {"below_ours": None} for row in other]
    assert {row["line"] for row in mine} == {"ours", "ours, with a plan", *PEERS}
    assert [row["budget"] for row in mine if row["line"] == "ours"] == [
        "default",
        *(f"error of a key {error}" for error in ERRORS),
    ]
    assert all(row["items"] == 4 and row["cost"] > 0 and row["time"] > 0 for row in mine)
    exact = next(row for row in mine if "8-bit" in row["line"])
    assert exact["error"] < 0.05
    assert figure.stat().st_size > 10_000


def test_ours_anew_leaves_the_peers_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "TURNS", Effort(1, 0))
    monkeypatch.setattr(contestants, "SHARES", ())  # a plan takes longest
    path, title = tmp_path / "rows.json", SOURCES["digits"].load(197, 4, 4).title
    there = [make_row("peer", 0.2, 0.7, model=title, tokens=197), make_row("ours", 0.2, 0.9, ours=True, model=title)]
    path.write_text(json.dumps({"rows": [*there, *OURS]}), "utf-8")
    arguments = ("--model", "digits", "--limit", "4", "--no-peers", "--json", str(path))
    assert run(main, *arguments).exit_code == 0
    rows = json.loads(path.read_text("utf-8"))["rows"]
    mine = [row for row in rows if row["model"] == title]
    assert [row["line"] for row in mine if not row["ours"]] == ["peer"]
    assert next(row["budget"] for row in mine if row["ours"]) == "default"
    assert len(rows) == len(mine) + len(OURS)
