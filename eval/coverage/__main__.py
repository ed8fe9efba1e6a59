"""Coverage: which models astroattn can patch, and whether a patched model does what the report says.

One tiny random model of every type in transformers' AutoModel mapping and of every family of timm, and those of
torch and torchvision (open_clip and diffusers where they are installed), each in a process of its own. It must equal
the original with a near field that covers the sequence, change with the default config and a static layer without
mixing in padding, and be bit for bit the original again when unpatched.

    python -m eval.coverage --json docs/results/coverage.json --page docs/coverage.md
    python -m eval.coverage --only bert --only vision_transformer
"""

from __future__ import annotations

import fnmatch
import json as files
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from eval.common import JsonOption, print_rows, provenance, rounded, run_script, write_json
from eval.coverage.examining import Row, Status, examine_at, make_row
from eval.coverage.page import count_pretrained, count_statuses, format_page
from eval.coverage.pool import run_all
from eval.coverage.subjects import subjects
from eval.summary import RESULTS

PRELOAD = ("eval.coverage.examining", "eval.common", "typer", "tqdm", "transformers.models.bert.modeling_bert")


SHOWN = 40  # rows
OFTEN = 20


def measure(chosen: list[int], *, processes: int, seconds: float) -> Iterator[Row]:
    """One row a subject, as they end; see `examining.examine`."""
    everything = subjects()
    for index, answer in run_all(examine_at, chosen, processes=processes, seconds=seconds, preload=PRELOAD):
        if isinstance(answer, str):  # why there is none
            status = Status.CRASHED if "ended" in answer else Status.NOT_RUN
            answer = make_row(everything[index]) | {"status": status, "reasons": [answer]}
        yield rounded(answer)


def main(
    json: JsonOption = None,
    page: Annotated[Path | None, typer.Option(help="Write the page of the docs to this file.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Only types that match this pattern (* and ?); may be given several times.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Keep the rows that the JSON has, and examine what it lacks.")] = False,
    processes: Annotated[int, typer.Option(help="How many models at a time.", min=1)] = 2,
    seconds: Annotated[float, typer.Option(help="The most that one model may take.", min=1)] = 60,
) -> None:
    """Examine every model, and say how many are equal, refused and so on."""
    everything = subjects()
    patterns = only or ["*"]
    chosen = [
        index
        for index, subject in enumerate(everything)
        if any(fnmatch.fnmatchcase(subject.type, pattern) for pattern in patterns)
    ]
    if not chosen:
        raise typer.BadParameter(f"only: {', '.join(patterns)} matches none of {len(everything)} types")
    rows: list[Row] = files.loads(json.read_text("utf-8"))["rows"] if resume and json and json.exists() else []
    done = {(row["library"], row["type"]) for row in rows}
    chosen = [index for index in chosen if (everything[index].library, everything[index].type) not in done]
    places = {(subject.library, subject.type): place for place, subject in enumerate(everything)}
    for row in tqdm(measure(chosen, processes=processes, seconds=seconds), "models", len(chosen), unit="model"):
        rows.append(row)
        if json and len(rows) % OFTEN == 0:  # so that a run that breaks off is not lost
            write_json(json, rows, seed=0)
    rows.sort(key=lambda row: places.get((row["library"], row["type"]), len(places)))
    if json:
        write_json(json, rows, seed=0)
    if page:
        situations, oldest = (
            files.loads((RESULTS / name).read_text("utf-8")) for name in ("situations.json", "coverage_oldest.json")
        )
        text = format_page({"rows": rows} | provenance(0), situations["rows"], oldest)
        page.write_text(text, encoding="utf-8")
    if len(rows) <= SHOWN:
        for row in rows:
            modules = f"{row['patched']} of {row['total']}"
            print(f"{row['library']} {row['type']}: {row['status']}, {modules}", *row["reasons"], sep="\n    ")
    print_rows(count_statuses(rows), title="Number of types")
    print_rows(count_pretrained(rows), title="Number of pretrained names of timm, by what came of their family")


if __name__ == "__main__":
    run_script(main)
