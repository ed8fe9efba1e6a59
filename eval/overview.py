"""What a patched model gives and takes: the figure of the README, three numbers, and the tables of the benchmarks page.

All of it is made from the committed results, nothing is measured.

    python -m eval.overview        # docs/figures/overview.png, and what stands between marks in README.md and docs
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval import cross_attention, directions, key_error, packed, position_bias, summary
from eval.benchmark.rows import format_markdown as format_speed
from eval.common import fill_marks, read_rows, run_script, write_figure
from eval.generate.page import load_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOCS = summary.RESULTS.parent
README = DOCS.parent / "README.md"
KEPT = ("top1_agreement", "same_neighbour", "word_error")  # the share of answers that are the original's own
ENTRIES = 128


def measure() -> list[dict[str, Any]]:
    """A row per committed result: tokens, whether there was a plan, cost and time of the original's, answers kept."""
    rows = []
    for name, (title, metrics) in summary.CASES.items():
        table = read_rows(summary.RESULTS / f"{name}.json")
        metric = next(each for each in KEPT if each in metrics)
        patched, original = (table[row]["values"] for row in ("patched", "original"))
        found = patched[metric]
        kept = [1 - found[end] if metric == "word_error" else found[end] for end in ("low", "value", "high")]
        random = table["random"]["values"][metric]["value"]
        rows.append(
            {
                "result": name,
                "model": title.split(",")[0].split(" at ")[0] if "the same" not in title else rows[-1]["model"],
                "tokens": round(patched["keys"]["value"]),
                "planned": summary.PLAN in title,
                "metric": metric,
                "low": min(kept),
                "kept": kept[1],
                "high": max(kept),
                "random": 1 - random if metric == "word_error" else random,
                "time": patched["seconds"]["value"] / original["seconds"]["value"],
                "cost": patched["cost"]["value"],
            }
        )
    return rows


def plot(rows: list[dict[str, Any]]) -> Figure:
    """Answers kept on the left, time on the right; a line of both per model and length."""
    from matplotlib.figure import Figure

    what = {"top1_agreement": "same class", "same_neighbour": "same nearest text", "word_error": "same words"}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    lines: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        place = lines.setdefault(f"{row['model']}, {row['tokens']:,} tokens\n{what[row['metric']]}", len(lines))
        style = {"color": "#0072b2" if row["planned"] else "#e69f00", "marker": "o", "ls": "none"}
        label = ("with a plan" if row["planned"] else "default") if place == 0 else None
        where = place + (0.15 if row["planned"] else -0.15)
        spread = [[row["kept"] - row["low"]], [row["high"] - row["kept"]]]
        left.errorbar(row["kept"], where, xerr=spread, label=label, capsize=2, **style)
        right.plot(row["time"], where, **style)
        if row["planned"]:
            name = "random features" if place == 0 else None
            left.plot(row["random"], place, "x", color="#888888", label=name)
    left.set_yticks(range(len(lines)), list(lines), fontsize=8)
    left.invert_yaxis()
    left.set(xlim=(-0.03, 1.03), title="answers that stay the same")
    left.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    right.axvline(1, color="black", lw=0.8)
    right.set(xlim=(0, None), title="time of a batch on a CPU, original = 1")
    for axis in (left, right):
        axis.grid(axis="x", alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def format_numbers(rows: list[dict[str, Any]]) -> str:
    """Three numbers, each with what it is of, as a list."""
    found = {row["result"]: row for row in rows}
    photos, speech = found["vit_tiny_448_plan"], found["whisper_tiny_en"]
    lost = {
        row["cache"]: row["nats above"]
        for row in load_results()["loss"]
        if (row["model"], row["tokens"], row["entries"]) == ("SmolLM2-135M", 1024, ENTRIES)
    }
    price = "for {cost:.0%} of the arithmetic of its attention and {time:.2f} times its time"
    lines = [
        f"**{speech['kept']:.0%}** of the words that Whisper writes stay the same where its encoder, "
        f"{speech['tokens']:,} tokens, is patched without any data, {price.format_map(speech)}.",
        f"**{photos['kept']:.0%}** of the classes that a vision transformer gives to photos of {photos['tokens']} "
        f"tokens stay the same with a plan, {price.format_map(photos)}.",
        f"**{lost['astroattn, planned']:.2f} nats** a token is what SmolLM2-135M loses when {ENTRIES} entries for each "
        f"key head, in the mean, stand in for its growing cache ({lost['astroattn']:.2f} where all have as many).",
    ]
    return "\n".join(f"- {line}" for line in lines)


def texts() -> dict[Path, dict[str, str]]:
    """What stands between marks, by page and name of the mark."""
    numbers = {"numbers": format_numbers(measure())}
    tables = {"fidelity": summary.format_markdown(summary.measure())}
    for mark, name in (("speed", "benchmark"), ("speed-avx512", "benchmark_avx512")):
        tables[mark] = format_speed(read_rows(summary.RESULTS / f"{name}.json"))
    biased = read_rows(summary.RESULTS / "position_bias.json")
    tables |= {
        "position-bias": position_bias.format_errors(biased),
        "position-bias-time": position_bias.format_times(biased),
    }
    crossed = read_rows(summary.RESULTS / "cross_attention.json")
    tables |= {
        "cross-attention": cross_attention.format_errors(crossed),
        "cross-attention-time": cross_attention.format_times(crossed),
    }
    tables["packed"] = packed.format_markdown(read_rows(summary.RESULTS / "packed.json"))
    method = {
        name.replace("_", "-"): script.format_markdown(read_rows(summary.RESULTS / f"{name}.json"))
        for name, script in (("directions", directions), ("key_error", key_error))
    }
    return {README: numbers, DOCS / "index.md": numbers, DOCS / "benchmarks.md": tables, DOCS / "method.md": method}


def main() -> None:
    """Write docs/figures/overview.png, and the numbers and tables of the pages, anew."""
    for page, filled in texts().items():
        page.write_text(fill_marks(page.read_text("utf-8"), filled), encoding="utf-8")
    write_figure(DOCS / "figures" / "overview.png", plot(measure()))


if __name__ == "__main__":
    run_script(main)
