"""The command line: `astroattn patch`, `compare`, `report`, `calibrate`, `info`, `recipes`.

Commands import what they need themselves, so that help and errors of usage come at once.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import astroattn
from astroattn.choices import DTYPES, FIGURES, POOLINGS, PYTHON_DOCS, TOLERANCES
from astroattn.config import HIDDEN, PRESETS, TILES, AstroConfig
from astroattn.files import check_output, write_json
from astroattn.plan import METRICS, Plan
from astroattn.tables import Block, Table, render, render_markdown, terminal_width


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Run a command; whoever interrupts it knows why it ends, and needs no traceback."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("astroattn: interrupted", file=sys.stderr)
            raise typer.Exit(130) from None


class Format(StrEnum):
    """How a result is printed."""

    table = "table"
    markdown = "markdown"
    json = "json"


OUTPUTS = {"figure": FIGURES, "report": (".html",), "page": (".html",), "items": (".parquet",)}  # others are JSON

app = typer.Typer(
    cls=_Commands,
    help="Replace the self-attention of pretrained models by neuron-astrocyte networks, and see what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|RECIPE",
        help="A transformers id or folder, timm:NAME, package:NAME (a Python package with a model in it), or a recipe:"
        " a .toml file, or a name that `astroattn recipes` lists.",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="Weights of a timm: model, a .safetensors file; of an id on the hub, a local folder of that model."
    ),
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: cuda where there is one.")]
Dtype = Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")]
Size = Annotated[int | None, typer.Option(min=1, help="Pixels per side of the photos; position embeddings follow.")]
Layers = Annotated[
    str | None, typer.Option(help="Which attention modules: all, indices as in 0-5,8, or a name pattern as in '*.3.*'.")
]
PresetWord = Annotated[
    str | None, typer.Option("--preset", help=f"Settings by a word: {', '.join(PRESETS)}; other options refine them.")
]
Hidden = Annotated[str | None, typer.Option(help=f"Hidden layer: {', '.join(HIDDEN)}.")]
NumHidden = Annotated[int | None, typer.Option(help="Hidden neurons per head (m); -1: by the length.")]
Near = Annotated[int | None, typer.Option(help="Near field of a query in tokens; 0 for none, -1: by the length.")]
ExactKeys = Annotated[int | None, typer.Option(help="Keys attended exactly, beyond the near field; -1: by the length.")]
Tiles = Annotated[str | None, typer.Option(help=f"What a tile of queries shares: {' or '.join(TILES)}.")]
Tile = Annotated[int | None, typer.Option(help="Queries per tile; -1: by the length.")]
Entries = Annotated[int | None, typer.Option(help="Keys and values that a streaming memory keeps, per key head.")]


def _settings(
    others: list[str] | None,
    hidden: str | None,
    num_hidden: int | None,
    near: int | None,
    exact_keys: int | None,
    tiles: str | None,
    tile: int | None,
    entries: int | None,
    seed: int | None,
) -> dict[str, str | int | float | None]:
    from astroattn.recipes import parse_setting

    found: dict[str, str | int | float | None] = {}
    for text in others or []:
        name, values = parse_setting(text)
        if len(values) > 1:
            raise ValueError(f"set: {text!r} has {len(values)} values; --sweep compares several")
        found[name] = values[0]
    named = {
        "hidden": hidden,
        "num_hidden": num_hidden,
        "near": near,
        "exact_keys": exact_keys,
        "tiles": tiles,
        "tile": tile,
        "entries": entries,
        "seed": seed,
    }
    return found | {name: value for name, value in named.items() if value is not None}


_OPTIONS = inspect.signature(_settings).parameters  # the settings that have an option of their own
Others = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any other setting, one or several times: "
        + ", ".join(
            f"{field.name} ({field.default})" for field in dataclasses.fields(AstroConfig) if field.name not in _OPTIONS
        )
        + ".",
    ),
]
DataSource = Annotated[
    str | None,
    typer.Option(
        help="Photos: a folder, class/photo folders, or a .tar. Texts: a text file, CSV or TSV, a folder of .txt,"
        f" or {PYTHON_DOCS}. Speech: a folder of .wav, with a transcripts.tsv if there is one. All:"
        " datasets:NAME or datasets:NAME:SPLIT."
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Most items.")]
Half = Annotated[str | None, typer.Option(help="even or odd: every second item only.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Items per batch.")]
Tokens = Annotated[int | None, typer.Option(help="Cut long texts into chunks of so many tokens; 0: do not cut.")]
Classes = Annotated[
    Path | None, typer.Option(help="List of classes (index, wnid, name); classes.tsv beside photos is found.")
]
Pooling = Annotated[str | None, typer.Option(help=f"Embedding: {', '.join(POOLINGS)}.")]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="What every head does: a .json that calibrate wrote.")]
Seed = Annotated[int | None, typer.Option(help="Of random hidden layers and of the intervals.")]
Form = Annotated[Format, typer.Option("--format", help="How the result is printed.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print the result alone, no progress.")]
Force = Annotated[bool, typer.Option("--force", help="Write over files that are there already.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(astroattn.__version__)
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command("patch")
def patch_model(
    model: Model,
    weights: Weights = None,
    json_path: Json = None,
    device: Device = None,
    dtype: Dtype = "float32",
    size: Size = None,
    layers: Layers = None,
    plan: PlanFile = None,
    preset: PresetWord = None,
    hidden: Hidden = None,
    num_hidden: NumHidden = None,
    near: Near = None,
    exact_keys: ExactKeys = None,
    tiles: Tiles = None,
    tile: Tile = None,
    entries: Entries = None,
    others: Others = None,
    seed: Seed = None,
    form: Form = Format.table,
    quiet: Quiet = False,
    force: Force = False,
) -> None:
    """Patch a model and show what became of every attention module."""
    from astroattn.patching import patch
    from astroattn.recipes import open_recipe, override, parse_layers

    _prepare(quiet, force, json=json_path)
    settings = _settings(others, hidden, num_hidden, near, exact_keys, tiles, tile, entries, seed)
    recipe = override(open_recipe(model), settings, {"size": size}, layers, plan, preset)
    loaded = recipe.load(weights, device, dtype, items=False)
    config = recipe.config_of(loaded.model)
    report = patch(loaded.model, config, parse_layers(recipe.layers))
    chosen = {"plan": config.to_dict()} if isinstance(config, Plan) else {"config": dataclasses.asdict(config)}
    plain = chosen | report.to_dict()
    _show(report.blocks(), plain, form)
    if json_path:
        write_json(json_path, plain)


@app.command("compare")
def compare_model(
    model: Model,
    data: DataSource = None,
    weights: Weights = None,
    json_path: Json = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the figure into this .png, .pdf or .svg.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write everything as one page into this .html.")] = None,
    items: Annotated[Path | None, typer.Option(help="Write one row per item into this .parquet file.")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="End with exit code 1 unless the interval of the metric is at least this (errors: at most)."),
    ] = None,
    metric: Annotated[str, typer.Option(help=f"What the tolerance is of: auto, {', '.join(TOLERANCES)}.")] = "auto",
    limit: Limit = None,
    half: Half = None,
    batch_size: BatchSize = None,
    tokens: Tokens = None,
    classes: Classes = None,
    pooling: Pooling = None,
    diagnose: Annotated[int, typer.Option(min=0, help="Batches to measure per layer and head.")] = 2,
    device: Device = None,
    dtype: Dtype = "float32",
    size: Size = None,
    layers: Layers = None,
    plan: PlanFile = None,
    preset: PresetWord = None,
    hidden: Hidden = None,
    num_hidden: NumHidden = None,
    near: Near = None,
    exact_keys: ExactKeys = None,
    tiles: Tiles = None,
    tile: Tile = None,
    entries: Entries = None,
    others: Others = None,
    seed: Seed = None,
    sweep: Annotated[
        str | None, typer.Option(metavar="NAME=A,B", help="Compare once for each value of a setting: exact_keys=16,32.")
    ] = None,
    form: Form = Format.table,
    quiet: Quiet = False,
    force: Force = False,
) -> None:
    """Run a model and its patched copy on the same inputs and show what changed, beside controls."""
    from astroattn.fidelity.verdict import check_tolerance
    from astroattn.recipes import open_recipe, override, parse_setting

    _prepare(quiet, force, json=json_path, figure=figure, report=report, items=items)
    for option, value in (("figure", figure), ("report", report), ("items", items), ("tolerance", tolerance)):
        if sweep and value is not None:
            raise ValueError(f"{option}: is of one comparison; --sweep makes several")
    check_tolerance(metric, tolerance)
    recipe = override(
        open_recipe(model),
        _settings(others, hidden, num_hidden, near, exact_keys, tiles, tile, entries, seed),
        _data(data, limit, half, batch_size, tokens, classes, pooling, size),
        layers,
        plan,
        preset,
    )
    if sweep:
        setting, values = parse_setting(sweep, "sweep")
        found = recipe.sweep(recipe.load(weights, device, dtype), setting, values, seed=seed or 0, progress=not quiet)
        _show(found.blocks(), found.to_dict(), form)
        if json_path:
            found.save_json(json_path)
        return
    loaded = recipe.load(weights, device, dtype)
    result = recipe.compare(loaded, diagnose=diagnose, seed=seed or 0, progress=not quiet)
    _show(result.blocks(), result.to_dict(), form)
    if json_path:
        result.save_json(json_path)
    if items:
        result.save_items(items)
    if figure:
        result.figure(figure)
    if report:
        result.report(report, metric, tolerance)
    if tolerance is not None:
        verdict = result.verdict(metric, tolerance)
        print(verdict, file=sys.stderr if form is Format.json else sys.stdout)
        raise typer.Exit(0 if verdict.kept else 1)


@app.command("report")
def report_runs(
    results: Annotated[list[Path], typer.Argument(metavar="A.json B.json ...", help="What compare --json wrote.")],
    out: Annotated[Path | None, typer.Option(help="Write a page into this .html instead of printing.")] = None,
    form: Form = Format.table,
    force: Force = False,
) -> None:
    """Say what differs between runs of compare on the same items: each of the others against the first."""
    from astroattn.fidelity.runs import load_runs

    _prepare(False, force, page=out)
    runs = load_runs(results)
    if out:
        runs.write_page(out)
    else:
        _show(runs.blocks(), runs.to_dict(), form)


@app.command("calibrate")
def calibrate_model(
    model: Model,
    out: Annotated[Path, typer.Option(help="Write the plan to this .json file.")],
    data: DataSource = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Find the cheapest plan whose metric is at least this (kl: at most).")
    ] = None,
    cost: Annotated[
        float | None, typer.Option(help="Find the truest plan with at most this share of softmax's products.")
    ] = None,
    entries: Annotated[
        float | None, typer.Option(help="Find the truest plan of streaming memories with so many entries in the mean.")
    ] = None,
    metric: Annotated[str, typer.Option(help=f"What the tolerance is of: auto, {', '.join(METRICS)}.")] = "auto",
    state: Annotated[
        Path | None, typer.Option(help="Keep what was measured in this .safetensors file, and go on from it.")
    ] = None,
    weights: Weights = None,
    limit: Limit = None,
    half: Half = None,
    batch_size: BatchSize = None,
    tokens: Tokens = None,
    classes: Classes = None,
    pooling: Pooling = None,
    device: Device = None,
    dtype: Dtype = "float32",
    size: Size = None,
    layers: Layers = None,
    seed: Annotated[int, typer.Option(help="Of the choice of items and of the bounds.")] = 0,
    form: Form = Format.table,
    quiet: Quiet = False,
    force: Force = False,
) -> None:
    """Choose what every head does, for a tolerance or a budget, and verify it on items that were not used for that."""
    from astroattn.recipes import open_recipe, override

    _prepare(quiet, force, out=out)
    found = _data(data, limit, half, batch_size, tokens, classes, pooling, size)
    recipe = override(open_recipe(model), {}, found, layers)
    loaded = recipe.load(weights, device, dtype)
    plan = recipe.calibrate(
        loaded, tolerance=tolerance, cost=cost, entries=entries, metric=metric, seed=seed, state=state,
        progress=not quiet,
    )  # fmt: skip
    plan.save(out)
    _show(plan.blocks(), plan.to_dict(), form)


@app.command("info")
def show_info(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL|RECIPE]", help="Also show what patch would do.")
    ] = None,
    weights: Weights = None,
    device: Device = None,
    form: Form = Format.table,
    quiet: Quiet = False,
) -> None:
    """Show versions and devices and, for a model, its attention modules and what patching makes of them."""
    import torch

    from astroattn.fidelity.environment import describe_cpu_kernels, describe_device, describe_versions
    from astroattn.recipes import open_recipe

    _prepare(quiet, False)
    names = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    plain: dict[str, Any] = {
        "versions": describe_versions(),
        "devices": {name: describe_device(torch.device(name)) for name in names},
        "cpu kernels": describe_cpu_kernels(),
    }
    rows = [(package, version or "not installed") for package, version in plain["versions"].items()]
    rows += [*plain["devices"].items(), ("cpu kernels", plain["cpu kernels"])]
    blocks: list[Block] = [Table(("what", "version or kind"), rows)]
    if model:
        recipe = open_recipe(model)
        report = recipe.patch(recipe.load(weights, device, items=False))
        plain["report"] = report.to_dict()
        blocks += ["", *report.blocks()]
    _show(blocks, plain, form)


@app.command("recipes")
def list_recipes() -> None:
    """List the recipes that come with the library; their names stand where MODEL|RECIPE is asked for."""
    from astroattn.recipes import find_recipes, load_recipe

    found = find_recipes()
    for name, path in found.items():
        recipe = load_recipe(path)
        own = f"; settings of their own: {', '.join(recipe.settings_of)}" if recipe.settings_of else ""
        print(f"{name:<{max(map(len, found)) + 2}}{recipe.title}{own}")


def _data(
    source: str | None,
    limit: int | None,
    half: str | None,
    batch_size: int | None,
    tokens: int | None,
    classes: Path | None,
    pooling: str | None,
    size: int | None,
) -> dict[str, str | int | None]:
    return {
        "source": source,
        "limit": limit,
        "half": half,
        "batch_size": batch_size,
        "tokens": tokens,
        "classes": None if classes is None else str(classes),
        "pooling": pooling,
        "size": size,
    }


def _prepare(quiet: bool, force: bool, **outputs: Path | None) -> None:
    """Before any work: whether all files can be written, by their options, and no bars where they are not wanted."""
    for name, path in outputs.items():
        if path:
            check_output(name, path, OUTPUTS.get(name, (".json",)), force=force)
    if quiet:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def _show(blocks: list[Block], plain: dict[str, Any], form: Format) -> None:
    if form is Format.json:
        print(json.dumps(plain, indent=1))
    else:
        print(render(blocks, terminal_width()) if form is Format.table else render_markdown(blocks))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; bad input ends in one line on stderr and exit code 2."""
    try:
        app(arguments)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"astroattn: {error}", file=sys.stderr)
        sys.exit(2)
