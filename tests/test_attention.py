"""The module: softmax attention where every key is exact, dtypes, extreme inputs, and what its options do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from core_cases import BIDIRECTIONAL, CAUSAL, EVERY, draw, module, padding_mask, relative

from astroattn import AstroConfig
from astroattn.config import BY_LENGTH, is_tiled
from astroattn.cost import budget_of
from astroattn.ops import plain
from astroattn.ops.choosing import choose

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COVERING = {
    "default, which is short": AstroConfig(),
    "hebbian": AstroConfig(near=64, exact_keys=4),
    "hebbian, by exact keys": AstroConfig(near=8, exact_keys=64),
    "random": AstroConfig(hidden="random", near=64),
    "near alone": AstroConfig(hidden="none", near=64, exact_keys=0),
    "all queries exact": AstroConfig(near=0, exact_keys=4, exact_queries=64),
}


@pytest.mark.parametrize("name", COVERING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_is_sdpa_where_every_key_is_exact(name: str, dtype: torch.dtype, causal: bool, masked: bool) -> None:
    qkv = [x.requires_grad_() for x in draw(6, 2, 40, 8, scale=2.0, dtype=dtype)]
    mask = padding_mask() if masked else None
    seen = None if mask is None else mask[:, None, None]
    if causal and masked:
        seen = seen & torch.ones(40, 40, dtype=torch.bool).tril()
    ours, normaliser = module(COVERING[name]).with_normaliser(*qkv, key_mask=mask, causal=causal)
    theirs = F.scaled_dot_product_attention(*qkv, attn_mask=seen, is_causal=causal and not masked)
    real = torch.ones(6, 40, dtype=torch.bool) if mask is None else mask
    torch.testing.assert_close(ours.mT.mT[real[:, None].expand(-1, 2, -1)], theirs[real[:, None].expand(-1, 2, -1)])
    assert ours.dtype == dtype
    if masked:
        assert not ours[5].any()
    weight = torch.randn_like(ours) * real[:, None, :, None]
    grads = torch.autograd.grad((ours * weight).sum(), qkv)
    for grad, expected in zip(grads, torch.autograd.grad((theirs * weight).nan_to_num().sum(), qkv), strict=True):
        torch.testing.assert_close(grad[:5], expected[:5])
        assert not masked or not grad[5].any()  # no real token: zeros, not NaN
    logits = (qkv[0].double() @ qkv[1].double().mT) * 8**-0.5
    allowed = torch.ones(40, 40, dtype=torch.bool).tril() if causal else torch.ones(40, 40, dtype=torch.bool)
    allowed = allowed if mask is None else allowed & mask[:, None, None]
    expected = logits.masked_fill(~allowed, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(normaliser.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", COVERING)
def test_causal_queries_are_the_last_tokens_in_softmax_attention_too(name: str) -> None:
    qkv, attention = draw(2, 2, 40, 8), module(COVERING[name])
    whole = attention.with_normaliser(*qkv, causal=True)
    last = attention.with_normaliser(qkv[0][:, :, -9:], *qkv[1:], causal=True)
    for ours, theirs in zip(last, whole, strict=True):
        torch.testing.assert_close(ours, theirs[:, :, -9:])


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_exact_switch_is_softmax_attention(name: str) -> None:
    qkv, attention = draw(2, 2, 90, 8, dtype=torch.float32), module(BIDIRECTIONAL[name])
    theirs = F.scaled_dot_product_attention(*qkv, scale=0.4)
    assert relative(attention(*qkv, scale=0.4), theirs) > 1e-3
    attention.exact = True
    assert torch.equal(attention(*qkv, scale=0.4), theirs)
    assert attention(qkv[0][:, :, :7], *qkv[1:]).shape == (2, 2, 7, 8)  # cross lengths are no trouble


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_costs_no_more_than_in_softmax_attention(name: str, dtype: torch.dtype) -> None:
    """Against the same numbers in float32: at most 2 times the error of plain PyTorch, gradients 3 times."""
    config, causal = EVERY[name]
    attention, qkv = module(config), [x.requires_grad_() for x in draw(2, 2, 60, 8, dtype=dtype)]
    weight = torch.randn(2, 2, 60, 8).to(dtype)
    single = [x.detach().float().requires_grad_() for x in qkv]

    def run(attend: object, inputs: list) -> list:
        out = attend(*inputs)
        return [out, *torch.autograd.grad((out.float() * weight.float()).sum(), inputs, materialize_grads=True)]

    def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        logits = query @ key.mT * 8**-0.5
        seen = torch.ones(60, 60, dtype=torch.bool)
        return logits.masked_fill(~(seen.tril() if causal else seen), -torch.inf).softmax(-1) @ value

    ours = [run(lambda *x: attention(*x, causal=causal), inputs) for inputs in (qkv, single)]
    theirs = [run(plain, inputs) for inputs in (qkv, single)]
    assert ours[0][0].dtype == dtype
    for index, factor in enumerate((2, 3, 3, 3)):
        assert relative(ours[0][index], ours[1][index]) <= factor * relative(theirs[0][index], theirs[1][index])


@pytest.mark.parametrize("name", EVERY)
def test_float32_follows_float64(name: str) -> None:
    """Kernels may choose another of two keys of almost the same worth: they are as near to softmax attention."""
    config, causal = EVERY[name]
    single = draw(2, 2, 90, 8, dtype=torch.float32)
    double = [x.double() for x in single]
    plain = module(dataclasses.replace(config, backend="torch"))
    expected = plain(*double, causal=causal)
    assert relative(plain(*single, causal=causal), expected) < 1e-5
    ours, exact = module(config)(*single, causal=causal), F.scaled_dot_product_attention(*double, is_causal=causal)
    assert relative(ours, exact) < 1.1 * relative(expected, exact) + 1e-5


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "kind", ["hundreds", "thousands", "zeros", "equal keys", "one huge key", "one huge query", "one huge value"]
)
def test_extreme_inputs_give_finite_results(name: str, dtype: torch.dtype, kind: str) -> None:
    config, causal = EVERY[name]
    query, key, value = draw(2, 2, 60, 8)
    scale = {"hundreds": 8.0, "thousands": 30.0, "zeros": 0.0}.get(kind, 1.0)
    query, key = query * scale, key * scale
    key = key[:, :, :1].expand_as(key).clone() if kind == "equal keys" else key
    for x, this in ((key, "one huge key"), (query, "one huge query"), (value, "one huge value")):
        x[:, :, 30] *= 1e4 if kind == this else 1
    qkv = [x.to(dtype).requires_grad_() for x in (query, key, value)]
    out, normaliser = module(config).with_normaliser(*qkv, causal=causal)
    assert out.isfinite().all()
    assert normaliser.isfinite().all()
    assert out.abs().max() <= qkv[2].abs().max() * 1.01
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.float().sum(), qkv, materialize_grads=True))
    if kind == "zeros" and config.hidden != "none":
        seen = torch.ones(60, 60, dtype=torch.float64).tril() if causal else torch.ones(60, 60, dtype=torch.float64)
        mean = seen @ qkv[2].double() / seen.sum(-1, keepdim=True)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out.double(), mean, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", EVERY)
def test_causal_and_bidirectional_for_the_last_tokens(name: str) -> None:
    """Fewer queries than keys: causal ones are the last tokens, others of another sequence, and few: softmax."""
    config, causal = EVERY[name]
    attention, qkv = module(config), draw(2, 2, 50, 8, dtype=torch.float32)
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[1, :20] = mask[1, 48] = False
    static = config.hidden not in ("hebbian", "none")
    tied = is_tiled(config) or config.exact_queries if static else config.hidden == "none" and config.exact_keys == 0
    if not causal and tied:
        with pytest.raises(ValueError, match=r"^query: 9 tokens and 50 keys; cross attention is for"):
            attention(qkv[0][:, :, -9:], *qkv[1:])
        return
    if not causal and not static:
        for key_mask in (None, mask):
            out = attention(qkv[0][:, :, -9:], *qkv[1:], key_mask=key_mask)
            hidden = None if key_mask is None else key_mask[:, None, None]
            torch.testing.assert_close(out, F.scaled_dot_product_attention(qkv[0][:, :, -9:], *qkv[1:], hidden))
        return
    for key_mask in (None, mask):
        whole = attention.with_normaliser(*qkv, key_mask=key_mask, causal=causal)
        last = attention.with_normaliser(qkv[0][:, :, -9:], *qkv[1:], key_mask=key_mask, causal=causal)
        rows = torch.ones(2, 9, dtype=torch.bool) if key_mask is None else mask[:, -9:]
        for ours, theirs in zip(last, whole, strict=True):
            torch.testing.assert_close(ours.transpose(1, 2)[rows], theirs[:, :, -9:].transpose(1, 2)[rows])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cuts", [(1, 2, 3, 40), (7, 40), (33, 34, 39, 40)])
@pytest.mark.parametrize("name", CAUSAL)
def test_decoding_in_any_pieces_is_causal_attention(name: str, cuts: tuple, masked: bool) -> None:
    """With padding before the first real token, or in holes of the first piece."""
    attention, qkv = module(CAUSAL[name]), [x.requires_grad_() for x in draw(2, 2, 40, 8)]
    mask = torch.ones(2, 40, dtype=torch.bool)
    if masked:
        mask[0, :5] = mask[1, : cuts[0] : 2] = False
    whole = attention(*qkv, causal=True, key_mask=mask if masked else None, scale=0.5)
    state, parts = None, []
    for start, stop in zip((0, *cuts), cuts, strict=False):
        piece = [x[:, :, start:stop] for x in qkv]
        out, state = attention.decode(*piece, state, key_mask=mask[:, start:stop] if masked else None, scale=0.5)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole)
    weight = torch.randn_like(whole)
    pairs = zip(
        torch.autograd.grad((torch.cat(parts, 2) * weight).sum(), qkv),
        torch.autograd.grad((whole * weight).sum(), qkv),
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", CAUSAL)
def test_the_state_of_decoding_has_a_fixed_size(name: str) -> None:
    attention, sizes = module(CAUSAL[name]), []
    for tokens in (1, 3, 300):
        query, key, value = draw(2, 2, tokens, 8, dtype=torch.bfloat16)
        out, state = attention.decode(query, key, value)
        assert out.dtype == torch.bfloat16
        assert state.kv_state.dtype == torch.float32
        sizes.append(sum(x.untyped_storage().nbytes() for x in state))
    assert len(set(sizes)) == 1


def test_decoding_refuses_what_has_no_state() -> None:
    qkv = draw(1, 2, 5, 8)
    for config in BIDIRECTIONAL.values():
        if module(config).refusal(causal=True) is not None:
            with pytest.raises(ValueError, match=r"^decode: this module has no causal state; causal attention "):
                module(config).decode(*qkv)
    attention = module(CAUSAL["causal, near"])
    state = attention.decode(*qkv)[1]
    with pytest.raises(TypeError, match=r"^state: tuple; "):
        attention.decode(*qkv, tuple(state))
    with pytest.raises(ValueError, match=r"^state: kv_state of shape \(1, 2, 16, 8\); .* need \(2, 2, 16, 8\)"):
        attention.decode(*draw(2, 2, 5, 8), state)
    with pytest.raises(ValueError, match=r"^state: key of shape \(1, 2, 4, 8\)"):
        module(CAUSAL["causal"]).decode(*qkv, state)
    with pytest.raises(ValueError, match=r"^query: 2 tokens; key has 5"):
        attention.decode(qkv[0][:, :, :2], *qkv[1:])
    attention.exact = True
    with pytest.raises(ValueError, match=r"^decode: .*; it is set to exact"):
        attention.decode(*qkv)


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_a_grid_has_its_prefix_before_it(name: str) -> None:
    config, qkv = BIDIRECTIONAL[name], draw(2, 2, 53, 8, dtype=torch.float32)
    attention = module(config)
    out = attention(*qkv, grid=(6, 8))
    if is_tiled(config):  # the 5 prefix tokens attend to all
        exact = F.scaled_dot_product_attention(qkv[0][:, :, :5], *qkv[1:])
        torch.testing.assert_close(out[:, :, :5], exact)
        assert relative(out, attention(*qkv)) > 1e-3
    else:
        torch.testing.assert_close(out, attention(*qkv))


@pytest.mark.parametrize("name", EVERY)
def test_slices_of_the_batch_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, causal = EVERY[name]
    attention, qkv = module(config), draw(3, 2, 40, 8, dtype=torch.float32)
    mask = padding_mask()[:3]
    whole = attention(*qkv, key_mask=mask, causal=causal)
    monkeypatch.setattr(plain, "WORKSPACE", 1)
    torch.testing.assert_close(attention(*qkv, key_mask=mask, causal=causal), whole)


def test_uniform_attention_is_a_configuration() -> None:
    value = draw(2, 2, 40, 8, count=1)[0]
    out = module(BIDIRECTIONAL["uniform"])(*draw(2, 2, 40, 8, count=2), value)
    torch.testing.assert_close(out, value.mean(2, keepdim=True).expand_as(value))


def test_refusals() -> None:
    for config in BIDIRECTIONAL.values():
        reason = module(config).refusal(causal=True)
        can = config.hidden == "random" and not config.exact_queries and not config.exact_keys
        assert (reason is None) == can
        if not can:
            with pytest.raises(ValueError, match=r"^causal: True with this config; causal attention .*\("):
                module(config)(*draw(1, 2, 90, 8), causal=True)
        assert module(config).refusal(causal=False) is None
    for config in CAUSAL.values():
        assert module(config).refusal(causal=True) is None


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_layout_of_the_module_is_that_of_the_configuration(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was set reaches the operations; what was left to the length is found for each row's own."""
    config, seen = dataclasses.replace(BIDIRECTIONAL[name], backend="torch"), []

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: object, bias: None = None) -> object:
        seen.append((key.shape[1], layout))
        return choose(query, key, value, layout, bias)

    monkeypatch.setattr("astroattn.ops.choosing.choose", spy)
    monkeypatch.setattr("astroattn.ops.static.choose", spy)
    mask = torch.arange(50) < torch.tensor([50, 31])[:, None]
    module(config)(*draw(2, 2, 50, 8), key_mask=mask)
    assert [tokens for tokens, _ in seen] == ([31, 50] if is_tiled(config) else [])
    for tokens, layout in seen:
        assert layout == budget_of(config, tokens, None).at(tokens, 8)
        for field in ("tile", "near", "exact_keys", "steps"):
            assert getattr(config, field) in (getattr(layout, field), BY_LENGTH)
        hidden = config.num_hidden if config.hidden == "hebbian" else 0
        assert hidden in (layout.num_hidden, BY_LENGTH)
        assert (layout.prefix, layout.by_content) == (config.exact_queries, config.tiles == "content")


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_a_grid_reaches_the_operations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, seen = dataclasses.replace(BIDIRECTIONAL[name], backend="torch"), []

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: object, bias: None = None) -> object:
        seen.append((layout.grid, layout.prefix))
        return choose(query, key, value, layout, bias)

    monkeypatch.setattr("astroattn.ops.choosing.choose", spy)
    monkeypatch.setattr("astroattn.ops.static.choose", spy)
    module(config)(*draw(1, 2, 50, 8), grid=(6, 8))
    assert seen == ([((6, 8), 2)] if is_tiled(config) else [])


def test_every_field_of_the_configuration_counts() -> None:
    qkv, start = draw(1, 2, 90, 8), AstroConfig(exact_keys=8)
    changes = {
        "num_hidden": 9,
        "near": 7,
        "exact_keys": 3,
        "exact_queries": 2,
        "tiles": "position",
        "tile": 20,
        "hidden": "none",
        "steps": 5,
    }
    for field, value in changes.items():
        changed = dataclasses.replace(start, **{field: value})
        assert relative(module(changed)(*qkv), module(start)(*qkv)) > 1e-4, field
    random = AstroConfig(hidden="random")
    changes = {"num_hidden": 9, "near": 3, "exact_keys": 3, "activation": "elu1", "orthogonal": False, "seed": 1}
    for field, value in changes.items():
        changed = dataclasses.replace(random, **{field: value})
        assert relative(module(changed)(*qkv), module(random)(*qkv)) > 1e-4, field
