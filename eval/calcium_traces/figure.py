"""The figure: traces over a text, heat maps over a photo, scatter, and the agreement of all heads."""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import NullFormatter
from torch import Tensor

from eval.calcium_traces.astrocyte import normalise
from eval.calcium_traces.cases import Case

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

COLOURS = ("#E69F00", "#0072B2", "#CC79A7")  # of Okabe and Ito, one per number of neurons
LABELLED = 6  # peaks of a text that are named


def plot(rows: list[dict[str, Any]], cases: list[Case], traces: list[dict[int, Tensor]]) -> Figure:
    """One row per case: the traces, or the heat maps over the photo; calcium against normaliser; all heads."""
    from matplotlib.figure import Figure

    heights = [4.3 if case.kind == "text" else 3.7 for case in cases]
    figure = Figure(figsize=(16, sum(heights)), layout="constrained")
    parts = np.atleast_1d(figure.subfigures(len(cases), height_ratios=heights))
    for part, case, trace in zip(parts, cases, traces, strict=True):
        left, right = part.subfigures(1, 2, width_ratios=(2.2, 1.8))
        left.suptitle(f"{case.model}, layer {case.layer}, head {case.head}: {case.input}", fontsize=11)
        normaliser = normalise(*case.selected()[:2]).numpy()
        calcium = {m: values.numpy() for m, values in trace.items()}
        draw = _draw_photo if case.kind == "image" else _draw_text
        draw(left, case, normaliser, calcium)
        scatter, heads = right.subplots(1, 2, width_ratios=(1, 1.15))
        _draw_scatter(scatter, rows, case, normaliser, calcium)
        _draw_heads(heads, rows, case)
    return figure


def _draw_text(figure: SubFigure, case: Case, normaliser: np.ndarray, calcium: dict[int, np.ndarray]) -> None:
    axis = figure.subplots()
    for (m, values), colour in zip(calcium.items(), COLOURS, strict=False):
        axis.plot(values, color=colour, lw=1.1, label=f"calcium, m = {_power(m)}")
    axis.plot(normaliser, color="black", lw=1.4, label="softmax normaliser")
    axis.set(xlabel="token", ylabel="p", yscale="log", xlim=(-1, len(normaliser)))
    taken: list[int] = []
    for place in np.argsort(normaliser)[::-1]:
        if len(taken) < LABELLED and all(abs(place - other) > len(normaliser) / 12 for other in taken):
            taken.append(int(place))
            top = max(normaliser[place], *(values[place] for values in calcium.values()))
            name = case.tokens[place].replace("##", "-").strip("▁")
            axis.annotate(name, (place, top), (0, 4), textcoords="offset points", ha="center", fontsize=8)
    axis.margins(y=0.12)
    axis.legend(fontsize=8, ncols=3, loc="lower center")
    axis.grid(alpha=0.3)


def _draw_photo(figure: SubFigure, case: Case, normaliser: np.ndarray, calcium: dict[int, np.ndarray]) -> None:
    axes = figure.subplots(1, 2 + len(calcium))
    maps = {"softmax normaliser": normaliser} | {f"calcium, m = {_power(m)}": p for m, p in calcium.items()}
    norm = LogNorm(min(map(np.min, maps.values())), max(map(np.max, maps.values())))
    grey = case.photo.mean(-1)
    axes[0].imshow(case.photo if case.photo.shape[-1] == 3 else grey, cmap="gray")
    axes[0].set_title("what the model sees", fontsize=10)
    side = isqrt(len(normaliser))
    for axis, (title, values) in zip(axes[1:], maps.items(), strict=True):
        axis.imshow(grey, cmap="gray")
        box = (-0.5, grey.shape[1] - 0.5, grey.shape[0] - 0.5, -0.5)
        shown = axis.imshow(values.reshape(side, side), norm=norm, alpha=0.75, extent=box, interpolation="nearest")
        axis.set_title(title, fontsize=10)
    for axis in axes:
        axis.set_axis_off()
    figure.colorbar(shown, ax=axes, orientation="horizontal", label=f"p at each of {side} × {side} patches",
                    shrink=0.7, aspect=45, pad=0.02)  # fmt: skip


def _draw_scatter(
    axis: Axes, rows: list[dict[str, Any]], case: Case, normaliser: np.ndarray, calcium: dict[int, np.ndarray]
) -> None:
    found = {row["m"]: row["log_correlation"] for row in _pick(rows, case, "selected") if row["weights"] == "iid"}
    for (m, values), colour in zip(calcium.items(), COLOURS, strict=False):
        label = f"m = {_power(m)}, log correlation {found[m]:.2f}"
        axis.scatter(normaliser, values, s=9, color=colour, alpha=0.7, lw=0, label=label)
    ends = [normaliser.min(), normaliser.max()]
    axis.plot(ends, ends, color="black", lw=1)
    axis.set(xlabel="softmax normaliser", ylabel="calcium", xscale="log", yscale="log")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high * (high / low) ** 0.2)  # room for the legend
    axis.legend(fontsize=8, loc="upper left")
    for one in (axis.xaxis, axis.yaxis):
        one.set_minor_formatter(NullFormatter())  # they would overlap where there is no whole decade
    axis.grid(alpha=0.3)


def _draw_heads(axis: Axes, rows: list[dict[str, Any]], case: Case) -> None:
    """Every head's log correlation by kind of weights; the selected head is a star, the box holds the middle half."""
    every, chosen = _pick(rows, case, "all heads"), _pick(rows, case, "selected")
    stars = {(row["weights"], row["m"]): row["log_correlation"] for row in chosen}
    spread = np.random.default_rng(0)
    for place, row in enumerate(every):
        values = np.ravel(row["log_correlations"])
        across = place + spread.uniform(-0.25, 0.25, len(values))
        axis.scatter(across, values, s=7, color="#56B4E9", alpha=0.6, lw=0)
        axis.boxplot(values, positions=[place], widths=0.6, showfliers=False, whis=0, showcaps=False,
                     medianprops={"color": "black", "lw": 1.5})  # fmt: skip
        axis.plot(place, stars[row["weights"], row["m"]], "*", color="#D55E00", ms=11, mec="white", mew=0.5)
    axis.plot([], [], "*", color="#D55E00", ms=9, ls="", label=f"layer {case.layer}, head {case.head}")
    axis.axhline(0.95, color="grey", lw=0.8, ls="--")
    axis.set_xticks(range(len(every)), [f"{row['weights']}\n{_power(row['m'])}" for row in every], fontsize=8)
    axis.tick_params(axis="x", rotation=60)
    axis.set(ylabel="log correlation", ylim=(min(-0.2, *np.ravel([row["log_correlations"] for row in every])), 1.03))
    axis.set_title(f"all {every[0]['heads']} heads", fontsize=10)
    axis.legend(fontsize=8, loc="lower right")
    axis.grid(alpha=0.3, axis="y")


def _pick(rows: list[dict[str, Any]], case: Case, part: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["part"] == part and row["model"] == case.model]


def _power(m: int) -> str:
    exponent = round(np.log10(m))
    return f"$10^{exponent}$" if 10**exponent == m and exponent > 2 else str(m)
