"""The error of hidden layers against their number of neurons: what is measured, and what theory says of it."""

from __future__ import annotations

import json

import pytest
import torch
from scripts import run

from astroattn import AstroConfig, AstrocyteAttention
from eval import summary
from eval.error_vs_hidden import __main__ as script
from eval.error_vs_hidden import draws, real, rows, streaming, synthetic, theory
from eval.heads import load_vit, read_layers

QUICK = real.Settings(seeds=2, calibration=2, learned=(16,), steps=4, sizes=(16, 32, 64))


@pytest.fixture
def heads() -> list[torch.Tensor]:
    """Queries, keys and values [2, 3, 20, 8] with |q + k|^2 of about 16."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(3, 2, 3, 20, 8, generator=generator, dtype=torch.float64))


@pytest.fixture(scope="module")
def digits() -> real.Subject:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ASTROATTN_DATA", raising=False)
        return load_vit(2)


@pytest.fixture(scope="module")
def measured(digits: real.Subject) -> tuple[list[rows.Row], list[dict]]:
    return real.measure_real(QUICK, loaders=(lambda items: digits,))


def shared_draw(weight: torch.Tensor) -> streaming.Draw:
    """One weight [m, D] for all heads."""
    return lambda start, stop: (weight[start:stop], weight.new_zeros(()))


@pytest.mark.parametrize("length", [1, 8])
def test_streamed_is_the_library(heads: list[torch.Tensor], length: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "CHUNK", 48)  # m = 128 takes several chunks
    query, key, value = heads
    query, key = query * length, key * length  # |q.k| up to a thousand
    weight = torch.randn(128, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for m, attention, log_normaliser in streaming.stream_attention(query, key, shared_draw(weight), [16, 128]):
        network = AstrocyteAttention(3, 8, AstroConfig(hidden="random", num_hidden=m, near=0)).double()
        network.hidden.weight = weight[:m].expand(3, -1, -1)
        out, log_p = network.with_normaliser(query, key, value, scale=1.0)
        torch.testing.assert_close(attention @ value, out, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(log_normaliser, log_p, rtol=1e-8, atol=1e-8)


def test_calibrated_coordinates_leave_softmax_as_it_is(heads: list[torch.Tensor]) -> None:
    query, key, _ = heads
    calibration = draws.calibrate(query.roll(1, 2), 3 * key.flip(2) + 1)
    moved_query, moved_key, bias = calibration.transform(query, key)
    moved = moved_query @ moved_key.mT + bias[:, :, None]
    torch.testing.assert_close(moved.softmax(-1), (query @ key.mT).softmax(-1))
    shifted = moved.logsumexp(-1) + calibration.log_normaliser_shift(query)
    torch.testing.assert_close(shifted, (query @ key.mT).logsumexp(-1))


def test_balance_lowers_the_squares(heads: list[torch.Tensor]) -> None:
    stretch = torch.logspace(-1, 1, 8, dtype=torch.float64)
    query, key = heads[0] * stretch, heads[1] / stretch
    moved = draws.calibrate(query, key).transform(query, key)[:2]
    assert sum(x.square().sum() for x in moved) < 0.3 * (query.square().sum() + key.square().sum())


def test_calibrated_weights_are_unbiased(heads: list[torch.Tensor]) -> None:
    query, key = (x[:1] / 4 for x in heads[:2])
    centres = draws.calibrate(*(x / 4 for x in heads[:2])).cluster(8) + 0.5  # any centres will do
    m, true = 2**16, (query @ key.mT).exp()
    drawn = draws.draw_calibrated(centres, 0)
    _, attention, log_normaliser = next(streaming.stream_attention(query, key, drawn, [m]))
    estimate = attention * log_normaliser.exp()[..., None]
    assert (estimate / true - 1).abs().max() < 0.1
    weight, gain = draws.draw_calibrated(centres, 0)(0, m)
    without = next(streaming.stream_attention(query, key, lambda a, b: (weight[:, a:b], 0 * gain[..., a:b]), [m]))
    assert (without[2].exp() / true.sum(-1) - 1).abs().max() > 0.2  # the gains are what makes it so


def test_nothing_fitted_depends_on_what_is_reported(digits: real.Subject) -> None:
    unread = real.Subject(digits.name, digits.model, None, digits.calibration, digits.data)
    assert not {x.numpy().tobytes() for x in digits.inputs} & {x.numpy().tobytes() for x in digits.calibration}
    with torch.no_grad():
        for first, second in zip(*(real.fit_layers(x, QUICK, 0) for x in (digits, unread)), strict=True):
            assert torch.equal(first.centres, second.centres)
            assert torch.equal(first.learned[16].query_weight, second.learned[16].query_weight)


def test_learning_lowers_the_error(digits: real.Subject) -> None:
    with torch.no_grad(), read_layers(digits.model, digits.calibration) as layers:
        layer = layers[1]
        target, found = real.Target(layer), []
        for steps in (1, 60):
            log_shares, log_p = real.attend(real.learn(layer.query, layer.key, 16, steps), layer.query, layer.key)
            found.append(target.errors((log_shares - log_p[..., None]).exp(), log_p))
    for quantity in rows.QUANTITIES:
        assert found[1][quantity] < 0.8 * found[0][quantity]


def test_theory_is_the_variance_over_draws() -> None:
    generator = torch.Generator().manual_seed(3)
    query, key, value = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    query, key = query / 3, key / 3
    m, count = 512, 3000
    weight = torch.randn(count, 1, m, 4, generator=generator, dtype=torch.float64)
    many = (x.expand(count, 1, -1, -1) for x in (query, key))
    _, attention, log_normaliser = next(streaming.stream_attention(*many, all_of(weight), [m]))
    logits = query @ key.mT
    relative = (log_normaliser - logits.logsumexp(-1)).exp() - 1
    expected = theory.log_normaliser_variance(query, key).exp() / m
    torch.testing.assert_close(relative.square().mean((0, 1)), expected, rtol=0.1, atol=0)
    away = (attention @ value - logits.softmax(-1) @ value).square().sum(-1).mean((0, 1))
    torch.testing.assert_close(away, theory.log_output_variance(query, key, value).exp() / m, rtol=0.1, atol=0)


def test_theory_of_one_key_is_that_of_one_pair() -> None:
    query, key = torch.tensor([[0.3, -0.2]]).double(), torch.tensor([[1.0, 0.5]]).double()
    expected = ((query + key).square().sum().exp() - 1).log()
    torch.testing.assert_close(theory.log_normaliser_variance(query, key)[0], expected)
    assert theory.log_normaliser_variance(30 * query, 30 * key).isfinite().all()  # e^900 and more


def all_of(weight: torch.Tensor) -> streaming.Draw:
    return lambda start, stop: (weight[..., start:stop, :], weight.new_zeros(()))


def test_no_hidden_layer_is_below_the_floor_of_its_rank(measured: tuple) -> None:
    for layer in range(4):
        mine = rows.select(measured[0], layer=layer, quantity="matrix")
        for floor in rows.select(mine, hidden="SVD"):
            others = [row["error"] for row in rows.select(mine, m=floor["m"]) if row["hidden"] != "SVD"]
            assert others
            assert min(others) >= floor["error"]


def test_rows_are_complete(measured: tuple) -> None:
    found, theory_rows = measured
    for layer in (0, 1, 2, 3, "all"):
        for hidden in ("independent", "orthogonal", "calibrated"):
            for quantity in rows.QUANTITIES:
                mine = rows.select(found, layer=layer, hidden=hidden, quantity=quantity)
                assert [row["m"] for row in mine] == list(QUICK.sizes)
                assert all(0 < row["low"] <= row["error"] <= row["high"] for row in mine)
        for quantity in ("matrix", "output", "block"):
            assert len(rows.select(found, layer=layer, hidden="uniform", quantity=quantity)) == 1
        for quantity in rows.QUANTITIES:
            assert [row["m"] for row in rows.select(found, layer=layer, hidden="learned", quantity=quantity)] == [16]
            mine = rows.select(found, layer=layer, hidden="Hebbian", quantity=quantity)
            assert [row["m"] for row in mine] == list(QUICK.sizes)
    assert len([row for row in theory_rows if "head" in row]) == 4 * 4
    assert any("tokens" in row for row in theory_rows)


def test_softmax_has_no_error(digits: real.Subject) -> None:
    with torch.no_grad(), read_layers(digits.model, digits.inputs) as layers:
        for layer in layers:
            target = real.Target(layer)
            assert max(target.errors(target.attention, target.log_normaliser).values()) < 1e-5


def test_script_writes_tables_and_figures(tmp_path, measured: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASTROATTN_DATA", raising=False)
    monkeypatch.setattr(script, "measure_synthetic", lambda seed: synthetic.measure_synthetic(2, seed))
    monkeypatch.setattr(synthetic, "SIZES", [16, 64])
    monkeypatch.setattr(script, "measure_real", lambda settings, seed: measured)
    done = run(script.main, "--json", str(tmp_path / "e.json"), "--figure", str(tmp_path / "e.png"))
    assert done.exit_code == 0
    assert "digits ViT stands in" in done.output
    for stem in ("e", "e_layers", "e_theory"):
        assert (tmp_path / f"{stem}.png").stat().st_size > 10_000
        assert json.loads((tmp_path / f"{stem}.json").read_text("utf-8"))["rows"]


def test_error_of_random_features_falls_as_the_root_of_m() -> None:
    fits = {fit["hidden"]: fit["slope"] for fit in synthetic.fit_slopes(committed("error_vs_hidden"))}
    page = (summary.RESULTS.parent / "science.md").read_text("utf-8")
    assert f"fits a slope of\n{fits['independent']:.2f}" in page
    assert synthetic.draw_error(4096, "independent", 0) < 0.5 * synthetic.draw_error(256, "independent", 0)


def test_committed_rows_are_whole() -> None:
    means, layers = committed("error_vs_hidden"), committed("error_vs_hidden_layers")
    for model, count in (("MiniLM", 6), ("ViT-tiny", 12)):
        for hidden in ("independent", "orthogonal", "calibrated"):
            for quantity in rows.QUANTITIES:
                mine = rows.select(means, model=model, hidden=hidden, quantity=quantity)
                assert [row["m"] for row in mine] == real.SIZES
            assert len(rows.select(layers, model=model, hidden=hidden)) == count * len(real.SIZES)
        for floor in rows.select(means, model=model, hidden="SVD"):
            others = rows.select(means, model=model, quantity="matrix", m=floor["m"])
            assert all(row["error"] >= floor["error"] for row in others)
    assert "| MiniLM | independent | 131,072 |" in rows.format_markdown(means)


def committed(name: str) -> list[dict]:
    return json.loads((summary.RESULTS / f"{name}.json").read_text("utf-8"))["rows"]
