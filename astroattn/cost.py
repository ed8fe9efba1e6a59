"""What an attention call costs, counted: positions attended to, and products of length D per query."""

from __future__ import annotations

from dataclasses import dataclass

from astroattn.config import CROSSING, STATIC, AstroConfig, is_tiled
from astroattn.ops.causal import CHUNK
from astroattn.ops.features import POSITIVE
from astroattn.ops.layout import LEAST_BODY, LEAST_NEAR, LEAST_QUERIES, ROOT, SUBTILE, Budget, Layout, cuts
from astroattn.ops.order import DIRECTIONS, SAMPLES, TRIALS
from astroattn.ops.streaming import block_of
from astroattn.ops.window import block_size


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
    config: AstroConfig,
    head_dim: int,
    num_queries: int,
    num_keys: int,
    causal: bool,
    grid: tuple[int, int] | None,
    cross: bool = False,
    exact_keys: float | None = None,
) -> Cost:
    """Count the products of one head of one sequence, whose queries are those of another with `cross`.

    Args:
        exact_keys: of a sub-tile in the mean, those of the prefix not counted, where inputs decide; None: the most.
    """
    if covers(config, num_keys, grid, num_queries if cross else None):
        return Cost(num_keys, 2 * num_keys, 2 * num_keys)
    if config.hidden == "streaming":
        return _count_streaming(config, num_keys)
    if causal:
        return _count_causal(config, head_dim, num_keys)
    prefix = prefix_length(config, num_keys, grid, cross)
    body, m = num_keys - prefix, config.num_hidden
    if config.hidden in STATIC and not is_tiled(config) and (not prefix or config.activation in POSITIVE):
        read = num_queries - prefix
        attended = read * (prefix + m) + prefix * num_keys
        multiplied = read * 2 * prefix + (read + body) * m * (1 + _drive(config)) + prefix * 2 * num_keys
        return Cost(attended / num_queries, multiplied / num_queries, 2 * num_keys)
    layout = budget_of(config, num_keys, grid, cross).at(num_keys, head_dim, num_queries)
    exact = layout.most_keys(body) if exact_keys is None else exact_keys
    positions = prefix + exact + layout.num_hidden
    products = sum(count_choice(layout, head_dim, num_queries, num_keys).values())
    if config.hidden in STATIC:
        drive = _drive(config)
        positions += m
        products += body * (2 * m * (1 + drive) + (prefix + exact) * (1 + drive + m / head_dim))
    else:
        products += sum(count_reading(layout, num_queries, num_keys, exact).values())
    products += prefix * 2 * num_keys
    asked = num_queries - prefix
    return Cost((asked * positions + prefix * num_keys) / num_queries, products / num_queries, 2 * num_keys)


def count_choice(layout: Layout, head_dim: int, num_queries: int, num_keys: int) -> dict[str, float]:
    """Products of length D to choose tiles, clusters and exact keys; sorting and top-k are no products."""
    asked, body = num_queries - layout.prefix, num_keys - layout.prefix
    m, few, subtiles = layout.num_hidden, min(DIRECTIONS, head_dim), layout.all_subtiles(asked)
    part, samples = few / head_dim, 5 * min(SAMPLES, asked) + 3 * min(SAMPLES, body)
    counts: dict[str, float] = {}
    if layout.by_content or m or layout.exact_keys:
        counts["coordinates"] = samples * few + (asked + body) * few
    if layout.by_content:
        counts["tree"] = asked * (len(cuts(asked, layout.tile)) - 1) * (few + 3) / 2 * part
        counts["neighbours"] = 2 * min(TRIALS, asked // SUBTILE) * SUBTILE * min(TRIALS, body)
    if m or layout.exact_keys:
        counts["mean queries"] = 2 * asked
        counts["u.k"] = layout.tiles(asked) * num_keys
    if m:
        counts["clusters"] = body * ((layout.steps + 1) * m + layout.steps + few) * part
        counts["means"] = body * (5 + part)  # w twice, the values' mean, |v - mean v|, |k - w|^2
    if layout.exact_keys:
        counts["sub-tiles"] = asked * 2 + subtiles * (m + layout.prefix * bool(m))
        counts["candidates"] = body * 2 * bool(m) + subtiles * layout.candidates(body) * part
    return counts


def count_reading(layout: Layout, num_queries: int, num_keys: int, exact_keys: float) -> dict[str, float]:
    """Products of length D to write the hidden layer and to read it beside the exact keys."""
    asked, body, m = num_queries - layout.prefix, num_keys - layout.prefix, layout.num_hidden
    counts = {"read": asked * 2 * (layout.prefix + exact_keys + m)}
    if m:
        counts["sums of tiles"] = layout.tiles(asked) * body
    return counts


def _count_causal(config: AstroConfig, head_dim: int, num_keys: int) -> Cost:
    m, near, drive = config.num_hidden, min(config.near, num_keys), _drive(config)
    pairs = CHUNK * (1 + m / head_dim) + ((1 + drive) * (CHUNK + near - 1) if near else 0)  # through phi, and exactly
    products = 2 * m * (1 + drive) + pairs
    return Cost(near + m, products, 2 * num_keys)


def _count_streaming(config: AstroConfig, num_keys: int) -> Cost:
    """Reading, and the distances between all that may join, once a block; keys that several heads share count once."""
    block = block_of(config.entries)
    candidates = config.entries - config.near + block
    return Cost(config.entries, 2 * config.entries + 2 * candidates**2 / block, 2 * num_keys)


def count_window(window: int, num_queries: int, num_keys: int, causal: bool) -> Cost:
    """Count the products of one head whose near field is a window: the queries of a block share all their keys."""
    sides, block = 1 if causal else 2, min(block_size(window), num_queries)
    read = min(block + sides * window, num_keys)
    return Cost(min(1 + sides * window, num_keys), 2 * read, 2 * num_keys)


def _drive(config: AstroConfig) -> int:
    """Products of length D in one W x: queries and keys of a learned layer are twice as long (`LearnedHidden`)."""
    return 2 if config.hidden == "learned" else 1


def covers(config: AstroConfig, num_keys: int, grid: tuple[int, int] | None, crossing: int | None = None) -> bool:
    """Whether every key is attended exactly, by near field and exact keys together: attention is softmax attention.

    Args:
        crossing: the number of queries, where they are those of another sequence.
    """
    if config.hidden == "exact":
        return True
    if crossing is not None and config.hidden in CROSSING and crossing < LEAST_QUERIES:
        return True
    if config.hidden == "streaming":
        return num_keys <= config.entries
    prefix = prefix_length(config, num_keys, grid, crossing is not None)
    body = num_keys - prefix
    if body <= 0 or not is_tiled(config):
        return body <= 0
    near = 0 if crossing is not None else LEAST_NEAR if config.near == ROOT else config.near
    exact_keys = LEAST_BODY if config.exact_keys < 0 else config.exact_keys
    return max(near, exact_keys) >= body  # by a bare comparison, which holds for a range of lengths in a graph


def covered_length(config: AstroConfig) -> int:
    """The most tokens of a sequence that `covers` holds for; prefix tokens of a patch grid may come on top."""
    if config.hidden == "streaming":
        return config.entries
    if not is_tiled(config):
        return config.exact_queries
    near = LEAST_NEAR if config.near == ROOT else config.near
    exact_keys = LEAST_BODY if config.exact_keys < 0 else config.exact_keys
    return config.exact_queries + max(near, exact_keys)


def budget_of(config: AstroConfig, num_keys: int, grid: tuple[int, int] | None, cross: bool = False) -> Budget:
    """The config as the operators take it; queries of another sequence have neither a near field nor a prefix."""
    tiled = is_tiled(config)
    return Budget(
        grid=grid if tiled else None,
        prefix=prefix_length(config, num_keys, grid, cross),
        tile=config.tile,
        by_content=config.tiles == "content",
        near=0 if cross else config.near,
        exact_keys=config.exact_keys,
        num_hidden=config.num_hidden if config.hidden == "hebbian" else 0,
        steps=config.steps,
        cross=cross,
        key_error=config.millionths,
    )


def prefix_length(config: AstroConfig, num_keys: int, grid: tuple[int, int] | None, cross: bool = False) -> int:
    """Tokens outside the tiles: those before the patch grid, or the first `exact_queries` of a sequence."""
    if cross and config.hidden in CROSSING:
        return 0
    if grid is None or not is_tiled(config):
        return min(config.exact_queries, num_keys)
    return num_keys - grid[0] * grid[1]
