"""What the fine-tuning scripts share: the kinds of attention that are compared, their options, and the runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from json import dumps, loads
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from astroattn import AstroConfig, patch
from eval.common import print_rows, show, spread, write_json
from eval.finetuning import Settings, Task, finetune, make_accelerator, shuffle
from eval.finetuning_state import last_checkpoint

COSTS = ("distill_", "")  # what takes seconds: distillation, and fine-tuning
DISTILLED = "distill.json"  # the reports of a run's distillation


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
DistillOption = Annotated[
    int, typer.Option(min=0, help="Steps of astroattn.distill before, layer by layer, for linear.")
]
EndToEndOption = Annotated[
    int, typer.Option(min=0, help="Steps of it end to end, all weights moving, after that: for linear and random.")
]
DistillBatchOption = Annotated[int, typer.Option(min=1, help="Items in a step of --distill, of each process.")]
EpochsOption = Annotated[int, typer.Option(min=1, help="Passes over the training data.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Items in a batch, of all processes together.")]
RateOption = Annotated[float, typer.Option(min=0, help="Highest learning rate.")]
HiddenRateOption = Annotated[float, typer.Option(min=0, help="The same for learned hidden layers.")]
SeedsOption = Annotated[list[int], typer.Option("--seed", min=0, help="Seed of a run. May be repeated.")]
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


def _of_kind(settings: Settings, attention: Attention, seed: int) -> Settings:
    """The settings of a run: only linear has layers that learn by transfer; it and random learn end to end."""
    linear, distilled = attention is Attention.linear, attention in (Attention.linear, Attention.random)
    return replace(
        settings,
        attention=attention.value,
        seed=seed,
        distill=settings.distill if linear else 0,
        end_to_end=settings.end_to_end if distilled else 0,
    )


def run_all(
    load: Callable[[], nn.Module],
    task: Task,
    settings: Settings,
    *,
    attention: Sequence[Attention],
    seeds: Sequence[int],
    num_hidden: int,
    out: Path | None,
    resume: bool,
    json: Path | None,
    keep: Callable[[nn.Module, Path, dict[str, Tensor]], None] | None = None,
) -> list[dict[str, Any]]:
    """Train every variant from the same pretrained model, print a table and, where asked, write rows and checkpoints.

    Args:
        settings: of every run, but for the seed and the kind of attention.
        load: gives the pretrained model with a head; called once a run, from the seed of the run.
        keep: writes the finished model into a folder; it is given the model, the folder, and the whole weights.

    Raises:
        ValueError: as `eval.finetuning.finetune`; `resume` without `out`.
    """
    if resume and out is None:
        raise ValueError("resume: needs --out, the folder with the checkpoints")
    torch.set_flush_denormal(True)  # the exponentials of hidden layers make many, which slow a CPU down
    accelerator = make_accelerator()
    first = accelerator.is_main_process
    runs = [_of_kind(settings, kind, seed) for kind in attention for seed in seeds]
    rows = []
    for each in tqdm(runs, task.name, unit="run", disable=not first):
        torch.manual_seed(each.seed)
        model = load()
        config = make_config(Attention(each.attention), num_hidden)
        if config is not None:
            patch(model, config)
        folder = None if out is None else out / f"{each.attention}-{each.seed}"
        seconds = 0.0
        if each.distill or each.end_to_end:
            if resume and folder is not None and last_checkpoint(folder) is not None:
                seconds = loads((folder / DISTILLED).read_text("utf-8"))["seconds"]
            else:
                seconds = _distill(model, task, each, accelerator, folder)
        result = finetune(model, task, each, accelerator, folder=folder, resume=resume)
        if folder is not None and keep is not None:
            weights = accelerator.get_state_dict(model)  # gathered from all processes where they are sharded
            if first:
                keep(model, folder / "model", weights)
        rows.append(
            {"task": task.name, "attention": each.attention, "seed": each.seed, "distill_seconds": seconds, **result}
        )
    if first:
        print_rows([{name: row[name] for name in row if name != "log"} for row in rows], title=task.name)
        print_rows(summarise(rows), title="Mean and standard deviation over seeds")
        if json is not None:
            write_json(json, rows, seed=runs[0].seed, device=str(accelerator.device))
    accelerator.end_training()
    return rows


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over seeds, one row per task and kind of attention; `spread` is the standard deviation of the accuracy.

    Accuracies are in percent; `difference` is to the original with the same seeds, None without it; the loss in nats;
    seconds of a run.
    """
    summary = []
    for task, attention in dict.fromkeys((row["task"], row["attention"]) for row in rows):
        mine, originals = (
            {row["seed"]: row for row in rows if (row["task"], row["attention"]) == (task, kind)}
            for kind in (attention, "original")
        )
        values = [100 * row["accuracy"] for row in mine.values()]
        comparable = originals.keys() >= mine.keys()
        differences = [
            100 * (row["accuracy"] - originals[seed]["accuracy"]) for seed, row in mine.items() if comparable
        ]
        seconds = {f"{name}seconds": statistics.mean(row[f"{name}seconds"] for row in mine.values()) for name in COSTS}
        summary.append(
            {
                "task": task,
                "attention": attention,
                "seeds": len(mine),
                "accuracy": statistics.mean(values),
                "spread": spread(values),
                "difference": statistics.mean(differences) if comparable else None,
                "loss": statistics.mean(row["loss"] for row in mine.values()),
                **seconds,
            }
        )
    return summary


def format_markdown(rows: list[dict[str, Any]]) -> str:
    """What `summarise` finds in the rows of one or several tasks, as a markdown table."""
    columns = ("accuracy, %", "minus the original, points", "loss, nats", "distillation, s", "fine-tuning, s")
    lines = [f"| task | attention | {' | '.join(columns)} |", "| --- " * (2 + len(columns)) + "|"]
    lines += [
        f"| {row['task']} | {row['attention']} | {row['accuracy']:.2f} ± {show(row['spread'], '.2f')} "
        f"| {show(row['difference'], '+.2f')} | {row['loss']:.3f} "
        f"| {row['distill_seconds']:.0f} | {row['seconds']:.0f} |"
        for row in summarise(rows)
    ]
    return "\n".join(lines)


def _distill(model: nn.Module, task: Task, settings: Settings, accelerator: Accelerator, folder: Path | None) -> float:
    """Distil on the items that are trained on, without their labels; the seconds it took."""
    from astroattn.distillation import distill

    start, first = time.perf_counter(), accelerator.is_main_process
    size, seed = settings.distill_batch_size, settings.seed
    order = shuffle(task, size, seed)
    batches = [task.collate([task.train[i] for i in order[at : at + size]])[0] for at in range(0, len(order), size)]
    options: dict[str, Any] = {"seed": seed, "accelerator": accelerator, "progress": first}
    end_to_end = {"loss": "end_to_end", "train": "all", "host_learning_rate": settings.learning_rate}
    reports = []
    if settings.distill:
        reports.append(distill(model, batches, steps=settings.distill, **options))
    if settings.end_to_end:
        reports.append(distill(model, batches, steps=settings.end_to_end, **options, **end_to_end))
    seconds = time.perf_counter() - start
    accelerator.print(*reports, sep="\n")
    if folder is not None and first:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"reports": [report.to_dict() for report in reports], "seconds": seconds}
        (folder / DISTILLED).write_text(dumps(content, indent=2) + "\n", "utf-8")
    return seconds
