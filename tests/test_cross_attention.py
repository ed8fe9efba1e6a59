"""The script that measures cross attention: its rows, its tables, and the rows that are committed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scripts import run

from eval import cross_attention as script
from eval import summary
from eval.benchmark.timing import Effort
from eval.common import read_rows


def test_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [tuple(torch.randn(1, 2, count, 16) for count in (140, 300, 300)) for _ in range(2)]
    monkeypatch.setattr(script, "collect_calls", lambda: calls)
    monkeypatch.setattr(script, "QUERIES", (130, 140))
    monkeypatch.setattr(script, "KEYS", (200,))
    monkeypatch.setattr(script, "EFFORT", Effort(repeats=1, seconds=1))
    done = run(script.main, "--json", str(tmp_path / "rows.json"))
    assert done.exit_code == 0, done.output
    rows = read_rows(tmp_path / "rows.json")
    assert [row["config"] for row in rows[:-2]] == list(script.CONFIGS)
    assert all(row["error"] == 0 if row["cost"] == 1 else 0 < row["error"] < 4 for row in rows[:-2])
    assert script.format_errors(rows).count("\n") == 1 + len(script.CONFIGS)
    assert script.format_times(rows).splitlines()[0] == "| | 200 keys |"


def test_only_calls_of_other_keys_are_noted() -> None:
    x, y = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8)
    with script.Noting() as noting:
        F.scaled_dot_product_attention(x, x, x)
        F.scaled_dot_product_attention(x, y, y)
    assert [tuple(len(each[0, 0]) for each in call) for call in noting.calls] == [(5, 9, 9)]


def test_the_calls_are_those_of_the_decoder(data_dir: Path) -> None:
    calls = script.collect_calls()
    assert len(calls) == 4 * 7
    assert all(query.shape[2] > 300 and key.shape[2] == 1500 for query, key, _ in calls)


def test_the_committed_rows_are_those_of_the_script() -> None:
    rows = read_rows(summary.RESULTS / "cross_attention.json")
    errors = {row["config"]: row["error"] for row in rows if "config" in row}
    assert list(errors) == list(script.CONFIGS)
    assert errors["default"] < errors["fast"] < errors["no far field"]
    timed = [(row["queries"], row["keys"]) for row in rows if "times SDPA" in row]
    assert timed == [(queries, keys) for queries in script.QUERIES for keys in script.KEYS]
