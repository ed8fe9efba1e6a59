"""What `compare` reports, against the same figures computed another way."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from scipy import special, stats
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from astroattn import AstroConfig, AstrocyteAttention, Plan
from astroattn.fidelity import Fidelity, Value, compare, control_configs, metrics
from astroattn.fidelity.calls import find_astrocytes
from astroattn.fidelity.resources import measure_memory
from astroattn.fidelity.subject import share_weights
from astroattn.patching import patch
from astroattn.tables import Table, render_markdown

EXACT = AstroConfig(near=4096)
ROUGH = AstroConfig(num_hidden=2, near=2, exact_keys=2, tiles="position", tile=4)
BUDGETS = ["window, same budget", "exact keys, same budget"]
CONTROLS = ["original", "patched", "uniform", "near alone", "random", *BUDGETS]
SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


def make_bert(model: type = BertModel, **options: Any) -> Any:
    bert = model(BertConfig(**SMALL | options)).eval()
    with torch.no_grad():  # sharper attention than a new model has
        for name, weight in bert.named_parameters():
            if "query" in name or "key" in name:
                weight *= 20
    return bert


def make_vit() -> VisionTransformer:
    vit = VisionTransformer(img_size=48, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10).eval()
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.qkv.weight *= 20
        nn.init.normal_(vit.head.weight)
    return vit


def text_batch(lengths: list[int], width: int) -> dict[str, Tensor]:
    ids = torch.randint(1, 99, (len(lengths), width))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def run(model: nn.Module, batches: Any, config: AstroConfig | None = ROUGH, **options: Any) -> Fidelity:
    return compare(model, batches, config, progress=False, **{"controls": False} | options)


def hidden_states(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    with torch.inference_mode():
        states: tuple[Tensor, ...] = model(**batch, output_hidden_states=True).hidden_states
    return states


def test_a_near_field_as_long_as_the_sequence_changes_nothing() -> None:
    for model, batch in ((make_bert(), text_batch([20, 9], 20)), (make_vit(), torch.randn(4, 3, 48, 48))):
        result = run(model, [batch], EXACT)
        assert result.value("embedding_cosine") == pytest.approx(1, abs=1e-6)
        assert result.value("cost") == 1
        assert result.value("positions") == result.value("keys")
        longest = max(20, round(result.value("keys")))  # of the texts 20 and 9
        said = f"nothing was replaced: in sequences of up to {longest} tokens"
        assert any(note.startswith(said) for note in result.notes)
        for layer in result.layers:
            assert max(layer.isolated_error + layer.together_error + layer.normaliser_error) < 1e-5
            assert min(layer.isolated_cosine + layer.together_cosine) == pytest.approx(1, abs=1e-6)
            assert layer.hidden_error is not None
            assert layer.hidden_error < 1e-5
    assert result.value("top1_agreement") == 1
    assert result.value("logit_error") < 1e-5
    assert abs(result.value("kl")) < 1e-9


def test_the_error_of_a_head_is_that_of_its_astrocyte_on_the_originals_queries_and_keys() -> None:
    bert, batch = make_bert(), text_batch([24, 11, 17], 24)
    layers = run(bert, [batch]).layers
    mask = batch["attention_mask"].bool()
    for index, state in enumerate(hidden_states(bert, batch)[:-1]):
        attention = bert.encoder.layer[index].attention.self
        with torch.inference_mode():
            q, k, v = (
                part(state).unflatten(-1, (4, 8)).transpose(1, 2)
                for part in (attention.query, attention.key, attention.value)
            )
            astrocyte = AstrocyteAttention(4, 8, ROUGH)
            mine, log_mine = astrocyte.with_normaliser(q, k, v, key_mask=mask)
            logits = (q @ k.mT / math.sqrt(8)).masked_fill(~mask[:, None, None], -math.inf)
            theirs = logits.softmax(-1) @ v
        for head in range(4):
            a, b = mine[:, head][mask], theirs[:, head][mask]
            assert layers[index].isolated_error[head] == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-4)
            cosine = torch.cosine_similarity(a, b, dim=-1).mean()
            assert layers[index].isolated_cosine[head] == pytest.approx(float(cosine), rel=1e-5)
            gap = (log_mine - logits.logsumexp(-1))[:, head][mask].abs().mean()
            assert layers[index].normaliser_error[head] == pytest.approx(float(gap), rel=1e-4)
    assert min(layers[0].isolated_error) > 0.01  # or there was nothing to measure
    # nothing is patched before the first layer, so it errs the same alone and together
    assert layers[0].together_error == pytest.approx(layers[0].isolated_error, rel=1e-4)
    assert layers[1].together_error != pytest.approx(layers[1].isolated_error, rel=1e-3)


def test_hidden_states_and_embeddings_are_those_of_the_patched_model() -> None:
    bert, batch = make_bert(), text_batch([24, 11, 17], 24)
    result = run(bert, [batch])
    mask = batch["attention_mask"].bool()
    original = hidden_states(bert, batch)
    patched = share_weights(bert)
    patch(patched, ROUGH)
    changed = hidden_states(patched, batch)
    for index, layer in enumerate(result.layers):
        a, b = changed[index + 1][mask], original[index + 1][mask]
        assert layer.hidden_error == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-4)
    a, b = (
        torch.stack([row[real].mean(0) for row, real in zip(states[-1], mask, strict=True)])
        for states in (changed, original)
    )
    assert result.value("embedding_cosine") == pytest.approx(float(torch.cosine_similarity(a, b).mean()), rel=1e-6)
    assert result.exact_check == pytest.approx(0, abs=1e-6)


def test_logits_are_those_of_the_patched_model() -> None:
    vit, photos = make_vit(), torch.randn(6, 3, 48, 48)
    result = run(vit, [photos[:4], photos[4:]])
    patched = share_weights(vit)
    patch(patched, ROUGH)
    with torch.inference_mode():
        mine, theirs = patched(photos).double(), vit(photos).double()
    p, q = theirs.softmax(-1).numpy(), mine.softmax(-1).numpy()
    assert result.items == 6
    assert result.value("kl") == pytest.approx(special.rel_entr(p, q).sum(1).mean(), rel=1e-4)
    assert result.value("logit_error") == pytest.approx(float((mine - theirs).norm() / theirs.norm()), rel=1e-4)
    assert result.value("top1_agreement") == float((mine.argmax(1) == theirs.argmax(1)).double().mean())
    kept = [
        len(set(a.tolist()) & set(b.tolist())) / 5
        for a, b in zip(mine.topk(5).indices, theirs.topk(5).indices, strict=True)
    ]
    assert result.value("top5_agreement") == pytest.approx(np.mean(kept))
    assert result.value("logit_error") > 0.01


def test_padding_is_in_no_figure() -> None:
    bert = make_bert()
    padded = text_batch([30, 13, 21], 30)
    alone = [
        {name: value[row : row + 1, :length] for name, value in padded.items()}
        for row, length in enumerate((30, 13, 21))
    ]
    together, apart = run(bert, [padded]), run(bert, alone, diagnose=3)
    for name in ("embedding_cosine", "same_neighbour", "similarity_r", "keys", "positions", "cost"):
        assert together.value(name) == pytest.approx(apart.value(name), rel=1e-4), name
    for one, other in zip(together.layers, apart.layers, strict=True):
        for name in ("isolated_error", "normaliser_error", "together_error", "together_cosine", "hidden_error"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-3), name


def test_positions_and_cost_are_means_over_queries_of_all_modules() -> None:
    bert, lengths = make_bert(), [30, 13]
    astrocyte = AstrocyteAttention(4, 8, ROUGH)
    costs = [astrocyte.cost(n, n) for n in lengths]
    positions = sum(n * cost.positions for n, cost in zip(lengths, costs, strict=True)) / 43
    keys = sum(n * n for n in lengths) / 43
    products = sum(n * cost.products for n, cost in zip(lengths, costs, strict=True)) / 43
    whole = run(bert, [text_batch(lengths, 30)])
    assert whole.value("positions") == pytest.approx(positions)
    assert whole.value("keys") == pytest.approx(keys)
    assert whole.value("cost") == pytest.approx(products / (2 * keys))
    assert not any("nothing was replaced" in note for note in whole.notes)
    half = run(bert, [text_batch(lengths, 30)], where=[1])
    assert half.value("positions") == pytest.approx((positions + keys) / 2)
    assert half.value("cost") == pytest.approx((products / (2 * keys) + 1) / 2)
    assert [layer.name for layer in half.layers] == ["encoder.layer.1.attention.self"]
    assert "encoder.layer.0.attention.self" in " ".join(half.notes)


def test_the_model_is_left_alone() -> None:
    bert, batch = make_bert().train(), text_batch([12, 7], 12)
    keys, classes = list(bert.state_dict()), [type(module) for module in bert.modules()]
    bert.eval()
    before = bert(**batch).last_hidden_state
    bert.train()
    compare(bert, [batch], ROUGH, progress=False)
    assert bert.training
    assert not find_astrocytes(bert)
    assert list(bert.state_dict()) == keys
    assert [type(module) for module in bert.modules()] == classes
    assert torch.equal(bert.eval()(**batch).last_hidden_state, before)


def test_copies_share_their_weights() -> None:
    bert = make_bert()
    copy = share_weights(bert)
    pointers = {weight.data_ptr() for weight in bert.parameters()}
    assert {weight.data_ptr() for weight in copy.parameters()} == pointers


def test_controls_stand_beside_every_result() -> None:
    result = run(make_vit(), [torch.randn(8, 3, 48, 48)], controls=True, labels=[0] * 8)
    assert list(result.rows) == CONTROLS
    assert result.rows["original"].config is None
    for name in CONTROLS:
        assert {"seconds", "peak_bytes", "keys", "positions", "cost", "accuracy"} <= set(result.rows[name].values)
    errors = {name: result.value("logit_error", name) for name in CONTROLS[1:]}
    assert errors["patched"] < min(errors["uniform"], errors["random"])
    assert len(set(errors.values())) == 6
    text = render_markdown(result.blocks())
    assert all(f"| {name} |" in text for name in CONTROLS)
    with pytest.raises(KeyError, match="'spearman' was not measured"):
        result.value("spearman")


def test_a_decoder_with_streaming_memories_is_compared_without_a_cache() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": 28}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    model = LlamaForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(0, 28, (4, 60))}]
    memory = AstroConfig(hidden="streaming", entries=32)
    plan = Plan(model="", modules={f"model.layers.{layer}.self_attn": (memory,) * 4 for layer in range(2)})
    for choice in (memory, plan):
        result = compare(model, batches, choice, progress=False)
        assert list(result.rows) == ["original", "patched", "uniform", "newest and mean", "random"]
        assert result.rows["patched"].values["positions"].value == 32
        assert result.rows["newest and mean"].values["positions"].value == 33
        errors = {title: row.values["kl"].value for title, row in result.rows.items() if title != "original"}
        assert errors["patched"] == min(errors.values())
        assert all(min(layer.together_error) > 0 for layer in result.layers)
        assert not any("no near field" in note for note in result.notes)


def test_control_configs() -> None:
    controls = control_configs(ROUGH)
    assert controls["uniform"] == AstroConfig(hidden="random", activation="constant", num_hidden=1, near=0)
    near = controls["near alone"]
    assert (near.hidden, near.exact_keys, near.near, near.tiles) == ("none", 0, 2, "position")
    assert (controls["random"].hidden, controls["random"].num_hidden, controls["random"].near) == ("random", 2, 0)
    assert "near alone" not in control_configs(AstroConfig(hidden="random"))
    assert "near alone" not in control_configs(AstroConfig(hidden="random", near=4), causal=True)


@pytest.mark.parametrize("config", [ROUGH, AstroConfig(), AstroConfig(hidden="random", num_hidden=9, near=0)])
def test_controls_of_the_same_budget(config: AstroConfig) -> None:
    bert = BertModel(BertConfig(**SMALL | {"max_position_embeddings": 200})).eval()
    result = run(bert, [text_batch([200, 180], 200)], config, controls=True, diagnose=0)
    for name in BUDGETS:
        assert 0.8 * result.value("positions") < result.value("positions", name) <= result.value("positions")
        assert result.rows[name].config["hidden"] == "none"
    window, keys = (result.rows[name].config for name in BUDGETS)
    assert (window["exact_keys"], window["tiles"]) == (0, "position")
    assert keys["near"] == config.near
    assert keys["exact_keys"] > config.exact_keys


def test_controls_have_the_budget_of_each_batch() -> None:
    bert = make_bert(max_position_embeddings=400)
    batches = [text_batch([200, 180], 200), text_batch([400, 390], 400)]
    alone = [run(bert, [batch], AstroConfig(), controls=True, diagnose=0) for batch in batches]
    both = run(bert, batches, AstroConfig(), controls=True, diagnose=0)
    for name in BUDGETS:
        first, second = (result.value("positions", name) for result in alone)
        assert first < 0.9 * second  # or there was nothing to tell apart
        assert both.value("positions", name) == pytest.approx((380 * first + 790 * second) / 1170)
        assert both.rows[name].config is None
        numbers = [max(result.rows[name].config[key] for key in ("near", "exact_keys")) for result in alone]
        said = f"{name}: as many as the patched model reads of each batch, from {numbers[0]} to {numbers[1]} keys"
        assert said in both.notes


def test_controls_of_a_causal_model() -> None:
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()
    config = AstroConfig(hidden="random", num_hidden=8, near=4)
    result = run(gpt, [text_batch([40, 40], 40)], config, controls=True, diagnose=0)
    assert list(result.rows) == ["original", "patched", "uniform", "random", "newest and mean"]
    assert result.value("positions", "newest and mean") == result.value("positions") == 12


def test_time_and_cost_are_those_of_the_row_over_the_originals() -> None:
    result = run(make_bert(), [text_batch([12, 7], 12)], controls=True)
    for name in result.rows:
        seconds = result.value("seconds", name) / result.value("seconds", "original")
        assert result.value("time", name) == pytest.approx(seconds)
    assert result.value("time", "original") == result.value("cost", "original") == 1
    assert str(result).index("cost") < str(result).index("time / original") < str(result).index("seconds")


def test_layers_are_ranked_by_what_they_cost_and_lose() -> None:
    plan = Plan(
        model="",
        modules={
            "encoder.layer.0.attention.self": (replace(ROUGH, exact_keys=8),) * 4,
            "encoder.layer.1.attention.self": (ROUGH,) * 4,
        },
    )
    result = run(make_bert(), [text_batch([60, 50], 60)], plan)
    shares = [layer.cost_share for layer in result.layers]
    assert sum(shares) == pytest.approx(1)
    assert shares[0] > shares[1]
    products = [
        float(np.mean(layer.isolated_error)) * share for layer, share in zip(result.layers, shares, strict=True)
    ]
    (table,) = [block for block in result.blocks() if isinstance(block, Table) and "product" in block.columns]
    assert [row[0] for row in table.rows] == [
        result.layers[index].name for index in sorted(range(2), key=lambda index: -products[index])
    ]
    half = run(make_bert(), [text_batch([60, 50], 60)], where=[1])
    assert 0 < half.layers[0].cost_share < 0.7  # the layer left exact has its own share


def test_a_figure_of_no_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    text = Axes.text
    monkeypatch.setattr(Axes, "text", lambda self, x, y, s, **kw: drawn.append(s) or text(self, x, y, s, **kw))
    for config, expected in ((EXACT, True), (ROUGH, False)):
        drawn.clear()
        run(make_vit(), [torch.randn(4, 3, 48, 48)], config).figure(tmp_path / "a.png")
        assert ("no error" in drawn) == expected
    with pytest.raises(ValueError, match=r"figure: must end in .png, .pdf or .svg"):
        run(make_vit(), [torch.randn(4, 3, 48, 48)], EXACT, diagnose=0).figure(tmp_path / "a.gif")


def test_labels_give_accuracy_of_all_and_mcnemar_of_the_patched() -> None:
    vit, photos = make_vit(), torch.randn(40, 3, 48, 48)
    labels = torch.randint(0, 10, (40,)).tolist()
    result = run(vit, [photos[:20], photos[20:]], labels=labels)
    patched = share_weights(vit)
    patch(patched, ROUGH)
    with torch.inference_mode():
        right = [(model(photos).argmax(1) == torch.tensor(labels)).numpy() for model in (vit, patched)]
    for name, hits in zip(("original", "patched"), right, strict=True):
        assert result.value("accuracy", name) == pytest.approx(hits.mean())
    lost, gained = int((right[0] & ~right[1]).sum()), int((~right[0] & right[1]).sum())
    expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert result.value("mcnemar_p") == pytest.approx(expected)


def test_scores_give_the_rank_correlation_of_pairs() -> None:
    bert = make_bert()
    batches = [text_batch([12, 7, 9, 12], 12) for _ in range(3)]
    scores = [0.0, 3.0, 1.0, 5.0, 2.0, 4.0]
    result = run(bert, batches, scores=scores)
    cosines = []
    for batch in batches:
        states = hidden_states(bert, batch)[-1]
        means = [row[real.bool()].mean(0) for row, real in zip(states, batch["attention_mask"], strict=True)]
        cosines += [float(torch.cosine_similarity(means[i], means[i + 1], dim=0)) for i in (0, 2)]
    assert result.value("spearman", "original") == pytest.approx(stats.spearmanr(cosines, scores).statistic)
    assert set(run(bert, batches, scores=[1.0] * 6).rows) == {"original", "patched"}  # no correlation, no crash


def test_embedding_summaries() -> None:
    rng = np.random.default_rng(0)
    original, other = rng.normal(size=(12, 5)), rng.normal(size=(12, 5))
    values = metrics.summarise_embeddings(other, original, seed=0)
    cosine = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(original, other, strict=True)]
    assert values["embedding_cosine"].value == pytest.approx(np.mean(cosine))
    pairs: list[list[float]] = [[], []]
    nearest: list[list[int]] = [[], []]
    for rows, similar, near in zip((original, other), pairs, nearest, strict=True):
        table = np.corrcoef(rows - 0) * 0
        for i in range(12):
            for j in range(12):
                table[i, j] = rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j])
        similar += [table[i, j] for i in range(12) for j in range(i)]
        near += [max((j for j in range(12) if j != i), key=lambda j, i=i, table=table: table[i, j]) for i in range(12)]
    assert values["similarity_r"].value == pytest.approx(stats.pearsonr(*pairs).statistic)
    assert values["same_neighbour"].value == pytest.approx(np.mean([a == b for a, b in zip(*nearest, strict=True)]))


def test_intervals() -> None:
    wilson = metrics.share(np.array([True] * 45 + [False] * 5))
    assert wilson.value == 0.9
    assert wilson.low == pytest.approx(0.786, abs=5e-4)  # as in textbooks
    assert wilson.high == pytest.approx(0.957, abs=5e-4)
    covered = 0
    for seed in range(100):
        sample = np.random.default_rng(seed).normal(size=50)
        value = metrics.bootstrap(lambda rows, sample=sample: sample[rows].mean(), 50, seed, resamples=400)
        assert value.low is not None
        assert value.high is not None
        covered += value.low < 0 < value.high
    assert 86 <= covered <= 99
    assert metrics.bootstrap(lambda rows: 1.0, 1, 0) == Value(1.0)


def test_nan_is_reported_and_not_averaged(tmp_path: Path) -> None:
    vit, photos = make_vit(), torch.randn(6, 3, 48, 48)
    photos[2] = math.nan
    result = run(vit, [photos], labels=[0] * 6)
    for name in ("original", "patched"):
        assert result.value("nonfinite", name) == 1
        assert not {"kl", "accuracy", "embedding_cosine"} & set(result.rows[name].values)
        assert f"{name}: 1 items gave NaN" in str(result)
    result.save_json(tmp_path / "result.json")
    json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    result.figure(tmp_path / "result.png")


def test_nan_of_the_patched_model_alone_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    vit, photos = make_vit(), torch.randn(6, 3, 48, 48)
    attend = AstrocyteAttention.forward

    def broken(self: AstrocyteAttention, *args: Any, **kwargs: Any) -> Tensor:
        return attend(self, *args, **kwargs) * (1.0 if self.exact else math.inf)

    monkeypatch.setattr(AstrocyteAttention, "forward", broken)
    result = run(vit, [photos], labels=[0] * 6, diagnose=0)
    assert "accuracy" in result.rows["original"].values
    assert result.value("nonfinite") == 6
    assert "accuracy" not in result.rows["patched"].values


def test_json_holds_what_is_needed_to_do_it_again(tmp_path: Path) -> None:
    result = run(make_bert(), [text_batch([12, 7], 12)], name="tiny", data="two texts", seed=3)
    result.save_json(tmp_path / "result.json")
    saved = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert saved == result.to_dict()
    assert AstroConfig(**saved["rows"]["patched"]["config"]) == ROUGH
    assert (saved["model"], saved["data"], saved["items"]) == ("tiny", "two texts", 2)
    environment = saved["environment"]
    assert environment["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert (environment["dtype"], environment["seed"], environment["pooling"]) == ("float32", 3, "auto")
    assert {"device", "memory", "command", "date"} <= set(environment)
    assert len(saved["layers"][0]["isolated_error"]) == 4


def test_a_module_that_runs_at_several_depths_has_a_row_for_each() -> None:
    options = {name: value for name, value in SMALL.items() if name != "num_hidden_layers"}
    albert = AlbertModel(AlbertConfig(**options, embedding_size=16, num_hidden_layers=3)).eval()
    layers = run(albert, [text_batch([20, 9], 20)], ROUGH).layers
    assert [layer.call for layer in layers] == [0, 1, 2]
    assert len({layer.name for layer in layers}) == 1
    assert len({layer.isolated_error[0] for layer in layers}) == 3
    assert "(2)" in str(run(albert, [text_batch([20, 9], 20)], ROUGH))


def test_a_language_model_is_compared_on_its_real_tokens() -> None:
    config = GPT2Config(vocab_size=99, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    gpt, batch = GPT2LMHeadModel(config).eval(), text_batch([20, 9], 20)
    astro = AstroConfig(hidden="random", num_hidden=4, near=4, exact_keys=0)
    result = run(gpt, [batch], astro)
    patched, mask = share_weights(gpt), batch["attention_mask"].bool()
    patch(patched, astro)
    with torch.inference_mode():
        mine, theirs = (model(**batch).logits[mask].double() for model in (patched, gpt))
    assert result.value("logit_error") == pytest.approx(float((mine - theirs).norm() / theirs.norm()), rel=1e-4)
    assert result.value("logit_error") > 0


def test_a_head_of_transformers_gives_logits_and_the_body_below_gives_embeddings() -> None:
    bert = make_bert(BertForSequenceClassification, num_labels=3)
    result = run(bert, [text_batch([20, 9, 12], 20)], labels=[0, 1, 2])
    values = result.rows["patched"].values
    assert {"kl", "embedding_cosine", "accuracy"} <= set(values)
    assert "top5_agreement" not in values  # there are only three classes


def test_pooling() -> None:
    bert, batch = make_bert(), text_batch([20, 9, 12], 20)
    patched = share_weights(bert)
    patch(patched, ROUGH)
    with torch.inference_mode():
        outputs = [model(**batch) for model in (patched, bert)]
    expected = {
        "cls": [output.last_hidden_state[:, 0] for output in outputs],
        "model": [output.pooler_output for output in outputs],
    }
    for pooling, pair in expected.items():
        value = run(bert, [batch], pooling=pooling).value("embedding_cosine")
        assert value == pytest.approx(float(torch.cosine_similarity(*pair).mean()), rel=1e-6)
    with pytest.raises(ValueError, match="no pooling of its own"):
        run(BertModel(BertConfig(**SMALL), add_pooling_layer=False).eval(), [batch], pooling="model")


def test_batches_are_read_once_and_the_diagnosis_stops() -> None:
    result = run(make_bert(), (text_batch([12, 7], 12) for _ in range(3)), diagnose=2)
    assert (result.items, result.diagnosed) == (6, 4)
    assert run(make_bert(), [text_batch([12, 7], 12)], diagnose=0).layers == ()


def test_memory_is_the_peak_of_what_is_alive() -> None:
    weight = torch.zeros(1000, 1000)

    def work() -> None:
        kept = weight + 1
        passing = kept + 1  # 8 MB are alive here
        del passing
        weight.view(-1).add_(1)  # this makes no tensor of its own
        kept.mul(2)

    with torch.inference_mode():
        assert measure_memory(work, torch.device("cpu")) == 8_000_000


@pytest.mark.gpu
def test_a_gpu_is_measured_by_its_own_counter() -> None:
    bert = make_bert().cuda()
    result = run(bert, [text_batch([12, 7], 12)])  # the inputs follow the model
    assert result.value("peak_bytes") > 0
    assert "max_memory_allocated" in result.environment["memory"]
    assert result.environment["device"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("kind", ["text", "photos"])
def test_the_figure_is_drawn(tmp_path: Path, kind: str, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: (drawn.append(self), save(self, path)))
    model, batch = (
        (make_bert(), text_batch([12] * 4, 12)) if kind == "text" else (make_vit(), torch.randn(4, 3, 48, 48))
    )
    result = run(model, [batch], controls=True, diagnose=layers)
    result.figure(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert min(image.size) > 600
        assert len(image.convert("RGB").getcolors(2**24) or []) > 20
    for axes in drawn[0].axes:
        boxes = [label.get_window_extent() for label in axes.get_yticklabels() if label.get_text()]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    with pytest.raises(ValueError, match="must end in"):
        result.figure(tmp_path / "a.docx")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": []}, "batches: there are none"),
        ({"batches": [torch.zeros(0, 3, 48, 48)]}, "without rows"),
        ({"labels": [1, 2]}, "labels: 2, but there are 4"),
        ({"labels": [1] * 5}, "labels: 5, but there are 4"),
        ({"labels": [1, 2, 3, 10]}, "labels: must be 0 to 9"),
        ({"scores": [1.0]}, "scores: 1, but there are 4"),
        ({"pooling": "max"}, "pooling: must be one of"),
        ({"diagnose": -1}, "diagnose"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    arguments = {"batches": [torch.randn(4, 3, 48, 48)]} | options
    with pytest.raises(ValueError, match=message):
        run(make_vit(), **arguments)


def test_bad_models_and_batches_are_named() -> None:
    vit = make_vit()
    with pytest.raises(TypeError, match="batches: each must be a tensor or a mapping"):
        run(vit, [[1, 2]])
    patch(vit, ROUGH)
    with pytest.raises(ValueError, match="patched already"):
        run(vit, [torch.randn(4, 3, 48, 48)])
    with pytest.raises(ValueError, match="no attention module"):
        run(nn.Linear(4, 4), [torch.randn(4, 4)])
