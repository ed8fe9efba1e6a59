"""The contestants in one model: error end to end, cost that is counted and time of the attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from astroattn import AstroConfig, AstrocyteAttention, patched
from astroattn.fidelity.calls import AttentionCall, CostMeter, find_astrocytes, read_call
from astroattn.fidelity.passes import call as run_model
from astroattn.patching import PatchReport
from eval.benchmark.timing import Call, Effort, time_in_turns
from eval.common import rounded
from eval.frontier.cases import Case, load_case
from eval.frontier.contestants import PEERS, Peer, find_ours
from eval.heads import first_items

Row = dict[str, Any]
Calls = list[tuple[str, AttentionCall]]  # what the attention modules of a model were called with, by their names
Run = Callable[[Case, Sequence[Any], Calls], tuple[Tensor, float, float]]  # gives outputs, cost and time
TURNS = Effort(5, 2.0)


def measure(limit: int | None, seed: int, name: str, *, peers: bool = True) -> list[Row]:
    """One row per contestant: `measure_runs`, with "line" (the method), "budget" and "ours"."""
    return measure_runs(partial(_contestants, peers=peers), limit, seed, name)


def measure_runs(runs: Callable[[Case], list[tuple[Row, Run]]], limit: int | None, seed: int, name: str) -> list[Row]:
    """One row per run in the model that `SOURCES` calls `name`, on the odd half of its data.

    A row has "model", "tokens" and "items"; what goes with the run; "error" and "agreement" with the original's outputs
    (None where there is no such thing); "cost", the products over softmax's 2N; "time", that of the attention of all
    layers on one item over SDPA's, the median of turns that time both; and "what", what "error" is.
    """
    torch.manual_seed(seed)
    case = load_case(name, limit)
    batches = list(case.batches("odd"))
    rows = []
    with torch.inference_mode():
        truth = read_outputs(case, batches)
        calls = record_calls(case.model, first_items(batches[0], 1))
        for labels, run in tqdm(runs(case), case.title, unit="run"):
            found, cost, time = run(case, batches, calls)
            error, agreement = case.kind.compare(found, truth)
            row = {"model": case.title, "tokens": case.tokens, "items": len(truth), "what": case.kind.error}
            row |= labels | {"cost": cost, "time": time, "error": error, "agreement": agreement}
            rows.append(rounded(row))
    return rows


def _contestants(case: Case, *, peers: bool) -> list[tuple[Row, Run]]:
    runs: list[tuple[Row, Run]] = [
        ({"line": line, "budget": point, "ours": True}, partial(run_ours, given))
        for line, points in find_ours(case).items()
        for point, given in points.items()
    ]
    others = PEERS if peers else {}
    return runs + [
        ({"line": line, "budget": _describe(budget), "ours": False}, partial(_run_peer, peer, budget))
        for line, peer in others.items()
        for budget in peer.budgets(case.tokens)
    ]


def _describe(budget: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {number}" for name, number in budget.items())


def read_outputs(case: Case, batches: Sequence[Any]) -> Tensor:
    return torch.cat([case.kind.read(case.model, inputs) for inputs in batches])


def record_calls(model: nn.Module, inputs: Any) -> Calls:
    """What the attention modules are called with in the original."""
    calls: Calls = []
    with patched(model, AstroConfig()) as report:
        _require_all(report)
        for name, core in find_astrocytes(model).items():
            core.exact = True
            core.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: calls.append((name, read_call(module, args, kwargs))),
                with_kwargs=True,
            )
        run_model(model, inputs)
    return calls


def _require_all(report: PatchReport) -> None:
    exact = [row.name for row in report.exact if row.index is not None]
    if exact:
        raise ValueError(f"model: {', '.join(exact)} stay exact, and all layers are to be compared")


def run_ours(given: Any, case: Case, batches: Sequence[Any], calls: Calls) -> tuple[Tensor, float, float]:
    """Outputs, cost and time of the model patched with what is given."""
    with patched(case.model, given) as report:
        _require_all(report)
        meter = CostMeter(case.model)
        with meter.watch():
            found = read_outputs(case, batches)
        meter.add(None)
        return found, meter.totals()["cost"], _time(case.model, calls)


def _run_peer(
    peer: Peer, budget: dict[str, int], case: Case, batches: Sequence[Any], calls: Calls
) -> tuple[Tensor, float, float]:
    """The same with a peer in the place of every astrocyte."""
    with patched(case.model, AstroConfig()):
        stands = []
        for name, core in find_astrocytes(case.model).items():
            parent, _, attribute = name.rpartition(".")
            stands.append(Stand(peer, budget, core.num_heads, core.head_dim))
            setattr(case.model.get_submodule(parent), attribute, stands[-1])
        found = read_outputs(case, batches)
        for stand in stands:
            stand.counting = False  # counting may take as long as attending
        return found, mean(cost for stand in stands for cost in stand.costs), _time(case.model, calls)


class Stand(AstrocyteAttention):
    """Stands where an `AstrocyteAttention` stood, is called as that is, and lets a peer answer.

    Attributes:
        counting: while True, what every call costs over softmax's 2N is added to `costs`.
    """

    def __init__(self, peer: Peer, budget: dict[str, int], num_heads: int, head_dim: int) -> None:
        super().__init__(num_heads, head_dim)
        self._peer, self._budget = peer, budget
        self.counting = True
        self.costs: list[float] = []

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_mask: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
        grid: tuple[int, int] | None = None,
        window: int | None = None,
        sink: Tensor | None = None,
        soft_cap: float | None = None,
    ) -> Tensor:
        """As in `AstrocyteAttention`; ValueError where there is padding, a causal mask, a window, a sink or a cap."""
        more = window is not None or sink is not None or soft_cap is not None
        if causal or more or (key_mask is not None and not key_mask.all()):
            raise ValueError("inputs: the peers take no padding and no causal mask, window, sink or soft cap")
        tokens, width = query.shape[2:]
        query = query * (width**-0.5 if scale is None else scale)
        if self.counting:
            count = getattr(self._peer.module, "kept_keys", None)
            kept = {"kept": count(query, key, **self._budget)} if count else {}
            self.costs.append(self._peer.module.products(tokens, width, **self._budget, **kept) / (2 * tokens))
        return self._peer.module.attention(query, key, value, **self._budget)


def _time(model: nn.Module, calls: Calls) -> float:
    """Seconds of what stands in the model now, for these calls, over those of SDPA; the median of turns."""
    modules = {name: model.get_submodule(name) for name, _ in calls}

    def attend() -> None:
        for name, (query, key, value, options) in calls:
            modules[name](query, key, value, **options)

    def attend_exactly() -> None:
        for _, each in calls:
            F.scaled_dot_product_attention(*each[:3], scale=each.scale)

    device = calls[0][1].query.device
    times = time_in_turns({"SDPA": Call(attend_exactly), "this": Call(attend)}, device, TURNS)
    return median(mine / theirs for mine, theirs in zip(times["this"], times["SDPA"], strict=True))
