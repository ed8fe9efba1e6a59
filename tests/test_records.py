"""What `save_pretrained` writes of the astrocytes is what the model is then, whoever patched it."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from patching_models import TEXT, TIMM_VIT, image, need_transformers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    WhisperConfig,
    WhisperModel,
)

import astroattn
from astroattn import AstroConfig, patch, unpatch
from astroattn.fidelity.calls import find_astrocytes

SHORT = AstroConfig(near=2, exact_keys=0, tile=2, num_hidden=4)
LEARNED = AstroConfig(hidden="learned", num_hidden=8, near=0)


def bert(cls: Any = BertForSequenceClassification) -> Any:
    torch.manual_seed(0)
    return cls(BertConfig(**TEXT | {"num_hidden_layers": 3})).eval()


def vit() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(**shape, image_size=32, patch_size=8)).eval()


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        vision = model.main_input_name == "pixel_values"
        return model(image() if vision else torch.arange(40)[None] + 7)[0]


def saved_and_opened(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return astroattn.from_pretrained(folder)


def assert_comes_back(model: Any, folder: Path, count: int) -> None:
    """The class, the modules and their configs; and so the outputs."""
    again = saved_and_opened(model, folder)
    assert type(again) is type(model)
    mine, theirs = find_astrocytes(model), find_astrocytes(again)
    assert len(mine) == count
    assert {name: each.configs for name, each in theirs.items()} == {name: each.configs for name, each in mine.items()}
    torch.testing.assert_close(run(again), run(model), rtol=1e-4, atol=1e-5)


def assert_unpatched(model: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match="was not saved from a patched model"):
        saved_and_opened(model, folder)


class Holder(nn.Module):
    """As SentenceTransformer and others hold a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.auto_model = model


WRAPPERS = {
    "Sequential": nn.Sequential,
    "ModuleDict": lambda model: nn.ModuleDict({"model": model}),
    "DataParallel": nn.DataParallel,
    "holder": Holder,
    "twice": lambda model: Holder(nn.Sequential(model)),
}


@pytest.mark.parametrize(
    ("make", "part", "config"),
    [(bert, "bert", SHORT), (bert, "bert.encoder", LEARNED), (vit, "vit", SHORT), (vit, "", SHORT)],
)
def test_a_patched_part_is_saved_with_the_whole(
    make: Callable[[], Any], part: str, config: Any, tmp_path: Path
) -> None:
    model = make()
    patch(model.get_submodule(part), config)
    assert_comes_back(model, tmp_path, 3 if make is bert else 2)
    assert_comes_back(getattr(model, model.base_model_prefix), tmp_path, 3 if make is bert else 2)


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("make", [bert, vit])
def test_wrappers(make: Callable[[], Any], wrapper: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = make()
    patch(wrapper(model), SHORT)
    assert_comes_back(model, tmp_path, 3 if make is bert else 2)
    unpatch(wrapper(model))
    assert_unpatched(model, tmp_path)  # in the same folder


def test_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS"))
    patch(model, SHORT)
    assert_comes_back(model.merge_and_unload(), tmp_path, 3)


def test_one_layer_and_another_config(tmp_path: Path) -> None:
    model = bert()
    patch(model, SHORT, where=[0, 2])
    assert_comes_back(model, tmp_path / "two", 2)
    patch(model.bert, LEARNED, where=[1, 2])
    assert_comes_back(model, tmp_path / "others", 3)


@pytest.mark.parametrize("cut", [lambda m: m[:2], lambda m: m[1:], lambda m: nn.ModuleList([m[2], m[0]])])
def test_layers_taken_out(cut: Callable[[nn.ModuleList], nn.ModuleList], tmp_path: Path) -> None:
    model = bert()
    patch(model, SHORT)
    model.bert.encoder.layer = cut(model.bert.encoder.layer)
    model.config.num_hidden_layers = 2
    assert_comes_back(model, tmp_path, 2)


def test_nothing_else_carries_a_record(tmp_path: Path) -> None:
    teacher = bert()
    patch(teacher, SHORT)
    student = BertForSequenceClassification(teacher.config).eval()  # the same object
    assert_unpatched(student, tmp_path / "student")
    copied = copy.deepcopy(teacher)
    unpatch(copied)
    assert_unpatched(copied, tmp_path / "copy")
    assert_comes_back(copy.deepcopy(teacher), tmp_path / "twin", 3)
    teacher.config.save_pretrained(tmp_path / "config")
    assert "astrocyte" not in (tmp_path / "config" / "config.json").read_text("utf-8")
    assert "astroattn" not in teacher.config.to_dict()


def test_a_head_on_a_patched_backbone(tmp_path: Path) -> None:
    backbone = bert(BertModel)
    patch(backbone, SHORT)
    backbone.save_pretrained(tmp_path / "backbone")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "backbone").eval()
    assert_unpatched(model, tmp_path / "head")
    model.bert = astroattn.from_pretrained(tmp_path / "backbone")
    assert_comes_back(model, tmp_path / "patched head", 3)


def test_saved_again_by_plain_transformers(tmp_path: Path) -> None:
    """Where nobody patched, in a process that does not know of astrocytes."""
    model = bert()
    patch(model, SHORT)
    model.save_pretrained(tmp_path / "ours")
    script = (
        "import sys; from transformers import AutoModelForSequenceClassification as Auto\n"
        "model = Auto.from_pretrained(sys.argv[1])\n"
        "for folder in sys.argv[2:]: model.save_pretrained(folder)\n"
    )
    folders = [str(tmp_path / name) for name in ("ours", "theirs", "ours")]
    subprocess.run([sys.executable, "-c", script, *folders], check=True, timeout=200)
    for folder in folders[:2]:
        with pytest.raises(ValueError, match="was not saved from a patched model"):
            astroattn.from_pretrained(folder)


def test_a_failed_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    patch(model, SHORT)
    monkeypatch.setattr(BertForSequenceClassification, "state_dict", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert_unpatched(bert(), tmp_path)


def test_a_tower(tmp_path: Path) -> None:
    need_transformers("5.2")
    from patching_models import clip

    model = clip().eval()
    patch(model.vision_model, SHORT)
    model.save_pretrained(tmp_path)
    again = astroattn.from_pretrained(tmp_path)
    assert type(again) is CLIPModel
    assert list(find_astrocytes(again)) == list(find_astrocytes(model))
    assert len(find_astrocytes(model)) == 2


@pytest.mark.parametrize("pickled", [False, True])
def test_timm_below_transformers(pickled: bool, tmp_path: Path) -> None:
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=TIMM_VIT)
    model = TimmWrapperModel(config).eval()
    try:
        with torch.device("meta"):
            TimmWrapperModel(config)
    except RuntimeError as error:
        pytest.skip(f"this transformers cannot open a model of this timm: {error}")
    patch(model.timm_model, SHORT)
    if not pickled:
        assert_comes_back(model, tmp_path, 2)
        return
    torch.save(model, tmp_path / "model.pt")  # and opened where nothing was patched
    script = (
        "import sys, torch, astroattn\n"
        "torch.load(sys.argv[1] + '/model.pt', weights_only=False).save_pretrained(sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=200)
    again = astroattn.from_pretrained(tmp_path)
    assert isinstance(again, PreTrainedModel)
    assert len(find_astrocytes(again)) == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: ViTForImageClassification(ViTConfig(**TEXT, image_size=32, patch_size=8)),
        lambda: ViTModel(ViTConfig(**TEXT, image_size=32, patch_size=8)),
        lambda: CLIPVisionModel(CLIPVisionConfig(**TEXT, image_size=32, patch_size=8)),
        lambda: Dinov2Model(Dinov2Config(**TEXT, image_size=32, patch_size=8)),
        lambda: BertForSequenceClassification(BertConfig(**TEXT)),
        lambda: ModernBertModel(ModernBertConfig(**TEXT, pad_token_id=0, global_attn_every_n_layers=1)),
        lambda: WhisperModel(
            WhisperConfig(d_model=32, num_mel_bins=8, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4,
                          decoder_attention_heads=4, vocab_size=99, pad_token_id=0, max_source_positions=60)
        ),
    ],
    ids=["ViT with a head", "ViT", "CLIP vision", "DINOv2", "BERT", "ModernBERT", "Whisper"],
)  # fmt: skip
def test_what_was_learned_comes_back(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Also where transformers renames the tensors of a family when it saves them."""
    model = make().eval()
    if isinstance(model, ModernBertModel):
        need_transformers("5.2")
    where = "*encoder*self_attn*" if isinstance(model, WhisperModel) else None
    patch(model, LEARNED, where=where)
    with torch.no_grad():
        for core in find_astrocytes(model).values():
            core.hidden.key_weight.normal_()
            core.hidden.query_weight.normal_()
    model.save_pretrained(tmp_path)
    again = astroattn.from_pretrained(tmp_path)
    assert find_astrocytes(again).keys() == find_astrocytes(model).keys() != set()
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    other = make().eval()
    astroattn.load(other, tmp_path)
    for name, tensor in model.state_dict().items():
        assert ".astrocyte." not in name or torch.equal(other.state_dict()[name], tensor), name
