"""Packed documents: several in one row, each of which is a sequence by itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers as t
from hypothesis import given, settings
from hypothesis import strategies as st
from patching_models import ALL, build, text
from torch import Tensor, nn

from astroattn import AstroConfig, AstrocyteAttention, patch
from astroattn.fidelity.calls import CostMeter
from astroattn.patching import fallbacks
from astroattn.patching.dense_masks import Mask, read_blocks, read_mask
from astroattn.patching.packed import by_document
from astroattn.patching.site import Call, _refusal
from eval import packed as script
from eval import summary
from eval.benchmark.timing import Effort
from eval.common import read_rows

STATIC = AstroConfig(hidden="random", near=4)
STREAMING = AstroConfig(hidden="streaming", entries=16, near=8)
SHORT = AstroConfig(near=2, exact_keys=0, tile=2, num_hidden=4)
FULL = AstroConfig(near=4096)
SIZES = [[11, 1, 8], [20]]  # tokens of the documents of each row
MISTRAL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
MISTRAL |= {"intermediate_size": 64, "vocab_size": 99, "head_dim": 8, "sliding_window": 4}


def number(sizes: list[list[int]]) -> Tensor:
    """The documents [B, N] of rows with documents of so many tokens."""
    return torch.stack([torch.repeat_interleave(torch.tensor(row)) for row in sizes])


def blocks(
    sizes: list[list[int]], real: Tensor | None = None, causal: bool = False, window: int | None = None
) -> Tensor:
    """The mask [B, N, N] that keeps them apart."""
    documents = number(sizes)
    seen = documents[:, :, None] == documents[:, None]
    distance = torch.arange(seen.shape[1])[:, None] - torch.arange(seen.shape[1])
    seen = seen if not causal else seen & (distance >= 0)
    seen = seen if window is None else seen & (distance.abs() <= window)
    return seen if real is None else seen & real[:, None]


def additive(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


# masks


def written(said: Mask, window: int | None, count: int) -> Tensor:
    """The mask [1, N, N] that was said."""
    seen = torch.ones(1, count, count, dtype=torch.bool)
    if said.documents is not None:
        seen = said.documents[:, :, None] == said.documents[:, None]
    distance = torch.arange(count)[:, None] - torch.arange(count)
    seen = seen & (distance >= 0) if said.causal else seen
    seen = seen & (distance.abs() <= window) if window is not None else seen
    return seen if said.real is None else seen & said.real[:, None]


@settings(deadline=None, max_examples=60)
@given(st.data(), st.lists(st.integers(1, 9), min_size=1, max_size=6), st.booleans(), st.sampled_from([None, 0, 2]))
def test_masks_of_documents_are_read_and_no_others(
    data: st.DataObject, row: list[int], causal: bool, window: int | None
) -> None:
    count = sum(row)
    real = (torch.arange(count) < data.draw(st.integers(1, count)))[None]
    seen = blocks([row], real, causal, window)
    said = read_blocks(seen, window)
    assert said is not None
    assert torch.equal(written(said, window, count)[real], seen[real])
    query, key = (data.draw(st.integers(0, count - 1)) for _ in range(2))
    seen[0, query, key] ^= True
    said = read_blocks(seen, window)
    if said is not None:  # it has become another mask of documents
        real = seen.diagonal(dim1=1, dim2=2)
        assert torch.equal(written(said, window, count)[real], seen[real])


@pytest.mark.parametrize("form", [lambda seen: seen, additive], ids=["bool", "float"])
def test_what_a_dense_mask_says(form: Callable[[Tensor], Tensor]) -> None:
    real = torch.ones(2, 20, dtype=torch.bool)
    real[1, 15:] = False
    said = read_mask(form(blocks(SIZES, real, causal=True)[:, None]), 2, 20)
    assert (said.causal, said.refusal) == (True, None)
    assert torch.equal(said.real, real)
    assert [len(row[mine].unique()) for row, mine in zip(said.documents, said.real, strict=True)] == [3, 1]
    assert read_mask(form(blocks([[20]], causal=True)[:, None]), 2, 20) == Mask(causal=True)
    assert "dense mask" in str(read_mask(form(blocks([[20]], causal=True, window=3)[:, None]), 2, 20).refusal)


def test_a_bias_is_no_mask() -> None:
    """A learned one, or one for every head, though it may be zero now; and what it hides from all queries alike."""
    for bias in (torch.zeros(1, 1, 20, 20, requires_grad=True), torch.zeros(1, 4, 20, 20), torch.randn(1, 1, 20, 20)):
        assert read_mask(bias, 2, 20) == Mask(bias=bias)
    real = torch.arange(20) < torch.tensor([[20], [15]])
    said = read_mask(torch.randn(1, 4, 20, 20).masked_fill(~real[:, None, None], -torch.inf), 2, 20)
    assert torch.equal(said.real, real)
    rows = said.bias.masked_fill(~real[:, None, :, None], -torch.inf)  # padding sees nothing
    assert torch.equal(read_mask(rows, 2, 20).real, real)
    said.bias[0, 1, 3, 4] = -torch.inf
    assert "dense mask" in str(read_mask(said.bias, 2, 20).refusal)


# the answer


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_documents_are_softmax_within_each(causal: bool, padded: bool) -> None:
    sizes = [[9, 1, 17, 3, 2], [1, 31]]
    real = torch.ones(2, 32, dtype=torch.bool)
    if padded:
        real[1, 25:] = False
    said = read_blocks(blocks(sizes, real, causal))
    query, key, value = (torch.randn(2, 3, 32, d, dtype=torch.float64, requires_grad=True) for d in (8, 8, 5))
    batches: list[tuple[int, int]] = []

    def softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        batches.append((q.shape[0], q.shape[2]))
        return AstrocyteAttention(3, 8, AstroConfig(hidden="exact"))(q, k, v, key_mask=mask, causal=causal)

    found = by_document(said.documents, said.real, (query, key, value), softmax)
    mask = blocks(sizes, real, causal)[:, None]
    expected = F.scaled_dot_product_attention(query, key, value, mask).masked_fill(~real[:, None, :, None], 0)
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn_like(found)
    gradients = [torch.autograd.grad(out, (query, key, value), cotangent) for out in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert sum(rows * tokens for rows, tokens in batches) < 2 * int(real.sum())


# models


def packed_positions(sizes: list[list[int]]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(size) for size in row]) for row in sizes])


def decoder(kind: str, host: str) -> nn.Module:
    if kind == "llama":
        model = build(ALL["llama"])
    else:
        torch.manual_seed(0)
        model = t.MistralForCausalLM(t.MistralConfig(**MISTRAL)).eval()
    model.set_attn_implementation(host)
    return model


@pytest.mark.parametrize("config", [STATIC, STREAMING, AstroConfig(hidden="random", near=4096)])
@pytest.mark.parametrize("host", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_packed_texts_are_what_they_are_alone(kind: str, host: str, config: AstroConfig) -> None:
    """As `DataCollatorWithFlattening` packs them: told apart by their positions."""
    if kind == "mistral" and config is STREAMING:
        pytest.skip("a sliding window has no streaming memory")
    model, ids = decoder(kind, host), text()["input_ids"]
    inputs = {"input_ids": ids, "position_ids": packed_positions(SIZES), "use_cache": False}
    with torch.no_grad():
        before = model(**inputs).logits
        patch(model, config)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            after = model(**inputs).logits
        first = 0
        for size in SIZES[0]:
            mine = slice(first, first := first + size)
            alone = model(ids[:1, mine], use_cache=False).logits
            torch.testing.assert_close(after[:1, mine], alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(after[1:], model(ids[1:], use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert not fallbacks(model)
    if config.near == 4096 or kind == "mistral":  # whose window is exact
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    else:
        assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)


def test_arguments_of_flash_attention_change_nothing() -> None:
    """What `DataCollatorWithFlattening(return_flash_attn_kwargs=True)` adds; the host itself goes by the mask."""
    model, ids = decoder("llama", "sdpa"), text()["input_ids"][:1]
    ends = torch.tensor([0, 11, 12, 20], dtype=torch.int32)
    inputs = {"input_ids": ids, "position_ids": packed_positions(SIZES[:1]), "use_cache": False}
    flash = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 11, "max_length_k": 11}
    patch(model, STATIC)
    with torch.no_grad():
        assert torch.equal(model(**inputs, **flash).logits, model(**inputs).logits)
    assert not fallbacks(model)


@pytest.mark.parametrize("form", [lambda seen: seen, additive], ids=["bool", "float"])
def test_a_mask_of_blocks_keeps_texts_apart(form: Callable[[Tensor], Tensor]) -> None:
    model, ids = build(ALL["bert"]), text()["input_ids"]
    position_ids = packed_positions(SIZES)
    seen = blocks(SIZES)[:, None]
    inputs = {"input_ids": ids, "position_ids": position_ids, "attention_mask": form(seen)}
    with torch.no_grad():
        before = model(**inputs)[0]
        patch(model, SHORT)
        meter = CostMeter(model)
        with meter.watch():
            after = model(**inputs)[0]
        meter.add(None)
        first = 0
        for size in SIZES[0]:
            mine = slice(first, first := first + size)
            torch.testing.assert_close(after[:1, mine], model(ids[:1, mine])[0], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)
        assert not fallbacks(model)
        assert meter.totals()["keys"] == pytest.approx((11**2 + 1 + 8**2 + 20**2) / 40)
        broken = seen.clone()
        broken[0, 0, 3, 15] = True
        with pytest.warns(UserWarning, match="a dense mask"):
            model(**inputs | {"attention_mask": form(broken)})
        patch(model, FULL)
        torch.testing.assert_close(model(**inputs)[0], before, rtol=1e-4, atol=1e-4)


def timm_model() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    attention = timm.layers.Attention(32, num_heads=4).eval()

    def run(mask: Tensor | None) -> Tensor:
        return attention(tokens(), attn_mask=None if mask is None else mask[:, None])

    return nn.ModuleList([attention]), run


def torch_model(dtype: torch.dtype) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=dtype == torch.bool).eval()

    def run(mask: Tensor | None) -> Tensor:
        if dtype == torch.bool:
            return layer(tokens(), src_mask=None if mask is None else ~mask[0])
        x = layer(tokens().transpose(0, 1), src_mask=None if mask is None else additive(mask[0]))
        return x.transpose(0, 1)

    return nn.ModuleList([layer]), run


def tokens() -> Tensor:
    return torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(3)) * 3


MODELS = {
    "timm": timm_model,
    "torch, bool": lambda: torch_model(torch.bool),
    "torch, float": lambda: torch_model(torch.float32),
}


@pytest.mark.filterwarnings("ignore:.*patch grid not found")
@pytest.mark.parametrize("name", MODELS)
def test_masks_given_to_torch_and_timm(name: str) -> None:
    model, run = MODELS[name]()
    for weight in model.parameters():
        weight.data *= 3.0
    with torch.enable_grad():  # else torch.nn has a faster path that calls nothing of ours
        seen = blocks([[11, 1, 8]])
        before, whole = run(seen), run(None)
        patch(model, FULL)
        torch.testing.assert_close(run(seen), before, rtol=1e-4, atol=1e-4)
        patch(model, SHORT)
        assert not torch.allclose(run(seen), before, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(whole, before, rtol=1e-3, atol=1e-3)
        assert not fallbacks(model)


def test_padding_within_a_mask_of_torch() -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    model = nn.ModuleList([layer])
    real = torch.ones(2, 20, dtype=torch.bool)
    real[1, 17:] = False
    options = {"attn_mask": ~blocks([[11, 1, 8]])[0], "key_padding_mask": ~real, "need_weights": False}
    x = tokens()
    before = layer(x, x, x, **options)[0]
    patch(model, FULL)
    after = layer(x, x, x, **options)[0]
    torch.testing.assert_close(after[real], before[real], rtol=1e-4, atol=1e-4)
    assert not fallbacks(model)


def test_packed_texts_in_a_graph_are_the_hosts() -> None:
    model = decoder("llama", "sdpa")
    inputs = {"input_ids": text()["input_ids"], "position_ids": packed_positions(SIZES), "use_cache": False}
    with torch.no_grad():
        before = model(**inputs).logits
        patch(model, STATIC)
        with pytest.warns(UserWarning, match="a dense mask"):
            after = torch.compile(model, backend="eager")(**inputs).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_what_packing_costs_is_measured() -> None:
    rows = script.measure(200, (40, 100), Effort(repeats=3, seconds=1))
    assert len(rows) == 12
    for row in rows:
        own = row["attention"] == "original"
        assert (row["times original"]["median"] == 1) == own
        assert ("error" in row) == (row["attention"] == "exact")
        assert row.get("error", 0) < 1e-5
    table = script.format_markdown(rows)
    assert table.splitlines()[0] == "| | documents of 40 | documents of 100 |"
    assert len(table.splitlines()) == 2 + 6


def test_the_committed_times_are_those_of_the_script() -> None:
    rows = read_rows(summary.RESULTS / "packed.json")
    assert {(row["tokens"], row["document"]) for row in rows} == {(script.TOKENS, size) for size in script.SIZES}
    assert all(row["error"] < 1e-6 for row in rows if row["attention"] == "exact")


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_trace_does_not_keep_the_documents_of_its_example() -> None:
    model, ids = build(ALL["bert"]).requires_grad_(False), text()["input_ids"]
    masks = [blocks(sizes)[:, None] for sizes in (SIZES, [[5, 15], [8, 12]])]
    before = [model(ids, attention_mask=mask)[0] for mask in masks]
    patch(model, SHORT)
    traced = torch.jit.trace(lambda mask: model(ids, attention_mask=mask)[0], masks[0], check_trace=False)
    for mask, expected in zip(masks, before, strict=True):
        torch.testing.assert_close(traced(mask), expected, rtol=1e-4, atol=1e-4)


def test_documents_over_a_grid_of_patches_are_the_hosts() -> None:
    query, key, value = (torch.randn(1, 2, 10, 8) for _ in range(3))
    call = Call(query, key, value, grid=(2, 5), documents=number([[4, 6]]))
    assert _refusal(AstrocyteAttention(2, 8), call) == "a mask over a grid of patches"


def test_training_on_packed_texts() -> None:
    """The gradients of the packed row are those of its documents."""
    model, ids = decoder("llama", "sdpa"), text()["input_ids"][:1]
    patch(model, STATIC)
    sizes = SIZES[:1]
    whole = model(ids, position_ids=packed_positions(sizes), use_cache=False).logits
    parts = [model(part, use_cache=False).logits for part in ids.split(sizes[0], 1)]
    cotangent = torch.randn_like(whole)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = [torch.autograd.grad(out, weights, cotangent) for out in (whole, torch.cat(parts, 1))]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
