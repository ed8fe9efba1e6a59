"""Fidelity while a Trainer trains: the example of the docs, what is measured, and what is left as it was."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

import astroattn
from astroattn import AstroConfig
from astroattn.callbacks import FidelityCallback, measure_fidelity
from astroattn.fidelity.calls import find_astrocytes

PAGE = Path(__file__).parent.parent / "docs" / "finetuning.md"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BATCH = {"input_ids": torch.arange(600).reshape(3, 200) % 90, "attention_mask": torch.ones(3, 200, dtype=torch.long)}


def make(cls: type = BertForSequenceClassification, **more: Any) -> Any:
    torch.manual_seed(0)
    return cls(BertConfig(vocab_size=90, initializer_range=0.4, **SIZES, **more)).train()


def test_the_example_of_the_docs_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = (
        code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S) if "FidelityCallback" in code
    )
    names: dict[str, Any] = {}
    exec(code, names)
    assert [row["step"] for row in names["logged"]] == [0, 2, 4]
    for row in names["logged"]:
        assert 0 < row["fidelity_error"] < 1
        assert 0 <= row["fidelity_agreement"] <= 1
    assert names["model"].training


@pytest.mark.parametrize("cls", [BertForSequenceClassification, BertModel])
def test_it_is_the_distance_from_the_unpatched_model(cls: type) -> None:
    model = make(cls)
    batch = BATCH | {"attention_mask": BATCH["attention_mask"].clone()}
    batch["attention_mask"][0, 170:] = 0
    real = batch["attention_mask"].bool()

    def read() -> torch.Tensor:
        with torch.no_grad():
            output = model.eval()(**batch)
        model.train()
        return output.logits if cls is BertForSequenceClassification else output.last_hidden_state[real]

    truth = read()
    astroattn.patch(model, AstroConfig(num_hidden=8, exact_keys=8))
    found = measure_fidelity(model, batch)
    mine = read()
    assert found["error"] == pytest.approx(((mine - truth).norm() / truth.norm()).item(), rel=1e-4)
    assert found["error"] > 1e-3
    if cls is BertForSequenceClassification:
        assert found["agreement"] == (mine.argmax(-1) == truth.argmax(-1)).double().mean().item()
    else:
        assert set(found) == {"error"}


def test_it_leaves_the_model_as_it_was() -> None:
    model = make()
    astroattn.patch(model)
    model.bert.embeddings.eval()  # as whoever freezes a part does
    modes = [module.training for module in model.modules()]
    cores = list(find_astrocytes(model).values())
    cores[1].exact = True
    for batch in (BATCH, {"nothing": torch.zeros(2, 3)}):
        if batch is BATCH:
            measure_fidelity(model, batch)
        else:
            with pytest.raises(ValueError, match="input_ids"):
                measure_fidelity(model, batch)
        assert [module.training for module in model.modules()] == modes
        assert [core.exact for core in cores] == [False, True]


def test_softmax_is_no_distance() -> None:
    model = make()
    astroattn.patch(model, "exact")  # 200 tokens
    assert measure_fidelity(model, BATCH) == {"error": 0, "agreement": 1}


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"every": 0}, ValueError, "every: 0; must be at least 1 step"),
        ({"batch": [1]}, TypeError, "batch: expected a mapping of keyword arguments or a tensor, got list"),
        ({"trainer": SimpleNamespace(model=make())}, ValueError, "trainer: its model is not patched"),
    ],
)
def test_what_cannot_be_measured_is_told_at_once(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    model = make()
    astroattn.patch(model, "fast")
    with pytest.raises(kind, match=f"^{message}"):
        FidelityCallback(**({"trainer": SimpleNamespace(model=model), "batch": BATCH} | change))
