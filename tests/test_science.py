"""docs/science.md against the code and the committed results it speaks of."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "science.md").read_text("utf-8")


def test_every_equation_stands_beside_its_line_of_code() -> None:
    section = TEXT.split("## The equations")[1].split("\n## ")[0]
    rows = re.findall(r"^\|.*\| `(.+)` \| (\S+\.py) \|$", section, re.MULTILINE)
    assert len(rows) == section.count(".py |") >= 20
    for code, where in rows:
        lines = [line.strip() for line in (ROOT / where).read_text("utf-8").splitlines()]
        assert code in lines, f"{where} has no line {code!r}"


def test_links_commands_and_tests_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / "docs" / target).is_file(), target
    for module in re.findall(r"python -m (eval\.\w+)", TEXT):
        assert importlib.util.find_spec(module), module
    for path in re.findall(r"`(?:python )?((?:tests|examples)/\w+\.py)`", TEXT):
        assert (ROOT / path).is_file(), path
