"""Build the C++ kernels beside their source: `python -m astroattn.ops.native.build`. An installation does so too.

One library for each kind of CPU, because a wheel may run on another machine than it was built on. Needs GCC 11 or
newer. This file imports only the standard library, because it runs before PyTorch is installed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp")
# By what torch.backends.cpu.get_cpu_capability() calls the CPU, in lower case.
VARIANTS: dict[str, tuple[str, ...]] = {"default": ()}
if platform.machine().lower() in ("x86_64", "amd64"):
    VARIANTS |= {
        "avx2": ("-march=x86-64-v3",),
        "avx512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    }


def build(folder: Path = FOLDER) -> list[Path]:
    """Compile every variant into the folder, with $CXX, c++ or g++.

    Raises:
        RuntimeError: no compiler, or one that cannot compile the kernels, with what it said.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise RuntimeError("no C++ compiler found (c++ or g++ on the PATH, or CXX)")
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda name: _compile(compiler, folder / f"kernels_{name}.so", VARIANTS[name]), VARIANTS))


def _compile(compiler: str, library: Path, flags: tuple[str, ...]) -> Path:
    unfinished = library.with_suffix(f".{os.getpid()}")  # renamed when complete: others may be building, or loading
    sources = map(str, sorted(FOLDER.glob("*.cpp")))
    command = [*compiler.split(), *FLAGS, *flags, *sources, "-o", str(unfinished)]
    try:
        run = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{compiler}: {error}") from error
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr}")
    return unfinished.replace(library)


if __name__ == "__main__":
    try:
        print(*build(), sep="\n")  # noqa: T201
    except RuntimeError as error:
        sys.exit(f"astroattn: {error}")
