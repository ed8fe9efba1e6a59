"""docs/science.md against the code and the committed results it speaks of."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from eval.error_vs_hidden.real import SIZES
from eval.error_vs_hidden.rows import QUANTITIES

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "science.md").read_text("utf-8")


def test_every_equation_stands_beside_its_line_of_code() -> None:
    section = TEXT.split("## The equations")[1].split("\n## ")[0]
    rows = re.findall(r"^\|.*\| `(.+)` \| (\S+\.py) \|$", section, re.MULTILINE)
    assert len(rows) == section.count(".py |") >= 20
    for code, where in rows:
        lines = [line.strip() for line in (ROOT / where).read_text("utf-8").splitlines()]
        assert code in lines, f"{where} has no line {code!r}"


def test_links_commands_and_tests_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / "docs" / target).is_file(), target
    for module in re.findall(r"python -m (eval\.\w+)", TEXT):
        assert importlib.util.find_spec(module), module
    for path in re.findall(r"`(?:python )?((?:tests|examples)/\w+\.py)`", TEXT):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("name", ["calcium_traces", "controls", "error_vs_hidden", "retrieval", "time_constants"])
def test_tables_are_those_of_the_committed_results(name: str) -> None:
    places = {"calcium_traces": ".__main__", "controls": ".__main__", "error_vs_hidden": ".rows"}
    module = importlib.import_module(f"eval.{name}{places.get(name, '')}")
    assert module.format_markdown(committed(name)) in TEXT


def test_sentences_say_what_was_measured() -> None:
    flat = " ".join(TEXT.split())
    error = {
        (row["model"], row["hidden"], row["m"], row["quantity"]): row["error"] for row in committed("error_vs_hidden")
    }
    models, most = ("MiniLM", "ViT-tiny"), 2**17
    beaten = [  # the first m with less error than uniform attention
        min(m for m in SIZES if error[model, "independent", m, quantity] < error[model, "uniform", 1, quantity])
        for model, quantity in product(models, ("matrix", "output", "block"))
    ]
    assert f"it takes {min(beaten)} to {max(beaten):,} neurons, by model and measure, to do better than" in flat
    outputs = [error[model, "independent", most, "output"] for model in models]
    assert "error of the output is still {:.2f} and {:.2f}.".format(*outputs) in flat
    gain = [
        error[model, "independent", most, quantity] / error[model, "calibrated", most, quantity]
        for quantity, model in product(("output", "normaliser"), models)
    ]
    assert "its output is {:.1f} and {:.1f} times, its normaliser {:.1f} and {:.1f} times as".format(*gain) in flat
    for model, quantity in product(models, QUANTITIES):
        hebbian, learned, random = (
            error[model, hidden, m, quantity] for hidden, m in (("Hebbian", 64), ("learned", 64), ("independent", most))
        )
        assert hebbian < learned < random or quantity == "block"
    assert error["ViT-tiny", "Hebbian", 64, "output"] < error["ViT-tiny", "calibrated", most, "output"]
    needed = [row["log10_neurons"] for row in committed("error_vs_hidden_theory") if "log10_neurons" in row]
    assert f"asks for 10^{min(needed):.0f} to 10^{max(needed):.0f} neurons per head" in flat
    heads = [row for row in committed("calcium_traces") if row["part"] == "all heads" and row["m"] == 100_000]
    good = sum(round(row["share_above_0.95"] * row["heads"]) for row in heads if row["weights"] == "iid")
    assert f"{good} of {sum(row['heads'] for row in heads if row['weights'] == 'iid')} heads reach 0.95" in flat


def committed(name: str) -> list[dict[str, Any]]:
    rows = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text("utf-8"))["rows"]
    assert isinstance(rows, list)
    return rows
