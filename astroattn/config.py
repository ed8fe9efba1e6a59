"""The configuration: one frozen dataclass of plain values, whose `dataclasses.asdict` is its JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from math import inf
from types import MappingProxyType
from typing import ClassVar, Literal

from astroattn.suggestions import suggest

HIDDEN = ("hebbian", "random", "learned", "streaming", "none", "exact")
MIXABLE = ("hebbian", "none", "exact")  # without weights of their own, so that the heads of a module may differ
Preset = Literal["fast", "balanced", "exact"]
CROSSING = ("hebbian", "none")  # whose tiles may read the keys of another sequence
BACKENDS = ("auto", "torch", "triton", "native")
ACTIVATIONS = (
    "positive_exp",
    "cosine",
    "positive_cosine",
    "clipped_sine",
    "linear",
    "truncated_exp",
    "elu1",
    "constant",
    "exp",
)
TILES = ("content", "position")
STATIC = ("random", "learned")  # with weights that no sequence changes
BY_LENGTH = -1  # of a number that the length of the sequence decides
HALF_BY_LENGTH = -2  # half of that
KEY_ERROR = 0.02  # where exact keys are left to the length
STATIC_HIDDEN = 16  # neurons of a static layer that is not told how many
ENTRIES_STEP, LEAST_ENTRIES = 8, 16  # of a streaming memory
_LEAST = {
    "num_hidden": 1,
    "near": 0,
    "exact_keys": 0,
    "key_error": 0,
    "exact_queries": 0,
    "tile": 1,
    "steps": 0,
    "entries": LEAST_ENTRIES,
    "seed": 0,
}
_BY_LENGTH = {
    "num_hidden": (BY_LENGTH, HALF_BY_LENGTH),
    "near": (BY_LENGTH,),
    "exact_keys": (BY_LENGTH, HALF_BY_LENGTH),
    "key_error": (BY_LENGTH,),
    "tile": (BY_LENGTH,),
}


@dataclass(frozen=True, kw_only=True)
class AstroConfig:
    """What an `AstrocyteAttention` does with its queries, keys and values.

    Queries are cut into tiles, and those into sub-tiles of four. A sub-tile attends some keys with exp(q.k) as in
    softmax; all other keys are read through the astrocyte and its hidden layer. `BY_LENGTH` (-1) leaves a number to the
    length n of the sequence: the default's tiles, neurons and exact keys grow as sqrt(n), and up to 128 tokens it is
    softmax attention. `HALF_BY_LENGTH` (-2) takes half of what it says, for neurons and exact keys.

    Args:
        hidden: the hidden layer. "hebbian" learns its weights from the keys being read; "random" draws them once,
            the paper's network; "learned" has weights to be trained, with phi = exp(W x); "streaming" is for causal
            attention, a memory of `entries` keys and values into which older tokens are merged as new ones come, and
            takes `entries` and `near` alone; "none" has no far field (a control: the exact keys alone); "exact" is
            softmax attention itself, whatever else is set.
        num_hidden: m, the number of hidden neurons per head. By length: about 1.45 sqrt(n), in eights, at most 64; for
            a static layer ("random" or "learned") 16.
        near: the near field, in tokens around each query: a run of tokens in a sequence, a rectangle in a patch grid.
            A sub-tile attends exactly to those of its four queries. For causal attention the latest tokens. By length:
            about 0.15 sqrt(n), 3 to 4; none for a static layer; half the entries for a streaming one. Queries of
            another sequence (cross attention) have none.
        exact_keys: keys beyond the near field that each sub-tile attends exactly, chosen by content; the most, where
            `key_error` decides. By length: about 7.2 sqrt(n), at most 384 and a quarter of all; none for a static
            layer, and without a hidden layer about 2.4 sqrt(n), at most 128.
        key_error: times sqrt(n), how far off a key may be read through the astrocyte: its share of a sub-tile's
            attention times the error of its weight and value, relative to how far values are apart, as expected. What
            is expected to be farther off is attended exactly. So n errors that have nothing to do with each other add
            up to so much at most. 0: as many are attended exactly as `exact_keys` says. By length (-1): 0.02 where
            `exact_keys` is left to the length (0.04: half of it), below 400 tokens n / 400 of that; else 0.
        exact_queries: number of leading tokens of a sequence that attend exactly to all, and that all attend to
            exactly. In a patch grid these are its prefix tokens (CLS, registers) whatever is set here; for a static
            layer alone (near and exact_keys 0) a grid is a sequence. None in cross attention.
        tiles: "content" puts queries into a tile that ask for the same, wherever they stand; neighbours, where an
            input's neighbours ask for the same more nearly. "position" always puts neighbours.
        tile: queries per tile, in fours. By length: about sqrt(n), and more where there would be more than 128 tiles.
        steps: Hebbian learning steps of the "hebbian" layer (k-means iterations).
        entries: of a "streaming" memory, for each key head: a multiple of 8. Up to so many tokens it is softmax
            attention.
        activation: phi of the "random" layer, one of `ACTIVATIONS`; "constant" gives uniform attention.
        orthogonal: draw the weights of the "random" layer, and those that the "learned" layer starts with, orthogonal
            in blocks of head_dim, not independent.
        seed: seed of these weights.
        backend: what computes it. "torch" is plain PyTorch, "triton" the kernels for a GPU, "native" those for a CPU;
            "auto" takes the fastest that can run. They differ by rounding, which may choose another of two keys
            that are worth almost the same.

    Raises:
        TypeError, ValueError: a value of the wrong type or outside its range, named.
    """

    hidden: str = "hebbian"
    num_hidden: int = BY_LENGTH
    near: int = BY_LENGTH
    exact_keys: int = BY_LENGTH
    key_error: float = float(BY_LENGTH)
    exact_queries: int = 0
    tiles: str = "content"
    tile: int = BY_LENGTH
    steps: int = 2
    entries: int = 128
    activation: str = "positive_exp"
    orthogonal: bool = True
    seed: int = 0
    backend: str = "auto"
    # What `key_error` comes to, in millionths, as `Budget` takes it: a graph takes a number that is not whole for one
    # that it does not know.
    millionths: ClassVar[int] = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "float" and type(value) is int:
                object.__setattr__(self, field.name, value := float(value))
            if type(value).__name__ != field.type:  # bool is an int, but not a number of neurons
                raise TypeError(f"{field.name}: {value!r} of type {type(value).__name__}; expected {field.type}")
            by_length = _BY_LENGTH.get(field.name, ())
            if field.name in _LEAST and not _LEAST[field.name] <= value < inf and value not in by_length:
                or_else = f", or {BY_LENGTH}: by the length" if by_length else ""
                or_else += f", or {HALF_BY_LENGTH}: half of that" if HALF_BY_LENGTH in by_length else ""
                raise ValueError(f"{field.name}: {value}; must be at least {_LEAST[field.name]}{or_else}")
        choices = (("hidden", HIDDEN), ("tiles", TILES), ("activation", ACTIVATIONS), ("backend", BACKENDS))
        for name, allowed in choices:
            if (value := getattr(self, name)) not in allowed:
                meant = suggest(value, allowed)
                raise ValueError(f"{name}: {value!r}; must be one of {', '.join(allowed)}{meant}")
        if self.seed >= 2**64:
            raise ValueError(f"seed: {self.seed}; must be less than 2**64")
        if self.hidden == "none" and self.near == 0 and self.exact_keys == 0:
            raise ValueError("near: 0 with exact_keys=0 and hidden='none' leaves a query no key at all; needs one")
        if self.key_error > 0 and self.hidden in (*STATIC, "none"):
            raise ValueError(f"key_error: {self.key_error} with hidden={self.hidden!r}; needs hidden='hebbian'")
        if self.hidden == "streaming":
            if self.entries % ENTRIES_STEP:
                raise ValueError(f"entries: {self.entries}; must be a multiple of {ENTRIES_STEP}")
            if self.near == BY_LENGTH:
                object.__setattr__(self, "near", self.entries // 2)
            if self.near > (most := self.entries - ENTRIES_STEP):
                raise ValueError(f"near: {self.near}; entries={self.entries} has room for at most {most} newest tokens")
        object.__setattr__(self, "millionths", round(1e6 * self._decided_key_error()))
        if self.hidden in STATIC:  # its weights are there before any sequence
            for name, value in (("num_hidden", STATIC_HIDDEN), ("near", 0), ("exact_keys", 0)):
                if getattr(self, name) < 0:
                    object.__setattr__(self, name, value)

    def _decided_key_error(self) -> float:
        """0 where there is nothing else to read a key through, negative where the length has a part in it."""
        if self.hidden != "hebbian":
            return 0.0
        if self.key_error != BY_LENGTH:
            return self.key_error
        return KEY_ERROR * min(self.exact_keys, 0)


# "fast" has half of the default's neurons, and keys that may be off by twice as much. "exact" is what its name says up
# to 320 tokens; in longer sequences it is near to softmax attention, which hidden="exact" is.
PRESETS: Mapping[str, AstroConfig] = MappingProxyType(
    {
        "fast": AstroConfig(num_hidden=HALF_BY_LENGTH, exact_keys=HALF_BY_LENGTH),
        "balanced": AstroConfig(),
        "exact": AstroConfig(num_hidden=64, exact_keys=320, key_error=0.005),
    }
)


def as_config(config: AstroConfig | str | None, argument: str = "config") -> AstroConfig:
    """The config that is meant by a word of `PRESETS`, or by None: the default.

    Raises:
        TypeError: something else, given as this argument. ValueError: another word.
    """
    if config is None or isinstance(config, AstroConfig):
        return config or AstroConfig()
    if not isinstance(config, str):
        raise TypeError(f"{argument}: expected an AstroConfig, a Plan, a word or None, got {type(config).__name__}")
    if config not in PRESETS:
        raise ValueError(f"{argument}: {config!r}; must be one of {', '.join(PRESETS)}{suggest(config, PRESETS)}")
    return PRESETS[config]


def is_tiled(config: AstroConfig) -> bool:
    """Whether queries are cut into tiles: always, but for a static hidden layer alone."""
    return config.hidden not in STATIC or config.near > 0 or config.exact_keys > 0


def check_heads(configs: Iterable[AstroConfig]) -> tuple[AstroConfig, ...]:
    """The configs of the heads of one module, one per head, where heads may have these side by side.

    Raises:
        TypeError: one of them is no AstroConfig.
        ValueError: there are none; they differ and one has a hidden layer with weights, which all heads share, or a
            streaming memory, and not all do.
    """
    heads = tuple(configs)
    for head, config in enumerate(heads):
        if not isinstance(config, AstroConfig):
            raise TypeError(f"config: {type(config).__name__} for head {head}; expected AstroConfig")
    if not heads:
        raise ValueError("config: no heads; needs one AstroConfig for each")
    own = next((config.hidden for config in heads if config.hidden not in MIXABLE), None)
    if own is not None and len(set(heads)) > 1 and {config.hidden for config in heads} != {"streaming"}:
        what = "is of whole modules" if own == "streaming" else "has weights"
        raise ValueError(f"config: heads that differ must be of {', '.join(MIXABLE)}; hidden={own!r} {what}")
    return heads
