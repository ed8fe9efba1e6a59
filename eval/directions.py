"""Would other directions make better tiles? The default's, found in each sequence, beside more and beside learned ones.

Queries are put into tiles, and keys into clusters, by the few directions that matter to q.k (`ops/order.py`): 8 for
each head and sequence, from 64 of its tokens. Here they are also those of all its tokens, more of them, or learned: for
each head the same in every sequence, from the covariances of the queries and keys of the even half of the data. With
all directions of a head nothing is left out, and no few of them can tell more. All self-attention of a model is
replaced, with the same number of exact keys for every sub-tile, and beside it once with more; reported is the odd half.

    python -m eval.directions --json docs/results/directions.json
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from tqdm import tqdm

from astroattn import AstroConfig, cost, patched
from astroattn.fidelity.calls import CostMeter, find_astrocytes
from astroattn.ops import choosing, order
from astroattn.ops.order import Coordinates
from eval.common import JsonOption, LimitOption, SeedOption, print_rows, rounded, run_script, write_json
from eval.frontier.cases import Case, Model, ModelOption, choose_from_command_line, load_case
from eval.frontier.comparing import format_point
from eval.frontier.measuring import Row, read_outputs

MODELS = (Model.vit448, Model.minilm512)
ITEMS = 16
KEYS_PER_ROOT = 1.2  # exact keys of a sub-tile, times the root of the length
MORE, MORE_KEYS = 16, 2.4
STEPS = 20  # of the iteration for learned directions
Find = Callable[[Tensor, Tensor], Coordinates]
FOUND = order.find_coordinates


class Kind(NamedTuple):
    """So many directions, and how they are found; keys: exact ones of a sub-tile, times the root of the length."""

    directions: int
    find: Find
    keys: float = KEYS_PER_ROOT


def of_tokens(directions: int, tokens: int) -> Kind:
    """Of so many tokens of the sequence itself."""

    def find(query: Tensor, key: Tensor) -> Coordinates:
        with patch.multiple(order, DIRECTIONS=directions, SAMPLES=tokens):
            return FOUND(query, key)

    return Kind(directions, find)


class Learned:
    """Directions of each head, from all sequences that `learn` was called with; then they are found as others are.

    The same iteration as for one sequence, y <- C_k C_q y, until it no longer moves, on the means of the covariances.
    """

    def __init__(self, model: nn.Module, directions: int) -> None:
        self._directions = directions
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        self._heads, self._name = 1, ""
        self.follow(model)

    def follow(self, model: nn.Module) -> None:
        """Know from now on which module of this model calls."""
        for name, core in find_astrocytes(model).items():
            core.register_forward_pre_hook(lambda core, _, name=name: self._enter(name, core.num_heads))

    def _enter(self, name: str, heads: int) -> None:
        self._name, self._heads = name, heads

    def learn(self, query: Tensor, key: Tensor) -> Coordinates:
        """Add the covariances of a call [H, D, D]; gives what the default finds."""
        moments = (self._mean((x.mT @ x) / x.shape[1]) for x in map(_centred, (query, key)))
        before = self._moments.get(self._name, (0.0, 0.0))
        self._moments[self._name] = tuple(a + b for a, b in zip(before, moments, strict=True))
        return FOUND(query, key)

    def find(self, query: Tensor, key: Tensor) -> Coordinates:
        of_query, of_key = self._moments[self._name]
        basis = torch.eye(len(of_query[0]))[:, : self._directions].expand(self._heads, -1, -1)
        for _ in range(STEPS):
            basis, _ = torch.linalg.qr(of_key @ (of_query @ basis))
        basis = torch.linalg.solve_triangular(
            order.factor(basis.mT @ of_query @ basis).mT, basis, upper=True, left=False
        )
        sequences = len(query) // self._heads
        query_basis, key_basis = (x.repeat(sequences, 1, 1) for x in (basis, of_query @ basis))
        return Coordinates(query_basis, key_basis, _centred(query @ query_basis), _centred(key @ key_basis))

    def _mean(self, x: Tensor) -> Tensor:
        """Over the sequences of a batch [B * H, ...] -> [H, ...]."""
        return x.unflatten(0, (-1, self._heads)).mean(0)


def measure(case: Case) -> list[Row]:
    """One row for each kind of directions: cost, and error and agreement of the outputs on the odd half."""
    batches, few = list(case.batches("odd")), order.DIRECTIONS
    rows = []
    with torch.inference_mode():
        truth = read_outputs(case, batches)
        with patched(case.model, AstroConfig(backend="torch")):
            dim = max(core.head_dim for core in find_astrocytes(case.model).values())
            learned = Learned(case.model, few)
            with patch.multiple(choosing, find_coordinates=learned.learn):
                read_outputs(case, list(case.batches("even")))
        kinds = {
            f"{few} of 64 tokens (the default)": Kind(few, FOUND),
            f"{few} of all tokens": of_tokens(few, case.tokens),
            f"{few}, learned": Kind(few, learned.find),
            f"{MORE} of all tokens": of_tokens(MORE, case.tokens),
            "all of a head": of_tokens(dim, case.tokens),
            f"{few} of 64 tokens, {MORE_KEYS:g} sqrt(n) exact keys": Kind(few, FOUND, MORE_KEYS),
        }
        for name, kind in tqdm(kinds.items(), case.title, unit="kind"):
            config = AstroConfig(exact_keys=round(kind.keys * sqrt(case.tokens)), backend="torch")
            with patched(case.model, config), patch.multiple(choosing, find_coordinates=kind.find):
                learned.follow(case.model)
                meter = CostMeter(case.model)
                with meter.watch():
                    error, agreement = case.kind.compare(read_outputs(case, batches), truth)
                with patch.multiple(cost, DIRECTIONS=kind.directions):
                    meter.add(None)
            row = {"model": case.title, "items": len(truth), "directions": name, "what": case.kind.error}
            row |= {"cost": meter.totals()["cost"], "error": error, "agreement": agreement}
            rows.append(rounded(row))
    return rows


def format_markdown(rows: Sequence[Row]) -> str:
    """A line for each kind of directions and a column per model: error, agreement (cost)."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = [f"| directions | {' | '.join(models)} |", "| --- " * (1 + len(models)) + "|"]
    for name in dict.fromkeys(row["directions"] for row in rows):
        cells = [
            format_point(row) for model in models for row in rows if (row["model"], row["directions"]) == (model, name)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


def main(json: JsonOption = None, model: ModelOption = None, limit: LimitOption = ITEMS, seed: SeedOption = 0) -> None:
    """Measure every kind of directions in every model."""
    torch.manual_seed(seed)
    rows: list[Row] = []
    for name in choose_from_command_line(model or list(MODELS)):
        found = measure(load_case(name, limit))
        print_rows(found, title=found[0]["model"])
        rows += found
        if json:  # at once, so that a run that breaks off is not lost
            write_json(json, rows, seed=seed)
    print(format_markdown(rows))


if __name__ == "__main__":
    run_script(main, data=True)
