"""A generated subclass put over the class of one module, whose forward goes through a function of a front-end.

Copies, pickles and replicas of such a module work, which they do not where a forward is replaced on the instance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from astroattn.patching.site import site_of

Run = Callable[[type[nn.Module], nn.Module, tuple[Any, ...], dict[str, Any]], Any]

_classes: dict[tuple[type, Run], type[nn.Module]] = {}


def put_over(module: nn.Module, run: Run) -> None:
    """Make `run(base, module, args, kwargs)` the forward of a module that has a site; `base` is its class until now."""
    if _ours(type(module)) is None:
        module.__class__ = _class_over(type(module), run)


def take_off(module: nn.Module) -> None:
    """Undo `put_over`."""
    if _ours(type(module)) is type(module):
        module.__class__ = type(module).__bases__[0]
    # else something has put a class over ours since, or taken ours away; without a site ours does as its base does


def _class_over(base: type[nn.Module], run: Run) -> type[nn.Module]:
    if (base, run) not in _classes:
        _classes[base, run] = _make_class(base, run)
    return _classes[base, run]


def _make_class(base: type[nn.Module], run: Run) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if site_of(self) is None:  # unpatched under a hook or a class that still leads here
            return base.forward(self, *args, **kwargs)
        return run(base, self, args, kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _rebuild, (base, run), self.__dict__

    return type(
        f"{base.__name__}WithAstrocyte", (base,), {"forward": forward, "__reduce_ex__": reduce, "__module__": __name__}
    )


def _rebuild(base: type[nn.Module], run: Run) -> nn.Module:
    """An empty module of the subclass, for copies and pickles: the subclass itself has no importable name."""
    cls = _class_over(base, run)
    return cls.__new__(cls)


def _ours(cls: type) -> type | None:
    """The class of `_class_over` that a class is or is made from, None for any other."""
    return next((each for each in cls.__mro__ if each in _classes.values()), None)
