"""One figure of a comparison: where the error is, how it grows, and how it stands beside the controls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from astroattn.choices import FIGURES
from astroattn.fidelity.diagnosis import LayerFidelity
from astroattn.fidelity.metrics import METRICS
from astroattn.files import check_output, replacing
from astroattn.imports import needs

with needs("eval"):
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from astroattn.fidelity.result import Fidelity

ROUNDING = 1e-6  # of relative errors
# Okabe and Ito's colours, which stay apart for all common kinds of colour blindness
ALONE, TOGETHER, HIDDEN = "#0072B2", "#D55E00", "#555555"
PATCHED, CONTROL = "#D55E00", "#B8B8B8"
LOWER_IS_BETTER = {"logit_error", "word_error", "hidden_error", "speech_error"}
BARS = (  # the first pair that was measured
    ("top1_agreement", "logit_error"),
    ("embedding_cosine", "same_neighbour"),
    ("word_error", "hidden_error"),
    ("hidden_error", "speech_error"),
)


def draw(result: Fidelity, path: str | Path) -> None:
    """Draw a comparison into a file; its ending says the format (png, pdf, svg)."""
    check_output("figure", Path(path), FIGURES, force=True)  # known before anything is drawn
    layers = result.layers
    height = min(9.0, max(4.8, 2.0 + 0.25 * len(layers)))
    figure = Figure(figsize=(14, height), layout="constrained", dpi=150)
    figure.suptitle(_title(result), x=0.01, ha="left", fontsize=12)
    if layers:
        heads = max(len(layer.isolated_error) for layer in layers)
        mosaic: Any = [["heads", "layers", "upper"], ["heads", "layers", "lower"]]
        axes = figure.subplot_mosaic(mosaic, width_ratios=[min(4.0, 1.6 + 0.18 * heads), 4.0, 4.0])
        _draw_heads(axes["heads"], layers, heads)
        draw_layers(axes["layers"], layers)
        for name in ("heads", "layers"):
            axes[name].set_ylim(len(layers) - 0.5, -0.5)
            axes[name].yaxis.set_major_locator(MaxNLocator(nbins=14, integer=True))
            axes[name].set_ylabel("attention layer")
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    else:
        axes = figure.subplot_mosaic([["upper", "lower"]])
    chosen = next((pair for pair in BARS if pair[0] in result.rows["patched"].values), BARS[0])
    for name, key in zip(("upper", "lower"), chosen, strict=True):
        draw_bars(axes[name], result, key)
    with replacing(path) as part:
        figure.savefig(part)


def _title(result: Fidelity) -> str:
    values = result.rows["patched"].values
    title = f"{result.model}, {result.items} items"
    if "cost" not in values:
        return title
    return (
        f"{title}: {values['positions'].value:.0f} of {values['keys'].value:.0f} positions, {values['cost'].value:.0%}"
        " of the products of softmax"
    )


def _draw_heads(axes: Any, layers: tuple[LayerFidelity, ...], heads: int) -> None:
    table = np.full((len(layers), heads), np.nan)
    for row, layer in enumerate(layers):
        table[row, : len(layer.isolated_error)] = layer.isolated_error
    axes.set_title("error of every head, its layer alone", fontsize=10, loc="left")
    largest = np.nanmax(table, initial=0)
    if largest < ROUNDING:  # as where every key is exact: colours would show rounding
        axes.text(0.5, 0.5, "no error", ha="center", va="center", transform=axes.transAxes)
        axes.set_xticks([])
        return
    image = axes.imshow(table, aspect="auto", cmap="Blues", vmin=0, vmax=largest, interpolation="nearest")
    axes.set_xlabel("head")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.08, pad=0.03)
    bar.set_label("relative L2 error of the attention output", fontsize=9)
    if heads <= 6 and len(layers) <= 24:  # room for numbers
        for (row, head), value in np.ndenumerate(table):
            if np.isfinite(value):
                colour = "white" if value > 0.55 * largest else "black"
                axes.text(head, row, f"{value:.2g}", ha="center", va="center", color=colour, fontsize=8)


def draw_layers(axes: Any, layers: tuple[LayerFidelity, ...]) -> None:
    depth = np.arange(len(layers))
    alone = [float(np.mean(layer.isolated_error)) for layer in layers]
    together = [float(np.mean(layer.together_error)) for layer in layers]
    hidden = [np.nan if layer.hidden_error is None else layer.hidden_error for layer in layers]
    axes.plot(alone, depth, "o-", color=ALONE, markersize=4, label="attention, the layer alone")
    axes.plot(together, depth, "s-", color=TOGETHER, markersize=4, label="attention, all layers together")
    axes.plot(hidden, depth, "^--", color=HIDDEN, markersize=4, label="hidden state, all together")
    axes.set_title("error along the depth, mean of the heads", fontsize=10, loc="left")
    axes.set_xlabel("relative L2 error")
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def draw_bars(axes: Any, result: Fidelity, key: str) -> None:
    names = [name for name in result.rows if name != "original"]
    metric = METRICS[key]
    for place, name in enumerate(names):
        value = result.rows[name].values.get(key)
        if value is None or not np.isfinite(value.value):
            axes.text(0, place, " not measured", va="center", fontsize=9)
            continue
        axes.barh(place, value.value, color=PATCHED if name == "patched" else CONTROL, height=0.65)
        end = value.value
        if value.low is not None and value.high is not None:
            axes.plot([value.low, value.high], [place, place], color="black", linewidth=1)
            end = max(end, value.high)
        text = metric.form.format(value.value)
        axes.annotate(text, (max(end, 0), place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(names)), [_name_with_cost(result, name) for name in names], fontsize=9)
    axes.invert_yaxis()
    better = "lower" if key in LOWER_IS_BETTER else "higher"
    axes.set_title(f"{metric.label} ({better} is better)", fontsize=10, loc="left")
    axes.set_xlim(0, axes.get_xlim()[1] * 1.15)
    keys = result.rows["patched"].values.get("keys")
    of = "" if keys is None else f"; in brackets: positions of {keys.value:,.0f}"
    axes.set_xlabel(f"black lines: 95 % intervals{of}", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _name_with_cost(result: Fidelity, name: str) -> str:
    values = result.rows[name].values
    return f"{name} ({values['positions'].value:,.0f})" if "positions" in values else name
