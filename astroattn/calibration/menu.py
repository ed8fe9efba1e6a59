"""What a head may do."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from astroattn.config import ENTRIES_STEP, LEAST_ENTRIES, MIXABLE, AstroConfig

EXACT = AstroConfig(hidden="exact")


KEYS = (0, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536)
ERRORS = (0.2, 0.1, 0.06, 0.04, 0.025, 0.016, 0.01, 0.006, 0.0035, 0.002)  # of keys
NEURONS, FEW_NEURONS, FEWEST_NEURONS = 48, 16, 8
ENTRIES = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)  # of a streaming memory
WIDE_NEAR = 16  # tokens, for heads that look at their neighbours


def default_menu(num_tokens: int) -> list[AstroConfig]:
    """The configs that a head of attention over so many tokens chooses among, exact attention last.

    Tiles by content with few and many neurons, a narrow and a wide near field, and more and more exact keys: a number
    that is the same for all sub-tiles, or as many as errors ask for. Tiles of neighbours; large tiles with next to
    nothing, and the near field alone, for heads that hardly matter. At most half of the keys are exact, above which
    softmax attention itself costs no more.
    """
    keys, large = [count for count in KEYS if count <= num_tokens // 2], 2 * round(sqrt(num_tokens))
    return [
        AstroConfig(hidden="none", tiles="position", near=WIDE_NEAR, exact_keys=0),
        *(AstroConfig(num_hidden=FEWEST_NEURONS, near=1, exact_keys=e, tile=large) for e in keys[:4]),
        *(AstroConfig(num_hidden=FEW_NEURONS, exact_keys=e) for e in keys[:7]),
        *(by_error(num_tokens, e, num_hidden=FEW_NEURONS) for e in ERRORS[:4]),
        *(AstroConfig(num_hidden=NEURONS, exact_keys=e) for e in keys[2:]),
        *(by_error(num_tokens, e, num_hidden=NEURONS) for e in ERRORS[1:]),
        *(AstroConfig(num_hidden=NEURONS, near=WIDE_NEAR, exact_keys=e) for e in keys[::4]),
        *(by_error(num_tokens, e, num_hidden=NEURONS, near=WIDE_NEAR) for e in ERRORS[1::2]),
        *(AstroConfig(num_hidden=NEURONS, near=WIDE_NEAR, exact_keys=e, tiles="position") for e in keys[::2]),
        EXACT,
    ]


def by_error(num_tokens: int, error: float, **settings: int) -> AstroConfig:
    """As many exact keys as this error of a key asks for, of at most half of the keys."""
    return AstroConfig(exact_keys=min(num_tokens // 2, KEYS[-1]), key_error=error, **settings)  # type: ignore[arg-type]


def streaming_menu(num_tokens: int) -> list[AstroConfig]:
    """The streaming memories that a key head chooses among for texts of so many tokens; the last holds all of one."""
    sizes = [entries for entries in ENTRIES if entries < num_tokens]
    return [AstroConfig(hidden="streaming", entries=entries) for entries in (*sizes, _whole(num_tokens))]


def _whole(num_tokens: int) -> int:
    return max(LEAST_ENTRIES, -(-num_tokens // ENTRIES_STEP) * ENTRIES_STEP)


def check_streaming_menu(menu: Sequence[AstroConfig], num_tokens: int) -> list[AstroConfig]:
    """The distinct configs of a menu by falling loss, the last for whole texts.

    Raises:
        ValueError: one is for more than a whole text, or not of hidden="streaming".
    """
    whole = AstroConfig(hidden="streaming", entries=_whole(num_tokens))
    for number, config in enumerate(menu):
        if config.hidden != "streaming":
            raise ValueError(f"menu[{number}]: hidden={config.hidden!r} beside streaming memories; needs 'streaming'")
        if config.entries > whole.entries:
            raise ValueError(f"menu[{number}]: entries={config.entries}; these texts have at most {num_tokens} tokens")
    return [*(config for config in dict.fromkeys(menu) if config.entries < whole.entries), whole]


def check_menu(menu: Sequence[AstroConfig]) -> list[AstroConfig]:
    """The distinct configs of a menu, exact attention last.

    Raises:
        ValueError: one has weights of its own, so that heads cannot differ.
    """
    for number, config in enumerate(menu):
        if config.hidden not in MIXABLE:
            raise ValueError(f"menu[{number}]: hidden={config.hidden!r} has weights; must be {', '.join(MIXABLE)}")
    return [*dict.fromkeys(config for config in menu if config.hidden != "exact"), EXACT]
