"""Near and far field by the Hebbian layer: dense matrices in float64, softmax attention, finite differences."""

from __future__ import annotations

from math import exp, inf, log

import pytest
import torch
from core_cases import draw, exact_mask, layout, near_far_oracle, relative
from torch import Tensor
from torch.autograd import gradcheck

from astroattn import AstroConfig, AstrocyteAttention
from astroattn.ops import near_far, plain
from astroattn.ops.choosing import Choice, choose
from astroattn.ops.clustering import learn_clusters
from astroattn.ops.layout import SUBTILE, Budget
from astroattn.ops.near_far import attend, near_far_attention
from astroattn.ops.order import Coordinates, factor, find_coordinates, near_keys
from astroattn.ops.reference import softmax_attention

SEQUENCES = [
    {"tokens": 1},
    {"tokens": 2, "near": 1, "exact_keys": 0},
    {"tokens": 3, "tile": 4},
    {"tokens": 5, "exact_keys": 1},
    {"tokens": 63},
    {"tokens": 63, "exact_keys": 0},
    {"tokens": 63, "near": 0, "exact_keys": 3},
    {"tokens": 63, "near": 0, "exact_keys": 0, "tile": 20},
    {"tokens": 63, "prefix": 1, "near": 2, "tile": 16},
    {"tokens": 63, "prefix": 5, "tile": 60, "exact_keys": 7},
    {"tokens": 63, "tile": 4, "near": 3},
    {"tokens": 197, "exact_keys": 16, "tile": 16},
    {"tokens": 500, "exact_keys": 12, "tile": 24},
    {"tokens": 63, "by_content": False, "near": 7},
    {"tokens": 63, "by_content": False, "near": 4, "tile": 12, "prefix": 3, "exact_keys": 0},
    {"tokens": 200, "by_content": False, "near": 48, "tile": 64},
    {"tokens": 500, "by_content": False, "near": 24, "tile": 16, "prefix": 1},
]
GRIDS = [
    {"tokens": 16, "grid": (4, 4), "exact_keys": 3},
    {"tokens": 197, "grid": (14, 14), "prefix": 1, "exact_keys": 16},
    {"tokens": 68, "grid": (9, 7), "prefix": 5, "near": 4},
    {"tokens": 68, "grid": (9, 7), "prefix": 5, "near": 9, "by_content": False, "exact_keys": 0},
    {"tokens": 70, "grid": (5, 14), "near": 16, "tile": 16, "by_content": False},
    {"tokens": 31, "grid": (1, 30), "prefix": 1, "near": 6},
    {"tokens": 30, "grid": (30, 1), "near": 6, "by_content": False},
]


def case(shape: dict, size: int = 3, dim: int = 6, dtype: torch.dtype = torch.float64, scale: float = 1.3) -> tuple:
    shape = dict(shape)
    return *draw(size, shape.pop("tokens"), dim, scale=scale, dtype=dtype), layout(**shape)


def draw_bias(tokens: int, size: int = 3) -> Tensor:
    """Large enough to decide what is attended to: the logits of `case` have a standard deviation of 4."""
    return draw(size, tokens, tokens, scale=2.0, count=1)[0]


def name(shape: dict) -> str:
    return " ".join(f"{key}={value}" for key, value in shape.items()).replace(",", "")


def picked(*numbers: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("shape", [(SEQUENCES + GRIDS)[number] for number in numbers], ids=name)


BIASED = pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])


@BIASED
@pytest.mark.parametrize("num_hidden", [0, 1, 7])
@pytest.mark.parametrize("shape", SEQUENCES + GRIDS, ids=name)
def test_equals_dense_matrices(shape: dict, num_hidden: int, biased: bool) -> None:
    if num_hidden == 0 and not shape.get("near", 1) and not shape.get("exact_keys", 4):
        pytest.skip("no keys")
    *qkv, where = case(shape | {"num_hidden": num_hidden})
    bias = draw_bias(shape["tokens"]) if biased else None
    out, normaliser = near_far_attention(*qkv, where, bias)
    oracle, oracle_normaliser = near_far_oracle(*qkv, where, bias=bias)
    torch.testing.assert_close(out, oracle, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(normaliser, oracle_normaliser, rtol=1e-9, atol=1e-9)


@picked(4, 10, 13, 15, 18, 21)
def test_equals_dense_matrices_where_exact_keys_fill_a_cluster(shape: dict) -> None:
    """Larger logits: little is left of some sums without the exact keys, and it still counts."""
    *qkv, where = case(shape, dim=16, scale=2**0.5 * 1.3)
    out, normaliser = near_far_attention(*qkv, where)
    oracle, oracle_normaliser = near_far_oracle(*qkv, where)
    torch.testing.assert_close(out, oracle, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(normaliser, oracle_normaliser, rtol=1e-8, atol=1e-8)


# What is chosen, in loops over the formulas of `ops.near_far`, for one sequence.


@BIASED
@pytest.mark.parametrize("key_error", [0, 100_000], ids=["", "error"])
@picked(4, 6, 8, 9, 13, 15, 18, 19, 21)
def test_choices(shape: dict, key_error: float, biased: bool) -> None:
    """Clusters in the metric of r, weighted by the expected attention; exact keys by what they bring to a sub-tile."""
    query, key, value, where = case(shape | {"key_error": key_error}, size=1)
    bias = draw_bias(shape["tokens"], 1) if biased else None
    choice = choose(query, key, value, where, bias)
    prefix, m = where.prefix, where.num_hidden
    k, q, v, every = key[0, prefix:], query[0, prefix:], value[0, prefix:], key[0]
    body = len(k)
    assert sorted(choice.order[0].tolist()) == list(range(body))
    tiles = choice.order[0].split(where.tile)
    found = find_coordinates(query[:, prefix:], key[:, prefix:])
    few_q = found.query[0]
    u = [q[tile].mean(0) for tile in tiles]
    b = query.new_zeros(body, len(every)) if bias is None else bias[0, prefix:]
    logits = [every @ u[t] + b[tile].mean(0) for t, tile in enumerate(tiles)]
    both = [logits[t].softmax(0) * len(tile) / body for t, tile in enumerate(tiles)]
    expected = [x[prefix:] for x in both]
    mass = sum(expected)
    few_rest = torch.cat([few_q[tile] - few_q[tile].mean(0) for tile in tiles])
    points = found.key @ factor(few_rest.mT @ few_rest / body)
    assert torch.equal(choice.winners, learn_clusters(points, mass[None], m, where.steps))

    b = b[:, prefix:]
    before = [x[:prefix] for x in both], every[:prefix]
    keys = keys_by_formula(q, k, v, b, where, tiles, expected, before, mass, choice.winners[0].tolist(), found)
    ours = [{i for i in keys.tolist() if i >= 0} for keys in choice.keys[0]]
    assert [len(each) for each in ours] == [int((keys >= 0).sum()) for keys in choice.keys[0]]  # none twice
    assert ours == keys

    exact = exact_mask(choice, where)[0, prefix:, prefix:]
    left = sum(share * (~exact[tile]).double().mean(0) for share, tile in zip(expected, tiles, strict=True))
    for cluster in choice.winners[0].unique():  # up to a factor of the cluster's own
        members = choice.winners[0] == cluster
        mine, theirs = choice.mass[0][members], (left + 1e-12 * mass)[members]
        torch.testing.assert_close(mine, theirs / theirs.max(), rtol=1e-9, atol=1e-9 * float(mine.max()))


def keys_by_formula(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    b: torch.Tensor,
    where: object,
    tiles: tuple,
    expected: list,
    before: tuple,
    mass: torch.Tensor,
    winners: list[int],
    found: Coordinates,
) -> list[set[int]]:
    """The exact keys of each sub-tile, by the two levels of `choose_keys`."""
    body, m = len(k), where.num_hidden

    def less_its_mean(x: torch.Tensor) -> tuple:
        means = []
        for j in range(m):
            own = torch.tensor([winner == j for winner in winners])
            means.append((mass[own, None] * x[own]).sum(0) / mass[own].sum() if own.any() else x[0] * 0)
        means = torch.stack(means)
        return means, x - means[winners]

    w, offset = less_its_mean(k)
    along = less_its_mean(found.key[0])[1]
    error_of_value = [log(float(x.norm())) if x.any() else log(1e-300) for x in less_its_mean(v)[1]]

    def root(log_value: float, miss: float, of_bias: float) -> float:
        """log (|v|^2 miss + of_bias)^1/2, also where |v|^2 is too small for a number."""
        squares = torch.tensor([2 * log_value + log(miss), log(of_bias) if of_bias else -inf], dtype=torch.float64)
        return float(squares.logsumexp(0)) / 2

    centre_of_values = (mass[:, None] * v).sum(0) / mass.sum()
    distance = [float((row - centre_of_values).square().sum()) for row in v]
    least = where.least_error(body, q.shape[1]) * float((v - v.mean(0)).square().sum(1).mean()) ** 0.5
    rest = [q[tile] - q[tile].mean(0) for tile in tiles]
    rest_of_bias = [b[tile] - b[tile].mean(0) for tile in tiles]
    centre = [[part.mean(0) for part in r.split(SUBTILE)] for r in rest]
    within = torch.zeros(body, dtype=torch.float64)
    between = torch.zeros(body, dtype=torch.float64)
    for r, of_tile in zip(rest, centre, strict=True):
        for part, mean in zip(r.split(SUBTILE), of_tile, strict=True):
            within += sum((offset * (row - mean)).square().sum(1) for row in part) / body
            between += len(part) * (offset * mean).square().sum(1) / body
    chosen = []
    for t, tile in enumerate(tiles):
        share = [sum(float(expected[t][i]) for i in range(body) if winners[i] == j) for j in range(m)]
        gains, totals, (of_prefix, prefix) = [], [], before
        for mean in centre[t]:
            drive = [float(mean @ w[j]) for j in range(m)]
            total = sum(share[j] * exp(drive[j]) for j in range(m))
            total += sum(float(given * (mean @ k_).exp()) for given, k_ in zip(of_prefix[t], prefix, strict=True))
            totals.append(log(total))
            gains.append([d - log(total) for d in drive])
        of_bias = rest_of_bias[t].square().mean(0)
        score = [
            log(expected[t][i])
            + max(gain[winners[i]] for gain in gains)
            + root(error_of_value[i], float(within[i] + between[i]) + 1e-6, distance[i] * float(of_bias[i]))
            for i in range(body)
        ]
        best = sorted(range(body), key=score.__getitem__, reverse=True)[: min(3 * where.exact_keys, body)]
        best = [i for i in best if exp(score[i]) > least]
        parts = zip(centre[t], totals, rest_of_bias[t].split(SUBTILE), tile.split(SUBTILE), strict=True)
        for mean, total, of_bias, queries in parts:
            near = set(near_keys(queries, where, body).flatten().tolist())

            def gain(
                i: int, mean: torch.Tensor = mean, total: float = total, of_bias: torch.Tensor = of_bias, t: int = t
            ) -> float:
                d = float(mean @ found.query_basis[0] @ along[i])
                miss = (1 - exp(-min(max(d, -8), 8))) ** 2 + float(within[i]) + 1e-6
                d_b = float(of_bias[:, i].mean())
                miss_b = (1 - exp(-min(max(d_b, -8), 8))) ** 2 + float(of_bias[:, i].var(correction=0))
                error = root(error_of_value[i], miss, distance[i] * miss_b)
                return log(expected[t][i]) - total + float(mean @ w[winners[i]]) + d + d_b + error

            far = sorted((i for i in best if i not in near and exp(gain(i)) > least), key=gain, reverse=True)
            chosen.append(near | set(far[: where.exact_keys]))
    return chosen


@BIASED
@picked(4, 8, 13)
def test_without_clusters_the_keys_of_most_attention_are_chosen(shape: dict, biased: bool) -> None:
    """Of a tile's mean query, then of a sub-tile's in a few coordinates, which here are all."""
    query, key, value, where = case(shape | {"num_hidden": 0}, size=1)
    bias = draw_bias(shape["tokens"], 1) * biased
    choice, prefix = choose(query, key, value, where, bias), where.prefix
    q, k, b = query[0, prefix:], key[0, prefix:], bias[0, prefix:, prefix:]
    numbers = iter(choice.keys[0])
    for tile in choice.order[0].split(where.tile):
        best = (k @ q[tile].mean(0) + b[tile].mean(0)).topk(min(3 * where.exact_keys, len(k))).indices.tolist()
        for queries in tile.split(SUBTILE):
            near = set(near_keys(queries, where, len(k)).flatten().tolist())
            score = k @ q[queries].mean(0) + b[queries].mean(0)
            far = sorted((i for i in best if i not in near), key=lambda i, score=score: float(score[i]), reverse=True)
            keys = next(numbers)
            assert {i for i in keys.tolist() if i >= 0} == near | set(far[: where.exact_keys])


def test_content_tiles_do_not_know_the_order_of_the_queries() -> None:
    *qkv, where = case({"tokens": 60, "near": 0})
    order = torch.randperm(60)
    ours = near_far_attention(qkv[0][:, order], *qkv[1:], where)
    for mine, other in zip(ours, near_far_attention(*qkv, where), strict=True):
        torch.testing.assert_close(mine, other[:, order], rtol=1e-9, atol=1e-9)


# Gradients, the normaliser's share included.


@BIASED
@picked(5, 8, 10, 13, 18, 20)
def test_gradients_equal_those_of_dense_matrices(shape: dict, biased: bool) -> None:
    *qkv, where = case(shape)
    bias = draw_bias(shape["tokens"]) if biased else None
    choice = choose(*qkv, where, bias)
    inputs = [x.requires_grad_() for x in (*qkv, bias) if x is not None]
    readers = torch.randn_like(qkv[2]), torch.randn(qkv[2].shape[:2], dtype=torch.float64)

    def gradients(out: torch.Tensor, normaliser: torch.Tensor) -> tuple:
        return torch.autograd.grad((out * readers[0]).sum() + (normaliser * readers[1]).sum(), inputs)

    oracle = gradients(*near_far_oracle(*qkv, where, choice, bias))
    for ours, theirs in zip(gradients(*near_far_attention(*qkv, where, bias)), oracle, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "shape",
    [
        {"tokens": 10, "tile": 4, "exact_keys": 2},
        {"tokens": 11, "near": 3, "tile": 8, "exact_keys": 2, "by_content": False, "prefix": 1},
        {"tokens": 13, "grid": (3, 4), "prefix": 1, "exact_keys": 2},
        {"tokens": 10, "near": 0, "exact_keys": 2, "tile": 12},
    ],
    ids=name,
)
@pytest.mark.parametrize("num_hidden", [0, 3])
def test_gradients_equal_finite_differences(shape: dict, num_hidden: int) -> None:
    *qkv, where = case(shape | {"num_hidden": num_hidden}, size=1, dim=3)
    choice = choose(*qkv, where)
    assert gradcheck(lambda *x: attend(*x, where, choice), [x.requires_grad_() for x in qkv], eps=1e-7, atol=1e-5)


@picked(8, 12, 16, 18, 21)
def test_choices_of_a_kernel_serve_as_well(shape: dict) -> None:
    """Indices of 32 bits, masses with a factor of each cluster's own, keys in any order and more places than keys."""
    *qkv, where = case(shape)
    qkv = [x.requires_grad_() for x in qkv]
    choice = choose(*qkv, where)
    factors = torch.rand(len(qkv[0]), where.num_hidden, dtype=torch.float64) + 0.5
    keys = torch.nn.functional.pad(choice.keys.flip(-1), (0, 3), value=-1)
    mass = choice.mass * factors.gather(1, choice.winners)
    theirs = Choice(choice.order.int(), choice.winners.int(), mass, keys.int())

    def gradients(out: torch.Tensor, normaliser: torch.Tensor) -> tuple:
        return out, normaliser, *torch.autograd.grad(out.square().sum() + normaliser.square().sum(), qkv)

    whole = gradients(*near_far_attention(*qkv, where))
    torch.testing.assert_close(gradients(*attend(*qkv, where, choice)), whole, rtol=0, atol=0)
    torch.testing.assert_close(gradients(*attend(*qkv, where, theirs)), whole, rtol=1e-9, atol=1e-9)


@BIASED
@picked(9, 12, 16)
def test_tiles_in_slices_change_nothing(shape: dict, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    *qkv, where = case(shape)
    bias = draw_bias(shape["tokens"]) if biased else None
    whole = near_far_attention(*qkv, where, bias)
    monkeypatch.setattr(near_far, "LOGITS", 2 * 3 * where.tile * 60)  # a tile or a few at once
    torch.testing.assert_close(near_far_attention(*qkv, where, bias), whole, rtol=1e-12, atol=1e-12)


# What must come out exactly.


@pytest.mark.parametrize("num_hidden", [0, 4])
@pytest.mark.parametrize(
    "shape",
    [
        {"tokens": 40, "near": 40, "exact_keys": 0},
        {"tokens": 40, "near": 10, "exact_keys": 40},
        {"tokens": 40, "near": 0, "exact_keys": 40},
        {"tokens": 41, "prefix": 1, "near": 6, "exact_keys": 40, "tile": 16, "by_content": False},
        {"tokens": 31, "grid": (5, 6), "prefix": 1, "near": 30, "exact_keys": 0},
        {"tokens": 30, "grid": (5, 6), "near": 4, "exact_keys": 30},
    ],
    ids=name,
)
def test_is_softmax_attention_where_every_key_is_exact(shape: dict, num_hidden: int) -> None:
    *qkv, where = case(shape | {"num_hidden": num_hidden})
    ours = near_far_attention(*qkv, where)
    torch.testing.assert_close(ours, softmax_attention(*qkv), rtol=1e-10, atol=1e-10)


@picked(5, 7, 16, 19, 20)
def test_far_field_is_exact_with_a_cluster_for_every_key(shape: dict) -> None:
    *qkv, where = case(shape | {"num_hidden": 8 * shape["tokens"]})
    torch.testing.assert_close(near_far_attention(*qkv, where), softmax_attention(*qkv), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("exact_keys", [0, 3])
def test_far_field_is_exact_where_the_keys_of_a_cluster_are_equal(exact_keys: int) -> None:
    query, _, value = draw(2, 60, 6)
    key = torch.randn(2, 4, 6, dtype=torch.float64)[:, torch.arange(60) // 15]
    ours = near_far_attention(query, key, value, layout(exact_keys=exact_keys, num_hidden=4))
    torch.testing.assert_close(ours, softmax_attention(query, key, value), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("by_content", [False, True])
def test_mean_query_of_a_tile_reads_every_key_without_error(by_content: bool) -> None:
    """All queries of a tile are their mean: neighbours, or wherever they stand."""
    query, key, value = draw(2, 60, 6)
    query = query[:, torch.arange(60) % 15 if by_content else torch.arange(60) // 4]
    where = layout(exact_keys=0, near=0, tile=4, num_hidden=2, steps=1, by_content=by_content)
    ours = near_far_attention(query, key, value, where)
    torch.testing.assert_close(ours, softmax_attention(query, key, value), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SEQUENCES + GRIDS, ids=name)
def test_near_and_far_partition_the_keys(shape: dict) -> None:
    """Without any difference between queries and keys, every key weighs the same: none is missing, none is double."""
    _, _, value, where = case(shape)
    zero = torch.zeros_like(value)
    out, normaliser = near_far_attention(zero, zero, value, where)
    torch.testing.assert_close(out, value.mean(1, keepdim=True).expand_as(out))
    torch.testing.assert_close(normaliser.exp(), torch.full_like(normaliser, value.shape[1]))


@picked(4, 11, 15, 18, 21)
def test_weights_are_positive_and_sum_to_one(shape: dict) -> None:
    query, key, _, where = case(shape)
    eye = torch.eye(query.shape[1], dtype=torch.float64).expand(len(query), -1, -1)
    weights, _ = near_far_attention(query, key, eye, where)
    assert weights.min() > -1e-12
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2], dtype=torch.float64))


@picked(5, 11, 15, 19)
def test_does_not_change_when_all_keys_move(shape: dict) -> None:
    query, key, value, where = case(shape)
    moved = key - torch.randn(len(key), 1, key.shape[2], dtype=torch.float64)
    ours = near_far_attention(query, key, value, where)[0]
    theirs = near_far_attention(query, moved, value, where)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


# Rounding. Nothing is subtracted that would lose digits: errors are those of softmax attention itself.


@pytest.mark.parametrize("largest", [10.0, 100.0, 300.0])
@picked(4, 7, 11, 13, 16, 18, 21)
def test_single_precision_follows_the_oracle(shape: dict, largest: float) -> None:
    """At most 4 times the error that softmax attention makes in float32 on such logits, gradients 8 times."""
    *qkv, where = case(shape, dim=16)
    qkv = with_logits(qkv, largest, torch.float32)
    choice = choose(*qkv, where)
    ours = with_gradients(lambda *x: attend(*x, where, choice), qkv)
    exact = [x.double() for x in qkv]
    oracle = with_gradients(lambda *x: near_far_oracle(*x, where, choice), exact)
    theirs, softmax = (with_gradients(softmax_attention, x) for x in (qkv, exact))
    for mine, wanted, rounded, right, most in zip(ours, oracle, theirs, softmax, (4, 4, 8, 8, 8), strict=True):
        assert relative(mine, wanted) < most * (relative(rounded, right) + 2e-7)


@pytest.mark.parametrize("largest", [10.0, 100.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("by_content", [False, True])
def test_low_precision_follows_the_oracle(dtype: torch.dtype, largest: float, by_content: bool) -> None:
    """Of queries, keys and values as they are given: the error is that of rounding the results."""
    qkv = [x[:, None] for x in with_logits(draw(2, 150, 16, scale=1.3), largest, dtype)]
    budget = Budget(None, 1, 16, by_content, 4, 8, 7, 2)
    out, log_p, *chosen = plain.near_far_forward(*qkv, None, None, budget, 1.0)
    weight = torch.randn(out.shape).to(dtype)
    grads = plain.near_far_backward(weight, torch.ones_like(log_p), *qkv, None, *chosen, None, budget, 1.0)
    exact = [x[:, 0].double().requires_grad_() for x in qkv]
    oracle, oracle_log_p = near_far_oracle(*exact, budget.at(150, 16), Choice(*(x[:, 0] for x in chosen)))
    wanted = torch.autograd.grad((oracle * weight[:, 0]).sum() + oracle_log_p.sum(), exact)
    assert relative(out[:, 0], oracle) < torch.finfo(dtype).eps / 2 + 2e-6 * largest
    torch.testing.assert_close(log_p[:, 0].double(), oracle_log_p, rtol=1e-6, atol=1e-5)
    for mine, theirs in zip(grads, wanted, strict=True):
        assert relative(mine[:, 0], theirs) < torch.finfo(dtype).eps / 2 + 5e-6 * largest


def with_logits(qkv: list, largest: float, dtype: torch.dtype) -> list:
    """Queries such that the largest logit is so large."""
    query, key, value = qkv
    query = query * largest / (query @ key.mT).abs().max()
    return [x.to(dtype) for x in (query, key, value)]


def with_gradients(attention: object, qkv: list) -> list:
    """Output and normaliser, and the gradients of what reads both."""
    qkv = [x.detach().requires_grad_() for x in qkv]
    out, normaliser = attention(*qkv)
    reader = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, normaliser, *torch.autograd.grad((out * reader).sum() + normaliser.sum(), qkv)]


@pytest.mark.parametrize("scale", [10.0, 100.0])
@picked(4, 11, 16, 18, 21)
def test_stays_finite_with_huge_logits(shape: dict, scale: float) -> None:
    *qkv, where = case(shape, dim=16, dtype=torch.float32)
    qkv = [qkv[0] * scale, qkv[1] * scale, qkv[2].requires_grad_()]
    out, normaliser = near_far_attention(*qkv, where)
    assert out.isfinite().all()
    assert out.abs().max() <= qkv[2].abs().max() * 1.001  # a weighted mean of the values
    assert not normaliser.isnan().any()
    assert torch.autograd.grad(out.sum(), qkv[2])[0].isfinite().all()


# Sequences of different lengths, in `ops.plain`.

LENGTHS = [63, 40, 7, 3, 1, 0]
BUDGETS = {
    "content": Budget(None, 0, 8, True, 1, 4, 5, 2),
    "position": Budget(None, 2, 12, False, 6, 3, 5, 2),
    "by length": Budget(None, 0, -1, True, -1, 5, -1, 2),
    "no far field": Budget(None, 0, 8, True, 1, 4, 0, 2),
}


@pytest.mark.parametrize("of_bias", [None, (6, 1), (1, 2)], ids=["", "bias of sequences", "bias of heads"])
@pytest.mark.parametrize("name", BUDGETS)
def test_each_row_is_as_long_as_it_is(name: str, of_bias: tuple[int, int] | None) -> None:
    """Every row is what the oracle makes of it alone; in one pass with gradients, and in two given what was chosen."""
    budget, lengths = BUDGETS[name], torch.tensor(LENGTHS)
    qkv, bias = draw(6, 2, 63, 8), None if of_bias is None else draw(*of_bias, 63, 63, count=1)[0]
    real = torch.arange(63) < lengths[:, None, None]
    if of_bias == (6, 1):  # that of padding may be anything
        bias = bias.masked_fill(~(real & real.mT)[:, None], torch.nan)
    inputs = [x.requires_grad_() for x in (*qkv, bias) if x is not None]
    weight, log_weight = torch.randn(6, 2, 63, 8, dtype=torch.float64), torch.randn(6, 2, 63, dtype=torch.float64)
    found = plain.near_far_attention(*qkv, bias, lengths, budget, 0.3)
    out, log_p, *chosen = plain.near_far_forward(*qkv, bias, lengths, budget, 0.3)
    loss = 0
    for row, length in enumerate(LENGTHS):
        own = qkv[0].new_zeros(2, length, length)
        if bias is not None:
            own = bias[row % len(bias), :, :length, :length].expand_as(own)
        mine = [x[row, :, :length] for x in qkv]
        assert not out[row, :, length:].any()
        assert (log_p[row, :, length:] == -torch.inf).all()
        if length == 0:
            continue
        if length <= budget.prefix:
            oracle = softmax_attention(mine[0] * 0.3, *mine[1:], bias=own)
        else:
            oracle = near_far_oracle(mine[0] * 0.3, *mine[1:], budget.at(length, 8), bias=own)
        for ours, theirs in zip((out, log_p), oracle, strict=True):
            torch.testing.assert_close(ours[row, :, :length], theirs, rtol=1e-9, atol=1e-9)
        loss = loss + (oracle[0] * weight[row, :, :length]).sum()
        loss = loss + (oracle[1] * log_weight[row, :, :length]).sum()
    expected = torch.autograd.grad(loss, inputs)
    for ours, theirs in zip(found, (out, log_p), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    seen = found[0] * weight, (found[1] * log_weight)[real.expand_as(log_p)]
    ours = torch.autograd.grad(seen[0].sum() + seen[1].sum(), inputs)
    again = plain.near_far_backward(weight, log_weight * real, *qkv, bias, *chosen, lengths, budget, 0.3)
    for mine, other, wanted in zip(ours, again, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(other, wanted, rtol=1e-6, atol=1e-6)  # the masses came in float32
        assert len(mine) == 1 or not mine.masked_select(~real[..., None]).any()


@pytest.mark.parametrize("name", BUDGETS)
def test_what_was_chosen_is_laid_out_for_the_longest_row(name: str) -> None:
    """Behind a row's own tokens, sub-tiles and keys: places of which nothing may be read."""
    budget, lengths = BUDGETS[name], torch.tensor(LENGTHS)
    qkv = draw(6, 2, 63, 8, dtype=torch.float32)
    _, _, order, winners, mass, keys = plain.near_far_forward(*qkv, None, lengths, budget, 0.3)
    body, whole = 63 - budget.prefix, budget.at(63, 8)
    assert order.shape == winners.shape == mass.shape == (6, 2, body)
    assert keys.shape == (6, 2, -(-body // SUBTILE), whole.most_keys(body))
    assert order.dtype == winners.dtype == keys.dtype == torch.int32
    for row, length in enumerate(LENGTHS):
        own = max(length - budget.prefix, 0)
        for head in range(2):
            assert sorted(order[row, head, :own].tolist()) == list(range(own))
        assert keys[row].max() < max(own, 1)
        assert (keys[row, :, -(-own // SUBTILE) :] == -1).all()


def test_the_gradient_leaves_out_what_the_mass_moves() -> None:
    """Against differences over steps too small to change a choice: some per cent, and no more."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, weight = torch.randn(4, 1, 2, 96, 8, generator=generator, dtype=torch.float64)
    bias = torch.randn(1, 2, 96, 96, generator=generator, dtype=torch.float64)
    inputs = [(2 * x).requires_grad_() for x in (query, key, bias)]
    config = AstroConfig(num_hidden=4, near=0, exact_keys=8, tile=16, backend="torch")
    core = AstrocyteAttention(2, 8, config)

    def loss(query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
        return (core(query, key, value, bias=bias) * weight).sum()

    gradients = torch.autograd.grad(loss(*inputs), inputs)
    for place, (gradient, most) in enumerate(zip(gradients, (0.08, 0.14, 0.08), strict=True)):
        errors, slopes = [], []
        for _ in range(20):
            steps = [torch.zeros_like(x) for x in inputs]
            steps[place] = 1e-6 * torch.randn(steps[place].shape, generator=generator, dtype=torch.float64)
            ahead, behind = (loss(*(x + sign * y for x, y in zip(inputs, steps, strict=True))) for sign in (1, -1))
            slopes.append((ahead - behind).detach() / 2)
            errors.append((gradient * steps[place]).sum() - slopes[-1])
        share = (torch.stack(errors).norm() / torch.stack(slopes).norm()).item()
        assert 0.005 < share < most
