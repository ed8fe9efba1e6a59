"""`eval.distill_speech`: clips measured are not trained on, runs go on, and the page has their figures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripts import run

from astroattn import AstroConfig, patch
from astroattn.models import LoadedModel
from eval.common import fill_marks, read_rows
from eval.distill_speech import __main__ as script
from eval.distill_speech import page, training
from eval.distill_speech.training import (
    CONDITIONS,
    DEFAULT,
    LEARNED,
    NEAR,
    NEAR_LEARNED,
    NOTHING,
    Measure,
    Speech,
    SpeechCondition,
    Views,
    load_speech,
    silence,
)
from eval.trained import ORIGINAL, UNTRAINED, WHOLE, Figures, interval, p_value

FRAMES, MELS = 96, 8


class Tokenizer:
    """Numbers for words."""

    def batch_decode(self, ids: torch.Tensor, **_: Any) -> list[str]:
        return [" ".join(map(str, row)) for row in ids.tolist()]


@pytest.fixture
def speech() -> Speech:
    """A tiny Whisper of 96 frames that hears noise."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "vocab_size": 40, "num_mel_bins": MELS}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 2}
    config = WhisperConfig(
        **sizes, **heads, **tokens, max_source_positions=FRAMES, max_target_positions=24, init_std=0.5
    )
    model = WhisperForConditionalGeneration(config).eval()

    def encode(clips: list[Any]) -> dict[str, torch.Tensor]:
        features, mask = (
            torch.zeros(len(clips), MELS, 2 * FRAMES),
            torch.zeros(len(clips), 2 * FRAMES, dtype=torch.bool),
        )
        for place, (samples, _) in enumerate(clips):
            part = torch.from_numpy(samples).float()[: MELS * 2 * FRAMES].reshape(-1, MELS).T
            features[place, :, : part.shape[1]], mask[place, : part.shape[1]] = part, True
        return {"input_features": features, "frame_mask": mask}

    draw = np.random.default_rng(0)
    sounds = [(draw.normal(size=MELS * length), 16000) for length in (100, 120, 140, 160, 180, 90)]
    whisper = LoadedModel("tiny", "transformers", "audio", model, encode, tokenizer=Tokenizer())
    return Speech(whisper, sounds[:3], sounds[3:])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, speech: Speech) -> Iterator[Speech]:
    """The script with some of its conditions and two steps, on these."""
    all_of_them = dict(CONDITIONS)  # whose order is the tables'
    for name, condition in all_of_them.items():
        del CONDITIONS[name]
        if name in (DEFAULT, NEAR, LEARNED, NOTHING):
            settings = dict(condition.settings) | ({"near": 16} if name == NEAR else {})
            stages = {stage: options | {"steps": 2} for stage, options in condition.stages.items()}
            CONDITIONS[name] = SpeechCondition(settings, stages, condition.untrained, condition.drawn, condition.silent)
    monkeypatch.setattr(script, "load_speech", lambda *_, **__: speech)
    monkeypatch.setattr(script, "data_folder", lambda: Path())
    yield speech
    CONDITIONS.clear()
    CONDITIONS.update(all_of_them)


def test_halves_have_no_clip_in_common(data_dir: Path, speech: Speech, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "load_model", lambda *_, **__: speech.whisper)
    whole, chosen = (load_speech(data_dir, None, held_out=flag) for flag in (False, True))

    def names(sounds: Any) -> set[bytes]:
        return {samples.tobytes() for samples, _ in sounds}

    assert (len(whole.training), len(whole.measured), len(chosen.training), len(chosen.measured)) == (7, 7, 5, 2)
    assert not names(whole.training) & names(whole.measured)
    assert names(chosen.training) | names(chosen.measured) == names(whole.training)
    assert not names(chosen.training) & names(chosen.measured)


def test_views_are_clips_that_the_seed_turns(speech: Speech) -> None:
    views, again, other = Views(speech, 6, 0), Views(speech, 6, 0), Views(speech, 6, 1)
    assert len(views) == 6
    found = [[view["input_features"] for view in each] for each in (views, again, other)]
    assert all(torch.equal(one, two) for one, two in zip(found[0], found[1], strict=True))
    assert not any(torch.equal(one, two) for one in found[0] for two in found[2])
    lengths = [int((view["input_features"] != 0).any(1).sum()) for view in views]
    assert sorted(lengths[:3]) == sorted(lengths[3:]) == [100, 120, 140]  # every clip in a round


def test_a_measure_is_that_of_its_encoder(speech: Speech) -> None:
    measure = Measure(speech)
    own = measure(speech.encoder)
    assert own["speech"] == own["all"] == [0, 0, 0]
    assert own["errors"] == [0, 0, 0]
    assert all(own["words"])
    with torch.no_grad():
        speech.encoder.layer_norm.weight[:8].mul_(-1)
    turned = measure(speech.encoder)
    assert all(0.3 < error < 1.9 for error in turned["all"])
    assert turned["speech"] != pytest.approx(turned["all"], rel=1e-3)  # which has silence, too


def test_silence_is_no_attention(speech: Speech) -> None:
    inputs = speech.whisper.encode(list(speech.measured))["input_features"]
    encoder = speech.encoder
    patch(encoder, AstroConfig(hidden="random", num_hidden=1, activation="constant"))
    silence(encoder)
    with torch.no_grad():
        before = encoder(inputs).last_hidden_state
        for layer in encoder.layers:
            layer.self_attn.v_proj.weight.mul_(5)
        assert torch.equal(before, encoder(inputs).last_hidden_state)


def test_a_run_has_every_condition_and_goes_on(small: Speech, tmp_path: Path) -> None:
    before = {name: weight.clone() for name, weight in small.encoder.state_dict().items()}
    path = tmp_path / "rows.json"
    assert run(script.main, "--json", str(path), "--seeds", "1", "--conditions", NEAR).exit_code == 0
    first = read_rows(path)
    assert [(row["attention"], row["training"], row["clips"]) for row in first] == [
        (ORIGINAL, UNTRAINED, 0),
        (NEAR, UNTRAINED, 0),
        (NEAR, WHOLE, 2),
    ]
    done = run(script.main, "--json", str(path), "--seeds", "2")
    assert done.exit_code == 0
    rows = read_rows(path)
    assert rows[:3] == first
    found = [(row["attention"], row["training"], row["seed"]) for row in rows]
    expected = {
        (name, stage, seed)
        for name, condition in CONDITIONS.items()
        for seed in (0, 1)
        for stage in (*([UNTRAINED] if condition.drawn or not seed else []), *condition.stages)
    }
    assert set(found) == expected | {(ORIGINAL, UNTRAINED, 0)}
    assert len(found) == len(set(found))
    assert all(torch.equal(weight, before[name]) for name, weight in small.encoder.state_dict().items())
    assert page.format_results(rows) in done.output
    axes = page.plot(rows).axes
    assert axes[0].get_yticklabels()[0].get_text() == DEFAULT


def test_a_rate_takes_the_place_of_the_attention_s_own(small: Speech, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    options = ("--json", str(path), "--seeds", "1", "--conditions", NEAR)
    assert run(script.main, *options, "--rate", "1e-12").exit_code == 0
    _, untrained, still = read_rows(path)
    assert still["all"] == pytest.approx(untrained["all"], rel=1e-4)
    refused = run(script.main, *options)
    assert refused.exit_code == 2
    assert "has rows of another rate" in " ".join(refused.output.replace("│", " ").split())


def row(attention: str, training: str, seed: int, speech: list[float], errors: list[int]) -> dict[str, Any]:
    measures = {"speech": speech, "all": speech, "errors": errors, "words": [10, 30] * 3}
    return {"attention": attention, "training": training, "seed": seed, "clips": 9, "seconds": 2.0} | measures


def test_tables_by_hand() -> None:
    rows = [row(ORIGINAL, UNTRAINED, 0, [0] * 6, [0] * 6), row(DEFAULT, UNTRAINED, 0, [0] * 6, [0, 1, 0, 0, 0, 0])]
    rows += [row(NEAR_LEARNED, WHOLE, seed, [0.1, 0.3] * 3, [0, 2 * seed] * 3) for seed in range(2)]
    rows += [row(NEAR, WHOLE, seed, [0.4, 0.6] * 3, [0, 2] * 3) for seed in range(2)]
    rows += [row(NOTHING, WHOLE, 0, [1] * 6, [10, 30] * 3)]
    lines = page.format_results(rows).splitlines()
    assert lines[2] == f"| {ORIGINAL} | {UNTRAINED} | 1 | 9 | 2 | 0.000 | 0.000 | 0.0 |"
    assert lines[4] == f"| {NEAR_LEARNED} | {WHOLE} | 2 | 9 | 2 | 0.200 ± 0.000 | 0.200 ± 0.000 | 2.5 ± 31.8 |"
    difference = page.format_differences(rows).splitlines()[2]
    assert difference.startswith(
        f"| {NEAR_LEARNED}, {WHOLE} | {NEAR}, {WHOLE} | -0.300 [-0.300, -0.300] | 0.031 | -2.5 ["
    )
    stated, best, lost = page.format_answer(rows).splitlines()  # of the other pairs one side is missing
    assert "0.200 against 0.500, **less**" in stated
    assert "2.5 % against 5.0 %, no difference shown" in stated
    assert f"with *{NEAR_LEARNED}*: 2.5 %" in best
    assert "not trained, it is 0.8 %" in best
    assert lost.endswith(f": *{NOTHING}*.")


def test_intervals_and_p_values_find_a_difference_and_none() -> None:
    draw = np.random.default_rng(1)
    some = draw.random((5, 7))
    ones = np.ones_like(some)
    more = Figures(some + 0.5 + 0.1 * draw.random((5, 7)), ones)
    low, high = interval(more, Figures(some, ones))
    assert 0.2 < low < 0.55 < high < 0.9
    assert p_value(more, Figures(some, ones)) == pytest.approx(2 / 2**7)
    low, high = interval(Figures(some, ones), Figures(np.roll(some, 1, 0), ones))
    assert low < 0 < high


def test_without_data_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASTROATTN_DATA", raising=False)
    done = run(script.main)
    assert done.exit_code == 2
    assert "ASTROATTN_DATA" in done.output


def test_the_page_is_made_from_the_results() -> None:
    rows = read_rows(page.RESULTS)
    text, tables = page.PAGE.read_text("utf-8"), page.tables(rows)
    assert all(tables.values())
    assert text == fill_marks(text, tables)
    assert len({row["seed"] for row in rows}) >= 3
    assert {len(row["speech"]) for row in rows} == {7}
    assert page.FIGURE.exists()
