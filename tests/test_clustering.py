"""Weighted k-means and the sums over its clusters, against loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from astroattn.ops.clustering import block_layout, cluster_sums, learn_clusters, weighted_means


def k_means(points: torch.Tensor, mass: torch.Tensor, m: int, steps: int, length: int) -> tuple:
    """The same in loops, for one sequence: winners and squared distances of the first `length` points."""
    weights = torch.stack([points[min((2 * j + 1) * length // (2 * m), len(points) - 1)] for j in range(m)])
    for step in range(steps + 1):
        distance = torch.cdist(points[:length], weights).square()
        winners = distance.argmin(1)
        for j in range(m if step < steps else 0):
            own = winners == j
            if mass[:length][own].sum() > 0:
                weights[j] = (mass[:length][own, None] * points[:length][own]).sum(0) / mass[:length][own].sum()
    return winners, distance.min(1).values


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize(("count", "m"), [(1, 1), (1, 3), (50, 7), (7, 20), (64, 1)])
def test_learning_equals_loops(steps: int, count: int, m: int) -> None:
    points, mass = torch.randn(2, count, 3, dtype=torch.float64), torch.rand(2, count, dtype=torch.float64)
    winners, distance = learn_clusters(points, mass, m, steps, None)
    for z in range(2):
        expected = k_means(points[z], mass[z], m, steps, count)
        if m <= count:  # else some weights are the same, and either wins
            assert winners[z].tolist() == expected[0].tolist()
        torch.testing.assert_close(distance[z], expected[1], rtol=1e-9, atol=1e-9)


def test_learning_knows_no_padding() -> None:
    points, mass = torch.randn(3, 50, 3, dtype=torch.float64), torch.rand(3, 50, dtype=torch.float64)
    lengths = torch.tensor([50, 20, 3])
    mass = mass * (torch.arange(50) < lengths[:, None])
    winners, distance = learn_clusters(points, mass, 5, 3, lengths)
    for z, length in enumerate(lengths.tolist()):
        expected = k_means(points[z], mass[z], 5, 3, length)
        assert winners[z, :length].tolist() == expected[0].tolist()
        torch.testing.assert_close(distance[z, :length], expected[1], rtol=1e-9, atol=1e-9)


def test_each_step_lowers_the_weighted_distance() -> None:
    points, mass = torch.randn(4, 200, 5), torch.rand(4, 200)
    errors = [(learn_clusters(points, mass, 8, steps, None)[1] * mass).sum() for steps in range(6)]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))


def test_mass_draws_the_weights() -> None:
    """Two points for one cluster: its weights stand near the heavy one."""
    points, mass = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[9.0, 1.0]])
    assert learn_clusters(points, mass, 1, 1, None)[1][0].tolist() == pytest.approx([0.01, 0.81])


def test_a_cluster_for_every_point() -> None:
    points = torch.randn(2, 30, 4)
    winners, distance = learn_clusters(points, torch.ones(2, 30), 30, 2, None)
    assert all(len(set(row)) == 30 for row in winners.tolist())
    assert distance.max() < 1e-5


def test_equal_points_and_no_mass() -> None:
    winners, distance = learn_clusters(torch.ones(1, 9, 2), torch.zeros(1, 9), 4, 3, None)
    assert len(set(winners[0].tolist())) == 1
    assert not distance.any()


def test_weighted_means() -> None:
    points = torch.tensor([[[1.0, 0.0], [3.0, 2.0], [9.0, 9.0]]])
    total, mean = weighted_means(points, torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[0, 0, 2]]), 4)
    assert total.tolist() == [[4.0, 0.0, 2.0, 0.0]]
    assert mean.tolist() == [[[2.5, 1.5], [0.0, 0.0], [9.0, 9.0], [0.0, 0.0]]]


@settings(deadline=None)
@given(st.integers(1, 80), st.integers(1, 12), st.integers(0, 2**31), st.sampled_from(["any", "one", "last"]))
def test_cluster_sums_equal_one_hot_products(count: int, m: int, seed: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(2, 3, count, dtype=torch.float64, generator=generator)
    values = torch.randn(2, count, 4, dtype=torch.float64, generator=generator)
    winners = {
        "any": torch.randint(m, (2, count), generator=generator),
        "one": torch.zeros(2, count, dtype=torch.long),
        "last": torch.full((2, count), m - 1),
    }[kind]
    z, s = cluster_sums(weights, values, winners, m)
    one_hot = torch.nn.functional.one_hot(winners, m).double()
    torch.testing.assert_close(z, weights @ one_hot)
    torch.testing.assert_close(s, torch.einsum("zrn,znm,znd->zrmd", weights, one_hot, values))


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=30))
def test_blocks_hold_any_clusters(members: list[int]) -> None:
    block, blocks = block_layout(max(sum(members), 1), len(members))
    assert sum(-(-number // block) for number in members) <= blocks


def test_number_of_blocks_does_not_grow_with_the_length() -> None:
    assert all(block_layout(count, 16)[1] <= 5 * 16 for count in (64, 1000, 10**5, 10**7))
