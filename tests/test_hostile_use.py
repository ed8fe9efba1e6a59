"""Patching broken off anywhere, over and over, of modules used twice, under hooks, and of models that are let go."""

from __future__ import annotations

import gc
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import pytest
import timm
import torch
from hostile_cases import FULL, LEARNED, MODELS, SHORT, STATIC, answer, cores, fingerprint
from patching_models import ALL, TIMM_VIT, build, text
from torch import Tensor, nn

from astroattn import fallbacks, patch, patched, unpatch
from astroattn.patching import site, swapped
from astroattn.patching.grid import PatchGrid
from astroattn.patching.site import Site


class Broken(BaseException):
    """As KeyboardInterrupt: nothing that catches errors catches it."""


class Breaker:
    """A profiler that raises at one call of a function of ours or of torch's modules, or counts them.

    With `inside`, only calls made by functions of this name count.
    """

    def __init__(self, at: int | None = None, inside: str = "") -> None:
        self.calls = 0
        self.at = at
        self.inside = inside

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        where = frame.f_code.co_filename
        ours = "/astroattn/" in where or where.endswith(("/nn/modules/module.py", "/utils/hooks.py"))
        if event == "call" and ours and (not self.inside or self.inside in self._callers(frame)):
            self.calls += 1
            if self.calls == self.at:
                raise Broken(frame.f_code.co_qualname)

    def _callers(self, frame: FrameType | None) -> Iterator[str]:
        while frame is not None:
            yield frame.f_code.co_name
            frame = frame.f_back


def patch_until(model: nn.Module, breaker: Breaker) -> None:
    sys.setprofile(breaker)
    try:
        patch(model, SHORT)
    finally:
        sys.setprofile(None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("inside", ["", "install", "_settle"])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_patching_that_breaks_off_anywhere_leaves_the_model_as_it_was(name: str, again: bool, inside: str) -> None:
    make, inputs = MODELS[name]
    model = make()
    if again:
        patch(model, STATIC, where=0)
    before, expected = fingerprint(model), answer(model, inputs())
    with patched(model, SHORT):  # what is made once
        pass
    count = Breaker(inside=inside)
    with patched(model, SHORT):
        unpatch(model)
        if again:
            patch(model, STATIC, where=0)
        patch_until(model, count)
    broken, where = 0, ""
    tries = range(1, count.calls + 1, max(1, count.calls // 40))
    for at in tries:
        try:
            patch_until(model, Breaker(at, inside))
        except Broken as error:
            broken += 1
            where = str(error)
        else:  # in a generator that was being closed, where Python lets nothing through
            unpatch(model)
            if again:
                patch(model, STATIC, where=0)
        assert fingerprint(model) == before, f"broken off in call {at}, {where}"
    assert broken > 0.9 * len(tries)
    assert torch.equal(answer(model, inputs()), expected)


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **TIMM_VIT).eval()
    blocks = nn.Sequential(*model.blocks)  # no patch embedding: the grid cannot be found
    before = fingerprint(blocks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="patch grid not found"):
            patch(blocks, SHORT)
    assert fingerprint(blocks) == before


# over and over


@pytest.mark.parametrize("name", MODELS)
def test_patching_over_and_over_leaves_nothing_behind(name: str) -> None:
    make, inputs = MODELS[name]
    model = make()
    before = fingerprint(model)
    gone: list[weakref.ref[Any]] = []

    def cycle() -> None:
        patch(model, SHORT)
        patch(model, LEARNED)
        answer(model, inputs())
        gone.extend(weakref.ref(each) for each in (*cores(model), *(site.site_of(m) for m in model.modules())) if each)
        unpatch(model)

    for _ in range(3):  # what is made once
        cycle()
    gc.collect()
    kinds, classes = Counter(type(each) for each in gc.get_objects()), len(swapped._classes)
    for _ in range(10):
        cycle()
    gc.collect()
    more = Counter(type(each) for each in gc.get_objects()) - kinds
    assert not any(issubclass(kind, (Tensor, nn.Module, Site, PatchGrid)) for kind in more), more
    assert not any(each() for each in gone)
    assert sum(more.values()) < 200
    assert len(swapped._classes) == classes
    assert len(site._running.handed) == 0
    assert fingerprint(model) == before


@pytest.mark.slow
def test_a_thousand_times_leaves_nothing_behind() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True).eval()
    before = fingerprint(model)
    for _ in range(3):
        patch(model, SHORT)
        unpatch(model)
    gc.collect()
    count = len(gc.get_objects())
    for _ in range(1000):
        patch(model, SHORT)
        unpatch(model)
    gc.collect()
    assert len(gc.get_objects()) - count < 50
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", MODELS)
def test_a_patched_model_that_is_let_go_is_gone(name: str) -> None:
    make, inputs = MODELS[name]
    model = make()
    patch(model, STATIC)
    answer(model, inputs()).sum().backward()
    refs = [weakref.ref(each) for each in (model, *cores(model), *map(site.site_of, model.modules())) if each]
    del model
    gc.collect()
    assert not any(each() for each in refs)
    assert len(site._running.handed) == 0


def test_a_call_that_fails_leaves_nothing_behind() -> None:
    model = build(ALL["bert"])
    patch(model, STATIC)
    core = cores(model)[0]
    handle = core.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**text())
    handle.remove()
    expected = answer(model, text())
    unpatch(model)
    patch(model, STATIC)
    assert torch.equal(answer(model, text()), expected)
    assert not fallbacks(model)
    del model, core
    gc.collect()
    assert len(site._running.handed) == 0


# threads


@torch.no_grad()
def test_a_model_is_patched_while_others_run() -> None:
    """Over and over, so that switches of threads come at many places."""
    models = {name: (make(), inputs()) for name, (make, inputs) in MODELS.items()}
    expected = {}
    for name, (model, inputs) in models.items():
        patch(model, STATIC)
        expected[name] = answer(model, inputs)
    plain = {name: (make(), inputs()) for name, (make, inputs) in MODELS.items()}
    others = {name: answer(model, inputs) for name, (model, inputs) in plain.items()}

    @torch.no_grad()
    def run(name: str) -> bool:
        return all(torch.equal(answer(*models[name]), expected[name]) for _ in range(10))

    @torch.no_grad()
    def change(name: str) -> bool:
        model, inputs = plain[name]
        for config in (SHORT, LEARNED):
            patch(model, config)
            answer(model, inputs)
            unpatch(model)
        return torch.equal(answer(model, inputs), others[name])

    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(work, name) for name in MODELS for work in (run, change)]
        assert all(each.result() for each in done)


# modules that stand in two places


def share(name: str, model: nn.Module) -> None:
    if name == "bert":
        model.encoder.layer[1].attention = model.encoder.layer[0].attention
    elif name == "timm vit":
        model.blocks[1].attn = model.blocks[0].attn
    elif name == "torch":
        model.layers[1] = model.layers[0]


@pytest.mark.parametrize("name", ["bert", "timm vit", "torch"])
@torch.no_grad()
def test_a_module_in_two_places(name: str) -> None:
    make, given = MODELS[name]
    model, inputs = make(), given()
    share(name, model)
    before, expected = fingerprint(model), answer(model, inputs)
    report = patch(model, FULL)
    assert len(report.patched) == len(cores(model)) == 1
    torch.testing.assert_close(answer(model, inputs), expected, rtol=1e-4, atol=1e-4)
    patch(model, SHORT)
    assert not torch.allclose(answer(model, inputs), expected)
    assert not fallbacks(model)
    unpatch(model)
    assert fingerprint(model) == before
    assert torch.equal(answer(model, inputs), expected)


# hooks of the user


@pytest.mark.parametrize("name", MODELS)
def test_hooks_of_the_user_are_called_as_often_as_before(name: str) -> None:
    make, given = MODELS[name]
    model, inputs = make(), given()
    report = patch(model, STATIC)
    unpatch(model)
    calls: Counter[str] = Counter()

    def note(kind: str) -> Callable[..., None]:
        return lambda *_: calls.update([kind])

    for row in report.patched:
        module = model.get_submodule(row.name)
        module.register_forward_pre_hook(note("before"))
        module.register_forward_pre_hook(note("before, with keywords"), with_kwargs=True)
        module.register_forward_hook(note("after"))
        module.register_forward_hook(note("after, with keywords"), with_kwargs=True)
        module.register_forward_hook(note("always"), always_call=True)
        module.register_full_backward_hook(note("backward"))

    def run() -> Counter[str]:
        calls.clear()
        tokens = {key: x.requires_grad_() if x.is_floating_point() else x for key, x in inputs.items()}
        answer(model, tokens).sum().backward()
        return Counter(calls)

    expected, hung = run(), fingerprint(model)
    assert set(expected.values()) == {2}
    patch(model, STATIC)
    assert run() == expected
    assert not fallbacks(model)
    with patched(model, SHORT):
        assert run() == expected
    unpatch(model)
    assert run() == expected
    assert fingerprint(model) == hung


# weights


@pytest.mark.parametrize("name", MODELS)
def test_frozen_models_and_a_layer_that_learns(name: str) -> None:
    make, given = MODELS[name]
    model = make().requires_grad_(False)
    patch(model, LEARNED)
    answer(model, given()).square().sum().backward()
    grads = {key for key, each in model.named_parameters() if each.grad is not None}
    assert grads == {key for key, _ in model.named_parameters() if "astrocyte" in key}
    assert len(grads) == 6
    model.requires_grad_(False)
    assert not answer(model, given()).requires_grad


@pytest.mark.parametrize(
    "config", [STATIC, LEARNED], ids=["static", "learned"]
)  # without choices, which rounding turns
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_converted_there_and_back(name: str, config: Any) -> None:
    make, given = MODELS[name]
    model, inputs = make(), given()
    patch(model, config)
    expected = answer(model, inputs)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        model.to(dtype)
        cast = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
        found = answer(model, cast)
        assert found.dtype == dtype
        assert found.isfinite().all()
        if dtype == torch.float64:
            torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert not fallbacks(model)
