"""The frontier: error of whole models against counted cost and measured time of their attention, ours and others'.

All self-attention of a model is replaced by one contestant after the other; errors are those of the odd half of the
data, on which nothing was chosen. Peers are plain PyTorch (`eval.peers`), so their times are no verdict on kernels that
others have for GPUs. On a CPU read the ratios, not the seconds. With --model, the rows of the other models in the JSON
stay as they are, so that the models can be measured one by one. Times need a machine that does nothing else.

    python -m eval.frontier --json out/frontier.json --figure out/frontier.png
    python -m eval.frontier --model whisper --json out/frontier.json --figure out/frontier.png
    python -m eval.frontier --model whisper --no-peers --json out/frontier.json --figure out/frontier.png
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from eval.common import (
    FigureOption,
    JsonOption,
    LimitOption,
    SeedOption,
    print_rows,
    read_rows,
    run_script,
    write_figure,
    write_json,
)
from eval.frontier.cases import ModelOption, choose_from_command_line
from eval.frontier.comparing import describe, dominated, format_markdown
from eval.frontier.figure import plot
from eval.frontier.measuring import Row, measure

SHOWN = ("line", "budget", "cost", "time", "error", "agreement")
PeersOption = Annotated[
    bool, typer.Option("--peers/--no-peers", help="Measure the peers, too; else their rows in --json stay as they are.")
]


def main(
    json: JsonOption = None,
    figure: FigureOption = None,
    model: ModelOption = None,
    limit: LimitOption = None,
    seed: SeedOption = 0,
    peers: PeersOption = True,
) -> None:
    """Measure every contestant in every model, and name the peers that lie below our curve."""
    console = Console()
    names = choose_from_command_line(model)
    if model is None and "digits" in names:
        console.print("ASTROATTN_DATA is not set: ViT-tiny and Whisper are left out, the digits ViT stands in")
    rows = read_rows(json) if json and (model or not peers) else []
    for name in names:
        found = measure(limit, seed, name, peers=peers)
        print_rows([{key: row[key] for key in SHOWN} for row in found], title=found[0]["model"])
        rows = _merge(rows, found)
        if json:  # at once, so that a run that breaks off is not lost
            write_json(json, rows, seed=seed)
    print(format_markdown(rows))
    below = dominated(rows)
    console.print("Below our curve: " + ("none" if not below else ""))
    for row in below:
        console.print("  " + describe(row))
    if figure:
        write_figure(figure, plot(rows))


def _merge(rows: list[Row], found: list[Row]) -> list[Row]:
    """The rows with those of one model replaced, shortest sequences first, each with whether it is below our curve.

    Where only ours were measured, its peers stay.
    """
    ours = all(row["ours"] for row in found)
    stay = [row for row in rows if row["model"] != found[0]["model"] or (ours and not row["ours"])]
    rows = found + stay  # ours first
    rows.sort(key=lambda row: row["tokens"])
    below = [id(row) for row in dominated(rows)]
    return [row | {"below_ours": id(row) in below} for row in rows]


if __name__ == "__main__":
    run_script(main, data=True)
