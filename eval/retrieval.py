"""The network as a memory: how many patterns each hidden layer holds, read from cues with flipped bits.

n random patterns of D bits (+-1 / sqrt(D)) are written with key = value = pattern. A cue is a pattern with 3/16 of its
bits flipped, so that its overlap with the pattern is 5/8. It is read with queries and keys times sqrt(beta), whose
kernel is exp(beta cue.pattern), once or repeatedly: the signs of the last layer are the next cue. A bit is wrong where
the last layer has the other sign; 0 counts as half. The capacity is the n at which 5 % of the bits are wrong.

- exact: one hidden neuron per pattern, which is softmax attention: a dense associative memory (Krotov & Hopfield
  2016), also called a modern Hopfield network (Ramsauer et al. 2021).
- independent, orthogonal: the paper's hidden layer, m random neurons.
- Hebbian: the centres of m clusters, learned from the patterns as the library does by default.
- classical: the Hopfield network, W = sum of xi xi^T without its diagonal. constant: uniform attention, the control.

For every point beta is the best of a grid, chosen on other patterns and other weights than those reported.

    python -m eval.retrieval --json out/retrieval.json --figure out/retrieval.png
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import entropy, linregress, t
from torch import Tensor
from tqdm import tqdm

from astroattn import AstroConfig
from astroattn.hidden import RandomHidden
from astroattn.ops.clustering import learn_clusters, weighted_means
from astroattn.ops.static import add_states, read, write
from eval.common import (
    FigureOption,
    JsonOption,
    LimitOption,
    SeedOption,
    print_rows,
    rounded,
    run_script,
    write_figure,
    write_json,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DIM, FLIPPED, LEVEL = 32, 3 / 16, 0.05
OVERLAP = 1 - 2 * FLIPPED
COUNTS = [2**power for power in range(13)]
BETAS = [2.0**power for power in range(-1, 6)]
READS = {"once": 1, "iterated": 4}
CUES, SETS, CALIBRATION = 128, 8, 2  # cues per draw; most sets of patterns they share; draws that beta is chosen on
WIDTHS, MOST = (16, 32, 48), 2**16  # dimensions, and most patterns, for the exact kernel alone

EXPONENT = np.log(2) - entropy([FLIPPED, 1 - FLIPPED])  # nats per bit: how rarely another pattern is nearer to a cue

Memory = Callable[[Tensor], Tensor]
"""Reads cues [Z, C, D] into the last layer [Z, C, D]."""


def exact(patterns: Tensor, beta: float, m: int, seed: int) -> Memory:
    """Softmax attention over the patterns [Z, n, D]; the network with one competing neuron per pattern."""
    return lambda cue: (beta * cue @ patterns.mT).softmax(-1) @ patterns


def hebbian(patterns: Tensor, beta: float, m: int, seed: int) -> Memory:
    """The network with m competing neurons, the centres of clusters: H_j / g_j is the centre w_j itself."""
    winners = learn_clusters(patterns, patterns.new_ones(patterns.shape[:2]), m, AstroConfig().steps)
    size, centre = weighted_means(patterns, patterns.new_ones(patterns.shape[:2]), winners, m)
    return lambda cue: (beta * cue @ centre.mT + size.log()[:, None]).softmax(-1) @ centre


def random(patterns: Tensor, beta: float, m: int, seed: int, orthogonal: bool, activation: str) -> Memory:
    """The network with m random neurons, other weights for every set of patterns."""
    config = AstroConfig(hidden="random", num_hidden=m, seed=seed, orthogonal=orthogonal, activation=activation)
    hidden = _draw_hidden(patterns.shape[0], patterns.shape[2], config).expand(1, patterns.dtype)
    state = None
    for part in patterns.split(max(16, 2**18 // (len(patterns) * m)), 1):  # so that the features stay in the cache
        new = write(part * beta**0.5, part, hidden, None, None if state is None else state.top)
        state = new if state is None else add_states(state, new)
    assert state is not None
    return lambda cue: read(cue * beta**0.5, state, hidden)[0]


@lru_cache(maxsize=32)  # the same draws serve every beta
def _draw_hidden(sets: int, dim: int, config: AstroConfig) -> RandomHidden:
    return RandomHidden(sets, dim, config)


def classical(patterns: Tensor, beta: float, m: int, seed: int) -> Memory:
    """The Hopfield network: outer products, nothing divided."""
    share = patterns.shape[1] / patterns.shape[2]
    return lambda cue: cue @ patterns.mT @ patterns - share * cue


LAYERS: dict[str, tuple[Callable[..., Memory], tuple[int, ...]]] = {
    "exact": (exact, (0,)),
    "Hebbian": (hebbian, (16, 64, 256, 1024)),
    "orthogonal": (partial(random, orthogonal=True, activation="positive_exp"), (64, 256, 1024, 4096)),
    "independent": (partial(random, orthogonal=False, activation="positive_exp"), (64, 256, 1024, 4096)),
    "classical": (classical, (0,)),
    "constant": (partial(random, orthogonal=False, activation="constant"), (1,)),
}
NO_BETA = ("classical", "constant")


def measure(draws: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """One row per layer, m, D, number of patterns and kind of reading; intervals of 95 % over `draws` draws."""
    rows = []
    work = [(name, m, count) for name, (_, sizes) in LAYERS.items() for m in sizes for count in COUNTS]
    for name, m, count in tqdm(work, "layers", unit="point"):
        rows += measure_point(name, m, count, DIM, draws, seed)
    for dim in tqdm([dim for dim in WIDTHS if dim != DIM], "dimensions", unit="D"):
        count, wrong = 1, 0.0
        while count <= MOST and wrong <= LEVEL:
            rows += measure_point("exact", 0, count, dim, draws, seed)
            count, wrong = 2 * count, rows[-2]["low"]
    return rows


def measure_point(name: str, m: int, count: int, dim: int, draws: int, seed: int) -> list[dict[str, Any]]:
    """One row per kind of reading, each with its own beta."""
    first = 2 * seed * 10**6
    reported, others = range(first, first + draws), range(first + 10**6, first + 10**6 + CALIBRATION)
    betas = BETAS[:1] if name in NO_BETA else BETAS
    tried = {beta: _recall(name, m, count, dim, beta, others) for beta in betas}
    best = {kind: min(betas, key=lambda beta: tuple(tried[beta][kind].mean(0)[:2])) for kind in READS}
    scores = {beta: _recall(name, m, count, dim, beta, reported) for beta in set(best.values())}
    rows = []
    for kind, beta in best.items():
        wrong, error, retrieved = scores[beta][kind].T
        half = t.ppf(0.975, draws - 1) * wrong.std(ddof=1) / draws**0.5 if draws > 1 else 0.0
        values = {
            "beta": beta,
            "wrong_bits": wrong.mean(),
            "low": max(0.0, wrong.mean() - half),
            "high": wrong.mean() + half,
            "error": error.mean(),
            "retrieved": retrieved.mean(),
        }
        point = {"layer": name, "m": m, "D": dim, "patterns": count, "reads": kind}
        rows.append(point | rounded({key: float(value) for key, value in values.items()}))
    return rows


def _recall(name: str, m: int, count: int, dim: int, beta: float, seeds: range) -> dict[str, np.ndarray]:
    """What `score` says for each draw, [draws, 3] per kind of reading."""
    scores: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in READS}
    for seed in seeds:
        patterns, cue, target = draw_patterns(count, dim, seed)
        memory = LAYERS[name][0](patterns, beta, m, seed)
        for number in range(1, max(READS.values()) + 1):
            last = memory(cue)
            for kind, wanted in READS.items():
                if wanted == number:
                    scores[kind].append(score(last, target))
            cue = last.sign() / dim**0.5
    return {kind: np.array(values) for kind, values in scores.items()}


def draw_patterns(count: int, dim: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Patterns [Z, n, D], and of some of them the cues and the patterns themselves [Z, C, D]; Z C = CUES."""
    generator = torch.Generator().manual_seed(seed)
    sets = max(1, min(SETS, CUES // count))
    patterns = (torch.randint(2, (sets, count, dim), generator=generator) * 2.0 - 1) / dim**0.5
    target = patterns[:, torch.arange(CUES // sets) % count]
    flipped = torch.rand(target.shape, generator=generator).argsort(-1) < round(FLIPPED * dim)
    return patterns, torch.where(flipped, -target, target), target


def score(last: Tensor, target: Tensor) -> tuple[float, float, float]:
    """Share of wrong bits (0 is half wrong), 1 - cosine, share of cues of which no bit is wrong."""
    wrong = (1 - (last * target).sign()) / 2
    cosine = torch.cosine_similarity(last, target, dim=-1)
    return wrong.mean().item(), 1 - cosine.mean().item(), (wrong == 0).all(-1).float().mean().item()


def find_capacities(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The capacity of each layer, m, D and kind of reading, with its interval; None beyond the patterns tried."""
    curves: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        curves.setdefault((row["layer"], row["m"], row["D"], row["reads"]), []).append(row)
    return [
        dict(zip(("layer", "m", "D", "reads"), curve, strict=True))
        | {name: _crossing(mine, of) for name, of in (("capacity", "wrong_bits"), ("low", "high"), ("high", "low"))}
        for curve, mine in curves.items()
    ]


def _crossing(curve: list[dict[str, Any]], of: str) -> float | None:
    """Where the curve first passes the level, linear in log n; None where it never does."""
    for before, after in pairwise(curve):
        if after[of] > LEVEL:
            share = (LEVEL - before[of]) / (after[of] - before[of])
            return float(f"{before['patterns'] * (after['patterns'] / before['patterns']) ** share:.4g}")
    return None


def fit_growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How the capacity grows, read once, by least squares: with m as a power, with D exponentially.

    Theory for random neurons: phi(q).phi(k) / exp(q.k) has variance (exp(|q + k|^2) - 1) / m, at the cue's own pattern
    exp(2 beta (1 + c)) / m with c the overlap. It stays below 1 up to beta = log m / (2 (1 + c)), where the own pattern
    outweighs n others up to about n = exp(2 beta c) = m^(c / (1 + c)). For the exact kernel: n other patterns are
    farther from the cue than its own up to about n = exp(D (log 2 - entropy of the flips)).
    """
    once = [row for row in find_capacities(rows) if row["reads"] == "once" and row["capacity"]]
    fits = []
    for name in ("orthogonal", "independent"):
        mine = [row for row in once if row["layer"] == name]
        fit = linregress(np.log([row["m"] for row in mine]), np.log([row["capacity"] for row in mine]))
        fits.append((f"{name}: d log n / d log m", fit, OVERLAP / (1 + OVERLAP)))
    mine = [row for row in once if row["layer"] == "exact"]
    fit = linregress([row["D"] for row in mine], np.log([row["capacity"] for row in mine]))
    fits.append(("exact: d log n / d D", fit, EXPONENT))
    return [
        {"what": what, "slope": float(fit.slope), "standard_error": float(fit.stderr), "theory": float(theory)}
        for what, fit, theory in fits
    ]


COLOURS = {
    "exact": "black",
    "Hebbian": "#d55e00",
    "orthogonal": "#0072b2",
    "independent": "#56b4e9",
    "classical": "#009e73",
    "constant": "#999999",
}
MARKERS = {16: "v", 64: "o", 256: "s", 1024: "D", 4096: "^"}


def plot(rows: list[dict[str, Any]]) -> Figure:
    """Wrong bits against n; capacity against m; capacity of the exact kernel against D. Read once."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["reads"] == "once"]
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.5, 1.2, 0.8))
    _plot_curves(left, rows)
    _plot_capacities(middle, find_capacities(rows))
    _plot_widths(right, [row for row in find_capacities(rows) if row["layer"] == "exact"])
    for axis in (left, middle, right):
        axis.grid(alpha=0.25)
    return figure


def _plot_curves(axis: Axes, rows: list[dict[str, Any]]) -> None:
    for name, (_, sizes) in LAYERS.items():
        for m in sizes if name != "independent" else ():
            mine = [row for row in rows if (row["layer"], row["m"], row["D"]) == (name, m, DIM)]
            count = [row["patterns"] for row in mine]
            style = {"color": COLOURS[name], "lw": 2 if name == "exact" else 1.2}
            label = (
                f"{name}, m = {m:,}"
                if m > 1
                else {"exact": "exact kernel", "constant": "constant (control)"}.get(name, name)
            )
            axis.plot(
                count, [100 * row["wrong_bits"] for row in mine], label=label, marker=MARKERS.get(m), ms=4, **style
            )
            low, high = ([100 * row[end] for row in mine] for end in ("low", "high"))
            axis.fill_between(count, low, high, color=COLOURS[name], alpha=0.15, lw=0)
    axis.axhline(100 * FLIPPED, color="black", ls=":", lw=1)
    axis.text(1, 100 * FLIPPED + 0.5, "the cue itself", fontsize=8)
    axis.axhline(100 * LEVEL, color="black", ls="--", lw=1)
    axis.text(2**4.5, 100 * LEVEL + 0.5, f"capacity: {LEVEL:.0%}", fontsize=8)
    axis.set(
        xscale="log", xlabel="stored patterns n", ylabel="wrong bits, %", title=f"patterns of {DIM} bits, read once"
    )
    axis.set_xscale("log", base=2)
    axis.set_ylim(-2, 72)
    axis.legend(fontsize=8, ncols=2, loc="upper left")


def _plot_capacities(axis: Axes, capacities: list[dict[str, Any]]) -> None:
    sizes = sorted(MARKERS)
    for row in capacities:
        if row["D"] == DIM and row["m"] <= 1:
            name = row["layer"]
            axis.axhline(row["capacity"], color=COLOURS[name], lw=1.2)
            axis.text(sizes[0], row["capacity"] * 1.1, name, color=COLOURS[name], fontsize=8)
    for name in ("Hebbian", "orthogonal", "independent"):
        mine = [row for row in capacities if row["layer"] == name]
        capacity = np.array([row["capacity"] for row in mine])
        spread = np.abs([[row["low"], row["high"]] for row in mine] - capacity[:, None]).T
        axis.errorbar(
            [row["m"] for row in mine], capacity, spread, color=COLOURS[name], marker="o", ms=4, capsize=2, label=name
        )
    axis.plot(sizes, sizes, color=COLOURS["Hebbian"], ls=":", lw=1, label="n = m")
    power = OVERLAP / (1 + OVERLAP)
    first = next(row for row in capacities if row["layer"] == "orthogonal")
    line = [first["capacity"] * (m / first["m"]) ** power for m in sizes[1:]]
    axis.plot(sizes[1:], line, color=COLOURS["orthogonal"], ls=":", lw=1, label=f"slope c / (1 + c) = {power:.2f}")
    axis.set(
        xlabel="hidden neurons m",
        ylabel=f"capacity (patterns at {LEVEL:.0%} wrong bits)",
        title=f"capacity, {DIM} bits",
    )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_ylim(0.8, 10**5)
    axis.legend(fontsize=8, loc="upper left")


def _plot_widths(axis: Axes, capacities: list[dict[str, Any]]) -> None:
    capacities = sorted(capacities, key=lambda row: row["D"])
    width, capacity = (np.array([row[name] for row in capacities]) for name in ("D", "capacity"))
    axis.plot(width, capacity, "o-", color="black", label="exact kernel")
    axis.plot(
        width, capacity[0] * np.exp(EXPONENT * (width - width[0])), "k:", lw=1, label=f"slope exp({EXPONENT:.2f} D)"
    )
    axis.set(yscale="log", xlabel="bits per pattern D", title="exact kernel", xticks=width)
    axis.legend(fontsize=8)


def format_markdown(rows: list[dict[str, Any]]) -> str:
    """Capacities as a markdown table, one line per layer; docs/science.md must hold it as it is (tested)."""
    found = {(row["layer"], row["m"], row["D"], row["reads"]): row["capacity"] for row in find_capacities(rows)}
    lines = ["| hidden layer | m | capacity, read once | iterated |", "| --- | --- | --- | --- |"]
    for name, (_, sizes) in LAYERS.items():
        for m in sizes:
            title = f"{name}, D = {DIM}" if name == "exact" else name
            lines.append(f"| {title} | {f'{m:,}' if m > 1 else '-'} | {_short(found, name, m, DIM)} |")
        if name == "exact":
            lines += [f"| exact, D = {dim} | - | {_short(found, name, 0, dim)} |" for dim in WIDTHS if dim != DIM]
    return "\n".join(lines)


def _short(found: dict[Any, float | None], name: str, m: int, dim: int) -> str:
    values = (found[name, m, dim, kind] for kind in READS)
    return " | ".join("more" if value is None else f"{float(f'{value:.2g}'):,g}" for value in values)


def main(json: JsonOption = None, figure: FigureOption = None, limit: LimitOption = None, seed: SeedOption = 0) -> None:
    """Measure how many patterns the network retrieves, by hidden layer; --limit is the number of draws (default 8)."""
    rows = measure(limit or 8, seed)
    print_rows(
        find_capacities(rows), title=f"Capacity: patterns at which {LEVEL:.0%} of the bits are wrong; 95 % interval"
    )
    print_rows(fit_growth(rows), title="Growth of the capacity, read once, against theory")
    if json:
        write_json(json, rows, seed=seed)
    if figure:
        write_figure(figure, plot(rows))


if __name__ == "__main__":
    run_script(main)
