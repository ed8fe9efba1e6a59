"""A bias for every query and key, as models of relative positions have it: what the default makes of it, and its time.

Queries, keys and values are those of real models that have no such bias, so each is made up, for every head another:
buckets of distances (as T5's), a slope (ALiBi's, in both directions) and a table over the offsets of a grid (BEiT's).
The error is that of the attention's outputs, the mean over layers, on the odd half of the data (choices were made on
the even one). Time is that of the attention, forward, beside SDPA with the same bias as its mask.

    python -m eval.position_bias --json docs/results/position_bias.json
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from astroattn import AstrocyteAttention, patched
from astroattn.fidelity.calls import AttentionCall, find_astrocytes, read_call
from astroattn.fidelity.passes import forward
from eval.benchmark.contestants import CONFIGS
from eval.benchmark.timing import Call, Effort, ratios, time_in_turns
from eval.common import JsonOption, print_rows, relative_error, run_script, write_json
from eval.frontier.cases import Case, choose_from_command_line, load_case

BUCKETS, EXACT_BUCKETS, FARTHEST = 16, 8, 128  # of T5, in each direction
ITEMS = 4
LENGTHS = (512, 1024, 2048, 4096)
HEADS, DIM = 4, 64
EFFORT = Effort(repeats=7, seconds=30)

Bias = Callable[[int, int, torch.Generator], Tensor]  # of so many heads and tokens [H, N, N]


def make_buckets(heads: int, tokens: int, generator: torch.Generator) -> Tensor:
    """A number for each bucket of distances, falling by up to 6 to the farthest, and some noise."""
    distance = torch.arange(tokens) - torch.arange(tokens)[:, None]
    far = (distance.abs().clamp(min=1) / EXACT_BUCKETS).log() / math.log(FARTHEST / EXACT_BUCKETS)
    far = (EXACT_BUCKETS + far * (BUCKETS - EXACT_BUCKETS)).long().clamp(max=BUCKETS - 1)
    bucket = distance.abs().where(distance.abs() < EXACT_BUCKETS, far) + BUCKETS * (distance > 0)
    falling = -torch.arange(BUCKETS) / BUCKETS
    depths = 6 * torch.rand(heads, 2, 1, generator=generator)
    table = (depths * falling).flatten(1) + torch.randn(heads, 2 * BUCKETS, generator=generator) / 2
    return table[:, bucket]


def make_slopes(heads: int, tokens: int, generator: torch.Generator) -> Tensor:
    """ALiBi's slopes 2^(-8 h / H) times the distance."""
    distance = (torch.arange(tokens) - torch.arange(tokens)[:, None]).abs()
    slopes = 2.0 ** (-8 * torch.arange(1, heads + 1) / heads)
    return -slopes[:, None, None] * distance


def make_table(heads: int, tokens: int, generator: torch.Generator) -> Tensor:
    """A number for each offset of patches, highest around some offset near to none; none for CLS."""
    side = math.isqrt(tokens - 1)
    rows, columns = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    down, right = rows - rows[:, None], columns - columns[:, None]
    centres, widths = torch.randn(heads, 2, generator=generator) * 2, torch.rand(heads, generator=generator) * 6 + 1.5
    noise = torch.randn(heads, 1, 2 * side - 1, 2 * side - 1, generator=generator)
    noise = F.avg_pool2d(noise, 3, 1, 1)[:, 0]
    bias = torch.zeros(heads, tokens, tokens)
    for head, ((y, x), width) in enumerate(zip(centres, widths, strict=True)):
        hill = 3 * (-((down - y) ** 2 + (right - x) ** 2) / (2 * width**2)).exp()
        bias[head, 1:, 1:] = hill + noise[head, down + side - 1, right + side - 1]
    return bias


KINDS: dict[str, Bias | None] = {"none": None, "buckets": make_buckets, "slope": make_slopes, "table": make_table}
MODELS = {
    "minilm512": ("none", "buckets", "slope"),
    "vit448": ("none", "table"),
    "whisper": ("none", "buckets", "slope"),
}


def collect_calls(case: Case) -> list[AttentionCall]:
    """The attention calls of the original on a few items that are reported."""
    calls: list[AttentionCall] = []
    with patched(case.model), torch.no_grad():
        for module in find_astrocytes(case.model).values():
            module.exact = True
            module.register_forward_pre_hook(
                lambda core, args, kwargs: calls.append(read_call(core, args, kwargs)), with_kwargs=True
            )
        for batch in case.batches("odd"):
            forward(case.model, batch)
    return calls


@torch.no_grad()
def measure_errors(calls: list[AttentionCall], make: Bias | None) -> dict[str, float | None]:
    """The default's relative error, and its error where it is not given the bias."""
    generator = torch.Generator().manual_seed(0)
    errors: list[tuple[float, float]] = []
    for query, key, value, options in calls:
        heads, tokens, dim = query.shape[1:]
        bias = None if make is None else make(heads, tokens, generator)[None]
        module, real = AstrocyteAttention(heads, dim), AttentionCall(query, key, value, options).real_queries()
        found = module(query, key, value, bias=bias, **options).transpose(1, 2)[real]
        blind = module(query, key, value, **options).transpose(1, 2)[real]
        module.exact = True
        truth = module(query, key, value, bias=bias, **options).transpose(1, 2)[real]
        errors.append((relative_error(found, truth), relative_error(blind, truth)))
    mean, ignored = torch.tensor(errors).mean(0).tolist()
    return {"error": mean, "without it": None if make is None else ignored}


def measure_times(tokens: int) -> dict[str, Any]:
    """The default, with the benchmark's number of exact keys, over SDPA, each with the same bias for every head."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, HEADS, tokens, DIM, generator=generator) for _ in range(3))
    bias, module = make_buckets(HEADS, tokens, generator)[None], AstrocyteAttention(HEADS, DIM, CONFIGS["default"])

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)

    def default() -> Tensor:
        answer: Tensor = module(query, key, value, bias=bias)
        return answer

    with torch.inference_mode():
        times = time_in_turns({"sdpa": Call(sdpa), "default": Call(default)}, torch.device("cpu"), EFFORT)
    over = ratios(times["default"], times["sdpa"])
    return {"tokens": tokens, "times SDPA": {name: round(value, 3) for name, value in over.items()}}


def format_errors(rows: list[dict[str, Any]]) -> str:
    """A line for each model and bias."""
    lines = ["| tokens of | bias | the default's error | where the bias is left out |", "| --- | --- | --- | --- |"]
    for row in rows:
        if "model" in row:
            blind = "" if row["without it"] is None else f"{row['without it']:.2f}"
            lines.append(f"| {row['model']} | {row['bias']} | {row['error']:.3f} | {blind} |")
    return "\n".join(lines)


def format_times(rows: list[dict[str, Any]]) -> str:
    """The ratios, length by length, in words."""
    return ", ".join(f"{row['times SDPA']['median']:.2f} at {row['tokens']:,}" for row in rows if "times SDPA" in row)


def main(json: JsonOption = None) -> None:
    """Measure what a bias for every query and key costs, in error and in time."""
    rows: list[dict[str, Any]] = []
    choose_from_command_line(list(MODELS))
    for name, kinds in MODELS.items():
        case = load_case(name, ITEMS)
        calls = collect_calls(case)
        rows += [{"model": case.title, "bias": kind, **measure_errors(calls, KINDS[kind])} for kind in kinds]
    print_rows(rows, title="the default with a bias")
    times = [measure_times(tokens) for tokens in LENGTHS]
    print_rows([row | {"times SDPA": row["times SDPA"]["median"]} for row in times], title="time")
    if json:
        write_json(json, [*rows, *times], seed=0)


if __name__ == "__main__":
    run_script(main)
