"""The benchmark's figure: for each dtype the time of both passes, the peak memory, and the models, all log-log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eval.benchmark.rows import Row, label, select, values_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Ours in colour, the others in black and grey (colours of Okabe and Ito, which the colour-blind tell apart).
COLOURS = {
    "SDPA": "black",
    "original": "black",
    "near 64, m = 64": "#0072B2",
    "default": "#D55E00",
    "random, m = 64": "#009E73",
    "phi in memory, m = 64": "#999999",
    "flash-attn 2": "#56B4E9",
    "flash-attn 3": "#56B4E9",
    "flash-attn 4": "#56B4E9",
    "SageAttention": "#F0E442",
    "SpargeAttention": "#E69F00",
    "fla, causal, m = 64": "#CC79A7",
}
OTHER = "0.75"
MODEL_LINES = {"ViT-tiny/16": "-", "ViT-base/16": "-.", "MiniLM": "--", "BERT-base": ":"}
PANEL = (4.2, 3.6)  # inches


def plot(rows: list[Row]) -> Figure:
    """Draw what was measured.

    Times are relative to SDPA on a CPU, milliseconds on a GPU: there solid lines are CUDA graphs, dotted ones the
    same as Python launches it. Dashed is our plain PyTorch. Bands are quartiles.
    """
    from matplotlib.figure import Figure

    (settings,) = select(rows, "settings")
    on_gpu = settings["device"] == "cuda"
    dtypes, passes = values_of(rows, "dtype", "attention", "models"), values_of(rows, "pass", "attention")
    has_models = bool(select(rows, "models"))
    columns = len(passes) + bool(passes) + has_models
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * len(dtypes) + 0.6), layout="constrained")
    for axes, dtype in zip(figure.subplots(len(dtypes), columns, squeeze=False), dtypes, strict=True):
        for axis, name in zip(axes, passes, strict=False):
            _draw_times(axis, select(rows, "attention", dtype=dtype, **{"pass": name}), on_gpu)
            axis.set_title(f"{name}, {dtype}")
        if passes:
            axis = axes[len(passes)]
            _draw_memory(axis, select(rows, "attention", dtype=dtype, launch="eager", **{"pass": passes[0]}))
            axis.set_title(f"memory, {passes[0]}, {dtype}")
        if has_models:
            _draw_models(axes[-1], select(rows, "models", dtype=dtype, batch=1))
            axes[-1].set_title(f"whole models, {dtype}")
    handles, labels = _legend(figure.axes[: columns - has_models])
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(handles)), frameon=False)
    return figure


def _draw_times(axis: Axes, rows: list[Row], on_gpu: bool) -> None:
    _start(axis, "milliseconds" if on_gpu else "time / SDPA's time")
    for name in dict.fromkeys(map(label, rows)):
        mine = [row for row in rows if label(row) == name]
        if on_gpu:
            _draw_line(axis, mine, "seconds", 1e3, on_gpu)
        elif name != "SDPA":  # which is the line at one
            _draw_line(axis, mine, "times SDPA", 1, on_gpu)
    if not on_gpu:
        _mark_parity(axis, "slower than SDPA")


def _draw_line(axis: Axes, rows: list[Row], measure: str, factor: float, on_gpu: bool) -> None:
    tokens = [row["tokens"] for row in rows]
    median, low, high = ([factor * row[measure][each] for row in rows] for each in ("median", "low", "high"))
    axis.plot(tokens, median, **_style(rows[0], on_gpu))
    axis.fill_between(tokens, low, high, color=COLOURS.get(rows[0]["name"], OTHER), alpha=0.2, linewidth=0)


def _draw_memory(axis: Axes, rows: list[Row]) -> None:
    _start(axis, "peak beyond the inputs, MB")
    for name in dict.fromkeys(map(label, rows)):
        mine = [row for row in rows if label(row) == name]
        axis.plot([row["tokens"] for row in mine], [row["peak MB"] for row in mine], **_style(mine[0], False))
    tokens = sorted(row["tokens"] for row in rows if row["name"] == "SDPA")
    last = tokens[-1]
    least = min(row["peak MB"] for row in rows if row["tokens"] == last) / 3
    axis.plot([last / 8, last], [least / 8, least], color="0.6", linewidth=0.8)
    axis.annotate(
        "linear in N", (last, least), (2, -10), textcoords="offset points", ha="right", fontsize=8, color="0.4"
    )


def _draw_models(axis: Axes, rows: list[Row]) -> None:
    launch = "graph" if any(row["launch"] == "graph" for row in rows) else "eager"
    _start(axis, "time / the original's time" + (", CUDA graph" if launch == "graph" else ""))
    for model in values_of(rows, "model", "models"):
        axis.plot([], [], color="0.3", linestyle=MODEL_LINES[model], label=model)
        for name in values_of(rows, "name", "models"):
            mine = select(rows, "models", model=model, name=name, launch=launch)
            if name != "original" and mine:
                tokens, ratios = ([row["tokens"] for row in mine], [row["times original"]["median"] for row in mine])
                axis.plot(tokens, ratios, linestyle=MODEL_LINES[model], color=COLOURS[name], marker=".", linewidth=2)
    _mark_parity(axis, "slower than the original")
    axis.legend(fontsize=8, frameon=False, loc="upper right")


def _style(row: Row, on_gpu: bool) -> dict[str, Any]:
    style = {"color": COLOURS.get(row["name"], OTHER), "marker": ".", "label": label(row)}
    if row["backend"] == "torch":
        return style | {"linestyle": "--", "linewidth": 1, "marker": "", "alpha": 0.8}
    if on_gpu and row["launch"] == "eager":
        return style | {"linestyle": ":", "linewidth": 1, "marker": ""}
    return style | {"linewidth": 2}


def _start(axis: Axes, ylabel: str) -> None:
    """Both axes logarithmic, with plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=ylabel)
    axis.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}")
    axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axis.yaxis.set_minor_formatter("")
    axis.grid(alpha=0.25)


def _mark_parity(axis: Axes, text: str) -> None:
    """A line at one, and what lies above it; at least from a fifth to five, with ticks in between."""
    from matplotlib.ticker import LogLocator

    low, high = axis.get_ylim()
    low, high = min(low, 0.2), max(high, 5)
    axis.axhline(1, color="black", linewidth=1.5, zorder=1)
    axis.axhspan(1, high, color="black", alpha=0.05, linewidth=0, zorder=0)
    axis.set_ylim(low, high)
    if high / low < 100:
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.annotate(
        *(text, (1, 1), (-4, 3)),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color="0.4",
    )


def _legend(axes: list[Axes]) -> tuple[list[Any], list[str]]:
    """Every label once."""
    found: dict[str, Any] = {}
    for axis in axes:
        for line, text in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(text, line)
    return list(found.values()), list(found)
