"""A distillation goes on where it stopped, keeps whole steps only, and streams what it reads."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_distillation import LEARNED, hidden_names, images, learned, moved, texts, weights
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import TrainerCallback

import astroattn
from astroattn import AstroConfig, AstrocyteAttention, Distiller, DistillReport, distill, parameter_groups
from astroattn.distillation.batches import Ended, Source
from astroattn.distillation.transfer import start_from_data
from astroattn.fidelity.calls import AttentionCall, find_astrocytes

QUIET: dict[str, Any] = {"progress": False}
KINDS: dict[str, dict[str, Any]] = {  # with everything that has a state
    "rows": {"total_steps": 12, "max_norm": 1.0},
    "outputs": {"accumulation": 2, "optimiser": functools.partial(torch.optim.SGD, momentum=0.9)},
    "end_to_end": {
        "train": "all",
        "schedule": lambda optimiser: torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.9),
    },
}


def together(model: nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts() -> Iterator[None]:
    """As in a terminal; a shell that starts the tests in the background has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("loss", KINDS)
def test_two_runs_are_one_and_so_are_two_processes(loss: str, tmp_path: Path) -> None:
    models = [learned(), learned(), learned()]
    whole = Distiller(models[0], loss=loss, **KINDS[loss])
    report = whole.run(texts(), 12, **QUIET)
    twice, batches = Distiller(models[1], loss=loss, **KINDS[loss]), texts()
    reports = [twice.run(batches, 5, **QUIET)]
    twice.save(tmp_path)
    reports.append(twice.run(batches, 7, **QUIET))
    assert twice.losses == whole.losses == list(report.losses) == [*reports[0].losses, *reports[1].losses]
    assert torch.equal(together(models[1]), together(models[0]))
    loaded = Distiller(models[2], loss=loss, **KINDS[loss])
    loaded.load(tmp_path)
    assert loaded.step == 5
    last = loaded.run(texts(), 7, **QUIET)
    assert loaded.losses == whole.losses
    assert torch.equal(together(models[2]), together(models[0]))
    assert last.layers == reports[1].layers
    assert last.output_before == pytest.approx(reports[0].output_after, rel=1e-5)


PROCESS = """
import sys
import torch
from torch import nn
from astroattn import AstroConfig, AstrocyteAttention, Distiller, patch

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
patch(model, AstroConfig(hidden="learned", num_hidden=8, near=0))
batches = list(torch.randn(8, 2, 12, 16))
distiller = Distiller(model, total_steps=10, max_norm=1.0)
"""
RESUMED = """
distiller.load(sys.argv[1])
assert not distiller.run(batches, 6, progress=False).interrupted
distiller.save(sys.argv[1])
"""


def test_interrupted_and_resumed_in_another_process(tmp_path: Path) -> None:
    first: dict[str, Any] = {}
    exec(PROCESS, first)
    distiller, batches = first["distiller"], first["batches"]
    interrupt = [lambda it: signal.raise_signal(signal.SIGINT) if it.step == 4 else None]
    report = distiller.run(batches, 10, callbacks=interrupt, **QUIET)
    assert (report.interrupted, report.steps, len(report.losses)) == (True, 4, 4)
    distiller.save(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, "-c", PROCESS + RESUMED, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    distiller.load(tmp_path)
    whole: dict[str, Any] = {}
    exec(PROCESS, whole)
    whole["distiller"].run(batches, 10, **QUIET)
    assert distiller.losses == pytest.approx(whole["distiller"].losses, rel=1e-5)
    torch.testing.assert_close(together(first["model"]), together(whole["model"]), rtol=1e-4, atol=1e-5)


def test_ctrl_c_waits_for_the_step_and_keeps_it() -> None:
    model = learned()

    class Interrupted(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            if len(distiller.losses) == 2:  # Ctrl-C in the midst of a step
                signal.raise_signal(signal.SIGINT)
            return super().step(closure)

    distiller = Distiller(model, optimiser=Interrupted)
    handler = signal.getsignal(signal.SIGINT)
    batches = texts()
    report = distiller.run(batches, 9, **QUIET)
    assert (report.interrupted, report.steps, len(report.losses)) == (True, 3, 3)
    assert "interrupted" in str(report)
    assert signal.getsignal(signal.SIGINT) is handler
    expected = learned()
    plain = Distiller(expected)
    plain.run(texts(), 3, **QUIET)
    assert torch.equal(together(model), together(expected))
    distiller.run(batches, 2, **QUIET)  # with the batches that come next
    whole = Distiller(learned())
    whole.run(texts(), 5, **QUIET)
    assert distiller.losses == whole.losses


@pytest.mark.parametrize("where", ["loss", "gradient", "weight"])
def test_what_is_not_finite_stops_with_the_model_of_the_last_good_step(where: str) -> None:
    model = learned()
    calls = iter(range(99))

    def spoil(*arguments: Any) -> Tensor:
        good = sum(weight.square().sum() for weight in model.parameters() if weight.requires_grad)
        bad = next(calls) >= 4  # the first two are those of the batches held out and step 1
        if where == "loss" and bad:
            return good * math.nan
        return good + (next(iter(model.parameters())).sum() * 0).sqrt().sum() if where == "gradient" and bad else good

    class Spoilt(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            if where == "weight" and distiller.step == 3:
                self.param_groups[0]["params"][0].data.fill_(math.inf)

    distiller = Distiller(model, loss=spoil, train="all", optimiser=Spoilt, draw=False)
    seen: list[Tensor] = []
    with pytest.raises(
        FloatingPointError, match=rf"^step 4: a?(the)? ?{where} is not finite; the model is as after step 3"
    ):
        distiller.run(texts(), 9, callbacks=[lambda it: seen.append(together(it.model))], **QUIET)
    assert distiller.step == len(distiller.losses) == len(seen) == 3
    assert torch.equal(together(model), seen[-1])
    assert torch.isfinite(together(model)).all()
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("loss", "train"), [("rows", "hidden"), ("end_to_end", "all")])
def test_weights_of_less_precision_are_moved_in_float32(dtype: torch.dtype, loss: str, train: str) -> None:
    model = learned().to(dtype)
    distiller = Distiller(model, loss=loss, train=train, total_steps=30)
    before = weights(model)
    report = distiller.run(texts(), 30, **QUIET)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert torch.isfinite(together(model)).all()
    assert all(math.isfinite(each) for each in report.losses)
    if loss == "rows":
        assert all(row.after < 0.9 * row.before for row in report.layers), str(report)
        assert moved(model, before) == hidden_names(model)
    else:
        assert report.output_after < report.output_before
    full, mine = distiller.updates.full[0], distiller.updates.weights[0]
    assert full.dtype == torch.float32
    assert torch.equal(full.to(dtype), mine)
    assert not torch.equal(full, mine.float())  # what rounding would have lost


def test_a_stream_is_not_drained_and_a_bounded_part_of_it_is_held() -> None:
    drawn, alive, most = 0, set(), 0

    class Batch(dict[str, Tensor]):
        def __del__(self) -> None:
            alive.discard(id(self))

    def stream() -> Iterator[Batch]:
        nonlocal drawn, most
        for each in texts(200, rows=2, tokens=8):
            drawn += 1
            batch = Batch(each)
            alive.add(id(batch))
            most = max(most, len(alive))
            yield batch

    report = Distiller(learned()).run(stream(), 40, **QUIET)
    assert len(report.losses) == 40
    assert drawn <= 40 + 4 + 1
    assert most <= 4 + 16 + 2


def test_a_stream_that_ends_ends_the_run() -> None:
    report = Distiller(learned()).run(iter(texts(9)), 40, **QUIET)
    assert (report.steps, report.ended) == (5, "there were no more batches")


def test_a_loader_of_pairs_goes_on_in_the_midst_of_a_pass() -> None:
    data = TensorDataset(torch.cat(images()), torch.arange(12) % 3)
    models = [learned("timm vit"), learned("timm vit")]
    loader = DataLoader(data, 2)  # six batches, of which four are held out
    whole, parts = (Distiller(model) for model in models)
    whole.run(loader, 5, **QUIET)
    for steps in (1, 2, 2):
        parts.run(loader, steps, **QUIET)
    assert parts.losses == whole.losses
    assert torch.equal(together(models[0]), together(models[1]))


def test_labels_are_left_out() -> None:
    model = learned()
    labelled = [batch | {"labels": torch.zeros(3).long()} for batch in texts()]
    assert distill(model, labelled, steps=3, **QUIET) == distill(learned(), texts(), steps=3, **QUIET)


@pytest.mark.parametrize("count", [1, 2, 5, 23])
def test_batches_come_in_a_new_order_in_every_pass(count: int) -> None:
    source = Source(list(range(count + 3)), held_out=[99], seed=0, position=(0, 0))
    came = []
    for _ in range(3 * (count + 3)):
        came.append(source.take())
        source.give_back()
        assert source.take() == came[-1]  # it comes again
        source.keep()
    passes = [came[i : i + count + 3] for i in range(0, len(came), count + 3)]
    assert all(sorted(each) == list(range(count + 3)) for each in passes)
    resumed = Source(list(range(count + 3)), held_out=[99], seed=0, position=(1, 2))
    assert [resumed.take() for _ in range(count + 1)] == passes[1][2:]


def test_the_default_holds_out_what_no_step_is_taken_on() -> None:
    source = Source(list(range(400)), None, seed=0, position=(0, 0))
    assert source.held_out == list(range(384, 400))
    assert max(source.take() for _ in range(800)) == 383
    stream = Source(iter(range(10)), None, seed=0, position=(0, 0))
    assert stream.held_out == [0, 1, 2, 3]
    assert [stream.take() for _ in range(6)] == [4, 5, 6, 7, 8, 9]
    with pytest.raises(Ended):
        stream.take()
    with pytest.raises(ValueError, match="batches: too few; needs at least 5"):
        Source(iter(range(4)), None, seed=0, position=(0, 0))


def test_a_loader_whose_held_out_batches_come_again_elsewhere_is_warned_about() -> None:
    class Shuffled:
        def __init__(self) -> None:
            self.start = 0

        def __iter__(self) -> Iterator[int]:
            self.start += 1
            return iter([(each + self.start) % 9 for each in range(9)])

    source = Source(Shuffled(), None, seed=0, position=(0, 0))
    for _ in range(5):
        source.take()
    with pytest.warns(UserWarning, match="held out of the first are trained on"):
        source.take()


def test_layers_and_seeds_draw_their_own_neurons() -> None:
    """Two layers that read the same queries and keys become different ones of them."""
    query, key = torch.randn(2, 3, 2, 40, 8)
    call = AttentionCall(query, key, key, {})
    found = []
    for seed in (0, 1):
        modules = {name: AstrocyteAttention(2, 8, LEARNED) for name in ("first", "second")}
        start_from_data(modules, [[(name, call) for name in modules]] * 2, 2, seed)
        found += [layer.hidden.key_weight.detach() for layer in modules.values()]
    for i, one in enumerate(found):
        assert all((one - other).abs().mean() > 0.1 for other in found[:i])


@pytest.mark.parametrize("causal", [False, True])
def test_drawn_neurons_are_level_with_softmax(causal: bool) -> None:
    """log p is softmax attention's in the mean over the queries, which have a direction in common, as real ones do."""
    query, key = 2 * torch.randn(2, 3, 2, 40, 8)
    query, key = query + 3 * torch.randn(2, 1, 8), key + torch.randn(2, 1, 8)
    mask = torch.arange(40) < torch.tensor([40, 20, 0])[:, None]
    call = AttentionCall(query, key, key, {"key_mask": mask, "causal": causal, "scale": 0.5})
    layer, softmax = AstrocyteAttention(2, 8, LEARNED), AstrocyteAttention(2, 8)
    softmax.exact = True

    def excess() -> Tensor:
        mine, theirs = (each.with_normaliser(query, key, key, **call.options)[1] for each in (layer, softmax))
        each = (mine - theirs)[0].mean(-1), (mine - theirs)[1, :, :20].mean(-1)
        return torch.stack(each).mean(0).abs().max()

    start_from_data({"": layer}, [[("", call)]], 1, 0)
    assert excess() < 0.5  # some of the queries are looked at
    with torch.no_grad():
        layer.hidden.bias.zero_()
    assert excess() > 2  # as they are drawn


@pytest.mark.parametrize("loss", ["cosine", "end_to_end"])
def test_losses_of_hidden_states(loss: str) -> None:
    model = learned()
    distill(model, texts(), steps=5, **QUIET)
    report = distill(model, texts(), steps=20, loss=loss, train="qk", **QUIET)
    assert report.output_after < report.output_before


def test_a_loss_of_the_user_and_logits() -> None:
    model = learned("gpt2")
    seen = []

    def mean_difference(mine: nn.Module, original: nn.Module, inputs: Any) -> Tensor:
        seen.append(inputs.keys())
        with torch.no_grad():
            target = original(**inputs).logits
        return (mine(**inputs).logits - target).abs().mean()

    report = distill(model, texts(), steps=10, loss=mean_difference, train="qk", **QUIET)
    assert report.output_after < report.output_before
    assert len(seen) == 12
    assert distill(model, texts(), steps=10, loss="logits", learning_rate=0.05, **QUIET).losses
    with pytest.raises(TypeError, match="loss: it returned float"):
        distill(model, texts(), steps=1, loss=lambda *_: 1.0, **QUIET)
    with pytest.raises(ValueError, match="loss: 'logits', but BertModel gives none"):
        distill(learned(), texts(), steps=1, loss="logits", **QUIET)


def test_accumulated_batches_are_one_large_one() -> None:
    models = [learned(), learned()]
    short = [{"input_ids": batch["input_ids"]} for batch in texts(3)]
    joined = [{"input_ids": torch.cat([batch["input_ids"] for batch in short])}] * 2
    sgd = functools.partial(torch.optim.SGD, lr=1.0)
    for model, batches, count in ((models[0], short, 3), (models[1], joined, 1)):
        options = {"loss": "cosine", "accumulation": count, "optimiser": sgd, "learning_rate": 1.0}
        Distiller(model, **options).run(batches, 2, held_out=short[:1], **QUIET)
    torch.testing.assert_close(together(models[0]), together(models[1]), rtol=1e-4, atol=1e-5)


def test_callbacks_see_the_state_and_may_end_the_run() -> None:
    seen = []

    def stop(it: Distiller) -> bool:
        seen.append((it.step, it.losses[-1], it.updates.optimiser.param_groups[0]["lr"]))
        return it.step == 3

    report = Distiller(learned()).run(texts(), 9, callbacks=[stop], **QUIET)
    assert [step for step, _, _ in seen] == [1, 2, 3]
    assert [loss for _, loss, _ in seen] == list(report.losses)
    assert seen[0][2] < seen[1][2] < seen[2][2]  # warming up
    assert report.ended == "a callback ended it"


class Noting(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Notes what it is called with, and stops after step 3."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.before: Tensor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self.events.append(("begin", state.global_step, state.max_steps, args.max_steps, args.seed))
        self.before = together(parts["model"])
        assert isinstance(parts["optimizer"], torch.optim.Optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> Any:
        self.events.append(("step", state.global_step))
        control.should_training_stop = state.global_step == 3
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **parts: Any) -> None:
        self.events.append(("log", logs["loss"], state.log_history[-1]["step"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self.events.append(("end", state.global_step, len(state.log_history)))


def test_callbacks_of_a_trainer_are_called_as_by_one_and_may_end_the_run() -> None:
    model, noting, seen = learned(), Noting(), []
    drawn, untouched = together(model), Distiller(model, seed=4)
    report = untouched.run(texts(), 9, callbacks=[noting, lambda it: seen.append(it.step)], **QUIET)
    assert report.ended == "a callback ended it"
    assert seen == [1, 2, 3]
    assert noting.events[0] == ("begin", 0, 9, 9, 4)
    assert noting.events[1:-1] == [
        each for step in (1, 2, 3) for each in (("step", step), ("log", report.losses[step - 1], step))
    ]
    assert noting.events[-1] == ("end", 3, 3)
    assert noting.before is not None
    assert not torch.equal(noting.before, drawn)  # the neurons were drawn by then
    again = Noting()
    untouched.run(texts(), 2, callbacks=[again], **QUIET)
    assert again.events[0] == ("begin", 3, 5, 5, 4)


@pytest.mark.parametrize("wrong", [3, "stop", Noting])
def test_callbacks_of_other_kinds_are_refused_before_anything_moves(wrong: Any) -> None:
    model = learned()
    before = together(model)
    with pytest.raises(TypeError, match=r"callbacks: .*(int|str|the class Noting); expected functions"):
        Distiller(model).run(texts(), 2, callbacks=[wrong], **QUIET)
    assert torch.equal(together(model), before)


def test_the_file_is_json_and_safetensors(tmp_path: Path) -> None:
    distiller = Distiller(learned(), loss="end_to_end", train="qk")
    distiller.run(texts(), 2, **QUIET)
    distiller.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["distiller.safetensors"]
    with safe_open(tmp_path / "distiller.safetensors", "pt") as file:
        assert json.loads(file.metadata()["distiller"])["step"] == 2


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "options", "match"),
    [
        (lambda path: None, {"seed": 3}, "has seed 0; this Distiller has 3"),
        (lambda path: None, {"loss": "outputs"}, "has loss 'rows'; this Distiller has 'outputs'"),
        (lambda path: None, {"config": AstroConfig(hidden="learned", num_hidden=8, near=0)}, "has no weight.encoder"),
        (_truncated, {}, "is no state of a Distiller"),
        (lambda path: path.unlink(), {}, "is no state of a Distiller"),
    ],
)
def test_other_files_are_refused_and_change_nothing(
    spoil: Callable[[Path], Any], options: dict[str, Any], match: str, tmp_path: Path
) -> None:
    saved = Distiller(learned())
    saved.run(texts(), 1, **QUIET)
    saved.save(tmp_path)
    spoil(tmp_path / "distiller.safetensors")
    model = learned(config=options.pop("config", LEARNED))
    before = weights(model)
    distiller = Distiller(model, **options)
    with pytest.raises(ValueError, match=f"^folder: .*{match}"):
        distiller.load(tmp_path)
    assert not moved(model, before)
    assert distiller.step == 0


def test_more_steps_than_there_are_in_all_are_refused() -> None:
    with pytest.raises(ValueError, match="steps: 9 after 0; total_steps=5 allows 5 more"):
        Distiller(learned(), total_steps=5).run(texts(), 9, **QUIET)
    with pytest.raises(ValueError, match="schedule: given with total_steps"):
        Distiller(learned(), total_steps=5, schedule=lambda optimiser: None)  # type: ignore[arg-type,return-value]


def test_in_a_thread() -> None:
    found: list[DistillReport] = []
    thread = threading.Thread(target=lambda: found.append(Distiller(learned()).run(texts(), 2, **QUIET)))
    thread.start()
    thread.join()
    assert found[0].steps == 2


@pytest.mark.parametrize("saved", [["astrocyte"], ["hidden"]])
def test_copies_that_adapters_of_peft_train(saved: list[str]) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(learned(), peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=saved))
    before = weights(model)
    report = Distiller(model).run(texts(), 10, **QUIET)
    assert len(report.layers) == 2
    assert all(row.after < row.before for row in report.layers)
    copies = {name for name in before if "modules_to_save" in name}
    assert len(copies) == 6
    assert moved(model, before) == copies
    distill(model, texts(), steps=5, loss="end_to_end", train="marked", **QUIET)
    assert moved(model, before) == copies | {name for name in before if "lora_" in name}


def test_parameter_groups() -> None:
    model = learned()
    model.embeddings.requires_grad_(False)
    groups = parameter_groups(model, learning_rate=1e-4, hidden_learning_rate=1e-2, weight_decay=0.1)
    hidden = [weight for each in find_astrocytes(model).values() for weight in each.parameters()]
    found = {(group["lr"], group["weight_decay"]): group["params"] for group in groups}
    assert set(found) == {(1e-2, 0.0), (1e-4, 0.1), (1e-4, 0.0)}
    assert list(map(id, found[1e-2, 0.0])) == list(map(id, hidden))
    assert {weight.dim() for weight in found[1e-4, 0.1]} == {2}
    assert {weight.dim() for weight in found[1e-4, 0.0]} == {1}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert sorted(id(weight) for each in found.values() for weight in each) == sorted(map(id, trained))
    timms = create_optimizer_v2(groups, opt="adamw", lr=3e-4)
    assert {(group["lr"], group["weight_decay"]) for group in timms.param_groups} == set(found)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        parameter_groups("model", learning_rate=1.0)  # type: ignore[arg-type]


def test_they_are_exported() -> None:
    assert astroattn.Distiller is Distiller
    assert astroattn.parameter_groups is parameter_groups
