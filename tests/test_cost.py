"""Cost: each part against the products that the code makes, sums by hand, and positions as the code gives them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from core_cases import BIDIRECTIONAL, CAUSAL, EVERY, draw, exact_mask, layout
from torch.utils.flop_counter import FlopCounterMode

from astroattn import AstroConfig, AstrocyteAttention
from astroattn.config import BY_LENGTH, is_tiled
from astroattn.cost import budget_of, count_choice, count_reading, covers
from astroattn.ops import choosing, near_far, static
from astroattn.ops.choosing import Choice, choose, expected_attention
from astroattn.ops.clustering import learn_clusters
from astroattn.ops.order import find_coordinates, position_order
from astroattn.ops.tiles import read_tiles


def cost(config: AstroConfig, tokens: int, **options: object) -> object:
    return AstrocyteAttention(1, 8, config).cost(tokens, tokens, **options)


def test_softmax_attention() -> None:
    attention = AstrocyteAttention(1, 8, AstroConfig(hidden="random"))
    attention.exact = True
    for counted in (
        attention.cost(7, 50),
        cost(AstroConfig(), 128),
        cost(AstroConfig(near=50, exact_keys=1), 50),
        cost(AstroConfig(near=10, exact_keys=50), 50),
    ):
        tokens = int(counted.positions)
        assert vars(counted) == {"positions": tokens, "products": 2 * tokens, "softmax": 2 * tokens}
        assert counted.ratio == 1


def test_one_key_less_is_not_softmax_attention() -> None:
    qkv = draw(1, 1, 50, 8)
    exact = AstrocyteAttention(1, 8, AstroConfig(near=50, exact_keys=0))(*qkv)
    for config in (
        AstroConfig(near=1, exact_keys=49),
        AstroConfig(near=49, exact_keys=0),
        AstroConfig(exact_queries=49, near=0, exact_keys=0),
    ):
        assert cost(config, 50).products != 100
        if not config.exact_queries:
            assert not torch.equal(AstrocyteAttention(1, 8, config)(*qkv), exact)


def test_random_by_hand() -> None:
    """A key has m features and m sums to write, a query m features and m sums to read."""
    config = AstroConfig(hidden="random", num_hidden=20)
    assert vars(cost(config, 1000)) == {"positions": 20, "products": 80, "softmax": 2000}
    crossed = AstrocyteAttention(1, 8, config).cost(100, 1000)
    assert vars(crossed) == {"positions": 20, "products": 40 + 400, "softmax": 2000}
    two = cost(AstroConfig(hidden="random", num_hidden=20, exact_queries=2), 100)  # which all others attend exactly
    assert (two.positions, two.products) == ((98 * 22 + 200) / 100, (98 * (4 + 80) + 2 * 200) / 100)


def test_hebbian_by_hand() -> None:
    """1024 tokens in 32 tiles of 8 sub-tiles: 10 levels of a tree, of which 8 choose."""
    config = AstroConfig(num_hidden=16, near=2, exact_keys=24, tile=32, steps=2)
    counted = AstrocyteAttention(1, 64, config).cost(1024, 1024)
    positions = 4 * 2 + 24 + 16
    assert counted.positions == positions
    directions = 8 * 64 * 8 / 1024 + 2 * 8
    tree = 8 * (8 + 3) / 2 / 8  # moments of 8 coordinates: half a product of length 8 for each, in parts of 64
    tiles = 2 + 32  # mean queries and what is left; u.k
    clusters = (3 * 16 + 2 + 8) / 8  # of 8 coordinates: distances, means, the metric
    means = 5 + 1 / 8
    keys = 2 + 16 / 4 + 2 + 72 / 4 / 8  # u_s and gains; the errors of keys, d of 72 candidates
    neighbours = 2 * 64 * 16 / 1024  # 16 sub-tiles of either order, by 16 keys
    expected = directions + tree + neighbours + tiles + clusters + means + keys + 32 + 2 * positions  # 32: the sums
    assert counted.products == pytest.approx(expected)
    assert counted.ratio == pytest.approx(counted.products / 2048)


def products(function: Callable[[], object], dim: int) -> float:
    """Products of length `dim` in all matrix products of a function."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 2 / dim


@pytest.mark.parametrize(("tokens", "prefix"), [(40, 0), (300, 5)])
def test_parts_are_the_matrix_products_of_the_code(tokens: int, prefix: int) -> None:
    where, dim = layout(prefix=prefix, tile=16, num_hidden=6, exact_keys=7, steps=3), 24
    query, key, _ = draw(1, tokens, dim)
    q, k = query[:, prefix:], key[:, prefix:]
    counted, body, few = count_choice(where, dim, tokens, tokens), tokens - prefix, 8
    # The moments of directions, c x c numbers of a sample, are left out.
    found = products(lambda: find_coordinates(q, k), dim)
    assert counted["coordinates"] == pytest.approx(found, rel=0.1)
    order = position_order(where, body, key.device)[None]
    assert counted["u.k"] == products(lambda: expected_attention(read_tiles(query, key, order, where, None)), dim)
    points, mass = draw(1, body, few, count=1)[0], torch.ones(1, body, dtype=torch.float64)
    distances = products(lambda: learn_clusters(points, mass, 6, 3), dim)
    metric_and_means = body * (3 + few) * few / dim
    assert counted["clusters"] == pytest.approx(distances + metric_and_means)


def test_reading_is_what_the_code_reads() -> None:
    """Every key exact for its sub-tile, nothing shared: one product for the logit and one for the output."""
    where, dim = layout(tile=4, near=0, exact_keys=9, num_hidden=6), 24
    query, key, value = draw(1, 64, dim)
    choice = choose(query, key, value, where)
    counted = count_reading(where, 64, 64, 9)
    found = products(lambda: near_far.attend(query, key, value, where, choice), dim)
    blocks = 64 // 4 + 6  # of keys, with their padding
    read = 64 * 2 * (9 + 6)
    tiles = 16 * 64 + 16 * 4 * blocks * 25 / 24  # u.k, and sums of blocks of 4 keys, of 1 besides the values
    assert found == pytest.approx(read + tiles)
    assert counted["read"] == read
    assert counted["sums of tiles"] == 16 * 64


@pytest.mark.parametrize("name", [name for name in EVERY if EVERY[name][0].backend != "torch"])
@pytest.mark.parametrize("tokens", [120, 331])
def test_positions_are_those_of_the_code(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that are exact for a query, counted where they are chosen, plus the neurons; the mean over all queries."""
    config, causal = EVERY[name]
    check_positions(config, tokens, causal, None, monkeypatch)


@pytest.mark.parametrize("grid", [(9, 13), (14, 14)])
@pytest.mark.parametrize("name", [name for name in BIDIRECTIONAL if BIDIRECTIONAL[name].backend != "torch"])
def test_positions_in_a_grid(name: str, grid: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    check_positions(BIDIRECTIONAL[name], grid[0] * grid[1] + 2, False, grid, monkeypatch)


def check_positions(
    config: AstroConfig, tokens: int, causal: bool, grid: tuple | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As counted, but for near keys that the queries of a sub-tile share by chance or at a border."""
    attention = AstrocyteAttention(1, 8, config)
    expected = attention.cost(tokens, tokens, causal=causal, grid=grid).positions
    neurons = 0 if config.hidden == "none" else config.num_hidden
    if causal:  # a query in the middle of the sequence has all of its near field
        assert expected == config.near + neurons
        return
    where = budget_of(config, tokens, grid).at(tokens, 8)
    neurons = where.num_hidden if neurons == BY_LENGTH else neurons
    if not is_tiled(config):  # queries outside the prefix attend to it and to the neurons
        body = tokens - where.prefix
        assert expected * tokens == pytest.approx(body * (where.prefix + neurons) + where.prefix * tokens)
        return
    seen: list[Choice] = []

    def note(*args: object) -> Choice:
        seen.append(choose(*args))
        return seen[-1]

    monkeypatch.setattr(choosing, "choose", note)
    monkeypatch.setattr(static, "choose", note)
    monkeypatch.setattr("astroattn.ops.library.choose_backend", lambda *_: "torch")
    attention(*draw(1, 1, tokens, 8), grid=grid)
    body, mask = tokens - where.prefix, exact_mask(seen[0], where)
    total = int(mask.sum()) + body * neurons
    shared = body * where.near_keys(body) - int(near_of(where, seen[0]).sum())
    assert expected * tokens == pytest.approx(total + shared)
    assert shared < 0.35 * body * where.near_keys(body) + 1


def near_of(where: object, choice: Choice) -> torch.Tensor:
    """Near keys of each query, those of its sub-tile together."""
    numbers = []
    for queries in choice.order[0].split(4):
        own = choosing.near_keys(queries, where, choice.order.shape[1]).unique().numel()
        numbers += [own] * len(queries)
    return torch.tensor(numbers)


def test_cost_falls_with_the_length() -> None:
    for config in (AstroConfig(), AstroConfig(tiles="position"), *CAUSAL.values()):
        causal = config in CAUSAL.values()
        ratios = [cost(config, 4**power, causal=causal).ratio for power in range(4, 9)]
        assert ratios == sorted(ratios, reverse=True)


@pytest.mark.parametrize("dim", [16, 32, 64, 128])
@pytest.mark.parametrize("tiles", ["content", "position"])
def test_the_default_never_costs_more_than_softmax_attention(dim: int, tiles: str) -> None:
    config = AstroConfig(tiles=tiles)
    attention = AstrocyteAttention(1, dim, config)
    for tokens in itertools.chain(range(1, 400, 7), range(400, 5000, 150)):
        counted = attention.cost(tokens, tokens)
        assert counted.ratio <= 1, tokens
        assert (counted.ratio == 1) == covers(config, tokens, None), tokens
    for side in (8, 12, 14, 16, 24, 28, 37):
        assert attention.cost(side**2 + 1, side**2 + 1, grid=(side, side)).ratio <= 1, side


def test_what_the_keys_of_cross_attention_cost_before_a_query_comes() -> None:
    """Some twenty queries of softmax attention, docs/method.md."""
    where = budget_of(AstroConfig(), 1500, None, cross=True).at(1500, 64, 1)
    assert 18 < sum(count_choice(where, 64, 1, 1500).values()) / (2 * 1500) < 22
