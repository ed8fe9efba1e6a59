"""What training brings back to a speech encoder with few neurons: that of Whisper tiny.en, and what is then written.

All 4 layers of the encoder are replaced (1,500 frames, of which 64 are near a frame and 64 neurons stand for the
others) and learn from the even half of the clips to hear as the original does, without transcripts: first layer by
layer where the hidden layer is learned, then end to end with every weight of the encoder moving. Controls are given the
same steps end to end: the near field alone, random features, uniform attention, no attention. The library's default is
measured as it is. Reported is the odd half. The folder that the environment variable ASTROATTN_DATA names has the model
(`whisper_tiny_en`) and the clips (`speech`).

Settings were chosen on two clips of the even half, as --held-out does: trained on the other five, measured on these.

    python -m eval.distill_speech --held-out --seeds 1 --rate 2e-4 --conditions "random 64"    # and other rates
    python -m eval.distill_speech --json docs/results/distill_speech.json     # five seeds
    python -m eval.distill_speech.page      # docs/experiments/speech.md
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from eval.common import JsonOption, LimitOption, SeedsOption, data_folder, read_rows, run_script, write_json
from eval.distill_speech.page import format_differences, format_results
from eval.distill_speech.training import (
    CONDITIONS,
    ORIGINAL,
    UNTRAINED,
    Measure,
    Speech,
    load_speech,
    train_and_measure,
)

Name = StrEnum("Name", {name: name for name in CONDITIONS})
ConditionsOption = Annotated[
    list[Name] | None, typer.Option("--conditions", help="Only this attention; may be given several times.")
]
HeldOutOption = Annotated[
    bool, typer.Option("--held-out", help="Measure on two clips of the even half, to choose settings on.")
]
RateOption = Annotated[
    float | None,
    typer.Option("--rate", help="Of all weights outside the hidden layers, in the place of each attention's own."),
]


def measure(
    speech: Speech, names: Sequence[str], seeds: int, rows: list[dict[str, Any]], keep: Any, rate: float | None = None
) -> None:
    """Add to `rows` what is not there yet, seed after seed, and `keep` them whenever there are more."""
    measure_model = Measure(speech)
    if not rows:
        start = {"attention": ORIGINAL, "training": UNTRAINED, "seed": 0, "options": None, "clips": 0, "seconds": 0.0}
        rows.append(start | measure_model(speech.encoder))
    there = {(row["seed"], row["attention"]) for row in rows}
    several = [name for name in names if CONDITIONS[name].stages or CONDITIONS[name].drawn]
    wanted = [(seed, name) for seed in range(seeds) for name in (several if seed else names)]
    for seed, name in (bar := tqdm([each for each in wanted if each not in there], unit="model")):
        bar.set_description(f"{name}, seed {seed}")
        rows += train_and_measure(speech, measure_model, name, seed, rate)
        keep(rows)


def main(
    conditions: ConditionsOption = None,
    held_out: HeldOutOption = False,
    rate: RateOption = None,
    seeds: SeedsOption = 5,
    limit: LimitOption = None,
    json: JsonOption = None,
) -> None:
    """Train every attention on half of the clips and measure on the other; goes on from the rows in --json."""
    folder = data_folder()
    if folder is None:
        raise typer.BadParameter("ASTROATTN_DATA is not set; it names the folder that has speech and whisper_tiny_en")
    torch.set_flush_denormal(True)  # the exponentials of hidden layers make many, which slow a CPU down
    rows = read_rows(json) if json else []
    if any(row.get("rate") != rate for row in rows if row["attention"] != ORIGINAL):
        raise typer.BadParameter(f"--rate: {json} has rows of another rate, or of each attention's own")

    def keep(rows: list[dict[str, Any]]) -> None:  # at once, so that a run that breaks off is not lost
        if json:
            write_json(json, rows, seed=0)

    measure(load_speech(folder, limit, held_out=held_out), conditions or list(CONDITIONS), seeds, rows, keep, rate)
    print(f"{format_results(rows)}\n\n{format_differences(rows)}")


if __name__ == "__main__":
    run_script(main, data=True)
