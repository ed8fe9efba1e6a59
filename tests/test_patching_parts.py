"""Models whose text alone does not reach every module: the parts are probed by themselves."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from patching_models import ALL, CAUSAL, build, need_transformers, outputs
from torch import Tensor, nn

from astroattn import AstroConfig, patch, unpatch
from astroattn.patching import probe
from astroattn.patching.site import NO_GRID

FULL = AstroConfig(hidden="random", near=4096)
IMAGE, START, VIDEO = 97, 96, 95


def qwen2_vl() -> nn.Module:
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 4, "hidden_size": 32, "patch_size": 4, "mlp_ratio": 2}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    text = CAUSAL | {"head_dim": 8, "rope_parameters": rope}
    tokens = {"image_token_id": IMAGE, "vision_start_token_id": START, "video_token_id": VIDEO}
    torch.manual_seed(0)
    model = t.Qwen2VLModel(t.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def images_and_text() -> dict[str, Tensor]:
    """Two images of 4 x 4 and 4 x 8 patches, which are four and eight tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([[5, START, *[IMAGE] * 4, 7, START, *[IMAGE] * 8, 9, 11]])
    patches = torch.randn(48, 3 * 2 * 4 * 4, generator=generator)
    grids = torch.tensor([[1, 4, 4], [1, 4, 8]])
    kinds = (ids == IMAGE).long()
    return {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grids, "mm_token_type_ids": kinds}


def test_a_vision_tower_is_probed_alone_and_equal_in_the_model() -> None:
    need_transformers("5.9")
    model = qwen2_vl()
    inputs = images_and_text()
    before = outputs(model, inputs)
    with pytest.warns(UserWarning, match=NO_GRID):
        report = patch(model, FULL)
    assert len(report.patched) == 4
    assert [row.reason for row in report.rows] == [f"checked in visual alone; {NO_GRID}"] * 2 + [""] * 2
    torch.testing.assert_close(outputs(model, inputs), before, rtol=1e-4, atol=1e-4)
    unpatch(model)
    assert all(map(torch.equal, outputs(model, inputs), before))


def test_a_part_that_cannot_be_probed_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    need_transformers("5.9")
    model, make = qwen2_vl(), probe.make_inputs

    def fail(part: nn.Module) -> dict[str, Tensor]:
        if part is model:
            return make(part)
        raise probe.NoProbe("no input")

    monkeypatch.setattr(probe, "make_inputs", fail)
    report = patch(model, FULL)
    reason = "the forward that checks did not call it; patch(model, inputs=batch) checks it on yours"
    assert {row.reason for row in report.exact} == {reason}
    assert len(report.patched) == len(report.exact) == 2


def test_a_part_that_changes_stays_exact_and_the_rest_does_not() -> None:
    need_transformers("5.9")
    model = qwen2_vl()

    class Odd(type(model.visual.blocks[0])):
        """Adds what depends on whether its attention was taken over."""

        def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
            taken = hasattr(self.attn, "astrocyte")
            return super().forward(hidden_states, *args, **kwargs) + taken

    model.visual.blocks[0].__class__ = Odd
    report = patch(model, FULL)
    assert {row.reason for row in report.exact} == {"the model changes when its attention is taken over"}
    assert [row.name for row in report.patched] == [f"language_model.layers.{i}.self_attn" for i in range(2)]
    assert not hasattr(model.visual.blocks[1].attn, "astrocyte")


class Wrapper(nn.Module):
    """A model that no input can be made up for."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.body(first + second)


def test_a_model_inside_another_is_checked_alone() -> None:
    report = patch(Wrapper(build(ALL["bert"])), FULL)
    assert report.probe == "of some parts alone, no input can be made up for a Wrapper"
    assert {row.reason for row in report.patched} == {"checked in body alone"}


def test_patches_in_rows_are_made_up() -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    siglip = t.Siglip2VisionModel(t.Siglip2VisionConfig(**shape, num_patches=16, patch_size=4)).eval()
    with pytest.warns(UserWarning, match=NO_GRID):
        report = patch(siglip, FULL)
    assert report.probe.startswith("every astrocyte was checked")
    assert len(report.patched) == 2
