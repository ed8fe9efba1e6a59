"""Two processes on a CPU (gloo) with DDP and FSDP: the gradients and the runs of one, and nothing is counted twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from process_run import CONFIGS, Killed
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from astroattn import from_pretrained
from eval import finetune_text, finetuning
from eval.finetuning import make_accelerator

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def launch(*arguments: str) -> str:
    """The output of a Python program."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `process_run.py` writes in one process and in two."""
    folder = tmp_path_factory.mktemp("runs")
    launch("tests/process_run.py", str(folder))
    return folder


@pytest.fixture(params=[(kind, way) for kind in CONFIGS for way in ("ddp", "fsdp")], ids=" ".join)
def runs(request: pytest.FixtureRequest, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same work in one process and in two."""
    kind, way = request.param
    one, two = (json.loads((folder / f"{processes}.json").read_text("utf-8"))[kind] for processes in (1, 2))
    return one["alone"], two[way]


def test_gradients_are_those_of_one_process(runs: tuple[dict[str, Any], dict[str, Any]]) -> None:
    shape = {"DistributedDataParallel": "Parameter", "FSDPVisionTransformer": "DTensor"}
    assert runs[0]["model"] == "VisionTransformer"
    assert runs[1]["weight"] == shape[runs[1]["model"]]
    if not runs[1].get("gloo averages", True):
        pytest.skip("gloo of this torch (2.8) sums where FSDP asks for the mean")
    one, two = (run["gradients"] for run in runs)
    assert one.keys() == two.keys()
    for name, expected in one.items():
        assert max(map(abs, expected)) > 0, name
        scale = max(map(abs, expected))
        assert two[name] == pytest.approx(expected, rel=1e-4, abs=1e-5 * scale), name


def test_evaluation_counts_every_item_once(runs: tuple[dict[str, Any], dict[str, Any]]) -> None:
    one, two = (run["evaluation"] for run in runs)
    assert one["items"] == two["items"] == 21
    assert two["accuracy"] == one["accuracy"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def losses(result: dict[str, Any]) -> list[float]:
    rows = [row[key] for row in result["log"] for key in ("train_loss", "validation_loss")]
    return [*rows, result["loss"], result["best_epoch"]]


def test_a_run_ends_as_in_one_process_and_resumes(runs: tuple[dict[str, Any], dict[str, Any]]) -> None:
    one, two = runs
    assert losses(two["whole"]) == pytest.approx(losses(one["whole"]), rel=1e-3)
    assert two["kept_loss"] == pytest.approx(two["whole"]["loss"], rel=1e-5)  # its weights in a model of one process
    for run in runs:
        assert run["killed"] == ["epoch-1"]
        assert losses(run["resumed"]) == pytest.approx(losses(run["whole"]), rel=1e-6)


@pytest.mark.parametrize("file", ["model", "best", "optimizer"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_checkpoints_are_whole(kind: str, file: str, folder: Path) -> None:
    """They hold what one process writes, so that any number of processes, with DDP or FSDP, can go on from them."""
    paths = ("1", kind), ("2", kind), ("2", f"{kind}-sharded")
    one, *several = (load_file(folder.joinpath(*path, "whole", "epoch-2", f"{file}.safetensors")) for path in paths)
    assert len(one) > 20
    expected = torch.cat([tensor.flatten() for tensor in one.values()])
    for each in several:
        assert {name: tensor.shape for name, tensor in each.items()} == {name: one[name].shape for name in one}
        values = torch.cat([each[name].flatten() for name in one])  # AdamW makes noise of biases without a gradient
        assert (values - expected).norm() < 1e-3 * expected.norm()


class TestScript:
    """`python -m eval.finetune_text` in two processes."""

    @pytest.fixture(scope="class")
    @staticmethod
    def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A folder with the results of one process and of two, which go on from where one process was killed."""
        folder = tmp_path_factory.mktemp("script")
        good, bad = ("fine", "moving", "funny", "great", "lovely"), ("dull", "awful", "tired", "poor", "boring")
        nouns = ("film", "story", "cast", "script", "ending", "plot")
        special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
        words = {word: index for index, word in enumerate((*special, "a", *good, *bad, *nouns))}
        core = Tokenizer(WordLevel(words, unk_token="[UNK]"))
        core.pre_tokenizer = Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        BertModel(BertConfig(**sizes, vocab_size=len(words), hidden_dropout_prob=0.0)).save_pretrained(folder)
        rows = [f"{label},a {a} {b}" for label, kind in ((1, good), (0, bad)) for a in kind for b in nouns]
        (folder / "items.csv").write_text("\n".join(["label,text", *rows]), encoding="utf-8")

        options = {
            "data": str(folder / "items.csv"),
            "model": str(folder),
            "num_hidden": 4,
            "epochs": 2,
            "batch_size": 12,
            "learning_rate": 1e-2,
            "patience": 2,
        }
        kinds = [finetune_text.variants.Attention.default, finetune_text.variants.Attention.linear]
        finetune_text.main(**options, attention=kinds, out=folder / "1", json=folder / "1.json")
        save = finetuning.save_checkpoint

        def save_and_die(*arguments: Any) -> None:
            save(*arguments)
            raise Killed

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(finetuning, "save_checkpoint", save_and_die)
            with pytest.raises(Killed):
                finetune_text.main(**options, attention=kinds[:1], out=folder / "2")
        arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        arguments += [part for kind in kinds for part in ("--attention", kind.value)]
        arguments += ["--out", str(folder / "2"), "--json", str(folder / "2.json"), "--resume"]
        several = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
        output = launch("-m", *several, "-m", "eval.finetune_text", *arguments)
        assert output.count("Mean and standard deviation over seeds") == 1
        return folder

    @pytest.mark.parametrize("row", [0, 1], ids=["default", "linear"])
    def test_gives_the_results_of_one_process(self, runs: Path, row: int) -> None:
        one, two = (json.loads((runs / f"{n}.json").read_text("utf-8"))["rows"] for n in (1, 2))
        assert len(one) == len(two) == 2
        assert two[row]["accuracy"] == one[row]["accuracy"]
        assert losses(two[row]) == pytest.approx(losses(one[row]), abs=1e-3)

    def test_goes_on_from_the_epoch_that_one_process_did(self, runs: Path) -> None:
        one, two = (json.loads((runs / f"{n}.json").read_text("utf-8"))["rows"] for n in (1, 2))
        assert two[0]["log"][0]["train_loss"] == one[0]["log"][0]["train_loss"]  # to the bit

    def test_writes_the_model_once_and_whole(self, runs: Path) -> None:
        """Adam makes whole steps of gradients that are nothing but rounding, so a few weights differ."""
        one, two = (from_pretrained(runs / folder / "linear-0" / "model").state_dict() for folder in ("1", "2"))
        assert any("astrocyte" in name for name in one)
        assert {name: weight.shape for name, weight in two.items()} == {n: weight.shape for n, weight in one.items()}
        weights, others = (torch.cat([state[name].flatten() for name in one]) for state in (one, two))
        close = torch.isclose(others, weights, rtol=1e-2, atol=1e-3)
        assert close.float().mean() > 0.99


@pytest.mark.parametrize(
    ("variables", "match"),
    [
        ({"WORLD_SIZE": "2"}, "processes: 2 were started, but accelerate sees 1; .* ACCELERATE_USE_CPU"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "fsdp: accelerate shards on accelerators only"),
    ],
)
def test_what_accelerate_would_not_do_is_refused(
    variables: dict[str, str], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=match):
        make_accelerator()
