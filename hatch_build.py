"""Compiles the CPU kernels when the package is installed; without a compiler it goes without them, saying so."""

from __future__ import annotations

import runpy
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelBuild(BuildHookInterface):
    """Puts the libraries beside their source, and the platform into the wheel's name; any Python 3 can load them.

    The recipes go inside the package, but not into an editable installation, which finds them beside it.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            build_data["force_include"]["patches"] = "astroattn/patches"
        build = runpy.run_path(str(Path(self.root, "astroattn", "ops", "native", "build.py")))["build"]
        try:
            build()
        except RuntimeError as error:
            print(f"astroattn: installed without its CPU kernels: {error}", file=sys.stderr)
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
