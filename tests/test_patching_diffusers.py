"""Transformers of diffusers, whose attention calls SDPA from a processor."""

from __future__ import annotations

import pytest
import torch
from patching_models import outputs
from torch import nn

from astroattn import AstroConfig, patch, unpatch
from astroattn.patching import fallbacks
from astroattn.patching.site import NO_GRID

diffusers = pytest.importorskip("diffusers")

FULL = AstroConfig(hidden="random", near=4096)
SIZES = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "num_layers": 2}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def dit() -> tuple[nn.Module, dict]:
    model = diffusers.DiTTransformer2DModel(**SIZES, sample_size=8, patch_size=1, num_embeds_ada_norm=10)
    steps = {"timestep": torch.tensor([1, 2]), "class_labels": torch.tensor([1, 2])}
    return model, {"hidden_states": noise(2, 4, 8, 8)} | steps


def pixart() -> tuple[nn.Module, dict]:
    sizes = SIZES | {"sample_size": 8, "patch_size": 1, "cross_attention_dim": 32, "caption_channels": 16}
    model = diffusers.PixArtTransformer2DModel(**sizes, norm_type="ada_norm_single", use_additional_conditions=False)
    text = {"encoder_hidden_states": noise(2, 5, 16), "timestep": torch.tensor([1, 2])}
    given = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return model, {"hidden_states": noise(2, 4, 8, 8)} | text | given


def flux() -> tuple[nn.Module, dict]:
    sizes = SIZES | {"num_single_layers": 1, "num_layers": 1, "patch_size": 1, "axes_dims_rope": [4, 4, 8]}
    model = diffusers.FluxTransformer2DModel(**sizes, joint_attention_dim=16, pooled_projection_dim=8)
    places = {"img_ids": noise(64, 3), "txt_ids": torch.zeros(5, 3)}
    text = {"encoder_hidden_states": noise(2, 5, 16), "pooled_projections": noise(2, 8)}
    return model, {"hidden_states": noise(2, 64, 4), "timestep": torch.tensor([0.1, 0.2])} | text | places


MODELS = {"DiT": (dit, 2, {""}), "PixArt": (pixart, 2, {"cross attention"}), "Flux": (flux, 2, {""})}


@pytest.mark.parametrize("name", MODELS)
def test_self_attention_is_equal_and_changes_with_a_short_near_field(name: str) -> None:
    build, patched, reasons = MODELS[name]
    torch.manual_seed(0)
    model, inputs = build()
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 2 * parameter[0].numel() ** -0.5)
    before = outputs(model, {**inputs, "return_dict": True})
    with pytest.warns(UserWarning, match=NO_GRID):
        report = patch(model, FULL)
    assert len(report.patched) == patched
    assert {row.reason for row in report.exact} <= reasons
    torch.testing.assert_close(outputs(model, inputs), before, rtol=1e-4, atol=1e-4)
    assert not fallbacks(model)
    with pytest.warns(UserWarning, match=NO_GRID):
        patch(model, AstroConfig(near=2, exact_keys=2, num_hidden=4))
    assert not torch.allclose(outputs(model, inputs)[0], before[0], rtol=1e-2, atol=1e-2)
    unpatch(model)
    assert all(map(torch.equal, outputs(model, inputs), before))


def test_attention_modules_are_checked_alone() -> None:
    with pytest.warns(UserWarning, match=NO_GRID):
        report = patch(dit()[0].eval(), FULL)
    assert report.probe == "of some parts alone, no input can be made up for a DiTTransformer2DModel"
    assert {row.reason for row in report.patched} == {f"checked alone; {NO_GRID}"}


def test_a_processor_without_sdpa_stays_exact() -> None:
    model = dit()[0].eval()
    model.transformer_blocks[0].attn1.set_processor(diffusers.models.attention_processor.AttnProcessor())
    with pytest.warns(UserWarning, match=NO_GRID):
        report = patch(model, FULL)
    assert [row.name for row in report.patched] == ["transformer_blocks.1.attn1"]
    assert "softmax written out by hand" in report.exact[0].reason
