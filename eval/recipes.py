"""The measured block of every recipe: each of its commands is run again, and what came out is written into its file.

`data` in a command stands for the folder that ASTROATTN_DATA names. A recipe that was never measured is measured on the
odd half of photos, texts or recordings where its model can be loaded. What cannot be loaded or run is said, and its
file left as it is: what was measured elsewhere stays, with its date and versions, and the others say "not measured
here".

    python -m eval.recipes                   # all: hours on two cores
    python -m eval.recipes minilm whisper_tiny_en
    python -m eval.recipes --no-run          # only write what the results in docs/results say
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from astroattn import cli, files
from astroattn.fidelity.metrics import METRICS
from astroattn.recipes import NOT_MEASURED, Measurement, Recipe, load_recipe
from astroattn.suggestions import suggest
from eval.common import data_folder, run_script
from eval.summary import PHOTOS, SPEECH, TEXTS

ROOT = Path(__file__).parent.parent
DATA = "data"  # in a command: the folder that ASTROATTN_DATA names
SOURCES = {"image": f"{DATA}/imagenet_photos/photos.tar", "audio": f"{DATA}/speech", "text": "python-docs"}
QUOTED = (SPEECH, PHOTOS, ("top1_agreement", "kl"), TEXTS)  # the first of which a result has all
COSTS = ("positions", "cost", "time")
VERSIONS = ("python", "astroattn", "torch", "transformers", "timm")


def find_commands(path: Path) -> list[str]:
    """The commands that measure a recipe: those in its file, or, where there are none, one that would.

    Raises:
        ValueError: its model cannot be loaded here, and no command is there.
    """
    recipe = load_recipe(path)
    if recipe.measured:
        return [measurement.command for measurement in recipe.measured]
    source = recipe.data.source or SOURCES[recipe.load().kind]
    return [f"astroattn compare patches/{path.name} --data {source} --half odd --json docs/results/{path.stem}.json"]


def result_of(command: str) -> Path:
    """Where a command writes its result. Raises ValueError where it does not say."""
    found = re.search(r"--json (\S+\.json)", command)
    if found is None:
        raise ValueError(f"measured: {command!r} says no --json")
    return ROOT / found[1]


def run(command: str) -> None:
    """Run a command of the command line; its result says it as it stands here.

    Raises:
        ValueError: it needs a folder that ASTROATTN_DATA does not name, or it failed; what it said is on stderr.
    """
    words = shlex.split(command)[1:]
    if any(word.startswith(f"{DATA}/") for word in words):
        folder = data_folder()
        if folder is None:
            raise ValueError("ASTROATTN_DATA is not set")
        folder = folder.resolve()
        words = [str(folder / word.removeprefix(f"{DATA}/")) if word.startswith(f"{DATA}/") else word for word in words]
    with contextlib.chdir(ROOT):
        try:
            cli.main([*words, "--force"])
        except SystemExit as ended:
            if ended.code:
                raise ValueError(f"exit code {ended.code} of {command}") from None
    path = result_of(command)
    result = json.loads(path.read_text(encoding="utf-8"))
    result["environment"]["command"] = command
    files.write_json(path, result)


def quote(command: str, library: str) -> Measurement:
    """What the result of a command says. Raises ValueError where it has no figures that are quoted."""
    result = json.loads(result_of(command).read_text(encoding="utf-8"))
    patched, original = (
        {name: value["value"] for name, value in result["rows"][row]["values"].items()}
        for row in ("patched", "original")
    )
    patched["time"] = patched["seconds"] / original["seconds"]
    names = next((names for names in QUOTED if set(names) <= patched.keys()), None)
    if names is None:
        raise ValueError(f"{result_of(command).name}: none of {QUOTED} are all in it")
    versions = result["environment"]["versions"]
    others = {"transformers", "timm"} - {library}
    return Measurement(
        command=command,
        data=f"{result['items']} items of {result['data']}",
        date=result["environment"]["date"][:10],
        versions={name: versions[name] for name in VERSIONS if name not in others},
        values={name: round(patched[name], 4) for name in (*names, *COSTS)},
    )


def rewrite(text: str, measured: Sequence[Measurement]) -> str:
    """The text of a recipe's file with this measured block, everything else as it is."""
    head = text.partition("\n[[measured]]")[0].rstrip() + "\n"
    head = head.replace(f'measured = "{NOT_MEASURED}"\n', "")
    if not measured:
        top, bracket, rest = head.partition("\n[")
        return f'{top.rstrip()}\nmeasured = "{NOT_MEASURED}"\n{bracket}{rest}'
    return head + "".join(f"\n{_format(each)}" for each in measured)


def _format(measurement: Measurement) -> str:
    values = ", ".join(f"{name} = {value:.4f}" for name, value in measurement.values.items())
    versions = ", ".join(f'{name} = "{version}"' for name, version in measurement.versions.items())
    texts = {name: json.dumps(getattr(measurement, name), ensure_ascii=False) for name in ("command", "data", "date")}
    lines = ["[[measured]]", *(f"{name} = {text}" for name, text in texts.items())]
    lines += [f"versions = {{ {versions} }}", f"values = {{ {values} }}"]
    return "\n".join(lines) + "\n"


def show(recipe: Recipe) -> str:
    """What is measured of a recipe, a line for each command."""
    lines = []
    for each in recipe.measured:
        figures = [f"{METRICS[name].label} {METRICS[name].form.format(value)}" for name, value in each.values.items()]
        lines.append(f"  {each.date}: {', '.join(figures)}")
    return "\n".join(lines) or f"  {NOT_MEASURED}"


def update(path: Path, measure: Callable[[str], None] | None) -> None:
    """Measure a recipe, unless `measure` is None, and write its file.

    Raises:
        ValueError: something cannot be loaded or measured; then the file is as it was.
    """
    recipe = load_recipe(path)
    commands = [each.command for each in recipe.measured] if measure is None else find_commands(path)
    for command in commands if measure else ():
        measure(command)
    text = rewrite(path.read_text(encoding="utf-8"), [quote(command, recipe.library) for command in commands])
    with files.replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def main(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME ...]", help="Recipes; by default all.")] = None,
    no_run: Annotated[bool, typer.Option("--no-run", help="Run nothing; write what the results say.")] = False,
) -> None:
    """Measure recipes again and write it into their files."""
    known = {path.stem: path for path in sorted((ROOT / "patches").glob("*.toml"))}
    for name in names or ():
        if name not in known:
            raise ValueError(f"name: there is no recipe {name!r}{suggest(name, known)}")
    left: dict[str, str] = {}
    for name in names or known:
        try:
            update(known[name], None if no_run else run)
        except (ValueError, OSError, ImportError) as error:
            left[name] = str(error)
        print(f"{name}\n{show(load_recipe(known[name]))}")
    if left:
        print("\nleft as they were:")
        for name, reason in left.items():
            print(f"  {name}: {reason}")


if __name__ == "__main__":
    run_script(main, data=True)
