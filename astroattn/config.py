"""The configuration: one frozen dataclass of plain values, whose `dataclasses.asdict` is its JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

HIDDEN = ("hebbian", "random", "learned", "none", "exact")
MIXABLE = ("hebbian", "none", "exact")  # without weights of their own, so that the heads of a module may differ
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
_LEAST = {
    "num_hidden": 1,
    "near": 0,
    "exact_keys": 0,
    "exact_queries": 0,
    "tile": 1,
    "steps": 0,
    "groups": 1,
    "seed": 0,
}


@dataclass(frozen=True, kw_only=True)
class AstroConfig:
    """What an `AstrocyteAttention` does with its queries, keys and values.

    The keys of a query fall into two parts. The near field of its tile, and the exact keys that the tile has chosen,
    are attended with exp(q.k) as in softmax; all other keys are read through the astrocyte and its hidden layer.

    Args:
        hidden: the hidden layer. "hebbian" learns its weights from the keys being read; "random" draws them once,
            the paper's network; "learned" has weights to be trained, with phi = exp(W x); "none" has no far field (a
            control: the near field alone); "exact" is softmax attention itself, whatever else is set.
        num_hidden: m, the number of hidden neurons per head.
        near: the near field of a tile, in tokens: a run of tokens in a sequence, a rectangle in a patch grid. At least
            the sequence length gives softmax attention. 0 turns tiles off, and exact keys with them: every key is
            read through the hidden layer.
        exact_keys: keys beyond the near field that each tile attends exactly, chosen by content.
        exact_queries: number of leading tokens of a sequence that attend exactly to all, and that all attend to
            exactly. In a patch grid these are its prefix tokens (CLS, registers) whatever is set here; without tiles
            (near 0) a grid is a sequence.
        tile: tokens per tile of queries, 2 x 2 patches for 4.
        steps: Hebbian learning steps of the "hebbian" layer (k-means iterations).
        groups: most groups of tiles in a sequence that choose their own exact keys; bounds the time to groups * N.
        activation: phi of the "random" layer, one of `ACTIVATIONS`; "constant" gives uniform attention.
        orthogonal: draw the weights of the "random" layer, and those that the "learned" layer starts with, orthogonal
            in blocks of head_dim, not independent.
        seed: seed of these weights.
        backend: what computes it. "torch" is plain PyTorch, "triton" the kernels for a GPU, "native" those for a CPU;
            "auto" takes the fastest that can run. They differ by rounding only.

    Raises:
        TypeError, ValueError: a value of the wrong type or outside its range, named.
    """

    hidden: str = "hebbian"
    num_hidden: int = 16
    near: int = 4
    exact_keys: int = 32
    exact_queries: int = 0
    tile: int = 4
    steps: int = 2
    groups: int = 256
    activation: str = "positive_exp"
    orthogonal: bool = True
    seed: int = 0
    backend: str = "auto"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value).__name__ != field.type:  # bool is an int, but not a number of neurons
                raise TypeError(f"{field.name}: {value!r} of type {type(value).__name__}; expected {field.type}")
            if field.name in _LEAST and value < _LEAST[field.name]:
                raise ValueError(f"{field.name}: {value}; must be at least {_LEAST[field.name]}")
        for name, allowed in (("hidden", HIDDEN), ("activation", ACTIVATIONS), ("backend", BACKENDS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r}; must be one of {', '.join(allowed)}")
        if self.seed >= 2**64:
            raise ValueError(f"seed: {self.seed}; must be less than 2**64")
        if self.hidden == "none" and self.near == 0:
            raise ValueError("near: 0 with hidden='none' leaves a query no key at all; must be at least 1")


def check_heads(configs: Iterable[AstroConfig]) -> tuple[AstroConfig, ...]:
    """The configs of the heads of one module, one per head, where heads may have these side by side.

    Raises:
        TypeError: one of them is no AstroConfig.
        ValueError: there are none; they differ and one has a hidden layer with weights, which all heads share.
    """
    heads = tuple(configs)
    for head, config in enumerate(heads):
        if not isinstance(config, AstroConfig):
            raise TypeError(f"config: {type(config).__name__} for head {head}; expected AstroConfig")
    if not heads:
        raise ValueError("config: no heads; needs one AstroConfig for each")
    own = next((config.hidden for config in heads if config.hidden not in MIXABLE), None)
    if own is not None and len(set(heads)) > 1:
        raise ValueError(f"config: heads that differ must be of {', '.join(MIXABLE)}; hidden={own!r} has weights")
    return heads
