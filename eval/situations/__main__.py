"""Generated situations: is a patched model what its report says, however it is called and whatever is around it?

A situation is a tiny random model, patched with one of six configs, under a mask, a dtype, a wrapper (compiled,
copied, sharded, with adapters, ...) and a mode, each drawn by hypothesis. Where the original raises, the patched model
may raise the same. Otherwise, with a near field over the whole sequence, outputs and gradients must be the original's
to rounding; with the others they must be finite, must change where astrocytes answer, and must not depend on what
stands in the padding. Calls that are left to the host must be counted and warned of; unpatched, the model must be bit
for bit what it was.

    python -m eval.situations --count 500 --seed 0 --json docs/results/situations.json
    python -m eval.situations --case "model=bert mask=left wrapper=compile"
"""

from __future__ import annotations

import json as files
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from tqdm import tqdm

from eval.common import JsonOption, SeedOption, print_rows, run_script, write_json
from eval.coverage.pool import run_all
from eval.situations.drawing import Situation, draw
from eval.situations.examining import WRONG, examine, judge

PRELOAD = ("eval.situations.examining", "peft", "accelerate", "torch._dynamo", "typer", "tqdm")
OFTEN = 20  # rows


def measure(situations: list[Situation], *, processes: int, seconds: float) -> Iterator[dict[str, Any]]:
    """One row a situation, as they end, each in a process of its own."""
    for situation, answer in run_all(judge, situations, processes=processes, seconds=seconds, preload=PRELOAD):
        if isinstance(answer, str):  # why there is none
            answer = {"came": WRONG, "why": answer, "simplest": str(situation)}
        yield {"situation": str(situation)} | answer


def main(
    json: JsonOption = None,
    count: Annotated[int, typer.Option(help="How many situations.", min=1)] = 500,
    seed: SeedOption = 0,
    case: Annotated[str | None, typer.Option(help="Examine this one situation, a line that a run has printed.")] = None,
    resume: Annotated[bool, typer.Option(help="Examine again what is wrong in the JSON, and what it lacks.")] = False,
    processes: Annotated[int, typer.Option(help="How many at a time.", min=1)] = 2,
    seconds: Annotated[float, typer.Option(help="The most that one may take.", min=1)] = 300,
) -> None:
    """Examine situations; print a line for each that is wrong, and leave with 1 if there is one."""
    if case is not None:
        try:
            print(examine(Situation.parse(case)))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        return
    rows: list[dict[str, Any]] = []
    situations = draw(count, seed)
    places = {str(situation): place for place, situation in enumerate(situations)}
    if resume and json and json.exists():
        rows = files.loads(json.read_text("utf-8"))["rows"]
        rows = [row for row in rows if row["came"] != WRONG and row["situation"] in places]
    done = {row["situation"] for row in rows}
    left = [situation for situation in situations if str(situation) not in done]
    for row in tqdm(measure(left, processes=processes, seconds=seconds), "situations", len(left)):
        rows.append(row)
        if json and len(rows) % OFTEN == 0:  # so that a run that breaks off is not lost
            write_json(json, rows, seed=seed)
        if row["came"] == WRONG:
            tqdm.write(f'{row["why"]}\n    python -m eval.situations --case "{row["simplest"]}"')
    rows.sort(key=lambda row: places[row["situation"]])
    if json:
        write_json(json, rows, seed=seed)
    counts = Counter(row["came"] for row in rows)
    print_rows([{"came": came, "situations": number} for came, number in counts.most_common()], title="Situations")
    if counts[WRONG]:
        raise typer.Exit(1)


if __name__ == "__main__":
    run_script(main)
