"""The check of coverage: it sees what is wrong with a model, outlives what crashes, and its page shows its rows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pool_jobs
import pytest
import timm
import torch
from scripts import run
from torch import Tensor, nn

from astroattn.attention import AstrocyteAttention
from eval.common import read_rows
from eval.coverage.__main__ import main
from eval.coverage.examining import Status, examine, examine_model
from eval.coverage.inputs import Inputs, candidates, noise
from eval.coverage.page import (
    STATUSES,
    WELL_KNOWN,
    count_pretrained,
    count_reasons,
    count_statuses,
    format_page,
    say_situations,
)
from eval.coverage.pool import run_all
from eval.coverage.subjects import CannotRun, Subject, subjects
from eval.summary import RESULTS

DOCS = Path(__file__).parent.parent / "docs"
SUBJECTS = {(subject.library, subject.type): subject for subject in subjects()}

SAMPLE = [
    ("transformers", "bert", "equal", 2, 2, ""),
    ("transformers", "distilbert", "equal", 2, 2, ""),
    ("transformers", "gpt2", "equal", 2, 2, ""),
    ("transformers", "llama", "equal", 2, 2, ""),
    ("transformers", "clip", "equal", 4, 4, ""),
    ("transformers", "vit", "equal", 2, 2, ""),
    ("transformers", "whisper", "equal", 4, 4, ""),
    ("transformers", "dinov2", "equal", 2, 2, ""),
    ("transformers", "cohere2", "equal", 2, 2, ""),
    ("transformers", "pixtral", "equal", 2, 2, ""),
    ("transformers", "t5", "in part", 2, 4, "a bias for every query and key in causal attention"),
    ("transformers", "mamba", "no attention", 0, 0, "no attention module"),
    ("timm", "deit", "equal", 12, 12, ""),
    ("torch", "TransformerEncoder", "equal", 2, 2, ""),
]


@pytest.mark.parametrize(("library", "kind", "status", "patched", "total", "reason"), SAMPLE)
def test_a_sample_of_types(library: str, kind: str, status: str, patched: int, total: int, reason: str) -> None:
    row = examine(SUBJECTS[library, kind])
    assert (row["status"], row["patched"], row["total"]) == (status, patched, total), row
    assert [each for each in row["reasons"] if reason not in each] == []
    assert bool(row["reasons"]) == bool(reason)
    if patched:
        assert row["difference"] < 1e-5
    json.dumps(row)


Trick = Callable[["Block", Tensor, Tensor], Any]


class Block(nn.Module):
    """Self-attention, and `trick(self, tokens, attended)` in the place of its output."""

    def __init__(self, trick: Trick) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.trick = trick
        self.was_patched = False

    @property
    def astrocyte(self) -> AstrocyteAttention | None:
        return getattr(self.attention, "astrocyte", None)

    def forward(self, x: Tensor, padding: Tensor) -> Any:
        attended = self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        self.was_patched |= self.astrocyte is not None
        return self.trick(self, x, attended)


def examine_block(trick: Trick) -> dict[str, Any]:
    torch.manual_seed(0)
    real = torch.ones(2, 163, dtype=torch.bool)
    real[1, 101:] = False
    return examine_model(Block(trick).eval(), Inputs({"x": noise(2, 163, 32), "padding": ~real}, real, ("x",)))


def crash(block: Block, x: Tensor, attended: Tensor) -> Tensor:
    if block.astrocyte is not None:
        raise IndexError("no such layer")
    return attended


def tell_static(block: Block) -> bool:
    return block.astrocyte is not None and block.astrocyte.configs[0].near == 0


WRONG = {
    "full near field: the outputs differ by": lambda b, x, out: out * (1.001 if b.astrocyte is not None else 1),
    "full near field: 2 tensors come out, and 1 of the original": lambda b, x, out: (out, x) if b.astrocyte else out,
    "static layer: padding changes the outputs": lambda b, x, out: out + tell_static(b) * x.mean(1, True),
    "static layer: NaN or infinity comes out": lambda b, x, out: out / (0 if tell_static(b) else 1),
    "static layer: the astrocytes answer, and nothing changes": lambda b, x, out: x,
    "unpatch: the outputs are not bit for bit": lambda b, x, out: out + 1e-6 * (b.was_patched and not b.astrocyte),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_model_that_is_not_what_its_report_says_is_seen(wrong: str) -> None:
    row = examine_block(WRONG[wrong])
    assert row["status"] == Status.DIFFERENT
    assert row["reasons"][0].startswith(wrong), row
    assert (row["patched"], row["total"]) == (1, 1)
    if "differ by" in wrong:
        assert row["difference"] == pytest.approx(1e-3, rel=0.01)


def test_a_model_that_crashes_is_seen_and_an_honest_one_passes() -> None:
    row = examine_block(crash)
    assert (row["status"], row["reasons"]) == (Status.CRASHED, ["full near field: IndexError: no such layer"])
    assert examine_block(lambda block, x, attended: attended)["status"] == Status.EQUAL


def test_a_model_that_mixes_padding_itself_is_not_blamed() -> None:
    assert examine_block(lambda block, x, attended: attended + x.mean(1, True))["status"] == Status.EQUAL


def test_a_model_that_gives_other_outputs_every_time_is_not_compared() -> None:
    calls = iter(range(1000))
    row = examine_block(lambda block, x, attended: attended + next(calls))
    assert (row["status"], row["reasons"]) == (Status.NOT_RUN, ["two runs of the original differ"])


@pytest.mark.parametrize("error", [CannotRun("too large"), TypeError("too large")])
def test_a_model_that_cannot_be_built_is_a_row_with_the_reason(error: Exception) -> None:
    def build() -> Any:
        raise error

    row = examine(Subject("transformers", "made-up", build))
    assert row["status"] == Status.NOT_RUN
    assert "too large" in row["reasons"][0]


def test_packages_that_are_not_installed_are_said() -> None:
    for library in ("open_clip", "diffusers"):
        (subject,) = (each for each in SUBJECTS.values() if each.library == library)
        try:
            __import__(library)
        except ImportError:
            assert examine(subject)["reasons"] == [f"{library} is not installed"]


def test_a_padded_text_differs_only_in_its_padding() -> None:
    model, inputs = SUBJECTS["transformers", "bert"].build()
    assert inputs.real is not None
    ids, mask = inputs.arguments["input_ids"], inputs.arguments["attention_mask"]
    assert ids.shape == (2, 163)
    assert torch.equal(mask.bool(), inputs.real)
    assert not inputs.real[1, 0]
    assert not inputs.real[1, -1]
    other = inputs.with_other_padding().arguments["input_ids"]
    assert torch.equal(other[inputs.real], ids[inputs.real])
    assert (other != ids)[~inputs.real].double().mean() > 0.9
    assert len(list(candidates(model))) == 2


def test_a_text_has_as_many_placeholders_as_its_images_need() -> None:
    model, inputs = SUBJECTS["transformers", "paligemma"].build()
    ids, token = inputs.arguments["input_ids"], model.config.image_token_id
    assert (ids == token).sum(1).tolist() == [13 * 13] * 2
    assert "pixel_values" in inputs.arguments
    other = inputs.with_other_padding().arguments["input_ids"]
    assert torch.equal(other == token, ids == token)


def test_a_job_that_hangs_or_dies_does_not_end_the_others() -> None:
    answers = dict(run_all(pool_jobs.work, range(6), processes=2, seconds=6))
    assert answers == {
        0: 0,
        1: "took more than 6 s",
        2: "its process ended with exit code -6",
        3: "out of memory",
        4: 16,
        5: 25,
    }


ROWS = [
    {"library": "transformers", "type": "bert", "status": "equal", "reasons": [], "patched": 2, "total": 2},
    {"library": "transformers", "type": "t5", "status": "refused", "reasons": ["bias"], "patched": 0, "total": 4},
    {"library": "timm", "type": "beit", "status": "in part", "reasons": ["bias", "window"], "patched": 1, "total": 4},
    {
        "library": "timm",
        "type": "x",
        "status": "refused",
        "reasons": ["differs by 1.5e-01: a"],
        "patched": 0,
        "total": 1,
    },
    {"library": "timm", "type": "y", "status": "refused", "reasons": ["differs by 2: a"], "patched": 0, "total": 1},
]


def test_nine_tenths_of_timms_pretrained_names_are_patched_or_left_exact_with_a_reason() -> None:
    found = {row["status"]: row["pretrained names"] for row in count_pretrained(read_rows(RESULTS / "coverage.json"))}
    said = sum(found[status] for status in ("equal", "in part", "refused", "no attention"))
    assert said > 0.9 * len(timm.list_pretrained())


def test_page_counts_types_and_reasons() -> None:
    assert count_statuses(ROWS)[:3] == [
        {"status": "equal", "transformers": 1, "timm": 0, "all": 1},
        {"status": "in part", "transformers": 0, "timm": 1, "all": 1},
        {"status": "refused", "transformers": 1, "timm": 2, "all": 3},
    ]
    assert count_reasons(ROWS) == [("bias", 1, 1), ("differs: a", 2, 0), ("window", 0, 1)]
    page = format_page({"rows": ROWS, "versions": {"torch": "2", "transformers": "5", "timm": "1"}}, [])
    assert "| BERT | `bert` | equal | 2 of 2 |  |" in page
    assert "| BEiT (timm) | `beit` | in part | 1 of 4 | bias; window |" in page
    assert "**Refused** (3).\n\ntransformers: `t5`.\n\ntimm: `x`, `y`." in page
    assert "## Faults" not in page
    assert "oldest" not in page
    versions = {"torch": "2.8", "transformers": "5.0", "timm": "1.0"}
    before = [row | {"status": "refused", "reasons": ["why"]} for row in ROWS if row["type"] in ("bert", "x")]
    page = format_page({"rows": ROWS, "versions": versions}, [], {"rows": before, "versions": versions})
    assert "torch 2.8, transformers 5.0, timm 1.0: `make oldest`" in page
    assert page.count("| `bert` | transformers | refused | equal | why |") == 1
    assert "| `x` |" not in page  # refused then and now
    crashed = ROWS[0] | {"status": "crashed", "reasons": ["KeyError: a | b"]}
    page = format_page({"rows": [crashed], "versions": {"torch": "2", "transformers": "5", "timm": "1"}}, [])
    assert "| `bert` | transformers | crashed | KeyError: a \\| b |" in page


def situations() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((DOCS / "results" / "situations.json").read_text("utf-8"))["rows"]
    return rows


def test_situations_are_counted_and_those_committed_are_as_drawn() -> None:
    rows = [{"came": came} for came in ("patched", "patched", "refused", "the original cannot be wrapped", "wrong")]
    assert say_situations(rows).startswith(
        "Of 5 that were examined, 2 ran patched and were what the report says, 1 could"
    )
    assert "in 1 the\noriginal" in say_situations(rows)
    assert say_situations(rows).endswith("; 1 went wrong.")
    assert say_situations(rows[:4]).endswith("; none went wrong.")
    code = "from eval.situations.drawing import draw; print(*draw(500, 0), sep='\\n')"
    drawn = subprocess.run([sys.executable, "-c", code], cwd=DOCS.parent, capture_output=True, text=True, check=True)
    assert [row["situation"] for row in situations()] == drawn.stdout.splitlines()
    assert not [row for row in situations() if row["came"] == "wrong"]


def test_every_status_has_a_meaning() -> None:
    assert set(STATUSES) == set(Status)


def test_page_is_made_from_the_committed_result() -> None:
    result, oldest = (
        json.loads((DOCS / "results" / name).read_text("utf-8")) for name in ("coverage.json", "coverage_oldest.json")
    )
    assert (DOCS / "coverage.md").read_text("utf-8") == format_page(result, situations(), oldest)
    assert len(result["rows"]) > 600
    assert len(oldest["rows"]) > 500
    assert not [row for row in oldest["rows"] if row["status"] in ("crashed", "silently different")]
    assert set(WELL_KNOWN.values()) <= {(row["library"], row["type"]) for row in result["rows"]}


def test_script_examines_what_is_asked_for_and_goes_on_where_it_was(tmp_path: Path) -> None:
    path, page = tmp_path / "rows.json", tmp_path / "page.md"
    path.write_text(json.dumps({"rows": [ROWS[0] | {"class": "kept", "difference": 0.0}]}), "utf-8")
    words = ("--only", "bert", "--only", "bloom", "--resume", "--json", str(path), "--page", str(page))
    done = run(main, *words)
    assert done.exit_code == 0, done.output
    rows = json.loads(path.read_text("utf-8"))["rows"]
    assert [(row["type"], row["class"]) for row in rows] == [("bert", "kept"), ("bloom", "BloomModel")]
    assert "bloom: refused, 0 of 2" in done.output
    assert "| Bloom | `bloom` | refused |" in page.read_text("utf-8")


def test_script_refuses_a_pattern_that_matches_nothing() -> None:
    done = run(main, "--only", "nonesuch")
    assert done.exit_code == 2
    assert "matches none" in done.output
