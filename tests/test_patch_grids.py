"""Every call of a vision transformer has the grid of its own image, or it is said that it has none."""

from __future__ import annotations

import copy
import io
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers as t
from patching_models import ALL, IMAGE, TIMM_VIT, VISION, build, image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from astroattn import AstroConfig, AstrocyteAttention
from astroattn.patching import fallbacks, patch, unpatch
from astroattn.patching.site import NO_GRID, site_of

SHORT = AstroConfig(near=2, exact_keys=0, tile=2, num_hidden=4)
WIDE, HIGH, LARGE = (24, 48), (48, 24), (48, 48)  # two of as many tokens


def timm_vit(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **TIMM_VIT | {"dynamic_img_size": True} | settings)
    return strong(model)


def hf(cls: Any, config: Any, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return strong(cls(config(**VISION, **IMAGE, **settings)))


def strong(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm vit": timm_vit,
    "vit": lambda: hf(t.ViTModel, t.ViTConfig),
    "dinov2": lambda: hf(t.Dinov2Model, t.Dinov2Config),
    "dinov3": lambda: hf(t.DINOv3ViTModel, t.DINOv3ViTConfig, num_register_tokens=2),
}


def run(model: nn.Module, size: tuple[int, int]) -> Tensor:
    extra = {"interpolate_pos_encoding": True} if isinstance(model, t.ViTModel) else {}
    result = model(image(size), **extra)
    return result if isinstance(result, Tensor) else result.last_hidden_state


def grids(model: nn.Module) -> list[tuple[int, int] | None]:
    """Of every call from now on."""
    seen: list[Any] = []
    for core in model.modules():
        if isinstance(core, AstrocyteAttention):
            core.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["grid"]), with_kwargs=True)
    return seen


def gradients(model: nn.Module, sizes: list[tuple[int, int]], around: Any = None) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(0)  # DINOv3 draws shifts of its positions
    if around is None:
        loss = torch.stack([run(model, size).square().sum() for size in sizes]).sum()
    else:
        with around:
            loss = torch.stack([run(model, size).square().sum() for size in sizes]).sum()
    loss.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def set_checkpointing(model: nn.Module, reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(model, "set_grad_checkpointing"):
        monkeypatch.setenv("TIMM_REENTRANT_CKPT", "1" if reentrant else "0")
        monkeypatch.setattr("timm.layers.config._USE_REENTRANT_CKPT", reentrant, raising=False)
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4 * scale + 1e-9)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_sizes_under_gradient_checkpointing(name: str, reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = MODELS[name]().train(), MODELS[name]().train()
    for each in (plain, model):
        patch(each, SHORT)
    set_checkpointing(model, reentrant, monkeypatch)
    if reentrant:  # it wants an input that requires a gradient
        for each in (plain, model):
            for module in each.modules():
                if isinstance(module, nn.Conv2d):
                    module.register_forward_hook(lambda module, args, output: output.requires_grad_())
    for sizes in ([WIDE, HIGH], [HIGH, LARGE, WIDE], [LARGE, WIDE]):
        close(gradients(model, sizes), gradients(plain, sizes))
    one, other = gradients(plain, [WIDE, HIGH]), gradients(plain, [WIDE, WIDE])
    assert any(not torch.allclose(one[key], other[key]) for key in one)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("part", ["blocks", "model", "attention", "nested"])
def test_parts_checkpointed_by_hand(part: str, reentrant: bool) -> None:
    plain, model = timm_vit().train(), timm_vit().train()
    for each in (plain, model):
        patch(each, SHORT)

    def again(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: checkpoint(function, *args, use_reentrant=reentrant)

    sizes = [WIDE, HIGH, LARGE]
    expected = gradients(plain, sizes)
    if part == "model":
        inputs = [image(size).requires_grad_() for size in sizes]
        torch.stack([checkpoint(model, x, use_reentrant=reentrant).square().sum() for x in inputs]).sum().backward()
        close({name: each.grad for name, each in model.named_parameters()}, expected)
        return
    if part in ("blocks", "nested"):
        model.blocks.forward = again(model.blocks.forward)
    for block in model.blocks if part == "nested" else ():
        block.forward = again(block.forward)
    for block in model.blocks if part == "attention" else ():
        block.attn = Again(block.attn, reentrant)
    close({key.replace("attn.inner", "attn"): value for key, value in gradients(model, sizes).items()}, expected)


class Again(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def test_what_cannot_be_told_is_said() -> None:
    """Tensors saved elsewhere are others when they come back: one size of so many tokens is right, of two none is."""
    plain, model = timm_vit().train(), timm_vit().train()
    for each in (plain, model):
        patch(each, SHORT)
    model.set_grad_checkpointing()

    def elsewhere() -> Any:
        return torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone())

    close(gradients(model, [WIDE, LARGE], elsewhere()), gradients(plain, [WIDE, LARGE]))
    with pytest.raises(RuntimeError, match="images of 3 x 6 and 6 x 3 patches have given as many tokens"):
        gradients(model, [WIDE, HIGH], elsewhere())


def pickled(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def other_model() -> nn.Module:
    model = timm_vit().eval()
    patch(model, SHORT)
    run(model, LARGE)
    return model


def embedding() -> nn.Conv2d:
    return nn.Conv2d(3, 48, 8, stride=8)


def lora(model: nn.Module, *targets: str) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=list(targets))).base_model.model


CHANGES: dict[str, Callable[[Any], object]] = {
    "copied": lambda m: m.blocks.__setitem__(0, copy.deepcopy(m.blocks[0])),
    "pickled": lambda m: m.blocks.__setitem__(0, pickled(m.blocks[0])),
    "from another model": lambda m: m.blocks.__setitem__(0, other_model().blocks[0]),
    "all copied": lambda m: setattr(m, "blocks", copy.deepcopy(m.blocks)),
    "projection replaced": lambda m: setattr(m.patch_embed, "proj", embedding()),
    "embedding replaced": lambda m: setattr(m, "patch_embed", timm_vit().patch_embed),
    "LoRA": lambda m: lora(m, "proj"),
    "patched again": lambda m: patch(m.blocks, AstroConfig(near=4, exact_keys=0, tile=2, num_hidden=4)),
    "the blocks unpatched and patched": lambda m: (unpatch(m.blocks), patch(m, SHORT)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_grid_is_found_after_a_change(change: Callable[[Any], object]) -> None:
    model = timm_vit().eval()
    patch(model, SHORT)
    run(model, WIDE)
    change(model)
    seen = grids(model)
    for size in (HIGH, LARGE, WIDE):
        run(model, size)
    assert seen == [(6, 3)] * 2 + [(6, 6)] * 2 + [(3, 6)] * 2
    assert fallbacks(model) == {}
    unpatch(model)
    assert not any(key.startswith("astro") for module in model.modules() for key in vars(module))


def test_the_grid_is_found_after_set_input_size() -> None:
    model = timm_vit(dynamic_img_size=False).eval()
    patch(model, SHORT)
    model.set_input_size(img_size=(24, 32), patch_size=4)
    seen = grids(model)
    model(image((24, 32)))
    assert seen == [(6, 8)] * 2


@pytest.mark.parametrize(
    ("make", "targets"), [(timm_vit, ["proj"]), (MODELS["vit"], ["projection"]), (MODELS["dinov2"], ["projection"])]
)
def test_lora_before_patching(make: Callable[[], nn.Module], targets: list[str]) -> None:
    model = lora(make().eval(), *targets)
    report = patch(model, SHORT)
    assert {row.reason for row in report.patched} == {""}
    seen = grids(model)
    for size in (WIDE, HIGH):
        run(model, size)
    assert seen == [(3, 6)] * 2 + [(6, 3)] * 2


@pytest.mark.parametrize("part", [lambda m: m.blocks, lambda m: m.blocks[0], lambda m: m.blocks[0].attn])
def test_a_grid_out_of_sight_is_said(part: Callable[[Any], nn.Module]) -> None:
    model = timm_vit().eval()
    with pytest.warns(UserWarning, match=NO_GRID):
        report = patch(part(model), SHORT)
    assert {row.reason for row in report.patched} == {NO_GRID}
    assert NO_GRID in str(report)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = patch(model, SHORT)
    assert {row.reason for row in report.patched} == {""}
    seen = grids(model)
    run(model, WIDE)
    assert seen == [(3, 6)] * 2


def test_a_block_without_its_model_is_said() -> None:
    block = pickled(other_model().blocks[0])
    with pytest.warns(UserWarning, match=NO_GRID):
        block(torch.randn(1, 19, 48))
    assert list(fallbacks(block).values()) == [{NO_GRID: 1}]


def test_fewer_tokens_than_patches_are_said() -> None:
    model = timm_vit(patch_drop_rate=0.5).train()
    patch(model, SHORT)
    with pytest.warns(UserWarning, match=NO_GRID):
        run(model, WIDE)
    assert len(fallbacks(model)) == 2


@pytest.mark.parametrize(
    "config", [SHORT, AstroConfig(), AstroConfig(backend="torch")], ids=["short", "default", "torch"]
)
@pytest.mark.parametrize("name", ["timm vit", "vit", "bert"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traces(name: str, config: AstroConfig) -> None:
    """With gradients and with the tracer's own check, which traces again without; on other numbers it is right too."""
    vision = {"image_size": 96, "patch_size": 8}  # more tokens than the default attends to exactly
    make: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
        "timm vit": lambda: (timm_vit(img_size=96), image((96, 96))),
        "vit": lambda: (strong(t.ViTModel(t.ViTConfig(**VISION | vision))), image((96, 96))),
        "bert": lambda: (build(ALL["bert"]), torch.randint(5, 90, (2, 150))),
    }
    model, inputs = make[name]()
    model.eval()
    patch(model, config)
    seen = grids(model)
    traced = torch.jit.trace(model, inputs, strict=False)
    mine, theirs = (each(inputs.flip(-1).clone()) for each in (model, traced))
    mine, theirs = (each if isinstance(each, Tensor) else next(iter(each.values())) for each in (mine, theirs))
    torch.testing.assert_close(theirs, mine)
    assert all(grid is None or {type(side) for side in grid} == {int} for grid in seen)


def test_sizes_are_those_of_each_copy() -> None:
    model = timm_vit().eval()
    patch(model, SHORT)
    twin = copy.deepcopy(model)
    seen = grids(model), grids(twin)
    for one, other in itertools.permutations([WIDE, HIGH, LARGE], 2):
        run(model, one)
        run(twin, other)
    assert seen[0] != seen[1]
    assert [len(each) for each in seen] == [12, 12]
    unpatch(twin)
    run(model, WIDE)
    assert seen[0][-2:] == [(3, 6)] * 2
    assert all(site_of(module) is None for module in twin.modules())
