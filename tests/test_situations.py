"""Generated situations: a sample of what `python -m eval.situations` runs, and whether it sees what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import run
from torch import Tensor, distributed

from astroattn import AstrocyteAttention
from astroattn.patching.site import Site
from eval.situations import examining
from eval.situations.__main__ import main
from eval.situations.drawing import CHOICES, Situation, draw, simplify
from eval.situations.examining import Wrong, examine, judge
from eval.situations.wrapping import COMPILED


@pytest.fixture(autouse=True)
def _no_processes() -> Iterator[None]:
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


@cache
def sample() -> list[Situation]:
    """Graphs take seconds each, so there are few of them."""
    quick = [each for each in draw(60, 1) if each.wrapper not in COMPILED]
    return [
        *quick[:22],
        *(Situation("bert", wrapper=wrapper, mask="right", config="short") for wrapper in COMPILED[:3]),
        Situation("mistral", tokens=33, config="learned"),  # one more than its window
        Situation("torch_encoder", wrapper="compile_inside", mask="both", config="static_near", grad="inference_mode"),
    ]


@pytest.mark.parametrize("number", range(27))
def test_a_sample(number: int) -> None:
    situation = sample()[number]
    try:
        examine(situation)
    except Wrong as error:
        pytest.fail(f'{error}\n    python -m eval.situations --case "{situation}"')


# what is wrong is seen


def change_answer(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Of the astrocytes, but not of the softmax that the probe sees."""

    def forward(self: AstrocyteAttention, *args: Tensor, **kwargs: Any) -> Tensor:
        output = FORWARD(self, *args, **kwargs)
        return output if self.exact else change(output)

    return forward


def without_mask(self: AstrocyteAttention, *args: Tensor, key_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    return FORWARD(self, *args, **kwargs | ({"key_mask": key_mask} if self.exact else {}))


def always_softmax(self: AstrocyteAttention, *args: Tensor, **kwargs: Any) -> Tensor:
    self.exact = True
    return FORWARD(self, *args, **kwargs)


FORWARD = AstrocyteAttention.forward
BERT = Situation("bert", tokens=20, grad="grad")
FAULTS: dict[str, tuple[Any, str, Any, Situation, str]] = {
    "other outputs": (
        AstrocyteAttention,
        "forward",
        change_answer(lambda x: x * 1.01),
        BERT,
        "the outputs differ by .* from softmax attention",
    ),
    "other gradients": (
        AstrocyteAttention,
        "forward",
        change_answer(lambda x: x * 0.9 + 0.1 * x.detach()),
        BERT,
        "the gradients differ by .* from softmax attention",
    ),
    "NaN": (
        AstrocyteAttention,
        "forward",
        change_answer(lambda x: x * torch.nan),
        replace(BERT, config="short"),
        "NaN or infinity in the outputs",
    ),
    "softmax in its place": (
        AstrocyteAttention,
        "forward",
        always_softmax,
        replace(BERT, config="short"),
        "nothing changes",
    ),
    "a lost mask": (
        AstrocyteAttention,
        "forward",
        without_mask,
        replace(BERT, config="static", mask="right"),
        "padding moves the outputs at real tokens",
    ),
    "a fallback that is not said": (
        Site,
        "count",
        lambda self, reason, message: self.fallbacks.update([reason]),
        replace(BERT, mask="dense_bool"),
        "left to the host without a warning: a dense mask",
    ),
    "a fallback that is not counted": (
        Site,
        "count",
        lambda self, reason, message: None,
        replace(BERT, mask="dense_bool"),
        "1 calls, 0 answers and 0 counted fallbacks",
    ),
    "an unpatching that does nothing": (
        examining,
        "unpatch",
        lambda model: None,
        replace(BERT, config="short"),
        "unpatched",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, value, situation, message = FAULTS[fault]
    assert examine(situation) == "patched"
    monkeypatch.setattr(owner, name, value)
    with pytest.raises(Wrong, match=message):
        examine(situation)


def test_what_is_wrong_is_made_simple(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AstrocyteAttention, "forward", without_mask)
    row = judge(Situation("bert", tokens=30, mask="left", dtype="float64", config="static", where="last"))
    assert row["came"] == examining.WRONG
    assert "padding moves" in row["why"]
    assert row["simplest"] == "model=bert mask=left config=static"


# words


def test_situations_are_lines() -> None:
    for situation in draw(50, 3):
        assert Situation.parse(str(situation)) == situation
    assert str(Situation("bert")) == "model=bert"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tokens=3", "needs model=NAME"),
        ("model=nonesuch", "model=nonesuch; must be one of bert"),
        ("model=bert mask=odd", "mask=odd; must be one of none"),
        ("model=bert size=3", "'size' is none of model"),
    ],
)
def test_other_lines_are_refused(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Situation.parse(line)


def test_draws_are_many_and_repeat_themselves() -> None:
    drawn = draw(200, 5)
    assert drawn == draw(200, 5) != draw(200, 6)
    assert len(set(drawn)) == 200
    for name, values in CHOICES.items():
        if name not in ("tokens", "batch"):
            assert {getattr(each, name) for each in drawn} == set(values), name


def test_simplify_keeps_what_matters() -> None:
    whole = Situation("vit", tokens=99, mask="bias", dtype="float16", wrapper="peft", training=True)
    assert simplify(whole, lambda each: each.wrapper == "peft" and each.training) == Situation(
        "vit", wrapper="peft", training=True
    )


# the script


def test_script(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    done = run(main, "--count", "3", "--seed", "2", "--json", str(path), "--processes", "1")
    assert done.exit_code == 0, done.output
    assert [row["situation"] for row in json.loads(path.read_text("utf-8"))["rows"]] == [str(x) for x in draw(3, 2)]
    left = json.loads(path.read_text("utf-8"))["rows"][:2]
    path.write_text(json.dumps({"rows": left}), "utf-8")
    done = run(main, "--count", "3", "--seed", "2", "--json", str(path), "--processes", "1", "--resume")
    assert done.exit_code == 0, done.output
    assert [row["situation"] for row in json.loads(path.read_text("utf-8"))["rows"]] == [str(x) for x in draw(3, 2)]
    done = run(main, "--case", "model=bert mask=right")
    assert (done.exit_code, done.output) == (0, "patched\n")
    done = run(main, "--case", "mask=right")
    assert done.exit_code == 2
    assert "needs model=NAME" in done.output


def test_the_page_says_how_much_there_is_to_draw_from() -> None:
    page = (Path(__file__).parent.parent / "docs" / "coverage.md").read_text("utf-8")
    assert f"{len(CHOICES['model'])} tiny models, six configs, {len(CHOICES['mask'])} masks" in page
    assert len(CHOICES["config"]) == 6
