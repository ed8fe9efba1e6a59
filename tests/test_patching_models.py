"""Every model is reproduced with a near field as long as its sequence, changed by a shorter one, and restored."""

from __future__ import annotations

import pytest
import torch
from patching_models import BIASED, LEFT_EXACT, PATCHED, build, outputs

from astroattn import AstroConfig
from astroattn.patching import NotPatched, fallbacks, patch, unpatch

MODELS = PATCHED | BIASED
EXACT = AstroConfig(near=100_000)
SHORT = AstroConfig(near=2, exact_keys=0, tile=2, num_hidden=4)
STATIC = AstroConfig(hidden="random", near=2, exact_keys=0, tile=2, num_hidden=4)


def differences(one: list[torch.Tensor], other: list[torch.Tensor]) -> list[float]:
    assert [each.shape for each in one] == [each.shape for each in other]
    assert one
    return [float((a - b).abs().max() / a.abs().max()) for a, b in zip(one, other, strict=True)]


@pytest.mark.parametrize("name", MODELS)
def test_full_near_field_reproduces_the_model(name: str) -> None:
    tiny = MODELS[name]
    model, inputs = build(tiny), tiny.inputs()
    before = outputs(model, inputs)
    report = patch(model, EXACT)
    assert (len(report.patched), len(report.exact)) == (tiny.patched, tiny.exact), str(report)
    assert all(tiny.reason in row.reason for row in report.exact), str(report)
    assert report.probe.startswith("every"), report.probe
    assert max(differences(before, outputs(model, inputs))) < 1e-5
    assert fallbacks(model) == {}


@pytest.mark.parametrize("name", MODELS)
def test_short_near_field_changes_the_outputs(name: str) -> None:
    tiny = MODELS[name]
    model, inputs = build(tiny), tiny.inputs()
    before = outputs(model, inputs)
    patch(model, STATIC if tiny.causal else SHORT)
    assert max(differences(before, outputs(model, inputs))) > 1e-4
    assert fallbacks(model) == {}


@pytest.mark.parametrize("name", MODELS)
def test_unpatch_restores_everything(name: str) -> None:
    tiny = MODELS[name]
    model, inputs = build(tiny), tiny.inputs()
    before, keys = outputs(model, inputs, real_only=False), list(model.state_dict())
    state = snapshot(model)
    patch(model, STATIC if tiny.causal else SHORT)
    assert list(model.state_dict()) == keys
    unpatch(model)
    after = outputs(model, inputs, real_only=False)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert snapshot(model) == state


def snapshot(model: torch.nn.Module) -> list[object]:
    """Classes, plain attributes, hooks and attention implementations of all modules."""
    facts: list[object] = []
    for name, module in model.named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, bool | int | str | float)}
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        facts.append((name, type(module), plain, implementation, hooks, module.training, sorted(vars(module))))
    return facts


@pytest.mark.parametrize("name", LEFT_EXACT)
def test_what_cannot_be_represented_stays_exact(name: str) -> None:
    tiny = LEFT_EXACT[name]
    model, inputs = build(tiny), tiny.inputs()
    before, state = outputs(model, inputs), snapshot(model)
    with pytest.raises(NotPatched, match="none of the selected attention modules can be patched") as error:
        patch(model, EXACT)
    assert sum(tiny.reason in row.reason for row in error.value.report.rows) >= tiny.exact, str(error.value)
    assert snapshot(model) == state
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model, inputs), strict=True))
