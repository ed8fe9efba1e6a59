"""`load` finds the encoder that was patched in any model that holds it, says what differs, and harms nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as t
from patching_models import IMAGE, TEXT, TIMM_VIT, VISION, clip, need_transformers, whisper
from torch import Tensor, nn

import astroattn
from astroattn import AstroConfig, patch
from astroattn.fidelity.calls import find_astrocytes

LEARNED = AstroConfig(hidden="learned", num_hidden=8, near=0)
OTHER = AstroConfig(near=2, exact_keys=0, tile=2, num_hidden=4)


class Holder(nn.Module):
    """As many libraries hold a model, with something of their own beside it."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.head = nn.Linear(2, 2)


def bert(cls: Any = t.BertModel, **changes: Any) -> Any:
    return cls(t.BertConfig(**TEXT | changes)).eval()


def vit(**changes: Any) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **TIMM_VIT | {"num_classes": 3} | changes).eval()


def layer() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()


def wrapped_vit() -> Any:
    return t.TimmWrapperModel(t.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=TIMM_VIT))


def train(model: nn.Module) -> None:
    with torch.no_grad():
        for core in find_astrocytes(model).values():
            core.hidden.key_weight.normal_()
            core.hidden.query_weight.normal_()


def learned(model: nn.Module) -> list[Tensor]:
    return [weight for core in find_astrocytes(model).values() for weight in core.parameters()]


def families() -> dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]]:
    """The encoder alone, and a model that holds it."""
    text, image = t.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=99), VISION | IMAGE
    return {
        "BERT": (bert, lambda: bert(t.BertForSequenceClassification)),
        "BERT beside a decoder": (bert, lambda: Holder(encoder=bert(), decoder=decoder())),
        "RoBERTa": (
            lambda: t.RobertaModel(t.RobertaConfig(**TEXT)),
            lambda: t.RobertaForTokenClassification(t.RobertaConfig(**TEXT)),
        ),
        "DistilBERT": (lambda: t.DistilBertModel(text), lambda: t.DistilBertForQuestionAnswering(text)),
        "ALBERT": (
            lambda: t.AlbertModel(t.AlbertConfig(**TEXT, embedding_size=16)),
            lambda: t.AlbertForMaskedLM(t.AlbertConfig(**TEXT, embedding_size=16)),
        ),
        "ViT": (lambda: t.ViTModel(t.ViTConfig(**image)), lambda: t.ViTForImageClassification(t.ViTConfig(**image))),
        "DINOv2": (
            lambda: t.Dinov2Model(t.Dinov2Config(**image)),
            lambda: t.Dinov2ForImageClassification(t.Dinov2Config(**image)),
        ),
        "Whisper": (lambda: whisper().encoder, whisper),
        "timm": (vit, lambda: nn.Sequential(vit(), nn.Linear(3, 2))),
        "timm below transformers": (lambda: vit(num_classes=0), wrapped_vit),
        "torch": (layer, lambda: Holder(one=layer())),
    }


def decoder() -> Any:
    return t.GPT2LMHeadModel(
        t.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=99, bos_token_id=1, eos_token_id=2)
    )


@pytest.mark.parametrize("family", list(families()))
def test_an_encoder_goes_into_a_model_that_holds_it_and_back(family: str, tmp_path: Path) -> None:
    if family in ("ViT", "DINOv2"):
        need_transformers("5.2")
    alone, held = families()[family]
    one, other, third = alone().eval(), held().eval(), alone().eval()
    report = patch(one, LEARNED)
    train(one)
    astroattn.save(one, tmp_path / "alone")
    assert len(astroattn.load(other, tmp_path / "alone").patched) == len(report.patched) > 0
    assert all(torch.equal(a, b) for a, b in zip(learned(other), learned(one), strict=True))
    train(other)
    astroattn.save(other, tmp_path / "held")
    assert len(astroattn.load(third, tmp_path / "held").patched) == len(report.patched)
    assert all(torch.equal(a, b) for a, b in zip(learned(third), learned(other), strict=True))


def test_between_two_holders_through_save_pretrained(tmp_path: Path) -> None:
    model = bert(t.BertForSequenceClassification)
    patch(model.bert, LEARNED)
    train(model)
    model.save_pretrained(tmp_path)
    for other in (bert(t.BertForMaskedLM), bert(), Holder(a=bert()), nn.Sequential(nn.Identity(), bert())):
        astroattn.load(other, str(tmp_path))
        assert all(torch.equal(a, b) for a, b in zip(learned(other), learned(model), strict=True))


def test_one_tower_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    need_transformers("5.2")
    tower = t.CLIPVisionModel(t.CLIPVisionConfig(**VISION, **IMAGE))
    patch(tower, LEARNED)
    train(tower)
    astroattn.save(tower, tmp_path)
    model = clip().eval()
    patch(model.text_model, AstroConfig(hidden="random", near=0))
    before = find_astrocytes(model.text_model)
    astroattn.load(model.vision_model, tmp_path)
    assert find_astrocytes(model.text_model) == before != {}
    assert all(torch.equal(a, b) for a, b in zip(learned(model.vision_model), learned(tower), strict=True))
    two = Holder(text=bert(), image=vit())
    patch(two, OTHER)
    before = find_astrocytes(two.parts["image"])
    one = bert()
    patch(one, LEARNED)
    astroattn.save(one, tmp_path / "text")
    astroattn.load(two, tmp_path / "text")
    assert find_astrocytes(two.parts["image"]) == before
    assert {core.config for core in find_astrocytes(two.parts["text"]).values()} == {LEARNED}


def test_towers_of_other_sizes_are_told_apart(tmp_path: Path) -> None:
    one = bert()
    patch(one, LEARNED)
    astroattn.save(one, tmp_path)
    two = Holder(query=bert(num_attention_heads=2), document=bert())
    assert [row.name for row in astroattn.load(two, tmp_path).patched] == [
        f"parts.document.encoder.layer.{index}.attention.self" for index in (0, 1)
    ]


DIFFERENT = {
    "two of its kind": (
        lambda: Holder(query=bert(), document=bert()),
        r"Holder has 2 parts that this may belong to \('parts.query', 'parts.document'\); .*get_submodule",
    ),
    "deeper": (
        lambda: bert(num_hidden_layers=5),
        r"the model has also 'encoder.layer.2.attention.self' \(3 more than the 2 that were saved\)",
    ),
    "deeper below a head": (
        lambda: bert(t.BertForSequenceClassification, num_hidden_layers=5),
        r"the model has also 'bert.encoder.layer.2.attention.self' \(3 more",
    ),
    "shallower": (
        lambda: bert(num_hidden_layers=1),
        r"the model has no module 'encoder.layer.1.attention.self' \(1 of 2",
    ),
    "other heads": (
        lambda: Holder(one=bert(num_attention_heads=2)),
        "'parts.one.encoder.layer.0.attention.self' has 2 heads; the plan has configs for 4",
    ),
    "another dimension": (
        lambda: bert(hidden_size=64),
        "encoder.layer.0.attention.self was a BertSelfAttention of head dimension 8; here it is .* 16",
    ),
    "another family": (
        lambda: t.RobertaModel(t.RobertaConfig(**TEXT)),
        "encoder.layer.0.attention.self was a BertSelfAttention; here it is a RobertaSelfAttention",
    ),
    "another library": (vit, r"the model has no module 'encoder.layer.0.attention.self' \(2 of 2 are missing\)"),
}


@pytest.mark.parametrize("where", [None, 0])
@pytest.mark.parametrize("what", DIFFERENT)
def test_what_does_not_fit_changes_nothing(what: str, where: int | None, tmp_path: Path) -> None:
    """Also where one layer was patched, of which another model may have the like."""
    one = bert()
    patch(one, LEARNED, where)
    astroattn.save(one, tmp_path)
    make, message = DIFFERENT[what]
    model = make().eval()
    patch(model, OTHER, where=0)
    before = find_astrocytes(model)
    with pytest.raises(ValueError, match=message) as error:
        astroattn.load(model, tmp_path)
    assert re.match(r"\S*astroattn.json: ", str(error.value))
    assert find_astrocytes(model) == before


def test_a_layer_of_several_is_not_taken_for_another(tmp_path: Path) -> None:
    model = nn.Sequential(*(bert(num_hidden_layers=1) for _ in range(3)))
    patch(model, LEARNED, where=1)
    astroattn.save(model, tmp_path)
    with pytest.raises(ValueError, match=r"the model has no module '1.encoder.layer.0.attention.self'"):
        astroattn.load(bert(num_hidden_layers=1), tmp_path)
    alike = nn.Sequential(*(bert(num_hidden_layers=1) for _ in range(3)))
    assert [row.name for row in astroattn.load(alike, tmp_path).patched] == ["1.encoder.layer.0.attention.self"]


def test_a_module_that_is_attention_itself(tmp_path: Path) -> None:
    one = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    patch(one, LEARNED)
    train(one)
    astroattn.save(one, tmp_path)
    for other in (nn.MultiheadAttention(32, 4, batch_first=True), Holder(a=nn.MultiheadAttention(32, 4))):
        astroattn.load(other.eval(), tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(learned(other), learned(one), strict=True))
