"""What training brings back to a reader of long texts with few neurons: MiniLM, asked for a fact far away.

Documents of 512 tokens begin with a question, what colour the key of somebody is, and answer it in their second half,
where the key of somebody else has the other colour. They come in pairs of the same words, so that a bag of words is
right in half of them. MiniLM with a new head learns it with softmax attention and labels: that is the original. Then
all 6 layers are replaced. Learned neurons learn layer by layer to attend as it does; measured as they are, are the
library's default, its exact keys without neurons, Hebbian neurons without exact keys, random features, uniform
attention, and near fields alone, which cannot reach the facts. Some, asked for by name, are trained end to end too.
Reported documents are about other names, and made of other docstrings, than those that are trained on.

    python -m eval.distill_long_texts --json docs/results/distill_long_texts.json     # five seeds
    python -m eval.distill_long_texts --json docs/results/distill_long_texts.json --seeds 1 \\
        --conditions "learned 64, end to end"      # and others
    python -m eval.distill_long_texts.page      # docs/experiments/long_texts.md
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from eval.common import JsonOption, LimitOption, SeedsOption, run_script
from eval.distill_long_texts.page import format_differences, format_results
from eval.distill_long_texts.training import (
    CONDITIONS,
    DRAWN,
    LABELS,
    LOOKS,
    Measure,
    Texts,
    fit_original,
    load_texts,
    measure_words,
    train_and_measure,
)
from eval.trained import ORIGINAL, RateOption, Row, add_rows, start_rows

Name = StrEnum("Name", {name: name for name in CONDITIONS})
ConditionsOption = Annotated[
    list[Name] | None,
    typer.Option("--conditions", help="Only this attention; may be given several times. Some are only measured so."),
]
HeldOutOption = Annotated[
    bool, typer.Option("--held-out", help="Measure on documents around other docstrings, to choose settings on.")
]
OriginalOption = Annotated[
    Path, typer.Option("--original", help="The weights of the original, which is trained where there is no such file.")
]


def measure(
    texts: Texts,
    cost: dict[str, float],
    names: Sequence[str],
    seeds: int,
    rows: list[Row],
    json: Path | None,
    rate: float | None = None,
) -> None:
    """Add to `rows` what is not there yet, seed after seed, and write all whenever there is more."""
    measure_model = Measure(texts)
    if not rows:
        rows.append({"attention": ORIGINAL, "training": LABELS, "seed": 0, **cost} | measure_model(texts.model))
        rows.append(measure_words(texts, measure_model) | ({} if rate is None else {"rate": rate}))
    several = [name for name in names if CONDITIONS[name].stages or name in DRAWN]
    wanted = [(seed, name) for seed in range(seeds) for name in (several if seed else names)]
    add_rows(rows, wanted, lambda name, seed: train_and_measure(texts, measure_model, name, seed, rate), json)


def main(
    conditions: ConditionsOption = None,
    held_out: HeldOutOption = False,
    rate: RateOption = None,
    seeds: SeedsOption = 5,
    limit: LimitOption = None,
    original: OriginalOption = Path("out/long_texts.safetensors"),
    json: JsonOption = None,
) -> None:
    """Train every attention to read as the original does, and measure it; goes on from the rows in --json."""
    torch.set_flush_denormal(True)  # the exponentials of hidden layers make many, which slow a CPU down
    rows = start_rows(json, rate)
    texts = load_texts(limit, held_out=held_out)
    cost = fit_original(texts, original)
    names = conditions or [name for name in CONDITIONS if name not in LOOKS]
    measure(texts, cost, names, seeds, rows, json, rate)
    print(f"{format_results(rows)}\n\n{format_differences(rows)}")


if __name__ == "__main__":
    run_script(main)
