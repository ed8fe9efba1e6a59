"""Who is measured, and with which budgets: about a tenth to a half of softmax's products, from 200 tokens to 4,000."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import isqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, NamedTuple

from astroattn import AstroConfig, Plan, calibrate
from astroattn.calibration.menu import by_error
from eval.frontier.cases import Case
from eval.peers import (
    block_means,
    block_sparse,
    eight_bit,
    monarch,
    multipole,
    nystroem,
    random_features,
    uniform,
)

LONG = 2000  # tokens
ERRORS = (0.08, 0.04, 0.01, 0.005)  # of a key, beside the default's 0.02
SHARES = (0.1, 0.15, 0.25, 0.4)  # of softmax's products, that a plan may cost


def find_ours(case: Case) -> dict[str, dict[str, Any]]:
    """Our lines: by the name of a line and of a point on it, what `patch` is given.

    The default with larger and smaller errors of a key, and plans, which are chosen on the even half of the data.
    """
    others = {f"error of a key {error}": by_error(case.tokens, error) for error in ERRORS}
    return {"ours": {"default": AstroConfig(), **others}, "ours, with a plan": find_plans(case)}


def find_plans(case: Case) -> dict[str, Plan]:
    """The plans for `SHARES`, without those that cost less than the menu can; the effects are measured once."""
    plans = {}
    with TemporaryDirectory() as folder:
        batches, state = list(case.batches("even")), Path(folder) / "effects.safetensors"
        for share in SHARES:
            try:
                plan = calibrate(case.model, batches, cost=share, state=state, progress=False)
            except ValueError as error:
                if not str(error).startswith("cost:"):
                    raise
                continue
            plans[f"{share:.0%}"] = plan
    return plans


class Peer(NamedTuple):
    """A module of `eval.peers`, and its budgets for so many tokens."""

    module: ModuleType
    budgets: Callable[[int], Iterable[dict[str, int]]]


def _sparse(tokens: int) -> Iterable[dict[str, int]]:
    # Smaller blocks than its kernel's err less at the same cost; in long sequences, gathering for each takes too long.
    block = 16 if tokens < LONG else 64
    return [{"query_block": block, "key_block": 16, "mass": mass, "similarity": 0} for mass in (30, 60, 90)]


def _block_means(tokens: int) -> Iterable[dict[str, int]]:
    return [{"block": 16, "exact": max(1, tokens // part), "first_order": 1} for part in (256, 64, 32)]


def _multipole(tokens: int) -> Iterable[dict[str, int]]:
    root = isqrt(tokens)
    pairs = ((root, 16), (root, 8), (2 * root, 8), (2 * root, 4))
    return [{"clusters": clusters, "exact": tokens // part, "steps": 1} for clusters, part in pairs]


def _monarch(tokens: int) -> Iterable[dict[str, int]]:
    root = isqrt(tokens)  # the width of a square patch grid
    pairs = ((root, 1), (root, 2), (4 * root, 2))
    return [{"block": block, "steps": steps} for block, steps in pairs]


def _nystroem(tokens: int) -> Iterable[dict[str, int]]:
    return [{"landmarks": max(8, tokens // part), "steps": 6} for part in (64, 16)]


PEERS = {
    "block-sparse (SpargeAttention)": Peer(block_sparse, _sparse),
    "exact blocks + block means (PISA)": Peer(block_means, _block_means),
    "exact clusters + centroids (Multipole)": Peer(multipole, _multipole),
    "MonarchAttention": Peer(monarch, _monarch),
    "Nystroem": Peer(nystroem, _nystroem),
    "random features (Performer)": Peer(random_features, lambda tokens: [{"features": m} for m in (64, 256)]),
    "8-bit q.k, exact (SageAttention)": Peer(eight_bit, lambda tokens: [{"query_block": 128, "key_block": 64}]),
    "uniform": Peer(uniform, lambda tokens: [{}]),
}
