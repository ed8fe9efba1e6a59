"""What a short time on a GPU is for: whether the Triton kernels are right there, and how fast.

Every stage is a process of its own with a limit of its own, so that one that crashes or hangs costs what it was given
and no more; what it printed last is kept. The stages are the tests that need a GPU, kernel by kernel, then the
benchmark's, the shortest first. What the benchmark measured until it was stopped is in the JSON.

    python -m eval.gpu_check --json docs/results/gpu/NAME.json --minutes 8
"""

from __future__ import annotations

import json as json_format
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from tqdm import tqdm

from eval.common import JsonOption, print_rows, rounded, run_script, write_json

ROOT = Path(__file__).parents[1]
TAIL = 2000  # characters of a stage's output that are kept
# Most of their time the compiler takes, so several processes share the GPU.
TESTS = ("pytest", "-m", "gpu", "-q", "-n", "8", "-p", "no:cacheprovider")
BENCHMARK = ("eval.benchmark", "--device", "cuda", "--repeats", "10", "--seconds", "0.5")
OURS = (*BENCHMARK, "--no-peers")
PEERS = (*BENCHMARK, "--only", "attention", "--limit", "16384", "--no-backward")


class Stage(NamedTuple):
    """Arguments of `python -m`, and the seconds it may take. `measures`: it writes rows to the file of `--json`."""

    arguments: tuple[str, ...]
    seconds: float
    measures: bool = False


STAGES = {
    "near + far kernels": Stage((*TESTS, "tests/test_kernels_near_far.py", "tests/test_kernels_choosing.py"), 90),
    "static kernels": Stage((*TESTS, "tests/test_kernels_static.py"), 90),
    "causal kernels": Stage((*TESTS, "tests/test_kernels_causal.py"), 90),
    "streaming kernels": Stage((*TESTS, "tests/test_kernels_streaming.py"), 90),
    "operators": Stage((*TESTS, "tests/test_library.py"), 90),
    "whole models in CUDA graphs": Stage((*TESTS, "tests/test_cuda_graphs.py"), 90),
    "attention to 4,096": Stage((*OURS, "--only", "attention", "--limit", "4096"), 90, measures=True),
    "attention to 65,536": Stage((*OURS, "--only", "attention", "--limit", "65536"), 120, measures=True),
    "models": Stage((*BENCHMARK, "--only", "models"), 120, measures=True),
    "peers to 16,384": Stage(PEERS, 120, measures=True),
}


def check(stages: Mapping[str, Stage], seconds: float, folder: Path) -> list[dict[str, Any]]:
    """Run the stages in turn, all of them within so many seconds: one row each, and the rows that they measured."""
    end = perf_counter() + seconds
    rows = []
    for number, (name, stage) in enumerate(tqdm(stages.items(), "checking", unit="stage", leave=False)):
        start = perf_counter()
        left = min(stage.seconds, end - start)
        row: dict[str, Any] = {"stage": name, "result": "no time was left", "seconds": 0.0, "output": "", "rows": []}
        if left > 0:
            results = folder / f"{number}.json"
            row["result"], row["output"] = run(stage, left, results)
            row["seconds"] = perf_counter() - start
            if results.exists():
                row["rows"] = json_format.loads(results.read_text("utf-8"))["rows"]
        rows.append(rounded(row))
    return rows


def run(stage: Stage, seconds: float, results: Path) -> tuple[str, str]:
    """The result of one stage in words, and the end of what it printed."""
    command = [sys.executable, "-m", *stage.arguments, *(("--json", str(results)) if stage.measures else ())]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes of its own, which would keep the GPU
            output, _ = process.communicate()
            return f"stopped after {seconds:.0f} s", _end(output)
    return "ok" if process.returncode == 0 else f"failed with exit status {process.returncode}", _end(output)


def _end(output: bytes) -> str:
    return output.decode("utf-8", "replace")[-TAIL:]


def main(
    json: JsonOption = None,
    minutes: Annotated[float, typer.Option(min=0, help="For all stages together.")] = 8.0,
) -> None:
    """Run the tests and the benchmark that need a GPU, within a few minutes; exits with 1 where a stage did not end."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device here; without one, python -m tests.gpu_compile compiles them")
    with tempfile.TemporaryDirectory() as folder:
        rows = check(STAGES, 60 * minutes, Path(folder))
    print_rows([{name: row[name] for name in ("stage", "result", "seconds")} for row in rows], title="On this GPU")
    for row in rows:
        if row["result"] != "ok":
            Console().print(f"{row['stage']}: {row['result']}\n{row['output']}", markup=False)
    if json:
        write_json(json, rows, seed=0, device="cuda")
    if any(row["result"] != "ok" for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    run_script(main)
