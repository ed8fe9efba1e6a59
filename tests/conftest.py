"""Shared by all tests: no network, few threads, a fixed seed, and where the real data lies."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers, timm or datasets are imported
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on CPU tensors; read when triton is first imported

from astroattn.ops.native import library
from tests.native_variants import HERE, REFUSAL, load

# get_num_threads knows which cores the process may run on; os.cpu_count does not
torch.set_num_threads(max(1, min(2, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_accelerator() -> Iterator[None]:
    """No test meets the precision and device that another one's Accelerator has set for the process."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session", autouse=True)
def _spoiled_memory() -> None:
    """Kernels are tested with working memory full of NaN, those in C++ wherever a test comes upon them."""
    if REFUSAL is None:
        for name in HERE:
            load(name)


@pytest.fixture(params=HERE)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every variant of the CPU kernels that this machine can run."""
    kernels = load(request.param)
    monkeypatch.setattr(library, "_library", lambda: kernels)
    return request.param


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with real models and data that ASTROATTN_DATA names; a test that needs it is skipped where unset."""
    folder = os.environ.get("ASTROATTN_DATA")
    if not folder:
        pytest.skip("needs real models and data: ASTROATTN_DATA is not set")
    path = Path(folder)
    assert path.is_dir(), f"ASTROATTN_DATA names {folder!r}, which is not a folder"
    return path


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a kernel of Triton is tested: in the interpreter, or on a GPU."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a CUDA device")
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
