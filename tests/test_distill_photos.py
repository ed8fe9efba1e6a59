"""`eval.distill_photos`: photos measured are not trained on, runs go on, and the page has their figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from scripts import run

from eval.common import fill_marks, read_rows
from eval.distill_photos import __main__ as script
from eval.distill_photos import page, training
from eval.distill_photos.training import (
    CONDITIONS,
    LEARNED,
    NEAR,
    NEAR_LEARNED,
    Measure,
    Photos,
    Views,
    load_photos,
    read,
)
from eval.trained import ORIGINAL, UNTRAINED, WHOLE, Condition, Figures, interval, p_value

PAGE = page.DOCS / "experiments" / "photos.md"


@pytest.fixture
def photos() -> Photos:
    """A tiny vision transformer with 7 x 7 patches, and photos of noise."""
    torch.manual_seed(0)
    sizes = {"img_size": 224, "patch_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
    model = timm.models.vision_transformer.VisionTransformer(**sizes).eval()
    for weight in (model.head.weight, *(block.attn.qkv.weight for block in model.blocks)):
        torch.nn.init.normal_(weight, std=0.5)
    training_, measured = torch.randn(6, 3, 224, 224), torch.randn(8, 3, 224, 224)
    return Photos(model, training_, measured, read(model, measured).argmax(-1))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, photos: Photos) -> Iterator[Photos]:
    """The script with some of its conditions and few steps, on these."""
    all_of_them = dict(CONDITIONS)  # whose order is the tables'
    for name in all_of_them:
        condition = CONDITIONS.pop(name)
        if name in (NEAR, LEARNED, NEAR_LEARNED):
            stages = {stage: options | {"steps": 2, "photos": 2} for stage, options in condition.stages.items()}
            CONDITIONS[name] = Condition(condition.settings, stages, condition.untrained)
    monkeypatch.setattr(script, "load_photos", lambda *_, **__: photos)
    monkeypatch.setattr(script, "data_folder", lambda: Path())
    yield photos
    CONDITIONS.clear()
    CONDITIONS.update(all_of_them)


def test_halves_have_no_photo_in_common(data_dir: Path) -> None:
    whole, quarter = (load_photos(data_dir, 8, held_out=flag) for flag in (False, True))
    assert (len(whole.training), len(whole.measured), len(quarter.training), len(quarter.measured)) == (8, 8, 6, 2)

    def names(images: torch.Tensor) -> set[bytes]:
        return {image.numpy().tobytes() for image in images}

    even = names(whole.training)
    assert not even & names(whole.measured)
    assert names(quarter.training) | names(quarter.measured) == even
    assert not names(quarter.training) & names(quarter.measured)
    assert (read(whole.model, whole.measured).argmax(-1) == whole.labels).float().mean() > 0.5  # in the same order


def test_views_are_crops_that_the_seed_decides() -> None:
    ramp = torch.stack([torch.arange(224.0).expand(3, 224, 224), torch.arange(224.0).expand(3, 224, 224) + 1000])
    views, again, other = Views(ramp, 4, 9, 0), Views(ramp, 4, 9, 0), Views(ramp, 4, 9, 1)
    assert len(views) == 9
    assert all(torch.equal(one, two) for one, two in zip(views, again, strict=True))
    assert not any(torch.equal(one, two) for one in views for two in other)
    rows = torch.cat(list(views))[:, 0, 100]
    steps = rows.diff(dim=1)[:, 50:-50].mean(1)
    assert (steps < 0).any()
    assert (steps > 0).any()
    assert ((steps.abs() > training.LEAST - 0.02) & (steps.abs() <= 1.01)).all()
    assert {bool(row.mean() > 500) for row in rows} == {False, True}


def test_a_measure_is_that_of_its_model(photos: Photos) -> None:
    measure = Measure(photos)
    own = measure(photos.model)
    assert (own["same"], own["right"], own["KL"]) == ("1" * 8, "1" * 8, pytest.approx(0, abs=1e-6))
    with torch.no_grad():
        photos.model.head.weight.mul_(-1)
    assert measure(photos.model)["same"].count("1") < 8
    assert measure(photos.model)["KL"] > 0.01


def test_a_run_has_every_condition_and_goes_on(small: Photos, tmp_path: Path) -> None:
    before = {name: weight.clone() for name, weight in small.model.state_dict().items()}
    path = tmp_path / "rows.json"
    assert run(script.main, "--json", str(path), "--seeds", "1", "--conditions", NEAR).exit_code == 0
    first = read_rows(path)
    assert [(row["attention"], row["training"], row["photos"]) for row in first] == [
        (ORIGINAL, UNTRAINED, 0),
        (NEAR, UNTRAINED, 0),
        (NEAR, WHOLE, 4),
    ]
    done = run(script.main, "--json", str(path), "--seeds", "2")
    assert done.exit_code == 0
    rows = read_rows(path)
    assert rows[:3] == first
    found = {(row["attention"], row["training"], row["seed"]) for row in rows}
    expected = {
        (name, stage, seed)
        for name, condition in CONDITIONS.items()
        for seed in (0, 1)
        for stage in (*([UNTRAINED] if condition.untrained and not seed else []), *condition.stages)
    }
    assert found == expected | {(ORIGINAL, UNTRAINED, 0)}
    assert len(rows) == len(found)
    after = small.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    assert page.format_results(rows) in done.output


def test_a_rate_takes_the_place_of_the_attention_s_own(small: Photos, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    options = ("--json", str(path), "--seeds", "1", "--conditions", NEAR)
    assert run(script.main, *options, "--rate", "1e-12").exit_code == 0
    _, untrained, still = read_rows(path)
    assert still["KL"] == pytest.approx(untrained["KL"], rel=1e-4)
    for other in ((), ("--rate", "1e-3")):  # its rows would be taken for those of another
        refused = run(script.main, *options, *other)
        assert refused.exit_code == 2
        assert "has rows of another rate" in " ".join(refused.output.replace("│", " ").split())
    path.unlink()
    assert run(script.main, *options).exit_code == 0
    assert read_rows(path)[2]["KL"] != pytest.approx(untrained["KL"], rel=1e-3)


def test_training_moves_a_model_towards_the_original(photos: Photos, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = dataclasses.replace(photos, measured=photos.training, labels=photos.labels[:6])
    monkeypatch.setattr(training, "LEAST", 1.0)  # noise that is made larger is other noise
    options = CONDITIONS[NEAR].stages[WHOLE] | {"steps": 40, "host_learning_rate": 3e-4}
    monkeypatch.setitem(CONDITIONS, NEAR, Condition(CONDITIONS[NEAR].settings, {WHOLE: options}, untrained=True))
    rows = training.train_and_measure(mine, Measure(mine), NEAR, seed=0)
    assert [(row["training"], row["photos"]) for row in rows] == [(UNTRAINED, 0), (WHOLE, 320)]
    assert rows[1]["KL"] < 0.5 * rows[0]["KL"]


def test_the_figure_has_a_line_per_attention(small: Photos, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert run(script.main, "--json", str(path), "--seeds", "1", "--conditions", LEARNED).exit_code == 0
    rows = read_rows(path)
    axes = page.plot(rows).axes[0]
    right = [100 * row["right"].count("1") / len(row["right"]) for row in rows if row["attention"] == LEARNED]
    ((line, *_),) = axes.containers
    assert list(line.get_ydata()) == right
    assert [each.get_label() for each in axes.lines[:2]] == ["original", "70% of the original's"]


def test_intervals_and_p_values_find_a_difference_and_none() -> None:
    draw = np.random.default_rng(1)
    ones = np.ones((3, 200))
    values = (draw.random((3, 200)) < 0.8).astype(float)
    some, worse = Figures(values, ones), Figures(values * (draw.random((3, 200)) < 0.8), ones)
    low, high = interval(some, worse)
    assert 0.08 < low < some.mean() - worse.mean() < high < 0.28
    assert p_value(some, worse) <= 0.001
    alike = Figures(np.roll(values, 1, 0), ones)
    low, high = interval(some, alike)
    assert low < 0 < high
    assert p_value(some, alike) > 0.5


def test_tables_by_hand() -> None:
    def row(attention: str, stage: str, seed: int, right: str) -> dict[str, Any]:
        steps = {"steps": 0, "photos": 9, "seconds": 2.0 + seed, "KL": 0.5, "same": "1101"}
        return {"attention": attention, "training": stage, "seed": seed, **steps, "right": right}

    rows = [row(ORIGINAL, UNTRAINED, 0, "1110")]
    rows += [row(NEAR_LEARNED, WHOLE, seed, right) for seed, right in enumerate(("1100", "1000"))]
    table = page.format_results(rows).splitlines()
    assert table[2] == f"| {ORIGINAL} | {UNTRAINED} | 1 | 9 | 2 | 75.0 | 100 % | 75.0 | 0.500 |"
    expected = "| 2 | 9 | 2 | 37.5 ± 17.7 | 50 % | 75.0 ± 0.0 | 0.500 ± 0.000 |"
    assert table[3] == f"| {NEAR_LEARNED} | {WHOLE} {expected}"
    differences = page.format_differences(rows).splitlines()
    assert len(differences) == 3  # of the others one side is missing
    assert differences[2].startswith(f"| {NEAR_LEARNED}, {WHOLE} | {ORIGINAL}, {UNTRAINED} | -37.5 [")


def test_without_data_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASTROATTN_DATA", raising=False)
    done = run(script.main)
    assert done.exit_code == 2
    assert "ASTROATTN_DATA" in done.output


def test_the_page_has_the_committed_tables() -> None:
    rows = read_rows(page.RESULTS)
    text, tables = PAGE.read_text("utf-8"), page.tables(rows)
    assert all(tables.values())
    assert text == fill_marks(text, tables)
    assert len({row["seed"] for row in rows}) >= 3
    assert {len(row["same"]) for row in rows} == {250}


def test_the_page_says_what_was_measured() -> None:
    rows, flat = read_rows(page.RESULTS), " ".join(PAGE.read_text("utf-8").split())

    def top1(attention: str) -> float:
        mine = [row["right"] for row in rows if (row["attention"], row["training"]) == (attention, WHOLE)]
        return sum(right.count("1") for right in mine) / len(mine) / 250

    def told(claim: str) -> None:
        assert claim.replace("%", "") in flat.replace(" %", "").replace("%", ""), claim

    (original,) = (row["right"].count("1") / 250 for row in rows if row["attention"] == ORIGINAL)
    both, best, near, linear, longer = map(top1, (NEAR_LEARNED, training.NEAR_LONGER, NEAR, LEARNED, training.LONGER))
    wide, wide_longer, by_layers = map(top1, (training.WIDE, training.WIDE_LONGER, training.BY_LAYERS))
    assert linear < longer < page.GOAL * original <= by_layers
    assert original - best < 0.02 < original - both
    told(f"come back to {best:.1%} of the original's {original:.1%} points")
    told(f"to {both:.1%} in fifty seconds")
    told(f"as the latter, to {near:.1%}.")
    told(f"({linear:.1%}, trained twice as long {longer:.1%}: {linear / original:.0%} and {longer / original:.0%} of")
    told(f"with 256** ({by_layers:.1%}, {by_layers / original:.0%},")
    told(f"({wide:.1%} and {wide_longer:.1%}; of the latter one seed)")
    told(f"{linear / original:.0%} with five seeds, {longer / original:.0%} trained longer")
    large = read_rows(page.LARGE)
    whole = page.flags(large, (ORIGINAL, UNTRAINED), "right")
    assert whole is not None

    def share(attention: str) -> float:
        found = page.flags(large, (attention, WHOLE), "right")
        assert found is not None
        assert len(found.values) >= 5
        return found.mean() / whole.mean()

    told(f"come to {share(NEAR_LEARNED):.0%} of the original's top-1 where at 224")
    told(f"trained alike, they come to {both / original:.0%}")
    told(f"The near field alone comes to {share(NEAR):.0%}, pure linear attention to {share(LEARNED):.0%}.")
    told(f"met in the mean of five seeds by the longer training alone ({best:.1%}; the shorter: {both:.1%})")
