"""The controls: what each takes away, and that the measures see it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import run

from eval.calcium_traces.astrocyte import draw_weights, normalise, stream
from eval.controls import __main__ as command
from eval.controls.conditions import (
    DIMENSIONS,
    OTHER,
    REAL,
    SYNAPSES,
    TOKENS,
    UNTRAINED,
    Head,
    conditions,
    shuffle_tokens,
    untrained,
)
from eval.heads import Subject
from eval.train_digits import load_digits_vit, load_split


@pytest.fixture(scope="module")
def digits() -> Subject:
    (train, _), (held_out, _) = load_split()
    return Subject("digits ViT", load_digits_vit(), held_out[:4], train[:4], "held-out digits")


@pytest.fixture(scope="module")
def rows(digits: Subject) -> list[dict]:
    return command.measure([digits], 0, counts=(100, 1000), redraws=2)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_shuffled_images_have_the_same_patches() -> None:
    images = draw(2, 3, 28, 28)
    shuffled = shuffle_tokens(images, generator())

    def patches(x: torch.Tensor) -> torch.Tensor:
        return x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(2, 196, 12)

    before, after = patches(images), patches(shuffled)
    order = torch.cdist(after[0], before[0]).argmin(1)
    assert sorted(order.tolist()) == list(range(196))
    assert (order != torch.arange(196)).sum() > 150
    torch.testing.assert_close(after, before[:, order])


def test_shuffled_texts_keep_their_ends_and_words() -> None:
    inputs = {"input_ids": torch.arange(40).view(2, 20), "attention_mask": torch.ones(2, 20)}
    shuffled = shuffle_tokens(inputs, generator())
    assert shuffled["attention_mask"] is inputs["attention_mask"]
    for before, after in zip(inputs["input_ids"], shuffled["input_ids"], strict=True):
        assert (after[0], after[-1]) == (before[0], before[-1])
        assert torch.equal(after.sort().values, before)
        assert not torch.equal(after, before)


def test_conditions_change_what_they_say(digits: Subject) -> None:
    found = dict(conditions(digits, 0))
    assert list(found) == [REAL, SYNAPSES, OTHER, TOKENS, DIMENSIONS, UNTRAINED]
    for heads in found.values():
        assert len(heads) == 16
        assert heads[0].query.shape == (197, 16)
    for real, other, mixed in zip(found[REAL], found[OTHER], found[DIMENSIONS], strict=True):
        assert torch.equal(real.query, other.query)
        assert not torch.equal(real.key, other.key)
        assert torch.equal(real.key.sort(0).values, mixed.key.sort(0).values)
        assert not torch.equal(real.key, mixed.key)


def test_untrained_model_is_another(digits: Subject) -> None:
    model = untrained(digits, 0)
    weights = digits.model.state_dict()
    assert model.state_dict().keys() == weights.keys()
    changed = [name for name, weight in model.state_dict().items() if weight.ndim > 1]
    assert changed
    assert not any(torch.equal(model.state_dict()[name], weights[name]) for name in changed if name != "pos_embed")
    with torch.no_grad():
        assert model(digits.inputs).norm() > 0


def test_shuffled_synapses_break_the_calcium() -> None:
    query, key, value = 0.5 * draw(60, 8), 0.3 + 0.5 * draw(40, 8, seed=1), draw(40, 0)
    weight, exact = draw_weights("iid", 4000, 8, 0), normalise(query, key).log()
    intact = stream(query, key, value, weight, (4000,))[4000][0]
    broken = stream(query, key, value, weight, (4000,), read_weight=weight.roll(1, 0))[4000][0]
    assert np.corrcoef(intact.log(), exact)[0, 1] > 0.95
    assert abs(np.corrcoef(broken.log(), exact)[0, 1]) < 0.5


def test_following_tells_exchanged_keys_from_queries_alone() -> None:
    original, head = (Head(draw(50, 4), draw(30, 4, seed=seed), draw(30, 2)) for seed in (1, 2))
    own, first = normalise(*head[:2]), normalise(*original[:2])
    follows = command._follow(head, original, own, first)
    assert follows["change"] == pytest.approx(1)
    assert follows["with_original"] == pytest.approx(follows["own_with_original"])
    deaf = command._follow(head, original, first * (1 + 0.01 * draw(50).abs()), first)  # does not hear the new keys
    assert deaf["with_original"] > 0.99
    assert abs(deaf["change"]) < 0.5


def test_the_digits_vit_by_condition(rows: list[dict]) -> None:
    cells = {(row["condition"], row["weights"], row["m"]): row for row in rows if row["part"] == "conditions"}
    assert len(cells) == 6 * 2 + 5 * 2  # no learned layer has its synapses shuffled
    real, broken = cells[REAL, "random", 1000], cells[SYNAPSES, "random", 1000]
    assert real["log_correlation"] > 0.8 > 0.5 > abs(broken["log_correlation"])
    assert real["output_error"] < 0.6 * real["uniform_error"]
    assert cells[OTHER, "random", 1000]["change"] > 0.7
    assert cells[REAL, "default", 16]["log_correlation"] > 0.99
    (redrawn,) = [row for row in rows if row["part"] == "redraws" and row["m"] == 1000]
    assert redrawn["median_sd"] < redrawn["head_sd"]
    whole = {(row["condition"], row["config"]): row for row in rows if row["part"] == "whole model"}
    assert whole[REAL, "default"]["error"] < 0.1 * whole[REAL, "uniform"]["error"]
    assert all(np.isfinite(row["error"]) for row in whole.values())


def test_rows_become_a_table_and_a_figure(rows: list[dict], tmp_path: Path) -> None:
    table = command.format_markdown(rows)
    assert table.count("\n") == 1 + 6
    assert f"| digits ViT | {SYNAPSES} |" in table
    command.write_figure(tmp_path / "controls.png", command.plot(rows))
    assert (tmp_path / "controls.png").stat().st_size > 10_000


def test_the_command_writes_its_rows(
    rows: list[dict], digits: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "measure", lambda subjects, seed: rows)
    for name in ("load_minilm", "load_vit"):
        monkeypatch.setattr(command, name, lambda *sizes: digits)
    done = run(command.main, "--json", str(tmp_path / "c.json"))
    assert done.exit_code == 0
    assert json.loads((tmp_path / "c.json").read_text("utf-8"))["rows"] == rows
    assert "tokens" in done.output
