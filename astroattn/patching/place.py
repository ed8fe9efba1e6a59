"""Where in a model the modules of a record are: at the same names, or with the same encoder below another name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from math import inf
from typing import Any

from torch import nn

from astroattn.patching.record import class_name, join, of_classes
from astroattn.patching.survey import survey


def find_place(model: nn.Module, record: Mapping[str, Any], source: str) -> tuple[str, dict[str, str]]:
    """The name of the part of a model that a record is of, and the full names there of the record's modules.

    That part has every module of these classes that the model of the record had, and no other. What the modules are
    called above it may differ: that is cut off the record's names as far as is needed, and put before them. Names that
    fit as they are come first.

    Raises:
        ValueError: no part fits, or several do; the message says what differs, or which they are.
    """
    rows = {row["name"]: row for row in record["modules"]}
    theirs = {name: row["class"] for name, row in rows.items()} | dict(record["exact"])
    here = of_classes(model, set(theirs.values()))
    differences: list[tuple[float, str]] = []
    for stem in _stems(list(rows), list(theirs)):
        short = {_cut(name, stem): kind for name, kind in theirs.items() if _is_below(name, stem)}
        fits: dict[str, dict[str, str]] = {}
        for root in _roots(next(iter(short)), here):
            wanted = {join(root, name): kind for name, kind in short.items()}
            if difference := _difference(model, wanted, {name for name in here if _is_below(name, root)}):
                differences.append(difference)
            else:
                fits[root] = {name: join(root, _cut(name, stem)) for name in rows}
        if len(fits) > 1:
            fits = {root: names for root, names in fits.items() if _has_shapes(model, rows, names)} or fits
        if len(fits) > 1 and "" not in fits:
            raise ValueError(
                f"{source}: {type(model).__name__} has {len(fits)} parts that this may belong to "
                f"({', '.join(map(repr, list(fits)[:4]))}); give the one that is meant, as "
                f"model.get_submodule({next(iter(fits))!r})"
            )
        if fits:
            root = "" if "" in fits else next(iter(fits))
            return root, fits[root]
    _, nearest = min(differences, key=lambda each: each[0])
    raise ValueError(f"{source}: {nearest}")


def _difference(model: nn.Module, wanted: Mapping[str, str], here: set[str]) -> tuple[float, str] | None:
    """How far a part of a model is from what is wanted, and how it differs; None where it does not."""
    modules = dict(model.named_modules())
    if missing := [name for name in wanted if name not in modules]:
        few = f"{len(missing)} of {len(wanted)} are missing"
        far = inf if len(missing) == len(wanted) else len(missing)
        return far, f"the model has no module {missing[0]!r} ({few})"
    if wrong := [name for name in wanted if class_name(modules[name]) != wanted[name]]:
        name = wrong[0]
        return len(wrong), f"{name} was a {wanted[name]}; here it is a {class_name(modules[name])}"
    if more := sorted(here - wanted.keys()):
        few = f"{len(more)} more than the {len(wanted)} that were saved"
        return len(more), f"the model has also {more[0]!r} ({few}): it is of another depth"
    return None


def _has_shapes(model: nn.Module, rows: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]) -> bool:
    """Whether modules have the heads and head dimension that a record says, as far as can be told."""
    found = {each.name: each for each in survey(model)}
    for name, row in rows.items():
        each = found.get(names[name])
        shape = None if each is None or each.front_end is None else each.front_end.shape(each.module)
        if shape is not None and shape != (len(row["heads"]), row["head_dim"]):
            return False
    return True


def _stems(patched: Sequence[str], every: Sequence[str]) -> list[str]:
    """What may be cut off the names, the least first: shared by all that are patched, and above their list of layers.

    A name that goes on with a number is a list of layers: it is cut only where nothing else is in the list.
    """
    parts = [name.split(".") for name in patched]
    shared = [each[0] for each in takewhile(lambda each: len(set(each)) == 1, zip(*parts, strict=False))]
    numbers = [place for place, part in enumerate(parts[0]) if part.isdigit()]
    most = numbers[-1] - 1 if numbers else len(parts[0]) - 1
    stems = [""]
    for depth in range(1, min(len(shared), most) + 1):
        stem = ".".join(shared[:depth])
        beside = [name for name in every if _is_below(name, stems[-1]) and not _is_below(name, stem)]
        if shared[depth - 1].isdigit() and beside:
            break
        stems.append(stem)
    return stems


def _roots(name: str, here: Mapping[str, str]) -> list[str]:
    """The parts of a model that have a module of that name; the model itself is asked in any case."""
    ends = (each for each in here if not name or each.endswith(f".{name}"))
    return ["", *(each.removesuffix(name).rstrip(".") for each in ends)]


def _is_below(name: str, root: str) -> bool:
    return not root or name == root or name.startswith(f"{root}.")


def _cut(name: str, stem: str) -> str:
    return name[len(stem) :].lstrip(".")
