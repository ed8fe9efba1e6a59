"""What other libraries write of a patched model: the record, and words for who opens it without astroattn."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as t
from patching_models import TEXT, TIMM_VIT, VISION, image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard

import astroattn
from astroattn import AstroConfig, patch, unpatch
from astroattn.fidelity.calls import find_astrocytes

SHORT = AstroConfig(near=2, exact_keys=0, tile=2, num_hidden=4)
LEARNED = AstroConfig(hidden="learned", num_hidden=8, near=0)
BEGIN, END = "<!-- astroattn: begin", "<!-- astroattn: end -->"
MINE = "---\nlicense: mit\n---\n\n# Mine\r\n\r\nWords of mine, \udcff.\n"  # other ends of lines, and no UTF-8


def bert(cls: Any = t.BertForSequenceClassification) -> Any:
    """The same one each time, with weights large enough for attention to be far from uniform."""
    torch.manual_seed(0)
    model = cls(t.BertConfig(**TEXT)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(5.0)
    return model


def vit() -> Any:
    torch.manual_seed(0)
    return t.ViTForImageClassification(t.ViTConfig(**VISION, image_size=32, patch_size=8)).eval()


def train(model: nn.Module) -> None:
    with torch.no_grad():
        for core in find_astrocytes(model).values():
            for weight in core.parameters():
                weight.normal_()


@torch.no_grad()
def run(model: Any) -> Tensor:
    if getattr(model, "main_input_name", "input_ids") == "pixel_values" or isinstance(model, timm.models.Eva):
        return model.eval()(image())[0]
    return model.eval()(torch.arange(40)[None] + 7)[0]


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(run(one), run(other), rtol=1e-4, atol=1e-5)


def card(folder: Path) -> str:
    path = folder / "README.md"
    return path.read_bytes().decode("utf-8", "surrogateescape") if path.exists() else ""


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text("utf-8"))


def assert_no_record(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"folder: .* has no record of astrocytes"):
        astroattn.load(bert(), folder)
    assert BEGIN not in card(folder)
    if (folder / "config.json").exists():
        assert "astroattn" not in settings(folder)


# transformers


@pytest.mark.parametrize("make", [bert, vit])
@pytest.mark.parametrize("config", [SHORT, LEARNED])
def test_a_folder_says_what_it_is(make: Callable[[], Any], config: AstroConfig, tmp_path: Path) -> None:
    model = make()
    patch(getattr(model, model.base_model_prefix), config)
    model.save_pretrained(tmp_path)
    for text in (card(tmp_path), settings(tmp_path)["astroattn"]):
        assert f"2 attention modules of its {type(model).__name__} (" in text
        assert f"with AstroConfig(hidden={config.hidden!r}" in text or "with AstroConfig(num_hidden=4, near=2" in text
        assert "from_pretrained(" in text
        assert "astroattn.load(" in text
        assert "softmax attention" in text
    assert ("what its astrocytes have learned is not used" in card(tmp_path)) == (config is LEARNED)
    assert not hasattr(model.config, "astroattn")
    again = astroattn.from_pretrained(tmp_path)
    assert not hasattr(again.config, "astroattn")
    assert_same(again, model)
    plain = type(model).from_pretrained(tmp_path)  # what the words are for
    assert not find_astrocytes(plain)
    assert_no_record_after_saving(plain, tmp_path)


def assert_no_record_after_saving(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    assert_no_record(folder)
    assert not (folder / "README.md").exists()


def test_the_code_of_the_card_runs(tmp_path: Path) -> None:
    model = bert()
    patch(model, SHORT)
    model.save_pretrained(tmp_path)
    text = card(tmp_path).replace("FOLDER", str(tmp_path))
    scope: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], scope)
    assert_same(scope["model"], model)
    options = bert()
    exec(re.search(r"call `(.*?)`", text)[1], {"astroattn": astroattn, "model": options})
    assert len(find_astrocytes(options)) == 2


def test_what_the_user_wrote_in_the_card_stays(tmp_path: Path) -> None:
    model = bert()
    (tmp_path / "README.md").write_bytes(MINE.encode("utf-8", "surrogateescape"))
    patch(model, SHORT)
    for config in (SHORT, LEARNED, LEARNED):
        patch(model, config)
        model.save_pretrained(tmp_path)
        assert card(tmp_path).startswith(MINE)
        assert card(tmp_path).count(BEGIN) == card(tmp_path).count(END) == 1
    assert "hidden='learned'" in card(tmp_path)
    assert "near=2" not in card(tmp_path)
    with (tmp_path / "README.md").open("ab") as file:
        file.write(b"\n## More\n")
    model.save_pretrained(tmp_path)
    unpatch(model)
    model.save_pretrained(tmp_path)
    assert card(tmp_path) == MINE + "\n## More\n"


def test_a_failed_save_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    patch(model, SHORT)
    monkeypatch.setattr(type(model), "state_dict", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path)
    assert not card(tmp_path)
    assert not hasattr(model.config, "astroattn")


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    model = bert()
    patch(model, LEARNED)
    model.save_pretrained(tmp_path, is_main_process=False, state_dict={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cls", [t.AutoModelForSequenceClassification, t.AutoModelForTokenClassification, t.AutoModel])
def test_options_of_transformers_and_then_load(cls: Any, tmp_path: Path) -> None:
    model = bert()
    patch(model.bert, LEARNED)
    train(model)
    model.save_pretrained(tmp_path)
    labels = {} if cls is t.AutoModel else {"num_labels": 7, "ignore_mismatched_sizes": True}
    other = cls.from_pretrained(tmp_path, device_map="cpu", dtype=torch.bfloat16, **labels)
    astroattn.load(other, tmp_path)
    mine, theirs = find_astrocytes(model), find_astrocytes(other)
    assert len(theirs) == 2
    for one, another in zip(mine.values(), theirs.values(), strict=True):
        assert torch.equal(one.hidden.key_weight.bfloat16(), another.hidden.key_weight)
    output = other(torch.arange(40)[None] + 7)[0]
    assert output.dtype == torch.bfloat16
    assert not labels or output.shape[-1] == 7
    assert torch.isfinite(output).all()
    assert not astroattn.fallbacks(other)
    other.save_pretrained(tmp_path / "again")
    assert len(find_astrocytes(astroattn.from_pretrained(tmp_path / "again"))) == 2


@pytest.mark.parametrize("sizes", [("60KB", "50GB"), ("20KB", "60KB"), ("60KB", "20KB")])
def test_saving_again_in_other_shards(sizes: tuple[str, str], tmp_path: Path) -> None:
    model = bert()
    for config, size in zip((SHORT, LEARNED), sizes, strict=True):
        patch(model, config)
        train(model)
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert_same(astroattn.from_pretrained(tmp_path), model)
        assert_same(loaded(bert(), tmp_path), model)


def test_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"folder: 'nobody/nothing' has no record .*, or it is out of reach"):
        astroattn.load(bert(), "nobody/nothing")
    with pytest.raises(ValueError, match=r"source: cannot load 'nobody/nothing': .*, or it is out of reach"):
        astroattn.from_pretrained("nobody/nothing")


@pytest.mark.parametrize("where", ["nothing", "file"])
def test_a_path_that_is_no_folder(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", "utf-8")
    source = tmp_path / where
    with pytest.raises(ValueError, match=rf"folder: cannot read '{source}': "):
        astroattn.load(bert(), source)
    with pytest.raises(ValueError, match=rf"source: cannot load '{source}': "):
        astroattn.from_pretrained(source)


def loaded(model: Any, folder: Path) -> Any:
    astroattn.load(model, folder)
    return model


def test_files_of_several_saves_are_refused(tmp_path: Path) -> None:
    model = bert()
    patch(model, SHORT)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shard = next(iter(tmp_path.glob("model-00002-of-*.safetensors")))
    save_file(load_file(shard), shard, {"format": "pt"})  # without its record
    for call in (astroattn.from_pretrained, lambda folder: astroattn.load(bert(), folder)):
        with pytest.raises(ValueError, match=r"records that differ, or some have none"):
            call(tmp_path)
    shard.unlink()
    for call in (astroattn.from_pretrained, lambda folder: astroattn.load(bert(), folder)):
        with pytest.raises(ValueError, match=r"a file that its index names is missing"):
            call(tmp_path)


def test_a_variant_and_what_is_no_option_any_more(tmp_path: Path) -> None:
    model = bert()
    patch(model, LEARNED)
    train(model)
    model.save_pretrained(tmp_path / "variant", variant="fp16")
    other = t.AutoModelForSequenceClassification.from_pretrained(tmp_path / "variant", variant="fp16")
    assert_same(loaded(other, tmp_path / "variant"), model)
    model.save_pretrained(tmp_path / "unsafe", safe_serialization=False)  # which transformers 5 passes over
    assert_same(astroattn.from_pretrained(tmp_path / "unsafe"), model)


def test_a_state_dict_without_what_was_learned_is_refused(tmp_path: Path) -> None:
    model = bert()
    patch(model, LEARNED)
    train(model)
    less = {name: weight for name, weight in model.state_dict().items() if "query_weight" not in name}
    with pytest.raises(ValueError, match=r"state_dict: lacks 'bert.*hidden.query_weight' \(2 of the 6 tensors"):
        model.save_pretrained(tmp_path / "new", state_dict=less)
    assert not (tmp_path / "new").exists()
    half = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=dict(half))
    again = astroattn.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(weight, half[name].float()) for name, weight in again.state_dict().items())
    patch(model, SHORT)
    model.save_pretrained(tmp_path, state_dict=less)  # it has learned nothing now
    assert_same(astroattn.from_pretrained(tmp_path), model)


def test_two_records_that_differ_are_refused(tmp_path: Path) -> None:
    model = bert()
    patch(model, LEARNED)
    model.save_pretrained(tmp_path)
    astroattn.save(model, tmp_path)
    assert_same(loaded(bert(), tmp_path), model)
    train(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"folder: .* has two records that differ, astroattn.json and"):
        astroattn.load(bert(), tmp_path)
    unpatch(model)
    model.save_pretrained(tmp_path)  # plain weights, and astrocytes beside them
    assert len(astroattn.load(bert(), tmp_path).patched) == 2
    with pytest.raises(ValueError, match=r"was not saved from a patched model .*; it has astroattn.json: open"):
        astroattn.from_pretrained(tmp_path)


def test_a_distributed_checkpoint_says_that_it_has_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(t.PreTrainedModel, "save_distributed_checkpoint"):
        pytest.skip("this transformers has no distributed checkpoints")
    monkeypatch.setattr(t.PreTrainedModel, "save_distributed_checkpoint", lambda *args, **kwargs: None)
    model = bert()
    patch(model, SHORT)
    with pytest.warns(UserWarning, match="distributed_checkpoint=True: it holds no record of the astrocytes"):
        model.save_pretrained(tmp_path, distributed_checkpoint=True)


class Hub:
    """A hub in memory: the only calls that pushing makes of it."""

    def __init__(self, **files: str) -> None:
        self.files = {name.replace("_", "."): text.encode() for name, text in files.items()}
        self.repo_id = "me/mine"

    def create_repo(self, *args: Any, **kwargs: Any) -> Hub:
        return self

    def create_commit(self, repo_id: str, operations: list[Any], **kwargs: Any) -> None:
        self.files |= {each.path_in_repo: Path(each.path_or_fileobj).read_bytes() for each in operations}

    def file_exists(self, repo_id: str, filename: str, **kwargs: Any) -> bool:
        return filename in self.files

    def upload_folder(self, repo_id: str, folder_path: str, **kwargs: Any) -> Hub:
        files = (path for path in Path(folder_path).rglob("*") if path.is_file())
        self.files |= {str(path.relative_to(folder_path)): path.read_bytes() for path in files}
        return self

    commit_url = ""

    def open(self, folder: Path) -> Path:
        folder.mkdir()
        for name, content in self.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hub]:
    """Makes a hub with some files, which transformers then pushes to."""

    def make(**files: str) -> Hub:
        from huggingface_hub import ModelCard
        from huggingface_hub.errors import EntryNotFoundError

        made = Hub(**files)
        monkeypatch.setattr("transformers.utils.hub.hf_api", lambda *args: made, raising=False)
        monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda *args: made, raising=False)
        monkeypatch.setattr("transformers.utils.hub.create_repo", made.create_repo, raising=False)
        monkeypatch.setattr("transformers.modeling_utils.create_repo", made.create_repo, raising=False)
        monkeypatch.setattr("transformers.utils.hub.create_commit", made.create_commit, raising=False)

        def load(repo_id: str, **kwargs: Any) -> ModelCard:
            if "README.md" not in made.files:
                raise EntryNotFoundError("no card")
            return ModelCard(made.files["README.md"].decode())

        monkeypatch.setattr(ModelCard, "load", load)
        return made

    return make


@pytest.mark.parametrize("through", ["push_to_hub", "save_pretrained"])
@pytest.mark.parametrize("text", [None, "---\nlicense: mit\n---\n\n# Mine\n\nWords of mine.\n"])
def test_pushing(through: str, text: str | None, hub: Any, tmp_path: Path) -> None:
    there = hub() if text is None else hub(README_md=text)
    model = bert()

    def push() -> None:
        if through == "push_to_hub":
            model.push_to_hub("me/mine")
        else:
            model.save_pretrained(str(tmp_path / "local"), push_to_hub=True, repo_id="me/mine")

    patch(model, LEARNED)
    push()
    words = there.files["README.md"].decode()
    assert words.count(BEGIN) == 1
    assert text is None or words.startswith(text)
    assert "astroattn" in json.loads(there.files["config.json"])
    assert_same(astroattn.from_pretrained(there.open(tmp_path / "pulled")), model)
    unpatch(model)
    push()
    assert BEGIN not in (words := there.files["README.md"].decode())
    assert text is None or words == text
    assert_no_record(there.open(tmp_path / "pulled again"))


def test_the_card_of_the_trainer(tmp_path: Path) -> None:
    model = bert()
    patch(model, SHORT)
    trainer = t.Trainer(model, t.TrainingArguments(str(tmp_path), report_to=[]))
    trainer.save_model()
    trainer.create_model_card()
    assert "generated_from_trainer" in card(tmp_path)
    assert card(tmp_path).count(BEGIN) == 1
    assert_same(astroattn.from_pretrained(tmp_path), model)
    unpatch(model)
    trainer.create_model_card()
    assert BEGIN not in card(tmp_path)


def test_libraries_imported_after_patching(tmp_path: Path) -> None:
    """In a process of its own: here they are imported already."""
    script = (
        "import sys, torch, transformers, astroattn\n"
        "model = transformers.BertForSequenceClassification(transformers.BertConfig(**eval(sys.argv[1])))\n"
        "astroattn.patch(model)\n"
        "assert 'peft' not in sys.modules and 'transformers.trainer' not in sys.modules\n"
        "import peft\n"
        "model = peft.get_peft_model(model, peft.LoraConfig(target_modules=['query']))\n"
        "model.save_pretrained(sys.argv[2])\n"
        "trainer = transformers.Trainer(model, transformers.TrainingArguments(sys.argv[3], report_to=[]))\n"
        "trainer.save_model(), trainer.create_model_card()\n"
    )
    pytest.importorskip("peft")
    folders = [tmp_path / "adapter", tmp_path / "trainer"]
    subprocess.run([sys.executable, "-c", script, str(TEXT), *map(str, folders)], check=True, timeout=200)
    for folder in folders:
        assert card(folder).count(BEGIN) == 1
        assert len(astroattn.load(bert(), folder).patched) == 2


# peft

ADAPTERS = {
    "LoRA": {"peft_type": "LORA", "target_modules": ["query", "value"], "init_lora_weights": False},
    "IA3": {"peft_type": "IA3", "target_modules": ["key", "value"], "feedforward_modules": []},
    "prompt tuning": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4},
}


def adapted(model: Any, kind: str = "LoRA", **changes: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.get_peft_config(ADAPTERS[kind] | {"task_type": "SEQ_CLS"} | changes)
    return peft.get_peft_model(model, config).eval()


def opened(base: Any, folder: Path) -> Any:
    return pytest.importorskip("peft").PeftModel.from_pretrained(base, folder).eval()


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("first", ["patch", "peft"])
@pytest.mark.parametrize("config", [SHORT, LEARNED])
def test_an_adapter_carries_the_astrocytes(kind: str, first: str, config: AstroConfig, tmp_path: Path) -> None:
    model = bert()
    if first == "patch":
        patch(model, config)
    model = adapted(model, kind)
    patch(model, config)
    train(model)
    model.save_pretrained(tmp_path)
    assert card(tmp_path).count(BEGIN) == 1
    assert "astroattn.load(" in card(tmp_path)
    plain = opened(bert(), tmp_path)
    assert not torch.allclose(run(plain), run(model), atol=1e-6)
    astroattn.load(plain, tmp_path)
    assert_same(plain, model)
    assert_same(opened(loaded(bert(), tmp_path), tmp_path), model)  # or into the base model, before
    unpatch(model)
    model.save_pretrained(tmp_path)
    assert_no_record(tmp_path)
    assert not (tmp_path / "astroattn.safetensors").exists()


@pytest.mark.parametrize("names", [["astrocyte"], ["hidden"]])
def test_modules_to_save(names: list[str], tmp_path: Path) -> None:
    """peft may train a copy of the hidden layers, which is then what the astrocytes are."""
    model = bert()
    patch(model, LEARNED)
    model = adapted(model, modules_to_save=names)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad and ".astrocyte." in name]
    assert len(trained) == 6
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in trained:
                weight.normal_()
    model.save_pretrained(tmp_path)
    assert {name for name in load_file(tmp_path / "astroattn.safetensors") if "modules_to_save" in name} == set()
    for other in (opened(bert(), tmp_path), opened(loaded(bert(), tmp_path), tmp_path)):
        astroattn.load(other, tmp_path)
        assert_same(other, model)
    astroattn.save(model, tmp_path / "ours")
    assert_same(loaded(opened(bert(), tmp_path), tmp_path / "ours"), model)
    before = run(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(run(merged), before, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert_same(astroattn.from_pretrained(tmp_path / "merged"), merged)


def test_peft_freezes_what_was_patched_before_it() -> None:
    model = bert()
    patch(model, LEARNED)
    assert not any(core.hidden.key_weight.requires_grad for core in find_astrocytes(adapted(model)).values())
    model = adapted(bert())
    patch(model, LEARNED)
    assert all(core.hidden.key_weight.requires_grad for core in find_astrocytes(model).values())


def test_several_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = adapted(bert())
    patch(model, LEARNED)
    model.add_adapter("other", peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "both")
    for folder in (tmp_path / "both", tmp_path / "both" / "other"):
        assert_same_learned(loaded(bert(), folder), model)
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert not (tmp_path / "one" / "astroattn.json").exists()
    assert_same_learned(loaded(bert(), tmp_path / "one" / "other"), model)
    patched = bert()
    patch(patched, SHORT)
    patched = opened(patched, tmp_path / "both")
    assert len(find_astrocytes(patched)) == 2  # an adapter changes nothing of them


def assert_same_learned(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = find_astrocytes(one).values(), find_astrocytes(other).values()
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a.hidden.key_weight, b.hidden.key_weight)


def test_pushing_an_adapter(hub: Any, tmp_path: Path) -> None:
    there = hub(README_md="# Mine\n")
    model = adapted(bert())
    patch(model, LEARNED)
    model.push_to_hub("me/mine")
    assert re.match(rf".*# Mine\n\n{BEGIN}", there.files["README.md"].decode(), re.DOTALL)
    assert_same(loaded(opened(bert(), there.open(tmp_path / "pulled")), tmp_path / "pulled"), model)


def test_an_adapter_of_a_sharded_model_says_that_it_has_no_record(tmp_path: Path) -> None:
    model = adapted(bert())
    patch(model, LEARNED)
    model.save_pretrained(tmp_path)
    state_dict = model.state_dict()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model)
        with pytest.warns(UserWarning, match=r"learned weights that are divided among processes .* are not saved"):
            model.save_pretrained(tmp_path, state_dict=state_dict)
    finally:
        distributed.destroy_process_group()
    assert_no_record(tmp_path)


def test_what_was_saved_beside_an_adapter_by_hand_stays(tmp_path: Path) -> None:
    model = adapted(bert())
    patch(model, SHORT)
    astroattn.save(model, tmp_path)
    unpatch(model)
    model.save_pretrained(tmp_path)
    assert len(astroattn.load(bert(), tmp_path).patched) == 2


# timm

TIMM = {
    "ViT": lambda: timm.create_model("vit_tiny_patch16_224", num_classes=3, **TIMM_VIT),
    "DeiT": lambda: timm.create_model("deit3_small_patch16_224", num_classes=3, **TIMM_VIT),
    "EVA-02": lambda: timm.create_model("eva02_tiny_patch14_224", num_classes=3, **TIMM_VIT),
}


def images(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(image())


@pytest.fixture
def opens_folders(tmp_path: Path) -> None:
    """Skip the test where timm cannot open a folder that it has saved."""
    try:
        model = TIMM["ViT"]()
        save_for_hf(model, str(tmp_path / "plain"), safe_serialization=True)
        timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True)
    except Exception as error:
        pytest.skip(f"this timm: {type(error).__name__}: {error}")


@pytest.mark.usefixtures("opens_folders")
@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("safe", [True, False, "both"])
@pytest.mark.parametrize("config", [SHORT, LEARNED])
def test_timm(name: str, safe: bool | str, config: AstroConfig, tmp_path: Path) -> None:
    model = TIMM[name]()
    before = images(model)
    patch(model, config)
    train(model)
    (tmp_path / "README.md").write_text("# Mine\n", "utf-8")
    save_for_hf(model, str(tmp_path), safe_serialization=safe)
    assert "astroattn.load(model, folder)" in settings(tmp_path)["astroattn"]
    assert card(tmp_path).startswith("# Mine\n\n" + BEGIN)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    torch.testing.assert_close(images(again), before)  # as it was, without us
    astroattn.load(again, tmp_path)
    torch.testing.assert_close(images(again), images(model), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"source: cannot load"):
        astroattn.from_pretrained(tmp_path)
    unpatch(model)
    save_for_hf(model, str(tmp_path), safe_serialization=safe)
    assert_no_record(tmp_path)
    assert card(tmp_path) == "# Mine\n"


@pytest.mark.parametrize("text", [None, "# Mine\n"])
def test_pushing_by_timm(text: str | None, hub: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there = hub() if text is None else hub(README_md=text)
    if not hasattr(timm.models._hub, "HfApi"):
        pytest.skip("this timm pushes in another way")
    monkeypatch.setattr("timm.models._hub.HfApi", lambda **kwargs: there)
    model = TIMM["ViT"]()
    patch(model, LEARNED)
    train(model)
    timm.models.push_to_hf_hub(model, "me/mine")
    assert text is None or there.files["README.md"].decode() == text  # not ours to write over
    pulled = there.open(tmp_path / "pulled")
    assert "astroattn" in settings(pulled)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda repo_id, filename, **kwargs: str(pulled / filename))
    again = TIMM["ViT"]()
    again.load_state_dict(timm.models.load_state_dict_from_hf("me/mine"))
    astroattn.load(again, pulled)
    torch.testing.assert_close(images(again), images(model), rtol=1e-4, atol=1e-5)


# sentence-transformers


@pytest.fixture
def sentences(tmp_path: Path) -> Any:
    """A SentenceTransformer of random weights, and its folder."""
    library = pytest.importorskip("sentence_transformers")
    folder = tmp_path / "base"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    (folder / "vocab.txt").write_text("\n".join(words), "utf-8")
    t.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    bert(t.BertModel).save_pretrained(folder)
    return library.SentenceTransformer(str(folder), device="cpu"), folder


def encode(model: Any) -> Tensor:
    return model.encode(["a b c d e f g h i j" * 3], convert_to_tensor=True)


@pytest.mark.parametrize("config", [SHORT, LEARNED])
def test_sentence_transformers(sentences: Any, config: AstroConfig, tmp_path: Path) -> None:
    model, folder = sentences
    before = encode(model)
    patch(model, config)
    train(model)
    after = encode(model)
    assert not torch.allclose(after, before, atol=1e-6)
    model.save(str(tmp_path / "saved"))
    assert card(tmp_path / "saved").count(BEGIN) == 1
    assert "Pooling" in card(tmp_path / "saved")  # their card
    assert 'model = SentenceTransformer("FOLDER")' in card(tmp_path / "saved")
    assert "astroattn.load(" in settings(tmp_path / "saved")["astroattn"]
    again = type(model)(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(encode(again), before)
    astroattn.load(again, tmp_path / "saved")
    torch.testing.assert_close(encode(again), after, rtol=1e-4, atol=1e-5)
    alone = bert(t.BertForSequenceClassification)
    assert len(astroattn.load(alone, tmp_path / "saved").patched) == 2
    assert type(astroattn.from_pretrained(tmp_path / "saved")) is t.BertModel
    unpatch(model)
    torch.testing.assert_close(encode(model), before, rtol=0, atol=0)
    model.save(str(tmp_path / "saved"))
    assert_no_record(tmp_path / "saved")
    alone = bert(t.BertModel)
    patch(alone, config)
    alone.save_pretrained(folder)
    assert len(astroattn.load(model, folder).patched) == 2


def test_sentence_transformers_without_a_card_of_theirs(sentences: Any, hub: Any, monkeypatch: Any) -> None:
    """A card that we made would be pushed over that of the repository."""
    model, folder = sentences
    patch(model, SHORT)
    model.save(str(folder / "new"), create_model_card=False)
    assert not card(folder / "new")
    assert "astroattn" in settings(folder / "new")
    there = hub(README_md="# Mine\n")
    module = type(model).__mro__[1].__module__
    monkeypatch.setattr(f"{module}.HfApi", lambda **kwargs: there)
    monkeypatch.setattr(f"{module}.load_file_path", lambda *args, **kwargs: "README.md")
    model.push_to_hub("me/mine")
    assert there.files["README.md"] == b"# Mine\n"
    assert "astroattn" in json.loads(there.files["config.json"])


def test_load_model_says_that_a_folder_was_patched(sentences: Any) -> None:
    from astroattn.models import load_model

    _, folder = sentences
    model = bert(t.BertModel)
    patch(model, SHORT)
    model.save_pretrained(folder)
    with pytest.warns(UserWarning, match=r"was saved from a patched model and is opened with softmax attention"):
        opened = load_model(str(folder)).model
    assert not hasattr(opened.config, "astroattn")
    assert not find_astrocytes(opened)


def test_a_cross_encoder(sentences: Any, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    _, folder = sentences
    model = CrossEncoder(str(folder), num_labels=1, device="cpu")
    patch(model, LEARNED)
    train(model)
    model.save_pretrained(str(tmp_path / "saved"))
    assert card(tmp_path / "saved").count(BEGIN) == 1
    assert 'model = CrossEncoder("FOLDER")' in card(tmp_path / "saved")
    again = CrossEncoder(str(tmp_path / "saved"), device="cpu")
    astroattn.load(again, tmp_path / "saved")
    pair = [("a b c" * 9, "d e f" * 9)]
    torch.testing.assert_close(torch.tensor(again.predict(pair)), torch.tensor(model.predict(pair)))
