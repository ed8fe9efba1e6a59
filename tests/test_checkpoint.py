"""Saving and loading the astrocytes of a model: all of it comes back, or nothing changes."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AlbertConfig, AlbertModel, BertConfig, BertForSequenceClassification, BertModel

import astroattn
from astroattn import AstroConfig
from astroattn.fidelity.calls import find_astrocytes

SIZES = {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 3, "intermediate_size": 96}
LEARNED = AstroConfig(hidden="learned", num_hidden=8, near=0)
IDS = torch.arange(90)[None] + 7


def make_bert(seed: int = 0) -> BertModel:
    torch.manual_seed(seed)
    return BertModel(BertConfig(**SIZES)).eval()


def make_vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5).eval()


def train(model: nn.Module) -> None:
    """Something else than the weights that a seed would draw."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for astrocyte in find_astrocytes(model).values():
            for weight in astrocyte.parameters():
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.3)


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    if isinstance(model, (BertModel, AlbertModel, BertForSequenceClassification)):
        output = model(IDS)
        return output.logits if "logits" in output else output.last_hidden_state
    return model(torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64))


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    """The same weights; outputs up to rounding, which depends on how weights read from a file lie in memory."""
    mine, theirs = model.state_dict(), expected.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    torch.testing.assert_close(run(model), run(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [make_bert, make_vit])
@pytest.mark.parametrize("config", [AstroConfig(exact_keys=4), LEARNED, AstroConfig(hidden="random", near=0, seed=4)])
def test_a_saved_model_comes_back(make: Callable[..., nn.Module], config: AstroConfig, tmp_path: Path) -> None:
    model = make()
    astroattn.patch(model, config)
    train(model)
    astroattn.save(model, tmp_path / "new" / "folder")
    files = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert files == {"astroattn.json"} | ({"astroattn.safetensors"} if config is LEARNED else set())
    other = make()
    assert not torch.equal(run(other), run(model))
    report = astroattn.load(other, tmp_path / "new" / "folder")
    assert len(report.patched) == len(find_astrocytes(model))
    assert torch.equal(run(other), run(model))


def test_each_layer_keeps_its_own_config_and_others_stay_exact(tmp_path: Path) -> None:
    model = make_bert()
    astroattn.patch(model, LEARNED, where=0)
    astroattn.patch(model, AstroConfig(exact_keys=4), where=2)
    train(model)
    astroattn.save(model, tmp_path)
    other = make_bert()
    astroattn.patch(other)  # what was there is replaced
    report = astroattn.load(other, tmp_path)
    assert [row.index for row in report.patched] == [0, 2]
    assert [each.config for each in find_astrocytes(other).values()] == [LEARNED, AstroConfig(exact_keys=4)]
    assert torch.equal(run(other), run(model))


def test_every_head_keeps_its_own_config(tmp_path: Path) -> None:
    model = make_bert()
    heads = (AstroConfig(exact_keys=4), AstroConfig(hidden="exact"), AstroConfig(hidden="none", near=8))
    plan = astroattn.Plan(model="BertModel", modules={"encoder.layer.1.attention.self": heads})
    astroattn.patch(model, plan)
    astroattn.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    other = make_bert()
    astroattn.load(other, tmp_path / "ours")
    for again in (other, astroattn.from_pretrained(tmp_path / "theirs")):
        assert [each.configs for each in find_astrocytes(again).values()] == [heads]
        assert_same(again, model)


def test_the_record_says_what_it_belongs_to(tmp_path: Path) -> None:
    model = make_vit()
    astroattn.patch(model, LEARNED)
    astroattn.save(model, tmp_path)
    record = json.loads((tmp_path / "astroattn.json").read_text("utf-8"))
    assert record["model"] == "VisionTransformer"
    assert record["base_model"].startswith("vit_tiny_patch16_224")
    assert record["astroattn"] == astroattn.__version__
    tensors = load_file(tmp_path / "astroattn.safetensors")
    assert set(tensors) == {name for name in model.state_dict() if ".astrocyte." in name}  # only ours


@pytest.mark.parametrize("cls", [BertModel, BertForSequenceClassification, AlbertModel])
@pytest.mark.parametrize("config", [AstroConfig(exact_keys=4), LEARNED])
def test_save_pretrained_and_from_pretrained(cls: type, config: AstroConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = AlbertConfig(**SIZES, embedding_size=16) if cls is AlbertModel else BertConfig(**SIZES)
    model = cls(settings).eval()
    astroattn.patch(model, config)
    train(model)
    model.save_pretrained(tmp_path)
    other = astroattn.from_pretrained(tmp_path)
    assert type(other) is cls
    assert not other.training
    assert_same(other, model)
    other.save_pretrained(tmp_path / "again")
    assert_same(astroattn.from_pretrained(tmp_path / "again"), model)
    astroattn.unpatch(other)
    assert "astroattn" not in other.config.to_dict()
    assert_same(cls.from_pretrained(tmp_path).eval(), other)


def test_what_is_restored_is_not_called_unexpected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_bert()
    astroattn.patch(model, LEARNED)
    model.extra = torch.nn.Linear(2, 2)
    model.save_pretrained(tmp_path)
    transformers.logging.enable_propagation()
    try:
        astroattn.from_pretrained(tmp_path)
        assert "extra.weight" in caplog.text  # which a BertModel does not have
        assert ".astrocyte." not in caplog.text
        caplog.clear()
        BertModel.from_pretrained(tmp_path)
        assert ".astrocyte." in caplog.text
    finally:
        transformers.logging.disable_propagation()


def test_shards_and_dtypes(tmp_path: Path) -> None:
    model = make_bert()
    astroattn.patch(model, LEARNED)
    train(model)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(astroattn.from_pretrained(tmp_path), model)
    half = astroattn.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}


def test_a_model_that_was_not_patched(tmp_path: Path) -> None:
    model = make_bert()
    with pytest.raises(ValueError, match="model: BertModel is not patched"):
        astroattn.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(TypeError, match=r"model: expected a .*, got dict"):
        astroattn.save({}, tmp_path)  # type: ignore[arg-type]
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was not saved from a patched model"):
        astroattn.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="source: cannot load"):
        astroattn.from_pretrained(tmp_path / "nothing")


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (DistributedDataParallel, "model: DistributedDataParallel wraps it; .*unwrap_model"),
        (lambda model: nn.Sequential(DistributedDataParallel(model)), "model: DistributedDataParallel wraps it"),
        (torch.compile, "model: torch.compile wraps it; .*_orig_mod"),
        (fully_shard, r"model: its weights are divided among processes .*accelerator.get_state_dict"),
    ],
    ids=["DDP", "DDP within", "compiled", "FSDP"],
)
@pytest.mark.usefixtures("one_process")
def test_a_wrapped_or_sharded_model_is_refused(
    wrap: Callable[[nn.Module], nn.Module], message: str, tmp_path: Path
) -> None:
    model = make_bert()
    astroattn.patch(model, LEARNED)
    train(model)
    astroattn.save(model, tmp_path / "whole")
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    wrapped = wrap(model)
    with pytest.raises(ValueError, match=message):
        astroattn.save(wrapped, tmp_path / "wrapped")
    assert not (tmp_path / "wrapped").exists()
    with pytest.raises(ValueError, match=message):
        astroattn.load(wrapped, tmp_path / "whole")
    assert len(find_astrocytes(wrapped)) == 3
    gathered = get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True))
    other = make_bert(seed=1)  # what the message says to do
    astroattn.patch(other, LEARNED)
    other.load_state_dict({name.removeprefix("0."): weight for name, weight in gathered.items()})
    astroattn.save(other, tmp_path / "gathered")
    again = make_bert()
    astroattn.load(again, tmp_path / "gathered")
    assert all(torch.equal(weights[name], weight) for name, weight in again.state_dict().items())


@pytest.mark.usefixtures("one_process")
def test_save_pretrained_of_a_sharded_model(tmp_path: Path) -> None:
    model = make_bert()
    astroattn.patch(model, LEARNED)
    train(model)
    sharded = fully_shard(copy.deepcopy(model))
    gathered = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    sharded.save_pretrained(tmp_path, state_dict=gathered)
    other = astroattn.from_pretrained(tmp_path)
    assert type(other) is BertModel
    assert_same(other, model)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = make_bert()
    astroattn.patch(model, LEARNED)
    train(model)
    astroattn.save(model, tmp_path)
    return tmp_path


def edit(folder: Path, **changes: object) -> None:
    path = folder / "astroattn.json"
    record = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(record | changes), "utf-8")


def damage(folder: Path, what: str) -> None:
    tensors = folder / "astroattn.safetensors"
    content = tensors.read_bytes()
    record = json.loads((folder / "astroattn.json").read_text("utf-8"))
    modules = record["modules"]
    if what == "no folder":
        (folder / "astroattn.json").unlink()
    elif what == "no tensors":
        tensors.unlink()
    elif what == "truncated":
        tensors.write_bytes(content[:-10])
    elif what == "one bit":
        tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif what == "not JSON":
        (folder / "astroattn.json").write_text("{", "utf-8")
    elif what == "another JSON":
        (folder / "astroattn.json").write_text("[1]", "utf-8")
    elif what == "foreign JSON":
        (folder / "astroattn.json").write_text('{"model_type": "bert"}', "utf-8")
    elif what == "newer format":
        edit(folder, format=99)
    elif what == "no exact modules":
        path = folder / "astroattn.json"
        path.write_text(json.dumps({name: value for name, value in record.items() if name != "exact"}), "utf-8")
    elif what == "unknown setting":
        edit(folder, configs=[record["configs"][0] | {"temperature": 2}])
    elif what == "bad setting":
        edit(folder, configs=[record["configs"][0] | {"num_hidden": 0}])
    elif what == "no such config":
        edit(folder, modules=[modules[0] | {"heads": [0, 0, 1]}, *modules[1:]])
    elif what == "heads that cannot differ":
        other = record["configs"][0] | {"num_hidden": 16}
        heads = [0, 0, 1]
        edit(folder, configs=[record["configs"][0], other], modules=[modules[0] | {"heads": heads}, *modules[1:]])
    elif what == "another head dimension":
        edit(folder, modules=[modules[0] | {"head_dim": 8}, *modules[1:]])
    elif what == "another module":
        edit(folder, modules=[modules[0] | {"name": "encoder.layer.17.attention.self"}, *modules[1:]])
    elif what == "another module class":
        edit(folder, modules=[modules[0] | {"class": "RobertaSelfAttention"}, *modules[1:]])
    elif what == "other heads":
        edit(folder, modules=[modules[0] | {"heads": [0] * 12}, *modules[1:]])
    elif what == "a size":
        edit(folder, configs=[record["configs"][0] | {"num_hidden": 16}])
    elif what == "a tensor less":
        kept = load_file(tensors)
        kept.popitem()
        save_file(kept, tensors)
        edit(folder, sha256=astroattn.checkpoint.hashlib.sha256(tensors.read_bytes()).hexdigest())


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no folder", "has no record of astrocytes, neither astroattn.json nor in the header"),
        ("no tensors", "cannot read .*astroattn.safetensors"),
        ("truncated", "is not the file that was saved"),
        ("one bit", "is not the file that was saved"),
        ("not JSON", "is not JSON"),
        ("another JSON", "is not a record of astrocytes"),
        ("foreign JSON", "is not a record of astrocytes .format missing"),
        ("newer format", "format 99; this version of astroattn reads 3"),
        ("no exact modules", "is not a record of astrocytes .exact missing"),
        ("unknown setting", r"configs\[0\]: is not a config: .*temperature"),
        ("bad setting", r"configs\[0\]: is not a config: num_hidden: 0"),
        ("no such config", r"the heads of encoder.layer.0.attention.self: 1; must be numbers of configs, 0 to 0"),
        ("heads that cannot differ", "heads that differ must be of hebbian, none, exact; hidden='learned' has weights"),
        ("another head dimension", "was a BertSelfAttention of head dimension 8; here it is a BertSelfAttention of"),
        ("another module", "the model has no module 'encoder.layer.17.attention.self'"),
        (
            "another module class",
            "encoder.layer.0.attention.self was a RobertaSelfAttention; here it is a BertSelfAttention",
        ),
        ("other heads", "'encoder.layer.0.attention.self' has 3 heads; the plan has configs for 12"),
        ("a size", r"is \[3, 8, 16\] .*; expected \[3, 16, 16\]"),
        ("a tensor less", "the tensor .* is missing"),
    ],
)
@pytest.mark.parametrize("patched", [False, True])
def test_what_is_damaged_or_foreign_changes_nothing(what: str, message: str, patched: bool, saved: Path) -> None:
    damage(saved, what)
    model = make_bert(seed=1)
    if patched:
        astroattn.patch(model, AstroConfig(exact_keys=4))
    before, config = run(model), model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        astroattn.load(model, saved)
    assert torch.equal(run(model), before)
    assert model.config.to_dict() == config
    assert len(find_astrocytes(model)) == (3 if patched else 0)


class Bomb:
    """Unpickling it would show."""

    def __reduce__(self) -> tuple[object, ...]:
        return (open, ("exploded", "w"))


def test_a_pickle_is_refused_and_never_run(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    path = saved / "astroattn.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    edit(saved, sha256=astroattn.checkpoint.hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match="is not a safetensors file"):
        astroattn.load(make_bert(), saved)
    torch.save({"x": Bomb()}, path)
    edit(saved, sha256=astroattn.checkpoint.hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match="is not a safetensors file"):
        astroattn.load(make_bert(), saved)

    model = make_bert()
    astroattn.patch(model)
    model.save_pretrained(saved)
    (saved / "model.safetensors").unlink()
    torch.save({"x": Bomb()}, saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match="source: cannot load"):
        astroattn.from_pretrained(saved)
    assert not (saved / "exploded").exists()
