"""The benchmark's rows: how to find them, what they sum up to, and how they are printed.

python -m eval.benchmark.rows docs/results/benchmark.json    # the tables of docs/benchmarks.md
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eval.common import run_script

Row = dict[str, Any]
SHOWN = (197, 512, 1024, 4096, 16384, 65536)  # lengths in the table
FITTED = 4  # longest lengths that the slope of the peak memory is fitted over


def select(rows: list[Row], part: str, **values: Any) -> list[Row]:
    """The rows of a part that have these values."""
    return [row for row in rows if row["part"] == part and all(row[name] == value for name, value in values.items())]


def values_of(rows: list[Row], column: str, *parts: str) -> list[Any]:
    """The different values of a column, in order."""
    return list(dict.fromkeys(row[column] for row in rows if row["part"] in parts))


def label(row: Row) -> str:
    """How tables and figures call what a row has measured."""
    plain = ", plain" if row.get("backend") == "torch" else ""
    return row["name"] + plain + (", graph" if row["launch"] == "graph" else "")


def find_crossover(rows: list[Row]) -> int | None:
    """The shortest length from which on one contestant is faster than SDPA, of those measured."""
    slower = [row["tokens"] for row in rows if not row["times SDPA"] or row["times SDPA"]["median"] >= 1]
    longer = [row["tokens"] for row in rows if row["tokens"] > max(slower, default=0)]
    return min(longer, default=None)


def fit_slope(rows: list[Row]) -> float | None:
    """Slope of log peak memory in log N over the longest lengths: 1 is linear. None for fewer than three lengths."""
    points = sorted((row["tokens"], row["peak MB"]) for row in rows)[-FITTED:]
    if len(points) < 3:
        return None
    return float(np.polyfit(*np.log(np.array(points).T), 1)[0])


def summarise(rows: list[Row]) -> list[Row]:
    """Crossover and slope of each contestant."""
    summary = []
    keys = ("dtype", "pass", "launch", "name", "backend")
    for values in dict.fromkeys(tuple(row[key] for key in keys) for row in select(rows, "attention")):
        same = dict(zip(keys, values, strict=True))
        mine = select(rows, "attention", **same)
        found = {"faster than SDPA from": find_crossover(mine), "memory slope": fit_slope(mine)}
        found["error"] = mine[0].get("error")
        summary.append({"part": "summary", **same, **found})
    return summary


def print_results(rows: list[Row]) -> None:
    """Print everything: times with half their interquartile range, milliseconds on a GPU and ratios on a CPU."""
    (settings,) = select(rows, "settings")
    on_gpu = settings["device"] == "cuda"
    print(", ".join(f"{key}: {value}" for key, value in settings.items() if key != "part"))
    for row in select(rows, "ceilings"):
        copied, done = row["bytes per second"] / 1e9, row["operations per second"] / 1e12
        print(f"{row['dtype']}: copies at {copied:.0f} GB/s, multiplies matrices at {done:.3g} Tflop/s")
    for dtype in values_of(rows, "dtype", "attention"):
        for name in values_of(rows, "pass", "attention"):
            mine = select(rows, "attention", dtype=dtype, **{"pass": name})
            unit = "milliseconds" if on_gpu else "in times of SDPA's time"
            _print_grid(f"{name}, {dtype}, {unit}", mine, "tokens", lambda row: _show_time(row, "times SDPA", on_gpu))
            if on_gpu:
                _print_grid(f"{name}, {dtype}, % of bandwidth / of matrix products", mine, "tokens", _show_fractions)
            eager = select(mine, "attention", launch="eager")
            _print_grid(f"{name}, {dtype}, peak MB", eager, "tokens", lambda row: f"{row['peak MB']:.3g}")
    for dtype in values_of(rows, "dtype", "models"):
        for model in values_of(rows, "model", "models"):
            mine = [row | {"case": _describe(row)} for row in select(rows, "models", dtype=dtype, model=model)]
            unit = "milliseconds" if on_gpu else "in times of the original's time"
            show = lambda row: _show_time(row, "times original", on_gpu)  # noqa: E731
            _print_grid(f"{model}, {dtype}, {unit}", mine, "case", show)
            if on_gpu:
                _print_grid(
                    f"{model}, {dtype}, inputs per second", mine, "case", lambda row: f"{row['per second']:.4g}"
                )
    print()
    for row in select(rows, "summary"):
        print(f"{row['dtype']}, {row['pass']}, {label(row)}: {_sum_up(row)}")
    _print_peers(rows)


def _print_peers(rows: list[Row]) -> None:
    """Footnotes: whose kernels were measured and whose were not, and what is reported elsewhere."""
    peers = select(rows, "peers")
    missing = dict.fromkeys(row["name"] for row in peers if row["reason"] == "not installed")
    if missing:
        print(f"not installed, and so without a row: {'; '.join(missing)}")
    for row in peers:
        if row["version"] is not None:
            print(f"{row['name']}, {row['dtype']}, {row['version']}: {row['reason'] or 'measured'}")
    for source in values_of(rows, "source", "reported"):
        print(f"\n{source}, milliseconds")
        for name in dict.fromkeys(row["name"] for row in select(rows, "reported", source=source)):
            mine = select(rows, "reported", source=source, name=name)
            print(f"{name}:", ", ".join(f"{row['tokens']:,}: {row['milliseconds']}" for row in mine))


def _print_grid(title: str, rows: list[Row], by: str, show: Callable[[Row], str]) -> None:
    """A line for each contestant and a column for each value of `by`."""
    columns = list(dict.fromkeys(row[by] for row in rows))
    lines: dict[str, dict[Any, str]] = {}
    for row in rows:
        lines.setdefault(label(row), {})[row[by]] = show(row)
    cells = [["", *map(str, columns)], *([name, *(line.get(c, "") for c in columns)] for name, line in lines.items())]
    first, *widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for name, *line in cells:
        print(name.ljust(first), *(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), sep="  ")


def _show_time(row: Row, ratio: str, on_gpu: bool) -> str:
    values = row["seconds"] if on_gpu else row[ratio]
    half = (values["high"] - values["low"]) / 2 / values["median"]
    return f"{(1e3 if on_gpu else 1) * values['median']:.3g} ±{half:.0%}"


def _show_fractions(row: Row) -> str:
    shares = (row["of bandwidth"], row["of matrix products"])
    return "/".join("-" if share is None else f"{100 * share:.0f}" for share in shares)


def _describe(row: Row) -> str:
    return row["size"] + (f", batch {row['batch']}" if row["batch"] > 1 else "")


def _sum_up(row: Row) -> str:
    said = []
    if row["name"] != "SDPA":
        said.append(f"faster than SDPA from {row['faster than SDPA from'] or 'no measured length'} tokens on")
    if row["memory slope"] is not None:
        said.append(f"peak memory grows as N^{row['memory slope']:.2f}")
    if row["error"] is not None:
        said.append(f"{row['error']:.2g} from softmax, relative, on these random inputs")
    return ", ".join(said)


def format_markdown(rows: list[Row]) -> str:
    """A CPU's rows as two tables: the attention, and whole models with one input."""
    lengths = [tokens for tokens in SHOWN if tokens in values_of(rows, "tokens", "attention")]
    last = f"{lengths[-1]:,}"
    head = ["forward / forward and backward", *(f"{tokens:,}" for tokens in lengths)]
    head += ["faster from", f"peak MB at {last}", "grows as"]
    lines = []
    for summary in select(rows, "summary", **{"pass": "forward"}):
        if summary["backend"] == "torch":
            continue
        same = {key: summary[key] for key in ("dtype", "name", "backend")}
        both = [select(rows, "attention", **same, **{"pass": name}) for name in values_of(rows, "pass", "summary")]
        sums = select(rows, "summary", **same)
        at_last = [row["peak MB"] for mine in both for row in mine if row["tokens"] == lengths[-1]]
        times = [[f"{row['times SDPA']['median']:.2g}" for row in mine if row["tokens"] in lengths] for mine in both]
        is_sdpa = summary["name"] == "SDPA"
        starts = ["-" if is_sdpa else _count(row["faster than SDPA from"]) for row in sums]
        cells = [f"{summary['name']}, {summary['dtype']}", *map(" / ".join, zip(*times, strict=True))]
        cells += [" / ".join(starts), " / ".join(f"{peak:.0f}" for peak in at_last)]
        lines.append([*cells, " / ".join(f"N^{row['memory slope']:.2f}" for row in sums)])
    tables = [_markdown([head, *lines])]
    models = select(rows, "models", batch=1)
    if not models:
        return tables[0]
    cases = list(dict.fromkeys((row["model"], row["size"]) for row in models))
    lines = [
        [f"{name}, {dtype}", *(_ratio(models, dtype=dtype, name=name, model=m, size=size) for m, size in cases)]
        for dtype in values_of(rows, "dtype", "models")
        for name in values_of(rows, "name", "models")
        if name != "original"
    ]
    tables.append(_markdown([["one input", *(f"{model}, {size}" for model, size in cases)], *lines]))
    return "\n\n".join(tables)


def _count(tokens: int | None) -> str:
    return f"{tokens:,}" if tokens else "none"


def _ratio(rows: list[Row], **values: Any) -> str:
    (row,) = select(rows, "models", **values)
    return f"{row['times original']['median']:.2f}"


def _markdown(lines: list[list[str]]) -> str:
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(path: Path) -> None:
    """Print the tables from a result of the benchmark on a CPU."""
    print(format_markdown(json.loads(path.read_text("utf-8"))["rows"]))


if __name__ == "__main__":
    run_script(main)
