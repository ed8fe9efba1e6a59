"""Near and far field by the Hebbian layer: dense matrices in float64, softmax attention, finite differences."""

from __future__ import annotations

import pytest
import torch
from core_cases import draw, layout, near_far_oracle, relative
from torch.autograd import gradcheck

from astroattn.ops.clustering import learn_clusters
from astroattn.ops.near_far import Choice, attend, choose, near_far_attention
from astroattn.ops.reference import softmax_attention
from astroattn.ops.tiles import make_tiles

SEQUENCES = [
    {"tokens": 1},
    {"tokens": 2, "near": 1, "exact_keys": 0},
    {"tokens": 63},
    {"tokens": 63, "exact_keys": 0},
    {"tokens": 63, "prefix": 1, "near": 7, "tile": 5},
    {"tokens": 63, "prefix": 5, "near": 0, "tile": 58, "exact_keys": 0},
    {"tokens": 63, "tile": 1, "near": 3},
    {"tokens": 197, "near": 8, "exact_keys": 16},
    {"tokens": 500, "exact_keys": 12},
    {"tokens": 500, "prefix": 1, "tile": 16, "near": 48, "exact_keys": 0},
    # groups shared by tiles: what is near is taken out of the group's sums
    {"tokens": 63, "groups": 5, "near": 6},
    {"tokens": 63, "groups": 1, "prefix": 5},
    {"tokens": 200, "groups": 7, "exact_keys": 0, "near": 12},
    {"tokens": 40, "groups": 9, "near": 12, "tile": 4},
]
GRIDS = [
    {"tokens": 16, "grid": (4, 4), "exact_keys": 3},
    {"tokens": 197, "grid": (14, 14), "prefix": 1, "exact_keys": 16},
    {"tokens": 68, "grid": (9, 7), "prefix": 5, "near": 9},
    {"tokens": 68, "grid": (9, 7), "prefix": 5, "near": 25, "tile": 8, "exact_keys": 0},
    {"tokens": 70, "grid": (5, 14), "near": 16, "tile": 16, "groups": 4},
    {"tokens": 31, "grid": (1, 30), "prefix": 1, "near": 6},
    {"tokens": 30, "grid": (30, 1), "near": 6},
]
LENGTHS = [
    {"tokens": 63, "lengths": [63, 40, 7, 1, 0]},
    {"tokens": 63, "lengths": [62, 41, 7, 3, 0], "prefix": 5, "near": 6},
    {"tokens": 63, "lengths": [63, 40, 7, 1, 0], "groups": 5},
    {"tokens": 63, "lengths": [33, 40, 20, 17, 0], "groups": 10, "near": 8, "prefix": 1},
    {"tokens": 63, "lengths": [20, 19, 18, 5, 0], "groups": 5, "near": 12, "exact_keys": 0},
]


def case(shape: dict, size: int = 3, dim: int = 6, dtype: torch.dtype = torch.float64, scale: float = 1.3) -> tuple:
    shape = dict(shape)
    tokens = shape.pop("tokens")
    if "lengths" in shape:
        shape["lengths"] = torch.tensor(shape["lengths"])
        size = len(shape["lengths"])
    return *draw(size, tokens, dim, scale=scale, dtype=dtype), layout(**shape)


def name(shape: dict) -> str:
    return " ".join(f"{key}={value}" for key, value in shape.items()).replace(",", "")


@pytest.mark.parametrize("num_hidden", [0, 1, 7])
@pytest.mark.parametrize("shape", SEQUENCES + GRIDS + LENGTHS, ids=name)
def test_equals_dense_matrices(shape: dict, num_hidden: int) -> None:
    if num_hidden == 0 and not shape.get("near", 4) and not shape.get("prefix"):
        pytest.skip("no keys")
    *qkv, where = case(shape)
    out, normaliser = near_far_attention(*qkv, where, num_hidden=num_hidden, steps=2)
    oracle, oracle_normaliser = near_far_oracle(*qkv, where, num_hidden, 2)
    torch.testing.assert_close(out, oracle, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(normaliser, oracle_normaliser, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [SEQUENCES[10], SEQUENCES[12], GRIDS[4], LENGTHS[2]], ids=name)
def test_equals_dense_matrices_where_near_keys_fill_a_cluster(shape: dict) -> None:
    """Larger logits: little is left of some sums once the near keys are taken out, and it still counts."""
    *qkv, where = case(shape, dim=16, scale=2**0.5 * 1.3)
    out, normaliser = near_far_attention(*qkv, where, num_hidden=7, steps=2)
    oracle, oracle_normaliser = near_far_oracle(*qkv, where, 7, 2)
    torch.testing.assert_close(out, oracle, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(normaliser, oracle_normaliser, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", [SEQUENCES[4], SEQUENCES[10], SEQUENCES[11], GRIDS[2], LENGTHS[1]], ids=name)
def test_choices(shape: dict) -> None:
    """Clusters in the metric of r, weighted by the expected attention; exact keys by exp(u.k) times their error."""
    query, key, value, where = case(shape, size=1)
    query, key, value = query[:1], key[:1], value[:1]  # the first sequence of `LENGTHS` has padding too
    where = layout(**(vars(where) | ({} if where.lengths is None else {"lengths": where.lengths[:1]})))
    length, prefix, m, e = int(key.shape[1] if where.lengths is None else where.lengths[0]), where.prefix, 5, 4
    tiles = make_tiles(where, key.shape[1], key.device)
    choice = choose(query, key, value, where, num_hidden=m, steps=2)

    q, k, v = query[0, prefix:length], key[0, :length], value[0, prefix:length]
    tile_of = (tiles.inverse // tiles.slots.shape[1])[: length - prefix]
    group_of = tiles.group[0, tile_of]
    groups = sorted(set(group_of.tolist()))
    u = {g: q[group_of == g].mean(0) for g in groups}
    rest = q - torch.stack([u[g] for g in group_of.tolist()])
    mass = sum((k @ u[g]).softmax(0)[prefix:] * (group_of == g).double().mean() for g in groups)
    points = k[prefix:] * rest.square().mean(0).sqrt()
    own, distance = learn_clusters(points[None], mass[None], m, 2, None)
    assert choice.winners[0, : length - prefix].tolist() == own[0].tolist()
    one_hot = torch.nn.functional.one_hot(own[0], m).double() * mass[:, None]
    mean = (one_hot / one_hot.sum(0)).T @ v
    expected = distance[0].sqrt() * (v - mean[own[0]]).norm(dim=1)
    far_mass = torch.zeros(length - prefix, dtype=torch.float64)
    for g in groups:
        score = (k[prefix:] @ u[g]).exp() * expected
        for t in set(tile_of[group_of == g].tolist()):
            score[tiles.near[0, t][tiles.near_mask[0, t]]] = 0
        best = {key for key in score.topk(min(e, len(score))).indices.tolist() if score[key] > 0}
        chosen = choice.keys[0, g][choice.keys[0, g] >= 0].tolist()
        assert set(chosen) == best
        assert len(chosen) == len(best)
        share = (k @ u[g]).softmax(0)[prefix:] * (group_of == g).double().mean()
        share[chosen] = 0
        for t in set(tile_of.tolist()) if len(set(tile_of.tolist())) <= where.groups else ():
            if tiles.group[0, t] == g:
                share[tiles.near[0, t][tiles.near_mask[0, t]]] = 0
        far_mass += share
    for cluster in range(m):  # up to a factor of the cluster's own
        members = own[0] == cluster
        ours = choice.mass[0, : length - prefix][members]
        torch.testing.assert_close(ours * far_mass[members].sum(), far_mass[members] * ours.sum())
    assert not choice.mass[0, length - prefix :].any()


@pytest.mark.parametrize("shape", [SEQUENCES[3], SEQUENCES[12], GRIDS[2], LENGTHS[1], LENGTHS[2]], ids=name)
def test_gradients_equal_those_of_dense_matrices(shape: dict) -> None:
    *qkv, where = case(shape)
    qkv = [x.requires_grad_() for x in qkv]
    readers = torch.randn_like(qkv[2]), torch.randn(qkv[2].shape[:2], dtype=torch.float64)

    def gradients(attention: object) -> tuple:
        out, normaliser = attention(*qkv, where, num_hidden=5, steps=2)
        loss = (out * readers[0]).sum() + (normaliser.masked_fill(normaliser.isinf(), 0) * readers[1]).sum()
        return torch.autograd.grad(loss, qkv)

    oracle = gradients(lambda *args, num_hidden, steps: near_far_oracle(*args, num_hidden, steps))
    for ours, theirs in zip(gradients(near_far_attention), oracle, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "shape",
    [
        {"tokens": 10, "near": 3, "tile": 2, "exact_keys": 2},
        {"tokens": 11, "near": 3, "tile": 2, "exact_keys": 2, "groups": 2, "prefix": 1},
        {"tokens": 13, "grid": (3, 4), "prefix": 1, "exact_keys": 2},
        {"tokens": 7, "near": 2, "tile": 2, "exact_keys": 1, "lengths": [7, 4, 0]},
    ],
    ids=name,
)
@pytest.mark.parametrize("num_hidden", [0, 3])
def test_gradients_equal_finite_differences(shape: dict, num_hidden: int) -> None:
    *qkv, where = case(shape, size=1, dim=3)
    choice = choose(*qkv, where, num_hidden=num_hidden, steps=1)

    def attend_finite(*qkv: torch.Tensor) -> tuple:
        out, normaliser = attend(*qkv, where, choice, num_hidden)
        return out, normaliser[normaliser.isfinite()]  # the normaliser's share is checked too

    assert gradcheck(attend_finite, [x.requires_grad_() for x in qkv], eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("shape", [SEQUENCES[4], SEQUENCES[10], GRIDS[1], LENGTHS[2]], ids=name)
def test_choices_of_a_kernel_serve_as_well(shape: dict) -> None:
    """Indices of 32 bits, masses with a factor of each cluster's own, more places for keys than there are keys."""
    *qkv, where = case(shape)
    qkv = [x.requires_grad_() for x in qkv]
    choice = choose(*qkv, where, num_hidden=7, steps=2)
    factor = torch.rand(len(qkv[0]), 7, dtype=torch.float64) + 0.5
    keys = torch.nn.functional.pad(choice.keys.flip(-1), (0, 3), value=-1)
    theirs = Choice(choice.winners.int(), choice.mass * factor.gather(1, choice.winners), keys.int())

    def gradients(out: torch.Tensor, normaliser: torch.Tensor) -> tuple:
        loss = out.square().sum() + normaliser.masked_fill(normaliser.isinf(), 0).square().sum()
        return out, normaliser, *torch.autograd.grad(loss, qkv)

    whole = gradients(*near_far_attention(*qkv, where, num_hidden=7, steps=2))
    torch.testing.assert_close(gradients(*attend(*qkv, where, choice, 7)), whole, rtol=0, atol=0)
    torch.testing.assert_close(gradients(*attend(*qkv, where, theirs, 7)), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_hidden", [0, 4])
@pytest.mark.parametrize(
    "shape",
    [
        {"tokens": 40, "near": 40, "exact_keys": 0},
        {"tokens": 40, "near": 4, "exact_keys": 36},
        {"tokens": 41, "prefix": 1, "near": 6, "exact_keys": 40, "tile": 6},
        {"tokens": 31, "grid": (5, 6), "prefix": 1, "near": 30, "exact_keys": 0},
        {"tokens": 30, "grid": (5, 6), "near": 4, "exact_keys": 26},
        {"tokens": 40, "near": 40, "exact_keys": 0, "groups": 3},
        {"tokens": 40, "near": 40, "exact_keys": 2, "lengths": [40, 13, 1]},
    ],
    ids=name,
)
def test_is_softmax_attention_where_every_key_is_exact(shape: dict, num_hidden: int) -> None:
    *qkv, where = case(shape)
    real = where.real(qkv[1].shape[1])
    mask = None if real is None else real[:, None].expand(-1, real.shape[1], -1)
    out, normaliser = near_far_attention(*qkv, where, num_hidden=num_hidden, steps=2)
    oracle, oracle_normaliser = softmax_attention(*qkv, mask)
    rows = torch.ones_like(normaliser, dtype=torch.bool) if real is None else real
    torch.testing.assert_close(out[rows], oracle[rows], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(normaliser[rows], oracle_normaliser[rows], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [SEQUENCES[3], SEQUENCES[12], GRIDS[2], LENGTHS[3]], ids=name)
def test_far_field_is_exact_with_a_cluster_for_every_key(shape: dict) -> None:
    *qkv, where = case(shape)
    tokens = qkv[1].shape[1]
    real = where.real(tokens)
    mask = None if real is None else real[:, None].expand(-1, tokens, -1)
    out, normaliser = near_far_attention(*qkv, where, num_hidden=8 * tokens, steps=2)
    rows = torch.ones_like(normaliser, dtype=torch.bool) if real is None else real
    oracle, oracle_normaliser = softmax_attention(*qkv, mask)
    torch.testing.assert_close(out[rows], oracle[rows], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(normaliser[rows], oracle_normaliser[rows], rtol=1e-9, atol=1e-9)


def test_far_field_is_exact_where_the_keys_of_a_cluster_are_equal() -> None:
    query, _, value = draw(2, 60, 6)
    key = torch.randn(2, 4, 6, dtype=torch.float64)[:, torch.arange(60) // 15]
    where = layout(exact_keys=0)
    out, normaliser = near_far_attention(query, key, value, where, num_hidden=4, steps=2)
    torch.testing.assert_close((out, normaliser), softmax_attention(query, key, value), rtol=1e-10, atol=1e-10)


def test_mean_query_of_a_tile_reads_every_key_without_error() -> None:
    query, key, value = draw(2, 60, 6)
    query = query[:, torch.arange(60) // 4 * 4]  # all queries of a tile are their mean
    out, normaliser = near_far_attention(query, key, value, layout(exact_keys=0), num_hidden=2, steps=1)
    torch.testing.assert_close((out, normaliser), softmax_attention(query, key, value), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SEQUENCES[3:] + GRIDS + LENGTHS, ids=name)
def test_near_and_far_partition_the_keys(shape: dict) -> None:
    """Without any difference between queries and keys, every key weighs the same: none is missing, none is double."""
    _, _, value, where = case(shape)
    zero = torch.zeros_like(value)
    out, normaliser = near_far_attention(zero, zero, value, where, num_hidden=3, steps=1)
    lengths = torch.full((len(value),), value.shape[1]) if where.lengths is None else where.lengths
    for row, length in enumerate(lengths.tolist()):
        mean = value[row, :length].mean(0, keepdim=True).expand(length, -1)
        torch.testing.assert_close(out[row, :length], mean)
        torch.testing.assert_close(normaliser[row, :length].exp(), torch.full((length,), float(length)).double())
        assert not out[row, length:].any()


@pytest.mark.parametrize("shape", [SEQUENCES[7], SEQUENCES[10], GRIDS[1], LENGTHS[1]], ids=name)
def test_weights_are_positive_and_sum_to_one(shape: dict) -> None:
    query, key, _, where = case(shape)
    tokens = query.shape[1]
    weights, _ = near_far_attention(
        query, key, torch.eye(tokens, dtype=torch.float64).expand(len(query), -1, -1), where, num_hidden=3, steps=2
    )
    total = torch.ones(weights.shape[:2], dtype=torch.float64)
    if where.lengths is not None:
        total = total * where.real(tokens)
        assert not weights[:, :, -1][where.lengths < tokens].any()  # padding has no weight
    assert weights.min() > -1e-12
    torch.testing.assert_close(weights.sum(-1), total)


@pytest.mark.parametrize("shape", [SEQUENCES[7], SEQUENCES[10], GRIDS[2], LENGTHS[1]], ids=name)
def test_does_not_change_when_all_keys_move(shape: dict) -> None:
    query, key, value, where = case(shape)
    moved = key - torch.randn(len(key), 1, key.shape[2], dtype=torch.float64)
    ours = near_far_attention(query, key, value, where, num_hidden=5, steps=2)[0]
    theirs = near_far_attention(query, moved, value, where, num_hidden=5, steps=2)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 3.0, 7.0])  # largest logits about 15, 130 and 700
@pytest.mark.parametrize("shape", [SEQUENCES[7], GRIDS[1], LENGTHS[1]], ids=name)
def test_single_precision_follows_the_oracle(shape: dict, scale: float) -> None:
    """At most 4 times the error that softmax attention itself makes in float32 on such logits."""
    *qkv, where = case(shape, dim=16, scale=scale, dtype=torch.float32)
    out, _ = near_far_attention(*qkv, where, num_hidden=7, steps=2)
    oracle, _ = near_far_oracle(*qkv, where, 7, 2)
    assert relative(out, oracle) < 4 * float32_error(*qkv)


@pytest.mark.parametrize("shape", [SEQUENCES[12], GRIDS[4], LENGTHS[2]], ids=name)
def test_single_precision_follows_the_oracle_where_groups_are_shared(shape: dict) -> None:
    """Taking the near keys out of sums costs digits: 20 times the error of softmax attention."""
    *qkv, where = case(shape, dim=16, scale=1.5, dtype=torch.float32)
    out, _ = near_far_attention(*qkv, where, num_hidden=7, steps=2)
    oracle, _ = near_far_oracle(*qkv, where, 7, 2)
    assert relative(out, oracle) < 20 * float32_error(*qkv)


def float32_error(*qkv: torch.Tensor) -> float:
    return relative(softmax_attention(*qkv)[0], softmax_attention(*(x.double() for x in qkv))[0]) + 1e-7


@pytest.mark.parametrize("scale", [10.0, 100.0])
@pytest.mark.parametrize("shape", [SEQUENCES[7], SEQUENCES[12], GRIDS[4], LENGTHS[2]], ids=name)
def test_stays_finite_with_huge_logits(shape: dict, scale: float) -> None:
    *qkv, where = case(shape, dim=16, dtype=torch.float32)
    qkv = [qkv[0] * scale, qkv[1] * scale, qkv[2].requires_grad_()]
    out, normaliser = near_far_attention(*qkv, where, num_hidden=7, steps=2)
    assert out.isfinite().all()
    assert out.abs().max() <= qkv[2].abs().max() * 1.001  # a weighted mean of the values
    assert not normaliser.isnan().any()
    assert torch.autograd.grad(out.sum(), qkv[2])[0].isfinite().all()
