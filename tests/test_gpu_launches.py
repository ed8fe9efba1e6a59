"""Launches of our kernels, and how many variants of each the lengths of sequences compile, without a GPU.

Of a thousand lengths by `python -m tests.gpu_launches`, which takes minutes; here of fewer.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

MOST_VARIANTS = 12
# Of our kernels, at 4,096 tokens.
LAUNCHES = {
    "static forward": 3,
    "static backward": 2,
    "causal forward": 3,
    "causal backward": 7,
    "causal step": 1,
    "near + far forward": 9,
    "near + far backward": 6,
    "streaming, a text": 1,
    "streaming step": 1,
}


def run(option: str) -> dict[str, Any]:
    """In a process of its own, where kernels are not those of the interpreter."""
    command = [sys.executable, "-m", "tests.gpu_launches", option]
    result = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    return run("150")


@pytest.mark.slow
def test_launches(counted: dict[str, Any]) -> None:
    plain, padded = counted.values()
    assert {name: len(kernels) for name, kernels in plain["launches"].items()} == LAUNCHES
    two_lengths = {name: number * (1 + name.startswith("near")) for name, number in LAUNCHES.items()}
    assert {name: len(kernels) for name, kernels in padded["launches"].items()} == two_lengths


def test_second_calls_launch_what_triton_would_find() -> None:
    """All but near + far, whose launches are few beside what PyTorch does; the script compares what they launch."""
    for found in run("8").values():
        planned = {name: 0 if name.startswith("near") else number for name, number in LAUNCHES.items()}
        assert found["planned"] == planned


def test_python_before_launches_is_timed() -> None:
    times = run("--time")
    assert {name for name in LAUNCHES if not name.startswith("near")} >= times.keys()
    assert all(each["planned"] > 0 and each["searched"] > 0 for each in times.values())


@pytest.mark.slow
def test_lengths_compile_few_variants(counted: dict[str, Any]) -> None:
    for kind, found in counted.items():
        for kernel, variants in found["variants"].items():
            assert variants <= MOST_VARIANTS, (kind, kernel)
