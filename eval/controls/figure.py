"""The figure of the controls: agreement and output error against m, what the calcium follows, and whole models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from eval.controls.conditions import DIMENSIONS, OTHER, REAL, SYNAPSES, TOKENS, UNTRAINED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# colours of Okabe and Ito, which the colour-blind tell apart
COLOURS = {
    REAL: "black",
    TOKENS: "#0072B2",
    DIMENSIONS: "#56B4E9",
    OTHER: "#009E73",
    UNTRAINED: "#E69F00",
    SYNAPSES: "#D55E00",
}
MARKERS = dict(zip(COLOURS, "osv^DX", strict=True))
Row = dict[str, Any]


def plot(rows: list[Row]) -> Figure:
    """One row per model."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(16, 3.9 * len(models)), layout="constrained")
    for model, axes in zip(models, figure.subplots(len(models), 4, squeeze=False), strict=True):
        mine = [row for row in rows if row["model"] == model]
        found = [row for row in mine if row["part"] == "conditions"]
        random = [row for row in found if row["weights"] == "random"]
        _draw_agreement(axes[0], random, model)
        _draw_error(axes[1], random)
        _draw_other_keys(axes[2], [row for row in found if row["condition"] == OTHER])
        _draw_whole(axes[3], [row for row in mine if row["part"] == "whole model"])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=len(labels), fontsize=9)
    return figure


def _draw_agreement(axis: Axes, rows: list[Row], model: str) -> None:
    for condition, colour in COLOURS.items():
        mine = [row for row in rows if row["condition"] == condition]
        counts = [row["m"] for row in mine]
        low, middle, high = ([row[f"log_correlation{end}"] for row in mine] for end in ("_q25", "", "_q75"))
        axis.plot(counts, middle, color=colour, marker=MARKERS[condition], ms=5, label=condition)
        if condition in (REAL, SYNAPSES):
            axis.fill_between(counts, low, high, color=colour, alpha=0.15, lw=0)
    axis.axhline(0, color="grey", lw=0.8)
    axis.set(xscale="log", xlabel="hidden neurons m", ylabel="log correlation with own normaliser", ylim=(-0.5, 1.02))
    axis.set_title(f"{model}: calcium (random W; middle half of {rows[0]['heads']} heads shaded)", fontsize=9)
    axis.grid(alpha=0.3)


def _draw_error(axis: Axes, rows: list[Row]) -> None:
    for condition, colour in COLOURS.items():
        mine = [row for row in rows if row["condition"] == condition]
        errors = [row["output_error"] / row["uniform_error"] for row in mine]
        axis.plot([row["m"] for row in mine], errors, color=colour, marker=MARKERS[condition], ms=5)
    axis.axhline(1, color="grey", lw=0.8, ls="--")
    axis.set(xscale="log", yscale="log", xlabel="hidden neurons m", ylabel="output error / uniform attention's")
    axis.set_title("output, random W (dashed: uniform attention)", fontsize=9)
    axis.grid(alpha=0.3, which="both")


def _draw_other_keys(axis: Axes, rows: list[Row]) -> None:
    """Keys exchanged: what the calcium follows, by kind of weights."""
    names = {
        "log_correlation": ("own", "#009E73"),
        "with_original": ("original's", "#999999"),
        "change": ("change", "#CC79A7"),
    }
    across = np.arange(len(rows))
    for place, (name, (label, colour)) in enumerate(names.items()):
        axis.bar(across + 0.27 * (place - 1), [row[name] for row in rows], 0.25, color=colour, label=label)
    between = np.median([row["own_with_original"] for row in rows])
    axis.axhline(between, color="grey", lw=0.8, ls="--", label="own with original's")
    labels = [f"{row['weights']}\nm = {row['m']:,}" for row in rows]
    axis.set_xticks(across, labels, fontsize=8, rotation=45)
    axis.set(ylabel="log correlation with normaliser", ylim=(min(0, *(row["with_original"] for row in rows)), 1.4))
    axis.legend(fontsize=8, loc="upper left", ncols=2)
    axis.set_title("keys of another input: what the calcium follows", fontsize=9)
    axis.grid(alpha=0.3, axis="y")


def _draw_whole(axis: Axes, rows: list[Row]) -> None:
    configs = list(dict.fromkeys(row["config"] for row in rows))
    shown = [condition for condition in COLOURS if any(row["condition"] == condition for row in rows)]
    for place, condition in enumerate(shown):
        values = [row["error"] for row in rows if row["condition"] == condition]
        across = np.arange(len(configs)) + 0.27 * (place - 1)
        axis.bar(across, values, 0.25, color=COLOURS[condition])
    axis.set_xticks(range(len(configs)), configs, fontsize=8, rotation=45)
    axis.set(ylabel="relative error", yscale="log")
    axis.set_title("whole model: embedding (text) or logits (images)", fontsize=9)
    axis.grid(alpha=0.3, axis="y")
