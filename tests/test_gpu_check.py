"""The check of a GPU: stages that fail, hang or find no time left, and what is kept of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import typer

from eval import gpu_check
from eval.benchmark import __main__ as benchmark
from eval.gpu_check import ROOT, STAGES, Stage, check


def test_a_stage_that_hangs_or_fails_does_not_end_the_run(tmp_path: Path) -> None:
    stages = {
        "fine": Stage(("platform",), 60),
        "fails": Stage(("no_such_module",), 60),
        "hangs": Stage(("http.server", "0"), 1),
        "never starts": Stage(("platform",), 0),
    }
    fine, fails, hangs, never = check(stages, 120, tmp_path)
    assert fine["result"] == "ok"
    assert fine["output"]
    assert fails["result"] == "failed with exit status 1"
    assert "no_such_module" in fails["output"]
    assert hangs["result"] == "stopped after 1 s"
    assert never["result"] == "no time was left"


def test_all_stages_keep_to_the_time(tmp_path: Path) -> None:
    assert [row["result"] for row in check({"hangs": Stage(("http.server", "0"), 60)}, 1, tmp_path)] == [
        "stopped after 1 s"
    ]


def test_what_a_stage_measured_is_kept(tmp_path: Path) -> None:
    """As far as it came: the benchmark writes its rows as it measures them."""
    (tmp_path / "0.json").write_text('{"rows": [{"part": "settings"}]}')
    (row,) = check({"hangs": Stage(("http.server", "0"), 1)}, 60, tmp_path)
    assert row["rows"] == [{"part": "settings"}]


def test_the_benchmark_takes_what_its_stages_pass() -> None:
    app = typer.Typer()
    app.command()(benchmark.main)
    for name, stage in STAGES.items():
        assert stage.measures == (stage.arguments[0] == "eval.benchmark"), name
        if stage.measures:
            arguments = [*stage.arguments[1:], "--json", "out.json"]
            command = typer.main.get_command(app)
            assert command.make_context(name, arguments).params["json"] == Path("out.json")


def test_the_stages_name_what_there_is() -> None:
    for stage in STAGES.values():
        assert all((ROOT / path).exists() for path in stage.arguments if re.match("tests/", path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(typer.BadParameter, match="no CUDA device here"):
        gpu_check.main()
