"""Time and peak memory of attention, and of whole models, side by side with SDPA in one run.

A contestant must first agree with plain PyTorch in float64; then it is timed in turns with the others: SDPA with its
fastest fused backend, this library's attention with its kernels and in plain PyTorch, features held in memory, and on
a GPU other people's kernels where they are installed. On a CPU read the ratios, not the seconds.

    python -m eval.benchmark --json out/benchmark.json --figure out/benchmark.png     # on a GPU where there is one
    python -m eval.benchmark --device cpu --dtype float32 --dtype bfloat16 --threads 2

The rows of the JSON have a "part": "settings"; "ceilings", of the machine, measured in this run; "peers", whose kernels
were measured and whose were not; "reported", what is reported elsewhere; "attention"; "models"; and "summary": the
length from which on it is faster than SDPA, the slope of log peak memory in log N, and how far from softmax it is.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import torch
import typer

from eval.benchmark.attention import PASSES, measure_attention
from eval.benchmark.contestants import Problem
from eval.benchmark.figure import plot
from eval.benchmark.models import measure_models
from eval.benchmark.peers import reported_rows
from eval.benchmark.rows import Row, print_results, summarise
from eval.benchmark.timing import Effort
from eval.common import FigureOption, JsonOption, SeedOption, run_script, write_figure, write_json


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Device(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


class Part(StrEnum):
    attention = "attention"
    models = "models"


# Defaults by device; a CPU should be done within a few minutes.
LIMIT = {Device.cpu: 16384, Device.cuda: 131_072}
HEADS = {Device.cpu: 2, Device.cuda: 12}
DTYPE = {Device.cpu: Dtype.float32, Device.cuda: Dtype.bfloat16}


def main(
    json: JsonOption = None,
    figure: FigureOption = None,
    only: Annotated[Part | None, typer.Option(help="The attention alone, or whole models.")] = None,
    device: Annotated[Device | None, typer.Option(help="Where; by default a GPU if there is one.")] = None,
    dtype: Annotated[
        list[Dtype] | None, typer.Option(help="May be given several times; by default float32, on a GPU bfloat16.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=197, help="Longest sequence, in tokens; by default 16384, on a GPU 131072.")
    ] = None,
    peers: Annotated[
        bool, typer.Option(help="Other people's kernels, too, where they are installed; on a GPU.")
    ] = True,
    backward: Annotated[bool, typer.Option(help="Time forward and backward together, too.")] = True,
    batch: Annotated[int, typer.Option(min=1, help="Sequences (of the attention alone).")] = 1,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Heads (of the attention alone); by default 2, on a GPU 12.")
    ] = None,
    head_dim: Annotated[int, typer.Option(min=2, help="Width of a head (of the attention alone).")] = 64,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch; by default what it takes.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Most turns; a turn times every contestant once.")] = 30,
    seconds: Annotated[
        float, typer.Option(help="Fewer turns, down to 3, where all turns would take longer than this.")
    ] = 3.0,
    seed: SeedOption = 0,
) -> None:
    """Time attention and whole models against SDPA, and measure the peak memory of attention."""
    kind = device or (Device.cuda if torch.cuda.is_available() else Device.cpu)
    if threads:
        torch.set_num_threads(threads)
    rows: list[Row] = []

    def keep(new: list[Row]) -> None:
        rows.extend(new)
        if json:  # at once, so that a run that breaks off is not lost
            write_json(json, rows, seed=seed, device=kind)

    shape = {"batch": batch, "heads": heads or HEADS[kind], "head_dim": head_dim}
    limit, effort, place = limit or LIMIT[kind], Effort(repeats, seconds), torch.device(kind)
    on_cpu = "a CPU's, of which others may take a share: read the ratios"
    settings = {"device": kind.value, "limit": limit, **shape, "threads": torch.get_num_threads(), "repeats": repeats}
    settings["seconds"] = on_cpu if kind == Device.cpu else "this GPU's"
    keep([{"part": "settings", **settings}])
    with_peers = peers and kind == Device.cuda and only != Part.models
    if with_peers:
        keep(reported_rows())
    for name in dtype or [DTYPE[kind]]:
        dtype_of = getattr(torch, name)
        if only != Part.models:
            passes = [name for name, needed in PASSES.items() if backward or not needed]
            problem = Problem(**shape, dtype=dtype_of, device=place, seed=seed)
            measure_attention(problem, limit, passes, effort, keep, with_peers)
        if only != Part.attention:
            measure_models(dtype_of, place, limit, effort, seed, keep)
    keep(summarise(rows))
    print_results(rows)
    if figure:
        write_figure(figure, plot(rows))


if __name__ == "__main__":
    run_script(main)
