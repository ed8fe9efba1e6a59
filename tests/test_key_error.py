"""Exact keys by their errors: what the inputs decide, that it is counted, and what was measured of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from scripts import run
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from astroattn import AstroConfig, AstrocyteAttention, calibrate, patched
from astroattn.cost import budget_of
from astroattn.fidelity.calls import CostMeter
from astroattn.ops.noting import ExactKeys, listening
from eval import key_error
from eval.common import fill_marks

DOCS = Path(__file__).parent.parent / "docs"
BACKENDS = pytest.mark.parametrize("backend", ["torch", "native"])


def draw(sharpness: float, batch: int = 1, tokens: int = 300, dim: int = 16) -> list[Tensor]:
    """Queries of few keys that are like them, or of all alike."""
    query, value = torch.randn(2, batch, 2, tokens, dim)
    return [sharpness * query, query[:, :, torch.randperm(tokens)], value]


def count(config: AstroConfig, tokens: list[Tensor], **options: object) -> Tensor:
    told: list[ExactKeys] = []
    with listening(told.append):
        AstrocyteAttention(2, tokens[0].shape[-1], config)(*tokens, **options)
    return told[0].numbers()


@BACKENDS
def test_more_keys_are_read_exactly_where_less_error_is_allowed(backend: str) -> None:
    torch.manual_seed(0)
    tokens, softmax = draw(1.5), AstrocyteAttention(2, 16, AstroConfig(hidden="exact"))
    truth, numbers, errors = softmax(*tokens), [], []
    for allowed in (0.3, 0.1, 0.03, 0.01):
        config = AstroConfig(exact_keys=150, key_error=allowed, near=1, backend=backend)
        numbers.append(float(count(config, tokens).mean()))
        errors.append(float((AstrocyteAttention(2, 16, config)(*tokens) - truth).norm() / truth.norm()))
    assert numbers == sorted(numbers)
    assert numbers[-1] > 3 * numbers[0]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 3 * errors[-1]


@BACKENDS
def test_each_head_and_sequence_has_its_own_number(backend: str) -> None:
    """Where queries are sharp few keys are all of the attention, and where all keys are alike none has to be exact."""
    torch.manual_seed(0)
    medium, flat = draw(1.5), draw(0.0)
    both = [torch.cat(pair) for pair in zip(medium, flat, strict=True)]
    numbers = count(AstroConfig(near=0, exact_keys=150, key_error=0.05, backend=backend), both)
    assert numbers.shape == (2, 2)
    assert (numbers[0] > 5 * numbers[1]).all()


@BACKENDS
def test_scales_do_not_matter(backend: str) -> None:
    torch.manual_seed(0)
    query, key, value = draw(1.5)
    config = AstroConfig(exact_keys=150, key_error=0.05, backend=backend)
    numbers = count(config, [query, key, value])
    torch.testing.assert_close(count(config, [query, key, 1e3 * value + 7]), numbers, rtol=0.01, atol=0.01)
    constant = torch.ones_like(value)
    assert AstrocyteAttention(2, 16, config)(query, key, constant).sub(1).abs().max() < 1e-5


@BACKENDS
def test_padding_counts_nothing(backend: str) -> None:
    torch.manual_seed(0)
    tokens = draw(1.5, batch=2)
    config = AstroConfig(exact_keys=150, key_error=0.05, backend=backend)
    mask = torch.arange(300)[None] < torch.tensor([[300], [201]])
    alone = count(config, [x[1:, :, :201] for x in tokens])
    torch.testing.assert_close(count(config, tokens, key_mask=mask)[1:], alone)


class Model(nn.Module):
    """Two layers, one with heads that differ, on tokens as they are."""

    def __init__(self, config: AstroConfig) -> None:
        super().__init__()
        self.first = AstrocyteAttention(2, 16, config)
        self.second = AstrocyteAttention(2, 16, [config, AstroConfig(exact_keys=9)])

    def forward(self, tokens: list[Tensor]) -> Tensor:
        out: Tensor = self.second(*tokens) + self.first(*tokens)
        return out


def test_the_meter_counts_what_was_read() -> None:
    torch.manual_seed(0)
    config, tokens = AstroConfig(exact_keys=150, key_error=0.05), draw(1.5, batch=2)
    model = Model(config)
    meter = CostMeter(model)
    with meter.watch():
        model(tokens)
    meter.add(None)
    layout = budget_of(config, 300, None).at(300, 16)
    numbers = count(config, tokens)
    first = numbers.mean() + layout.num_hidden
    fixed = budget_of(AstroConfig(exact_keys=9), 300, None).at(300, 16)
    second = (numbers[:, 0].mean() + layout.num_hidden + fixed.most_keys(300) + fixed.num_hidden) / 2
    assert meter.totals()["positions"] == pytest.approx(float(first + second) / 2)
    most = model.first.cost(300, 300)
    assert meter.totals()["positions"] < most.positions


def test_plans_pay_for_what_is_read() -> None:
    """`calibrate` counts each head's own number, so that its plan costs what the meter then counts."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=99, max_position_embeddings=300, initializer_range=0.4, **sizes)
    model = BertModel(config).eval()
    batches = [{"input_ids": torch.randint(0, 99, (1, 260))} for _ in range(24)]
    plan = calibrate(model, batches, cost=0.4, progress=False)
    with patched(model, plan):
        meter = CostMeter(model)
        with meter.watch(), torch.no_grad():
            for batch in batches:
                model(**batch)
        meter.add(None)
    assert meter.totals()["cost"] == pytest.approx(plan.cost, rel=0.05)


def test_the_script(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    done = run(key_error.main, "--model", "digits", "--limit", "3", "--json", str(path))
    assert done.exit_code == 0
    rows = json.loads(path.read_text("utf-8"))["rows"]
    assert len(rows) == len(key_error.FIXED) + len(key_error.ERRORS) + 1
    assert key_error.format_markdown(rows) in done.output


def test_the_page_has_what_was_measured() -> None:
    page = (DOCS / "method.md").read_text("utf-8")
    rows = json.loads((DOCS / "results" / "key_error.json").read_text("utf-8"))["rows"]
    assert page == fill_marks(page, {"key-error": key_error.format_markdown(rows)})
