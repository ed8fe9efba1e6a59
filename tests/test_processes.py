"""Two processes on a CPU (gloo) with DDP and FSDP: the gradients and the run of one, and nothing is counted twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def launch(folder: Path, processes: int, hidden: str) -> dict[str, Any]:
    """What `process_run.py` writes, in so many processes."""
    file = folder / f"{processes}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    if processes == 1:
        command = [sys.executable]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, "tests/process_run.py", str(file), hidden],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    content: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return content


@pytest.fixture(scope="module", params=["hebbian", "learned"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """The same work in one process and in two."""
    folder = tmp_path_factory.mktemp(request.param)
    one, two = (launch(folder, processes, request.param) for processes in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert (two["model"], two["sharded"]) == ("DistributedDataParallel", "DTensor")
    return one, two


@pytest.mark.parametrize("kind", ["gradients", "sharded_gradients"])
def test_gradients_are_those_of_one_process(runs: tuple[dict, dict], kind: str) -> None:
    one, two = runs[0]["gradients"], runs[1][kind]
    assert one.keys() == two.keys()
    for name, expected in one.items():
        assert max(map(abs, expected)) > 0, name
        scale = max(map(abs, expected))
        assert two[name] == pytest.approx(expected, rel=1e-4, abs=1e-5 * scale), name


def test_evaluation_counts_every_item_once(runs: tuple[dict, dict]) -> None:
    one, two = (run["evaluation"] for run in runs)
    assert one["items"] == two["items"] == 21
    assert two["accuracy"] == one["accuracy"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_a_run_ends_as_in_one_process_and_resumes(runs: tuple[dict, dict]) -> None:
    one, two = (run["result"] for run in runs)
    for key in ("train_loss", "validation_loss"):
        assert [row[key] for row in two["log"]] == pytest.approx([row[key] for row in one["log"]], rel=1e-3)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
    assert runs[1]["resumed"]["loss"] == pytest.approx(two["loss"], rel=1e-6)
