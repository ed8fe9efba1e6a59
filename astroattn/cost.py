"""What an attention call costs, counted: positions attended to, and products of length D per query."""

from __future__ import annotations

from dataclasses import dataclass

from astroattn.config import AstroConfig
from astroattn.ops.causal import CHUNK
from astroattn.ops.clustering import block_layout
from astroattn.ops.tiles import cut, near_shape


@dataclass(frozen=True)
class Cost:
    """Mean cost of one query of one head.

    Attributes:
        positions: keys and hidden neurons that the query attends to.
        products: products of vectors of length D: logits, outputs, learning, selection and statistics included.
        softmax: 2 * N, the same for softmax attention.
    """

    positions: float
    products: float
    softmax: float

    @property
    def ratio(self) -> float:
        """Products over those of softmax attention."""
        return self.products / self.softmax


def count_cost(
    config: AstroConfig, head_dim: int, num_queries: int, num_keys: int, causal: bool, grid: tuple[int, int] | None
) -> Cost:
    """Count the products of one head of one sequence; an entry of the sum below is (how many, per what)."""
    if covers(config, num_keys, grid):
        return Cost(num_keys, 2 * num_keys, 2 * num_keys)
    if causal:
        return _count_causal(config, head_dim, num_keys)
    m = config.num_hidden
    prefix = prefix_length(config, num_keys, grid)
    body = num_keys - prefix
    rows, columns = grid if grid and config.near else (1, body)
    tile = config.tile if config.near else body
    down, across = cut(tile, rows, columns)[2:]
    tiles = down * across
    groups = min(config.groups, tiles)
    window = near_shape(config.near, rows, columns)
    exact = prefix + window[0] * window[1] + (min(config.exact_keys, body) if config.near else 0)

    if config.hidden in ("random", "learned"):
        drive = _drive(config)
        if not config.near and not prefix:
            return Cost(m, m * (1 + drive) * (1 + num_keys / num_queries), 2 * num_keys)
        total = body * (2 * m * (1 + drive) + exact * (1 + drive + m / head_dim)) + groups * num_keys
    elif config.hidden == "hebbian":
        block, blocks = block_layout(body, m)
        learning = body * ((config.steps + 1) * m + config.steps + 2)  # assignments, means, the values' mean, w
        statistics = body * 3  # mean queries, variance of r, distance of the values
        reading = groups * (num_keys + block * blocks)  # u.k, and the sums s
        shared = groups < tiles
        near_sums = tiles * window[0] * window[1] if shared else 0
        total = learning + statistics + reading + near_sums + body * 2 * (exact + m)
    else:
        total = body * 2 * exact + groups * num_keys + body
    far = 0 if config.hidden == "none" else m
    positions = (body * (exact + far) + prefix * num_keys) / num_keys
    return Cost(positions, (total + prefix * 2 * num_keys) / num_keys, 2 * num_keys)


def _count_causal(config: AstroConfig, head_dim: int, num_keys: int) -> Cost:
    m, near, drive = config.num_hidden, min(config.near, num_keys), _drive(config)
    pairs = CHUNK * (1 + m / head_dim) + ((1 + drive) * (CHUNK + near - 1) if near else 0)  # through phi, and exactly
    products = 2 * m * (1 + drive) + pairs
    return Cost(near + m, products, 2 * num_keys)


def _drive(config: AstroConfig) -> int:
    """Products of length D in one W x: queries and keys of a learned layer are twice as long (`LearnedHidden`)."""
    return 2 if config.hidden == "learned" else 1


def covers(config: AstroConfig, num_keys: int, grid: tuple[int, int] | None) -> bool:
    """Whether every key is attended exactly, by near field and exact keys together: attention is softmax attention."""
    if config.hidden == "exact":
        return True
    if config.near == 0:
        return config.exact_queries >= num_keys
    prefix = prefix_length(config, num_keys, grid)
    rows, columns = grid or (1, num_keys - prefix)
    if rows * columns <= 0 or config.near >= num_keys:
        return True
    high, wide = near_shape(config.near, rows, columns)
    return high * wide + config.exact_keys >= rows * columns


def prefix_length(config: AstroConfig, num_keys: int, grid: tuple[int, int] | None) -> int:
    """Tokens outside the tiles: those before the patch grid, or the first `exact_queries` of a sequence."""
    if grid is None or config.near == 0:
        return min(config.exact_queries, num_keys)
    return num_keys - grid[0] * grid[1]
