"""Controls: is the agreement of calcium and softmax normaliser bought by a circuit built to agree, with many neurons?

The calcium p_t = phi(q_t).sum_i phi(k_i) of every layer and head is compared with the softmax normaliser of what the
circuit was given, sum_i exp(q_t.k_i), in log and over the tokens; the output with softmax attention's. Nothing is
fitted: W is drawn once, before any input is seen. What each outcome would mean, written before measuring:

- **W redrawn** (ten seeds). If the agreement hangs on the draw, it was picked; if the seeds agree, it was not.
- **synapses shuffled**: each hidden neuron writes into another's synapses, so neuron j reads with the weights of j - 1.
  As many neurons, with the same activity. If this agrees too, many neurons suffice and the circuit says nothing.
- **other keys**: queries of one input, keys and values of another. If the calcium follows the normaliser of the first
  input ("with original"), it only knows the queries. If it follows the keys it was given, it reads what was written;
  "change" is the sharp form, the correlation of the change of log p with the change of the log normaliser.
- **tokens shuffled** in the input, **dimensions shuffled** (each dimension of the keys permuted over the tokens),
  **untrained** model. If only the real network agrees, the agreement tells of what training found. If these agree as
  well, given vectors as short, it is a property of the circuit, which computes exp(q.k) of whatever it is given.
- **uniform**: constant activation, p = N and the mean of the values. Its calcium has no correlation; an output error
  not below uniform's means that the agreement of the calcium is of no use to the network.

For each m also the Hebbian layer (m = 16), and the default of `patch` with 32 exact keys. "Whole model" patches every
layer and compares what the model gives: cosine of embeddings (text) or equal top-1 (images), and relative error.

    python -m eval.controls --json out/controls.json --figure out/controls.png
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm

from astroattn import AstroConfig, AstrocyteAttention, patched
from astroattn.fidelity.passes import forward, pool, token_mask
from eval.calcium_traces.astrocyte import draw_weights, normalise, stream
from eval.common import (
    FigureOption,
    JsonOption,
    LimitOption,
    SeedOption,
    print_rows,
    relative_error,
    rounded,
    run_script,
    write_figure,
    write_json,
)
from eval.controls.conditions import OTHER, REAL, SYNAPSES, TOKENS, UNTRAINED, Head, conditions, shuffle_tokens
from eval.controls.conditions import untrained as make_untrained
from eval.controls.figure import plot
from eval.heads import Subject, load_minilm, load_vit

COUNTS = (100, 1000, 10_000, 100_000)
REDRAWS, REDRAW_COUNTS = 10, (100, 1000, 10_000)
ITEMS, LENGTH = 16, 128  # for whole models; the heads read the first item, other keys come from the second
# One tile, which reads all keys through 16 neurons; and the default of `patch`, which would be softmax attention for so
# few tokens, with as many neurons.
LEARNED = {
    "Hebbian": AstroConfig(near=0, exact_keys=0, num_hidden=16, tile=2**20, backend="torch"),
    "default": AstroConfig(exact_keys=32, num_hidden=16, backend="torch"),
}
WHOLE = {
    "default": LEARNED["default"],
    "random, m = 1000": AstroConfig(hidden="random", num_hidden=1000, orthogonal=False),
    "random, m = 4000": AstroConfig(hidden="random", num_hidden=4000, orthogonal=False),
    "uniform": AstroConfig(hidden="random", num_hidden=1, activation="constant"),
}
Row = dict[str, Any]
Setting = tuple[str, int]  # kind of weights and m


def measure(subjects: list[Subject], seed: int, counts: Sequence[int] = COUNTS, redraws: int = REDRAWS) -> list[Row]:
    """Rows by part: "conditions", medians over all heads; "redraws" of W; "whole model"."""
    rows = []
    for subject in subjects:
        original: list[Head] = []
        before: list[dict[Setting, tuple[Tensor, Tensor]]] = []
        for condition, heads in conditions(subject, seed):
            bar = tqdm(heads, f"{subject.name}, {condition}", unit="head")
            answers = [_answer(head, condition, counts, seed) for head in bar]
            if condition == REAL:
                original, before = heads, answers
            for setting in answers[0]:
                weights, m = setting
                row = {"part": "conditions", "model": subject.name, "condition": condition, "weights": weights, "m": m}
                scores = [_score(*each[setting], head) for head, each in zip(heads, answers, strict=True)]
                if condition == OTHER:
                    for score, *each in zip(scores, heads, original, answers, before, strict=True):
                        score |= _follow(*each[:2], *(answer[setting][0] for answer in each[2:]))
                rows.append(row | _summarise(scores))
        rows += _redraw(subject.name, original, seed, redraws, [m for m in REDRAW_COUNTS if m <= max(counts)])
        rows += _patch_whole(subject, seed)
    return rounded(rows)


def _answer(head: Head, condition: str, counts: Sequence[int], seed: int) -> dict[Setting, tuple[Tensor, Tensor]]:
    """Calcium [N] and output [N, Dv] of one head by kind of weights and m."""
    weight = _draw(max(counts), head.key.shape[-1], seed)
    read_weight = weight.roll(1, 0) if condition == SYNAPSES else None
    answers = {("random", m): each for m, each in stream(*head, weight, counts, read_weight=read_weight).items()}
    if condition != SYNAPSES:
        grid = (14, 14) if len(head.key) == 197 else None
        for name, config in LEARNED.items():
            attention = AstrocyteAttention(1, head.key.shape[-1], config)
            out, log_p = attention.with_normaliser(*(x[None, None] for x in head), scale=1.0, grid=grid)
            answers[name, config.num_hidden] = log_p[0, 0].exp(), out[0, 0]
    return answers


@lru_cache(maxsize=2)
def _draw(m: int, dim: int, seed: int) -> Tensor:
    return draw_weights("iid", m, dim, seed)


def _score(p: Tensor, out: Tensor, head: Head) -> dict[str, float]:
    """Agreement of one head with the softmax attention of what it was given."""
    logits = head.query @ head.key.mT
    log_z, exact = logits.logsumexp(-1), logits.softmax(-1) @ head.value
    return {
        "log_correlation": _correlate(p.log(), log_z),
        "rms_error": (p.log() - log_z).expm1().square().mean().sqrt().item(),
        "output_error": relative_error(out, exact),
        "uniform_error": relative_error(head.value.mean(0), exact),
        "log_spread": log_z.std().item(),
        "mean_square": (head.query.square().sum(-1).mean() + head.key.square().sum(-1).mean()).item(),
    }


def _follow(head: Head, original: Head, p: Tensor, before: Tensor) -> dict[str, float]:
    """Whether the calcium follows the keys that were exchanged: with the original's normaliser, and its change."""
    own, first = (normalise(each.query, each.key).log() for each in (head, original))
    return {
        "with_original": _correlate(p.log(), first),
        "own_with_original": _correlate(own, first),
        "change": _correlate(p.log() - before.log(), own - first),
    }


def _correlate(a: Tensor, b: Tensor) -> float:
    return float(stats.pearsonr(a.numpy(), b.numpy()).statistic)


def _summarise(scores: list[dict[str, float]]) -> Row:
    """Medians over the heads; of the log correlation also the quartiles and the share of at least 0.95."""
    values = np.array([score["log_correlation"] for score in scores])
    low, high = np.quantile(values, (0.25, 0.75))
    return {
        "heads": len(scores),
        **{name: float(np.median([score[name] for score in scores])) for name in scores[0]},
        "log_correlation_q25": float(low),
        "log_correlation_q75": float(high),
        "share_above_0.95": float((values >= 0.95).mean()),
        "share_better_than_uniform": float(np.mean([s["output_error"] < s["uniform_error"] for s in scores])),
    }


def _redraw(name: str, heads: list[Head], seed: int, redraws: int, counts: Sequence[int]) -> list[Row]:
    """How far the log correlation depends on the draw of W: of each head, and of the median over heads."""
    drawn = []
    for each in tqdm(range(seed, seed + redraws), f"{name}, W redrawn", unit="seed"):
        weight = _draw(max(counts), heads[0].key.shape[-1], each)
        answers = [stream(head.query, head.key, head.value[:, :0], weight, counts) for head in heads]
        drawn.append([[_correlate(answer[m][0].log(), normalise(*head[:2]).log()) for m in counts]
                      for head, answer in zip(heads, answers, strict=True)])  # fmt: skip
    values = np.array(drawn)  # [seeds, heads, counts]
    return [
        {
            "part": "redraws",
            "model": name,
            "m": m,
            "seeds": redraws,
            "head_sd": float(np.median(values[:, :, place].std(0, ddof=1))),
            "median_mean": float(np.median(values[:, :, place], 1).mean()),
            "median_sd": float(np.median(values[:, :, place], 1).std(ddof=1)),
        }
        for place, m in enumerate(counts)
    ]


def _patch_whole(subject: Subject, seed: int) -> list[Row]:
    """What the whole model gives with every layer patched, for three conditions."""
    shuffled = shuffle_tokens(subject.inputs, torch.Generator().manual_seed(seed))
    runs = {
        REAL: (subject.model, subject.inputs),
        TOKENS: (subject.model, shuffled),
        UNTRAINED: (make_untrained(subject, seed), subject.inputs),
    }
    rows = []
    for condition, (model, inputs) in runs.items():
        before = _run(model, inputs)
        for name, config in tqdm(WHOLE.items(), f"{subject.name}, whole model, {condition}", unit="config"):
            with patched(model, replace(config, seed=seed)):
                after = _run(model, inputs)
            same = (
                torch.cosine_similarity(before, after, dim=1).mean()
                if isinstance(inputs, Mapping)
                else (before.argmax(1) == after.argmax(1)).double().mean()
            )
            rows.append({"part": "whole model", "model": subject.name, "condition": condition, "config": name}
                        | {"agreement": same.item(), "error": relative_error(after, before)})  # fmt: skip
    return rows


@torch.no_grad()
def _run(model: nn.Module, inputs: Any) -> Tensor:
    """The embedding of texts (mean over tokens), or the logits of images."""
    outputs = forward(model, inputs)
    result = pool(model, outputs, token_mask(inputs), "mean") if isinstance(inputs, Mapping) else outputs.logits
    assert result is not None
    return result


def format_markdown(rows: list[Row]) -> str:
    """Log correlation of calcium and normaliser, and error of the output, medians over all heads, by condition."""
    found = [row for row in rows if row["part"] == "conditions"]
    settings = list(dict.fromkeys((row["weights"], row["m"]) for row in found))
    most = max(m for _, m in settings)
    shown = [(weights, m) for weights, m in settings if weights != "random" or m in (1000, most)]
    lines = ["| model | condition | " + " | ".join(f"{name}, m = {m:,}" for name, m in shown) + " | uniform |"]
    lines.append("| --- " * (len(shown) + 3) + "|")
    cells = {(row["model"], row["condition"], row["weights"], row["m"]): row for row in found}
    for model, condition in dict.fromkeys((row["model"], row["condition"]) for row in found):
        mine = [cells.get((model, condition, *setting)) for setting in shown]
        texts = ["-" if row is None else f"{row['log_correlation']:.2f}, {row['output_error']:.2f}" for row in mine]
        uniform = next(row["uniform_error"] for row in mine if row)
        lines.append(f"| {model} | {condition} | " + " | ".join(texts) + f" | {uniform:.2f} |")
    return "\n".join(lines)


def main(json: JsonOption = None, figure: FigureOption = None, limit: LimitOption = None, seed: SeedOption = 0) -> None:
    """Measure the agreement of calcium and normaliser beside controls, for all heads of two models."""
    items = max(limit or ITEMS, 2)
    rows = measure([load_minilm(items, LENGTH), load_vit(items)], seed)
    for part, (title, columns) in TABLES.items():
        shown = [{column: row[name] for column, name in columns.items()} for row in rows if row["part"] == part]
        print_rows(shown, title=title)
    if json:
        write_json(json, rows, seed=seed)
    if figure:
        write_figure(figure, plot(rows))


TABLES = {  # by part: title, and what its columns show
    "conditions": (
        "Calcium against the normaliser of what the circuit was given; medians over all layers and heads",
        {"model": "model", "condition": "condition", "W": "weights", "m": "m", "log corr.": "log_correlation"}
        | {"rms error": "rms_error", "output error": "output_error", "uniform's": "uniform_error"},
    ),
    "redraws": (
        "W redrawn: spread of the log correlation of a head, and of the median over heads",
        {"model": "model", "m": "m", "of a head": "head_sd", "median": "median_mean", "of the median": "median_sd"},
    ),
    "whole model": (
        "Every layer patched: against the same model with softmax attention",
        {"model": "model", "condition": "condition", "config": "config", "agreement": "agreement", "error": "error"},
    ),
}

if __name__ == "__main__":
    run_script(main, data=True)
