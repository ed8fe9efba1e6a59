"""How the network in continuous time approaches the discrete network as the ratios of its time constants fall.

`astroattn.simulation.integrate` shows each token for one unit of time. Two ratios are varied, one at a time:

- neuron, with an astrocyte fast enough not to matter: the activity of a token lingers while the next is written, and
  the error of the last layer should fall in proportion, with slope 1 in log-log;
- astrocyte, with neurons fast enough not to matter: of the calcium of the token before, exp(-1 / astrocyte) is left.
  The error that this must cause is predicted from the discrete network, with nothing fitted.

Inputs are the first tokens of a docstring as head 5 of layer 1 (from 0) of MiniLM reads them, and random vectors.

    python -m eval.time_constants --json out/time_constants.json --figure out/time_constants.png
"""

from __future__ import annotations

from math import exp
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy.stats import linregress
from torch import Tensor
from tqdm import tqdm

from astroattn import AstroConfig
from astroattn.simulation import Motion, NeuronAstrocyteNetwork, StaticNeurons, TimeConstants, Trace, integrate
from eval.common import (
    FigureOption,
    JsonOption,
    LimitOption,
    SeedOption,
    print_rows,
    relative_error,
    rounded,
    run_script,
    write_figure,
    write_json,
)
from eval.heads import load_minilm, read_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYER, HEAD = 1, 5
TOKENS, NEURONS, DIM = 6, 8, 8  # DIM: of the random vectors
SWEEPS = {"neuron": (1e-1, 1e-2, 1e-3, 1e-4), "astrocyte": (1 / 2, 1 / 4, 1 / 8, 1 / 12, 1 / 16)}
FIXED = {"neuron": {"astrocyte": 0.03}, "astrocyte": {"neuron": 1e-4}}
PHASES = {False: "all written, then read", True: "token by token"}
SHOWN, SHOWN_TOKENS = TimeConstants(neuron=0.03, astrocyte=0.12), 4  # slow enough to be seen

Tokens = tuple[Tensor, Tensor, Tensor]


class Course(NamedTuple):
    """The network in motion, and the discrete network on the same tokens."""

    motion: Motion
    trace: Trace
    last: Tensor


def load_inputs(tokens: int, seed: int) -> dict[str, Tokens]:
    """Queries, keys and values [1, 1, N, D] in float64, queries and keys times sqrt(scale)."""
    subject = load_minilm(items=1)
    with read_layers(subject.model, subject.inputs) as layers:
        layer = layers[LAYER]
        query, key, value = (x[:, HEAD : HEAD + 1, :tokens].double() for x in (layer.query, layer.key, layer.value))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(3, 1, 1, tokens, DIM, generator=generator, dtype=torch.float64)
    return {"MiniLM": (query, key, value), "random": (drawn[0] * DIM**-0.25, drawn[1] * DIM**-0.25, drawn[2])}


def make_network(dim: int, seed: int) -> NeuronAstrocyteNetwork:
    """The network of one head with the paper's random neurons."""
    config = AstroConfig(hidden="random", num_hidden=NEURONS, near=0, orthogonal=False, seed=seed)
    return NeuronAstrocyteNetwork(StaticNeurons.random(1, dim, config))


def measure(inputs: dict[str, Tokens], seed: int = 0) -> list[dict[str, Any]]:
    """One row per input, order of the phases and time constant varied: the relative error of the last layer."""
    rows = []
    work = [(causal, varied, time) for causal in PHASES for varied, times in SWEEPS.items() for time in times]
    for name, tokens in inputs.items():
        network = make_network(tokens[0].shape[-1], seed)
        for causal, varied, time in tqdm(work, name, unit="run"):
            discrete, trace = network.run(*tokens, causal=causal, scale=1.0, record="hpg")
            constants = TimeConstants(**{varied: time, **FIXED[varied]})
            moved, _ = integrate(network, *tokens, constants=constants, causal=causal, scale=1.0, samples=1)
            predicted = None
            if varied == "astrocyte":
                predicted = rounded(relative_error(discrete * predict_scale(trace, time, causal)[..., None], discrete))
            row = {"input": name, "phases": PHASES[causal], "varied": varied, "time": rounded(time)}
            rows.append(row | {"error": rounded(relative_error(moved, discrete)), "predicted": predicted})
    return rows


def predict_scale(trace: Trace, astrocyte: float, causal: bool) -> Tensor:
    """By what the calcium's delay multiplies the last layer [B, H, N], p of the discrete network over p then.

    With immediate neurons, dp/dt = (g.h - p) / astrocyte; while a token is written, g.h grows in time from (g - h).h to
    g.h, while one is read it is constant. Both have a solution in closed form.
    """
    assert trace.h_writing is not None
    assert trace.g is not None
    assert trace.p is not None
    left = exp(-1 / astrocyte)
    added = trace.h_writing.square().sum(-1)
    before = (trace.g * trace.h_writing).sum(-1) - added
    written = (1 - left) * before + (1 - astrocyte * (1 - left)) * added
    read = (1 - left) * trace.p
    tokens = range(trace.p.shape[2])
    order = (
        [(t, x) for t in tokens for x in (written, read)]
        if causal
        else [(t, x) for x in (written, read) for t in tokens]
    )
    p, calcium = torch.zeros_like(trace.p[..., 0]), []
    for t, gain in order:
        p = left * p + gain[..., t]
        if gain is read:
            calcium.append(p)
    return trace.p / torch.stack(calcium, -1)


def fit_slopes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The slope of log error over log neuron by least squares; expected is 1."""
    fits = []
    for name, phases in dict.fromkeys((row["input"], row["phases"]) for row in rows):
        mine = [row for row in rows if (row["input"], row["phases"], row["varied"]) == (name, phases, "neuron")]
        fit = linregress(np.log([row["time"] for row in mine]), np.log([row["error"] for row in mine]))
        fits.append(
            {
                "input": name,
                "phases": phases,
                "slope": float(fit.slope),
                "standard_error": float(fit.stderr),
                "expected": 1,
            }
        )
    return fits


def measure_course(tokens: Tokens, seed: int = 0) -> Course:
    """The first tokens of a sequence, all written and then read, slowly enough to be seen."""
    query, key, value = (x[:, :, :SHOWN_TOKENS] for x in tokens)
    network = make_network(query.shape[-1], seed)
    last, trace = network.run(query, key, value, scale=1.0, record="hp")
    _, motion = integrate(network, query, key, value, constants=SHOWN, scale=1.0, samples=100)
    return Course(motion, trace, last)


def plot(rows: list[dict[str, Any]], course: Course) -> Figure:
    """Error against both time constants; the course of gate, hidden neurons, calcium and last layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.3))
    _plot_errors(left.subplots(2, 1), rows)
    _plot_course(right.subplots(4, 1, sharex=True, height_ratios=(0.35, 1, 1, 1)), course)
    return figure


def _plot_errors(axes: Any, rows: list[dict[str, Any]]) -> None:
    neuron, astrocyte = axes
    colours = {"MiniLM": "#0072b2", "random": "#d55e00"}
    markers = dict(zip(PHASES.values(), ("o", "s"), strict=True))
    for name, phases in dict.fromkeys((row["input"], row["phases"]) for row in rows):
        mine = [row for row in rows if (row["input"], row["phases"]) == (name, phases)]
        style = {"color": colours[name], "marker": markers[phases], "ms": 5, "label": f"{name}, {phases}"}
        first = [row for row in mine if row["varied"] == "neuron"]
        neuron.plot([row["time"] for row in first], [row["error"] for row in first], lw=1, **style)
        second = [row for row in mine if row["varied"] == "astrocyte"]
        rate = [1 / row["time"] for row in second]
        astrocyte.plot(rate, [row["error"] for row in second], ls="", **style)
        astrocyte.plot(rate, [row["predicted"] for row in second], color=colours[name], lw=1)
    times = np.array(SWEEPS["neuron"])
    neuron.plot(times, times, "k:", lw=1, label="slope 1")
    neuron.set(xscale="log", yscale="log", xlabel="time constant of the neurons", ylabel="relative error")
    neuron.legend(fontsize=8)
    astrocyte.plot([], [], "k-", lw=1, label="predicted")
    astrocyte.plot([2, 16], np.exp([-2.0, -16.0]), "k:", lw=1, label="exp(-1 / astrocyte)")
    astrocyte.set(yscale="log", ylim=(1e-5, 2), xlabel="1 / time constant of the astrocyte", ylabel="relative error")
    astrocyte.axhspan(1e-5, 1.2e-4, color="black", alpha=0.08, lw=0, label="the neurons' own error")
    handles, labels = astrocyte.get_legend_handles_labels()
    astrocyte.legend(handles[-3:], labels[-3:], fontsize=8, loc="lower left")
    for axis in axes:
        axis.grid(alpha=0.25)


def _plot_course(axes: Any, course: Course) -> None:
    motion, trace = course.motion, course.trace
    assert trace.h_writing is not None
    assert trace.h_reading is not None
    count = course.last.shape[2]
    ends = torch.arange(1, 2 * count + 1)
    gate, hidden, calcium, last = axes
    gate.step(motion.time, motion.r, color="black", where="pre")
    gate.set(
        ylabel="gate r",
        yticks=(0, 1),
        ylim=(-0.2, 1.2),
        title=f"the first {count} tokens in MiniLM: written, then read",
    )
    neurons = torch.cat([trace.h_writing, trace.h_reading], 2)[0, 0]
    for j, colour in zip(neurons.amax(0).argsort(descending=True)[:3], ("#0072b2", "#d55e00", "#009e73"), strict=True):
        hidden.plot(motion.time, motion.h[:, 0, 0, j], color=colour)
        hidden.plot(ends, neurons[:, j], "o", color=colour, ms=4)
    hidden.set(ylabel="hidden neurons h\n(three of them)", yscale="log")
    calcium.plot(motion.time, motion.p[:, 0, 0], color="#cc79a7")
    calcium.plot(ends[count:], trace.p[0, 0], "o", color="#cc79a7", ms=4)
    calcium.set(ylabel="calcium p", yscale="log", ylim=(trace.p.min().item() / 10, None))
    for j, colour in zip(
        course.last[0, 0].std(0).argsort(descending=True)[:3], ("#0072b2", "#d55e00", "#009e73"), strict=True
    ):
        last.plot(motion.time, motion.l[:, 0, 0, j], color=colour)
        last.plot(ends[count:], course.last[0, 0, :, j], "o", color=colour, ms=4)
    last.set(
        ylabel="last layer l\n(three of them)",
        xlabel="time, in tokens; dots: the discrete network",
        xlim=(0, 2 * count),
    )
    for axis in axes:
        axis.axvspan(0, count, color="black", alpha=0.05)
        for end in ends:
            axis.axvline(end, color="black", lw=0.4, alpha=0.3)


def format_markdown(rows: list[dict[str, Any]]) -> str:
    """The convergence as a markdown table; docs/science.md must hold it as it is (tested)."""
    found = {tuple(row[name] for name in ("input", "phases", "varied", "time")): row for row in rows}
    lines = [
        "| input, phases | error, neuron = 0.1, 0.01, 0.001, 0.0001 | slope "
        "| error, astrocyte = 1/4, 1/8, 1/12 (predicted) |",
        "| --- | --- | --- | --- |",
    ]
    for fit in fit_slopes(rows):
        curve = (fit["input"], fit["phases"])
        neuron = ", ".join(f"{found[*curve, 'neuron', time]['error']:.2g}" for time in SWEEPS["neuron"])
        points = (found[*curve, "astrocyte", rounded(time)] for time in (1 / 4, 1 / 8, 1 / 12))
        astrocyte = ", ".join(f"{point['error']:.2g} ({point['predicted']:.2g})" for point in points)
        lines.append(f"| {', '.join(curve)} | {neuron} | {fit['slope']:.2f} | {astrocyte} |")
    return "\n".join(lines)


def main(json: JsonOption = None, figure: FigureOption = None, limit: LimitOption = None, seed: SeedOption = 0) -> None:
    """Measure how the network in continuous time approaches the discrete one; --limit is the number of tokens (6)."""
    inputs = load_inputs(limit or TOKENS, seed)
    rows = measure(inputs, seed)
    print_rows(rows, title="Relative error of the last layer; predicted: from the calcium's delay alone")
    print_rows(fit_slopes(rows), title="Slope of log error over log neuron")
    if json:
        write_json(json, rows, seed=seed)
    if figure:
        write_figure(figure, plot(rows, measure_course(inputs["MiniLM"], seed)))


if __name__ == "__main__":
    run_script(main)
