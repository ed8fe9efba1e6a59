"""Packed documents: a row of several, each answered by itself, beside the model's own attention with its N x N mask.

Two layers of a decoder (documents told apart by their positions) and of an encoder (by a mask of blocks), 8 heads of
64, float32; one row. What is timed is the whole forward. Weights are random, and say nothing of what an astrocyte gives
up; of exact attention document by document it is measured how far the last hidden states are from the original's.

    python -m eval.packed --json docs/results/packed.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import astroattn
from astroattn import AstroConfig
from eval.benchmark.contestants import CONFIGS as BENCHMARKED
from eval.benchmark.timing import Call, Effort, ratios, time_in_turns
from eval.common import JsonOption, print_rows, relative_error, run_script, write_json

TOKENS = 8192
SIZES = (512, 1024, 2048)  # of a document
SHAPE = {"hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 512}
DECODER, ENCODER = "decoder", "encoder"
EXACT = AstroConfig(hidden="exact")
CONFIGS: dict[str, dict[str, AstroConfig | None]] = {
    DECODER: {"original": None, "exact": EXACT, "streaming memory": AstroConfig(hidden="streaming", entries=128)},
    ENCODER: {"original": None, "exact": EXACT, "default": BENCHMARKED["default"]},
}
EFFORT = Effort(repeats=7, seconds=60)


def make_call(kind: str, tokens: int, size: int, config: AstroConfig | None) -> Callable[[], Tensor]:
    """The forward of a model on a row of documents of that size."""
    torch.manual_seed(0)
    ids = torch.randint(1000, (1, tokens))
    places = torch.arange(tokens)
    model: nn.Module
    if kind == DECODER:
        model = LlamaModel(LlamaConfig(**SHAPE, vocab_size=1000, max_position_embeddings=tokens)).eval()
        inputs: dict[str, Any] = {"position_ids": places[None] % size, "use_cache": False}
    else:
        model = BertModel(BertConfig(**SHAPE, vocab_size=1000, max_position_embeddings=tokens)).eval()
        mask = (places[:, None] // size == places // size)[None, None]
        inputs = {"position_ids": places[None] % size, "attention_mask": mask}
    if config is not None:
        astroattn.patch(model, config)

    @torch.inference_mode()
    def run() -> Tensor:
        states: Tensor = model(input_ids=ids, **inputs).last_hidden_state
        return states

    return run


def measure(tokens: int, sizes: tuple[int, ...], effort: Effort = EFFORT) -> list[dict[str, Any]]:
    """A row for each model, size of documents and attention."""
    rows = []
    for kind, configs in CONFIGS.items():
        for size in sizes:
            runs = {name: make_call(kind, tokens, size, config) for name, config in configs.items()}
            error = relative_error(runs["exact"](), runs["original"]())
            times = time_in_turns({name: Call(run) for name, run in runs.items()}, torch.device("cpu"), effort)
            for name in runs:
                over = ratios(times[name], times["original"])
                row = {"model": kind, "tokens": tokens, "document": size, "attention": name}
                row |= {"times original": {key: round(value, 4) for key, value in over.items()}}
                rows.append(row | ({"error": error} if name == "exact" else {}))
    return rows


def format_markdown(rows: list[dict[str, Any]]) -> str:
    """A line for each model and attention, a column for each size of document: time over the original's."""
    sizes = list(dict.fromkeys(row["document"] for row in rows))
    lines = ["| | " + " | ".join(f"documents of {size:,}" for size in sizes) + " |", "| --- " * (len(sizes) + 1) + "|"]
    for kind, name in dict.fromkeys((row["model"], row["attention"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["attention"]) == (kind, name)]
        cells = [f"{row['times original']['median']:.2g}" for row in mine]
        lines.append(f"| {kind}, {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    json: JsonOption = None, tokens: Annotated[int, typer.Option(min=1, help="Tokens of the row.")] = TOKENS
) -> None:
    """Time packed documents, original and patched."""
    rows = measure(tokens, SIZES)
    shown = [row | {"times original": row["times original"]["median"]} for row in rows]
    print_rows(shown, title=f"a row of {tokens:,} tokens")
    if json:
        write_json(json, rows, seed=0)


if __name__ == "__main__":
    run_script(main)
