"""The command line: what it prints and writes, and how it ends."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import astroattn
from astroattn import PRESETS, AstroConfig, Plan
from astroattn.cli import main

SMALL = ["--near", "4", "--exact-keys", "2", "--tile", "2", "--num-hidden", "2"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bert")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=28, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    words = {word: index for index, word in enumerate(["[UNK]", "[PAD]", *"abcdefghijklmnopqrstuvwxyz"])}
    core = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llama(bert: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A decoder with the tokenizer of `bert`."""
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    LlamaForCausalLM(LlamaConfig(vocab_size=28, initializer_range=0.3, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bert).save_pretrained(folder)
    return str(folder)


def write_texts(folder: Path, words: int) -> str:
    """A file of twelve texts of so many words, each a letter."""
    letters = np.random.default_rng(0).choice(list("abcdefghij"), (12, words))
    path = folder / "texts.txt"
    path.write_text("\n".join(" ".join(line) for line in letters))
    return str(path)


@pytest.fixture(scope="module")
def long_texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_texts(tmp_path_factory.mktemp("texts"), 60)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_texts(tmp_path_factory.mktemp("texts"), 20)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(noise).resize((170, 180)).save(folder / f"{number}.png")
    return folder


def run(*arguments: str) -> int:
    """The exit code of the command."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_version_and_help_from_a_shell() -> None:
    command = [sys.executable, "-m", "astroattn"]
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.strip() == astroattn.__version__
    nothing = subprocess.run(command, capture_output=True, text=True, check=False)
    assert nothing.returncode == 2


@pytest.mark.parametrize("command", ["patch", "compare", "calibrate", "info"])
def test_every_command_explains_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    assert "MODEL|RECIPE" in text
    if command == "compare":
        options = "limit batch-size device dtype seed layers hidden num-hidden near exact-keys tile tokens size"
        assert all(f"--{option}" in text for option in options.split())
        told = " ".join(text.partition("--set")[2].partition("--seed")[0].replace("│", " ").split())
        missing = [each.name for each in fields(AstroConfig) if f"--{each.name.replace('_', '-')} " not in text]
        assert {"exact_queries", "steps", "activation"} <= set(missing)
        assert all(f"{name} (" in told for name in missing)  # with its default


def test_patch(bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    assert run("patch", bert, *SMALL, "--layers", "1", "--seed", "7", "--json", str(path)) == 0
    assert "1 of 2 attention modules" in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert [row["status"] for row in report["rows"]] == ["exact", "astrocyte"]
    assert (report["config"]["near"], report["config"]["seed"]) == (4, 7)


def test_a_preset_is_refined_by_other_options(
    bert: str, texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("patch", bert, "--preset", "fast", "--near", "4", "--format", "json", "--quiet") == 0
    assert json.loads(capsys.readouterr().out)["config"] == asdict(replace(PRESETS["fast"], near=4))
    others = ["--set", "exact_queries=1", "--set", "orthogonal=false", "--set", "near=2", "--near", "3"]
    assert run("patch", bert, *others, "--format", "json", "--quiet") == 0
    expected = AstroConfig(exact_queries=1, orthogonal=False, near=3)  # an option of its own has the last word
    assert json.loads(capsys.readouterr().out)["config"] == asdict(expected)
    path = tmp_path / "result.json"
    options = ["--data", texts, "--preset", "exact", "--diagnose", "0", "--limit", "3", "--json", str(path)]
    assert run("compare", bert, *options) == 0
    assert json.loads(path.read_text())["rows"]["patched"]["config"] == asdict(PRESETS["exact"])


def test_compare_texts(bert: str, texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, figure = tmp_path / "result.json", tmp_path / "figure.png"
    options = ["--limit", "8", "--batch-size", "3", "--json", str(path), "--figure", str(figure)]
    assert run("compare", bert, "--data", texts, *SMALL, *options) == 0
    printed = capsys.readouterr()
    assert "embedding cosine" in printed.out
    assert "uniform" in printed.out
    assert "comparing" in printed.err  # the progress bar
    saved = json.loads(path.read_text())
    assert saved["items"] == 8
    assert saved["rows"]["patched"]["config"]["num_hidden"] == 2
    assert "texts.txt" in saved["data"]
    assert figure.stat().st_size > 10_000


def test_calibrate_and_what_its_plan_is_for(
    bert: str, texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, result, report = (str(tmp_path / name) for name in ("plan.json", "result.json", "report.json"))
    state = tmp_path / "state.safetensors"
    options = ["--data", texts, "--batch-size", "5", "--state", str(state), "--seed", "2"]
    assert run("calibrate", bert, *options, "--cost", "1", "--out", plan) == 0
    assert "plan for BertModel: 2 modules, 8 heads" in capsys.readouterr().out
    found = Plan.load(plan)
    assert found.promise is not None
    assert (found.promise.metric, found.promise.items) == ("cosine", 6)
    assert (found.provenance["name"], found.provenance["seed"]) == (bert, 2)
    assert state.exists()
    assert run("compare", bert, "--data", texts, "--plan", plan, "--diagnose", "0", "--json", result) == 0
    rows = json.loads(Path(result).read_text())["rows"]
    assert rows["patched"]["config"] == found.to_dict()
    assert {"uniform", "random"} <= set(rows)
    assert run("patch", bert, "--plan", plan, "--json", report) == 0
    assert json.loads(Path(report).read_text())["plan"] == found.to_dict()


def test_compare_photos_with_a_recipe(weights: str, photos: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        'id = "timm:test_vit"\nlibrary = "timm"\nmeasured = "not measured here"\n'
        f"[settings]\nnear = 4\nexact_keys = 2\ntile = 4\nnum_hidden = 2\n[data]\nsource = {str(photos)!r}\n"
    )
    path = tmp_path / "result.json"
    assert run("compare", str(recipe), "--weights", weights, "--size", "192", "--near", "9", "--json", str(path)) == 0
    saved = json.loads(path.read_text())
    assert saved["items"] == 4
    config = saved["rows"]["patched"]["config"]
    assert (config["near"], config["exact_keys"]) == (9, 2)  # the option wins, the rest is the recipe's
    assert saved["rows"]["original"]["values"]["keys"]["value"] == (192 // 16) ** 2 + 1
    assert "logit_error" in saved["rows"]["patched"]["values"]


def test_what_is_asked_for_as_json_is_all_on_stdout(
    bert: str, texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    options = ["--data", texts, *SMALL, "--diagnose", "0", "--limit", "3", "--json", str(path), "--quiet"]
    assert run("compare", bert, *options, "--format", "json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads(path.read_text())
    assert printed.err == ""
    path.write_text("mine")
    assert run("compare", bert, *options) == 2
    assert "is there already; --force writes over it" in capsys.readouterr().err
    assert path.read_text() == "mine"
    for command in ("patch", "info"):
        assert run(command, bert, "--format", "json", "--quiet") == 0
        assert json.loads(capsys.readouterr().out)
    assert run("patch", bert, "--format", "markdown", "--json", str(path), "--force") == 0
    assert "| 0 | encoder.layer.0.attention.self | BertSelfAttention |" in capsys.readouterr().out
    assert json.loads(path.read_text())


def test_a_sweep_is_one_comparison_for_each_value(
    bert: str, texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sweep.json"
    assert run("compare", bert, "--data", texts, *SMALL, "--sweep", "exact-keys=0,2", "--json", str(path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line[:1].isdigit()] == ["0", "2"]
    saved = json.loads(path.read_text())
    assert (saved["setting"], saved["values"]) == ("exact_keys", [0, 2])
    for value, result in zip(saved["values"], saved["results"], strict=True):
        assert result["rows"]["patched"]["config"] | {"exact_keys": value} == result["rows"]["patched"]["config"]
        assert set(result["rows"]) == {"original", "patched"}
    positions = [result["rows"]["patched"]["values"]["positions"]["value"] for result in saved["results"]]
    assert positions[0] + 2 == positions[1]


def test_a_report_needs_no_tokenizer(bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in Path(bert).iterdir():
        if path.name in ("config.json", "model.safetensors"):
            shutil.copy(path, tmp_path)
    assert run("patch", str(tmp_path)) == 0
    assert "2 of 2 attention modules" in capsys.readouterr().out


def test_an_interruption_is_one_line_and_leaves_no_file(
    bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("astroattn.files.Path.replace", interrupt)  # all is written, but not yet in place
    assert run("patch", bert, "--json", str(tmp_path / "report.json"), "--quiet") == 130
    assert capsys.readouterr().err.splitlines() == ["astroattn: interrupted"]
    assert not list(tmp_path.iterdir())


def test_info(bert: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", bert) == 0
    text = capsys.readouterr().out
    assert "torch" in text
    assert "cpu kernels" in text
    assert "encoder.layer.1.attention.self" in text


def test_recipes_are_listed_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "minilm                   all-MiniLM-L6-v2 (BERT, 6 layers, 12 heads of 32)" in lines


def test_a_decoder_is_calibrated_and_compared(
    llama: str, long_texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, result = tmp_path / "plan.json", tmp_path / "result.json"
    assert run("calibrate", llama, "--data", long_texts, "--entries", "40", "--out", str(plan)) == 0
    assert "entries in the mean" in capsys.readouterr().out
    found = Plan.load(plan)
    assert found.entries is not None
    assert 16 < found.entries <= 40
    assert run("compare", llama, "--data", long_texts, "--plan", str(plan), "--json", str(result)) == 0
    assert json.loads(result.read_text())
    assert run("calibrate", llama, "--data", long_texts, "--entries", "4", "--out", str(plan), "--force") == 2
    assert "entries: 4; a streaming memory has at least 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "BERT"], "data: say what to compare on"),
        (["compare", "BERT", "--data", "nowhere.txt"], "there is no file or folder 'nowhere.txt'"),
        (["compare", "BERT", "--data", "PHOTOS"], r"no .txt files"),
        (["compare", "BERT", "--data", "TEXTS", "--figure", "a.docx"], "figure: must end in"),
        (["compare", "BERT", "--data", "TEXTS", "--figure", "no/such/a.png"], "figure: there is no folder 'no/such'"),
        (["compare", "BERT", "--data", "TEXTS", "--json", "no/such/a.json"], "json: there is no folder 'no/such'"),
        (["compare", "BERT", "--data", "TEXTS", "--half", "left"], "half: must be even or odd"),
        (["compare", "BERT", "--data", "TEXTS", "--tokens", "999"], "tokens: must be 8 to 64"),
        (["compare", "BERT", "--data", "TEXTS", "--pooling", "max"], "pooling: must be one of"),
        (["compare", "BERT", "--data", "TEXTS", "--size", "32"], "size: is for photos"),
        (["compare", "timm:test_vit", "--weights", "WEIGHTS", "--data", "TEXTS"], "not a readable, uncompressed tar"),
        (["calibrate", "BERT", "--data", "TEXTS", "--out", "no/such/a.json"], "out: there is no folder 'no/such'"),
        (
            ["calibrate", "BERT", "--data", "TEXTS", "--out", "a.json"],
            "tolerance, cost, entries: give exactly one of them",
        ),
        (["calibrate", "BERT", "--cost", "0.5", "--out", "a.json"], "data: say what to calibrate on"),
        (["calibrate", "BERT", "--data", "TEXTS", "--out", "a.json", "--limit", "8", "--tolerance", "0.9"], "so 11 in"),
        (["compare", "BERT", "--data", "TEXTS", "--plan", "no.json"], "plan: 'no.json': cannot read it"),
        (["patch", "BERT", "--plan", "PLAN", "--near", "8"], "near: cannot be set, as a plan says"),
        (["patch", "BERT", "--plan", "PLAN", "--preset", "fast"], "preset: cannot be set, as a plan says"),
        (["patch", "BERT", "--preset", "fats"], "preset: 'fats'; must be one of fast, balanced, exact; did you mean"),
        (["patch", "BERT", "--plan", "PLAN"], "plan: BertModel has no attention module 'a'"),
        (["patch", "./nowhere"], "model: there is no folder './nowhere'"),
        (["patch", "nowhere.toml"], "recipe: cannot read 'nowhere.toml'"),
        (["patch", "BERT", "--dtype", "int8"], "dtype: must be one of"),
        (["patch", "BERT", "--near", "-2"], "near"),
        (["patch", "BERT", "--hidden", "hebian"], "did you mean 'hebbian'?"),
        (["patch", "BERT", "--json", "a.txt"], "json: must end in .json, got 'a.txt'"),
        (["patch", "BERT", "--json", "PHOTOS"], "json: must end in .json"),
        (["patch", "timm:vit_tiny_patch16_22"], "did you mean 'vit_tiny_patch16_224'?"),
        (["patch", "package:transformer"], "did you mean 'transformers'?"),
        (["compare", "BERT", "--data", "TEXTS", "--sweep", "exat_keys=1"], "did you mean 'exact_keys'?"),
        (["compare", "BERT", "--data", "TEXTS", "--sweep", "near=x"], "sweep: 'x'; near must be int"),
        (["compare", "BERT", "--data", "TEXTS", "--set", "key_error=x"], "set: 'x'; key_error must be float"),
        (["compare", "BERT", "--data", "TEXTS", "--set", "key_error=-2"], "key_error: -2.0; must be at least 0"),
        (["compare", "BERT", "--data", "TEXTS", "--set", "millionths=2"], "'millionths' is not known"),
        (["compare", "BERT", "--data", "TEXTS", "--sweep", "near"], "sweep: 'near' has no values"),
        (["compare", "BERT", "--data", "TEXTS", "--sweep", "near=1", "--figure", "a.png"], "figure: is of one"),
        (["patch", "BERT", "--set", "stepps=1"], "did you mean 'steps'?"),
        (["patch", "BERT", "--set", "steps=1,2"], "set: 'steps=1,2' has 2 values"),
        (["patch", "BERT", "--set", "backend=cuda"], "backend: 'cuda'; must be one of"),
        (["patch", "BERT", "--layers", "9"], "9"),
        (["patch", "BERT", "--json", "no/such/folder/a.json"], "no/such/folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, bert: str, texts: str, weights: str, photos: Path,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    plan = tmp_path / "plan.json"
    Plan(model="BertModel", modules={"a": (AstroConfig(),)}).save(plan)
    places = {"BERT": bert, "TEXTS": texts, "WEIGHTS": weights, "PHOTOS": str(photos), "PLAN": str(plan)}
    assert run(*(places.get(argument, argument) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("astroattn: ")]
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize("arguments", [["compare"], ["compare", "x", "--nope"], ["patch", "x", "--near", "y"], ["zap"]])
def test_bad_usage_is_exit_code_2(arguments: list[str]) -> None:
    assert run(*arguments) == 2


def test_packed_photos_are_classified_as_before(data_dir: Path, tmp_path: Path) -> None:
    """ViT-tiny on some of the packed photos; the accuracy on all 500 is 80 %."""
    path = tmp_path / "result.json"
    weights = data_dir / "vit_tiny_patch16_224" / "model.safetensors"
    photos = data_dir / "imagenet_photos" / "photos.tar"
    options = ["--limit", "16", "--near", "256", "--diagnose", "0", "--json", str(path)]
    assert run("compare", "timm:vit_tiny_patch16_224", "--weights", str(weights), "--data", str(photos), *options) == 0
    rows = json.loads(path.read_text())["rows"]
    assert rows["original"]["values"]["accuracy"]["value"] > 0.7
    assert rows["patched"]["values"]["top1_agreement"]["value"] == 1
    assert rows["uniform"]["values"]["accuracy"]["value"] < 0.1
