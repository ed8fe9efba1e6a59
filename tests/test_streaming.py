"""The streaming memory: softmax while everything fits, the same however a text is cut, and of a fixed size."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from astroattn import AstroConfig, AstrocyteAttention
from astroattn.config import ENTRIES_STEP, LEAST_ENTRIES
from astroattn.ops import streaming
from astroattn.ops.streaming import SINKS, block_of

HEADS, KEY_HEADS, DIM, COLUMNS = 6, 2, 8, 5


def make_tokens(count: int, batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    shapes = (HEADS, DIM), (KEY_HEADS, DIM), (KEY_HEADS, COLUMNS)
    query, key, value = (torch.randn(batch, h, count, d, generator=generator, dtype=dtype) for h, d in shapes)
    return 3 * query, key, value


def make_core(entries: int = 32, **options: int) -> AstrocyteAttention:
    return AstrocyteAttention(HEADS, DIM, AstroConfig(hidden="streaming", entries=entries, **options))


def attend_softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    key, value = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def decode_in(
    core: AstrocyteAttention, tokens: Sequence[Tensor], cuts: Sequence[int], key_mask: Tensor | None = None
) -> tuple[Tensor, Any]:
    outs, memory, start = [], None, 0
    for size in cuts:
        now = slice(start, start + size)
        mask = None if key_mask is None else key_mask[:, now]
        out, memory = core.decode(*(x[:, :, now] for x in tokens), memory, key_mask=mask)
        outs.append(out)
        start += size
    return torch.cat(outs, 2), memory


def test_the_constants_of_config_and_operator_agree() -> None:
    for entries in (LEAST_ENTRIES, 64, 128, 1024):
        assert ENTRIES_STEP % block_of(entries) == 0
        most = AstroConfig(hidden="streaming", entries=entries, near=entries - ENTRIES_STEP)
        candidates = entries - (most.near - block_of(entries))
        assert candidates - SINKS > block_of(entries)  # there is something to join, and something to join it


@pytest.mark.parametrize("count", [1, 7, 32])
def test_while_every_token_has_an_entry_it_is_softmax(count: int) -> None:
    tokens = make_tokens(count)
    expected = attend_softmax(*tokens)
    torch.testing.assert_close(make_core()(*tokens, causal=True), expected)
    torch.testing.assert_close(decode_in(make_core(), tokens, [1] * count)[0], expected)


@pytest.mark.parametrize("entries", [LEAST_ENTRIES, 64])
def test_the_cuts_do_not_matter(entries: int) -> None:
    core, tokens = make_core(entries), make_tokens(150)
    expected, memory = decode_in(core, tokens, [150])
    torch.testing.assert_close(core(*tokens, causal=True), expected)
    for cuts in ([1] * 150, [7] * 21 + [3], [16] * 9 + [6], [64, 64, 22]):
        out, other = decode_in(core, tokens, cuts)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(other._asdict(), memory._asdict())


def test_the_memory_does_not_grow() -> None:
    core = make_core()
    _, short = decode_in(core, make_tokens(50), [50])
    _, long = decode_in(core, make_tokens(500), [500])
    assert short.counts[:, 0].max() <= 32
    assert sum(x.numel() for x in long) <= sum(x.numel() for x in short) * 32 / 28
    assert long.counts[:, 2].tolist() == [500, 500]


def test_it_is_nearer_to_softmax_than_a_window_of_the_same_size() -> None:
    """On keys that come back: clusters, as the keys of real texts are."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(12, DIM, generator=generator, dtype=torch.float64)
    which = torch.randint(12, (1, 1, 400), generator=generator)
    value = torch.randn(12, COLUMNS, generator=generator, dtype=torch.float64)[which].expand(1, KEY_HEADS, -1, -1)
    key = (centres[which] + 0.05 * torch.randn(1, 1, 400, DIM, generator=generator, dtype=torch.float64)).expand_as(
        torch.empty(1, KEY_HEADS, 400, DIM)
    )
    query = 3 * torch.randn(1, HEADS, 400, DIM, generator=generator, dtype=torch.float64)
    expected = attend_softmax(query, key, value)
    seen = torch.ones(400, 400, dtype=torch.bool).tril().triu(-31)
    window = F.scaled_dot_product_attention(
        query, *(x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (key, value)), attn_mask=seen
    )
    ours = make_core()(query, key, value, causal=True)

    def error(out: Tensor) -> float:
        return float((out - expected)[:, :, 100:].norm() / expected[:, :, 100:].norm())

    assert error(ours) < 0.25 * error(window)


def test_what_comes_later_changes_nothing_before() -> None:
    core, tokens = make_core(), make_tokens(120)
    changed = [x.clone() for x in tokens]
    for x in changed:
        x[:, :, 90:] += 1
    torch.testing.assert_close(core(*changed, causal=True)[:, :, :90], core(*tokens, causal=True)[:, :, :90])


@settings(deadline=None, max_examples=20)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=2, max_size=3).filter(any),
    left=st.booleans(),
    cut=st.sampled_from([90, 31, 5]),
)
def test_padding_moves_nothing(lengths: list[int], left: bool, cut: int) -> None:
    """Each row goes on in its own blocks, also after a prompt of which it had less than the others."""
    core, tokens, more = make_core(), make_tokens(90, len(lengths)), make_tokens(20, len(lengths))
    place = torch.arange(90)[None]
    counts = torch.tensor(lengths)[:, None]
    mask = place >= 90 - counts if left else place < counts
    cuts = [cut] * (90 // cut) + [90 % cut] * (90 % cut > 0)
    both = [torch.cat(pair, 2) for pair in zip(tokens, more, strict=True)]
    out, memory = decode_in(
        core, both, [*cuts, *[1] * 20], torch.cat([mask, torch.ones(len(lengths), 20, dtype=torch.bool)], 1)
    )
    for row, length in enumerate(lengths):
        real = torch.cat([mask[row], torch.ones(20, dtype=torch.bool)]).nonzero()[:, 0]
        alone = [x[row : row + 1, :, real] for x in both]
        torch.testing.assert_close(out[row : row + 1, :, real], core(*alone, causal=True))
        assert not out[row, :, :90][:, ~mask[row]].any()
        assert memory.counts[row, 2] == length + 20


def test_gradients_flow_through_what_is_merged() -> None:
    core, tokens = make_core(), [x.requires_grad_() for x in make_tokens(60, 1)]
    out = core(*tokens, causal=True)
    out[:, :, -1].sum().backward()
    for x in tokens[1:]:
        assert x.grad is not None
        assert x.grad[:, :, 8:16].abs().sum() > 0  # merged by then
        assert x.grad.isfinite().all()
    assert tokens[0].grad is not None
    # which entries join, and how much they weigh, are constant
    direction = torch.randn_like(tokens[2])
    with torch.no_grad():
        moved = core(tokens[0], tokens[1], tokens[2] + 1e-7 * direction, causal=True)
    slope = float((moved - out.detach())[:, :, -1].sum() / 1e-7)
    assert tokens[2].grad is not None
    assert slope == pytest.approx(float((tokens[2].grad * direction).sum()), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_keeps_its_dtype_and_its_statistics_do_not(dtype: torch.dtype) -> None:
    tokens = make_tokens(100, dtype=dtype)
    out, memory = decode_in(make_core(), tokens, [60, 40])
    assert out.dtype == dtype
    assert memory.attention.dtype == torch.float32
    exact = make_core()(*(x.double() for x in tokens), causal=True)
    # the first 32 tokens are softmax; later ones may merge others where two costs are alike
    torch.testing.assert_close(out[:, :, :32].double(), exact[:, :, :32], atol=0.05, rtol=0.05)


def test_log_p_is_that_of_the_entries() -> None:
    core, (query, key, value) = make_core(), make_tokens(20)
    _, log_p = core.with_normaliser(query, key, value, causal=True)
    logits = query @ key.repeat_interleave(HEADS // KEY_HEADS, 1).mT * DIM**-0.5
    future = torch.ones(20, 20, dtype=torch.bool).triu(1)
    torch.testing.assert_close(log_p, logits.masked_fill(future, -torch.inf).logsumexp(-1))
    assert core.with_normaliser(*make_tokens(100), causal=True)[1].isfinite().all()


def test_rows_of_the_batch_can_be_chosen() -> None:
    core, tokens, more = make_core(), make_tokens(70), make_tokens(9)
    _, memory = decode_in(core, tokens, [70])
    rows = torch.tensor([1, 0, 1])
    out, _ = core.decode(*(x[rows] for x in more), streaming.select_rows(memory, rows))
    expected, _ = core.decode(*more, memory)
    torch.testing.assert_close(out, expected[rows])


def test_the_callers_default_device_does_not_matter() -> None:
    core, tokens = make_core(), make_tokens(70)
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[1, :20] = False
    expected = core(*tokens, causal=True, key_mask=mask)
    with torch.device("meta"):
        assert torch.equal(core(*tokens, causal=True, key_mask=mask), expected)


def test_bad_input_is_one_clear_error() -> None:
    core, (query, key, value) = make_core(), make_tokens(40)
    _, memory = core.decode(query, key, value)
    before = [x.clone() for x in memory]
    for match, state in (
        ("needs? \\(1, 2", memory),
        ("state: dict", {}),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            core.decode(query[:1], key[:1], value[:1], state)  # type: ignore[arg-type]
    wider = make_core(64).decode(query, key, value)[1]
    with pytest.raises(ValueError, match="state: 40 entries; this module has entries=32"):
        core.decode(query, key, value, wider)
    for match, changes in (
        ("state: square of shape", {"square": memory.square[..., :3]}),
        ("state: age of torch.float32; these tokens need torch.float64", {"age": memory.age.float()}),
        (
            "state: counts say 99 entries, 0 tokens of a block; this module with entries=32 has blocks of 4",
            {"counts": memory.counts.new_tensor([[99, 0, 99]] * 2)},
        ),
    ):
        with pytest.raises(ValueError, match=match):
            core.decode(query, key, value, memory._replace(**changes))
    with pytest.raises(
        ValueError, match="28 entries, 0 tokens of a block; this module with entries=64 has blocks of 8"
    ):
        make_core(64).decode(query, key, value, core.decode(query, key, value)[1])
    with pytest.raises(ValueError, match="key: 4 heads; the module's num_heads=6 must be a multiple"):
        core.decode(query, key.repeat(1, 2, 1, 1), value.repeat(1, 2, 1, 1))
    with pytest.raises(ValueError, match="value: 1 heads; key has 2"):
        core.decode(query, key, value[:, :1])
    with pytest.raises(ValueError, match="is for causal attention"):
        core(query, key, value)
    with pytest.raises(ValueError, match="as many queries as keys"):
        core(query[:, :, :3], key, value, causal=True)
    torch.testing.assert_close(list(memory), before)  # unharmed by all of that


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"entries": 15}, "entries: 15; must be at least 16"),
        ({"entries": 36}, "entries: 36; must be a multiple of 8"),
        ({"entries": 32, "near": 25}, "near: 25; entries=32 has room for at most 24 newest tokens"),
        ({"entries": 32.0}, "entries: 32.0 of type float"),
    ],
)
def test_budgets_that_leave_no_room_are_refused(settings: dict[str, int], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        AstroConfig(hidden="streaming", **settings)


def test_what_a_config_says_survives_json() -> None:
    config = AstroConfig(hidden="streaming", entries=64, near=24)
    assert AstroConfig(**dataclasses.asdict(config)) == config
    assert AstroConfig(hidden="streaming", entries=64).near == 32


def test_the_cost_does_not_grow_with_the_length() -> None:
    core = make_core(64)
    short, long = (core.cost(n, n, causal=True) for n in (1000, 100_000))
    assert short.products == long.products
    assert long.ratio == pytest.approx(short.ratio / 100)
    assert core.cost(64, 64, causal=True).ratio == 1


def test_key_heads_may_differ_in_their_budgets() -> None:
    query, key, value = make_tokens(120, batch=3)
    groups = HEADS // KEY_HEADS
    configs = [AstroConfig(hidden="streaming", entries=entries) for entries in (64, 32) for _ in range(groups)]
    core = AstrocyteAttention(HEADS, DIM, configs)
    mask = torch.arange(120) >= torch.tensor([[0], [13], [50]])
    expected, log_p = [], []
    for head, config in enumerate(configs[::groups]):
        alone = AstrocyteAttention(groups, DIM, config)
        one, mine = slice(head, head + 1), slice(head * groups, (head + 1) * groups)
        out, log = alone.with_normaliser(query[:, mine], key[:, one], value[:, one], causal=True, key_mask=mask)
        expected.append(out)
        log_p.append(log)
    out, log = core.with_normaliser(query, key, value, causal=True, key_mask=mask)
    torch.testing.assert_close(out, torch.cat(expected, 1))
    torch.testing.assert_close(log, torch.cat(log_p, 1))
    out, memories = decode_in(core, (query, key, value), [7] * 17 + [1], mask)
    torch.testing.assert_close(out, torch.cat(expected, 1))
    assert [memory.key.shape[1:3] for memory in memories] == [(1, 64), (1, 32)]  # type: ignore[union-attr]
    short = query[:, :, :40], key[:, :, :40], value[:, :, :40]
    torch.testing.assert_close(core(*short, causal=True)[:, :groups], attend_softmax(*short)[:, :groups])
    with pytest.raises(TypeError, match="state: Memory"):
        core.decode(*short, state=memories[0])
    with pytest.raises(ValueError, match="each read by 2; these need one config"):
        core(query, key.repeat_interleave(3, 1)[:, ::2], value.repeat_interleave(3, 1)[:, ::2], causal=True)


def test_a_module_streams_with_all_its_heads_or_none() -> None:
    with pytest.raises(ValueError, match="hidden='streaming' is of whole modules"):
        AstrocyteAttention(2, DIM, [AstroConfig(hidden="streaming"), AstroConfig(hidden="exact")])
