"""The peers: softmax where their budget is full, Monarch matrices, and their costs against counting by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eval.peers import (
    block_means,
    block_sparse,
    blocks,
    eight_bit,
    monarch,
    multipole,
    nystroem,
    random_features,
    uniform,
)

FULL = {  # budgets that leave nothing out, at N tokens
    "block sparse": (block_sparse, lambda n: {"query_block": 16, "key_block": 8, "mass": 100, "similarity": 0}),
    "no block trusted": (block_sparse, lambda n: {"query_block": 16, "key_block": 8, "mass": 0, "similarity": 101}),
    "block means": (block_means, lambda n: {"block": 16, "exact": -(-n // 16), "first_order": 1}),
    "multipole": (multipole, lambda n: {"clusters": 7, "exact": n, "steps": 2}),
    "a cluster for each key": (multipole, lambda n: {"clusters": n, "exact": 0, "steps": 0}),
    "Monarch, one block": (monarch, lambda n: {"block": n, "steps": 1}),
    "Monarch, blocks of one": (monarch, lambda n: {"block": 1, "steps": 1}),
    "Nystroem": (nystroem, lambda n: {"landmarks": n, "steps": 40}),
}
PART = {
    block_sparse: {"query_block": 16, "key_block": 8, "mass": 60, "similarity": 10},
    block_means: {"block": 16, "exact": 2, "first_order": 1},
    multipole: {"clusters": 7, "exact": 20, "steps": 2},
    monarch: {"block": 9, "steps": 2},
    nystroem: {"landmarks": 16, "steps": 6},
    eight_bit: {"query_block": 32, "key_block": 16},
    random_features: {"features": 16},
    uniform: {},
}


def draw(tokens: int, width: int = 8) -> list[Tensor]:
    """Queries and keys whose logits spread over a few units, and values."""
    query, key, value = torch.randn(3, 2, 3, tokens, width, dtype=torch.float64)
    return [query * 0.7, key, value]


def softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT).softmax(-1) @ value


def error(found: Tensor, truth: Tensor) -> float:
    return ((found - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("tokens", [64, 77])
@pytest.mark.parametrize("name", FULL)
def test_full_budget_is_softmax(name: str, tokens: int) -> None:
    peer, budget = FULL[name]
    inputs = draw(tokens)
    torch.testing.assert_close(peer.attention(*inputs, **budget(tokens)), softmax(*inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("peer", PART, ids=lambda peer: peer.__name__)
def test_part_of_the_budget_gives_finite_rows_of_the_right_shape(peer) -> None:
    for tokens in (32, 77):
        inputs = [x.float() for x in draw(tokens)]
        out = peer.attention(*inputs, **PART[peer])
        assert out.shape == inputs[2].shape
        assert out.dtype == torch.float32
        assert out.isfinite().all()
        values = inputs[2]
        constant = peer.attention(*inputs[:2], torch.ones_like(values), **PART[peer])
        bound = 0.3 if peer is nystroem else 1e-4  # whose rows sum to one in the limit only
        assert (constant - 1).abs().max() < bound


@pytest.mark.parametrize(
    ("peer", "small", "large"),
    [
        (block_sparse, {"mass": 30}, {"mass": 90}),
        (block_means, {"exact": 1}, {"exact": 4}),
        (block_means, {"first_order": 0}, {"first_order": 1}),
        (multipole, {"exact": 0}, {"exact": 40}),
        (nystroem, {"landmarks": 8}, {"landmarks": 48}),
        (random_features, {"features": 8}, {"features": 4096}),
    ],
)
def test_error_falls_with_the_budget(peer, small: dict[str, int], large: dict[str, int]) -> None:
    inputs = draw(96)
    inputs[1] = inputs[1].sort(2).values  # neighbours alike, as blocks need it
    truth = softmax(*inputs)
    errors = [error(peer.attention(*inputs, **PART[peer] | budget), truth) for budget in (small, large)]
    assert errors[1] < errors[0]
    assert errors[1] < 1


def test_error_of_monarch_falls_with_steps() -> None:
    inputs = draw(81)
    truth = softmax(*inputs)
    errors = [error(monarch.attention(*inputs, block=9, steps=steps), truth) for steps in (1, 2, 4)]
    assert errors[0] > errors[1] > errors[2]


def test_a_monarch_matrix_is_found_exactly() -> None:
    number, block = 4, 6  # logits of query (l, j) and key (k, i): A[j, l, k] + G[j, k, i]
    outer = torch.randn(block, number, number, dtype=torch.float64)
    inner = torch.randn(block, number * block, dtype=torch.float64)
    one = torch.eye(number * block, dtype=torch.float64)
    query = torch.cat([outer.transpose(0, 1), inner.expand(number, -1, -1)], -1).flatten(0, 1)
    key = torch.cat([torch.eye(number, dtype=torch.float64).repeat_interleave(block, 0), one], -1)
    value = torch.randn(number * block, 5, dtype=torch.float64)
    query, key, value = (x[None, None] for x in (query, key, value))
    torch.testing.assert_close(monarch.attention(query, key, value, block=block, steps=1), softmax(query, key, value))


def test_eight_bits_round_little_and_ignore_the_mean_key() -> None:
    query, key, value = draw(77)
    budget = PART[eight_bit]
    out = eight_bit.attention(query, key, value, **budget)
    assert 0 < error(out, softmax(query, key, value)) < 0.03
    torch.testing.assert_close(eight_bit.attention(query, key + 100, value, **budget), out)


def test_multipole_reads_what_it_does_not_choose_through_centroids() -> None:
    inputs = draw(40)
    query, key, value = inputs
    found = multipole._cluster(key, 5, 2)
    best = (query @ found.centroid.mT).argsort(-1, descending=True)
    expected = torch.empty_like(value)
    kept = 0
    for b, h, n in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(40)).tolist():
        room, terms = 15, []
        is_open = True
        for j in best[b, h, n].tolist():
            inside = found.member[b, h] == j
            is_open &= int(inside.sum()) <= room
            if is_open:
                room -= int(inside.sum())
                terms += [(query[b, h, n] @ key[b, h, i], value[b, h, i]) for i in inside.nonzero()[:, 0]]
            else:
                mean_key, mean_value = key[b, h, inside].mean(0), value[b, h, inside].mean(0)
                terms.append((query[b, h, n] @ mean_key + inside.sum().log(), mean_value))
        kept += 15 - room
        weights = torch.stack([logit for logit, _ in terms]).softmax(0)
        expected[b, h, n] = weights @ torch.stack([v for _, v in terms])
    budget = {"clusters": 5, "exact": 15, "steps": 2}
    torch.testing.assert_close(multipole.attention(*inputs, **budget), expected)
    assert multipole.kept_keys(query, key, **budget) == pytest.approx(kept / 240)


def test_block_sparse_is_softmax_over_what_it_keeps() -> None:
    query, key, value = draw(77)
    budget = PART[block_sparse]
    keep = block_sparse.select(query, key, **budget)
    assert 0.2 < keep.float().mean() < 1
    seen = keep.repeat_interleave(16, 2)[:, :, :77].repeat_interleave(8, 3)[..., :77]
    expected = (query @ key.mT).masked_fill(~seen, -torch.inf).softmax(-1) @ value
    torch.testing.assert_close(block_sparse.attention(query, key, value, **budget), expected)
    assert block_sparse.kept_keys(query, key, **budget) == pytest.approx(seen.sum(-1).double().mean().item())


def test_block_means_are_those_of_real_tokens() -> None:
    x = torch.arange(10.0).view(1, 1, 5, 2)
    assert blocks.means(x, 4)[0, 0].tolist() == [[3, 4], [8, 9]]


# Multiplications counted at matrix products, of one sequence and head of 96 tokens of width 8.


class Counter(torch.utils._python_dispatch.TorchDispatchMode):
    """Adds up the multiplications of matrix products."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            left, right = args
            self.total += left.numel() * right.shape[-1]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("peer", "budget", "beside"),
    [
        # what is not a matrix product: means
        (block_means, {"block": 16, "exact": 2, "first_order": 1}, 3),
        (block_means, {"block": 16, "exact": 3, "first_order": 0}, 3),
        (monarch, {"block": 8, "steps": 1}, 0),
        (monarch, {"block": 8, "steps": 3}, 0),
        (nystroem, {"landmarks": 16, "steps": 6}, 2),
    ],
)
def test_products_are_those_of_the_matrix_products(peer, budget: dict[str, int], beside: int) -> None:
    tokens, width = 96, 8
    query, key, value = (x[:1, :1] for x in draw(tokens, width))
    with Counter() as counter:
        peer.attention(query, key, value, **budget)
    counted = counter.total / tokens / width + beside
    assert peer.products(tokens, width, **budget) == pytest.approx(counted)


def test_products_of_the_others() -> None:
    sparse = {"query_block": 16, "key_block": 8, "mass": 50}
    assert block_sparse.products(96, 8, **sparse, similarity=0, kept=30) == 2 + 6 * 12 / 96 + 60
    assert block_sparse.products(96, 8, **sparse, similarity=10, kept=30) == 6 + 6 * 12 / 96 + 60
    # two assignments, the means of keys after each and of values, then reading
    assert multipole.products(96, 8, clusters=6, exact=20, steps=1, kept=15) == 2 * 6 + 1 + 1 + 1 + 2 * (6 + 15)
    assert eight_bit.products(96, 8, query_block=32, key_block=16) == 2 * 96 + 1
    assert random_features.products(96, 8, features=16) == 4 * 16
    assert uniform.products(96, 8) == 1
