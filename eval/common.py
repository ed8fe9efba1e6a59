"""What every script of this folder shares: its options, and how a result is written.

A script is run as `python -m eval.NAME [--json FILE] [--figure FILE] [--limit N] [--seed S]`. It has
`measure() -> rows` (a list of dicts of plain values), `plot(rows) -> Figure` and `main()`, which takes the options
below and is run by `typer.run(main)`.
"""

from __future__ import annotations

import json
import re
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from astroattn.fidelity.environment import describe_device, describe_versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the rows and what they depend on to this file.")]
FigureOption = Annotated[Path | None, typer.Option("--figure", help="Draw the figure into this file (PNG, PDF, SVG).")]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="Use at most this many examples.")]
SeedsOption = Annotated[int, typer.Option("--seeds", min=1, help="Number of seeds: 0, 1, ...")]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn.")]


def provenance(seed: int, device: str = "cpu") -> dict[str, Any]:
    """What a figure depends on besides the code: command, seed, versions and device, as plain values."""
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "seed": seed,
        "versions": describe_versions(),
        "device": describe_device(torch.device(device)),
    }


def rounded(value: Any) -> Any:
    """The same with floats of five significant digits, in lists and dicts too."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value


def write_json(path: Path, rows: list[dict[str, Any]], *, seed: int, device: str = "cpu") -> None:
    """Write `{"rows": rows, **provenance(seed, device)}`, making the folder where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": rows, **provenance(seed, device)}, indent=2) + "\n", encoding="utf-8")


def write_figure(path: Path, figure: Figure) -> None:
    """Save a figure, making the folder where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def fill_marks(page: str, texts: Mapping[str, str]) -> str:
    """The page with each text between its two marks, `<!-- NAME -->` and `<!-- end -->`."""
    for name, text in texts.items():
        parts = re.split(rf"(?<=<!-- {name} -->\n).*?(?=\n<!-- end -->)", page, flags=re.DOTALL)
        if len(parts) != 2:
            raise ValueError(f"page: it has {len(parts) - 1} places for {name!r}; one is needed")
        page = text.join(parts)
    return page


def relative_error(found: Tensor, truth: Tensor) -> float:
    """||found - truth|| / ||truth||, in float64."""
    found, truth = found.double(), truth.double()
    return ((found - truth).norm() / truth.norm()).item()


def summarise_seeds(rows: Sequence[dict[str, Any]], measures: Sequence[str]) -> dict[str, Any]:
    """The rows of several seeds as one: mean seconds and measures, these with standard deviations; 0 for one seed."""
    summary = dict(rows[0]) | {"seconds": statistics.mean(row["seconds"] for row in rows)}
    for name in measures:
        values = [row[name] for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        summary |= {name: statistics.mean(values), f"{name}_spread": spread}
    return rounded(summary)


def print_rows(rows: list[dict[str, Any]], *, title: str) -> None:
    """Print rows as a table with one column per key of the first row; floats get four digits."""
    table = Table(title=title, title_justify="left")
    for name, value in rows[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name]) for name in rows[0]))
    Console().print(table)
