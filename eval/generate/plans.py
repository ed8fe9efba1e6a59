"""Budgets of their own for the key heads of each decoder, chosen on texts that no table is of.

For each number of entries a plan with so many in the mean, by `astroattn.calibrate`, written to
docs/results/generate_plans. `python -m eval.generate` reads them.

    python -m eval.generate.plans
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import astroattn
from astroattn import Plan
from eval.common import run_script
from eval.generate.subjects import LOADERS

FOLDER = Path(__file__).parent.parent.parent / "docs" / "results" / "generate_plans"


def load_plan(name: str, entries: int) -> Plan:
    """The plan of a model for so many entries in the mean.

    Raises:
        ValueError: there is none.
    """
    return Plan.load(FOLDER / _file(name, entries))


def _file(name: str, entries: int) -> str:
    return f"{name}_{entries}.json"


def main(
    models: Annotated[list[str] | None, typer.Option("--model", help=f"Of {', '.join(LOADERS)}; all if none.")] = None,
    entries: Annotated[list[int] | None, typer.Option(help="Budgets in place of the model's own.")] = None,
    folder: Annotated[Path, typer.Option(help="Where the plans are written.")] = FOLDER,
) -> None:
    """Choose plans and write them."""
    for name in models or LOADERS:
        if name not in LOADERS:
            raise typer.BadParameter(f"{name!r}; must be one of {', '.join(LOADERS)}", param_hint="--model")
        if (subject := LOADERS[name]()) is None:
            Console().print(f"{name}: not here; the docstring of eval/generate/subjects.py says where it comes from")
            continue
        folder.mkdir(parents=True, exist_ok=True)
        batches = [{"input_ids": text} for text in subject.samples()]
        with tempfile.TemporaryDirectory() as temporary:
            for number in entries or subject.budgets:
                state = Path(temporary) / "measured.safetensors"  # by the first for all
                plan = astroattn.calibrate(subject.model, batches, entries=number, state=state)
                plan.save(folder / _file(subject.name, number))
                print(plan)


if __name__ == "__main__":
    run_script(main, data=True)
