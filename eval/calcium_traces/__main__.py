"""The calcium of an astrocyte process beside the softmax normaliser, token by token, after the authors' notebooks.

    p_t = phi(q_t).sum_i phi(k_i)   against   sum_i exp(q_t.k_i / sqrt(D)),   phi(x) = exp(W x - |x|^2 / 2) / sqrt(m)

with q and k divided by D^(1/4) and m = 10^3 and 10^5. The calcium comes out of `simulation.NeuronAstrocyteNetwork`,
into which the tokens stream. Known of the notebooks: W is [m, D], independent standard normal from numpy seed 16, the
same for queries and keys; the sum runs over all tokens; layer 1 and head 5 of ALBERT-base-v2 on the first 196 tokens
of the paper's abstract; layer 6 and head 5 of ViT-base/16 on the photo of a dog, over its 196 patches; no correlation
or error is given. Assumed here: W is drawn row by row and anew from seed 16 for each m, so that the 10^3 neurons are
the first of the 10^5; layers count from 1 and heads from 0; the model reads [CLS] and [SEP] with the text, which is
cut to 196 tokens; the CLS token of the photo is among the keys and not on the axis.

`--full` is that setting, with the models from the Hugging Face hub (or `--text-model`, `--image-model`: hub ids or
folders) and the inputs from ASTROATTN_DATA/kozachkov2023 (or `--text`, `--image`). By default the same is done with
MiniLM and ViT-tiny, or the digits ViT without ASTROATTN_DATA; a layer or head that a model does not have is taken
modulo their number. Layer and head were fixed before anything was measured, and all others are reported beside them.

Beside the authors' weights: orthogonal ones; independent ones with the means of queries and keys taken out, which is
exact (`astrocyte.stream`); and a Hebbian layer, which learns W from the keys. The rows of the JSON have a "part":
"selected", the authors' layer and head; "redraws", the same over ten seeds of W; "all heads", of every layer.

    python -m eval.calcium_traces --json out/calcium_traces.json --figure out/calcium_traces.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from astroattn import AstroConfig, AstrocyteAttention
from astroattn.simulation import NeuronAstrocyteNetwork, StaticNeurons
from eval.calcium_traces.astrocyte import draw_weights, normalise, score, stream
from eval.calcium_traces.cases import Case, load_image, load_text
from eval.calcium_traces.figure import plot
from eval.common import FigureOption, JsonOption, print_rows, rounded, run_script, write_figure, write_json

SEED, REDRAWS = 16, 10
COUNTS = (1000, 100_000)
HEBBIAN = (16, 64)
STATIC = {"iid": False, "orthogonal": False, "iid, centred": True}  # name: whether centred
Row = dict[str, Any]


def record(case: Case, counts: Sequence[int] = COUNTS, seed: int = SEED) -> dict[int, Tensor]:
    """The calcium [N] of the authors' layer and head for each number of neurons, out of the simulated network."""
    query, key, value = case.selected()
    traces = {}
    for m in counts:
        weight = draw_weights("iid", m, key.shape[-1], seed)[None]
        network = NeuronAstrocyteNetwork(StaticNeurons(weight, weight.new_zeros(1, m), "positive_exp"))
        for token in range(len(key)):
            network.write(key[None, None, token], value[None, None, token])
        traces[m] = torch.stack([network.read(q[None, None])[1][0, 0] for q in query])
    return traces


def measure(case: Case, traces: dict[int, Tensor], seed: int = SEED, redraws: int = REDRAWS) -> list[Row]:
    """Rows of one case: the authors' layer and head with each kind of weights, W redrawn, and all layers and heads."""
    counts = tuple(traces)
    query, key, _ = case.selected()
    normaliser = normalise(query, key)
    base = {"model": case.model, "layer": case.layer, "head": case.head}
    size = {
        "mean_square": (query.square().sum(-1).mean() + key.square().sum(-1).mean()).item(),
        "log_spread": normaliser.log().std().item(),
    }
    rows = [
        {"part": "selected", **base, "input": case.input, "tokens": len(query), "weights": "iid", "m": m, "seed": seed}
        | score(calcium, normaliser)
        | size
        for m, calcium in traces.items()
    ]
    scores = _score_heads(case, counts, seed)
    chosen = (case.layer - 1) * len(case.heads[0][0]) + case.head
    for (weights, m), heads in scores.items():
        if weights != "iid":  # that is in already, from the simulation
            rows.append(rows[0] | {"weights": weights, "m": m, "seed": seed} | heads[chosen])
    for weights, m, drawn in _redraw(case, counts, seed, redraws):
        row = {"part": "redraws", **base, "weights": weights, "m": m, "seeds": [seed, seed + redraws - 1]}
        for name in ("log_correlation", "rms_error"):
            values = np.array([each[name] for each in drawn])
            row |= {f"{name}_mean": values.mean().item(), f"{name}_sd": values.std(ddof=1).item()}
            row |= {f"{name}_min": values.min().item(), f"{name}_max": values.max().item()}
        rows.append(row)
    sizes = np.array([(q.square().sum(-1).mean(1) + k.square().sum(-1).mean(1)).tolist() for q, k, _ in case.heads])
    for (weights, m), heads in scores.items():
        rows.append({"part": "all heads", "model": case.model, "weights": weights, "m": m} | _summarise(heads, sizes))
    return rounded(rows)


def _score_heads(case: Case, counts: Sequence[int], seed: int) -> dict[tuple[str, int], list[dict[str, float]]]:
    """By kind of weights and m, the scores of every head, layer by layer."""
    most, dim = max(counts), case.heads[0][0].shape[-1]
    drawn = {kind: draw_weights(kind, most, dim, seed) for kind in ("iid", "orthogonal")}
    scores: dict[tuple[str, int], list[dict[str, float]]] = {}
    with tqdm(total=sum(len(q) for q, _, _ in case.heads), desc=f"{case.model}: all heads", unit="head") as bar:
        for every_query, key, value in case.heads:
            query = every_query[:, case.skip :]
            normalisers = [normalise(*head) for head in zip(query, key, strict=True)]
            for head, normaliser in enumerate(normalisers):
                for kind, centre in STATIC.items():
                    weight = drawn[kind.removesuffix(", centred")]
                    done = stream(query[head], key[head], value[head, :, :0], weight, counts, centre=centre)
                    for m, (calcium, _) in done.items():
                        scores.setdefault((kind, m), []).append(score(calcium, normaliser))
                bar.update()
            for m in HEBBIAN:
                config = AstroConfig(near=0, exact_keys=0, num_hidden=m, tile=2**20, backend="torch")
                attention = AstrocyteAttention(len(query), dim, config)
                log_p = attention.with_normaliser(every_query[None], key[None], value[None], scale=1.0)[1][0]
                for calcium, normaliser in zip(log_p[:, case.skip :].exp(), normalisers, strict=True):
                    scores.setdefault(("Hebbian", m), []).append(score(calcium, normaliser))
    return scores


def _redraw(
    case: Case, counts: Sequence[int], seed: int, redraws: int
) -> list[tuple[str, int, list[dict[str, float]]]]:
    """The scores of the authors' layer and head with W from each seed, by kind of weights and m."""
    query, key, value = case.selected()
    normaliser = normalise(query, key)
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for each in tqdm(range(seed, seed + redraws), f"{case.model}: W redrawn", unit="seed"):
        weight = draw_weights("iid", max(counts), key.shape[-1], each)
        for kind in ("iid", "iid, centred"):
            done = stream(query, key, value[:, :0], weight, counts, centre=STATIC[kind])
            for m, (calcium, _) in done.items():
                found.setdefault((kind, m), []).append(score(calcium, normaliser))
    return [(kind, m, scores) for (kind, m), scores in found.items()]


def _summarise(heads: list[dict[str, float]], sizes: np.ndarray) -> Row:
    """How the heads' scores are distributed; log correlations as [layer][head]."""
    values = np.array([head["log_correlation"] for head in heads])
    names = ("q05", "q25", "median", "q75", "q95")
    quantiles = dict(zip(names, np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95)), strict=True))
    return {
        "heads": len(heads),
        **{f"log_correlation_{name}": value.item() for name, value in quantiles.items()},
        "share_above_0.95": (values >= 0.95).mean().item(),
        "rms_error_median": float(np.median([head["rms_error"] for head in heads])),
        "spearman_with_mean_square": float(stats.spearmanr(values, sizes.ravel()).statistic),
        "log_correlations": values.reshape(sizes.shape).tolist(),
    }


def format_markdown(rows: list[Row]) -> str:
    """The authors' layer and head, and all others, one line per model, weights and m."""
    lines = [
        "| model, layer, head | W | m | log correlation | Spearman | error: median, rms | all heads: median [5-95 %] |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    every = {(row["model"], row["weights"], row["m"]): row for row in rows if row["part"] == "all heads"}
    for row in rows:
        if row["part"] != "selected":
            continue
        heads = every[row["model"], row["weights"], row["m"]]
        low, middle, high = (heads[f"log_correlation_{name}"] for name in ("q05", "median", "q95"))
        lines.append(
            f"| {row['model']}, {row['layer']}, {row['head']} | {row['weights']} | {row['m']:,} "
            f"| {row['log_correlation']:.3f} | {row['spearman']:.3f} "
            f"| {row['median_error']:.1%}, {row['rms_error']:.1%} | {middle:.2f} [{low:.2f}, {high:.2f}] |"
        )
    return "\n".join(lines)


def main(
    json: JsonOption = None,
    figure: FigureOption = None,
    full: Annotated[bool, typer.Option("--full", help="The authors' models and inputs exactly; minutes more.")] = False,
    text_model: Annotated[str | None, typer.Option(help="A text model: hub id, folder or package:NAME.")] = None,
    image_model: Annotated[str | None, typer.Option(help="An image model: hub id, folder or timm:NAME.")] = None,
    text: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="A text of your own.")] = None,
    image: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="A photo of your own.")] = None,
    counts: Annotated[list[int] | None, typer.Option("-m", min=2, help="Numbers of neurons (1000 and 100000).")] = None,
    redraws: Annotated[int, typer.Option(min=2, help="Number of seeds that W is drawn from.")] = REDRAWS,
    seed: Annotated[int, typer.Option("--seed", help="Seed of W; the notebooks' is 16.")] = SEED,
) -> None:
    """Record the calcium of an astrocyte process and compare it with the softmax normaliser."""
    try:
        cases = [load_text(text_model, text, full), load_image(image_model, image, full)]
    except ValueError as error:
        print(f"calcium_traces: {error}", file=sys.stderr)
        if full:
            print("--full needs ALBERT-base-v2 and ViT-base/16 from the hub, or folders: --text-model, --image-model",
                  file=sys.stderr)  # fmt: skip
        raise typer.Exit(2) from None
    if cases[1].model == "digits ViT":
        print("ASTROATTN_DATA is not set: the digits ViT and Python's own texts stand in for ViT-tiny and the abstract")
    traces = [record(case, tuple(sorted(set(counts or COUNTS))), seed) for case in cases]
    rows = [row for case, trace in zip(cases, traces, strict=True) for row in measure(case, trace, seed, redraws)]
    for part, (title, columns) in TABLES.items():
        shown = [{column: row[name] for column, name in columns.items()} for row in rows if row["part"] == part]
        print_rows(shown, title=title)
    if json:
        write_json(json, rows, seed=seed)
    if figure:
        write_figure(figure, plot(rows, cases, traces))


SETTING = {"model": "model", "W": "weights", "m": "m"}
TABLES = {  # by part: title, and what its columns show
    "selected": (
        "Layer and head by the authors' rule: calcium against the softmax normaliser, over the tokens",
        SETTING
        | {"log corr.": "log_correlation", "Spearman": "spearman", "median error": "median_error"}
        | {"rms error": "rms_error"},
    ),
    "redraws": (
        "The same head with W redrawn: log correlation",
        SETTING | {end: f"log_correlation_{end}" for end in ("mean", "sd", "min", "max")},
    ),
    "all heads": (
        "All layers and heads: log correlation",
        SETTING
        | {end: f"log_correlation_{end}" for end in ("q05", "median", "q95")}
        | {"0.95 or more": "share_above_0.95"},
    ),
}

if __name__ == "__main__":
    run_script(main, data=True)
