"""`generate` of transformers with streaming memories in the place of the cache."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

import astroattn
from astroattn import AstroConfig
from astroattn.patching.streaming import StreamingLayer, load_memory, save_memory

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
LLAMA = SIZES | {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 512}
FULL = ["full_attention", "full_attention"]

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**LLAMA, sliding_window=None)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**LLAMA, head_dim=8)),
    "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**LLAMA, head_dim=8, layer_types=FULL)),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SIZES, intermediate_size=64)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=512)),
}
OPTIONS = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def make(name: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():  # texts of a tiny random model repeat themselves unless its weights are large
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    return model


def needs_chunks() -> None:
    """Skip the test where `prefill_chunk_size` needs a cache that the user makes."""
    try:
        make().generate(prompt(), max_new_tokens=1, prefill_chunk_size=16, **OPTIONS)
    except ValueError as error:
        pytest.skip(f"this transformers: {error}")


def prompt(length: int = 60, rows: int = 1) -> Tensor:
    return torch.randint(5, 99, (rows, length), generator=torch.Generator().manual_seed(length))


def stream(entries: int) -> AstroConfig:
    return AstroConfig(hidden="streaming", entries=entries)


@pytest.mark.parametrize("name", MODELS)
def test_with_room_for_the_whole_text_the_tokens_are_the_originals(name: str) -> None:
    model = make(name)
    expected = model.generate(prompt(), max_new_tokens=40, **OPTIONS)
    report = astroattn.patch(model, stream(128))
    assert len(report.patched) == 2
    result = model.generate(prompt(), max_new_tokens=40, return_dict_in_generate=True, **OPTIONS)
    assert torch.equal(result.sequences, expected)
    assert all(isinstance(layer, StreamingLayer) for layer in result.past_key_values.layers)
    assert astroattn.fallbacks(model) == {}
    astroattn.unpatch(model)
    assert torch.equal(model.generate(prompt(), max_new_tokens=40, **OPTIONS), expected)


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_prefill_in_chunks_is_decoding_token_by_token(name: str) -> None:
    model, ids = make(name), prompt(90)
    astroattn.patch(model, stream(32))
    expected = model(ids, use_cache=False).logits
    for size in (1, 7, 16, 64, 90):
        cache, parts = t.DynamicCache(), []
        for start in range(0, 90, size):
            parts.append(model(ids[:, start : start + size], past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-4, rtol=1e-4)
        assert cache.get_seq_length() == 90
        assert cache.layers[0].memory.key.shape[2] <= 32


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_row_alone_and_left_padded_in_a_batch_gives_the_same_tokens(implementation: str) -> None:
    model, ids, lengths = make(), prompt(70, 3), (70, 51, 33)
    model.set_attn_implementation(implementation)
    astroattn.patch(model, stream(32))
    mask = torch.arange(70)[None] >= 70 - torch.tensor(lengths)[:, None]
    batch = model.generate(ids, attention_mask=mask.long(), max_new_tokens=30, **OPTIONS)
    for row, length in enumerate(lengths):
        alone = model.generate(ids[row : row + 1, 70 - length :], max_new_tokens=30, **OPTIONS)
        assert torch.equal(alone[0, length:], batch[row, 70:])


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 20},
        {"prefill_chunk_size": 16},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
    ],
)
def test_every_way_to_generate_gives_the_originals_tokens(options: dict[str, Any]) -> None:
    if "prefill_chunk_size" in options:
        needs_chunks()
    model, ids, settings = make(), prompt(50, 2), OPTIONS | {"max_new_tokens": 20} | options
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    torch.manual_seed(1)
    expected = model.generate(ids, attention_mask=mask, **settings)
    astroattn.patch(model, stream(128))
    torch.manual_seed(1)
    assert torch.equal(model.generate(ids, attention_mask=mask, **settings), expected)
    astroattn.patch(model, stream(32))
    torch.manual_seed(1)
    assert model.generate(ids, attention_mask=mask, **settings).shape == expected.shape


def test_a_memory_reordered_is_that_of_the_other_rows() -> None:
    model, ids = make(), prompt(80, 2)
    astroattn.patch(model, stream(32))
    with torch.inference_mode():
        cache, swapped = (model(ids, use_cache=True).past_key_values for _ in range(2))
        swapped.reorder_cache(torch.tensor([1, 0]))
        nxt = torch.tensor([[7], [9]])
        out = model(nxt, past_key_values=cache).logits
        torch.testing.assert_close(model(nxt.flip(0), past_key_values=swapped).logits, out.flip(0))
        repeated = model(ids, use_cache=True).past_key_values
        repeated.batch_repeat_interleave(2)
        doubled = model(nxt.repeat_interleave(2, 0), past_key_values=repeated).logits
        torch.testing.assert_close(doubled, out.repeat_interleave(2, 0))
        repeated.reset()
        assert repeated.get_seq_length() == 0


def test_a_memory_goes_on_from_a_file(tmp_path: Path) -> None:
    model, ids = make(), prompt(80, 2)
    astroattn.patch(model, stream(32))
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values
        save_memory(cache, tmp_path / "memory.safetensors")
        loaded = load_memory(tmp_path / "memory.safetensors")
        for step in range(20):
            token = torch.full((2, 1), 5 + step)
            out, other = (model(token, past_key_values=each).logits for each in (cache, loaded))
            assert torch.equal(out, other)
    with pytest.raises(FileNotFoundError, match="no file"):
        load_memory(tmp_path / "missing.safetensors")
    with pytest.raises(TypeError, match="cache: dict"):
        save_memory({}, tmp_path / "other.safetensors")  # type: ignore[arg-type]
    plain = make()(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="layer 0 is a DynamicLayer"):
        save_memory(plain, tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


def test_a_copied_cache_goes_its_own_way() -> None:
    model, ids = make(), prompt(80)
    astroattn.patch(model, stream(32))
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values
        other = copy.deepcopy(cache)
        model(torch.tensor([[50]]), past_key_values=other)
        assert (cache.get_seq_length(), other.get_seq_length()) == (80, 81)


def test_caches_that_do_not_fit_are_one_clear_error_and_unharmed() -> None:
    model, ids = make(), prompt(80)
    astroattn.patch(model, stream(32))
    token = torch.tensor([[7]])
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values
        expected = model(token, past_key_values=copy.deepcopy(cache)).logits
        with pytest.raises(ValueError, match="not one of this model and this batch"):
            model(token.expand(3, 1), past_key_values=cache)
        for count in (-3, 40):
            with pytest.raises(RuntimeError, match="cannot forget"):
                cache.crop(count)
        cache.crop(80)  # of older transformers the number to keep; of newer ones none has a meaning above 0
        dense = torch.zeros(1, 1, 1, 81)
        dense[..., 40] = -1.5
        with pytest.raises(ValueError, match="a streaming memory cannot serve this call"):
            model(token, past_key_values=cache, attention_mask=dense)
        astroattn.unpatch(model)
        with pytest.raises(RuntimeError, match="only the patched module that made it can read"):
            model(token, past_key_values=cache)
        astroattn.patch(model, stream(64))
        model(ids, past_key_values=(wide := t.DynamicCache()))
        astroattn.patch(model, stream(32))
        with pytest.raises(ValueError, match="56 entries; this module has entries=32"):
            model(token, past_key_values=wide)
        assert torch.equal(model(token, past_key_values=cache).logits, expected)


def test_assisted_decoding_is_refused_with_a_reason() -> None:
    model, assistant = make(), make()
    assistant.lm_head.weight.data.neg_()  # so that what it proposes is taken back
    astroattn.patch(model, stream(128))
    with pytest.raises((RuntimeError, ValueError), match=r"can be cropped|cannot forget"):
        model.generate(prompt(), assistant_model=assistant, max_new_tokens=10, **OPTIONS)


def test_other_caches_are_left_to_the_models_own_attention() -> None:
    """Static ones, and those that have tokens already: said, counted and right."""
    model, ids = make(), prompt(40)
    expected = model.generate(ids, max_new_tokens=10, cache_implementation="static", **OPTIONS)
    with torch.inference_mode():
        filled = model(ids, use_cache=True).past_key_values
        after = model(torch.tensor([[7]]), past_key_values=copy.deepcopy(filled)).logits
    astroattn.patch(model, stream(32))
    with pytest.warns(UserWarning, match="left to the model's own attention"):
        got = model.generate(ids, max_new_tokens=10, cache_implementation="static", **OPTIONS)
    assert torch.equal(got, expected)
    with torch.inference_mode(), pytest.warns(UserWarning, match="as many queries as keys"):
        torch.testing.assert_close(model(torch.tensor([[7]]), past_key_values=filled).logits, after)
    assert len(astroattn.fallbacks(model)) == 2


def test_some_layers_stream_and_others_keep_everything() -> None:
    needs_chunks()
    model, ids = make(), prompt(60, 2)
    mask = torch.ones_like(ids)
    mask[0, :25] = 0
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=12, **OPTIONS)
    astroattn.patch(model, stream(128), where=1)
    result = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, return_dict_in_generate=True, prefill_chunk_size=16, **OPTIONS
    )
    assert torch.equal(result.sequences, expected)
    assert [isinstance(layer, StreamingLayer) for layer in result.past_key_values.layers] == [False, True]


def test_a_patched_decoder_can_be_copied_saved_and_trained(tmp_path: Path) -> None:
    model, ids = make(), prompt(80)
    astroattn.patch(model, stream(32))
    expected = model.generate(ids, max_new_tokens=10, **OPTIONS)
    assert torch.equal(copy.deepcopy(model).generate(ids, max_new_tokens=10, **OPTIONS), expected)
    model.save_pretrained(tmp_path)
    loaded = astroattn.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(ids, max_new_tokens=10, **OPTIONS), expected)
    model.train()
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_model_that_is_not_causal_has_no_use_for_it() -> None:
    bert = t.BertModel(t.BertConfig(**SIZES, intermediate_size=64))
    with pytest.raises(ValueError, match="is for causal attention"):
        astroattn.patch(bert, stream(32))


def test_stories_are_told_as_by_the_original(data_dir: Path) -> None:
    """stories260K: its own greedy story where all fits, and little is lost where it does not."""
    model = t.LlamaForCausalLM.from_pretrained(data_dir / "stories260K").eval()
    data = json.loads((data_dir / "stories260K" / "tokens.json").read_text())
    stories = [torch.tensor([story]) for story in data["stories"]]
    with torch.inference_mode():
        before = [model(ids).logits[:, 96:-1].log_softmax(-1) for ids in stories]
        for entries, most in ((32, 0.06), (64, 0.013), (128, 0.004)):
            astroattn.patch(model, stream(entries))
            lost, count = 0.0, 0
            for ids, theirs in zip(stories, before, strict=True):
                ours, target = model(ids).logits[:, 96:-1].log_softmax(-1), ids[:, 97:, None]
                lost += float((theirs - ours).gather(2, target).sum())
                count += target.numel()
            assert lost / count < most
    astroattn.patch(model, stream(512))
    told = model.generate(torch.tensor([[1]]), max_new_tokens=len(data["greedy_from_bos"]) - 1, **OPTIONS)
    assert told[0].tolist() == data["greedy_from_bos"]
