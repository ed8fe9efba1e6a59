"""What is imported late: names of a package when they are asked for, packages of an extra, libraries that we add to."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import MetaPathFinder
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


_awaited: dict[str, list[Callable[[Any], None]]] = {}  # what is called with a module of another library, by its name


def when_imported(name: str, add: Callable[[Any], None]) -> None:
    """Call `add` with a module of another library now, if it is imported already, or else once it is."""
    if (library := sys.modules.get(name)) is not None:
        add(library)
        return
    if add not in (waiting := _awaited.setdefault(name, [])):
        waiting.append(add)
    if not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported(MetaPathFinder):
    """Finds no module; of those that are awaited it has the code run, and then ours. One for all: two would ask on."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in _awaited:
            return None
        others = (each for each in sys.meta_path if each is not self)
        spec = next(filter(None, (each.find_spec(name, path, target) for each in others)), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                for add in _awaited[name]:
                    add(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def put_over(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace a function or class method of a library by what `make` makes of it; once for each `make`."""
    function = getattr(owner, name, None)
    if function is not None and make not in getattr(function, "astroattn", ()):
        bare = getattr(function, "__func__", function)
        replaced: Any = functools.wraps(bare)(make(bare))
        replaced.astroattn = (*getattr(function, "astroattn", ()), make)
        setattr(owner, name, replaced if bare is function else classmethod(replaced))
