"""What test_processes.py runs in one process and in two: gradients, an evaluation, and a run that is resumed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from astroattn import AstroConfig, patch
from eval.finetune_images import collate_images
from eval.finetuning import Settings, Task, evaluate, finetune, make_accelerator
from eval.train_digits import load_split

CONFIGS = {
    "hebbian": AstroConfig(tile=4, near=4, exact_keys=4, num_hidden=4),
    "learned": AstroConfig(hidden="learned", num_hidden=4, near=0, exact_keys=0, exact_queries=1),
}
SETTINGS = Settings(epochs=2, batch_size=16, learning_rate=1e-2, hidden_learning_rate=1e-2, patience=5)


def build(hidden: str) -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 28, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = VisionTransformer(**shape, num_classes=10, global_pool="avg", weight_init="jax")
    nn.init.normal_(model.head.weight, std=0.3)  # timm starts it as zeros, which pass no gradient on
    patch(model, CONFIGS[hidden])
    return model


def gradients(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, list[float]]:
    """Of the mean loss, by the names of the parameters; the shards of a sharded model are put together."""
    nn.functional.cross_entropy(model(images), labels).backward()
    found = {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}
    whole = {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}
    return {name: grad.flatten().tolist() for name, grad in whole.items()}


def main(file: Path, hidden: str) -> None:
    (images, labels), _ = load_split()
    rows = list(zip(images, labels.tolist(), strict=True))
    task = Task("digits", rows[:48], rows[48:69], rows[69:90], collate_images)
    accelerator = make_accelerator()
    processes = accelerator.num_processes
    share = 16 // processes
    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)

    model = accelerator.prepare(build(hidden))
    content = {"processes": processes, "model": type(model).__name__}
    content["gradients"] = gradients(model, images[mine], labels[mine])
    content["evaluation"] = evaluate(model, task.test, collate_images, 8, accelerator)  # 21 items: not whole batches
    if processes > 1:
        sharded = build(hidden)
        for block in sharded.blocks:
            fully_shard(block)
        fully_shard(sharded)
        content["sharded"] = type(next(sharded.parameters())).__name__
        content["sharded_gradients"] = gradients(sharded, images[mine], labels[mine])
    folder = file.with_suffix("")
    content["result"] = finetune(build(hidden), task, SETTINGS, accelerator, folder=folder)
    content["resumed"] = finetune(build(hidden), task, SETTINGS, accelerator, folder=folder, resume=True)
    if accelerator.is_main_process:
        file.write_text(json.dumps(content), encoding="utf-8")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
