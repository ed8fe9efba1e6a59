"""What a head may do."""

from __future__ import annotations

from collections.abc import Sequence

from astroattn.config import MIXABLE, AstroConfig

EXACT = AstroConfig(hidden="exact")


def default_menu(num_tokens: int) -> list[AstroConfig]:
    """The configs that a head of attention over so many tokens chooses among, exact attention last."""
    keys = [count for count in (0, 8, 16, 32, 64, 96, 128, 256) if count < num_tokens]
    menu = [AstroConfig(num_hidden=m, exact_keys=e) for m in (8, 16, 32) if m < num_tokens for e in keys]
    return [*menu, EXACT]


def check_menu(menu: Sequence[AstroConfig]) -> list[AstroConfig]:
    """The distinct configs of a menu, exact attention last.

    Raises:
        TypeError: one is no AstroConfig.
        ValueError: one has weights of its own, so that heads cannot differ.
    """
    for number, config in enumerate(menu):
        if not isinstance(config, AstroConfig):
            raise TypeError(f"menu[{number}]: {type(config).__name__}; expected AstroConfig")
        if config.hidden not in MIXABLE:
            raise ValueError(f"menu[{number}]: hidden={config.hidden!r} has weights; must be {', '.join(MIXABLE)}")
    return [*dict.fromkeys(config for config in menu if config.hidden != "exact"), EXACT]
