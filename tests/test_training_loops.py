"""A patched model is a normal model: Trainer, a bare loop, timm's pieces, peft, checkpointing, autocast, compile."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm.loss
import timm.optim
import timm.scheduler
import timm.utils
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from astroattn import AstroConfig, AstrocyteAttention, patch
from eval.train_digits import load_split

CONFIGS = {
    "hebbian": AstroConfig(num_hidden=4, near=4, exact_keys=4),
    "learned": AstroConfig(hidden="learned", num_hidden=4, near=0, exact_keys=0, exact_queries=1),
}
KINDS = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
GOOD = "a moving story | the cast is lovely | great fun from start to end | it is warm and funny | a fine, clever film"
BAD = "a dull story | the cast is awful | no fun from start to end | it is cold and tired | a poor, silly film"
PADDING = "with a plot that one may follow or not , as one likes , in a town by the sea"
HIDDEN = "astrocyte.hidden."


def read_sentences() -> list[dict[str, Any]]:
    """Forty labelled sentences of different lengths as token ids, one word one token."""
    words = f"{GOOD} {BAD} {PADDING}".replace("|", " ").split()
    index = {word: number for number, word in enumerate(dict.fromkeys(words), 3)}
    rows = []
    for label, sentences in ((1, GOOD), (0, BAD)):
        for sentence in sentences.split("|"):
            for extra in (0, 4, 8, 14):
                ids = [1, *(index[word] for word in sentence.split() + PADDING.split()[:extra]), 2]
                rows.append({"input_ids": ids, "labels": label})
    return rows


def pad(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([r["labels"] for r in rows])}


def tiny_bert(config: AstroConfig | None, layers: int = 2) -> BertForSequenceClassification:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 64}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForSequenceClassification(BertConfig(**size, **none, vocab_size=120, initializer_range=0.2))
    if config is not None:
        patch(model, config)
    return model


def tiny_vit(config: AstroConfig, layers: int = 2, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 28, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": layers, "num_heads": 2}
    model = VisionTransformer(**shape, num_classes=10, global_pool="avg", weight_init="jax")
    nn.init.normal_(model.head.weight, std=0.3)  # timm starts it as zeros, which pass no gradient on
    patch(model.to(dtype), config)
    return model


def read_digits(items: int = 48) -> tuple[Tensor, Tensor]:
    (images, labels), _ = load_split()
    return images[:items], labels[:items]


def copy(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in named}


def unmoved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in model.named_parameters() if torch.equal(tensor, before[name])}


def read_by_cls_only(model: nn.Module) -> set[str]:
    """The hidden layer of the last BERT layer: only CLS is read there, and CLS attends exactly."""
    return {name for name, _ in model.named_parameters() if HIDDEN in name and "layer.1." in name}


def has_hidden(names: Iterable[str], config: AstroConfig) -> bool:
    return any(name.endswith(f"{HIDDEN}query_weight") for name in names) == (config.hidden == "learned")


def train_bert(model: nn.Module, steps: int = 25, rate: float = 5e-3) -> list[float]:
    batch = pad(read_sentences())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@KINDS
def test_bare_loop(config: AstroConfig) -> None:
    model = tiny_bert(config)
    before = copy(model.named_parameters())
    losses = train_bert(model)
    assert losses[-1] < 0.5 * losses[0]
    still = unmoved(model, before)
    assert {name for name in still if "token_type" not in name} == read_by_cls_only(model)
    assert has_hidden(model.state_dict(), config)


def trainer(model: nn.Module, folder: Path, steps: int, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=8, learning_rate=2e-3, save_steps=20, eval_steps=20,
        eval_strategy="steps", lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
        logging_steps=1, **options,
    )  # fmt: skip
    rows = read_sentences()
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[::3], data_collator=pad)


@KINDS
def test_trainer_saves_and_resumes_to_the_same_loss(config: AstroConfig, tmp_path: Path) -> None:
    model = tiny_bert(config)
    whole = trainer(model, tmp_path / "whole", 40)
    whole.train()
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert has_hidden(whole.model.state_dict(), config)
    fresh = tiny_bert(config)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    again = trainer(fresh, tmp_path / "again", 40)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-20"))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[name], tensor, msg=name)
    resumed = [row["loss"] for row in again.state.log_history if "loss" in row]
    assert resumed[-20:] == pytest.approx(losses[-20:], rel=1e-4)


@KINDS
def test_trainer_loads_the_best_model(config: AstroConfig, tmp_path: Path) -> None:
    model = tiny_bert(config)
    training = trainer(model, tmp_path, 40, load_best_model_at_end=True, metric_for_best_model="loss")
    training.train()
    best = min(row["eval_loss"] for row in training.state.log_history if "eval_loss" in row)
    assert training.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-4)
    assert training.state.best_model_checkpoint is not None


@KINDS
def test_timm_training_pieces(config: AstroConfig) -> None:
    model = tiny_vit(config).train()
    images, labels = read_digits()
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=5e-3, weight_decay=0.05)
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in model.parameters()}
    scheduler = timm.scheduler.CosineLRScheduler(optimizer, t_initial=12, warmup_t=2, warmup_lr_init=1e-4)
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    criterion = timm.loss.LabelSmoothingCrossEntropy(0.1)
    before, losses = copy(model.named_parameters()), []
    for step in range(12):
        loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        timm.utils.dispatch_clip_grad(model.parameters(), 1.0)
        optimizer.step()
        average.update(model, step=step)
        scheduler.step(step + 1)
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert unmoved(model, before) == set()
    assert has_hidden(model.state_dict(), config)
    averaged = average.module.state_dict()
    assert averaged.keys() == model.state_dict().keys()
    assert not any(torch.equal(averaged[name], before[name]) for name in before)
    assert not torch.equal(averaged["head.weight"], model.head.weight)
    with torch.no_grad():
        assert torch.isfinite(average.module(images)).all()


@KINDS
@pytest.mark.parametrize("order", ["peft of patched", "patched peft"])
def test_lora(config: AstroConfig, order: str) -> None:
    peft = pytest.importorskip("peft")
    learned = config.hidden == "learned"
    saved = ["classifier"]
    options = peft.LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=saved, task_type="SEQ_CLS")
    if order == "peft of patched":
        if learned:
            options.modules_to_save = [*saved, "hidden"]
        model = peft.get_peft_model(tiny_bert(config), options)
    else:
        model = peft.get_peft_model(tiny_bert(None), options)
        patch(model, config)
        for name, parameter in model.named_parameters():
            if HIDDEN in name:
                parameter.requires_grad_(True)
    assert sum(isinstance(module, AstrocyteAttention) for module in model.modules()) == 2
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(HIDDEN in name for name in trainable) == learned
    before = copy(model.named_parameters())
    losses = train_bert(model, rate=2e-2)
    assert losses[-1] < 0.8 * losses[0]
    moved = before.keys() - unmoved(model, before)
    assert moved == {name for name in trainable if not (HIDDEN in name and "layer.1." in name)}


@KINDS
def test_gradient_checkpointing_of_transformers(config: AstroConfig) -> None:
    plain, checkpointed = tiny_bert(config).train(), tiny_bert(config).train()
    checkpointed.gradient_checkpointing_enable()
    assert checkpointed.is_gradient_checkpointing
    for model in (plain, checkpointed):
        model(**pad(read_sentences())).loss.backward()
    expected = gradients(plain)
    assert has_hidden(expected, config)
    torch.testing.assert_close(gradients(checkpointed), expected)


@KINDS
def test_gradient_checkpointing_of_timm(config: AstroConfig) -> None:
    plain, checkpointed = tiny_vit(config).train(), tiny_vit(config).train()
    checkpointed.set_grad_checkpointing()
    images, labels = read_digits(8)
    for model in (plain, checkpointed):
        nn.functional.cross_entropy(model(images), labels).backward()
    assert has_hidden(gradients(plain), config)
    torch.testing.assert_close(gradients(checkpointed), gradients(plain))


@KINDS
def test_autocast_to_bfloat16(config: AstroConfig) -> None:
    model = tiny_bert(config)
    batch = pad(read_sentences())
    expected = model(**batch).loss.item()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    before, losses = copy(model.named_parameters()), []
    for _ in range(25):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(expected, rel=0.05)
    assert losses[-1] < 0.5 * losses[0]
    assert {name for name in unmoved(model, before) if "token_type" not in name} == read_by_cls_only(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@KINDS
@pytest.mark.parametrize("build", [tiny_bert, tiny_vit])
def test_compiled_step(config: AstroConfig, build: Any) -> None:
    torch.compiler.reset()
    plain, model = build(config).train(), build(config).train()
    images, labels = read_digits(4)
    batch = pad(read_sentences()[:4])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = []
    for each in (plain, compiled):
        loss = each(**batch).loss if build is tiny_bert else nn.functional.cross_entropy(each(images), labels)
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert has_hidden(gradients(plain), config)
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler (g++)")
@pytest.mark.parametrize(
    ("build", "config"), [(tiny_vit, AstroConfig()), (tiny_bert, CONFIGS["learned"])], ids=["default", "learned"]
)
def test_inductor_trains_and_answers_as_eager_does(build: Any, config: AstroConfig) -> None:
    """Compiled C++: two training steps with the optimizer, and then a forward."""
    torch.compiler.reset()
    images, labels = read_digits(4)
    batch = pad(read_sentences()[:4])
    batch.pop("labels")
    found = []
    for compiled in (False, True):
        model = build(config, layers=1).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        forward, step = model, optimizer.step
        if compiled:
            forward = torch.compile(model, fullgraph=True, backend="inductor")
            step = torch.compile(optimizer.step, backend="inductor")
        losses = []
        for _ in range(2):
            logits = forward(**batch).logits if build is tiny_bert else forward(images)
            loss = nn.functional.cross_entropy(logits, labels % logits.shape[1])
            loss.backward()
            step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        model.eval()
        with torch.no_grad():
            logits = forward(**batch).logits if build is tiny_bert else forward(images)
        found.append({"losses": torch.stack(losses), "logits": logits, **dict(model.named_parameters())})
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("answer", ["astrocyte", "near field", "host"])
@pytest.mark.filterwarnings("ignore:.*left to the model's own attention")
def test_ddp_of_batches_that_the_hidden_layer_has_no_part_in(answer: str) -> None:
    """DistributedDataParallel raises in the second step where a weight had no gradient in the first."""
    config = AstroConfig(hidden="learned", num_hidden=4, near=64 if answer == "near field" else 0)
    model = nn.parallel.DistributedDataParallel(tiny_bert(config).train())
    batch = pad(read_sentences()[:4])
    if answer == "host":  # to whom a dense mask is left
        count = batch["input_ids"].shape[1]
        batch["attention_mask"] = torch.eye(count).bool().flip(0).expand(4, 1, count, count)
    for _ in range(2):
        model(**batch).loss.backward()
    hidden = {name: gradient for name, gradient in gradients(model).items() if HIDDEN in name}
    assert len(hidden) == 6
    assert all(gradient.any() == (answer == "astrocyte") for gradient in hidden.values())


@pytest.mark.usefixtures("alone")
def test_fsdp_of_a_bfloat16_model() -> None:
    """The learned weights have the dtype of the module, as FSDP wants one in what it shards together."""
    from torch.distributed.fsdp import fully_shard

    model = tiny_vit(CONFIGS["learned"], dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    plain = deepcopy(model)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    images, labels = read_digits(4)
    losses = [nn.functional.cross_entropy(each(images.bfloat16()), labels) for each in (model, plain)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    sharded, whole = gradients(model), gradients(plain)
    assert has_hidden(sharded, CONFIGS["learned"])
    for name, expected in whole.items():
        torch.testing.assert_close(sharded[name].full_tensor(), expected)
