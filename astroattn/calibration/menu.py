"""What a head may do."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from astroattn.config import MIXABLE, AstroConfig

EXACT = AstroConfig(hidden="exact")


KEYS = (0, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536)
NEURONS, FEW_NEURONS, FEWEST_NEURONS = 48, 16, 8
WIDE_NEAR = 16  # tokens, for heads that look at their neighbours


def default_menu(num_tokens: int) -> list[AstroConfig]:
    """The configs that a head of attention over so many tokens chooses among, exact attention last.

    Tiles by content with few and many neurons and exact keys, a narrow and a wide near field; tiles of neighbours;
    large tiles with next to nothing, and the near field alone, for heads that hardly matter. At most half of the keys
    are exact, above which softmax attention itself costs no more.
    """
    keys = [count for count in KEYS if count <= num_tokens // 2]
    large = 2 * round(sqrt(num_tokens))
    return [
        AstroConfig(hidden="none", tiles="position", near=WIDE_NEAR, exact_keys=0),
        *(AstroConfig(num_hidden=FEWEST_NEURONS, near=1, exact_keys=e, tile=large) for e in keys[:4]),
        *(AstroConfig(num_hidden=FEW_NEURONS, exact_keys=e) for e in keys[:9]),
        *(AstroConfig(num_hidden=NEURONS, exact_keys=e) for e in keys[2:]),
        *(AstroConfig(num_hidden=NEURONS, near=WIDE_NEAR, exact_keys=e) for e in keys[::2]),
        *(AstroConfig(num_hidden=NEURONS, near=WIDE_NEAR, exact_keys=e, tiles="position") for e in keys[::2]),
        EXACT,
    ]


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
