"""Learned linear attention in pretrained decoders: what it loses before and after training, beside other ways.

Every layer reads its newest tokens exactly and all older ones through hidden neurons. The neurons learn layer by layer
(transfer), then adapters of peft and the neurons learn the original's predictions (tuning). Beside it: the near field
alone (the same layer with silent neurons), random features in the neurons' place, both tuned alike, and the streaming
memory of as many numbers or fewer, which is not trained. Texts, measures and decoders are those of `eval.generate`;
`eval/distill_decoders/texts.py` says what is learned from.

Little was chosen: that the transfer is by rows (of the outputs' error, or both) and its rate, on three layers and seven
texts of SmolLM2 that are not reported; its steps, by the time there was. Of SmolLM2's adapters the rate (of 1e-3 and
3e-4) and the steps (of 24, of which the last 8 brought nothing) were chosen on the texts held out, one seed; the rate
of stories260K's is a first try. With --held-out these texts are reported, to choose on.

    FILE=docs/results/distill_decoders
    python -m eval.distill_decoders --model stories --seeds 5 --json ${FILE}_stories.json
    python -m eval.distill_decoders --model smollm2 --seeds 5 --needles 1 --json ${FILE}_smollm2.json
    python -m eval.distill_decoders.page        # docs/experiments/decoders.md and its figure, from both files
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from astroattn.config import ENTRIES_STEP
from eval.common import JsonOption, LimitOption, SeedsOption, print_rows, read_rows, rounded, run_script, write_json
from eval.distill_decoders.measuring import Loss, answers, draw_needles, states_of
from eval.distill_decoders.texts import Texts, load_texts
from eval.distill_decoders.training import (
    KINDS,
    LOSSES,
    SETTINGS,
    START,
    Settings,
    patched_copy,
    train,
)
from eval.generate.reading import ORIGINAL, OURS, read
from eval.generate.recall import Needle
from eval.generate.subjects import LOADERS, SHORT, Subject

STREAMING = "streaming memory"
ATTENTIONS = (ORIGINAL, STREAMING, *KINDS)
LOSS, CURVE, RECALL = "loss", "curve", "recall"  # what a row is of
ONE_OF_A_KIND = ("measure", "attention", "training", "seed", "near", "neurons", "stage", "steps", "depth")
Row = dict[str, Any]
Keep = Callable[[Row], None]


def entries_of(model: Any, settings: Settings) -> int:
    """The most entries of a streaming memory that has no more numbers than near field and hidden layer together.

    Both are counted as they must be stored: keys and values of the near field once for each key head, the hidden
    layer's H, g and gains once for each query head; an entry's key, value, log weights and three numbers of its
    attention, and the memory's six means.
    """
    config = model.config
    group = config.num_attention_heads // config.num_key_value_heads
    dim = config.hidden_size // config.num_attention_heads
    hidden = group * settings.num_hidden * (dim + 2)
    room = 2 * dim * (settings.near - 1) + hidden - 2 * (group + 2) * dim
    return int(room / (2 * dim + group + 3)) // ENTRIES_STEP * ENTRIES_STEP


class Experiment:
    """One decoder with its texts, and the rows of every kind of attention, which `keep` is called with."""

    def __init__(
        self, subject: Subject, settings: Settings, reported: list[Tensor], needles: list[Needle], keep: Keep
    ) -> None:
        self.subject, self.settings, self.needles = subject, settings, needles
        self.loss = Loss(subject, reported, subject.start)
        self.place = {"model": subject.name, "near": settings.near, "neurons": settings.num_hidden}
        self._keep = keep

    def untrained(self, attention: str) -> None:
        """The original, or the streaming memory."""
        entries = entries_of(self.subject.model, self.settings) if attention == STREAMING else 0
        name = OURS if attention == STREAMING else ORIGINAL
        row = {"attention": attention, "training": START, "seed": 0, "entries": entries}
        self._measure(row, lambda texts: read(self.subject, name, entries, texts))

    def trained(self, kind: str, texts: Texts, seed: int, state: Path | None) -> None:
        """A kind of attention at every stage of its training, and its curve."""
        model = patched_copy(self.subject, kind, self.settings, seed)
        held_out = Loss(self.subject, texts.held_out, self.subject.start)
        began = time.time()

        def look(model: nn.Module, stage: str, steps: int, minutes: float) -> None:
            row = {"measure": CURVE, "attention": kind, "seed": seed, "stage": stage, "steps": steps}
            row |= rounded({"minutes": minutes}) | held_out(states_of(model, held_out.texts, f"{kind}, held out"))
            self._keep(self.place | row)

        def report(stage: str, steps: int, minutes: float) -> None:
            row = {"attention": kind, "training": stage, "seed": seed, "steps": steps}
            row |= rounded({"minutes": minutes, "wall minutes": (time.time() - began) / 60})
            self._measure(row, lambda texts: states_of(model, texts, f"{kind}, {stage}"))

        folder = None if state is None else state / f"{self.subject.name} {kind} {seed}".replace(" ", "_")
        train(model, kind, self.settings, texts, seed, look, report, folder)

    def _measure(self, row: Row, states: Callable[[list[Tensor]], list[Tensor]]) -> None:
        self._keep(self.place | {"measure": LOSS} | row | self.loss(states(self.loss.texts)))
        kind = row["attention"]
        if self.needles and row["training"] == (self.settings.last(kind) if kind in KINDS else START):
            for each in answers(self.subject, self.needles, states([needle.text for needle in self.needles])):
                self._keep(self.place | {"measure": RECALL} | row | each)


def main(
    model: Annotated[str, typer.Option(help=f"Of {', '.join(LOADERS)}.")] = "stories",
    json: JsonOption = None,
    seeds: SeedsOption = 1,
    limit: LimitOption = None,
    attentions: Annotated[list[str] | None, typer.Option("--attention", help=f"Of {', '.join(ATTENTIONS)}.")] = None,
    near: Annotated[int | None, typer.Option(help="Tokens of the near field.", min=1)] = None,
    neurons: Annotated[int | None, typer.Option(help="Hidden neurons of each head.", min=1)] = None,
    transfer: Annotated[int | None, typer.Option(help="Steps layer by layer.", min=1)] = None,
    tuning: Annotated[int | None, typer.Option(help="Steps of the adapters; 0: none.", min=0)] = None,
    rate: Annotated[float | None, typer.Option(help="Of the adapters.")] = None,
    loss: Annotated[str | None, typer.Option(help=f"Of the adapters, of {', '.join(LOSSES)}.")] = None,
    needles: Annotated[int, typer.Option(help="Numbers to be recalled, for each depth.", min=0)] = 0,
    held_out: Annotated[bool, typer.Option("--held-out", help="Report the texts held out, to choose on.")] = False,
    state: Annotated[Path | None, typer.Option(help="Folder that keeps half-done trainings, to go on from.")] = None,
) -> None:
    """Train decoders with a near field and hidden neurons, and measure what they lose."""
    chosen = tuple(attentions or ATTENTIONS)
    for option, given, known in (
        ("--model", [model], LOADERS),
        ("--attention", chosen, ATTENTIONS),
        ("--loss", [loss] if loss else [], LOSSES),
    ):
        for name in given:
            if name not in known:
                raise typer.BadParameter(f"{name!r}; must be one of {', '.join(known)}", param_hint=option)
    torch.set_flush_denormal(True)  # the exponentials of hidden layers make many, which slow a CPU down
    if (subject := LOADERS[model]()) is None:
        Console().print(f"{model}: not here; the docstring of eval/generate/subjects.py says where it comes from")
        raise typer.Exit(2)
    if needles and subject.encode is None:
        raise typer.BadParameter(f"{needles}; {subject.name} reads no numbers", param_hint="--needles")
    given = {"near": near, "num_hidden": neurons, "transfer": transfer, "tuning": tuning, "rate": rate, "loss": loss}
    settings = replace(SETTINGS[model], **{name: value for name, value in given.items() if value is not None})
    reported = load_texts(subject).held_out if held_out else [text[:, :SHORT] for text in subject.texts[:limit]]
    rows = read_rows(json) if json else []
    found = {_key(row) for row in rows}

    def keep(row: Row) -> None:
        if _key(row) in found:
            return
        rows.append(row)
        found.add(_key(row))
        if json:  # at once, so that a run that breaks off is not lost
            write_json(json, rows, seed=0)
        if row["measure"] != CURVE:
            print_rows([{name: value for name, value in row.items() if name != "texts"}], title=row["measure"])

    drawn = draw_needles(subject, SHORT, needles) if needles else []
    experiment = Experiment(subject, settings, reported, drawn, keep)
    for attention in (each for each in (ORIGINAL, STREAMING) if each in chosen):
        experiment.untrained(attention)
    for seed in range(seeds):
        texts = load_texts(subject, seed)
        for kind in (each for each in reversed(KINDS) if each in chosen):
            place = experiment.place | {"attention": kind, "training": settings.last(kind), "seed": seed}
            place["measure"] = RECALL if needles else LOSS  # which comes last
            if not any(place.items() <= row.items() for row in rows):
                experiment.trained(kind, texts, seed, state)


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ONE_OF_A_KIND)


if __name__ == "__main__":
    run_script(main, data=True)
