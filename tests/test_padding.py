"""Padding does not move results: a row gives the same alone, padded in a batch, and among any other rows."""

from __future__ import annotations

import pytest
import torch
from core_cases import EVERY, draw, module, padding_mask


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("tokens", [40, 300])
@pytest.mark.parametrize("kind", ["right", "left", "holes"])
def test_a_row_padded_in_a_batch_gives_what_it_gives_alone(name: str, tokens: int, kind: str) -> None:
    config, causal = EVERY[name]
    attention, qkv = module(config), draw(1, 2, tokens, 8, dtype=torch.float32)
    longest = tokens + 57
    places = {
        "right": torch.arange(tokens),
        "left": torch.arange(57, longest),
        "holes": torch.randperm(longest)[:tokens].sort().values,
    }[kind]
    padded = draw(3, 2, longest, 8, scale=5.0, dtype=torch.float32)  # what stands in the padding must not matter
    mask = torch.ones(3, longest, dtype=torch.bool)
    mask[1], mask[1, places], mask[2, 3:] = False, True, False
    for x, alone in zip(padded, qkv, strict=True):
        x[1, :, places] = alone[0]
    alone = attention.with_normaliser(*qkv, causal=causal)
    together = attention.with_normaliser(*padded, causal=causal, key_mask=mask)
    torch.testing.assert_close(together[0][1, :, places], alone[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[1][1, :, places], alone[1][0], rtol=1e-5, atol=1e-5)
    assert not together[0][1, :, ~mask[1]].any()  # queries that are padding


@pytest.mark.parametrize("name", EVERY)
def test_a_row_shorter_than_its_near_field(name: str) -> None:
    """1 to 12 real tokens among 60: the row alone may be softmax attention, and is that among the others too."""
    config, causal = EVERY[name]
    attention, qkv = module(config), draw(12, 2, 60, 8, dtype=torch.float32)
    mask = torch.arange(60) < torch.arange(1, 13)[:, None]
    together = attention(*qkv, key_mask=mask, causal=causal)
    for row in range(12):
        alone = attention(*(x[row : row + 1, :, : row + 1] for x in qkv), causal=causal)
        torch.testing.assert_close(together[row, :, : row + 1], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_rows_do_not_see_each_other(name: str) -> None:
    config, causal = EVERY[name]
    attention, qkv, mask = module(config), draw(6, 2, 40, 8, dtype=torch.float32), padding_mask()
    order = torch.randperm(6)
    out = attention(*qkv, key_mask=mask, causal=causal)
    torch.testing.assert_close(attention(*(x[order] for x in qkv), key_mask=mask[order], causal=causal), out[order])
    for row in range(6):
        one = slice(row, row + 1)
        alone = attention(*(x[one] for x in qkv), key_mask=mask[one], causal=causal)
        torch.testing.assert_close(alone, out[one])


@pytest.mark.parametrize("name", EVERY)
def test_fully_masked_rows_give_zeros_and_finite_gradients(name: str) -> None:
    config, causal = EVERY[name]
    qkv, mask = [x.requires_grad_() for x in draw(6, 2, 40, 8, dtype=torch.float32)], padding_mask()
    out, normaliser = module(config).with_normaliser(*qkv, key_mask=mask, causal=causal)
    assert not out[5].any()
    assert (normaliser[5] == -torch.inf).all()
    assert not out.masked_select(~mask[:, None, :, None]).any()
    loss = out.square().sum() + normaliser.masked_fill(normaliser.isinf(), 0).sum()
    for grad in torch.autograd.grad(loss, qkv, materialize_grads=True):
        assert grad.isfinite().all()
        assert not grad.masked_select(~mask[:, None, :, None]).any()  # padding has no gradient
        assert grad[4].any() or config.activation == "constant"


@pytest.mark.parametrize("name", EVERY)
def test_a_mask_of_true_is_no_mask(name: str) -> None:
    config, causal = EVERY[name]
    attention, qkv = module(config), draw(2, 2, 70, 8, dtype=torch.float32)
    mask = torch.ones(2, 70, dtype=torch.bool)
    torch.testing.assert_close(attention(*qkv, key_mask=mask, causal=causal), attention(*qkv, causal=causal))
