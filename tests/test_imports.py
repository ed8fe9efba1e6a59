"""What is imported, and when: at the command line nothing heavy, without the extras all that patching needs."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import astroattn
import astroattn.fidelity
from astroattn.imports import lazily, needs

MISSING = """
import sys

MISSING = {"transformers", "timm", "torchvision", "huggingface_hub", "sklearn", "scipy", "matplotlib", "datasets",
           "accelerate", "peft", "PIL", "jiwer"}

class Without:
    # a finder to which these are not installed
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in MISSING else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
"""

PATCHING = """
import tempfile, torch
import astroattn
from torch import nn

torch.manual_seed(0)
def encoder():
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()

model, other, x = encoder(), encoder(), torch.randn(2, 200, 32)
other.load_state_dict(model.state_dict())
learned = astroattn.AstroConfig(hidden="learned", num_hidden=8, near=0)
with torch.no_grad():
    before = model(x)
    assert len(astroattn.patch(model, learned).patched) == 2
    astroattn.distill(model, [x, -x], steps=2, progress=False)
    changed = model(x)
    assert changed.shape == before.shape and not torch.equal(changed, before)
    with tempfile.TemporaryDirectory() as folder:
        astroattn.save(model, folder)
        astroattn.load(other, folder)
    assert torch.equal(other(x), changed)
    astroattn.unpatch(model)
    assert torch.equal(model(x), before)
    astroattn.patch(model)
    assert model(x).isfinite().all()
print(*sorted(MISSING & set(sys.modules)))
"""

NAMED = """
import torch
import astroattn.ops.library
torch.ops.astroattn.near_far_attention  # as an export that was saved looks it up
from torch import nn

def tell(function, *args, **settings):
    try:
        function(*args, **settings)
    except ImportError as error:
        print(error)

def compare():
    astroattn.fidelity.compare

from astroattn.data.clips import Clip
from astroattn.data.hub import read_dataset
from astroattn.data.photos import Photo
from astroattn.models import load_model, resample
from astroattn.simulation import NeuronAstrocyteNetwork, StaticNeurons, integrate

config = astroattn.AstroConfig(hidden="random", num_hidden=4, near=0)
network, x = NeuronAstrocyteNetwork(StaticNeurons.random(1, 2, config)), torch.ones(1, 1, 3, 2)

tell(compare)
tell(astroattn.calibrate, nn.Linear(2, 2), [], cost=0.5)
tell(load_model, "timm:vit_tiny_patch16_224")
tell(load_model, "someone/something")
tell(astroattn.from_pretrained, "someone/something")
tell(read_dataset, "a", 1)
tell(Photo("a", bytes).open)
tell(Clip("a", bytes).open)
tell(resample, [0.0], 1, 2)
tell(integrate, network, x, x, x)
MISSING = {"numpy"}
tell(compare)
tell(astroattn.calibrate, nn.Linear(2, 2), [], cost=0.5)
MISSING = {"jiwer"}
tell(compare)
MISSING = {"matplotlib"}
compare()
from importlib import import_module
tell(import_module, "astroattn.fidelity.figure")
"""


def run(code: str, cwd: Path) -> list[str]:
    """The lines that it prints."""
    root = str(Path(astroattn.__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {root!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_patching_training_and_keeping_need_no_extras(tmp_path: Path) -> None:
    assert run(MISSING + PATCHING, tmp_path) == [""]


def test_without_numpy_all_but_keeping_what_was_learned(tmp_path: Path) -> None:
    before, _, _ = PATCHING.partition("    with tempfile")
    tells = """
    for keep in (lambda: astroattn.save(model, "kept"), lambda: astroattn.Distiller(model).save("kept")):
        try:
            keep()
        except ImportError as error:
            print(error)
    astroattn.unpatch(model)
    astroattn.patch(model)
    out = model(x)
    astroattn.save(model, "kept")
    astroattn.load(other, "kept")
    assert torch.equal(other(x), out)
"""
    lines = run(f"{MISSING}\nMISSING.add('numpy')\n{before}{tells}", tmp_path)
    assert lines == ["numpy is not installed, and is needed here: pip install 'astroattn[train]'"] * 2


def test_what_is_missing_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    needed = [
        *("scipy", "scipy", "timm", "transformers", "transformers", "datasets", "PIL", "scipy", "scipy"),
        *("scipy", "numpy", "numpy", "jiwer", "matplotlib"),
    ]
    extras = ["eval"] * 9 + ["science"] + ["eval"] * 4
    assert run(MISSING + NAMED, tmp_path) == [
        f"{package} is not installed, and is needed here: pip install 'astroattn[{extra}]'"
        for package, extra in zip(needed, extras, strict=True)
    ]


def test_a_fault_of_ours_is_not_a_missing_package() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'astroattn\.nothing'$"), needs("eval"):
        importlib.import_module("astroattn.nothing")


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"], ["compare"]])
def test_the_command_line_starts_without_pytorch(arguments: list[str], tmp_path: Path) -> None:
    code = f"""
from astroattn.cli import main
try:
    main({arguments!r})
except SystemExit:
    pass
print(*{{"torch", "numpy", "matplotlib", "transformers"}} & set(sys.modules))
"""
    assert run(code, tmp_path)[-1] == ""


@pytest.mark.parametrize("package", [astroattn, astroattn.fidelity])
def test_late_names_are_those_that_type_checkers_see(package: Any) -> None:
    tree = ast.parse(Path(package.__file__).read_text("utf-8"))
    seen = {
        alias.asname: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    homes = {name: f"{package.__name__}.{home}" for name, home in package._HOMES.items()}
    assert {name: home for name, home in seen.items() if name in homes} == homes
    assert set(package.__all__) - {"__version__"} == set(homes) <= set(dir(package))
    for name, home in homes.items():
        assert getattr(package, name) is getattr(importlib.import_module(home), name)


def test_modules_of_a_package_are_its_names_and_nothing_else_is() -> None:
    get, _ = lazily("astroattn", {})
    assert get("simulation") is importlib.import_module("astroattn.simulation")
    with pytest.raises(AttributeError, match="module 'astroattn' has no attribute 'nothing'"):
        get("nothing")
    assert not hasattr(astroattn, "__wrapped__")
