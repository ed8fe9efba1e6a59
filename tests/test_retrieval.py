"""Retrieval of stored patterns: the memories are the network, and they hold what they should."""

from __future__ import annotations

import json
from math import comb, log

import pytest
import torch
from torch import Tensor

from astroattn import AstroConfig, AstrocyteAttention
from astroattn.ops.clustering import learn_clusters, weighted_means
from astroattn.simulation import CompetitiveNeurons, HiddenNeurons, NeuronAstrocyteNetwork, StaticNeurons
from eval import retrieval
from eval.summary import RESULTS

BETA, COUNT = 4.0, 12


@pytest.fixture
def task() -> tuple[Tensor, Tensor]:
    """One set of patterns [1, n, D] and as many cues."""
    patterns, cue, _ = retrieval.draw_patterns(COUNT, retrieval.DIM, 3)
    return patterns[:1].double(), cue[:1, :COUNT].double()


def simulate(hidden: HiddenNeurons, patterns: Tensor, cue: Tensor) -> Tensor:
    out, _ = NeuronAstrocyteNetwork(hidden).run(cue[None], patterns[None], patterns[None], scale=BETA)
    return out[0]


def test_the_exact_memory_is_the_network_with_one_neuron_per_pattern(task: tuple[Tensor, Tensor]) -> None:
    patterns, cue = task
    found = retrieval.exact(patterns, BETA, 0, 0)(cue)
    torch.testing.assert_close(found, simulate(CompetitiveNeurons(patterns[None] * BETA**0.5), patterns, cue))
    attention = AstrocyteAttention(1, retrieval.DIM)
    attention.exact = True
    torch.testing.assert_close(found, attention(cue[None], patterns[None], patterns[None], scale=BETA)[0])


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("activation", ["positive_exp", "constant"])
def test_the_random_memory_is_the_network_and_the_module(
    orthogonal: bool, activation: str, task: tuple[Tensor, Tensor]
) -> None:
    patterns, cue = task
    found = retrieval.random(patterns, BETA, 24, 5, orthogonal, activation)(cue)
    config = AstroConfig(
        hidden="random", num_hidden=24, seed=5, orthogonal=orthogonal, activation=activation, backend="torch"
    )
    hidden = StaticNeurons.random(1, retrieval.DIM, config)
    torch.testing.assert_close(found, simulate(hidden, patterns, cue), rtol=1e-9, atol=1e-10)
    attention = AstrocyteAttention(1, retrieval.DIM, config)
    module = attention(cue[None], patterns[None], patterns[None], scale=BETA)[0]
    torch.testing.assert_close(found, module, rtol=1e-9, atol=1e-10)


def test_patterns_may_be_written_in_parts() -> None:
    patterns, cue, _ = retrieval.draw_patterns(200, retrieval.DIM, 3)
    found = retrieval.random(patterns.double(), BETA, 4096, 5, True, "positive_exp")(cue.double())  # parts of 64
    config = AstroConfig(hidden="random", num_hidden=4096, seed=5, backend="torch")
    attention = AstrocyteAttention(1, retrieval.DIM, config)
    module = attention(cue.double()[None], patterns.double()[None], patterns.double()[None], scale=BETA)[0]
    assert len(patterns) == 1
    torch.testing.assert_close(found, module, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("m", [5, COUNT])
def test_the_hebbian_memory_is_the_network_with_competing_neurons(m: int, task: tuple[Tensor, Tensor]) -> None:
    patterns, cue = task
    ones = patterns.new_ones(1, COUNT)
    winners = learn_clusters(patterns, ones, m, AstroConfig().steps)
    _, centre = weighted_means(patterns, ones, winners, m)
    found = retrieval.hebbian(patterns, BETA, m, 0)(cue)
    torch.testing.assert_close(found, simulate(CompetitiveNeurons(centre[None] * BETA**0.5), patterns, cue))
    if m == COUNT:
        torch.testing.assert_close(found, retrieval.exact(patterns, BETA, m, 0)(cue))


def test_the_classical_memory_is_its_matrix(task: tuple[Tensor, Tensor]) -> None:
    patterns, cue = task
    weights = patterns[0].mT @ patterns[0]
    weights.fill_diagonal_(0)
    torch.testing.assert_close(retrieval.classical(patterns, 1.0, 0, 0)(cue)[0], cue[0] @ weights)


def test_cues_are_patterns_with_six_bits_flipped() -> None:
    patterns, cue, target = retrieval.draw_patterns(4, retrieval.DIM, 1)
    torch.testing.assert_close(patterns.norm(dim=-1), torch.ones(patterns.shape[:2]))
    torch.testing.assert_close((cue * target).sum(-1), torch.full(cue.shape[:2], retrieval.OVERLAP))
    assert cue.shape[0] * cue.shape[1] == retrieval.CUES
    assert (target @ patterns.mT).amax(-1).min() == pytest.approx(1)  # each is one of the patterns
    assert (cue != cue[:, :1]).any(-1).float().mean() > 0.9


def test_score_by_hand() -> None:
    target = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.5, -0.5, 0.5, -0.5]]])
    last = torch.tensor([[[3.0, 3.0, 0.0, -3.0], [1.0, -1.0, 1.0, -1.0]]])
    wrong, error, retrieved = retrieval.score(last, target)
    assert wrong == pytest.approx(1.5 / 8)
    assert error == pytest.approx((1 - 3 / (2 * 27**0.5)) / 2)
    assert retrieved == 0.5


def test_capacity_is_where_the_curve_passes_the_level() -> None:
    curve = {"layer": "a", "m": 0, "D": 32, "reads": "once", "low": 0.0}
    rows = [curve | {"patterns": n, "wrong_bits": wrong, "high": 2 * wrong} for n, wrong in ((4, 0.0), (16, 0.1))]
    assert retrieval.find_capacities(rows) == [
        {"layer": "a", "m": 0, "D": 32, "reads": "once", "capacity": 8.0, "low": 5.657, "high": None}
    ]


def test_beta_is_chosen_on_other_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[bool, set[int]] = {True: set(), False: set()}
    draw = retrieval.draw_patterns
    monkeypatch.setattr(
        retrieval, "draw_patterns", lambda count, dim, seed: (seen[seed >= 10**6].add(seed), draw(count, dim, seed))[1]
    )
    rows = retrieval.measure_point("exact", 0, 64, retrieval.DIM, 3, 0)
    assert seen[False] == {0, 1, 2}
    assert len(seen[True]) == retrieval.CALIBRATION
    assert [row["reads"] for row in rows] == list(retrieval.READS)
    assert rows[0]["low"] <= rows[0]["wrong_bits"] <= rows[0]["high"] < retrieval.LEVEL


def test_theory_counts_how_rarely_another_pattern_is_nearer() -> None:
    """The exponent is that of the share of patterns within 3/16 of the bits of a cue, as D grows."""
    logs = []
    for dim in (1600, 3200):
        nearer = sum(comb(dim, flips) for flips in range(dim * 3 // 16 + 1))
        logs.append(dim * log(2) - log(nearer))
    assert (logs[1] - logs[0]) / 1600 == pytest.approx(retrieval.EXPONENT, rel=0.01)


def test_what_is_said_of_the_layers_holds_in_the_committed_results() -> None:
    rows = json.loads((RESULTS / "retrieval.json").read_text("utf-8"))["rows"]
    found = {
        (row["layer"], row["m"]): row["capacity"]
        for row in retrieval.find_capacities(rows)
        if row["D"] == retrieval.DIM and row["reads"] == "once"
    }
    for m in (16, 64, 256):
        assert m <= found["Hebbian", m] < 2 * m
    assert found["Hebbian", 1024] > 0.8 * found["exact", 0]
    for name in ("orthogonal", "independent"):
        assert found["constant", 1] < found[name, 64] < found[name, 4096] < 0.02 * found["exact", 0]
    random, exact = retrieval.fit_growth(rows)[1:]
    assert random["slope"] == pytest.approx(random["theory"], abs=0.1)
    assert exact["slope"] == pytest.approx(exact["theory"], rel=0.1)
