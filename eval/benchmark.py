"""Time and peak memory of attention against the number of tokens, side by side with SDPA in one run.

Each contestant must first agree with what it claims to compute; then it is timed, after a warm-up, in turns with the
others. On a CPU read the ratios, not the milliseconds.

    python -m eval.benchmark --json out/benchmark.json --figure out/benchmark.png
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from tqdm import tqdm

from astroattn import AstroConfig, AstrocyteAttention
from astroattn.fidelity.resources import measure_memory
from eval.common import FigureOption, JsonOption, SeedOption, print_rows, write_figure, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTHS = (197, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
HEAD_DIM = 64
CONFIGS = {
    "default": AstroConfig(),
    "large tiles": AstroConfig(tile=64, near=192, num_hidden=64, exact_keys=0),
    "random, m = 64": AstroConfig(hidden="random", num_hidden=64, near=0),
}


def measure(longest: int, heads: int, repeats: int, seed: int, device: str) -> list[dict[str, Any]]:
    """One row per length and contestant: median seconds, ratio to SDPA, peak bytes beyond the inputs."""
    rows = []
    lengths = [length for length in LENGTHS if length <= longest]
    for length in tqdm(lengths, "measuring", unit="length"):
        generator = torch.Generator().manual_seed(seed)
        query, key, value = torch.randn(3, 1, heads, length, HEAD_DIM, generator=generator).to(device)
        runs = {"SDPA": _sdpa(query, key, value)}
        runs |= {name: _astrocyte(config, query, key, value) for name, config in CONFIGS.items()}
        with torch.inference_mode():
            seconds = _time(runs, repeats, device)
            for name, run in runs.items():
                rows.append(
                    {
                        "tokens": length,
                        "name": name,
                        "seconds": seconds[name],
                        "times SDPA": seconds[name] / seconds["SDPA"],
                        "peak MB": measure_memory(run, torch.device(device)) / 1e6,
                    }
                )
    return rows


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    return lambda: F.scaled_dot_product_attention(query, key, value)


def _astrocyte(config: AstroConfig, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    network = AstrocyteAttention(query.shape[1], HEAD_DIM, config).to(query.device)
    _check(config, query.device)
    return lambda: network(query, key, value)


def _check(config: AstroConfig, device: torch.device) -> None:
    """What is timed must be attention: a constant value comes out as it went in."""
    query, key = torch.randn(2, 1, 2, 300, HEAD_DIM, device=device)
    network = AstrocyteAttention(2, HEAD_DIM, config).to(device)
    torch.testing.assert_close(network(query, key, torch.ones_like(key)), torch.ones_like(key), rtol=1e-3, atol=1e-3)


def _time(runs: dict[str, Callable[[], Tensor]], repeats: int, device: str) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            if turn:  # the first is the warm-up
                times[name].append(time.perf_counter() - start)
    return {name: sorted(each)[len(each) // 2] for name, each in times.items()}


def find_crossover(rows: list[dict[str, Any]], name: str) -> int | None:
    """The shortest length from which on `name` is faster than SDPA, of those measured."""
    slower = [row["tokens"] for row in rows if row["name"] == name and row["times SDPA"] >= 1]
    longer = [row["tokens"] for row in rows if row["name"] == name and row["tokens"] > max(slower, default=0)]
    return min(longer, default=None)


def plot(rows: list[dict[str, Any]]) -> Figure:
    """Time relative to SDPA and peak memory against the number of tokens, log-log."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4))
    axes = figure.subplots(1, 2)
    for name, marker in zip(("SDPA", *CONFIGS), "xosd", strict=True):
        mine = [row for row in rows if row["name"] == name]
        tokens = [row["tokens"] for row in mine]
        axes[0].plot(tokens, [row["times SDPA"] for row in mine], marker=marker, label=name)
        axes[1].plot(tokens, [row["peak MB"] for row in mine], marker=marker, label=name)
    labels = ("time of a forward, in times of SDPA", "peak memory beyond the inputs, MB")
    for axis, label in zip(axes, labels, strict=True):
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    return figure


def main(
    json: JsonOption = None,
    figure: FigureOption = None,
    limit: Annotated[int, typer.Option("--limit", help="Longest sequence, in tokens.")] = 16384,
    heads: Annotated[int, typer.Option(min=1, help="Heads.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each; the median counts.")] = 5,
    seed: SeedOption = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Time attention and measure its peak memory against SDPA."""
    rows = measure(limit, heads, repeats, seed, device)
    threads = torch.get_num_threads()
    print_rows(rows, title=f"Forward, 1 sequence, {heads} heads of {HEAD_DIM}, float32, {threads} threads")
    for name in CONFIGS:
        print(f"{name}: faster than SDPA from {find_crossover(rows, name) or 'no measured length'} tokens on")
    if json:
        write_json(json, rows, seed=seed, device=device)
    if figure:
        write_figure(figure, plot(rows))


if __name__ == "__main__":
    typer.run(main)
