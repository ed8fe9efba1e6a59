"""How the error of the paper's random hidden layer falls with its number of neurons, on random queries and keys.

Unit-scale random q and k (D independent normal components of variance 1 / D each, so |q| and |k| are about 1), normal
values; the relative error of the attention output against softmax with scale 1, for independent and for orthogonal
weights. Monte Carlo predicts error ~ m^-1/2.

    python -m eval.error_vs_hidden --json out/error.json --figure out/error.png
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import typer
from scipy.stats import linregress
from tqdm import tqdm

from astroattn import AstroConfig, AstrocyteAttention
from eval.common import FigureOption, JsonOption, LimitOption, SeedOption, print_rows, write_figure, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = [2**power for power in range(4, 15)]
HEADS, TOKENS, DIM = 4, 128, 32


def measure(seeds: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """One row per weights and m: mean and standard deviation over `seeds` draws of weights and inputs."""
    rows = []
    work = [(orthogonal, m) for orthogonal in (False, True) for m in SIZES]
    for orthogonal, m in tqdm(work, "measuring", unit="size"):
        errors = torch.tensor([_error(m, orthogonal, seed + draw) for draw in range(seeds)])
        name = "orthogonal" if orthogonal else "independent"
        rows.append({"weights": name, "m": m, "error": errors.mean().item(), "spread": errors.std().item()})
    return rows


def _error(m: int, orthogonal: bool, seed: int) -> float:
    generator = torch.Generator().manual_seed(10**6 + seed)  # not the stream that the weights are drawn from
    query, key, value = torch.randn(3, 1, HEADS, TOKENS, DIM, generator=generator, dtype=torch.float64)
    query, key = query / DIM**0.5, key / DIM**0.5
    config = AstroConfig(hidden="random", num_hidden=m, near=0, orthogonal=orthogonal, seed=seed)
    network = AstrocyteAttention(HEADS, DIM, config)
    out = network(query, key, value, scale=1.0)
    network.exact = True
    softmax = network(query, key, value, scale=1.0)
    return ((out - softmax).norm() / softmax.norm()).item()


def fit_slopes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The slope of log error over log m, by least squares, with its standard error."""
    fits = []
    for name in ("independent", "orthogonal"):
        mine = [row for row in rows if row["weights"] == name]
        fit = linregress(
            torch.tensor([row["m"] for row in mine]).double().log(),
            torch.tensor([row["error"] for row in mine]).double().log(),
        )
        fits.append({"weights": name, "slope": float(fit.slope), "standard_error": float(fit.stderr)})
    return fits


def plot(rows: list[dict[str, Any]]) -> Figure:
    """Error against m, log-log, with the line m^-1/2 through the first point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4))
    axes = figure.subplots()
    for name, marker in (("independent", "o"), ("orthogonal", "s")):
        mine = [row for row in rows if row["weights"] == name]
        axes.errorbar(
            [row["m"] for row in mine],
            [row["error"] for row in mine],
            [row["spread"] for row in mine],
            marker=marker,
            markersize=4,
            capsize=2,
            label=f"{name} weights",
        )
    first = rows[0]
    axes.plot(SIZES, [first["error"] * (first["m"] / m) ** 0.5 for m in SIZES], "k--", lw=1, label=r"$m^{-1/2}$")
    axes.set(xscale="log", yscale="log", xlabel="hidden neurons m", ylabel="relative error of the attention output")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(f"random hidden layer, D = {DIM}, N = {TOKENS}, |q| = |k| = 1", fontsize=10)
    return figure


def main(json: JsonOption = None, figure: FigureOption = None, limit: LimitOption = None, seed: SeedOption = 0) -> None:
    """Measure the error of random hidden layers against softmax; --limit is the number of draws (default 8)."""
    rows = measure(limit or 8, seed)
    print_rows(rows, title="Relative error of the attention output")
    fits = fit_slopes(rows)
    print_rows(fits, title="Slope of log error over log m (Monte Carlo: -0.5)")
    if json:
        write_json(json, rows + fits, seed=seed)
    if figure:
        write_figure(figure, plot(rows))


if __name__ == "__main__":
    typer.run(main)
