"""The configuration: its ranges, its types, and its way through JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest
from core_cases import BIDIRECTIONAL
from hypothesis import given, settings
from hypothesis import strategies as st

from astroattn import AstroConfig
from astroattn.config import ACTIVATIONS, BACKENDS, BY_LENGTH, HALF_BY_LENGTH, HIDDEN, STATIC, TILES

LEAST = {
    "num_hidden": 1,
    "near": 0,
    "exact_keys": 0,
    "exact_queries": 0,
    "tile": 1,
    "steps": 0,
    "entries": 16,
    "seed": 0,
}
FREE = {  # may be left to the length
    "num_hidden": (BY_LENGTH, HALF_BY_LENGTH),
    "near": (BY_LENGTH,),
    "exact_keys": (BY_LENGTH, HALF_BY_LENGTH),
    "tile": (BY_LENGTH,),
}
STATIC_LEAST = {"num_hidden": 16, "near": 0, "exact_keys": 0}
TYPES = {
    field.name: {"int": int, "float": float, "str": str, "bool": bool}[field.type]
    for field in dataclasses.fields(AstroConfig)
}


def test_every_number_has_a_range() -> None:
    assert {name for name, kind in TYPES.items() if kind is int} == set(LEAST)


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {name: st.one_of(st.integers(least, 10**6), *map(st.just, FREE.get(name, ()))) for name, least in LEAST.items()}
        | {"hidden": st.sampled_from(HIDDEN), "activation": st.sampled_from(ACTIVATIONS), "orthogonal": st.booleans()}
        | {"backend": st.sampled_from(BACKENDS), "tiles": st.sampled_from(TILES)}
        | {"key_error": st.one_of(st.just(-1.0), st.floats(0, 10))}
    )
)
def test_json_gives_the_same_configuration(values: dict) -> None:
    if values["hidden"] == "none" and values["near"] == values["exact_keys"] == 0:
        values["near"] = 1
    if values["hidden"] in (*STATIC, "none"):
        values["key_error"] = min(values["key_error"], 0.0)
    if values["hidden"] == "streaming":
        values["entries"] -= values["entries"] % 8
        values["near"] = min(values["near"], values["entries"] - 8)
    config = AstroConfig(**values)
    if config.hidden == "streaming" and values["near"] == BY_LENGTH:
        values["near"] = config.entries // 2
    if config.hidden in STATIC:  # nothing is left to the length but tiles
        values |= {name: least for name, least in STATIC_LEAST.items() if values[name] < 0}
    assert dataclasses.asdict(config) == values
    assert AstroConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert len({config, AstroConfig(**values)}) == 1  # hashable


@pytest.mark.parametrize("name", LEAST)
def test_numbers_below_their_range(name: str) -> None:
    assert getattr(AstroConfig(**{name: LEAST[name]}), name) == LEAST[name]
    free = "".join((", or -1: by the length", ", or -2: half of that")[: len(FREE.get(name, ()))])
    for value in {LEAST[name] - 1, -1, -2, -3, -(10**9)} - set(FREE.get(name, ())):
        with pytest.raises(ValueError, match=rf"^{name}: {value}; must be at least {LEAST[name]}{free}$"):
            AstroConfig(**{name: value})
    if name in FREE:
        assert getattr(AstroConfig(), name) == BY_LENGTH


@pytest.mark.parametrize("name", TYPES)
def test_values_of_another_type(name: str) -> None:
    for value in (1, 1.0, "1", True, None, [1], b"cosine"):
        if type(value) is not TYPES[name] and (TYPES[name], value) != (float, 1):
            with pytest.raises(TypeError, match=rf"^{name}: .* of type {type(value).__name__}; expected"):
                AstroConfig(**{name: value})


def test_errors_of_keys() -> None:
    assert AstroConfig(key_error=1).key_error == 1.0
    assert [AstroConfig(**x).millionths for x in ({}, {"exact_keys": -2}, {"exact_keys": 9})] == [-20_000, -40_000, 0]
    assert AstroConfig(exact_keys=9, key_error=0.5).millionths == 500_000
    assert AstroConfig(hidden="none").millionths == AstroConfig(hidden="learned").millionths == 0
    for value in (-0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"^key_error: {value}; must be at least 0, or -1: by the length$"):
            AstroConfig(key_error=value)
    for hidden in (*STATIC, "none"):
        with pytest.raises(ValueError, match=f"^key_error: 0.1 with hidden='{hidden}'; needs hidden='hebbian'$"):
            AstroConfig(hidden=hidden, key_error=0.1)


@pytest.mark.parametrize("name", ["hidden", "tiles", "activation", "backend"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: 'hebb'; must be one of .*, "):
        AstroConfig(**{name: "hebb"})


def test_seeds_are_those_of_a_generator() -> None:
    assert AstroConfig(seed=2**64 - 1).seed == 2**64 - 1
    with pytest.raises(ValueError, match=r"^seed: "):
        AstroConfig(seed=2**64)


def test_no_key_at_all() -> None:
    with pytest.raises(ValueError, match=r"^near: 0 with exact_keys=0 and hidden='none'"):
        AstroConfig(hidden="none", near=0, exact_keys=0)
    assert AstroConfig(hidden="none", near=0).exact_keys == BY_LENGTH


@pytest.mark.parametrize("hidden", STATIC)
def test_static_layers_have_weights_before_any_sequence(hidden: str) -> None:
    config = AstroConfig(hidden=hidden)
    assert {name: getattr(config, name) for name in STATIC_LEAST} == STATIC_LEAST
    assert AstroConfig(hidden=hidden, num_hidden=7, near=3).near == 3


def test_is_frozen_and_named() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        AstroConfig().near = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        AstroConfig("random")  # type: ignore[misc]
    with pytest.raises(TypeError, match="nearfield"):
        AstroConfig(nearfield=3)  # type: ignore[call-arg]


def test_controls_are_configurations() -> None:
    for config in BIDIRECTIONAL.values():
        near = dataclasses.replace(config, hidden="none", near=max(config.near, 1), exact_keys=0)
        assert AstroConfig(**dataclasses.asdict(near)) == near
