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
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from eval.common import JsonOption, LimitOption, SeedsOption, data_folder, read_rows, run_script, write_json
from eval.distill_photos.page import format_differences, format_results
from eval.distill_photos.training import (
    CONDITIONS,
    LOOKS,
    ORIGINAL,
    UNTRAINED,
    Measure,
    Photos,
    load_photos,
    train_and_measure,
)

Name = StrEnum("Name", {name: name for name in CONDITIONS})
ConditionsOption = Annotated[
    list[Name] | None,
    typer.Option("--conditions", help="Only this attention; may be given several times. Some are only measured so."),
]
HeldOutOption = Annotated[
    bool, typer.Option("--held-out", help="Measure on a quarter of the even half, to choose settings on.")
]
RateOption = Annotated[
    float | None,
    typer.Option("--rate", help="Of all weights outside the hidden layers, in the place of each attention's own."),
]


def measure(
    photos: Photos, names: Sequence[str], seeds: int, rows: list[dict[str, Any]], keep: Any, rate: float | None = None
) -> None:
    """Add to `rows` what is not there yet, seed after seed, and `keep` them whenever there are more."""
    measure_model = Measure(photos)
    if not rows:
        start = {"attention": ORIGINAL, "training": UNTRAINED, "seed": 0, "steps": 0, "photos": 0, "seconds": 0.0}
        rows.append(start | measure_model(photos.model))
    there = {(row["seed"], row["attention"]) for row in rows}
    wanted = [(seed, name) for seed in range(seeds) for name in names if (seed, name) not in there]
    for seed, name in (bar := tqdm(wanted, unit="model")):
        bar.set_description(f"{name}, seed {seed}")
        rows += train_and_measure(photos, measure_model, name, seed, rate)
        keep(rows)


def main(
    conditions: ConditionsOption = None,
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
    rows = read_rows(json) if json else []
    if any(row.get("rate") != rate for row in rows if row["attention"] != ORIGINAL):
        raise typer.BadParameter(f"--rate: {json} has rows of another rate, or of each attention's own")

    def keep(rows: list[dict[str, Any]]) -> None:  # at once, so that a run that breaks off is not lost
        if json:
            write_json(json, rows, seed=0)

    names = conditions or [name for name in CONDITIONS if name not in LOOKS]
    measure(load_photos(folder, limit, held_out=held_out), names, seeds, rows, keep, rate)
    print(f"{format_results(rows)}\n\n{format_differences(rows)}")


if __name__ == "__main__":
    run_script(main, data=True)
