"""Cross attention: what the default makes of the queries of another sequence, and its time.

Queries, keys and values are those of Whisper's decoder, which reads 1,500 frames of its encoder: the transcripts of all
clips that are reported (the odd half), one after the other, read the frames of each. `patch` leaves a decoder's cross
attention as it is, since its tokens come in order; no pretrained model whose queries have no order was at hand. Time is
that of the attention on random tokens, forward, beside SDPA.

    python -m eval.cross_attention --json docs/results/cross_attention.json
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from astroattn import PRESETS, AstroConfig, AstrocyteAttention
from astroattn.data import load_data
from astroattn.models import load_model
from astroattn.ops.noting import ExactKeys, listening
from eval.benchmark.contestants import CONFIGS as BENCHMARKED
from eval.benchmark.timing import Call, Effort, ratios, time_in_turns
from eval.common import JsonOption, data_folder, print_rows, relative_error, run_script, write_json
from eval.frontier.cases import choose_from_command_line

CONFIGS = {
    "fast": PRESETS["fast"],
    "default": PRESETS["balanced"],
    "256 exact keys": AstroConfig(num_hidden=64, exact_keys=256),
    "no far field": AstroConfig(hidden="none"),
    "no exact keys": AstroConfig(exact_keys=0),
}
MOST_TOKENS = 400  # of the decoder, of 448 that it can have
QUERIES, KEYS = (128, 512, 2048), (1024, 4096, 16384)
HEADS, DIM = 4, 64
EFFORT = Effort(repeats=7, seconds=20)
Tokens = tuple[Tensor, Tensor, Tensor]


class Noting(TorchFunctionMode):
    """While active, notes the calls of SDPA whose queries are those of another sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Tokens] = []

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention and args[0].shape[2] != args[1].shape[2]:
            self.calls.append(args[:3])
        return function(*args, **(kwargs or {}))


def collect_calls() -> list[Tokens]:
    """Queries, keys and values of the decoder's cross attention, layer by layer and clip by clip."""
    choose_from_command_line(["whisper"])
    folder = data_folder()
    assert folder is not None
    whisper = load_model(str(folder / "whisper_tiny_en"))
    clips = load_data(str(folder / "speech"), "audio", half="odd", limit=None)
    words = " ".join(clips.transcripts or ())
    ids = whisper.tokenizer(words, return_tensors="pt").input_ids[:, :MOST_TOKENS]
    name = whisper.model.main_input_name
    with torch.inference_mode(), Noting() as noting:
        for batch in clips.batches(lambda some: {name: whisper.encode(some)[name]}, 1):
            whisper.model(**{name: batch[name]}, decoder_input_ids=ids)
    return noting.calls


@torch.no_grad()
def measure_errors(calls: list[Tokens]) -> list[dict[str, Any]]:
    """The relative error of the outputs, the mean over calls, and the products over softmax's.

    And how far the answers to the first half of the queries move where the second half is not there.
    """
    rows = []
    for name, config in CONFIGS.items():
        module = AstrocyteAttention(calls[0][0].shape[1], calls[0][0].shape[3], config)
        told: list[ExactKeys] = []
        with listening(told.append):
            outs = [module(*call, cross=True) for call in calls]
        errors = [
            relative_error(out, F.scaled_dot_product_attention(*call)) for out, call in zip(outs, calls, strict=True)
        ]
        moved = [_moved_by_later(module, *call) for call in calls]
        counts = calls[0][0].shape[2], calls[0][1].shape[2]
        exact_keys = {config: mean(float(each.numbers().mean()) for each in told)} if told else None
        cost = module.cost(*counts, cross=True, exact_keys=exact_keys).ratio
        rows.append({"config": name, "queries": counts[0], "keys": counts[1]})
        rows[-1] |= {"error": sum(errors) / len(errors), "moved": sum(moved) / len(moved), "cost": cost}
    return rows


def _moved_by_later(module: AstrocyteAttention, query: Tensor, key: Tensor, value: Tensor) -> float:
    half = query.shape[2] // 2
    alone = module(query[:, :, :half], key, value, cross=True)
    return relative_error(module(query, key, value, cross=True)[:, :, :half], alone)


def measure_times(queries: int, keys: int) -> dict[str, Any]:
    """The default's time over SDPA's, with the benchmark's number of exact keys."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(1, HEADS, count, DIM, generator=generator) for count in (queries, keys, keys)]
    module = AstrocyteAttention(HEADS, DIM, BENCHMARKED["default"])
    with torch.inference_mode():
        sdpa, default = Call(lambda: F.scaled_dot_product_attention(*tokens)), Call(lambda: module(*tokens))
        times = time_in_turns({"sdpa": sdpa, "default": default}, torch.device("cpu"), EFFORT)
    over = ratios(times["default"], times["sdpa"])
    return {"queries": queries, "keys": keys, "times SDPA": {name: round(value, 3) for name, value in over.items()}}


def format_errors(rows: list[dict[str, Any]]) -> str:
    """A line for each config."""
    lines = ["| config | cost | error | moved by later tokens |", "| --- | --- | --- | --- |"]
    for row in rows:
        if "config" in row:
            lines.append(f"| {row['config']} | {row['cost']:.0%} | {row['error']:.3f} | {row['moved']:.3f} |")
    return "\n".join(lines)


def format_times(rows: list[dict[str, Any]]) -> str:
    """A line for each number of queries, a column for each of keys."""
    timed = {(row["queries"], row["keys"]): row["times SDPA"]["median"] for row in rows if "times SDPA" in row}
    keys = sorted({count for _, count in timed})
    lines = ["| | " + " | ".join(f"{count:,} keys" for count in keys) + " |", "| --- |" + " --- |" * len(keys)]
    for queries in sorted({count for count, _ in timed}):
        lines.append(f"| {queries:,} queries | " + " | ".join(f"{timed[queries, count]:.2f}" for count in keys) + " |")
    return "\n".join(lines)


def main(json: JsonOption = None) -> None:
    """Measure what the queries of another sequence cost, in error and in time."""
    rows = measure_errors(collect_calls())
    print_rows(rows, title="Whisper's decoder reading its encoder")
    times = [measure_times(queries, keys) for queries in QUERIES for keys in KEYS]
    print_rows([row | {"times SDPA": row["times SDPA"]["median"]} for row in times], title="time")
    if json:
        write_json(json, [*rows, *times], seed=0)


if __name__ == "__main__":
    run_script(main, data=True)
