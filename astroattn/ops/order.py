"""The order in which queries are cut into tiles, by what they ask for or by where they stand; near keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from astroattn.ops.layout import SUBTILE, Layout, cuts, z_curve

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
    row = torch.arange(1, rows + 1, dtype=torch.float64)[:, None]
    return (row.square() * torch.arange(1, columns + 1)).cos().to(like)


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
    levels = cuts(body, layout.tile)
    rows = torch.arange(size, device=points.device)[:, None]
    for begins in levels[:-1]:
        node = _owner(begins, body, points.device)
        place = (rows * len(begins) + node).flatten()
        x = points.gather(1, order[..., None].expand(-1, -1, dim))
        number = torch.bincount(node, minlength=len(begins)).to(x)[:, None]
        mean = x.new_zeros(size * len(begins), dim).index_add(0, place, x.flatten(0, 1)).view(size, -1, dim) / number
        x = x - mean[:, node]
        outer = (x[..., None] * x[..., None, :]).flatten(2)
        moment = x.new_zeros(size * len(begins), dim * dim).index_add(0, place, outer.flatten(0, 1))
        direction = _principal(moment.view(size, len(begins), dim, dim))
        along = (x * direction[:, node]).sum(-1)
        by_place = along.argsort(dim=1, stable=True)
        by_node = node.expand(size, -1).gather(1, by_place).argsort(dim=1, stable=True)
        order = order.gather(1, by_place.gather(1, by_node))
    return order


def _owner(begins: tuple[int, ...], body: int, device: torch.device) -> Tensor:
    """The node of each place [n]."""
    ends = torch.tensor(begins, device=device)
    return torch.searchsorted(ends, torch.arange(body, device=device), right=True) - 1


def _principal(moment: Tensor) -> Tensor:
    """About the direction of the largest variance of moments [..., c, c]; its length is of no account."""
    largest = moment.diagonal(dim1=-2, dim2=-1).argmax(-1)
    direction = moment.gather(-2, largest[..., None, None].expand(*largest.shape, 1, moment.shape[-1])).mT
    for _ in range(POWER_STEPS):
        direction = moment @ direction
        direction = direction / direction.norm(dim=-2, keepdim=True).clamp(min=1e-30)
    return direction[..., 0]


def position_order(layout: Layout, body: int, device: torch.device) -> Tensor:
    """The tokens [n] as they stand, or the patches of a grid along a Z-curve."""
    if layout.grid is None:
        return torch.arange(body, device=device)
    return torch.tensor(z_curve(*layout.grid), device=device)


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
