"""The learned hidden layer: every form of it against a dense oracle, and its place in a model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import astroattn
from astroattn import AstroConfig, AstrocyteAttention

B, H, N, D, DV, M = 2, 3, 37, 8, 5, 12
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def make(near: int = 0, **settings: int) -> AstrocyteAttention:
    config = AstroConfig(hidden="learned", num_hidden=M, near=near, exact_keys=0, **settings)
    attention = AstrocyteAttention(H, D, config).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in attention.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return attention


@pytest.fixture
def tokens() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    drawn = (torch.randn(B, H, N, d, generator=generator, dtype=torch.float64) for d in (D, D, DV))
    return [x.requires_grad_() for x in drawn]


def dense(attention: AstrocyteAttention, tokens: list[Tensor], exact: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """exp(q.k) where `exact`, phi(q).phi(k) elsewhere, nothing where not `seen`; output and log p."""
    query, key, value = tokens
    hidden, root = attention.hidden, D**-0.25
    reading = (query * root @ hidden.query_weight.mT).exp() / M**0.5
    writing = (key * root @ hidden.key_weight.mT + hidden.bias[:, None]).exp() / M**0.5
    shares = torch.where(exact, (query @ key.mT * root**2).exp(), reading @ writing.mT) * seen
    return shares @ value / shares.sum(-1, keepdim=True), shares.sum(-1).log()


def window(near: int) -> Tensor:
    """The `near` latest keys of each query, itself included."""
    age = torch.arange(N)[:, None] - torch.arange(N)
    return (age >= 0) & (age < near)


EVERY, NONE = torch.ones(N, N, dtype=torch.bool), torch.zeros(N, N, dtype=torch.bool)
FIRST = (torch.arange(N) < 2)[:, None] | (torch.arange(N) < 2)


@pytest.mark.parametrize(
    ("settings", "causal", "exact"),
    [
        ({}, False, NONE),
        ({"exact_queries": 2}, False, FIRST),
        ({"near": N}, False, EVERY),
        ({}, True, NONE),
        ({"near": 5}, True, window(5)),
    ],
)
def test_forms_are_the_dense_one_with_its_gradients(
    settings: dict[str, int], causal: bool, exact: Tensor, tokens: list[Tensor]
) -> None:
    attention = make(**settings)
    inputs = [*tokens, *attention.parameters()]
    expected = dense(attention, tokens, exact, EVERY.tril() if causal else EVERY)
    with torch.no_grad():  # where the bias is not a weight like others
        plain = attention.with_normaliser(*tokens, causal=causal)
    found = attention.with_normaliser(*tokens, causal=causal)
    for mine, theirs in zip((*found, *plain), (*expected, *expected), strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    weights = [torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2)) for x in expected]
    mine, theirs = (torch.autograd.grad(x, inputs, weights, allow_unused=True) for x in (found, expected))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)  # zero where all is exact


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("near", [0, 5])
def test_one_token_after_the_other(near: int, gradients: bool, tokens: list[Tensor]) -> None:
    attention, state, steps = make(near), None, []
    with torch.set_grad_enabled(gradients):
        for t in range(N):
            out, state = attention.decode(*(x[:, :, t : t + 1] for x in tokens), state)
            steps.append(out)
    torch.testing.assert_close(torch.cat(steps, 2), attention(*tokens, causal=True), **CLOSE)


@pytest.mark.parametrize("exact_queries", [0, 2])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_float32_kernels_and_their_gradients(backend: str, exact_queries: int, tokens: list[Tensor]) -> None:
    config = AstroConfig(hidden="learned", num_hidden=M, near=0, exact_queries=exact_queries, backend=backend)
    attention = AstrocyteAttention(H, D, config)
    attention.load_state_dict(make().state_dict())
    single = [x.detach().float().requires_grad_() for x in tokens]
    reference = make(exact_queries=exact_queries)
    out, expected = attention(*single), reference(*tokens)
    with torch.no_grad():
        plain = attention(*single)
    for each in (out, plain):
        torch.testing.assert_close(each.double(), expected, rtol=1e-4, atol=1e-4)
    mine = torch.autograd.grad(out.sum(), [*single, *attention.parameters()])
    theirs = torch.autograd.grad(reference(*tokens).sum(), [*tokens, *reference.parameters()])
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-3 * other.abs().max().item())


def test_untrained_it_is_a_random_layer_with_exponential_neurons(tokens: list[Tensor]) -> None:
    settings = {"num_hidden": M, "near": 0, "seed": 4}
    learned = AstrocyteAttention(H, D, AstroConfig(hidden="learned", **settings))
    random = AstrocyteAttention(H, D, AstroConfig(hidden="random", activation="exp", **settings))
    torch.testing.assert_close(learned(*tokens), random(*tokens), **CLOSE)


@pytest.mark.parametrize("exact_queries", [0, 2])
@pytest.mark.parametrize("real", [1, 2, 30])
def test_padding_does_not_move_real_tokens(real: int, exact_queries: int, tokens: list[Tensor]) -> None:
    attention, short = make(exact_queries=exact_queries), [x[:, :, :real] for x in tokens]
    mask = torch.stack([torch.arange(N) < real, torch.zeros(N, dtype=torch.bool)])  # and a sequence of padding alone
    out = attention(*tokens, key_mask=mask)
    torch.testing.assert_close(out[:1, :, :real], attention(*short)[:1], **CLOSE)
    assert not out[1].any()
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), [*tokens, *attention.parameters()]))


def test_a_patched_model_has_its_parameters() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 96}
    model = BertModel(BertConfig(**sizes, attention_probs_dropout_prob=0.0))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    astroattn.patch(model, AstroConfig(hidden="learned", num_hidden=M, near=0))
    own = {name for name, _ in model.named_parameters()} - before.keys()
    assert own == {
        f"encoder.layer.{layer}.attention.self.astrocyte.hidden.{which}"
        for layer in range(2)
        for which in ("key_weight", "query_weight", "bias")
    }
    model.train()(torch.arange(60)[None]).last_hidden_state.square().sum().backward()
    assert all(
        weight.grad is not None and weight.grad.any() for name, weight in model.named_parameters() if name in own
    )
    astroattn.unpatch(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_cost_by_hand() -> None:
    attention: nn.Module = make()
    cost = attention.cost(100, 100)
    # W_k k and W_q q as products twice as long, writing H and reading it
    assert (cost.positions, cost.products, cost.softmax) == (M, 6 * M, 200)
