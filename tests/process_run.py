"""What test_processes.py runs in two processes and then in one: gradients, an evaluation, and runs that are resumed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, debug_launcher
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from astroattn import AstroConfig, patch
from eval.finetune_images import collate_images
from eval.finetuning import Settings, Task, evaluate, finetune, make_accelerator
from eval.train_digits import load_split

CONFIGS = {
    "hebbian": AstroConfig(tile=4, near=4, exact_keys=4, num_hidden=4),
    "learned": AstroConfig(hidden="learned", num_hidden=4, near=0, exact_keys=0, exact_queries=1),
}
SETTINGS = Settings(epochs=2, batch_size=16, learning_rate=1e-2, hidden_learning_rate=1e-2, patience=5)


class Killed(Exception):
    pass


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 28, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = VisionTransformer(**shape, num_classes=10, global_pool="avg", weight_init="jax")
    nn.init.normal_(model.head.weight, std=0.3)  # timm starts it as zeros, which pass no gradient on
    patch(model, CONFIGS[kind])
    return model


def shard(accelerator: Accelerator) -> None:
    """From here on the accelerator shards by FSDP2.

    All of it is accelerate's but this switch: accelerate gives the processes of a CPU to DDP whatever is asked for.
    """
    accelerator.free_memory()
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        cpu_ram_efficient_loading=False,
    )
    accelerator.state.distributed_type = DistributedType.FSDP


def gradients(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, list[float]]:
    """Of the mean loss, by the names of the parameters; the shards of a sharded model are put together."""
    nn.functional.cross_entropy(model(images), labels).backward()
    found = {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}
    whole = {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}
    return {name: grad.flatten().tolist() for name, grad in whole.items()}


def killed_after(batches: int) -> Callable[[list[Any]], Any]:
    left = iter(range(batches))

    def collate(items: list[Any]) -> Any:
        if next(left, None) is None:
            raise Killed
        return collate_images(items)

    return collate


def work(kind: str, task: Task, accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """With DDP, FSDP, or in one process: the gradients of a batch, an evaluation, a run, and one that is resumed."""
    images, labels = collate_images(task.train[:16])
    share = 16 // accelerator.num_processes
    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    model = build(kind)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    content: dict[str, Any] = {"model": type(model).__name__, "weight": type(next(model.parameters())).__name__}
    content["gradients"] = gradients(model, images[mine], labels[mine])
    content["evaluation"] = evaluate(model, task.test, task.collate, 8, accelerator)  # 21 items: not whole batches
    accelerator.free_memory()

    try:  # in the second epoch of three batches
        finetune(build(kind), replace(task, train_collate=killed_after(5)), SETTINGS, accelerator, folder=folder)
    except Killed:
        accelerator.free_memory()
    content["killed"] = [path.name for path in folder.glob("epoch-*")]
    accelerator.wait_for_everyone()
    torch.manual_seed(99)
    fresh = build(kind)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    content["resumed"] = finetune(fresh, task, SETTINGS, accelerator, folder=folder, resume=True)

    model = build(kind)
    content["whole"] = finetune(model, task, SETTINGS, accelerator, folder=folder / "whole")
    kept = accelerator.get_state_dict(model)  # by all processes; the first has it
    if accelerator.is_main_process:
        alone = build(kind).eval()
        alone.load_state_dict({name.removeprefix("module."): tensor for name, tensor in kept.items()})
        images, labels = collate_images(task.test)
        with torch.no_grad():
            content["kept_loss"] = nn.functional.cross_entropy(alone(images), labels).item()
    return content


def main(file: Path) -> None:
    (images, labels), _ = load_split()
    rows = list(zip(images, labels.tolist(), strict=True))
    task = Task("digits", rows[:48], rows[48:69], rows[69:90], collate_images)
    accelerator = make_accelerator()
    folder = file.with_suffix("")
    several = accelerator.num_processes > 1
    content: dict[str, Any] = {kind: {} for kind in CONFIGS}
    for kind in CONFIGS:
        content[kind]["ddp" if several else "alone"] = work(kind, task, accelerator, folder / kind)
    if several:
        shard(accelerator)
        mean = torch.empty(1)
        torch.distributed.reduce_scatter_tensor(mean, torch.ones(2), op=torch.distributed.ReduceOp.AVG)
        for kind in CONFIGS:
            content[kind]["fsdp"] = work(kind, task, accelerator, folder / f"{kind}-sharded")
            content[kind]["fsdp"]["gloo averages"] = mean.item() == 1
    if accelerator.is_main_process:
        file.write_text(json.dumps(content), encoding="utf-8")
    accelerator.end_training()


if __name__ == "__main__":
    debug_launcher(main, (Path(sys.argv[1]) / "2.json",), num_processes=2)
    main(Path(sys.argv[1]) / "1.json")
