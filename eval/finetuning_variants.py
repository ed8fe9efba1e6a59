"""What the fine-tuning scripts share: the kinds of attention that are compared, their options, and the runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from astroattn import AstroConfig, patch
from eval.common import print_rows, write_json
from eval.finetuning import Settings, Task, finetune, make_accelerator
from eval.finetuning_state import last_checkpoint


class Attention(StrEnum):
    """The kinds of attention that are trained with the same budget and seeds."""

    original = "original"
    default = "default"
    linear = "linear"
    random = "random"


AttentionOption = Annotated[
    list[Attention],
    typer.Option(
        help="original: the model as it is; default: near + far; linear: a learned hidden layer alone, CLS exact; "
        "random: the same with random features. May be repeated."
    ),
]
HiddenOption = Annotated[int, typer.Option(min=1, help="Hidden neurons of linear and random.")]
DistillOption = Annotated[int, typer.Option(min=0, help="Steps of astroattn.distill before, for linear.")]
EpochsOption = Annotated[int, typer.Option(min=1, help="Passes over the training data.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Items in a batch, of all processes together.")]
RateOption = Annotated[float, typer.Option(min=0, help="Highest learning rate.")]
HiddenRateOption = Annotated[float, typer.Option(min=0, help="The same for learned hidden layers.")]
SeedsOption = Annotated[int, typer.Option(min=1, help="Number of seeds: 0, 1, ...")]
PatienceOption = Annotated[
    int | None,
    typer.Option(min=1, help="Stop after so many epochs without a lower loss on the validation part; keep the best."),
]
OutOption = Annotated[Path | None, typer.Option(help="Folder for checkpoints; without it nothing is written.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoints in --out.")]


def make_config(attention: Attention, num_hidden: int) -> AstroConfig | None:
    """The config of a kind of attention, None for the original."""
    if attention is Attention.original:
        return None
    if attention is Attention.default:
        return AstroConfig()
    hidden = "learned" if attention is Attention.linear else "random"
    return AstroConfig(hidden=hidden, num_hidden=num_hidden, near=0, exact_keys=0, exact_queries=1)


def run_all(
    load: Callable[[], nn.Module],
    task: Task,
    settings: Sequence[Settings],
    *,
    num_hidden: int,
    distill: int,
    out: Path | None,
    resume: bool,
    json: Path | None,
    keep: Callable[[nn.Module, Path], None] | None = None,
) -> list[dict[str, Any]]:
    """Train every variant from the same pretrained model, print a table and, where asked, write rows and checkpoints.

    Args:
        load: gives the pretrained model with a head; called once a run, from the seed of the run.
        keep: writes the finished model into a folder.

    Raises:
        ValueError: as `eval.finetuning.finetune`; `resume` without `out`.
    """
    if resume and out is None:
        raise ValueError("resume: needs --out, the folder with the checkpoints")
    torch.set_flush_denormal(True)  # the exponentials of hidden layers make many, which slow a CPU down
    accelerator = make_accelerator()
    first = accelerator.is_main_process
    rows = []
    for each in tqdm(settings, task.name, unit="run", disable=not first):
        torch.manual_seed(each.seed)
        model = load()
        config = make_config(Attention(each.attention), num_hidden)
        if config is not None:
            patch(model, config)
        start = time.perf_counter()
        folder = None if out is None else out / f"{each.attention}-{each.seed}"
        begun = resume and folder is not None and last_checkpoint(folder) is not None
        if distill and each.attention == Attention.linear and not begun:
            _distill(model, task, each, distill, accelerator)
        seconds = time.perf_counter() - start
        result = finetune(model, task, each, accelerator, folder=folder, resume=resume)
        if folder is not None and keep is not None and first:
            keep(accelerator.unwrap_model(model), folder / "model")
        rows.append({"attention": each.attention, "seed": each.seed, "distill_seconds": seconds, **result})
    if first:
        print_rows([{name: row[name] for name in row if name != "log"} for row in rows], title=task.name)
        print_rows(summarise(rows), title="Mean and standard deviation over seeds")
        if json is not None:
            write_json(json, rows, seed=settings[0].seed, device=str(accelerator.device))
    accelerator.end_training()
    return rows


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation of the accuracy over seeds, in percent, one row per kind of attention."""
    summary = []
    for attention in dict.fromkeys(row["attention"] for row in rows):
        values = [100 * row["accuracy"] for row in rows if row["attention"] == attention]
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        summary.append({"attention": attention, "accuracy": statistics.mean(values), "spread": spread})
    return summary


def _distill(model: nn.Module, task: Task, settings: Settings, steps: int, accelerator: Accelerator) -> None:
    """Attention transfer on the items that are trained on, without their labels."""
    from astroattn.distillation import distill

    size, items = settings.batch_size, list(task.train)
    starts = range(0, len(items) - size + 1, size)
    batches = [task.collate(items[start : start + size])[0] for start in starts]
    first = accelerator.is_main_process
    distill(model, batches, steps=steps, seed=settings.seed, accelerator=accelerator, progress=first)
