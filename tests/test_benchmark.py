"""The benchmark: its gates can fail, it measures what it claims to, and the README quotes the committed results."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scripts import run as run_script
from torch import Tensor

from eval import summary
from eval.benchmark import __main__ as benchmark
from eval.benchmark import attention, contestants, models, timing
from eval.benchmark.contestants import CONFIGS, GateError, Problem, check_properties, check_results, make_contestants
from eval.benchmark.rows import find_crossover, fit_slope, format_markdown, select, values_of

CPU = torch.device("cpu")
COMMITTED = summary.RESULTS / "benchmark.json"


def problem(dtype: torch.dtype = torch.float32) -> Problem:
    return Problem(batch=1, heads=2, head_dim=16, dtype=dtype, device=CPU, seed=0)


def contestant(name: str, given: Problem, backend: str = "auto") -> contestants.Contestant:
    (found,) = (each for each in make_contestants(given) if (each.name, each.backend) == (name, backend))
    return found


def run(*options: str, folder: Path) -> list[dict]:
    paths = ["--json", str(folder / "b.json"), "--figure", str(folder / "b.png"), "--device", "cpu"]
    result = run_script(benchmark.main, *options, *paths)
    assert result.exit_code == 0, result.output
    assert (folder / "b.png").stat().st_size > 10_000
    return json.loads((folder / "b.json").read_text("utf-8"))["rows"]


def test_attention_is_measured_in_both_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attention, "LENGTHS", (197, 300, 400))
    monkeypatch.setattr(attention, "GATE_LENGTHS", (317,))
    options = ("--repeats", "2", "--seconds", "0.1", "--heads", "1", "--head-dim", "16", "--limit", "400")
    rows = run("--only", "attention", *options, folder=tmp_path)
    assert values_of(rows, "tokens", "attention") == [197, 300, 400]
    assert values_of(rows, "pass", "attention") == ["forward", "forward+backward"]
    assert {"SDPA", "phi in memory, m = 64", *CONFIGS} == set(values_of(rows, "name", "attention"))
    for row in select(rows, "attention"):
        assert 0 < row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
        assert row["times SDPA"]["median"] == 1 if row["name"] == "SDPA" else row["times SDPA"]["median"] > 0
        assert row["peak MB"] > 0
        assert row["of bandwidth"] > 0
    assert len(select(rows, "summary")) == len(select(rows, "attention", tokens=197))
    assert not select(rows, "models")
    (settings,) = select(rows, "settings")
    assert "read the ratios" in settings["seconds"]
    table = format_markdown(rows)
    assert table.count("\n| ") == 1 + 1 + 4  # no second table without models
    print_and_draw_as_a_gpu(rows, capsys)


def print_and_draw_as_a_gpu(rows: list[dict], capsys: pytest.CaptureFixture[str]) -> None:
    """The rows as a GPU would have them: every contestant but plain PyTorch in a graph, too; SDPA's did not come."""
    rows = [row | ({"device": "cuda"} if row["part"] == "settings" else {}) for row in rows if row["part"] != "summary"]
    timed = [row for row in select(rows, "attention") if row["backend"] != "torch" and row["name"] != "SDPA"]
    rows += [row | {"launch": "graph", "times SDPA": None} for row in timed]
    rows += benchmark.summarise(rows)
    capsys.readouterr()
    benchmark.print_results(rows)
    printed = capsys.readouterr().out
    assert "forward, float32, milliseconds" in printed
    assert "% of bandwidth / of matrix products" in printed
    assert "default, graph: faster than SDPA from no measured length on" in printed.replace(" tokens", "")
    labels = {text.get_text() for text in benchmark.plot(rows).legends[0].get_texts()}
    assert {"SDPA", "default", "default, graph", "default, plain"} <= labels


def test_models_are_measured_with_one_input_and_with_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "BATCH_TOKENS", {"cpu": 394})
    monkeypatch.setattr(models, "TOKENS", (128,))
    rows = run("--only", "models", "--limit", "197", "--repeats", "1", folder=tmp_path)
    for model, size, batches in (("ViT-tiny/16", "224 px", [1, 2]), ("MiniLM", "128 tokens", [1, 3])):
        mine = select(rows, "models", model=model, size=size)
        assert sorted({row["batch"] for row in mine}) == batches
        assert {row["name"] for row in mine} == {"original", *models.PATCHED}
        for row in mine:
            assert row["per second"] == pytest.approx(row["batch"] / row["seconds"]["median"])
            assert row["times original"]["median"] == 1 if row["name"] == "original" else True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_contestant_passes_the_gates(dtype: torch.dtype) -> None:
    given = problem(dtype)
    for each in make_contestants(given):
        check_results(each, given, 317, True)
        for tokens, backward in ((197, False), (300, True)):
            check_properties(each, given, tokens, backward)


def scale_of_gradient(x: Tensor, factor: float) -> Tensor:
    return x * factor + (x * (1 - factor)).detach()


@pytest.mark.parametrize("name", ["SDPA", *CONFIGS, "a peer"])
def test_gate_turns_wrong_results_away(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem()
    if name == "a peer":
        right = replace(contestant("SDPA", given, "torch.nn"), name=name, backend="peer")
    else:
        right = contestant(name, given, "torch.nn" if name == "SDPA" else "auto")
    check_results(right, given, 317, True)
    rough = 1.2 if name in ("SDPA", "a peer") else 1.001
    wrong = {
        "output": lambda q, k, v: right.attend(q, k, v) * rough,
        "query's gradient": lambda q, k, v: right.attend(scale_of_gradient(q, rough), k, v),
        "key's gradient": lambda q, k, v: right.attend(q, scale_of_gradient(k, rough), v),
        "value's gradient": lambda q, k, v: right.attend(q, k, scale_of_gradient(v, rough)),
        "output ": lambda q, k, v: right.attend(q, k, v) * torch.nan,
    }
    for what, attend in wrong.items():
        with pytest.raises(GateError, match=what.strip()):
            check_results(replace(right, attend=attend), given, 317, True)


def test_gate_turns_bad_choices_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that computes rightly with clusters that no k-means would find is as wrong."""
    given = problem()
    right = contestant("near 64, m = 64", given)
    if right.kernel == "torch":
        pytest.skip("there is no kernel here")
    choose = contestants._choose
    monkeypatch.setattr(
        contestants, "_choose", lambda *args: choose(*args)._replace(winners=torch.zeros(2, 717, dtype=torch.long))
    )
    attend = lambda q, k, v: right.plain(q, k, v)(q, k, v)  # noqa: E731
    with pytest.raises(GateError, match="from softmax"):
        check_results(replace(right, attend=attend), given, 717, False)


def test_gate_turns_wrong_properties_away() -> None:
    given = problem()
    right = contestant("random, m = 64", given)
    wrong = {
        "a constant value": lambda q, k, v: right.attend(q, k, v) * 1.01,
        "values' gradients": lambda q, k, v: right.attend(q, k, scale_of_gradient(v, 1.01)),
        "finite": lambda q, k, v: right.attend(q, k, v) + F.pad(torch.full((1, 1, 1, 1), torch.inf), (15, 0)),
    }
    for what, attend in wrong.items():
        with pytest.raises(GateError, match=what):
            check_properties(replace(right, attend=attend), given, 400, True)


def test_materialised_features_are_those_of_the_library() -> None:
    given = problem()
    inputs = given.draw(300)[0]
    ours, theirs = (
        contestant(name, given, backend).attend(*inputs)
        for name, backend in (("random, m = 64", "auto"), ("phi in memory, m = 64", "torch.nn"))
    )
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)


def test_turns_are_fewer_where_they_take_long() -> None:
    done: list[str] = []
    calls = {name: timing.Call(partial(done.append, name), count=4) for name in "ab"}
    times = timing.time_in_turns(calls, CPU, timing.Effort(7, 10))
    assert {name: len(each) for name, each in times.items()} == {"a": 7, "b": 7}
    assert done[4:] == ["a", "b"] * 7  # in turns, behind the warm-up
    slow = {"slow": timing.Call(lambda: torch.randn(1000, 1000) @ torch.randn(1000, 1000))}
    assert len(timing.time_in_turns(slow, CPU, timing.Effort(7, 1e-9))["slow"]) == timing.LEAST_TURNS


def test_input_sets_take_turns() -> None:
    seen: list[int] = []
    call = timing.rotate(seen.append, [(1,), (2,)])  # type: ignore[list-item]
    for _ in range(3):
        call()
    assert seen == [1, 2, 1]
    assert timing.count_sets(1000, CPU) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only tensors are counted")
@pytest.mark.parametrize("allocate", [lambda: torch.ones(2**24), lambda: np.ones(2**23)], ids=["tensor", "scratch"])
def test_peak_memory_is_what_a_pass_allocates(allocate: object) -> None:
    assert 64e6 <= timing.measure_peak(allocate, CPU) <= 80e6
    assert timing.measure_peak(lambda: None, CPU) <= 4e6


def test_peak_memory_of_a_process_of_its_own_grows_with_the_length() -> None:
    given = replace(problem(), head_dim=64)
    each = contestant("random, m = 64", given, "auto")
    short, long = (attention._peak_of(given, each, tokens, True) for tokens in (4096, 16384))
    assert long >= 4 * 2 * 16384 * 64 * 4  # the output and three gradients
    assert 2 < long / short < 8


def made_up(*points: tuple[int, float], peak: float = 1.0) -> list[dict]:
    return [{"tokens": n, "times SDPA": {"median": ratio}, "peak MB": peak * n**1.5} for n, ratio in points]


def test_crossover_is_the_first_length_of_the_last_faster_ones() -> None:
    assert find_crossover(made_up((1, 2.0), (2, 0.5), (4, 1.5), (8, 0.5), (16, 0.4))) == 8
    assert find_crossover(made_up((1, 0.5), (2, 0.5))) == 1
    assert find_crossover(made_up((1, 0.5), (2, 1.0))) is None


def test_slope_is_that_of_the_longest_lengths() -> None:
    rows = made_up(*((2**i, 1.0) for i in range(8)))
    rows[0]["peak MB"] = 1e6
    assert fit_slope(rows) == pytest.approx(1.5)
    assert fit_slope(rows[:2]) is None


@pytest.mark.gpu
def test_graph_replays_and_is_timed() -> None:
    device = torch.device("cuda")
    x = torch.zeros(1000, device=device)
    call = timing.capture(lambda: x.add_(1), 5, "add")
    assert call is not None
    before = float(x[0])
    call.run()
    assert float(x[0]) == before + 5
    times = timing.time_in_turns({"add": call}, device, timing.Effort(3, 1))["add"]
    assert 0 < min(times) < 1e-3
    assert timing.count_sets(1000, device) > 1


@pytest.mark.gpu
def test_a_gpu_is_measured(tmp_path: Path) -> None:
    paths = ["--json", str(tmp_path / "b.json"), "--figure", str(tmp_path / "b.png")]
    result = run_script(benchmark.main, "--limit", "512", "--repeats", "3", *paths)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "b.json").read_text("utf-8"))["rows"]
    assert values_of(rows, "launch", "attention") == ["eager", "graph"]
    for row in select(rows, "attention", name="random, m = 64"):
        assert 0 < row["of bandwidth"] < 1.5
    assert len(select(rows, "ceilings")) == 1


def committed() -> list[dict]:
    return json.loads(COMMITTED.read_text("utf-8"))["rows"]


def test_committed_peak_memory_of_the_kernels_grows_linearly() -> None:
    for row in select(committed(), "summary"):
        assert row["backend"] == "torch" or row["memory slope"] < 1.15, row


def test_committed_speed_is_what_was_promised() -> None:
    """The default is faster than SDPA from 1,024 tokens on, and at least five times as fast at 16,384."""
    same = {"dtype": "float32", "name": "default", "backend": "auto", "pass": "forward"}
    ratio = {row["tokens"]: row["times SDPA"]["median"] for row in select(committed(), "attention", **same)}
    assert ratio[16384] <= 1 / 5
    assert ratio[4096] <= 1 / 2
    assert ratio[1024] <= 1
