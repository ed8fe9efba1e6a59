"""The attention alone: one row for each contestant, length, pass, dtype and way to launch it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from eval.benchmark.contestants import (
    GATE_LENGTHS,
    Contestant,
    Problem,
    check_properties,
    check_results,
    draw_gradient,
    make_contestants,
    measure_error,
    run_pass,
)
from eval.benchmark.peers import find_peers
from eval.benchmark.rows import Row
from eval.benchmark.timing import (
    Call,
    Effort,
    capture,
    count_sets,
    measure_ceilings,
    measure_peak,
    quartiles,
    ratios,
    rotate,
    time_in_turns,
)

LENGTHS = (197, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
PASSES = {"forward": False, "forward+backward": True}
# The fused backends of SDPA; the plain one needs memory for N x N numbers.
FUSED = {
    "cpu": (SDPBackend.FLASH_ATTENTION,),
    "cuda": (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION),
}
WARM_UP = 300  # tokens, more than the near field of any contestant
LEAST_CALLS = 5  # in a CUDA graph
# Of the operations and bytes of a forward pass, those of forward and backward: every product has two in the backward
# pass, which reads q, k, v, the output and its gradient, and writes three gradients.
WITH_BACKWARD = 3


def measure_attention(
    problem: Problem,
    limit: int,
    passes: list[str],
    effort: Effort,
    keep: Callable[[list[Row]], None],
    with_peers: bool = False,
) -> None:
    """Gate, then time, all contestants from 197 tokens to `limit`; `keep` is given rows as soon as there are some.

    Raises:
        GateError: a contestant of ours, or SDPA, does not compute what it claims to.
    """
    contestants = make_contestants(problem)
    dtype, backward = str(problem.dtype).removeprefix("torch."), any(PASSES[name] for name in passes)
    for contestant in tqdm(contestants, f"gate, {dtype}", leave=False):
        for tokens in GATE_LENGTHS:
            check_results(contestant, problem, tokens, backward)
    if with_peers:
        peers, told = find_peers(problem, backward)
        contestants += peers
        keep([row | {"dtype": dtype} for row in told])
    errors = {(each.name, each.backend): measure_error(each, problem) for each in contestants}
    ceilings = measure_ceilings(problem.dtype, problem.device)
    keep([{"part": "ceilings", "dtype": dtype, **ceilings}])
    cells = [(name, tokens) for name in passes for tokens in LENGTHS if tokens <= limit]
    for name, tokens in tqdm(cells, f"attention, {dtype}", leave=False):
        same = {"part": "attention", "dtype": dtype, "pass": name, "tokens": tokens}
        rows = _measure_cell(problem, contestants, tokens, PASSES[name], effort, ceilings)
        keep([same | row | {"error": errors[row["name"], row["backend"]]} for row in rows])


def _measure_cell(
    problem: Problem,
    contestants: list[Contestant],
    tokens: int,
    backward: bool,
    effort: Effort,
    ceilings: dict[str, float],
) -> list[Row]:
    taken = [each for each in contestants if tokens <= each.limit and (each.has_backward or not backward)]
    times, best = _time_cell(problem, taken, tokens, backward, effort)
    rows = []
    for contestant in taken:
        if (contestant.label, "eager") not in times:
            continue
        peak = _peak_of(problem, contestant, tokens, backward)
        for launch in ("eager", "graph"):
            mine, theirs = (times.get((label, launch)) for label in (contestant.label, "SDPA"))
            if mine is None:
                continue
            seconds = quartiles(mine)
            over = None if theirs is None else ratios(mine, theirs)
            rows.append(
                {
                    "launch": launch,
                    "name": contestant.name,
                    "backend": contestant.backend,
                    "kernel": best.name if contestant.name == "SDPA" else contestant.kernel,
                    "seconds": seconds,
                    "times SDPA": over,
                    "peak MB": peak / 1e6,
                    **_fractions(contestant, problem, tokens, backward, seconds["median"], ceilings),
                }
            )
    return rows


def _time_cell(
    problem: Problem, contestants: list[Contestant], tokens: int, backward: bool, effort: Effort
) -> tuple[dict[tuple[str, str], list[float]], SDPBackend]:
    """Times by label and launch, turn by turn, and the backend of SDPA."""
    device = problem.device
    size = 3 * problem.batch * problem.heads * tokens * problem.head_dim * problem.dtype.itemsize
    sets = problem.draw(tokens, count_sets(size, device))
    d_out = draw_gradient(problem, tokens) if backward else None
    calls = {}
    with torch.inference_mode(not backward):
        best = _best_sdpa(contestants[0], sets, d_out, device)
        with sdpa_kernel(best):
            for contestant in contestants:
                if not _is_right(contestant, problem, tokens, backward):
                    continue
                run = rotate(partial(run_pass, contestant.attend, d_out=d_out), sets)
                calls[contestant.label, "eager"] = Call(run)
                if device.type == "cuda" and contestant.backend != "torch":
                    replay = capture(run, max(LEAST_CALLS, len(sets)), contestant.label)
                    calls |= {(contestant.label, "graph"): replay} if replay else {}
            return time_in_turns(calls, device, effort), best


def _is_right(contestant: Contestant, problem: Problem, tokens: int, backward: bool) -> bool:
    """Whether a contestant passes the gate at this length; a peer that does not has no row here, with a warning."""
    try:
        check_properties(contestant, problem, tokens, backward)
    except Exception as error:
        if contestant.backend != "peer":
            raise
        warnings.warn(f"{contestant.label}, {tokens} tokens: {error}", stacklevel=2)
        return False
    return True


def _best_sdpa(
    sdpa: Contestant, sets: list[tuple[Tensor, Tensor, Tensor]], d_out: Tensor | None, device: torch.device
) -> SDPBackend:
    """The fused backend that is the fastest of those that run."""
    if len(FUSED[device.type]) == 1:
        return FUSED[device.type][0]
    seconds = {}
    for backend in FUSED[device.type]:
        calls = {"SDPA": Call(rotate(partial(run_pass, sdpa.attend, d_out=d_out), sets))}
        with sdpa_kernel(backend), warnings.catch_warnings(action="ignore"):
            try:
                seconds[backend] = min(time_in_turns(calls, device, Effort(3, 1))["SDPA"])
            except RuntimeError:  # it does not take these inputs
                continue
    return min(seconds, key=seconds.__getitem__)


def _fractions(
    contestant: Contestant,
    problem: Problem,
    tokens: int,
    backward: bool,
    seconds: float,
    ceilings: dict[str, float],
) -> dict[str, float | None]:
    """What share of the machine's bandwidth and matrix products it uses, by counted bytes and operations.

    Bytes: q, k, v and the output once each. Operations: two for each of the D multiplications of a product.
    """
    rows = problem.batch * problem.heads * tokens * (WITH_BACKWARD if backward else 1)
    read = 4 * rows * problem.head_dim * problem.dtype.itemsize
    done = None if contestant.products is None else 2 * rows * problem.head_dim * contestant.products(tokens)
    return {
        "of bandwidth": read / seconds / ceilings["bytes per second"],
        "of matrix products": None if done is None else done / seconds / ceilings["operations per second"],
    }


def _peak_of(problem: Problem, contestant: Contestant, tokens: int, backward: bool) -> int:
    """Peak bytes of one pass; on a CPU in a process of its own, where nothing is kept from earlier passes."""
    if problem.device.type == "cuda":
        return _run_once(problem, contestant, tokens, backward)
    context = get_context("forkserver")  # not a fork: PyTorch's threads do not survive one
    context.set_forkserver_preload([__name__, "torch._dynamo"])  # which operators import at their first call
    with context.Pool(1) as pool:
        return pool.apply(_in_own_process, (problem, contestant.label, tokens, backward, torch.get_num_threads()))


def _in_own_process(problem: Problem, label: str, tokens: int, backward: bool, threads: int) -> int:
    torch.set_num_threads(threads)
    small = replace(problem, batch=1, heads=1, head_dim=8)
    for each, size in ((small, WARM_UP), (problem, tokens)):  # the first loads what is loaded once
        (contestant,) = (contestant for contestant in make_contestants(each) if contestant.label == label)
        peak = _run_once(each, contestant, size, backward)
    return peak


def _run_once(problem: Problem, contestant: Contestant, tokens: int, backward: bool) -> int:
    (inputs,) = problem.draw(tokens)
    d_out = draw_gradient(problem, tokens) if backward else None
    with torch.inference_mode(not backward):
        return measure_peak(partial(run_pass, contestant.attend, *inputs, d_out), problem.device)
