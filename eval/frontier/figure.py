"""The figure: error against counted cost above, against measured time below, one column per model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from eval.frontier.comparing import CHEAP, LONG, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = (3.4, 3.2)  # inches
CONTROL = "uniform"
OURS = {"color": "#D55E00", "linewidth": 2.6, "markersize": 7, "zorder": 5}
OUR_MARKERS = "o*PD"
# Colours of Okabe and Ito, which the colour-blind tell apart, and a marker each.
PEER_STYLES = [
    ("#0072B2", "s"),
    ("#56B4E9", "P"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#8C6D31", "v"),
    ("#999999", "X"),
    ("black", "*"),
]


def plot(rows: Sequence[Row]) -> Figure:
    """Draw the rows, all axes logarithmic; the grey band is where no peer should lie below our curve."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    styles = _styles(rows)
    size = (max(PANEL[0] * len(models), 7), 2 * PANEL[1] + 1)
    figure = Figure(figsize=size, layout="constrained")
    for column, model in zip(figure.subplots(2, len(models), squeeze=False).T, models, strict=True):
        mine = [row for row in rows if row["model"] == model]
        for axis, measured, factor in zip(column, ("cost", "time"), (100, 1), strict=True):
            for line, style in styles.items():
                points = sorted((row for row in mine if row["line"] == line), key=lambda row: row["cost"])
                errors = [row["error"] for row in points]
                places = [factor * row[measured] for row in points]
                if line == CONTROL:  # costs nothing, and would stretch the axis
                    places, errors = [0, 1], 2 * errors
                    style = style | {"transform": axis.get_yaxis_transform()}
                axis.plot(places[: len(errors)], errors, label=line, **style)
            axis.axvline(factor, color="0.6", linewidth=0.8, linestyle=":")
            axis.set(xscale="log", yscale="log")
            axis.set_ylabel(mine[0]["what"], fontsize="small")
            _mark_ticks(axis)
        if mine[0]["tokens"] >= LONG:
            column[0].axvspan(column[0].get_xlim()[0], 100 * CHEAP, color="0.95", zorder=0)
        column[0].set_title(model, fontsize="medium")
        column[0].set(xlabel="cost, % of softmax's products")
        column[1].set(xlabel="time of the attention / SDPA's")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False)
    return figure


def _styles(rows: Sequence[Row]) -> dict[str, dict]:
    """How every line is drawn, ours first."""
    ours = list(dict.fromkeys(row["line"] for row in rows if row["ours"]))
    peers = [line for line in dict.fromkeys(row["line"] for row in rows if not row["ours"]) if line != CONTROL]
    styles = {
        line: OURS | {"marker": marker, "linestyle": style}
        for line, marker, style in zip(ours, OUR_MARKERS, ("-", "--", "-.", ":"), strict=False)
    }
    for line, (colour, marker) in zip(peers, PEER_STYLES, strict=False):
        styles[line] = {"color": colour, "marker": marker, "linewidth": 1.2, "markersize": 6}
    return styles | {CONTROL: {"color": "0.4", "linestyle": "--", "linewidth": 1}}


def _mark_ticks(axis: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.xaxis.set_minor_formatter(FuncFormatter(lambda x, _: ""))
    axis.margins(0.08)
    axis.grid(alpha=0.3)
