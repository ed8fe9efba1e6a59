"""Running the scripts of eval/ as their users do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.testing import CliRunner


def run(main: Callable[..., Any], *arguments: str) -> Any:
    """What a script's `main` does with these words of a command line: exit code and output."""
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)
