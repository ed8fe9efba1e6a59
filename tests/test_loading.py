"""`attn_implementation="astroattn"`: what transformers loads is patched, as a whole, or not loaded."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

from astroattn import AstroConfig, AstrocyteAttention, patch, unpatch
from astroattn.imports import _WhenImported, put_over, when_imported

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": 50}
TOKENS = torch.randint(50, (1, 300), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def bert() -> Any:
    torch.manual_seed(0)
    return t.BertModel(t.BertConfig(**SMALL)).eval()


def read(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).last_hidden_state


def count(model: Any) -> int:
    return sum(isinstance(module, AstrocyteAttention) for module in model.modules())


@pytest.mark.parametrize("cls", [t.AutoModel, t.BertModel])
def test_a_model_is_patched_while_it_is_loaded(cls: Any, bert: Any, tmp_path: Path) -> None:
    bert.save_pretrained(tmp_path)
    exact = read(bert)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = cls.from_pretrained(tmp_path, attn_implementation="astroattn", output_loading_info=True)
    assert not info["missing_keys"]
    patch(bert)
    assert torch.equal(read(model), read(bert))
    assert not torch.equal(read(model), exact)
    unpatch(model)
    assert torch.equal(read(model), exact)
    assert model.config._attn_implementation == "sdpa"


def test_a_config_may_ask_for_it_and_is_left_as_it_was(bert: Any, tmp_path: Path) -> None:
    config = t.BertConfig(**SMALL, attn_implementation="astroattn")
    bert.save_pretrained(tmp_path)
    patch(bert)
    assert torch.equal(read(t.BertModel.from_pretrained(tmp_path, config=config)), read(bert))
    assert config._attn_implementation == "astroattn"
    for model in (
        t.AutoModel.from_config(config),
        t.AutoModel.from_config(t.BertConfig(**SMALL), attn_implementation="astroattn"),
    ):
        assert count(model) == 2


def test_of_a_patched_model_the_files_say_how(bert: Any, tmp_path: Path) -> None:
    patch(bert, AstroConfig(hidden="learned", num_hidden=4, near=8))
    with torch.no_grad():
        bert.encoder.layer[0].attention.self.astrocyte.hidden.key_weight.add_(0.3)
    bert.save_pretrained(tmp_path)
    model = t.AutoModel.from_pretrained(tmp_path, attn_implementation="astroattn")
    assert torch.equal(read(model), read(bert))


def test_what_stays_exact_is_warned_of_and_nothing_at_all_is_an_error(bert: Any, tmp_path: Path) -> None:
    sizes = {"d_model": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 50}
    sizes |= {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    t.BartModel(t.BartConfig(**sizes)).save_pretrained(tmp_path / "bart")
    with pytest.warns(UserWarning, match=r"of 3 attention modules of BartModel .* decoder\.layers\.0\.self_attn \("):
        t.AutoModel.from_pretrained(tmp_path / "bart", attn_implementation="astroattn")
    t.ResNetModel(t.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).save_pretrained(tmp_path / "resnet")
    with pytest.raises(ValueError, match="ResNetModel"):
        t.AutoModel.from_pretrained(tmp_path / "resnet", attn_implementation="astroattn")
    bert.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not supported"):  # the library's own word
        t.AutoModel.from_pretrained(tmp_path, attn_implementation="astro")


def test_a_pipeline_passes_it_on(bert: Any, tmp_path: Path) -> None:
    bert.save_pretrained(tmp_path)
    options = {"attn_implementation": "astroattn"}
    tokenizer = t.PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), pad_token="a")
    pipe = t.pipeline("feature-extraction", str(tmp_path), tokenizer=tokenizer, model_kwargs=options)
    assert count(pipe.model) == 2


def _tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return Tokenizer(WordLevel({"a": 0}, unk_token="a"))


def test_a_library_is_added_to_when_it_is_imported_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_library.py").write_text("class Model:\n    @classmethod\n    def load(cls):\n        return 1\n")
    monkeypatch.syspath_prepend(tmp_path)

    def add(library: Any) -> None:
        put_over(library.Model, "load", lambda load: lambda cls: load(cls) + 1)

    finders = list(sys.meta_path)
    when_imported("some_library", add)
    when_imported("some_library", add)
    when_imported("some_library", lambda library: setattr(library, "also", True))  # a second that waits for it
    import some_library  # type: ignore[import-not-found]

    assert some_library.Model.load() == 2
    assert some_library.also
    when_imported("some_library", lambda library: setattr(library, "seen", True))
    assert some_library.seen
    assert sum(isinstance(finder, _WhenImported) for finder in sys.meta_path) == 1
    sys.meta_path[:] = finders
    sys.modules.pop("some_library")
