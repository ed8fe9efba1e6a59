"""What is imported late: names of a package when they are asked for, and packages that come with an extra."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around imports of packages that `pip install 'astroattn[EXTRA]'` brings.

    Raises:
        ImportError: one of them is not installed; it says so, with that command.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "astroattn"):  # a fault of ours
            raise
        raise ImportError(
            f"{package} is not installed, and is needed here: pip install 'astroattn[{extra}]'", name=package
        ) from None


def lazily(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        package: its `__name__`.
        homes: the module of the package that each of its names is imported from, when it is first asked for. Other
            names are those of its modules.
    """

    def get(name: str) -> Any:
        if name in homes:
            value = getattr(import_module(f"{package}.{homes[name]}"), name)
            setattr(sys.modules[package], name, value)
            return value
        if not name.startswith("_") and find_spec(f"{package}.{name}"):
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])

    return get, lambda: sorted({*vars(sys.modules[package]), *homes})
