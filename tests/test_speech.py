"""Recordings of speech: reading them, models that hear them, and what `compare` says of their frames and words."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.io import wavfile
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    PreTrainedTokenizerFast,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
    WhisperModel,
)

from astroattn import AstroConfig, AstrocyteAttention
from astroattn.cli import main
from astroattn.data import load_data
from astroattn.data.clips import Clip
from astroattn.fidelity import Fidelity, compare
from astroattn.fidelity.calls import find_astrocytes
from astroattn.fidelity.passes import forward, frame_mask
from astroattn.fidelity.speech import NORMALISE, transcribe, within_encoder, word_error
from astroattn.models import LoadedModel, load_model, resample
from astroattn.patching import patch
from eval.common import relative_error
from eval.heads import read_layers

RATE = 16000
EXACT = AstroConfig(near=4096)
ROUGH = AstroConfig(num_hidden=2, near=4, exact_keys=2, tile=2)
ENCODER = ["model.encoder.layers.0.self_attn", "model.encoder.layers.1.self_attn"]


def sound(seconds: float, rate: int = RATE, pitch: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)


def save_clips(folder: Path, seconds: dict[str, float], transcripts: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    for number, (name, length) in enumerate(seconds.items()):
        noise = np.random.default_rng(number).normal(0, 0.1, round(length * RATE))
        samples = sound(length, pitch=200 + 300 * number) + noise
        wavfile.write(folder / name, RATE, (samples.clip(-1, 1) * 32767).astype(np.int16))
    if transcripts:
        (folder / "transcripts.tsv").write_text(transcripts)
    return folder


def save_whisper(folder: Path, kind: type = WhisperForConditionalGeneration) -> Path:
    """A Whisper for two seconds (100 frames) with random weights that writes letters."""
    torch.manual_seed(3)
    sizes = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    config = WhisperConfig(
        vocab_size=32, d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=100,
        max_target_positions=40, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None, init_std=0.5, **sizes,
    )  # fmt: skip
    kind(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8, chunk_length=2).save_pretrained(folder)
    words = ["<end>", "<start>", *(chr(97 + number % 26) * (1 + number // 26) for number in range(30))]
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<end>", bos_token="<start>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(save_whisper(tmp_path_factory.mktemp("whisper"))))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lengths = {"a.wav": 0.5, "b.wav": 1.0, "c.wav": 2.0}
    return save_clips(tmp_path_factory.mktemp("clips"), lengths, "b.wav\tTwo words\na.wav\tOne\nc.wav\t3\n")


@pytest.fixture(scope="module")
def batches(whisper: LoadedModel, clips: Path) -> list[Any]:
    return list(load_data(str(clips), "audio").batches(whisper.encode, 2))


def run(loaded: LoadedModel, batches: Any, config: AstroConfig = ROUGH, **options: Any) -> Fidelity:
    return compare(loaded.model, batches, config, progress=False, tokenizer=loaded.tokenizer, **options)


def test_a_folder_gives_its_recordings_with_their_transcripts(clips: Path) -> None:
    data = load_data(str(clips), "audio")
    assert [clip.name for clip in data.items if isinstance(clip, Clip)] == ["a.wav", "b.wav", "c.wav"]
    assert data.transcripts == ["One", "Two words", "3"]
    assert load_data(str(clips), "audio", half="odd").transcripts == ["Two words"]
    assert load_data(str(clips), "audio", limit=2).transcripts == ["One", "Two words"]


def test_transcripts_are_used_where_every_recording_has_one(tmp_path: Path) -> None:
    save_clips(tmp_path, {"a.wav": 0.1, "b.WAV": 0.1}, "a.wav\tOne")
    data = load_data(str(tmp_path), "audio")
    assert data.transcripts is None
    assert data.notes == ("no transcripts: 'b.WAV' has none",)


def as_24_bit(samples: np.ndarray) -> bytes:
    body = b"".join(struct.pack("<i", int(value * 2**23))[:3] for value in samples)
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, 3 * RATE, 3, 24)
    extra = struct.pack("<4sI4s", b"note", 4, b"abcd")  # a chunk that nobody knows
    return b"RIFF" + struct.pack("<I", 28 + len(extra) + len(body)) + b"WAVE" + form + extra + b"data" + (
        struct.pack("<I", len(body)) + body
    )  # fmt: skip


@pytest.mark.parametrize("width", ["8", "16", "24", "32", "float", "stereo"])
def test_every_width_of_sample_is_of_minus_one_to_one(width: str) -> None:
    samples = sound(0.01)
    forms = {
        "8": lambda x: np.round(128 + 127 * x).astype(np.uint8),
        "16": lambda x: (x * 2**15).astype(np.int16),
        "32": lambda x: (x * 2**31).astype(np.int32),
        "float": lambda x: x.astype(np.float32),
        "stereo": lambda x: np.stack([x + 0.25, x - 0.25], 1).astype(np.float32),
    }
    buffer = io.BytesIO(as_24_bit(samples)) if width == "24" else io.BytesIO()
    if width in forms:
        wavfile.write(buffer, RATE, forms[width](samples))
    found, rate = Clip("a.wav", buffer.getvalue).open()
    assert (rate, found.dtype, found.shape) == (RATE, np.float32, samples.shape)
    np.testing.assert_allclose(found, samples, atol=0.02 if width == "8" else 1e-4)


BROKEN = {"empty": b"", "text": b"no sound", "cut": as_24_bit(sound(0.01))[:30], "silent": as_24_bit(sound(0.0))}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_recording_is_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.wav").write_bytes(BROKEN[kind])
    with pytest.raises(ValueError, match=r"'a\.wav' (cannot be read as a \.wav file|holds no sound)"):
        load_data(str(tmp_path), "audio").items[0].open()


def test_sources_of_no_use_are_refused(tmp_path: Path, clips: Path) -> None:
    with pytest.raises(ValueError, match=r"no \.wav files"):
        load_data(str(tmp_path), "audio")
    for line, message in (("a.wav one", "a line without a tab: 'a.wav one'"), ("z.wav\tz", r"names 'z\.wav'")):
        save_clips(tmp_path, {"a.wav": 0.1}, line)
        with pytest.raises(ValueError, match=message):
            load_data(str(tmp_path), "audio")
    with pytest.raises(ValueError, match="this model reads audio"):
        load_data(str(clips), "audio", tokens=64)


def test_datasets_with_recordings(tmp_path: Path, clips: Path) -> None:
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": (clips / name).read_bytes(), "path": name} for name in ("b.wav", "a.wav")]
    plain = datasets.Features({"audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
    rows = datasets.Dataset.from_dict({"audio": cells}, features=plain).add_column("sentence", ["Two words", "One"])
    rows.cast_column("audio", datasets.Audio(decode=False)).to_parquet(tmp_path / "data.parquet")
    data = load_data(f"datasets:{tmp_path / 'data.parquet'}", "audio")
    assert data.transcripts == ["Two words", "One"]
    assert data.items[1].open()[0].shape == (RATE // 2,)
    with pytest.raises(ValueError, match="the model reads image"):
        load_data(f"datasets:{tmp_path / 'data.parquet'}", "image")


def test_another_rate_is_resampled() -> None:
    found = resample(sound(0.5, 44100), 44100, RATE)
    assert found.shape == (RATE // 2,)
    np.testing.assert_allclose(found[200:-200], sound(0.5)[200:-200], atol=2e-3)
    assert resample(found, RATE, RATE) is found


def test_a_whisper_keeps_its_head_and_gets_features_of_its_own_length(whisper: LoadedModel, batches: list[Any]) -> None:
    assert (whisper.kind, type(whisper.model)) == ("audio", WhisperForConditionalGeneration)
    assert whisper.notes == (
        "WhisperFeatureExtractor, 16000 Hz (other rates are resampled)",
        "at most 2 s (longer ones are cut)",
    )
    assert set(batches[0]) == {"input_features", "frame_mask"}
    assert batches[0]["input_features"].shape == (2, 8, 200)
    assert batches[0]["frame_mask"].sum(1).tolist() == [50, 100]
    assert frame_mask(batches[0], "frame_mask", 100).sum(1).tolist() == [25, 50]
    assert forward(whisper.model, batches[0]).hidden.shape == (2, 100, 32)


@pytest.mark.parametrize("kind", [WhisperModel, WhisperForAudioClassification])
def test_a_whisper_that_writes_nothing_is_its_body(tmp_path: Path, kind: type) -> None:
    loaded = load_model(str(save_whisper(tmp_path, kind)))
    assert type(loaded.model) is WhisperModel
    assert loaded.tokenizer is None


def test_a_local_folder_stands_for_an_id_on_the_hub(tmp_path: Path) -> None:
    loaded = load_model("some/whisper", weights=save_whisper(tmp_path))
    assert loaded.name == "some/whisper"
    assert type(loaded.model) is WhisperForConditionalGeneration
    with pytest.raises(ValueError, match="size: is for photos"):
        load_model(str(tmp_path), size=32)


def test_only_the_encoder_is_patched(whisper: LoadedModel) -> None:
    model = load_model(whisper.name).model
    causal = AstroConfig(hidden="random", near=0, num_hidden=4)  # could stand in a decoder too
    assert [row.name for row in patch(model, causal, within_encoder(model, None)).patched] == ENCODER
    assert [row.name for row in patch(model, ROUGH, within_encoder(model, [1])).patched][-1] == ENCODER[1]
    with pytest.raises(ValueError, match="no attention module of the encoder"):
        within_encoder(model, "model.decoder.*")
    assert within_encoder(torch.nn.Linear(2, 2), "x") == "x"


def test_exact_attention_changes_no_frame_and_no_word(whisper: LoadedModel, batches: list[Any]) -> None:
    result = run(whisper, batches, EXACT, controls=False, transcripts=["One", "Two words", "3"])
    assert result.value("hidden_error") < 1e-5
    assert result.value("speech_error") < 1e-5
    assert result.value("word_error") == 0
    assert result.value("transcript_error") == result.value("transcript_error", "original")
    assert "word_error" not in result.rows["original"].values
    assert any("those of the encoder" in note for note in result.notes)


def test_errors_are_those_of_the_patched_encoder(whisper: LoadedModel, batches: list[Any]) -> None:
    result = run(whisper, batches, transcripts=["One", "Two words", "3"])
    model = load_model(whisper.name).model
    with torch.inference_mode():
        before = [forward(model, batch).hidden for batch in batches]
        wrote = [
            text for h, b in zip(before, batches, strict=True) for text in transcribe(model, h, b, whisper.tokenizer)
        ]
        patch(model, ROUGH, "model.encoder.*")
        after = [forward(model, batch).hidden for batch in batches]
        writes = [
            text for h, b in zip(after, batches, strict=True) for text in transcribe(model, h, b, whisper.tokenizer)
        ]
    left, right = torch.cat(after), torch.cat(before)
    assert result.value("hidden_error") == pytest.approx(float((left - right).norm() / right.norm()), rel=1e-4)
    real = torch.arange(100) < torch.tensor([25, 50, 100])[:, None]
    left, right = left[real], right[real]
    assert result.value("speech_error") == pytest.approx(float((left - right).norm() / right.norm()), rel=1e-4)
    assert result.value("word_error") == word_error(writes, wrote, 0).value
    row = result.per_item
    assert (row["original_text"], row["patched_text"]) == (wrote, writes)
    assert row["transcript"] == ["One", "Two words", "3"]
    assert sum(row["word_errors"]) / sum(row["words"]) == result.value("word_error")
    assert result.value("keys") == 100
    assert {layer.name for layer in result.layers} == set(ENCODER)
    for row in ("patched", "uniform", "near alone", "random"):
        assert {"hidden_error", "word_error", "transcript_error", "cost"} <= set(result.rows[row].values)
    assert result.value("hidden_error") < result.value("hidden_error", "uniform")
    assert not find_astrocytes(whisper.model)


def test_greedy_transcripts_are_those_of_the_model_itself(whisper: LoadedModel, batches: list[Any]) -> None:
    features = batches[0]["input_features"]
    with torch.inference_mode():
        ids = whisper.model.generate(features, max_new_tokens=20, do_sample=False)
        hidden = forward(whisper.model, batches[0]).hidden
    expected = whisper.tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert any(expected)
    assert transcribe(whisper.model, hidden, batches[0], whisper.tokenizer) == expected


def test_words_that_differ_are_counted() -> None:
    assert NORMALISE("It's “Well-known”, isn't it?")[0] == ["its", "well", "known", "isnt", "it"]
    references = ["One two three four.", "Five", ""]
    assert word_error(references, references, 0).value == 0
    assert word_error(["one, TWO! three-four", "five", ""], references, 0).value == 0
    assert word_error(["one two four four four", "", "six"], references, 0).value == pytest.approx(4 / 5)
    assert word_error([""], [""], 0).value == 0


@pytest.mark.parametrize("masked", [True, False])
def test_an_encoder_alone_is_compared_by_its_frames(tmp_path: Path, clips: Path, masked: bool) -> None:
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, conv_dim=(16, 16),
        conv_stride=(20, 16), conv_kernel=(20, 16), num_feat_extract_layers=2, feat_extract_norm="layer",
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    Wav2Vec2Model(config).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(return_attention_mask=masked).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    batches = load_data(str(clips), "audio").batches(loaded.encode, 2)
    assert batches[0]["input_values"].shape == (2, RATE)
    result = run(loaded, batches, controls=False, transcripts=["One", "Two words", "3"])
    assert 0 < result.value("hidden_error") < 1
    assert (result.value("hidden_error") == result.value("speech_error")) == masked
    assert "word_error" not in result.rows["patched"].values
    assert any("transcripts were not used" in note for note in result.notes)
    result.figure(tmp_path / "a.png")


def test_frames_that_are_not_finite_are_counted(whisper: LoadedModel, batches: list[Any]) -> None:
    broken = [dict(batch) for batch in batches]
    broken[0]["input_features"] = broken[0]["input_features"].clone()
    broken[0]["input_features"][0, 0, 0] = torch.nan
    result = run(whisper, broken, controls=False, diagnose=0)
    assert result.value("nonfinite", "original") == 1
    assert "hidden_error" not in result.rows["patched"].values


def test_bad_input_is_named(whisper: LoadedModel, batches: list[Any]) -> None:
    with pytest.raises(ValueError, match="transcripts: 1, but there are 3"):
        run(whisper, batches, controls=False, diagnose=0, transcripts=["One"])
    with pytest.raises(ValueError, match="pooling: recordings are compared frame by frame"):
        run(whisper, batches, pooling="mean")


def test_the_command_line_with_a_recipe(tmp_path: Path, clips: Path) -> None:
    recipe, path, figure = (tmp_path / name for name in ("tiny.toml", "result.json", "figure.png"))
    recipe.write_text('id = "some/whisper"\nlibrary = "transformers"\nmeasured = "not measured here"\n')
    weights = save_whisper(tmp_path / "whisper")
    options = ["--data", str(clips), "--near", "4", "--num-hidden", "2", "--batch-size", "2"]
    main_with = [
        "compare",
        str(recipe),
        "--weights",
        str(weights),
        *options,
        "--json",
        str(path),
        "--figure",
        str(figure),
    ]
    with pytest.raises(SystemExit) as stop:
        main(main_with)
    assert stop.value.code == 0
    saved = json.loads(path.read_text())
    assert (saved["model"], saved["items"]) == ("some/whisper", 3)
    assert {"hidden_error", "speech_error", "word_error", "transcript_error"} <= set(saved["rows"]["patched"]["values"])
    assert figure.stat().st_size > 10_000


def test_whisper_tiny_with_exact_attention_writes_the_same_words(data_dir: Path) -> None:
    loaded = load_model("openai/whisper-tiny.en", weights=data_dir / "whisper_tiny_en")
    data = load_data(str(data_dir / "speech"), "audio", limit=2)
    options: dict[str, Any] = {"controls": False, "diagnose": 0, "transcripts": data.transcripts}
    result = run(loaded, data.batches(loaded.encode, 2), EXACT, **options)
    assert result.value("word_error") == 0
    assert result.value("hidden_error") < 1e-4
    assert result.value("transcript_error", "original") < 0.1


@pytest.mark.parametrize("tiles", ["content", "position"])
def test_a_little_more_speech_errs_little_more(data_dir: Path, tiles: str) -> None:
    """Budgets grow with the length without a step: the same frames, cut to 1,000 and to 1,100."""
    loaded = load_model("openai/whisper-tiny.en", weights=data_dir / "whisper_tiny_en")
    clips = load_data(str(data_dir / "speech"), "audio", limit=2).batches(loaded.encode, 2)[0]
    features = {"input_features": clips["input_features"]}
    lost = {1000: 0.0, 1100: 0.0}
    with read_layers(loaded.model.get_encoder(), features) as layers, torch.no_grad():
        for layer in layers:
            for tokens in lost:
                query, key, value = (x[:, :, :tokens] for x in (layer.query, layer.key, layer.value))
                astrocytes = AstrocyteAttention(query.shape[1], query.shape[3], AstroConfig(tiles=tiles))
                exact = F.scaled_dot_product_attention(query, key, value, scale=1.0)
                found = astrocytes(query, key, value, scale=1.0)
                lost[tokens] += relative_error(found, exact) ** 2
    assert lost[1000] > 0
    assert (lost[1100] / lost[1000]) ** 0.5 < 1.15
