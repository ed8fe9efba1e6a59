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
from pathlib import Path
from typing import Annotated

import torch
import typer

from eval.common import JsonOption, LimitOption, SeedsOption, data_folder, run_script
from eval.distill_speech.page import format_differences, format_results
from eval.distill_speech.training import (
    CONDITIONS,
    Measure,
    Speech,
    load_speech,
    train_and_measure,
)
from eval.trained import ORIGINAL, UNTRAINED, RateOption, Row, add_rows, start_rows

Name = StrEnum("Name", {name: name for name in CONDITIONS})
ConditionsOption = Annotated[
    list[Name] | None, typer.Option("--conditions", help="Only this attention; may be given several times.")
]
HeldOutOption = Annotated[
    bool, typer.Option("--held-out", help="Measure on two clips of the even half, to choose settings on.")
]


def measure(
    speech: Speech, names: Sequence[str], seeds: int, rows: list[Row], json: Path | None, rate: float | None = None
) -> None:
    """Add to `rows` what is not there yet, seed after seed, and write all whenever there is more."""
    measure_model = Measure(speech)
    if not rows:
        start = {"attention": ORIGINAL, "training": UNTRAINED, "seed": 0, "options": None, "clips": 0, "seconds": 0.0}
        rows.append(start | measure_model(speech.encoder))
    several = [name for name in names if CONDITIONS[name].stages or CONDITIONS[name].drawn]
    wanted = [(seed, name) for seed in range(seeds) for name in (several if seed else names)]
    add_rows(rows, wanted, lambda name, seed: train_and_measure(speech, measure_model, name, seed, rate), json)


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
    rows = start_rows(json, rate)
    measure(load_speech(folder, limit, held_out=held_out), conditions or list(CONDITIONS), seeds, rows, json, rate)
    print(f"{format_results(rows)}\n\n{format_differences(rows)}")


if __name__ == "__main__":
    run_script(main, data=True)
