"""Models of one's own: checked on inputs that are given, with attention classes that are registered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import astroattn
from astroattn import AstroConfig
from astroattn.checks import CROSS
from astroattn.fidelity import compare
from astroattn.patching import fallbacks, handwritten, probe

HEADS, DIM, WORDS = 2, 8, 50
WIDTH = HEADS * DIM
SHORT = AstroConfig(num_hidden=4, near=3, exact_keys=8, tile=8)
FULL = AstroConfig(hidden="random", near=1000)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


class Mixer(nn.Module):
    """Attention whose name does not say so, in a function outside the class."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v)


class OwnAttention(Mixer):
    """The same under a name that says so, in a method."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Model(nn.Module):
    """Two of them; the second where it is asked for."""

    def __init__(self, layer: type[nn.Module] = OwnAttention) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.first, self.second = layer(), layer()

    def forward(self, ids: Tensor, twice: bool = True) -> Tensor:
        x = self.words(ids)
        x = x + self.first(x)
        return x + self.second(x) if twice else x


def ids(rows: int = 2, tokens: int = 40) -> Tensor:
    return torch.randint(WORDS, (rows, tokens), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> Model:
    return Model().eval()


def test_without_inputs_the_refusal_names_the_remedy(model: Model) -> None:
    with pytest.raises(ValueError, match=r"no input can be made up; give one \(patch\(model, inputs=batch\)\)"):
        astroattn.patch(model, SHORT)


@pytest.mark.parametrize("inputs", [ids(), {"ids": ids()}], ids=["tensor", "mapping"])
def test_a_model_is_checked_on_the_inputs_given(model: Model, inputs: Any) -> None:
    with torch.no_grad():
        before = model(ids())
        report = astroattn.patch(model, SHORT, inputs=inputs)
        assert [(row.name, row.heads, row.head_dim) for row in report.patched] == [
            ("first", HEADS, DIM),
            ("second", HEADS, DIM),
        ]
        assert report.probe == "every astrocyte was checked against softmax on the inputs given"
        assert not torch.allclose(model(ids()), before)
        assert not fallbacks(model)
        astroattn.patch(model, FULL, inputs=inputs)
        torch.testing.assert_close(model(ids()), before)
        astroattn.unpatch(model)
        assert torch.equal(model(ids()), before)


def test_they_reach_what_made_up_input_does_not(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "make_inputs", lambda model: {"ids": ids(), "twice": False})
    assert [row.name for row in astroattn.patch(model, SHORT).patched] == ["first"]
    report = astroattn.patch(model, SHORT, inputs=ids())
    assert [row.name for row in report.patched] == ["first", "second"]
    assert report.probe == "every astrocyte was checked against softmax on made-up input and the inputs given"


def test_they_are_not_needed_where_made_up_input_does(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    monkeypatch.setattr(probe, "make_inputs", lambda model: {"ids": ids()})
    report = astroattn.patch(model, SHORT, inputs={"nothing": "that it takes"})
    assert report.probe == "every astrocyte was checked against softmax on made-up input"


@pytest.mark.parametrize(
    ("inputs", "error", "match"),
    [
        ([ids()], TypeError, "inputs: expected a mapping of keyword arguments or a tensor, got list"),
        ({"words": ids()}, ValueError, "inputs: the model does not run on them: TypeError"),
        (ids().float(), ValueError, "inputs: the model does not run on them: RuntimeError"),
    ],
)
def test_inputs_that_do_not_fit(model: Model, inputs: Any, error: type[Exception], match: str) -> None:
    with torch.no_grad():
        before = model(ids())
        with pytest.raises(error, match=match):
            astroattn.patch(model, SHORT, inputs=inputs)
        assert torch.equal(model(ids()), before)
    assert not hasattr(model.first, "astrocyte")


def test_a_registered_class_is_an_attention_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handwritten, "_registered", set())
    model = Model(Mixer).eval()
    with pytest.raises(ValueError, match="Model has no attention module that astroattn recognises"):
        astroattn.patch(model, SHORT, inputs=ids())
    assert astroattn.register(Mixer) is Mixer
    assert len(astroattn.patch(model, SHORT, inputs=ids()).patched) == 2
    with torch.no_grad():
        model(ids())
    assert not fallbacks(model)
    for wrong in (model, "Mixer", dict):
        with pytest.raises(TypeError, match=r"cls: expected a subclass of torch\.nn\.Module"):
            astroattn.register(wrong)  # type: ignore[arg-type]


def test_compare_and_calibrate_give_theirs(model: Model) -> None:
    batches = [ids(8, 140) + shift for shift in (0, 0)]
    result = compare(model, iter(batches), SHORT, progress=False)
    assert {"original", "patched", "uniform"} <= result.rows.keys()
    assert result.items == 16
    plan = astroattn.calibrate(model, batches, cost=0.9, metric="cosine", progress=False)
    assert plan.modules.keys() == {"first", "second"}
    assert not hasattr(model.first, "astrocyte")


def test_load_takes_them(model: Model, tmp_path: Path) -> None:
    astroattn.patch(model, SHORT, inputs=ids())
    astroattn.save(model, tmp_path)
    other = Model().eval()
    other.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="its heads cannot be counted"):
        astroattn.load(other, tmp_path)
    astroattn.load(other, tmp_path, inputs=ids())
    with torch.no_grad():
        assert torch.equal(other(ids()), model(ids()))


def test_a_pipeline_stands_for_its_model() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=40))
    pipe = transformers.FeatureExtractionPipeline(bert, tokenizer=transformers.BertTokenizer({"[UNK]": 0, "a": 1}))
    assert len(astroattn.patch(pipe, SHORT).patched) == 1
    assert hasattr(bert.encoder.layer[0].attention.self, "astrocyte")
    assert astroattn.fallbacks(pipe) == {}
    astroattn.unpatch(pipe)
    assert not hasattr(bert.encoder.layer[0].attention.self, "astrocyte")
    with astroattn.patched(pipe, SHORT) as report:
        assert len(report.patched) == 1
    for call in (astroattn.patch, astroattn.unpatch, astroattn.fallbacks):
        with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module or a pipeline, got str"):
            call("bert")


def test_a_perceiver_whose_latents_have_a_static_layer_with_a_near_field_reads_its_input_exactly() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"num_latents": 40, "d_latents": 16, "d_model": 12, "num_blocks": 1, "num_self_attends_per_block": 1}
    sizes |= {"num_self_attention_heads": 2, "num_cross_attention_heads": 2, "qk_channels": 16, "v_channels": 16}
    torch.manual_seed(0)
    perceiver = transformers.PerceiverModel(transformers.PerceiverConfig(**sizes)).eval()
    inputs = {"inputs": torch.randn(2, 60, 12), "attention_mask": torch.ones(2, 60)}
    inputs["attention_mask"][1, 50:] = 0
    with torch.no_grad():
        before = perceiver(**inputs).last_hidden_state
        report = astroattn.patch(perceiver, FULL, inputs=inputs)
        assert [(row.status, row.reason) for row in report.rows] == [("exact", CROSS), ("astrocyte", "")]
        torch.testing.assert_close(perceiver(**inputs).last_hidden_state, before, rtol=1e-4, atol=1e-5)
        astroattn.patch(perceiver, SHORT, inputs=inputs)
        assert not torch.equal(perceiver(**inputs).last_hidden_state, before)
    assert fallbacks(perceiver) == {}
