"""A pretrained decoder whose cache has a fixed size: what it loses and what it costs, beside other such caches.

    loss      nats per token above the original's, KL, agreement, on texts of several lengths
    kinds     the same of each text by itself, news among them
    distance  the same by the place in a long text: whether it grows
    recall    a number somewhere in a long text, asked for at the end
    copy      a passage that comes again after a gap
    speed     milliseconds of a step and bytes of the cache, against length

`eval/generate/` has a file for each, which says what its rows are and what `--tokens` and `--limit` mean there. Every
cache but ours is re-implemented in `eval/generate/caches.py`, for whole texts; only ours is timed.

    python -m eval.generate --task recall --json docs/results/generate_recall.json
    python -m eval.generate.page        # docs/generation.md and its figure, from all files
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.console import Console

from eval.common import FigureOption, JsonOption, LimitOption, print_rows, run_script, write_figure, write_json
from eval.generate import copying, distance, kinds, loss, recall, speed
from eval.generate.caches import NAMES
from eval.generate.figure import plot
from eval.generate.reading import OURS, PLANNED, WITH_PLAN
from eval.generate.subjects import LOADERS, Subject

Measure = Callable[[Subject, tuple[str, ...], tuple[int, ...], int | None], Iterator[dict[str, Any]]]
"""Rows of a subject with these caches and numbers of tokens, from so many examples (None: as many as are usual)."""

TASKS: dict[str, Measure] = {
    "loss": loss.measure,
    "kinds": kinds.measure,
    "distance": distance.measure,
    "recall": recall.measure,
    "copy": copying.measure,
    "speed": speed.measure,
}
CACHES = (*NAMES, OURS, PLANNED)
ALL_BUDGETS = ("loss", "kinds", "speed")  # the others take the largest alone, unless they are told


def main(
    task: Annotated[str, typer.Option(help=f"Of {', '.join(TASKS)}.")] = "loss",
    json: JsonOption = None,
    figure: FigureOption = None,
    limit: LimitOption = None,
    models: Annotated[list[str] | None, typer.Option("--model", help=f"Of {', '.join(LOADERS)}; all if none.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Lengths in place of the task's own.", min=64)] = None,
    entries: Annotated[list[int] | None, typer.Option(help="Budgets in place of the model's own.")] = None,
    caches: Annotated[
        list[str] | None, typer.Option("--cache", help=f"Of {', '.join(CACHES)}; the others, too, with {WITH_PLAN!r}.")
    ] = None,
) -> None:
    """Compare caches of fixed size on pretrained decoders."""
    names = tuple(caches) if caches else CACHES
    for option, given, known in (
        ("--task", [task], TASKS),
        ("--model", models or [], LOADERS),
        ("--cache", names, (*CACHES, *(name + WITH_PLAN for name in NAMES))),
    ):
        for name in given:
            if name not in known:
                raise typer.BadParameter(f"{name!r}; must be one of {', '.join(known)}", param_hint=option)
    if task == "speed" and (limit or caches):
        raise typer.BadParameter("speed times the original and ours, on one text", param_hint="--limit, --cache")
    rows: list[dict[str, Any]] = []
    for name in models or LOADERS:
        subject = LOADERS[name]()
        if subject is None:
            Console().print(f"{name}: not here; the docstring of eval/generate/subjects.py says where it comes from")
            continue
        if task not in subject.tokens:
            Console().print(f"{name}: it takes no part in {task!r}, its texts being short")
            continue
        lengths = tuple(tokens or subject.tokens[task])
        longest = max(text.shape[1] for text in subject.texts)
        if task != "speed" and max(lengths) > longest:
            raise typer.BadParameter(f"{max(lengths)}; the texts of {name} have {longest}", param_hint="--tokens")
        budgets = subject.budgets if task in ALL_BUDGETS else subject.budgets[-1:]
        for row in TASKS[task](replace(subject, budgets=tuple(entries or budgets)), names, lengths, limit):
            rows.append(row)
            if json:  # at once, so that a run that breaks off is not lost
                write_json(json, rows, seed=0)
    if not rows:
        raise typer.Exit(2)
    print_rows(rows, title=task)
    if figure:
        write_figure(figure, plot({task: rows}))


if __name__ == "__main__":
    run_script(main, data=True)
