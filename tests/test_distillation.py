"""Distillation: what it learns, what it moves, and what it leaves alone."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from patching_models import BIDIRECTIONAL, CAUSAL_MODELS, TIMM, build
from torch import Tensor, nn

import astroattn
from astroattn import AstroConfig, AstrocyteAttention, Distiller, DistillReport, distill, patch, unpatch
from astroattn.distillation.losses import divergence
from astroattn.distillation.rows import log_rows, softmax_rows, take
from astroattn.distillation.transfer import draw_pairs, read_calls, start_from_data
from astroattn.fidelity.calls import AttentionCall, find_astrocytes
from eval.distill import format_markdown

LEARNED = AstroConfig(hidden="learned", num_hidden=16, near=0, exact_keys=0)


def texts(count: int = 8, rows: int = 3, tokens: int = 20) -> list[dict[str, Tensor]]:
    """Token ids, the last row of every batch with padding."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(count):
        ids = torch.randint(5, 90, (rows, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, tokens - 6 :] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def images(count: int = 6) -> list[Tensor]:
    return list(torch.randn(count, 2, 3, 32, 32, generator=torch.Generator().manual_seed(3)))


def learned(name: str = "bert", config: AstroConfig = LEARNED) -> nn.Module:
    model = build((BIDIRECTIONAL | CAUSAL_MODELS | TIMM)[name])
    patch(model, config)
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}


def hidden_names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if ".astrocyte.hidden." in name}


def run(model: nn.Module, batches: Any, **options: Any) -> DistillReport:
    return distill(model, batches, **{"steps": 30, "progress": False} | options)


@pytest.mark.parametrize(
    ("name", "batches", "config"),
    [
        ("bert", texts, LEARNED),
        ("albert", texts, LEARNED),  # one module at every depth
        ("gpt2", texts, LEARNED),
        ("llama", texts, LEARNED),
        ("vit", lambda: [{"pixel_values": each} for each in images()], LEARNED),
        ("timm vit", images, LEARNED),
        ("bert", texts, AstroConfig(hidden="learned", num_hidden=16, near=4, exact_keys=2)),
        ("llama", texts, AstroConfig(hidden="learned", num_hidden=16, near=4, exact_keys=0)),
        ("timm vit", images, AstroConfig(hidden="learned", num_hidden=8, near=4, exact_keys=2)),
    ],
)
def test_every_layer_comes_nearer_to_softmax_on_batches_held_out(
    name: str, batches: Callable[[], list[Any]], config: AstroConfig
) -> None:
    model = learned(name, config)
    before = weights(model)
    report = run(model, batches())
    assert [row.name for row in report.layers] == list(find_astrocytes(model))
    assert all(row.after < 0.9 * row.before for row in report.layers), str(report)
    assert report.output_after < report.output_before
    assert len(report.losses) == 30
    assert sum(report.losses[-10:]) < sum(report.losses[:10])  # from the start on, training helps
    assert moved(model, before) == hidden_names(model)


def test_the_original_comes_back_bit_for_bit() -> None:
    model = build(BIDIRECTIONAL["bert"])
    batch = texts()[0]
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
    patch(model, LEARNED)
    run(model, texts())
    run(model, texts(), steps=5, loss="end_to_end")
    unpatch(model)
    with torch.no_grad():
        assert torch.equal(model(**batch).last_hidden_state, expected)


def test_errors_are_those_of_the_modules_on_what_the_original_reads() -> None:
    """The report against dense softmax of queries and keys that are read from the unpatched model's own projections."""
    model, batches = learned(), texts()
    report = run(model, batches)
    captured: dict[str, Tensor] = {}
    attention = "encoder.layer.1.attention.self"
    module = model.get_submodule(f"{attention}.astrocyte")
    plain = copy.deepcopy(model)
    unpatch(plain)
    for part in ("query", "key", "value"):
        layer = plain.get_submodule(f"{attention}.{part}")
        layer.register_forward_hook(lambda m, args, out, part=part: captured.__setitem__(part, out))
    with torch.no_grad():
        plain(**batches[-1])
        q, k, v = (captured[part].unflatten(-1, (4, 8)).transpose(1, 2) for part in ("query", "key", "value"))
        mask = batches[-1]["attention_mask"].bool()
        logits = (q @ k.mT * 8**-0.5).masked_fill(~mask[:, None, None], -torch.inf)
        truth = (logits.softmax(-1) @ v).transpose(1, 2)[mask]
        out = module(q, k, v, key_mask=mask).transpose(1, 2)[mask]
    assert report.layers[1].after == pytest.approx(((out - truth).norm() / truth.norm()).item(), rel=1e-4)


def test_padding_does_not_count() -> None:
    models = [learned(), learned()]
    longer = [{name: torch.cat([x, torch.full((len(x), 7), 0)], 1) for name, x in batch.items()} for batch in texts()]
    reports = [
        (run(m, each), run(m, each, steps=3, loss="end_to_end"))
        for m, each in zip(models, (texts(), longer), strict=True)
    ]
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    assert reports[0][0].layers[0].after == pytest.approx(reports[1][0].layers[0].after, rel=1e-3)
    assert reports[0][1].losses == pytest.approx(reports[1][1].losses, rel=1e-2)


def test_a_causal_layer_sees_no_future_after_distillation() -> None:
    model = learned("llama")
    run(model, texts())
    run(model, texts(), steps=10, loss="end_to_end")
    batch = {"input_ids": texts()[0]["input_ids"]}
    changed = {"input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, 12:] += 1
    with torch.no_grad():
        first, second = model(**batch).logits, model(**changed).logits
    torch.testing.assert_close(first[:, :12], second[:, :12], rtol=1e-4, atol=1e-5)
    assert (first[:, 12] - second[:, 12]).abs().max() > 0.1


@pytest.mark.parametrize("causal", [False, True])
def test_neurons_start_as_queries_and_keys_that_they_attend_to(causal: bool) -> None:
    query, key, value = torch.randn(3, 3, 2, 9, 4)
    mask = torch.arange(9)[None] >= torch.tensor([[0], [4], [9]])  # padding in front; the last row is nothing else
    key = key * 200  # nearly all of the attention of a query goes to one key
    call = AttentionCall(query, key, value, {"key_mask": mask, "causal": causal, "scale": 0.25})
    queries, keys = draw_pairs(call, 50, torch.Generator().manual_seed(0))
    first_choices, sequences = 0, set()
    for head in range(2):
        for q, k in zip(queries[head] * 2, keys[head] * 2, strict=True):
            ((sequence, token),) = ((query[:, head] - q).abs().amax(-1) < 1e-5).nonzero().tolist()
            ((of, attended),) = ((key[:, head] - k).abs().amax(-1) < 1e-3).nonzero().tolist()
            assert of == sequence
            assert mask[sequence, token]
            seen = mask[sequence] & (torch.arange(9) <= token) if causal else mask[sequence]
            assert seen[attended]
            logits = (key[sequence, head] @ q).masked_fill(~seen, -torch.inf)
            first_choices += int(logits.argmax() == attended)
            sequences.add(sequence)
    assert first_choices > 90
    assert sequences == {0, 1}


LAYERS = [  # causal, what the config has, the grid
    *((False, {"exact_queries": count}, None) for count in (0, 1, 3)),
    *((True, {"near": near}, None) for near in (0, 4)),
    *((False, {"near": 3, "tiles": tiles, "tile": 8}, None) for tiles in ("content", "position")),
    (False, {"near": 3, "tiles": "position", "tile": 8, "exact_queries": 2}, None),
    (False, {"exact_keys": 2, "tile": 8}, None),
    (False, {"near": 4, "exact_keys": 1, "tile": 8, "exact_queries": 1}, None),
    (False, {"near": 4, "tile": 8, "tiles": "position"}, (3, 6)),
    (False, {"near": 32}, None),
]


@pytest.mark.parametrize(
    ("causal", "settings", "grid", "padding"),
    [(*layer, padding) for layer in LAYERS for padding in (None, "left", "right") if not (layer[2] and padding)],
    ids=str,
)
def test_rows_are_those_of_the_module(
    causal: bool, settings: dict[str, Any], grid: tuple[int, int] | None, padding: str | None
) -> None:
    """The rows of some queries against the output where the values are the identity matrix."""
    torch.manual_seed(0)
    module = AstrocyteAttention(2, 8, dataclasses.replace(LEARNED, backend="torch", **settings))
    nn.init.normal_(module.hidden.query_weight)
    softmax = AstrocyteAttention(2, 8)
    softmax.exact = True
    query, key = torch.randn(2, 3, 2, 20, 8)
    place, lengths = torch.arange(20)[None], torch.tensor([[20], [7], [2]])
    mask = {None: None, "left": place >= 20 - lengths, "right": place < lengths}[padding]
    if mask is not None:
        key[~mask[:, None].expand(3, 2, 20)] = 1e3  # a padding key that every neuron would see
    call = AttentionCall(query, key, key, {"key_mask": mask, "causal": causal, "scale": 0.7, "grid": grid})
    real = call.real_queries()
    queries = torch.rand(real.shape).masked_fill(~real, -1).topk(2)[1]
    identity = torch.eye(20).expand(3, 2, -1, -1)
    for rows, attention in ((softmax_rows(call, queries), softmax), (log_rows(module, call, queries).exp(), module)):
        expected = take(attention(query, key, identity, **call.options), queries)
        torch.testing.assert_close(rows, expected.clamp(min=rows.min().item()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("near", [0, 4])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_drawn_neurons_have_the_gain_of_softmax(near: int, padding: str | None) -> None:
    """The sums over the keys that are read through neurons, in the mean of logarithms; padding is not among them."""
    torch.manual_seed(0)
    module = AstrocyteAttention(2, 8, dataclasses.replace(LEARNED, near=near))
    query, key = torch.randn(2, 3, 2, 64, 8)
    place, lengths = torch.arange(64)[None], torch.tensor([[64], [32], [0]])
    mask = {None: None, "left": place >= 64 - lengths, "right": place < lengths}[padding]
    call = AttentionCall(query, key, key, {"key_mask": mask, "causal": True, "scale": 0.7})
    start_from_data({"": module}, [[("", call)]], 1, 0)
    real = torch.ones(3, 64, dtype=torch.bool) if mask is None else mask
    number = real.cumsum(1)
    age = number[:, :, None] - number[:, None]
    far = (age >= near) & real[:, None] & (place[:, :, None] >= place[:, None])
    hidden, root = module.hidden, 0.7**0.5
    neurons = (query * root @ hidden.query_weight.mT)[:, :, :, None] + (
        key * root @ hidden.key_weight.mT + hidden.bias[:, None]
    )[:, :, None]
    sums = [
        logits.masked_fill(~far[:, None], -torch.inf).logsumexp(-1)
        for logits in (query @ key.mT * 0.7, neurons.logsumexp(-1) - math.log(16))
    ]
    asked = (real & far.any(-1))[:, None].expand(-1, 2, -1)
    # of short sequences queries are taken more than once, each alike
    weights = asked * (64 / real.sum(1).clamp(min=1))[:, None, None]
    for head in range(2):
        means = [torch.where(asked, x, 0)[:, head].mul(weights[:, head]).sum() / weights[:, head].sum() for x in sums]
        torch.testing.assert_close(means[0], means[1], rtol=1e-4, atol=1e-4)


def test_some_queries_stand_for_all() -> None:
    """The divergence of drawn queries is on average that of all of them."""
    torch.manual_seed(0)
    module, generator = AstrocyteAttention(2, 8, LEARNED), torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 2, 80, 8)
    call = AttentionCall(query, key, key, {"key_mask": torch.arange(80)[None] < torch.tensor([[80], [75]])})
    real = call.real_queries()
    target = softmax_rows(call)
    rows = (torch.xlogy(target, target) - target * log_rows(module, call)).sum(-1)
    expected = rows.transpose(1, 2)[real].mean()
    drawn = torch.stack([divergence(module, call, generator) for _ in range(40)])
    assert drawn.std() > 0
    assert drawn.mean().item() == pytest.approx(expected.item(), abs=4 * drawn.std().item() / 40**0.5)


@pytest.mark.parametrize(("loss", "train"), [("rows", "hidden"), ("outputs", "hidden"), ("end_to_end", "all")])
def test_a_seed_repeats(loss: str, train: str) -> None:
    models = [learned(), learned(), learned()]
    torch.manual_seed(5)  # not what the result depends on
    reports = [
        run(model, texts(), steps=5, loss=loss, train=train, seed=seed)
        for model, seed in zip(models, (1, 1, 2), strict=True)
    ]
    assert reports[0] == reports[1] != reports[2]
    assert not moved(models[1], weights(models[0]))


@pytest.mark.parametrize("train", ["hidden", "qk", "all"])
def test_end_to_end_comes_nearer_to_the_original(train: str) -> None:
    model = learned("llama")
    first = run(model, texts(), steps=3)
    second = run(model, texts(), steps=30, loss="end_to_end", train=train, learning_rate=0.1)
    assert second.output_before == pytest.approx(first.output_after, rel=1e-4)
    assert second.output_after < 0.9 * second.output_before
    assert len(second.losses) == second.steps == 30


def test_only_the_hidden_layers_move_by_default() -> None:
    model = learned()
    before = weights(model)
    run(model, texts(), steps=3, loss="end_to_end")
    assert moved(model, before) == hidden_names(model)


def test_query_and_key_projections_move() -> None:
    model = learned()
    before = weights(model)
    run(model, texts(), steps=3, loss="end_to_end", train="qk")
    projections = {name for name in before if ".self.query." in name or ".self.key." in name}
    # softmax does not see the bias of the keys, but an astrocyte does
    assert moved(model, before) == hidden_names(model) | projections


@pytest.mark.parametrize(
    ("name", "batches", "part", "axis"), [("timm vit", images, ".qkv.", 0), ("gpt2", texts, ".c_attn.", -1)]
)
def test_of_a_fused_projection_the_values_stay(
    name: str, batches: Callable[[], list[Any]], part: str, axis: int
) -> None:
    model = learned(name)
    before = weights(model)
    decaying = functools.partial(torch.optim.AdamW, weight_decay=0.1)
    run(model, batches(), steps=3, loss="end_to_end", train="qk", optimiser=decaying)
    projections = {name for name in before if part in name}
    assert moved(model, before) == hidden_names(model) | projections
    for name in projections:
        (*mine, values), (*before_it, old) = (x.chunk(3, axis) for x in (model.get_parameter(name), before[name]))
        assert torch.equal(values, old)
        assert not any(torch.equal(new, old) for new, old in zip(mine, before_it, strict=True))


def test_everything_moves_and_the_original_that_is_matched_stays() -> None:
    model = learned()
    original = copy.deepcopy(model)
    for module in find_astrocytes(original).values():
        module.exact = True
    before, batches = weights(model), texts()
    report = run(model, batches, steps=5, loss="end_to_end", train="all")
    unused = {name for name in before if "pooler" in name}  # the last hidden state does not depend on it
    assert moved(model, before) == set(before) - unused
    with torch.no_grad():
        mask = batches[-1]["attention_mask"].bool()
        mine, theirs = (each(**batches[-1]).last_hidden_state[mask] for each in (model, original))
    error = ((mine - theirs).square().sum() / theirs.square().sum()).item()
    assert report.output_after == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize(
    ("config", "train", "rate"),
    [
        (AstroConfig(hidden="random", num_hidden=16, near=0, exact_keys=0), "qk", 1e-3),
        (AstroConfig(hidden="random", num_hidden=16, near=0, exact_keys=0), "all", 1e-3),
        (AstroConfig(num_hidden=1, near=0, exact_keys=0, tile=64), "all", 1e-4),
    ],
)
def test_models_without_learned_layers_learn_end_to_end(config: AstroConfig, train: str, rate: float) -> None:
    model = learned("bert", config)
    before = weights(model)
    report = run(model, texts(), steps=30, loss="end_to_end", train=train, host_learning_rate=rate)
    assert report.output_after < 0.9 * report.output_before
    assert [row.name for row in report.layers] == list(find_astrocytes(model))
    projections = {name for name in before if ".self.query." in name or ".self.key." in name}
    assert moved(model, before) == (projections if train == "qk" else {name for name in before if "pooler" not in name})


def test_adapters_of_peft_move() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(learned(), peft.LoraConfig(r=2, target_modules=["query"]))
    before = weights(model)
    flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
    run(model, texts(), steps=5, loss="end_to_end", train="marked")
    adapters = {name for name in before if "lora_" in name}
    assert adapters
    assert moved(model, before) == hidden_names(model) | adapters
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == flags


def test_modes_and_flags_are_what_they_were() -> None:
    model = learned()
    model.train()
    model.encoder.layer[0].eval()
    model.embeddings.word_embeddings.weight.requires_grad_(False)
    flags = [weight.requires_grad for weight in model.parameters()]
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        report = run(model, texts(), steps=2, loss="end_to_end", train="all")
    assert len(report.losses) == 2
    assert [weight.requires_grad for weight in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(module.exact for module in find_astrocytes(model).values())


def test_mixed_precision() -> None:
    model = learned()
    before = weights(model)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    report = run(model, texts(), accelerator=accelerator)
    run(model, texts(), steps=10, loss="end_to_end", accelerator=accelerator)
    assert all(row.after < 0.9 * row.before for row in report.layers)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert moved(model, before) == hidden_names(model)


PROCESS = """
import json, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from astroattn import distill
from test_distillation import images, learned

torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
model = learned("timm vit")
losses = []
for loss in ("rows", "end_to_end"):
    losses += distill(model, images(), steps=3, loss=loss, progress=False, accelerator=accelerator).losses
weights = [weight.tolist() for name, weight in model.named_parameters() if ".hidden." in name]
Path(sys.argv[1], str(accelerator.process_index)).write_text(json.dumps([accelerator.num_processes, losses, weights]))
"""


@pytest.mark.slow
def test_processes_take_other_batches_and_end_with_the_same_weights(tmp_path: Path) -> None:
    script = tmp_path / "process.py"
    script.write_text(PROCESS, "utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    paths = os.pathsep.join(map(str, Path(__file__).resolve().parents[:2]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / rank).read_text("utf-8")) for rank in ("0", "1"))
    assert first[0] == second[0] == 2
    assert all(mine != theirs for mine, theirs in zip(first[1], second[1], strict=True))
    assert first[2] == second[2]


def test_layers_with_other_astrocytes_are_left_alone() -> None:
    model = build(BIDIRECTIONAL["bert"])
    patch(model, where=0)
    patch(model, LEARNED, where=1)
    report = run(model, texts(), steps=5)
    assert [row.name for row in report.layers] == ["encoder.layer.1.attention.self.astrocyte"]


def test_a_near_field_that_covers_the_sequence_leaves_nothing_to_learn() -> None:
    model = learned("bert", AstroConfig(hidden="learned", num_hidden=16, near=64, exact_keys=0))
    report = run(model, texts(), steps=3)
    assert [row.after for row in report.layers] == [0.0, 0.0]


def test_the_report_is_a_table_and_plain_values() -> None:
    report = run(learned(), texts(), steps=3)
    lines = str(report).splitlines()
    assert len(lines) == 1 + 2 + 3
    assert f"{report.layers[0].after:.3f}" in lines[1]
    assert report.to_dict()["layers"][0]["num_hidden"] == 16


BAD = {
    "steps": ({"steps": -1}, ValueError),
    "steps of a float": ({"steps": 3.0}, TypeError),
    "no steps": ({"steps": 0}, ValueError),
    "loss": ({"loss": "row"}, ValueError),
    "loss that is no function": ({"loss": 3}, TypeError),
    "accumulation": ({"accumulation": 0}, ValueError),
    "max_norm": ({"max_norm": -1.0}, ValueError),
    "optimiser": ({"optimiser": "adam"}, TypeError),
    "what the optimiser is": ({"optimiser": lambda groups: groups}, TypeError),
    "callbacks": ({"callbacks": [3]}, TypeError),
    "held_out": ({"held_out": []}, ValueError),
    "train with a loss of layers": ({"train": "all"}, ValueError),
    "seed": ({"seed": -1}, ValueError),
    "train": ({"train": "values"}, ValueError),
    "learning_rate": ({"learning_rate": 0.0}, ValueError),
    "host_learning_rate": ({"host_learning_rate": "1"}, TypeError),
    "one batch": ({"batches": texts()[:1]}, ValueError),
    "one tensor": ({"batches": torch.zeros(4, 8, dtype=torch.long)}, TypeError),
    "one mapping": ({"batches": texts()[0]}, TypeError),
    "batches of lists": ({"batches": [[1, 2], [3, 4]]}, TypeError),
    "pairs with a mask": ({"batches": [(torch.zeros(2, 8).long(), torch.ones(2, 8))] * 2}, TypeError),
    "empty batches": ({"batches": [{"input_ids": torch.zeros(0, 8, dtype=torch.long)}] * 2}, ValueError),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_changes_nothing(case: str) -> None:
    model = learned()
    before = weights(model)
    options, error = BAD[case]
    name = "batches" if "batches" in options else next(iter(options))
    with pytest.raises(error, match=f"^{name}:"):
        run(model, **{"batches": texts()} | options)
    assert not moved(model, before)


def test_models_that_cannot_be_distilled_are_refused() -> None:
    with pytest.raises(TypeError, match="model:"):
        run("model", texts())  # type: ignore[arg-type]
    model = build(BIDIRECTIONAL["bert"])
    with pytest.raises(ValueError, match="model: BertModel is not patched"):
        run(model, texts(), loss="end_to_end", train="all")
    patch(model)
    for options in ({}, {"loss": "end_to_end"}):
        with pytest.raises(ValueError, match="model: BertModel has no learned hidden layer"):
            run(model, texts(), **options)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="train: 'marked', but no weight of BertModel has requires_grad"):
        run(model, texts(), loss="end_to_end", train="marked")
    patch(model, LEARNED)
    find_astrocytes(model)["encoder.layer.1.attention.self.astrocyte"].exact = True
    with pytest.raises(ValueError, match=r"encoder.layer.1.*exact"):
        run(model, texts())
    model = learned()
    model.encoder.layer[0].attention.self.query = nn.Sequential(model.encoder.layer[0].attention.self.query)
    with pytest.raises(ValueError, match=r"train: 'qk', but encoder\.layer\.0\.attention\.self "):
        run(model, texts(), loss="end_to_end", train="qk")


@pytest.mark.filterwarnings("ignore:.*left to the model's own attention")
def test_batches_that_an_astrocyte_cannot_answer_are_refused() -> None:
    model = learned()
    before = weights(model)
    mask = torch.ones(3, 1, 20, 20).bool().tril().triu(-3)
    dense = [{"input_ids": each["input_ids"], "attention_mask": mask} for each in texts()]
    with pytest.raises(ValueError, match=r"^batches: .*encoder\.layer"):
        run(model, dense)
    assert not moved(model, before)
    distiller = Distiller(model, draw=False)
    with pytest.raises(ValueError, match=r"^batches:"):  # in the third step
        distiller.run(iter([*texts()[:2], dense[0]]), held_out=texts()[:1], progress=False)
    assert distiller.step == 2
    assert moved(model, before) == hidden_names(model)


def test_calls_are_read_once_per_depth() -> None:
    model = learned("albert")
    modules = find_astrocytes(model)
    calls = read_calls(model, modules, texts()[0])
    assert [name for name, _ in calls] == list(modules) * 2
    assert not any(module._forward_pre_hooks for module in modules.values())


def test_it_is_exported() -> None:
    assert astroattn.distill is distill


def test_docs_have_the_committed_table_and_the_goal_is_met() -> None:
    docs = Path(__file__).parent.parent / "docs"
    rows = json.loads((docs / "results" / "distill.json").read_text("utf-8"))["rows"]
    assert format_markdown(rows) in (docs / "experiments" / "texts.md").read_text("utf-8")
    ratios = {row["layer"]: row["learned / random"] for row in rows}
    assert max(ratios.values()) <= 0.75
    assert ratios["mean"] <= 0.6
