"""The figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from eval.error_vs_hidden.rows import QUANTITIES, Row, select
from eval.error_vs_hidden.synthetic import NAME

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = {  # colours of Okabe and Ito
    "independent": {"color": "#D55E00", "marker": "o", "label": "random, independent (the paper's)"},
    "orthogonal": {"color": "#E69F00", "marker": "s", "label": "random, orthogonal"},
    "calibrated": {"color": "#0072B2", "marker": "^", "label": "calibrated on sample data"},
    "learned": {"color": "#CC79A7", "marker": "D", "label": "trained on sample data"},
    "Hebbian": {"color": "#009E73", "marker": "v", "label": "Hebbian, from the keys read"},
    "SVD": {"color": "black", "linestyle": ":", "label": "floor of rank m (SVD)"},
    "uniform": {"color": "0.45", "linestyle": "--", "label": "uniform attention (control)"},
}
LABELS = {
    "matrix": "attention matrix",
    "output": "attention output",
    "normaliser": "normaliser $p_t$ (median)",
    "block": "output of the block",
}
LIMITS = (0.02, 5)


def plot(rows: list[Row]) -> Figure:
    """Error against m, mean over layers: one row per quantity, one column per model; bands are 95 % over seeds."""
    from matplotlib.figure import Figure

    models = [model for model in dict.fromkeys(row["model"] for row in rows) if model != NAME]
    figure = Figure(figsize=(4.2 * len(models), 10.5), layout="constrained")
    grid = figure.subplots(len(QUANTITIES), len(models), sharex=True, sharey="row", squeeze=False)
    for line, quantity in zip(grid, QUANTITIES, strict=True):
        for axes, model in zip(line, models, strict=True):
            _draw_curves(axes, select(rows, model=model, quantity=quantity, layer="all"))
        line[0].set_ylabel(f"relative error\n{LABELS[quantity]}")
    for axes, model in zip(grid[0], models, strict=True):
        axes.set_title(f"{model}, mean over layers")
    for axes in grid[-1]:
        axes.set_xlabel("hidden neurons m")
    _share_legend(figure, grid)
    return figure


def plot_layers(rows: list[Row]) -> Figure:
    """Error of the attention output against m, one panel per layer."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["model"], row["layer"]) for row in rows))
    columns = 6
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(2.1 * columns, 2.1 * lines + 0.8), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, (model, layer) in zip(grid.flat, panels, strict=False):
        _draw_curves(axes, select(rows, model=model, layer=layer), markersize=2.5, bands=False)
        axes.set_title(f"{model}, layer {layer}", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("hidden neurons m")
    figure.supylabel("relative error of the attention output")
    _share_legend(figure, grid)
    return figure


def plot_theory(rows: list[Row], theory: list[dict[str, Any]]) -> Figure:
    """Where theory holds: on short random vectors and on real tokens; and the neurons that real heads need."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    short, tokens, needed = figure.subplots(1, 3)
    mine = select(rows, model=NAME)
    _draw_curves(short, mine)
    sizes = np.array(sorted({row["m"] for row in mine}))
    short.plot(sizes, mine[0]["error"] * (mine[0]["m"] / sizes) ** 0.5, "k--", lw=1, label=r"$m^{-1/2}$")
    short.set(xlabel="hidden neurons m", ylabel="relative error of the attention output", ylim=(0.01, 1))
    short.set_title("random vectors, |q| = |k| = 1, D = 32", fontsize=10)

    colours = ("#0072B2", "#D55E00")
    for model, colour in zip(dict.fromkeys(row["model"] for row in theory), colours, strict=False):
        points = [row for row in theory if row["model"] == model and "tokens" in row]
        predicted = 10 ** np.array([row["log10_predicted"] for row in points])
        low, error, high = (np.array([row[name] for row in points]) for name in ("low", "error", "high"))
        tokens.plot(predicted, error, "o-", color=colour, ms=4, lw=1.3, label=f"{model}: median, quartiles")
        tokens.fill_between(predicted, low, high, color=colour, alpha=0.15, lw=0)
        heads = [row for row in theory if row["model"] == model and "head" in row]
        layers = np.array([row["layer"] for row in heads]) + (-0.12 if colour == colours[0] else 0.12)
        needed.scatter(layers, [row["log10_neurons"] for row in heads], 16, colour, alpha=0.7, lw=0, label=model)
    line = np.array([0.01, 1.5])
    tokens.plot(line, 0.6745 * line, "k--", lw=1, label="theory: 0.67 standard deviations")
    tokens.set(xscale="log", yscale="log", xlim=(0.01, 1e3), ylim=(0.005, 2))
    tokens.set(xlabel="standard deviation of $\\hat p_t / p_t$ in theory", ylabel=r"measured $|\hat p_t / p_t - 1|$")
    tokens.set_title("real tokens, independent weights, all m", fontsize=10)
    needed.axhline(np.log10(2**17), color="black", lw=1, ls="--", label="$m = 2^{17}$")
    needed.set(xlabel="layer", ylabel=r"$\log_{10} m$ for 10 % error of the output", ylim=(0, None))
    needed.set_title("what theory asks for, one dot per head", fontsize=10)
    for axes in (short, tokens, needed):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def _draw_curves(axes: Axes, rows: list[Row], markersize: float = 4, bands: bool = True) -> None:
    """One line per hidden layer, with its band."""
    for hidden, style in STYLES.items():
        mine = select(rows, hidden=hidden)
        if hidden == "uniform":
            for row in mine:
                axes.axhline(row["error"], lw=1, **style)
        elif mine:
            m, error, low, high = (np.array([row[name] for row in mine]) for name in ("m", "error", "low", "high"))
            axes.plot(m, error, lw=1.3, markersize=markersize, **style)
            if bands:
                axes.fill_between(m, low, high, color=style["color"], alpha=0.2, lw=0)
    axes.set(xscale="log", yscale="log", ylim=LIMITS)
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3, which="major")


def _share_legend(figure: Figure, grid: np.ndarray) -> None:
    found = {}
    for axes in grid.flat:
        if axes.figure is not None:
            found |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    order = [style["label"] for style in STYLES.values() if style["label"] in found]
    figure.legend([found[label] for label in order], order, loc="outside lower center", ncols=4, fontsize=8.5)
