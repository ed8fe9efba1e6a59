"""Does what a plan promises hold on inputs that it has not seen?

For each seed a plan is calibrated on the even half of a model's data for a tolerance: the share of predictions of a
ViT, or of nearest neighbours of a BERT's embeddings, that must stay. The patched model is measured on the odd half.
ViT-tiny (500 photos a half) needs ASTROATTN_DATA; without it the digits ViT stands in. Texts are cut into 256 tokens:
of 512 there are fewer than such a promise needs.

    python -m eval.promises --json out/promises.json --figure out/promises.png --model vit224 --model minilm512
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from astroattn import calibrate, patched
from eval.common import (
    FigureOption,
    JsonOption,
    LimitOption,
    SeedsOption,
    data_folder,
    print_rows,
    rounded,
    run_script,
    write_figure,
    write_json,
)
from eval.frontier.cases import SOURCES, Case

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ITEMS = 500  # of a half; fewer than 230 cannot promise 99 %
SIZES = {"vit224": 224, "digits": 197, "minilm512": 256}
METRICS = {"vit224": "top1", "digits": "top1", "minilm512": "neighbour"}


def load(name: str, limit: int | None) -> Case:
    """A case of `eval.frontier`, with more items."""
    source = SOURCES[name]
    return source.load(SIZES[name], min(ITEMS, limit or ITEMS), source.batch_size)


@torch.inference_mode()
def read(case: Case, batches: Sequence[Any]) -> Tensor:
    """What the model puts out, one row an item."""
    return torch.cat([case.kind.read(case.model, inputs) for inputs in batches])


def measure(
    seeds: int, limit: int | None, tolerance: float, names: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """One row per model and seed: what was promised and for which cost, what the odd half shows, and the seconds."""
    for name in names or ("vit224" if data_folder() else "digits", "minilm512"):
        case = load(name, limit)
        even, odd = (list(case.batches(half)) for half in ("even", "odd"))
        truth = read(case, odd)
        for seed in tqdm(range(seeds), case.title, unit="seed"):
            start = perf_counter()
            plan = calibrate(case.model, even, tolerance=tolerance, metric=METRICS[name], seed=seed, progress=False)
            seconds = perf_counter() - start
            with patched(case.model, plan):
                agreement = case.kind.compare(read(case, odd), truth)[1]
            assert agreement is not None  # of either kind there is one
            row = {"model": case.title, "items": len(truth), "seed": seed, "cost": plan.cost, "agreement": agreement}
            yield rounded(row | {"tolerance": tolerance, "held": agreement >= tolerance, "seconds": seconds})


def plot(rows: list[dict[str, Any]]) -> Figure:
    """Agreement on the unseen half against cost, a point a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5))
    axes = figure.subplots()
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        axes.plot([row["cost"] for row in mine], [row["agreement"] for row in mine], "o", label=model, alpha=0.7)
    axes.axhline(rows[0]["tolerance"], color="gray", linestyle="--", label="promised")
    axes.set(xlabel="cost over softmax's", ylabel="agreement on unseen inputs")
    axes.legend()
    return figure


def main(
    json: JsonOption = None,
    figure: FigureOption = None,
    seeds: SeedsOption = 10,
    limit: LimitOption = None,
    tolerance: Annotated[float, typer.Option(help="The least share that must stay.", min=0.0, max=1.0)] = 0.99,
    model: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(METRICS)}; all that are here if none.")
    ] = None,
) -> None:
    """Calibrate with several seeds on one half of the data, and measure on the other."""
    if unknown := [name for name in model or () if name not in METRICS]:
        raise ValueError(f"model: {unknown[0]!r}; must be of {', '.join(METRICS)}")
    rows = []
    for row in measure(seeds, limit, tolerance, model):
        rows.append(row)
        if json:  # at once, so that a run that breaks off is not lost
            write_json(json, rows, seed=0)
    print_rows(rows, title=f"A tolerance of {tolerance:.0%}")
    for title in dict.fromkeys(row["model"] for row in rows):
        held = [row["held"] for row in rows if row["model"] == title]
        Console().print(f"{title}: held with {sum(held)} of {len(held)} seeds")
    if figure:
        write_figure(figure, plot(rows))


if __name__ == "__main__":
    run_script(main, data=True)
