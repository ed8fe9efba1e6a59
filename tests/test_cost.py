"""Cost: counted by hand for a few configurations, and positions against what the code gives a query."""

from __future__ import annotations

import pytest
import torch
from core_cases import BIDIRECTIONAL, CAUSAL, EVERY, draw

import astroattn.ops.near_far as near_far
from astroattn import AstroConfig, AstrocyteAttention
from astroattn.ops.tiles import Layout, make_tiles


def cost(config: AstroConfig, tokens: int, **options: object) -> object:
    return AstrocyteAttention(1, 8, config).cost(tokens, tokens, **options)


def test_softmax_attention() -> None:
    attention = AstrocyteAttention(1, 8, AstroConfig(hidden="random", near=0))
    attention.exact = True
    for counted in (
        attention.cost(7, 50),
        cost(AstroConfig(near=50), 50),
        cost(AstroConfig(near=10, exact_keys=40), 50),
    ):
        assert (counted.positions, counted.products, counted.softmax, counted.ratio) == (50, 100, 100, 1)


def test_one_key_less_is_not_softmax_attention() -> None:
    qkv = draw(1, 1, 50, 8)
    exact = AstrocyteAttention(1, 8, AstroConfig(near=50))(*qkv)
    for config in (
        AstroConfig(near=10, exact_keys=39),
        AstroConfig(near=49, exact_keys=0),
        AstroConfig(exact_queries=49, near=0),
    ):
        assert cost(config, 50).products != 100
        if not config.exact_queries:
            assert not torch.equal(AstrocyteAttention(1, 8, config)(*qkv), exact)


def test_random_by_hand() -> None:
    """A key has m features and m sums to write, a query m features and m sums to read."""
    config = AstroConfig(hidden="random", num_hidden=20, near=0)
    assert vars(cost(config, 1000)) == {"positions": 20, "products": 80, "softmax": 2000}
    crossed = AstrocyteAttention(1, 8, config).cost(100, 1000)
    assert vars(crossed) == {"positions": 20, "products": 40 + 400, "softmax": 2000}


def test_hebbian_by_hand() -> None:
    """1000 tokens in tiles of 4: 250 groups, each of which reads all keys once."""
    config = AstroConfig(num_hidden=16, near=4, exact_keys=32, tile=4, steps=2)
    positions = 4 + 32 + 16
    learning = 3 * 16 + 2 + 2  # assignments; means, mean of the values, weights
    block, blocks = 16, 1000 // 16 + 16  # ceil(1000 / 64) = 16 keys in a block
    reading = 250 * (1000 + block * blocks) / 1000
    counted = cost(config, 1000)
    assert counted.positions == positions
    assert counted.products == pytest.approx(2 * positions + learning + 3 + reading)
    assert counted.ratio == pytest.approx(counted.products / 2000)


def test_near_alone_by_hand() -> None:
    counted = cost(AstroConfig(hidden="none", near=9, exact_keys=0, tile=9), 900)
    assert counted.positions == 9
    assert counted.products <= 2 * 9 + 100 + 1  # and at most a choice of keys, 100 tiles times 900 keys


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("tokens", [120, 331])
def test_positions_are_those_of_the_code(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that are exact for a query, counted where they are chosen, plus the neurons; the mean over all queries."""
    config, causal = EVERY[name]
    check_positions(config, tokens, causal, None, monkeypatch)


@pytest.mark.parametrize("grid", [(9, 13), (14, 14)])
@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_positions_in_a_grid(name: str, grid: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    check_positions(BIDIRECTIONAL[name], grid[0] * grid[1] + 2, False, grid, monkeypatch)


def check_positions(
    config: AstroConfig, tokens: int, causal: bool, grid: tuple | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = AstrocyteAttention(1, 8, config)
    expected = attention.cost(tokens, tokens, causal=causal, grid=grid).positions
    neurons = 0 if config.hidden == "none" else config.num_hidden
    if causal:  # a query in the middle of the sequence has all of its near field
        assert expected == config.near + neurons
        return
    seen: list = []
    choose = near_far.choose_exact_keys

    def note(reading: object, tiles: object, *rest: object) -> object:
        keys = choose(reading, tiles, *rest)
        per_token = near_far.exact_of_tiles(tiles, keys)[1].sum(-1)[0][tiles.inverse // tiles.slots.shape[1]]
        seen.append((len(per_token), int(per_token.sum())))
        return keys

    monkeypatch.setattr(near_far, "choose_exact_keys", note)
    monkeypatch.setattr("astroattn.ops.static.choose_exact_keys", note)
    attention(*draw(1, 1, tokens, 8), grid=grid)
    body, exact = seen[0] if seen else (tokens, 0)
    prefix = tokens - body
    total = exact + body * (prefix + neurons) + prefix * tokens
    assert expected == pytest.approx(total / tokens)


def test_cost_falls_with_the_length() -> None:
    for config in (AstroConfig(), *CAUSAL.values()):
        causal = config in CAUSAL.values()
        ratios = [cost(config, 4**power, causal=causal).ratio for power in range(5, 10)]
        assert ratios == sorted(ratios, reverse=True)


def test_number_of_tiles_is_that_of_the_code() -> None:
    where = Layout(grid=(9, 13), prefix=0, tile=4, near=4, exact_keys=0, groups=256)
    assert len(make_tiles(where, 117, torch.device("cpu")).slots) == 5 * 7
