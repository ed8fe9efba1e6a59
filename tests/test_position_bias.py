"""The made-up biases are what they are called, and the script measures the default with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scripts import run
from transformers.models.t5.modeling_t5 import T5Attention

from eval import position_bias as script
from eval import summary
from eval.benchmark.timing import Effort
from eval.common import read_rows


def make(bias: script.Bias, heads: int, tokens: int) -> torch.Tensor:
    return bias(heads, tokens, torch.Generator().manual_seed(0))


def test_buckets_are_those_of_t5() -> None:
    """Pairs of tokens have the same number just where T5 puts them into the same bucket."""
    distance = torch.arange(200) - torch.arange(200)[:, None]
    theirs = T5Attention._relative_position_bucket(distance, num_buckets=2 * script.BUCKETS)
    for ours in make(script.make_buckets, 2, 200):
        pairs = set(zip(theirs.flatten().tolist(), ours.flatten().tolist(), strict=True))
        assert len(pairs) == len(ours.unique()) == len(theirs.unique())


def test_slopes_fall_with_the_distance() -> None:
    ours = make(script.make_slopes, 8, 5)
    assert ours[0, 2].tolist() == [-1, -0.5, 0, -0.5, -1]
    assert ours[7, 0, 4] == -4 / 256


def test_a_table_knows_offsets_alone() -> None:
    ours = make(script.make_table, 2, 1 + 5 * 5)
    assert not ours[:, 0].any()
    assert not ours[:, :, 0].any()
    patches = ours[:, 1:, 1:].view(2, 5, 5, 5, 5)  # [head, row, column, row of the key, column of the key]
    assert torch.equal(patches[:, 0, 1, 2, 3], patches[:, 1, 0, 3, 2])
    assert not torch.equal(patches[:, 0, 1, 2, 3], patches[:, 0, 1, 3, 2])


def test_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "MODELS", {"digits": ("none", "table")})
    monkeypatch.setattr(script, "LENGTHS", (40,))
    monkeypatch.setattr(script, "EFFORT", Effort(repeats=1, seconds=1))
    done = run(script.main, "--json", str(tmp_path / "rows.json"))
    assert done.exit_code == 0, done.output
    none, table, times = read_rows(tmp_path / "rows.json")
    assert (none["bias"], table["bias"], times["tokens"]) == ("none", "table", 40)
    assert none["without it"] is None
    assert 0 < none["error"] < 0.5
    assert table["error"] < table["without it"]
    assert times["times SDPA"]["median"] > 0


def test_the_committed_rows_are_those_of_the_script() -> None:
    rows = read_rows(summary.RESULTS / "position_bias.json")
    assert [row["bias"] for row in rows if "model" in row] == [
        kind for kinds in script.MODELS.values() for kind in kinds
    ]
    assert [row["tokens"] for row in rows if "tokens" in row] == list(script.LENGTHS)
    assert all(row["error"] < row["without it"] / 4 for row in rows if row.get("without it"))
