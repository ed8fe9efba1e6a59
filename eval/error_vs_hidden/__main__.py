"""python -m eval.error_vs_hidden --json out/error.json --figure out/error.png"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from eval.common import (
    FigureOption,
    JsonOption,
    LimitOption,
    SeedOption,
    data_folder,
    print_rows,
    run_script,
    write_figure,
    write_json,
)
from eval.error_vs_hidden.plot import plot, plot_layers, plot_theory
from eval.error_vs_hidden.real import FULL, Settings, measure_real
from eval.error_vs_hidden.rows import select, tabulate
from eval.error_vs_hidden.synthetic import fit_slopes, measure_synthetic

FullOption = Annotated[bool, typer.Option("--full", help="More items, seeds and training: about 20 minutes.")]


def main(
    json: JsonOption = None,
    figure: FigureOption = None,
    limit: LimitOption = None,
    seed: SeedOption = 0,
    full: FullOption = False,
) -> None:
    """Measure the error of hidden layers against their number of neurons, on real heads and on random vectors.

    Beside FILE.json and FILE.png come FILE_layers (the output of every layer) and FILE_theory (heads and tokens).
    """
    settings = FULL if full else Settings()
    if limit:
        settings = replace(settings, items=limit)
    if data_folder() is None:
        print("ASTROATTN_DATA is not set: the digits ViT stands in for ViT-tiny")
    synthetic = measure_synthetic(seed=seed)
    rows, theory = measure_real(settings, seed)
    layers = [row for row in rows if row["layer"] != "all" and row["quantity"] == "output"]
    means = select(rows, layer="all") + synthetic
    print_rows(tabulate(means), title="Relative error, mean over all layers")
    print_rows(fit_slopes(synthetic), title="Random vectors: slope of log error over log m (Monte Carlo: -0.5)")
    if json:
        for stem, part in (("", means), ("_layers", layers), ("_theory", theory)):
            write_json(_beside(json, stem), part, seed=seed)
    if figure:
        write_figure(figure, plot(means))
        write_figure(_beside(figure, "_layers"), plot_layers(layers))
        write_figure(_beside(figure, "_theory"), plot_theory(means, theory))


def _beside(path: Path, suffix: str) -> Path:
    return path.with_stem(path.stem + suffix)


if __name__ == "__main__":
    run_script(main, data=True)
