"""A list of what can be run in eval/, with the first line of each docstring: `python -m eval`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent
STARTS = 'if __name__ == "__main__":'


def find_scripts() -> Iterator[tuple[str, str]]:
    """The name after `python -m` and the first line of the docstring of all that can be run."""
    for path in sorted(FOLDER.rglob("*.py")):
        if path == Path(__file__) or STARTS not in path.read_text("utf-8"):
            continue
        name = ".".join(("eval", *path.relative_to(FOLDER).with_suffix("").parts)).removesuffix(".__main__")
        told = [_first_line(path)]
        if path.name == "__main__.py":
            told.append(_first_line(path.with_name("__init__.py")))
        yield name, next(line for line in told if line and not line.startswith("python -m"))


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").partition("\n")[0]


def main() -> None:
    """Print the scripts; each tells more with --help and in its docstring."""
    found = dict(find_scripts())
    for name, line in found.items():
        print(f"python -m {name:<{max(map(len, found))}}  {line}")


if __name__ == "__main__":
    main()
