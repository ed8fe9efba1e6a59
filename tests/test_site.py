"""The documentation: the site builds, its pages quote what is there, and every block of Python in them runs."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eval import overview
from eval.common import fill_marks

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# A block that is shown, or one in a comment: what those that are shown need beforehand.
BLOCK = re.compile(
    r"(?P<skip><!-- not run: [^>]+ -->\s*\n)?^```python(?: exec=[^\n]+)?\n(?P<shown>.*?)^```"
    r"|^<!-- python\n(?P<given>.*?)^-->",
    re.MULTILINE | re.DOTALL,
)
PAGES = [page for page in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))] if "```python" in page.read_text("utf-8")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order and in one namespace, all but those that follow `<!-- not run: REASON -->`."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text("utf-8")
    namespace = {"__name__": "page"}
    blocks = [match for match in BLOCK.finditer(text) if not match["skip"]]
    assert any(match["shown"] for match in blocks)
    with torch.random.fork_rng():
        for match in blocks:
            group = "shown" if match["shown"] else "given"
            lines = "\n" * text.count("\n", 0, match.start(group))  # so that an error names the line of the page
            exec(compile(lines + match[group], page, "exec"), namespace)


def test_site_is_whole_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    """Built without a network, from a copy, as the builder writes beside its pages; `test_blocks_run` runs them."""
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    offline = {f"{name}_proxy": "http://127.0.0.1:9" for name in ("http", "https", "HTTP", "HTTPS")}
    environment = {**os.environ, **offline, "PYTHONPATH": str(ROOT), "RUN_EXAMPLES": "false"}
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "site"
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).with_suffix("")
        built = site / "index.html" if name.stem == "index" else site / name / "index.html"
        html = built.read_text("utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]+src=\"?([^\" >]+)|<link[^>]+href=\"?([^\" >]+)", html)
        assert not [url for pair in loaded for url in pair if re.match(r"(?:https?:)?//", url)], name
    html = (site / "api" / "patch" / "index.html").read_text("utf-8")
    assert 'doc-section-title">Parameters' in html
    assert 'doc-section-title">Raises' in html


def test_pages_hold_what_was_measured() -> None:
    for page, texts in overview.texts().items():
        text = page.read_text("utf-8")
        assert fill_marks(text, texts) == text, "python -m eval.overview writes it anew"


def said() -> list[str]:
    """The texts of the library's source, `...` where they have values put in."""
    texts = []
    for path in (ROOT / "astroattn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                texts.append("".join(each.value if isinstance(each, ast.Constant) else "..." for each in node.values))
    return texts


def test_messages_are_quoted_as_the_source_has_them() -> None:
    texts = said()
    quoted = re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text("utf-8"), re.MULTILINE)
    assert len(quoted) > 50
    assert not [quote for quote in quoted if not any(quote in text for text in texts)]
