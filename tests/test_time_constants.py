"""The network in continuous time against the discrete one, measured: what is predicted, and what is committed."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from astroattn.simulation import TimeConstants, integrate
from eval import time_constants
from eval.summary import RESULTS


@pytest.fixture
def tokens() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    query, key, value = torch.randn(3, 1, 1, 3, 4, generator=generator, dtype=torch.float64)
    return query, key, value


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("astrocyte", [0.2, 0.5])
def test_the_calciums_delay_is_predicted(causal: bool, astrocyte: float, tokens: tuple[Tensor, ...]) -> None:
    """Token by token, not only its size: the last layer with immediate neurons is the discrete one times the scale."""
    network = time_constants.make_network(4, 0)
    discrete, trace = network.run(*tokens, causal=causal, scale=1.0, record="hpg")
    constants = TimeConstants(neuron=1e-5, astrocyte=astrocyte)
    moved, _ = integrate(network, *tokens, constants=constants, causal=causal, scale=1.0, samples=1)
    scale = time_constants.predict_scale(trace, astrocyte, causal)
    assert (scale - 1).abs().max() > 1e-3  # there is something to predict
    torch.testing.assert_close(moved, discrete * scale[..., None], rtol=1e-3, atol=1e-4)


def test_rows_and_slopes(tokens: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_constants, "SWEEPS", {"neuron": (0.03, 0.003), "astrocyte": (0.2,)})
    rows = time_constants.measure({"random": tokens})
    assert [row["varied"] for row in rows] == ["neuron", "neuron", "astrocyte"] * 2
    for row in rows:
        assert (row["predicted"] is None) == (row["varied"] == "neuron")
        if row["predicted"] is not None:
            assert row["error"] == pytest.approx(row["predicted"], rel=0.05)
    for fit in time_constants.fit_slopes(rows):
        assert fit["slope"] == pytest.approx(1, abs=0.2)


def test_what_is_said_holds_in_the_committed_results() -> None:
    rows = json.loads((RESULTS / "time_constants.json").read_text("utf-8"))["rows"]
    assert {row["input"] for row in rows} == {"MiniLM", "random"}
    for fit in time_constants.fit_slopes(rows):
        assert fit["slope"] == pytest.approx(1, abs=0.15)
    neuron = [row["error"] for row in rows if row["varied"] == "neuron" and row["time"] == 1e-4]
    assert max(neuron) < 2e-4
    large = [row for row in rows if row["varied"] == "astrocyte" and row["predicted"] > 1e-3]
    assert len(large) >= 12
    for row in large:
        assert row["error"] == pytest.approx(row["predicted"], rel=0.03)
    assert len(time_constants.format_markdown(rows).splitlines()) == 6


def test_the_course_ends_where_the_discrete_network_is(tokens: tuple[Tensor, ...]) -> None:
    course = time_constants.measure_course(tokens)
    samples = len(course.motion.time) // (2 * 3)
    assert course.trace.h_writing is not None
    ends = course.motion.h[samples - 1 :: samples][:3, 0, 0]
    torch.testing.assert_close(ends, course.trace.h_writing[0, 0], rtol=1e-3, atol=1e-3)
    figure = time_constants.plot(
        [
            {"input": "random", "phases": phases, "varied": varied, "time": time, "error": 0.1, "predicted": 0.1}
            for phases in time_constants.PHASES.values()
            for varied, times in time_constants.SWEEPS.items()
            for time in times
        ],
        course,
    )
    assert sum(len(part.axes) for part in figure.subfigs) == 6
