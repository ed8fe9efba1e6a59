"""The error of the paper's random hidden layer on random queries and keys, as short as theory likes them.

Unit-scale q and k (D independent normal components of variance 1 / D each, so |q| and |k| are about 1), normal values;
the relative error of the attention output against softmax with scale 1, for independent and for orthogonal weights.
Monte Carlo predicts error ~ m^-1/2.
"""

from __future__ import annotations

from typing import Any

import torch
from scipy.stats import linregress
from tqdm import tqdm

from astroattn import AstroConfig, AstrocyteAttention
from eval.common import relative_error
from eval.error_vs_hidden.rows import make_row

NAME = "random vectors"
SIZES = [2**power for power in range(4, 15)]
HEADS, TOKENS, DIM = 4, 128, 32


def measure_synthetic(draws: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """One row per kind of weights and m: mean over `draws` of weights and inputs, with its confidence interval."""
    work = [(hidden, m) for hidden in ("independent", "orthogonal") for m in SIZES]
    return [
        make_row(NAME, "all", hidden, m, "output", [draw_error(m, hidden, seed + draw) for draw in range(draws)])
        for hidden, m in tqdm(work, NAME, unit="size")
    ]


def draw_error(m: int, hidden: str, seed: int) -> float:
    """The relative error of the output in one draw."""
    generator = torch.Generator().manual_seed(10**6 + seed)  # not the stream that the weights are drawn from
    query, key, value = torch.randn(3, 1, HEADS, TOKENS, DIM, generator=generator, dtype=torch.float64)
    query, key = query / DIM**0.5, key / DIM**0.5
    config = AstroConfig(hidden="random", num_hidden=m, near=0, orthogonal=hidden == "orthogonal", seed=seed)
    network = AstrocyteAttention(HEADS, DIM, config)
    out = network(query, key, value, scale=1.0)
    network.exact = True
    softmax = network(query, key, value, scale=1.0)
    return relative_error(out, softmax)


def fit_slopes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The slope of log error over log m of the random vectors, by least squares, with its standard error."""
    fits = []
    for hidden in ("independent", "orthogonal"):
        mine = [row for row in rows if row["model"] == NAME and row["hidden"] == hidden]
        points = [torch.tensor([row[name] for row in mine]).double().log() for name in ("m", "error")]
        fit = linregress(*points)
        fits.append({"hidden": hidden, "slope": float(fit.slope), "standard error": float(fit.stderr)})
    return fits
