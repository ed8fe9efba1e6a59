"""Fine-tuning of a classifier, patched or not, on accelerate: one CPU, one GPU or many with the same code.

    python -m eval.finetune_text ...                        # one process
    accelerate launch -m eval.finetune_text ...             # as many as there are GPUs, by DDP; by FSDP with --use_fsdp
                                                            # --fsdp_version 2 --fsdp_cpu_ram_efficient_loading false
    ACCELERATE_USE_CPU=1 torchrun --standalone --nproc_per_node 2 -m eval.finetune_text ...     # on one CPU, by DDP

(`accelerate launch --cpu --num_processes 2` starts one process, and says nothing.)

The batch size is that of all processes together. A checkpoint is written after every epoch and holds safetensors and
JSON, no pickle. The order of the data and the dropout of an epoch are drawn from its seed and number, and the learning
rate follows from the number of the step, so a run that is resumed ends as it would have ended.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedType, parse_flag_from_env, set_seed
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_model_state_dict
from torch.utils.data import DataLoader
from tqdm import tqdm

from astroattn import parameter_groups
from astroattn.patching.record import describe
from eval.finetuning_state import last_checkpoint, load_checkpoint, save_checkpoint

WARM_UP, WEIGHT_DECAY, MAX_NORM = 0.1, 0.01, 1.0
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)

Part = Sequence[tuple[Any, int]]  # items with their labels


@dataclass(frozen=True)
class Task:
    """Labelled items: what is trained on, what early stopping looks at, and what is reported.

    Attributes:
        collate: makes inputs and labels [B] of a list of items with their labels. train_collate: the same for training,
            where that differs (augmentation); None is `collate`.
        length: of an item; batches of training hold items of similar length. None: all have the same.
    """

    name: str
    train: Part
    validation: Part
    test: Part
    collate: Callable[[list[Any]], tuple[Any, Tensor]]
    train_collate: Callable[[list[Any]], tuple[Any, Tensor]] | None = None
    length: Callable[[Any], int] | None = None


@dataclass(frozen=True)
class Settings:
    """How to train: AdamW, the learning rate rising for a tenth of the steps and then falling to zero.

    Attributes:
        batch_size: of all processes together.
        hidden_learning_rate: of learned hidden layers, whose weights move much further than pretrained ones.
        patience: stop after so many epochs without a lower validation loss, and keep the best; None trains on to the
            end, and keeps that.
        attention: the kind that the model has; distill, end_to_end, distill_batch_size: steps of distillation before,
            and items in one. They are there so that no checkpoint of another run is gone on from.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    hidden_learning_rate: float = 1e-3
    patience: int | None = None
    seed: int = 0
    attention: str = "original"
    distill: int = 0
    end_to_end: int = 0
    distill_batch_size: int = 8


def make_accelerator() -> Accelerator:
    """An accelerator that cuts every batch into equal shares; precision and processes are `accelerate launch`'s.

    Raises:
        ValueError: float16, whose scaler a checkpoint does not hold; what accelerate would leave out without a word:
            other processes, or FSDP, on a CPU; an FSDP that is not version 2 with every weight loaded by all.
    """
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    if accelerator.mixed_precision == "fp16":
        raise ValueError("mixed_precision: 'fp16'; must be no or bf16")
    started, seen = int(os.environ.get("WORLD_SIZE", 1)), accelerator.num_processes
    if started != seen:
        raise ValueError(f"processes: {started} were started, but accelerate sees {seen}; set ACCELERATE_USE_CPU=1")
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        if accelerator.distributed_type != DistributedType.FSDP:
            raise ValueError("fsdp: accelerate shards on accelerators only, not on a CPU; leave --use_fsdp out")
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2 or plugin.cpu_ram_efficient_loading:
            raise ValueError("fsdp: needs --fsdp_version 2 and --fsdp_cpu_ram_efficient_loading false")
    return accelerator


def finetune(
    model: nn.Module,
    task: Task,
    settings: Settings,
    accelerator: Accelerator,
    *,
    folder: Path | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train the model in place and measure it once on the test part.

    Args:
        folder: for checkpoints; None writes nothing. resume: go on from the last checkpoint in it, where there is one.

    Returns:
        `loss`, `accuracy` and `items` of the test part, `epochs` that were trained, `best_epoch` that was kept,
        `seconds` of training and `log`, one row per epoch.

    Raises:
        ValueError: a batch that does not divide among the processes or is larger than the data; a checkpoint of
            another run.
    """
    _check(task, settings, accelerator)
    astrocytes = describe(model)
    # a plain optimizer: the learning rate is set at every step
    rates = {"learning_rate": settings.learning_rate, "hidden_learning_rate": settings.hidden_learning_rate}
    groups = parameter_groups(model, **rates, weight_decay=WEIGHT_DECAY)
    groups = [group | {"top_lr": group["lr"]} for group in groups]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(groups, lr=settings.learning_rate))
    run = {"task": task.name, "items": len(task.train), **asdict(settings), "astrocytes": astrocytes}
    log: list[dict[str, Any]] = []
    best: dict[str, Tensor] = {}
    if resume and folder is not None and (checkpoint := last_checkpoint(folder)) is not None:
        log, best = load_checkpoint(checkpoint, model, optimizer, run)
    for epoch in range(len(log), settings.epochs):
        if _is_over(log, settings):
            break
        start = time.perf_counter()
        loss = _train_epoch(model, optimizer, task, settings, accelerator, epoch)
        seconds = time.perf_counter() - start
        measured = evaluate(model, task.validation, task.collate, settings.batch_size, accelerator)
        log.append({"epoch": epoch + 1, "train_loss": loss, **_prefixed(measured), "seconds": seconds})
        weights, state = get_state_dict(model, optimizer.optimizer, options=WHOLE)  # by all processes
        if settings.patience is not None and _best(log) == epoch + 1:
            best = {name: tensor.clone() for name, tensor in weights.items()}
        if folder is not None:
            if accelerator.is_main_process:
                save_checkpoint(folder, weights, state, best, log, run)
            accelerator.wait_for_everyone()
    if settings.patience is not None:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=accelerator.num_processes > 1)
        set_model_state_dict(model, best if accelerator.is_main_process else {}, options=options)
    measured = evaluate(model, task.test, task.collate, settings.batch_size, accelerator)
    accelerator.free_memory()
    return {
        **measured,
        "epochs": len(log),
        "best_epoch": _best(log) if settings.patience is not None else len(log),
        "seconds": sum(row["seconds"] for row in log),
        "log": log,
    }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    part: Part,
    collate: Callable[[list[Any]], tuple[Any, Tensor]],
    batch_size: int,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """`loss`, `accuracy` and number of `items`, each item counted once however many processes share them."""
    model.eval()
    loader = accelerator.prepare_data_loader(DataLoader(part, batch_size, collate_fn=collate))
    losses, hits = [], []
    for inputs, labels in tqdm(loader, "evaluating", leave=False, disable=not accelerator.is_main_process):
        logits = _logits(model, inputs)
        answers = (F.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1) == labels)
        loss, hit = accelerator.gather_for_metrics(answers)
        losses.append(loss.cpu())
        hits.append(hit.cpu())
    hit = torch.cat(hits)
    return {
        "loss": torch.cat(losses).double().mean().item(),
        "accuracy": hit.double().mean().item(),
        "items": len(hit),
    }


def _train_epoch(
    model: nn.Module, optimizer: Any, task: Task, settings: Settings, accelerator: Accelerator, epoch: int
) -> float:
    """The mean loss of an epoch."""
    seed = settings.seed * 10_000 + epoch
    order = shuffle(task, settings.batch_size, seed)
    set_seed(seed, device_specific=True)  # dropout differs between processes
    items = [task.train[index] for index in order]
    loader = accelerator.prepare_data_loader(
        DataLoader(items, settings.batch_size, collate_fn=task.train_collate or task.collate)
    )
    step, steps = epoch * len(loader), settings.epochs * len(loader)
    model.train()
    total = torch.zeros((), dtype=torch.float64)
    bar = tqdm(loader, f"epoch {epoch + 1} of {settings.epochs}", leave=False, disable=not accelerator.is_main_process)
    for number, (inputs, labels) in enumerate(bar, step):
        for group in optimizer.param_groups:
            group["lr"] = group["top_lr"] * schedule(number, steps)
        loss = F.cross_entropy(_logits(model, inputs), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        total += loss.detach().double().cpu()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return accelerator.reduce(total.float().to(accelerator.device), "mean").item() / len(loader)


def schedule(step: int, steps: int) -> float:
    """The share of the learning rate in step `step` of `steps`: up in a tenth of them, then down to zero."""
    rise = max(1, round(WARM_UP * steps))
    return min((step + 1) / rise, (steps - step) / max(1, steps - rise))


def shuffle(task: Task, batch_size: int, seed: int) -> list[int]:
    """The items of an epoch in whole batches: drawn anew, then sorted by length within runs of 20 batches."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(task.train), generator=generator)[: len(task.train) // batch_size * batch_size]
    if task.length is None:
        return order.tolist()
    batches: list[Tensor] = []
    for run in order.split(20 * batch_size):
        lengths = torch.tensor([task.length(task.train[index][0]) for index in run.tolist()])
        batches += run[lengths.argsort(stable=True)].split(batch_size)
    mixed = [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
    return torch.cat(mixed).tolist()


def _logits(model: nn.Module, inputs: Any) -> Tensor:
    output = model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits.float()


def _best(log: list[dict[str, Any]]) -> int:
    """The epoch with the lowest validation loss."""
    return int(min(log, key=lambda row: row["validation_loss"])["epoch"])


def _is_over(log: list[dict[str, Any]], settings: Settings) -> bool:
    return settings.patience is not None and bool(log) and len(log) - _best(log) >= settings.patience


def _prefixed(measured: dict[str, Any]) -> dict[str, Any]:
    return {f"validation_{name}": measured[name] for name in ("loss", "accuracy")}


def _check(task: Task, settings: Settings, accelerator: Accelerator) -> None:
    processes, batch = accelerator.num_processes, settings.batch_size
    if batch % processes:
        raise ValueError(f"batch_size: {batch}; must be a multiple of the {processes} processes")
    if batch > len(task.train):
        raise ValueError(f"batch_size: {batch}; there are {len(task.train)} items to train on")
