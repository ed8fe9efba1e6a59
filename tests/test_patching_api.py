"""patch, unpatch, patched: where, configs, failures, copies, threads."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from patching_models import ALL, build, image, outputs, text
from safetensors import safe_open
from torch import nn

import astroattn
import astroattn.patching.checking as checking
from astroattn import AstroConfig, AstrocyteAttention
from astroattn.cost import covers
from astroattn.patching import PatchReport, fallbacks, patch, patched, unpatch
from astroattn.patching.report import FASTER_FROM, make_notes
from astroattn.patching.sdpa import SdpaSite

RESULTS = Path(__file__).parent.parent / "docs" / "results"
SHORT = AstroConfig(near=2, exact_keys=0, tile=2, num_hidden=4)
STATIC = replace(SHORT, hidden="random")
SAMPLE = ["bert", "vit", "albert", "gpt2", "timm vit"]  # both front-ends, shared modules, causal


def cores(model: nn.Module) -> dict[str, AstrocyteAttention]:
    return {name: module for name, module in model.named_modules() if isinstance(module, AstrocyteAttention)}


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# what the report says


def test_the_report_says_what_is_untrained_and_what_softmax_answers(tmp_path: Path) -> None:
    learned = AstroConfig(hidden="learned", num_hidden=2)
    model = build(ALL["bert"])
    report = patch(model, learned, 0)
    assert report.notes == ("the learned hidden layers of 1 modules are untrained: distill the model first",)
    with torch.no_grad():
        cores(model).popitem()[1].hidden.query_weight.add_(1)
    assert patch(model, learned, 0).notes == ()  # it is trained, and stays as it is
    assert patch(model, learned).notes[0].startswith("the learned hidden layers of 1 modules")
    unpatch(model)
    patch(model, learned, 0)
    with torch.no_grad():
        cores(model).popitem()[1].hidden.query_weight.add_(1)
    astroattn.save(model, tmp_path)
    assert astroattn.load(build(ALL["bert"]), tmp_path).notes == ()
    assert "untrained" not in str(patch(build(ALL["bert"]), SHORT))
    for config, tokens in ((SHORT, 2), (AstroConfig(), 128), (replace(SHORT, exact_keys=9, exact_queries=1), 10)):
        note = f"sequences of up to {tokens} tokens are answered by softmax attention: there every key is exact"
        report = patch(build(ALL["bert"]), config)
        assert report.notes[0] == note
        assert f"note: {note}" in str(report)
        assert note in report.to_dict()["notes"]
        assert covers(config, tokens, None)
        assert not covers(config, tokens + 1, None)


def summaries(name: str) -> dict[str, int | None]:
    """By backend, from how many tokens on the default was faster, in a file of results."""
    rows = json.loads((RESULTS / name).read_text("utf-8"))["rows"]
    wanted = ("summary", "default", "float32", "forward")
    found = [row for row in rows if tuple(row.get(key) for key in ("part", "name", "dtype", "pass")) == wanted]
    return {row["backend"]: row["faster than SDPA from"] for row in found}


def test_the_report_says_from_which_length_on_the_default_was_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    here, wide = summaries("benchmark.json"), summaries("benchmark_avx512.json")
    assert {"avx2": here["auto"], "avx512": wide["auto"], "torch": here["torch"]} == FASTER_FROM
    assert wide["torch"] == here["torch"]
    rows = json.loads((RESULTS / "benchmark.json").read_text("utf-8"))["rows"]
    longest = max(row.get("tokens", 0) for row in rows if (row.get("backend"), row.get("name")) == ("torch", "default"))
    patched_bert = build(ALL["bert"])
    patch(patched_bert)
    cases = {
        (
            "AVX2",
            None,
        ): "AVX2 the default's attention, in C++, was faster than softmax's from 1,024 tokens on",
        ("AVX512", None): "AVX512 the default's attention, in C++, was faster than softmax's from 1,024 tokens on",
        ("DEFAULT", None): "not measured on such a CPU",
        ("AVX2", "none"): f"in plain PyTorch, was slower than softmax's at every length up to {longest:,} tokens",
    }
    for (capability, refusal), said in cases.items():
        monkeypatch.setattr("astroattn.ops.native.library.refusal", lambda dtype, refusal=refusal: refusal)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert said in make_notes(patched_bert)[-1]
    assert not any("CPU" in note for note in patch(build(ALL["bert"]), SHORT).notes)  # which was not measured


# where


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, [0, 1]),
        (0, [0]),
        (-1, [1]),
        ([0, -1], [0, 1]),
        ("encoder.layer.1.*", [1]),
        (["*.0.*", "*.1.*"], [0, 1]),
        (lambda name, module: "layer.0" in name and module.num_attention_heads == 4, [0]),
    ],
)
def test_where_selects(where: object, expected: list[int]) -> None:
    model = build(ALL["bert"])
    report = patch(model, SHORT, where=where)
    assert [row.index for row in report.patched] == expected
    assert {row.reason for row in report.exact} <= {"not selected by where"}
    assert len(cores(model)) == len(expected)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (2, "index 2 is out of range for 2"),
        ([0, -3], "index -3 is out of range"),
        ("decoder.*", "'decoder.*' matches none"),
        (["encoder.*", "nothing"], "'nothing' matches none"),
        ([], "an empty sequence"),
        (lambda name, module: False, "holds for none of 2"),
    ],
)
def test_where_that_matches_nothing_raises(where: object, message: str) -> None:
    model = build(ALL["bert"])
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        patch(model, SHORT, where=where)
    assert not cores(model)


@pytest.mark.parametrize("where", [True, 1.5, [0, None], [False]])
def test_where_of_a_wrong_type_raises(where: object) -> None:
    with pytest.raises(TypeError, match="where"):
        patch(build(ALL["bert"]), SHORT, where=where)


def test_indices_pass_over_cross_attention() -> None:
    model = build(ALL["whisper"])
    report = patch(model, STATIC, where=[2, 3])
    assert [row.name for row in report.patched] == ["decoder.layers.0.self_attn", "decoder.layers.1.self_attn"]


def test_a_predicate_that_picks_only_cross_attention_raises() -> None:
    with pytest.raises(ValueError, match="cross attention"):
        patch(build(ALL["whisper"]), STATIC, where="decoder.layers.*.encoder_attn")


# patching again, and undoing


@pytest.mark.parametrize("name", SAMPLE)
def test_patching_twice_is_patching_once(name: str) -> None:
    model, inputs = build(ALL[name]), ALL[name].inputs()
    first = patch(model, STATIC)
    before, held = outputs(model, inputs), cores(model)
    second = patch(model, STATIC)
    assert second.rows == first.rows
    assert cores(model) == held
    assert same(before, outputs(model, inputs))


def test_patching_again_adds_modules_and_replaces_configs() -> None:
    model = build(ALL["bert"])
    before = outputs(model, text())
    patch(model, SHORT, where=0)
    other = replace(SHORT, near=4)
    report = patch(model, other, where=1)
    assert len(report.patched) == 2
    assert [core.config for core in cores(model).values()] == [SHORT, other]
    patch(model, other)
    assert [core.config for core in cores(model).values()] == [other, other]
    unpatch(model)
    assert same(before, outputs(model, text()))


def test_unpatching_an_unpatched_model_does_nothing() -> None:
    model = build(ALL["bert"])
    before = outputs(model, text())
    unpatch(model)
    assert same(before, outputs(model, text()))


@pytest.mark.parametrize("name", SAMPLE)
def test_patched_restores_also_after_an_exception(name: str) -> None:
    model, inputs = build(ALL[name]), ALL[name].inputs()
    before = outputs(model, inputs)

    def fail() -> None:
        with patched(model, STATIC) as report:
            assert isinstance(report, PatchReport)
            assert not same(before, outputs(model, inputs))
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    assert not cores(model)
    assert same(before, outputs(model, inputs))


@pytest.mark.parametrize("name", ["bert", "timm vit"])
def test_patched_restores_an_earlier_patch(name: str) -> None:
    model, inputs = build(ALL[name]), ALL[name].inputs()
    patch(model, SHORT, where=0)
    before, held = outputs(model, inputs), cores(model)
    with patched(model, replace(SHORT, near=100_000)):
        assert len(cores(model)) == 2
    assert cores(model) == held
    assert same(before, outputs(model, inputs))
    with pytest.raises(ValueError, match="nothing"), patched(model, where="nothing"):
        pass
    assert cores(model) == held


@pytest.mark.parametrize("name", SAMPLE)
def test_all_or_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build(ALL[name]), ALL[name].inputs()
    before, made = outputs(model, inputs), []

    def fail(*args: object) -> AstrocyteAttention:
        made.append(args)
        if len(made) == min(2, ALL[name].patched):
            raise MemoryError("no room")
        return AstrocyteAttention(*args)

    monkeypatch.setattr(checking, "AstrocyteAttention", fail)
    with pytest.raises(MemoryError, match="no room"):
        patch(model, STATIC)
    assert made
    assert not cores(model)
    assert same(before, outputs(model, inputs))


def test_a_failed_patch_leaves_an_earlier_one() -> None:
    model = build(ALL["bert"])
    patch(model, SHORT, where=0)
    before = outputs(model, text())
    with pytest.raises(ValueError, match="nothing"):
        patch(model, replace(SHORT, near=4), where=["*.0.*", "nothing"])
    assert len(cores(model)) == 1
    assert same(before, outputs(model, text()))


# what cannot be patched


def test_a_model_without_attention_raises() -> None:
    with pytest.raises(ValueError, match="Sequential has no attention module that astroattn recognises"):
        patch(nn.Sequential(nn.Linear(4, 4)))


def test_wrong_types_raise() -> None:
    with pytest.raises(TypeError, match="model"):
        patch("bert")
    with pytest.raises(TypeError, match="config"):
        patch(build(ALL["bert"]), {"near": 2})


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_hebbian_weights_cannot_serve_causal_attention(name: str) -> None:
    with pytest.raises(ValueError, match="static layer"):
        patch(build(ALL[name]), SHORT)


# the report


def test_report_prints_and_becomes_json() -> None:
    report = patch(build(ALL["whisper"]), STATIC)
    table = str(report)
    for part in ("WhisperModel: 4 of 6", "encoder.layers.0.self_attn", "astrocyte", "cross attention", "4 x 8"):
        assert part in table
    values = json.loads(json.dumps(report.to_dict()))
    assert [row["status"] for row in values["rows"]].count("exact") == len(report.exact) == 2
    assert values["model"] == "WhisperModel"


# copies, threads, checkpoints


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copies_are_models_of_their_own(name: str, duplicate: object) -> None:
    model, inputs = build(ALL[name]), ALL[name].inputs()
    original = outputs(model, inputs)
    patch(model, STATIC)
    before = outputs(model, inputs)
    twin = duplicate(model)
    assert same(before, outputs(twin, inputs))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert same(before, outputs(model, inputs))
    assert not same(before, outputs(twin, inputs))
    twin = duplicate(model)
    unpatch(twin)
    assert same(original, outputs(twin, inputs))
    assert same(before, outputs(model, inputs))
    unpatch(model)
    assert same(original, outputs(model, inputs))


def test_pickles_open_in_another_process(tmp_path: Path) -> None:
    saved = []
    for name in ("bert", "timm vit"):
        model, inputs = build(ALL[name]), ALL[name].inputs()
        patch(model, STATIC)
        saved.append((model, inputs, outputs(model, inputs)[0]))
    torch.save(saved, tmp_path / "models.pt")
    script = (
        "import sys, torch\n"
        "for model, inputs, before in torch.load(sys.argv[1], weights_only=False):\n"
        "    with torch.no_grad(): after = model(**inputs)\n"
        "    after = after if isinstance(after, torch.Tensor) else after[0][inputs['attention_mask'].bool()]\n"
        "    assert torch.equal(after, before)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "models.pt")], check=True, timeout=200)


@pytest.mark.parametrize("name", SAMPLE)
def test_state_dict_loads_strictly_both_ways(name: str) -> None:
    plain, model = build(ALL[name]), build(ALL[name])
    patch(model, STATIC)
    model.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(model.state_dict(), strict=True)


def test_save_pretrained_writes_the_original_model_and_a_record(tmp_path: Path) -> None:
    model = build(ALL["bert"])
    before = outputs(model, text())
    patch(model, SHORT)
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert isinstance(settings.pop("astroattn"), str)  # words, and nothing else
    assert "astroattn" not in json.dumps(settings)  # not even our attention implementation
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["astroattn"])["model"] == type(model).__name__
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert same(before, outputs(again.eval(), text()))


@pytest.mark.parametrize("name", ["bert", "timm vit"])
def test_threads_do_not_disturb_one_another(name: str) -> None:
    tiny = ALL[name]
    patched_model, plain = build(tiny), build(tiny)
    patch(patched_model, STATIC)
    inputs = tiny.inputs()
    expected = {id(model): outputs(model, inputs) for model in (patched_model, plain)}

    def run(turn: int) -> bool:
        model = (patched_model, plain)[turn % 2]
        return same(expected[id(model)], outputs(model, inputs))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(40)))


def test_models_with_one_config_object_do_not_disturb_one_another() -> None:
    one = build(ALL["bert"])
    other = type(one)(one.config).eval()
    before = outputs(other, text())
    patch(one, SHORT)
    assert same(before, outputs(other, text()))
    patch(other, SHORT)
    changed = outputs(other, text())
    assert not same(before, changed)
    unpatch(one)
    with pytest.raises(RuntimeError, match="attention implementation of this patched model was changed"):
        other(**text())  # never softmax in silence


def test_the_probe_changes_no_state() -> None:
    model = build(ALL["bert"])
    model.train()
    model.encoder.layer[0].eval()
    flags = [module.training for module in model.modules()]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    patch(model, SHORT)
    patch(model, replace(SHORT, hidden="random"))
    assert torch.equal(torch.get_rng_state(), state)
    unpatch(model)
    assert [module.training for module in model.modules()] == flags


class Wrapper(nn.Module):
    """A ViT that no input can be made up for."""

    def __init__(self) -> None:
        super().__init__()
        self.body = build(ALL["timm vit"])

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return self.body(first + second)


def test_a_model_without_made_up_input_is_patched_unprobed() -> None:
    model = Wrapper()
    before = model(image(), image())
    report = patch(model, replace(SHORT, near=100_000))
    assert report.probe == "none, no input can be made up for a Wrapper"
    assert len(report.patched) == 2
    torch.testing.assert_close(model(image(), image()), before)
    patch(model, SHORT)
    assert not torch.allclose(model(image(), image()), before)
    assert fallbacks(model) == {}


def test_heads_that_nobody_can_count_are_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SdpaSite, "shape", classmethod(lambda cls, module: None))
    model = Wrapper()
    before = model(image(), image())
    with pytest.raises(ValueError, match="its heads cannot be counted without a forward, and no input can"):
        patch(model, SHORT)
    assert torch.equal(model(image(), image()), before)
    assert [row.heads for row in patch(model.body, SHORT).patched] == [4, 4]  # the probe has seen them


def test_import_needs_neither_transformers_nor_timm() -> None:
    script = (
        "import sys, torch, astroattn.patching as patching\n"
        "layer = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True)\n"
        "patching.patch(layer); patching.unpatch(layer)\n"
        "assert not {'transformers', 'timm', 'rich', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
