"""Tables that fit, and files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from astroattn.files import check_output, replacing, write_text
from astroattn.suggestions import suggest
from astroattn.tables import WIDTH, Table, render, render_markdown, terminal_width

REASON = "causal attention needs a streaming memory or a static layer, which this is not"
REPORT = Table(
    ("#", "module", "heads", "now", "why"),
    [
        *((str(n), f"vision_model.encoder.layers.{n}.self_attn", "12 x 64", "astrocyte", "") for n in range(12)),
        ("12", "vision_model.encoder.layers.12.self_attn", "12 x 64", "exact", REASON),
        ("13", "vision_model.encoder.layers.13.self_attn", "12 x 64", "exact", REASON),
    ],
    names=1,
    remarks=4,
)
FIGURES = Table(
    ("", *(f"a control of {n}" for n in range(9))),
    [(f"metric {row}", *(f"{row}.{n:04d}" for n in range(9))) for row in range(3)],
    title="figures",
    caption="what they are",
)


@pytest.mark.parametrize("table", [REPORT, FIGURES], ids=["names and remarks", "many columns"])
@pytest.mark.parametrize("width", [60, 80, 100, 400])
def test_rows_are_lines_that_fit_and_nothing_is_cut(table: Table, width: int) -> None:
    text = table.text(width)
    drawn = [line for line in text.splitlines() if not line.startswith("(1) ")]
    assert max(map(len, drawn)) <= width
    for row in table.rows:
        for cell in filter(None, row):
            shared = cell.removeprefix("vision_model.encoder.layers.").removesuffix(".self_attn")
            assert cell in text or f" {shared} " in text
    lines = [line for line in drawn if line.startswith(table.rows[-1][0])]
    assert len(lines) == text.count("\n\n") + 1  # one in each part
    assert len(lines) == 1 or table is FIGURES


def test_what_is_shared_is_written_once_and_only_where_room_is_wanted() -> None:
    narrow, wide = REPORT.text(60), REPORT.text(400)
    assert narrow.splitlines()[0] == "module: vision_model.encoder.layers.*.self_attn"
    assert narrow.count("encoder") == 1
    assert narrow.count(REASON) == 1
    assert narrow.count("(1)") == 3
    assert wide.count("vision_model.encoder.layers.") == 14
    assert wide.count(REASON) == 2


def test_names_that_share_nothing_stay() -> None:
    table = Table(("module", "x"), [("a.b", "1"), ("c.d.e", "2"), ("", "3")], names=0)
    assert all(name in table.text(5) for name in ("a.b", "c.d.e"))
    assert Table(("module", "x"), [("a.1", "1"), ("a.1", "2")], names=0).text(5).count("1") == 3


def test_numbers_end_and_words_begin_at_one_place() -> None:
    lines = Table(("name", "number", "kind"), [("a", "1.5", "x"), ("b", "100", "long")]).text().splitlines()
    assert lines[2:] == ["a        1.5  x", "b        100  long"]


def test_markdown() -> None:
    text = render_markdown(["one", "", Table(("a|b", "n"), [("x", "1")], caption="end")])
    assert text == "one\n\n| a\\|b | n |\n| :--- | ---: |\n| x | 1 |\n\nend"


def test_the_width_is_that_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "133")
    assert terminal_width() == 133
    assert render([FIGURES]) == FIGURES.text(WIDTH)  # what `str` gives is the same everywhere


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")

    def interrupted() -> None:
        with replacing(path) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(FileNotFoundError, match=r"no/b\.json"):
        write_text(tmp_path / "no" / "b.json", "")


def test_outputs_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    check_output("json", path, (".json",), force=False)
    path.touch()
    check_output("json", path, (".json",), force=True)
    (tmp_path / "b.json").mkdir()
    for name, message in {
        "a.json": "json: .*--force",
        "b.json": "is no file",
        "c.txt": "must end in .json, got",
    }.items():
        with pytest.raises(ValueError, match=message):
            check_output("json", tmp_path / name, (".json",), force=False)


def test_suggestions() -> None:
    assert suggest("hebian", ("hebbian", "random")) == "; did you mean 'hebbian'?"
    assert suggest("zebra", ("hebbian", "random")) == ""
