"""Weighted k-means and the sums over its clusters, against loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from astroattn.ops.clustering import block_layout, cluster_sums, learn_clusters, weighted_means


def k_means(points: torch.Tensor, mass: torch.Tensor, m: int, steps: int) -> torch.Tensor:
    """The same in loops, for one sequence."""
    weights = torch.stack([points[(2 * j + 1) * len(points) // (2 * m)] for j in range(m)])
    for step in range(steps + 1):
        winners = torch.cdist(points, weights).argmin(1)
        for j in range(m if step < steps else 0):
            own = winners == j
            if mass[own].sum() > 0:
                weights[j] = (mass[own, None] * points[own]).sum(0) / mass[own].sum()
    return winners


def distances(points: torch.Tensor, mass: torch.Tensor, winners: torch.Tensor, m: int) -> torch.Tensor:
    """Squared distances to the means of the clusters."""
    mean = weighted_means(points, mass, winners, m)[1]
    return (points - mean.gather(1, winners[..., None].expand_as(points))).square().sum(-1)


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize(("count", "m"), [(1, 1), (50, 7), (20, 20), (64, 1)])
def test_learning_equals_loops(steps: int, count: int, m: int) -> None:
    points, mass = torch.randn(2, count, 3, dtype=torch.float64), torch.rand(2, count, dtype=torch.float64)
    winners = learn_clusters(points, mass, m, steps)
    for z in range(2):
        assert winners[z].tolist() == k_means(points[z], mass[z], m, steps).tolist()


@pytest.mark.parametrize(("count", "m"), [(1, 3), (7, 20)])
def test_more_clusters_than_points(count: int, m: int) -> None:
    """Some weights are the same, and either wins; each point has one to itself."""
    points, mass = torch.randn(2, count, 3, dtype=torch.float64), torch.rand(2, count, dtype=torch.float64)
    for steps in (0, 2):
        winners = learn_clusters(points, mass, m, steps)
        assert all(len(set(row)) == count for row in winners.tolist())
        assert distances(points, mass, winners, m).max() < 1e-20


def test_each_step_lowers_the_weighted_distance() -> None:
    points, mass = torch.randn(4, 200, 5), torch.rand(4, 200)
    found = [learn_clusters(points, mass, 8, steps) for steps in range(6)]
    errors = [(distances(points, mass, winners, 8) * mass).sum() for winners in found]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))


def test_mass_draws_the_weights() -> None:
    """From 1 and 6: means of 1.5 and 6, or of about 3.4 and 7 where the masses lie there, which is nearer to 4.1."""
    points = torch.tensor([[[0.0], [1.0], [3.4], [4.1], [6.0], [8.0]]], dtype=torch.float64)
    even, heavy = torch.ones(1, 6).double(), torch.tensor([[0.01, 0.01, 9.0, 0.01, 9.0, 9.0]]).double()
    assert learn_clusters(points, even, 2, 0).tolist() == [[0, 0, 0, 1, 1, 1]]
    assert learn_clusters(points, even, 2, 1).tolist() == [[0, 0, 0, 1, 1, 1]]
    assert learn_clusters(points, heavy, 2, 1).tolist() == [[0, 0, 0, 0, 1, 1]]


def test_equal_points_and_no_mass() -> None:
    assert len(set(learn_clusters(torch.ones(1, 9, 2), torch.zeros(1, 9), 4, 3)[0].tolist())) == 1


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
