"""What training brings back to a vision transformer with few neurons: ViT-tiny on photos that nothing was trained on.

All 12 layers are replaced (197 tokens, CLS exact) and learn from the even half of the photos to answer as the original
does, without labels, on random crops and reflections: first layer by layer where the hidden layer is learned, then end
to end with every weight moving. Controls are given the same steps end to end: the near field alone, random features,
uniform attention, a near field of one patch. Reported is the odd half. The folder that the environment variable
ASTROATTN_DATA names has the weights (`vit_tiny_patch16_224`) and the photos (`imagenet_photos`).

Settings were chosen on a quarter of the even half, as --held-out does: trained on the other three, measured on it.

    python -m eval.distill_photos --held-out --seeds 1 --rate 2e-4 --conditions "random 64"    # and other rates
    python -m eval.distill_photos --json out/distill_photos.json --seeds 5     # some half an hour of one core
    python -m eval.distill_photos.page      # the tables of docs/experiments/photos.md
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from eval.common import JsonOption, LimitOption, SeedsOption, data_folder, run_script
from eval.distill_photos.page import format_differences, format_results
from eval.distill_photos.training import (
    CONDITIONS,
    LOOKS,
    SIDE,
    Measure,
    Photos,
    load_photos,
    train_and_measure,
)
from eval.trained import ORIGINAL, UNTRAINED, RateOption, Row, add_rows, start_rows

Name = StrEnum("Name", {name: name for name in CONDITIONS})
ConditionsOption = Annotated[
    list[Name] | None,
    typer.Option("--conditions", help="Only this attention; may be given several times. Some are only measured so."),
]
HeldOutOption = Annotated[
    bool, typer.Option("--held-out", help="Measure on a quarter of the even half, to choose settings on.")
]
PixelsOption = Annotated[int, typer.Option("--pixels", min=16, help="Per side of a photo; a patch has 16.")]


def measure(
    photos: Photos, names: Sequence[str], seeds: int, rows: list[Row], json: Path | None, rate: float | None = None
) -> None:
    """Add to `rows` what is not there yet, seed after seed, and write all whenever there is more."""
    measure_model = Measure(photos)
    if not rows:
        start = {"attention": ORIGINAL, "training": UNTRAINED, "seed": 0, "steps": 0, "photos": 0, "seconds": 0.0}
        rows.append(start | measure_model(photos.model))
    wanted = [(seed, name) for seed in range(seeds) for name in names]
    add_rows(rows, wanted, lambda name, seed: train_and_measure(photos, measure_model, name, seed, rate), json)


def main(
    conditions: ConditionsOption = None,
    pixels: PixelsOption = SIDE,
    held_out: HeldOutOption = False,
    rate: RateOption = None,
    seeds: SeedsOption = 5,
    limit: LimitOption = None,
    json: JsonOption = None,
) -> None:
    """Train every attention on half of the photos and measure on the other; goes on from the rows in --json."""
    folder = data_folder()
    if folder is None:
        raise typer.BadParameter("ASTROATTN_DATA is not set; it names the folder that has imagenet_photos/photos.tar")
    torch.set_flush_denormal(True)  # the exponentials of hidden layers make many, which slow a CPU down
    rows = start_rows(json, rate)
    names = conditions or [name for name in CONDITIONS if name not in LOOKS]
    measure(load_photos(folder, limit, pixels, held_out=held_out), names, seeds, rows, json, rate)
    print(f"{format_results(rows)}\n\n{format_differences(rows)}")


if __name__ == "__main__":
    run_script(main, data=True)
