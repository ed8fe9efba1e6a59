"""A situation as plain values: one line of words, drawn by hypothesis, and made as simple as it still goes wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from eval.situations.models import CAUSAL, MODELS

MASKS = (
    "none",
    "ones",
    "right",
    "left",
    "both",
    "holes",
    "row",  # the last sequence has no real token
    "bool",
    "float",
    "bool_keys",  # four dimensions from here on: [B, 1, 1, N] and [B, 1, N, N]
    "float_keys",
    "dense_bool",
    "dense_float",
    "packed_bool",  # two documents side by side
    "packed_float",
    "bias",
    "bias_padded",
)
DTYPES = ("float32", "float64", "bfloat16", "float16", "autocast")
WRAPPERS = (
    "none",
    "deepcopy",
    "pickle",
    "functional",
    "data_parallel",
    "ddp",
    "fsdp",
    "offload",
    "compile",
    "aot",
    "compile_inside",
    "peft",
    "checkpointing",
    "checkpoint_around",
    "parametrized",
    "moved",
    "saved",
    "threads",
    "export",
)
CONFIGS = ("full", "default", "short", "static", "static_near", "learned")


@dataclass(frozen=True)
class Situation:
    """A model and how it is patched, wrapped and called. The first choice of everything is the simplest."""

    model: str
    tokens: int = 7  # of a text
    batch: int = 2
    mask: str = "none"
    dtype: str = "float32"
    wrapper: str = "none"
    order: str = "patch_first"  # or the wrapper
    training: bool = False
    grad: str = "no_grad"
    config: str = "full"
    where: str = "all"
    patched_under: str = "plain"

    def __str__(self) -> str:
        """The model, and what is not as in the simplest situation."""
        simplest = Situation(self.model)
        names = [each.name for each in fields(self)]
        changed = [name for name in names if getattr(self, name) != getattr(simplest, name)]
        return " ".join(f"{name}={getattr(self, name)}" for name in ("model", *changed))

    @classmethod
    def parse(cls, line: str) -> Situation:
        """The situation of a line. Raises ValueError where it is none."""
        words = dict(word.partition("=")[::2] for word in line.split())
        kinds = {each.name: CHOICES[each.name] for each in fields(cls)}
        values = {}
        for name, word in words.items():
            if name not in kinds:
                raise ValueError(f"situation: {name!r} is none of {', '.join(kinds)}")
            allowed = {str(each): each for each in kinds[name]}
            if word not in allowed:
                raise ValueError(f"situation: {name}={word}; must be one of {', '.join(allowed)}")
            values[name] = allowed[word]
        if "model" not in values:
            raise ValueError("situation: needs model=NAME")
        return cls(**values)


CHOICES: dict[str, tuple] = {
    "model": tuple(MODELS),
    "tokens": (7, *range(1, 164)),
    "batch": (2, 1, 3, 0),
    "mask": MASKS,
    "dtype": DTYPES,
    "wrapper": WRAPPERS,
    "order": ("patch_first", "wrap_first"),
    "training": (False, True),
    "grad": ("no_grad", "grad", "inference_mode"),
    "config": CONFIGS,
    "where": ("all", "first", "last"),
    "patched_under": ("plain", "inference_mode", "no_grad", "autocast", "default_float64", "default_meta"),
}


def draw(count: int, seed: int) -> list[Situation]:
    """So many situations, the same for the same seed in a new process.

    In others hypothesis also tries constants of the code that is loaded.
    """
    lengths = st.one_of(st.sampled_from([1, 2, 7, 33, 130, 163]), st.integers(1, 163))
    strategies = {name: st.sampled_from(values) for name, values in CHOICES.items()} | {"tokens": lengths}
    strategies["batch"] = st.sampled_from((2, 1, 3, 2, 1, 3, 2, 0))  # few run on none
    found: dict[Situation, None] = {}  # each once

    @seeded(seed)
    @settings(
        max_examples=3 * count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.builds(Situation, **strategies).filter(_can_be_patched))
    def note(situation: Situation) -> None:
        found[situation] = None

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        note()
    return list(found)[:count]


def _can_be_patched(situation: Situation) -> bool:
    """Not where every causal module is refused: it takes a static hidden layer or a full near field."""
    return situation.model not in CAUSAL or situation.config not in ("default", "short")


def simplify(situation: Situation, fails: Callable[[Situation], bool]) -> Situation:
    """The simplest situation on the way to `Situation(model)`, one change at a time, that still fails."""
    simplest = Situation(situation.model)
    changed = True
    while changed:
        changed = False
        for each in fields(situation):
            if getattr(situation, each.name) == getattr(simplest, each.name):
                continue
            simpler = replace(situation, **{each.name: getattr(simplest, each.name)})
            if fails(simpler):
                situation, changed = simpler, True
    return situation
