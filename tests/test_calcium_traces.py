"""The calcium traces: the streamed sums against the simulated network, loading, and the command end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import run
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AlbertConfig,
    AlbertModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from astroattn.hidden import draw_orthogonal
from astroattn.simulation import NeuronAstrocyteNetwork, StaticNeurons
from eval.calcium_traces import __main__ as command
from eval.calcium_traces.astrocyte import draw_weights, normalise, score, stream
from eval.calcium_traces.cases import Case, load_image, load_text
from eval.common import rounded
from eval.heads import read_layers

DIM = 8


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(**changes: object) -> Case:
    heads = [tuple(draw(2, 10, DIM, seed=3 * layer + part) for part in range(3)) for layer in range(3)]
    return Case(**{"model": "none", "input": "noise", "kind": "image", "heads": heads, "tokens": [], "photo": None,
                   "skip": 1} | changes)  # fmt: skip


@pytest.fixture(scope="module")
def albert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("albert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "glia", "hear", "what", "neurons", "say"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"embedding_size": 16, "hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 6}
    AlbertModel(AlbertConfig(vocab_size=len(words), num_hidden_layers=3, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=48, num_hidden_layers=7, num_attention_heads=6, intermediate_size=64, image_size=32,
                       patch_size=8)  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    text, photo = tmp_path / "words.txt", tmp_path / "photo.png"
    text.write_text("the glia hear what the neurons say " * 3, encoding="utf-8")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(photo)
    return ["--text", str(text), "--image", str(photo)]


def test_streamed_sums_are_those_of_the_network() -> None:
    query, key, value, weight = draw(7, DIM), draw(9, DIM, seed=1), draw(9, 3, seed=2), draw(3000, DIM, seed=3)
    for m, (calcium, out) in stream(query, key, value, weight, (5, 1024, 3000)).items():
        network = NeuronAstrocyteNetwork(StaticNeurons(weight[None, :m], torch.zeros(1, m).double(), "positive_exp"))
        for k, v in zip(key, value, strict=True):
            network.write(k[None, None], v[None, None])
        last, p, _ = zip(*(network.read(q[None, None]) for q in query), strict=True)
        torch.testing.assert_close(calcium, torch.cat(p)[:, 0], rtol=1e-10, atol=0)
        torch.testing.assert_close(out, torch.cat(last)[:, 0], rtol=1e-10, atol=1e-12)


def test_recorded_calcium_is_that_of_the_first_neurons() -> None:
    some = case()
    traces = command.record(some, (50, 200))
    streamed = stream(*some.selected(), draw_weights("iid", 200, DIM, 16), (50, 200))
    for m, calcium in traces.items():
        torch.testing.assert_close(calcium, streamed[m][0], rtol=1e-10, atol=0)


def test_weights_are_numpys_and_orthogonal_ones_the_librarys() -> None:
    np.testing.assert_array_equal(draw_weights("iid", 5, 3, 16), np.random.RandomState(16).randn(5, 3))
    expected = draw_orthogonal((1, 5, 3), torch.Generator().manual_seed(16))[0].double()
    assert torch.equal(draw_weights("orthogonal", 5, 3, 16), expected)


def test_centring_changes_the_error_and_not_what_is_estimated() -> None:
    shift = 0.8 * torch.ones(DIM, dtype=torch.float64)  # common to all queries and keys
    query, key, value = 0.3 * draw(6, DIM) + shift, 0.3 * draw(9, DIM, seed=1) + shift, draw(9, 3, seed=2)
    weight, exact = draw(20_000, DIM, seed=3), normalise(query, key)
    calcium, out = stream(query, key, value, weight, (20_000,), centre=True)[20_000]
    torch.testing.assert_close(calcium, exact, rtol=0.05, atol=0)
    torch.testing.assert_close(out, (query @ key.mT).softmax(-1) @ value, rtol=0, atol=0.05)
    plain, _ = stream(query, key, value, weight, (20_000,))[20_000]
    assert (calcium / exact - 1).abs().max() < 0.2 * (plain / exact - 1).abs().max()


def test_score_of_known_calcium() -> None:
    normaliser = draw(50).exp()
    assert score(normaliser, normaliser) == pytest.approx(
        {"log_correlation": 1, "correlation": 1, "spearman": 1, "median_error": 0, "rms_error": 0}
    )
    scaled = score(3 * normaliser**2, normaliser)
    assert (scaled["log_correlation"], scaled["spearman"]) == pytest.approx((1, 1))
    assert scaled["correlation"] < 0.99
    assert score(1 / normaliser, normaliser)["log_correlation"] == pytest.approx(-1)
    assert score(1.5 * normaliser, normaliser)["rms_error"] == pytest.approx(0.5)


def test_rounding_keeps_five_digits() -> None:
    assert rounded({"a": [1.2345678, 7], "b": "x"}) == {"a": [1.2346, 7], "b": "x"}


def test_layer_and_head_are_the_authors_modulo_what_there_is() -> None:
    assert (case().layer, case().head) == (3, 1)  # layer 6 of 3, head 5 of 2
    assert (case(kind="text").layer, case(kind="text").head) == (1, 1)
    many = case(heads=[(draw(12, 10, DIM),) * 3] * 12)
    assert (many.layer, many.head) == (6, 5)
    query, key, _ = case().selected()
    assert torch.equal(query, case().heads[2][0][1, 1:])  # without the token to skip
    assert torch.equal(key, case().heads[2][1][1])


def test_each_depth_of_a_shared_module_is_a_layer() -> None:
    torch.manual_seed(0)
    sizes = {"embedding_size": 16, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    model = AlbertModel(AlbertConfig(vocab_size=20, num_hidden_layers=4, num_hidden_groups=2, **sizes)).eval()
    inputs = {"input_ids": torch.arange(9)[None]}
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    with read_layers(model, inputs) as layers:
        assert [layer.index for layer in layers] == [0, 1, 2, 3]
        assert len({layer.name for layer in layers}) == 2
        for layer in layers:
            torch.testing.assert_close(layer.output, states[layer.index + 1])
            attention = (layer.query @ layer.key.mT).softmax(-1) @ layer.value
            torch.testing.assert_close(layer.block_output(attention), layer.output)


def test_albert_is_read_at_its_first_depth(albert: Path, inputs: list[str]) -> None:
    some = load_text(str(albert), Path(inputs[1]), full=True)
    assert (len(some.heads), some.layer, some.head, some.tokens[:2]) == (3, 1, 5, ["the", "glia"])
    model = AlbertModel.from_pretrained(albert).eval()
    ids = torch.tensor([[4, 5, 6, 7, 4, 8, 9] * 3])
    with torch.no_grad():
        state = model(ids, output_hidden_states=True).hidden_states[0]
        layer = model.encoder.albert_layer_groups[0].albert_layers[0].attention
        query = layer.query(model.encoder.embedding_hidden_mapping_in(model.embeddings(ids)))
    assert state.shape[-1] == 48
    expected = query.view(21, 6, 8)[:, 5].double() * 8**-0.25
    torch.testing.assert_close(some.selected()[0], expected, rtol=1e-5, atol=1e-6)


def test_vit_is_read_at_its_sixth_layer_without_cls(vit: Path, inputs: list[str]) -> None:
    some = load_image(str(vit), Path(inputs[3]), full=True)
    assert (some.layer, some.head, some.skip, some.photo.shape) == (6, 5, 1, (32, 32, 3))
    query, key, _ = some.selected()
    assert (len(query), len(key)) == (16, 17)


@pytest.mark.parametrize("full", [[], ["--full"]])
def test_the_authors_kind_of_models_end_to_end(
    full: list[str], albert: Path, vit: Path, inputs: list[str], tmp_path: Path
) -> None:
    out, figure = tmp_path / "out.json", tmp_path / "out.png"
    models = ["--text-model", str(albert), "--image-model", str(vit)]
    files = ["--json", str(out), "--figure", str(figure)]
    done = run(command.main, *full, *models, *inputs, *files, "-m", "64", "-m", "512", "--redraws", "2")
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text("utf-8"))["rows"]
    assert {row["part"] for row in rows} == {"selected", "redraws", "all heads"}
    for row in rows:
        if row["part"] == "all heads":
            values, mine = np.array(row["log_correlations"]), chosen(rows, row)
            assert values.shape == ((3, 6) if mine["input"] == "words.txt" else (7, 6))
            assert values[mine["layer"] - 1, mine["head"]] == pytest.approx(mine["log_correlation"], abs=1e-4)
    assert figure.stat().st_size > 10_000
    assert command.format_markdown(rows).count("\n") == 1 + sum(row["part"] == "selected" for row in rows)


def chosen(rows: list[dict], like: dict) -> dict:
    names = ("model", "weights", "m")
    (row,) = [row for row in rows if row["part"] == "selected" and all(row[name] == like[name] for name in names)]
    return row


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--full", "--text-model", "./no-such-folder"], "there is no folder './no-such-folder'"),
        (["--full", "--text-model", "VIT"], "reads image"),
        (["--full", "--text-model", "ALBERT"], "abstract.txt: is missing; give --text FILE"),
        (["--full", "--text-model", "ALBERT", "--text", "TEXT", "--image-model", "VIT"], "give --image FILE"),
    ],
)
def test_what_is_missing_is_said(
    options: list[str], said: str, albert: Path, vit: Path, inputs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ASTROATTN_DATA", raising=False)
    stand_in = {"ALBERT": str(albert), "VIT": str(vit), "TEXT": inputs[1]}
    done = run(command.main, *(stand_in.get(option, option) for option in options))
    assert done.exit_code == 2
    assert said in done.output
    assert "--full needs ALBERT-base-v2" in done.output
