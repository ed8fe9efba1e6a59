"""Inputs that are bad, empty or laid out in other ways, function transforms, and graphs that are called otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hostile_cases import FULL, LEARNED, MODELS, SHORT, STATIC, answer, cores
from patching_models import ALL, build, image, text
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from astroattn import AstroConfig, AstrocyteAttention, fallbacks, patch, unpatch

CONFIGS = {"short": SHORT, "static": STATIC, "learned": LEARNED, "full": FULL}
FLOATS = {"vit": "pixel_values", "timm vit": "x", "torch": "src"}  # the argument that may hold any number


def patched_model(name: str, config: AstroConfig) -> tuple[nn.Module, dict[str, Any]]:
    make, given = MODELS[name]
    model = make()
    patch(model, config)
    return model, given()


# numbers


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", FLOATS)
@torch.no_grad()
def test_nan_and_infinity_come_out_in_their_own_row(name: str, config: str, bad: float) -> None:
    model, inputs = patched_model(name, CONFIGS[config])
    expected = answer(model, inputs)
    inputs[FLOATS[name]][0, 0, 1] = bad
    found = answer(model, inputs)
    assert not found[0].isfinite().all()
    torch.testing.assert_close(found[1], expected[1])
    assert not fallbacks(model)


@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e15])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", FLOATS)
def test_huge_and_tiny_numbers(name: str, config: str, scale: float) -> None:
    """Logits of any size: finite where those of the original are, with finite gradients."""
    make, given = MODELS[name]
    model, inputs = make(), given()
    for key, weight in model.named_parameters():
        if "qkv.weight" in key or "in_proj_weight" in key or "query.weight" in key or "key.weight" in key:
            weight.data *= scale**0.5 if weight.shape[0] < 100 else scale**0.25
    for config_ in (None, CONFIGS[config]):
        if config_ is not None:
            patch(model, config_)
        model.zero_grad()
        output = answer(model, inputs)
        output.square().mean().backward()
        finite = output.isfinite().all(), all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        if config_ is None and not all(finite):
            pytest.skip("the original is not finite either")
        assert all(finite)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_empty_batches(name: str, config: str) -> None:
    make, given = MODELS[name]
    model, inputs = make(), {key: x[:0] for key, x in given().items()}
    try:
        expected = answer(model, inputs).shape
    except RuntimeError:
        pytest.skip("the original takes no empty batch")
    patch(model, CONFIGS[config])
    assert answer(model, inputs).shape == expected


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["bert", "torch"])
@torch.no_grad()
def test_one_token_is_softmax(name: str, config: str) -> None:
    make, given = MODELS[name]
    model, inputs = make(), {key: x[:, :1] for key, x in given().items()}
    expected = answer(model, inputs)
    patch(model, CONFIGS[config])
    torch.testing.assert_close(answer(model, inputs), expected, rtol=1e-4, atol=1e-4)
    assert not fallbacks(model)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", FLOATS)
def test_inputs_laid_out_in_other_ways(name: str, config: str) -> None:
    """Transposed, strided and expanded, with their gradients."""
    model, inputs = patched_model(name, CONFIGS[config])
    key = FLOATS[name]
    x = inputs[key][:1]
    ways = (
        lambda x: x.expand(2, *x.shape[1:]),
        lambda x: x.repeat(2, *[1] * (x.dim() - 1)).mT.contiguous().mT,
        lambda x: x.repeat_interleave(4, 0)[::2],
    )
    found = []
    for way in ways:
        leaf = x.clone().requires_grad_()
        output = answer(model, {key: way(leaf)})
        output.square().sum().backward()
        found.append((output.detach(), leaf.grad))
    for output, gradient in found[1:]:
        torch.testing.assert_close(output, found[0][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-3, atol=1e-3 * float(found[0][1].abs().max()))


# function transforms


def loss_of(model: nn.Module, key: str) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        result = functional_call(model, weights, (), {key: x[None]})
        return (result if isinstance(result, Tensor) else result[0]).square().mean()

    return loss


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", FLOATS)
def test_grad_of_torch_func_is_the_gradient(name: str, config: str) -> None:
    model, inputs = patched_model(name, CONFIGS[config])
    weights, x = dict(model.named_parameters()), inputs[FLOATS[name]][0]
    loss = loss_of(model, FLOATS[name])
    expected = torch.autograd.grad(loss(weights, x), list(weights.values()), allow_unused=True)
    found = grad(loss)({key: each.detach() for key, each in weights.items()}, x)
    for one, other in zip(expected, found.values(), strict=True):
        torch.testing.assert_close(other, torch.zeros_like(other) if one is None else one, rtol=1e-4, atol=1e-5)


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "vmap": lambda loss, weights, x: vmap(loss, in_dims=(None, 0))(weights, x),
    "vmap of grad": lambda loss, weights, x: vmap(grad(loss), in_dims=(None, 0))(weights, x),
    "jacrev": lambda loss, weights, x: jacrev(loss, argnums=1)(weights, x[0]),
    "jacfwd": lambda loss, weights, x: jacfwd(loss, argnums=1)(weights, x[0]),
    "jvp": lambda loss, weights, x: jvp(lambda x: loss(weights, x), (x[0],), (x[1],)),
    "second derivative": lambda loss, weights, x: grad(lambda x: grad(loss, argnums=1)(weights, x).square().sum())(
        x[0]
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_are_right_or_refused_in_words(name: str, config: str, transform: str) -> None:
    """What worked before patching works, or an error says whose it is and what to do."""
    make, given = MODELS[name]
    model, x = make(), given()[FLOATS[name]]
    weights = {key: each.detach() for key, each in model.named_parameters()}
    original = attempt(TRANSFORMS[transform], loss_of(model, FLOATS[name]), weights, x)
    patch(model, CONFIGS[config])
    weights = {key: each.detach() for key, each in model.named_parameters()}
    loss = loss_of(model, FLOATS[name])
    found = attempt(TRANSFORMS[transform], loss, weights, x)
    if isinstance(found, Exception):
        if not isinstance(original, Exception):
            assert "vmap does not reach into this astrocyte; loop over the samples" in str(found)
            assert "att" in str(found)  # the name of the module
        return
    if config == "full":
        torch.testing.assert_close(found, original, rtol=1e-3, atol=1e-4)
    if transform == "vmap":
        expected: Any = torch.stack([loss(weights, each) for each in x])
    elif transform == "vmap of grad":
        each = [grad(loss)(weights, each) for each in x]
        expected = {key: torch.stack([part[key] for part in each]) for key in each[0]}
    elif transform in ("jacrev", "jacfwd"):
        expected = grad(loss, argnums=1)(weights, x[0])
    else:
        return  # by finite differences below
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def attempt(function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except RuntimeError as error:
        return error


SECOND: dict[str, Callable[..., Tensor]] = {
    "autograd": lambda loss, x, along: torch.autograd.grad(
        (torch.autograd.grad(loss(x), x, create_graph=True)[0] * along).sum() + x.sum() * 0, x
    )[0],
    "torch.func": lambda loss, x, along: grad(lambda x: (grad(loss)(x) * along).sum())(x.detach()),
    "forward over reverse": lambda loss, x, along: jvp(grad(loss), (x.detach(),), (along,))[1],
}
TWICE = {"static": STATIC, "no near field": replace(STATIC, near=0), "learned": LEARNED, "full": FULL}


@pytest.mark.parametrize("way", SECOND)
@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("config", TWICE)
def test_a_second_derivative_is_right_or_refused(config: str, backend: str, way: str) -> None:
    """By finite differences of the gradient; never zero in silence."""
    dtype = torch.float64 if backend == "torch" else torch.float32  # which the kernels have
    attention = AstrocyteAttention(2, 4, replace(TWICE[config], backend=backend)).to(dtype)
    x, along = (torch.randn(1, 2, 40, 4, dtype=dtype) for _ in range(2))

    def loss(x: Tensor) -> Tensor:
        return attention(x, x, x).square().sum()

    try:
        found = SECOND[way](loss, x.clone().requires_grad_(), along)
    except (RuntimeError, ValueError) as error:
        assert config == "full" or backend == "native", error  # noqa: PT017
        assert config == "full" or re.search("no second derivative|jvp|no kernel", str(error))  # noqa: PT017
        return
    assert dtype == torch.float64
    step = 1e-6
    expected = (grad(loss)(x + step * along) - grad(loss)(x - step * along)) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("config", [SHORT, LEARNED], ids=["hebbian", "learned"])
def test_kernels_say_that_they_have_no_second_derivative(config: AstroConfig) -> None:
    """Also beside a residual that has one, and under every way of asking."""
    attention = AstrocyteAttention(2, 4, replace(config, backend="native"))
    x = torch.randn(1, 2, 40, 4, requires_grad=True)

    def penalty(x: Tensor) -> Tensor:
        output = attention(x, x, x) + x**3
        return torch.autograd.grad(output.square().sum(), x, create_graph=True)[0].square().sum()

    with pytest.raises(RuntimeError, match=r"no second derivative; AstroConfig\(backend='torch'\) has one"):
        torch.autograd.grad(penalty(x), x)
    with pytest.raises(RuntimeError, match="no second derivative"):
        penalty(x).backward()
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad(lambda x: grad(lambda x: attention(x, x, x).square().sum())(x).square().sum())(x.detach())


# graphs


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_float_mask_with_other_values_in_a_graph(backend: str) -> None:
    """The graph was made for a padding mask; a bias in its place raises, and is never taken for padding."""
    model = build(ALL["bert"])
    patch(model, STATIC)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    ids, real = text()["input_ids"], text()["attention_mask"].bool()[:, None, None]
    padding = torch.where(real, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = model(ids, attention_mask=padding)[0]
        torch.testing.assert_close(compiled(ids, attention_mask=padding)[0], expected)
        with pytest.raises(RuntimeError, match="astroattn: a float mask over keys may only hold 0 and -1e4 or less"):
            compiled(ids, attention_mask=torch.linspace(-1, 0, 20).expand(2, 1, 1, 20).contiguous())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["bert", "torch"])
def test_checkpoints_around_a_compiled_block_of_two_sizes(name: str, config: str) -> None:
    make, _ = MODELS[name]
    model = make()
    patch(model, CONFIGS[config])
    block = model.encoder.layer[0] if name == "bert" else model.layers[0]
    torch.compiler.reset()
    compiled = torch.compile(block, backend="aot_eager")

    def run(block: Callable[..., Any], size: int) -> list[Tensor]:
        x = torch.randn(2, size, 32, generator=torch.Generator().manual_seed(size)).requires_grad_()
        model.zero_grad()
        output = block(x)
        (output if isinstance(output, Tensor) else output[0]).square().sum().backward()
        return [x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    for size in (20, 33, 20):
        expected = run(block, size)
        found = run(lambda x: checkpoint(compiled, x, use_reentrant=False), size)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_compiled_before_it_is_patched(name: str) -> None:
    """A graph of the original is not run in its place, nor one of the patched model afterwards."""
    make, given = MODELS[name]
    model, inputs = make(), given()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    before = answer(compiled, inputs)
    patch(compiled, STATIC)
    assert len(cores(model)) == 2
    changed = answer(compiled, inputs)
    torch.testing.assert_close(changed, answer(model, inputs))
    assert not torch.allclose(changed, before)
    patch(model, FULL)
    torch.testing.assert_close(answer(compiled, inputs), before, rtol=1e-4, atol=1e-4)
    unpatch(compiled)
    assert torch.equal(answer(compiled, inputs), before)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_attention_modules_compiled_one_by_one(name: str) -> None:
    """What torch.compile puts around a module passes its attributes on; it is not patched a second time."""
    make, given = MODELS[name]
    model, inputs = make(), given()
    report = patch(model, STATIC)
    expected = answer(model, inputs)
    torch.compiler.reset()
    for row in report.patched:
        parent, _, child = row.name.rpartition(".")
        setattr(model.get_submodule(parent), child, torch.compile(model.get_submodule(row.name), backend="eager"))
    torch.testing.assert_close(answer(model, inputs), expected)
    again = patch(model, SHORT)
    assert len(again.patched) == 2
    assert not torch.allclose(answer(model, inputs), expected)
    unpatch(model)
    assert not cores(model)
    torch.testing.assert_close(answer(model, inputs), answer(make(), inputs))


# modes of the caller


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_defaults_of_the_caller_change_nothing(name: str, config: str) -> None:
    """Patched under another default device or dtype it is the same model, checked by the same probe."""
    make, given = MODELS[name]
    expected, inputs = make(), given()
    plain = patch(expected, CONFIGS[config])
    for mode in (torch.device("meta"), torch.inference_mode(), torch.autocast("cpu"), torch.no_grad()):
        model = make()
        with mode:
            report = patch(model, CONFIGS[config])
        assert report == plain
        assert torch.equal(answer(model, inputs), answer(expected, inputs))
    model = make()
    torch.set_default_dtype(torch.float64)
    try:
        report = patch(model, CONFIGS[config])
        found = answer(model, inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    assert report == plain
    torch.testing.assert_close(found.float(), answer(expected, inputs), rtol=1e-3, atol=1e-3)


def test_a_head_mask_is_the_hosts() -> None:
    model, given = build(ALL["bert"]), text() | {"head_mask": torch.zeros(2, 4)}
    with torch.no_grad():
        expected = answer(model, given)
        patch(model, SHORT)
        with pytest.warns(UserWarning, match="left to the model's own attention: head mask"):
            found = answer(model, given)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("config", ["static", "learned", "full"])
@torch.no_grad()
def test_keys_of_the_past(name: str, config: str) -> None:
    """A prompt, then a token, is the whole at once; with and without a cache generation is the same."""
    model = build(ALL[name])
    patch(model, CONFIGS[config])
    ids = text()["input_ids"][:1]
    whole = model(ids).logits[:, -1]
    past = model(ids[:, :-1], use_cache=True).past_key_values
    torch.testing.assert_close(model(ids[:, -1:], past_key_values=past).logits[:, -1], whole, rtol=1e-3, atol=1e-3)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(ids, **settings, use_cache=True)
    assert torch.equal(with_cache, model.generate(ids, **settings, use_cache=False))
    assert not fallbacks(model)


def test_images_that_are_not_contiguous_in_channels_last() -> None:
    model = build(ALL["timm vit"])
    patch(model, SHORT)
    x = image()
    with torch.no_grad():
        expected, found = model(x), model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
