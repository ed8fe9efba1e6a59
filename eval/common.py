"""What every script of this folder shares: its options, and how a result is written.

A script is run as `python -m eval.NAME [--json FILE] [--figure FILE] [--limit N] [--seed S]`. It has
`measure() -> rows` (a list of dicts of plain values), `plot(rows) -> Figure` and `main()`, which takes the options
below and is run by `run_script(main)`, or `run_script(main, data=True)` where it reads what `data_folder` names.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import Tensor

from astroattn import files
from astroattn.fidelity.environment import describe_device, describe_versions
from astroattn.tables import Table, terminal_width

if TYPE_CHECKING:
    from matplotlib.figure import Figure

JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the rows and what they depend on to this file.")]
FigureOption = Annotated[Path | None, typer.Option("--figure", help="Draw the figure into this file (PNG, PDF, SVG).")]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="Use at most this many examples.")]
SeedsOption = Annotated[int, typer.Option("--seeds", min=1, help="Number of seeds: 0, 1, ...")]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn.")]
DATA = "ASTROATTN_DATA"
DATA_HELP = f"The environment variable {DATA} names the folder with real models and data that this script reads."


def run_script(main: Callable[..., Any], *, data: bool = False) -> None:
    """Run a script on the command line; input that cannot be used ends in one line on stderr and exit code 2."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(epilog=DATA_HELP if data else None)(main)
    try:
        app()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def data_folder() -> Path | None:
    """The folder that ASTROATTN_DATA names, or None where it is not set."""
    folder = os.environ.get(DATA)
    return Path(folder) if folder else None


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
    files.write_json(path, {"rows": rows, **provenance(seed, device)}, indent=2)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that `write_json` has written to this file, none where it is missing."""
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def write_figure(path: Path, figure: Figure) -> None:
    """Save a figure, making the folder where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as part:
        figure.savefig(part, dpi=150, bbox_inches="tight")


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
    """The rows of several seeds as one: mean seconds and measures, these with standard deviations (see `spread`)."""
    summary = dict(rows[0]) | {"seconds": statistics.mean(row["seconds"] for row in rows)}
    for name in measures:
        values = [row[name] for row in rows]
        summary |= {name: statistics.mean(values), f"{name}_spread": spread(values)}
    return rounded(summary)


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation; None of a single value, which has none."""
    return statistics.stdev(values) if len(values) > 1 else None


def show(value: float | None, form: str) -> str:
    """A number in this format, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def print_rows(rows: list[dict[str, Any]], *, title: str) -> None:
    """Print rows as a table with one column per key of the first row; floats get four digits, None a dash."""
    cells = [[_cell(row[name]) for name in rows[0]] for row in rows]
    print(Table(list(rows[0]), cells, title=title).text(terminal_width()))


def _cell(value: Any) -> str:
    if value is None or isinstance(value, float):
        return show(value, ".4g")
    return str(value)
