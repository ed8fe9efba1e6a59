"""The order in which queries are cut into tiles, by what they ask for or by where they stand; near keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from astroattn.ops.layout import SUBTILE, Layout, cuts

DIRECTIONS, SAMPLES = 8, 64
POWER_STEPS = 2  # of the iteration for a node's principal direction
TRIALS = 16  # sub-tiles of either order that are compared, and keys by which
NEIGHBOURS = 0.8  # of the differences within sub-tiles by content, below which neighbours stay together
RIDGE = 1e-5  # of a Cholesky factor, relative to the mean of the diagonal


class Coordinates(NamedTuple):
    """The few directions that matter to q.k: q.k ~ (q Y).(k P), up to terms that are the same for all keys.

    Attributes:
        query_basis, key_basis: Y, P [Z, D, c].
        query, key: q Y and k P, less their means [Z, n, c].
    """

    query_basis: Tensor
    key_basis: Tensor
    query: Tensor
    key: Tensor


def _spread_out(count: int, most: int, device: torch.device) -> Tensor:
    """At most that many of `count` places, at equal distances."""
    number = min(most, count)
    return (2 * torch.arange(number, device=device) + 1) * count // (2 * number)


def find_coordinates(query: Tensor, key: Tensor) -> Coordinates:
    """One subspace iteration y <- C_k C_q y on a sample of queries and keys, whitened so that Y' C_q Y = 1, P = C_q Y.

    C_q, C_k are the covariances of the sample. 7 * SAMPLES * c products of length D, and 2 c a token.

    Args:
        query, key: [Z, nq, D], [Z, n, D].
    """
    places = (_spread_out(x.shape[1], SAMPLES, x.device) for x in (query, key))
    q, k = (_centred(x[:, place]) / len(place) ** 0.5 for x, place in zip((query, key), places, strict=True))
    basis = k.mT @ _mixture(k.shape[1], min(DIRECTIONS, k.shape[2]), query)
    basis, upper = torch.linalg.qr(k.mT @ (k @ (q.mT @ (q @ basis))))
    basis = basis * upper.diagonal(dim1=-2, dim2=-1).sign()[:, None]  # else a sign is up to the library that factors
    seen = q @ basis
    basis = torch.linalg.solve_triangular(factor(seen.mT @ seen).mT, basis, upper=True, left=False)
    key_basis = q.mT @ (q @ basis)
    return Coordinates(basis, key_basis, _centred(query @ basis), _centred(key @ key_basis))


def _mixture(rows: int, columns: int, like: Tensor) -> Tensor:
    """Weights [rows, columns] that mix the sample into starting directions: fixed numbers without a pattern."""
    device = like.device if like.is_cuda else None  # a CUDA graph takes nothing from the CPU; not all have float64
    row, column = (torch.arange(1, count + 1, dtype=torch.float64, device=device) for count in (rows, columns))
    return (row.square()[:, None] * column).cos().to(like)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


def factor(moment: Tensor) -> Tensor:
    """The Cholesky factor L of second moments [Z, c, c] with a ridge; x L has the metric |x L|^2 = x' M x."""
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    ridge = RIDGE * diagonal.mean(-1, keepdim=True) + torch.finfo(moment.dtype).tiny ** 0.5
    # NaN and infinity in the input must come out as NaN, not as an error.
    lower: Tensor = torch.linalg.cholesky_ex(moment + torch.diag_embed(ridge.expand_as(diagonal)))[0]
    return lower


def content_order(points: Tensor, layout: Layout) -> Tensor:
    """The tokens [Z, n] in the order of a balanced tree: each node is cut across its principal direction.

    The direction is that of a few power iterations on the node's covariance, from the column of its largest variance.

    Args:
        points: [Z, n, c], whose distances are what two queries ask for differently.
    """
    size, body, dim = points.shape
    order = torch.arange(body, device=points.device).expand(size, -1)
    rows = torch.arange(size, device=points.device)[:, None]
    for node, length, nodes in _levels(body, layout.tile, points.device):
        place = (rows * nodes + node).flatten()
        x = points.gather(1, order[..., None].expand(-1, -1, dim))
        sums = x.new_zeros(size * nodes, dim).index_add(0, place, x.flatten(0, 1)).view(size, -1, dim)
        x = x - sums[:, node] / length[:, None]
        outer = (x[..., None] * x[..., None, :]).flatten(2)
        moment = x.new_zeros(size * nodes, dim * dim).index_add(0, place, outer.flatten(0, 1))
        direction = _principal(moment.view(size, nodes, dim, dim))
        along = (x * direction[:, node]).sum(-1)
        by_place = along.argsort(dim=1, stable=True)
        by_node = node.expand(size, -1).gather(1, by_place).argsort(dim=1, stable=True)
        order = order.gather(1, by_place.gather(1, by_node))
    return order


def _levels(body: int, tile: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, int]]:
    """The levels of a tree but the last: the node of each place [n], that one's length [n], and how many nodes.

    As `cuts` has them, but made on the device, so that a CUDA graph can hold it.
    """
    numbers = [len(begins) for begins in cuts(body, tile)]
    place = torch.arange(body, device=device)
    begin, end = torch.zeros_like(place), torch.full_like(place, body)
    units = [tile] * (-(-body // tile) - 1).bit_length()
    units += [SUBTILE] * (len(numbers) - 1 - len(units))
    for unit, nodes in zip(units, numbers, strict=False):
        yield (place == begin).cumsum(0) - 1, end - begin, nodes
        middle = begin + ((end - begin + unit - 1) // unit + 1) // 2 * unit  # not before the end of a node of one unit
        right = place >= middle
        begin, end = torch.where(right, middle, begin), torch.where(right, end, torch.minimum(middle, end))


def _principal(moment: Tensor) -> Tensor:
    """About the direction of the largest variance of moments [..., c, c]; its length is of no account."""
    largest = moment.diagonal(dim1=-2, dim2=-1).argmax(-1)
    direction = moment.gather(-2, largest[..., None, None].expand(*largest.shape, 1, moment.shape[-1])).mT
    for _ in range(POWER_STEPS):
        direction = moment @ direction
        direction = direction / direction.norm(dim=-2, keepdim=True).clamp(min=1e-30)
    return direction[..., 0]


def position_order(layout: Layout, body: int, device: torch.device) -> Tensor:
    """The tokens [n] as they stand, or the patches of a grid along a Z-curve (as `layout.z_curve`)."""
    token = torch.arange(body, device=device)
    if layout.grid is None:
        return token
    row, column, along = token // layout.grid[1], token % layout.grid[1], torch.zeros_like(token)
    for bit in range(max(layout.grid).bit_length()):
        along += ((column >> bit & 1) << 2 * bit) + ((row >> bit & 1) << 2 * bit + 1)
    return along.argsort()


def keep_neighbours(query: Tensor, key: Tensor, order: Tensor, layout: Layout, bias: Tensor | None = None) -> Tensor:
    """The order [Z, n], or that of the positions where neighbours ask for the same more nearly than it can tell.

    A few coordinates do not tell apart what looks at its own surroundings. On some sub-tiles of either order, and some
    keys k, sum ((q - mean q of the sub-tile).k)^2 is compared; where all positions come to less than `NEIGHBOURS` times
    what the given order does, they are taken.

    Args:
        query, key: [Z, nq, D], [Z, n, D]. bias: what is added to q.k [Z, nq, n], or None.
    """
    asked = query.shape[1]
    if asked < SUBTILE:
        return order
    first = SUBTILE * _spread_out(asked // SUBTILE, TRIALS, query.device)
    slots = (first[:, None] + torch.arange(SUBTILE, device=query.device)).flatten()
    columns = _spread_out(key.shape[1], TRIALS, key.device)
    sample = _centred(key[:, columns])
    if bias is not None:
        bias = bias[:, :, columns]
        bias = bias - bias.mean(2, keepdim=True)

    def of_subtiles(x: Tensor, order: Tensor) -> Tensor:
        rows = x.gather(1, order[:, slots, None].expand(-1, -1, x.shape[2])).unflatten(1, (-1, SUBTILE))
        rest: Tensor = rows - rows.mean(2, keepdim=True)
        return rest.flatten(1, 2)

    def differences(order: Tensor) -> Tensor:
        logits = of_subtiles(query, order) @ sample.mT
        if bias is not None:
            logits = logits + of_subtiles(bias, order)
        return logits.square().sum((1, 2))

    neighbours = position_order(layout, asked, query.device).expand_as(order)
    nearer = differences(neighbours) < NEIGHBOURS * differences(order)
    return torch.where(nearer[:, None], neighbours, order)


def near_keys(token: Tensor, layout: Layout, body: int) -> Tensor:
    """The near field of queries at `token` [...]: a window around each, moved inwards at the borders [..., W]."""
    rows, columns = layout.grid or (1, body)
    high, wide = layout.window(body)
    top = (token // columns - high // 2).clamp(0, rows - high)
    left = (token % columns - wide // 2).clamp(0, columns - wide)
    row = top[..., None] + torch.arange(high, device=token.device)
    column = left[..., None] + torch.arange(wide, device=token.device)
    return (row[..., :, None] * columns + column[..., None, :]).flatten(-2)
