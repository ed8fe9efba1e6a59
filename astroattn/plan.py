"""`Plan`: what every head of a model does, what was found out about it, and the promise that comes with it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from pathlib import Path
from typing import Any

from astroattn.config import AstroConfig, check_heads
from astroattn.files import write_json
from astroattn.tables import Block, Table, render

FORMAT = 1
METRICS = {
    "top1": "the share of items that keep the original's first choice",
    "kl": "the mean KL(original || patched) of the predictions, in nats",
    "cosine": "the mean cosine with the original's embedding",
    "neighbour": "the share of items that keep their nearest other item",
}
FALLING = ("kl",)  # metrics of which less is better


@dataclass(frozen=True, kw_only=True)
class Promise:
    """How true a patched model is to the original, measured on items that were not used for choosing.

    Args:
        metric: a name in `METRICS`, or that of a function of the user.
        tolerance: what was asked for; None where the cost was.
        value: the metric of the items. low, high: each a one-sided bound of its expectation, of confidence `level`.
        items: their number.
    """

    metric: str
    tolerance: float | None
    value: float
    low: float
    high: float
    level: float
    items: int

    @property
    def kept(self) -> bool | None:
        """Whether the bound that matters is within the tolerance; None where there is none."""
        if self.tolerance is None:
            return None
        return self.high <= self.tolerance if self.metric in FALLING else self.low >= self.tolerance

    def __str__(self) -> str:
        falling = self.metric in FALLING
        what = METRICS.get(self.metric, f"the mean of {self.metric}")
        bound = f"{'at most' if falling else 'at least'} {self.high if falling else self.low:.4f}"
        text = f"{what} is {bound} with {self.level:.0%} confidence ({self.value:.4f} on {self.items} unseen items)"
        if self.tolerance is None:
            return text
        return f"{text}; asked for: {'at most' if falling else 'at least'} {self.tolerance:g}"


@dataclass(frozen=True)
class HeadShare:
    """What one head costs, relative to softmax attention, and its shares of the plan's cost and predicted error."""

    cost: float
    cost_share: float
    error_share: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One `AstroConfig` for every head of a model; `patch(model, plan)` does what it says.

    Args:
        model: the name of the model's class.
        modules: by the name of an attention module, the config of each of its heads. Modules not named stay exact.
        shares: by the same names, what calibration found for each head; empty where nothing was measured.
        cost: of the whole plan, products over those of softmax attention.
        promise: what was verified.
        provenance: seed, items, tokens, versions; plain values.
        notes: what a reader must know.

    Raises:
        TypeError, ValueError: a field that does not fit, named.
    """

    model: str
    modules: Mapping[str, tuple[AstroConfig, ...]]
    shares: Mapping[str, tuple[HeadShare, ...]] = field(default_factory=dict)
    cost: float | None = None
    promise: Promise | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.modules:
            raise ValueError("modules: none; a plan needs at least one attention module")
        for name, heads in self.modules.items():
            try:
                check_heads(heads)
            except (TypeError, ValueError) as error:
                raise type(error)(f"modules: {name!r}: {error}") from None
        if self.shares:
            mine, theirs = ({n: len(heads) for n, heads in rows.items()} for rows in (self.modules, self.shares))
            if mine != theirs:
                raise ValueError("shares: must have the modules and heads of the plan, or be empty")

    @property
    def entries(self) -> float | None:
        """The mean number of entries of a head's streaming memory; None where heads have other configs."""
        configs = [config for heads in self.modules.values() for config in heads]
        if any(config.hidden != "streaming" for config in configs):
            return None
        return sum(config.entries for config in configs) / len(configs)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; every distinct config stands there once."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            ValueError: the file cannot be read, or a field is missing, unknown or wrong; both are named.
        """
        source = f"plan: {str(path)!r}"
        try:
            table = json.loads(Path(path).read_text("utf-8"))
        except OSError as error:
            raise ValueError(f"{source}: cannot read it: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"{source}: is not JSON: {error}") from None
        try:
            return cls.from_dict(table)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        configs, heads = number_configs(self.modules.values())
        rows: list[dict[str, Any]] = []
        for name, numbers in zip(self.modules, heads, strict=True):
            mine = self.shares.get(name, ())
            shares = {field: [getattr(share, field) for share in mine] for field in _SHARES if mine}
            rows.append({"name": name, "heads": numbers} | shares)
        return {
            "format": FORMAT,
            "model": self.model,
            "cost": self.cost,
            "promise": None if self.promise is None else asdict(self.promise),
            "notes": list(self.notes),
            "provenance": dict(self.provenance),
            "configs": configs,
            "modules": rows,
        }

    @classmethod
    def from_dict(cls, table: Any) -> Plan:
        """The plan of which `to_dict` gave these values.

        Raises:
            TypeError, ValueError: a field is missing, unknown or wrong; it is named.
        """
        check_fields(table, _FIELDS)
        if table["format"] != FORMAT:
            raise ValueError(f"format: {table['format']}; this version of astroattn reads {FORMAT}")
        configs = read_configs(table["configs"])
        modules: dict[str, tuple[AstroConfig, ...]] = {}
        shares: dict[str, tuple[HeadShare, ...]] = {}
        for number, row in enumerate(table["modules"]):
            where = f"modules[{number}]"
            measured = isinstance(row, dict) and any(name in row for name in _SHARES)
            check_fields(row, _ROW | dict.fromkeys(_SHARES if measured else (), (list,)), where)
            modules[row["name"]] = pick_configs(configs, row["heads"], f"{where}.heads")
            if measured:
                lists = [_numbers(row[name], len(row["heads"]), f"{where}.{name}") for name in _SHARES]
                shares[row["name"]] = tuple(HeadShare(*values) for values in zip(*lists, strict=True))
        if len(modules) < len(table["modules"]):
            raise ValueError("modules: two of them have one name")
        promise = table["promise"]
        if promise is not None:
            check_fields(promise, _PROMISE, "promise")
        return cls(
            model=table["model"],
            modules=modules,
            shares=shares,
            cost=table["cost"],
            promise=None if promise is None else Promise(**promise),
            provenance=table["provenance"],
            notes=tuple(str(note) for note in table["notes"]),
        )

    def __str__(self) -> str:
        return render(self.blocks())

    def blocks(self) -> list[Block]:
        """What is printed of it, for `astroattn.tables`."""
        configs = list(dict.fromkeys(config for heads in self.modules.values() for config in heads))
        names = {config: _letters(number) for number, config in enumerate(configs)}
        count = sum(len(heads) for heads in self.modules.values())
        cost = "" if self.cost is None else f", {self.cost:.1%} of softmax's products"
        size = "" if self.entries is None else f", {self.entries:.4g} entries in the mean"
        rows = [row for name in self.modules for row in self._rows(name, names)]
        titles = ("module", "does", "heads", "cost", "of all cost", "of all error")
        lines: list[Block] = [
            f"plan for {self.model}: {len(self.modules)} modules, {count} heads{size}{cost}",
            Table(titles[: len(rows[0])], rows, names=0),
        ]
        for config, letter in names.items():
            used = sum(heads.count(config) for heads in self.modules.values())
            lines.append(f"{letter}: {_describe(config)} ({used} head{'s' if used > 1 else ''})")
        if self.promise is not None:
            lines.append(f"promise: {self.promise}")
        return lines + [f"note: {note}" for note in self.notes]

    def _rows(self, name: str, names: Mapping[AstroConfig, str]) -> list[tuple[str, ...]]:
        """One line of the table for each distinct config of a module."""
        rows: list[tuple[str, ...]] = []
        heads = self.modules[name]
        for config in dict.fromkeys(heads):
            mine = [head for head, each in enumerate(heads) if each == config]
            cells = [names[config], _ranges(mine)]
            if self.shares:
                shares = [self.shares[name][head] for head in mine]
                cost = sum(share.cost for share in shares) / len(shares)
                sums = (sum(s.cost_share for s in shares), sum(s.error_share for s in shares))
                cells += [f"{part:.1%}" for part in (cost, *sums)]
            rows.append((name or "(the model itself)", *cells))
        return rows


_NUMBER = (float, int)
_FIELDS: dict[str, tuple[type, ...]] = {
    "format": (int,),
    "model": (str,),
    "cost": (*_NUMBER, type(None)),
    "promise": (dict, type(None)),
    "notes": (list,),
    "provenance": (dict,),
    "configs": (list,),
    "modules": (list,),
}
_ROW: dict[str, tuple[type, ...]] = {"name": (str,), "heads": (list,)}
_SHARES = [each.name for each in fields(HeadShare)]
_PROMISE: dict[str, tuple[type, ...]] = {
    "metric": (str,),
    "tolerance": (*_NUMBER, type(None)),
    "value": _NUMBER,
    "low": _NUMBER,
    "high": _NUMBER,
    "level": _NUMBER,
    "items": (int,),
}


def number_configs(modules: Iterable[tuple[AstroConfig, ...]]) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """The distinct configs as plain values, and for every module the number of each head's config among them."""
    numbers: dict[AstroConfig, int] = {}
    heads = [[numbers.setdefault(config, len(numbers)) for config in mine] for mine in modules]
    return [asdict(config) for config in numbers], heads


def read_configs(rows: list[Any]) -> list[AstroConfig]:
    """The configs of which `number_configs` gave these plain values; ValueError for one that is none."""
    configs = []
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"configs[{number}]: is not a table")
        try:
            configs.append(AstroConfig(**row))
        except (TypeError, ValueError) as error:
            raise ValueError(f"configs[{number}]: is not a config: {error}") from None
    return configs


def pick_configs(configs: list[AstroConfig], numbers: list[Any], where: str) -> tuple[AstroConfig, ...]:
    """The configs of these numbers; ValueError, with the name of the field, for a number that none has."""
    wrong = [number for number in numbers if type(number) is not int or not 0 <= number < len(configs)]
    if wrong or not numbers:
        found = f"{wrong[0]!r}" if wrong else "nothing"
        raise ValueError(f"{where}: {found}; must be numbers of configs, 0 to {len(configs) - 1}")
    return tuple(configs[number] for number in numbers)


def check_fields(table: Any, kinds: Mapping[str, tuple[type, ...]], where: str = "") -> None:
    """ValueError, with the name of the field, unless a table has exactly these fields with values of these types."""
    if not isinstance(table, dict):
        raise ValueError(f"{where or 'the file'}: is not a table with {', '.join(kinds)}")
    prefix = f"{where}." if where else ""
    for name, allowed in kinds.items():
        if name not in table:
            raise ValueError(f"{prefix}{name}: is missing")
        value = table[name]
        wrong = type(value) not in allowed or (isinstance(value, float) and not isfinite(value))
        if wrong:
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
            raise ValueError(f"{prefix}{name}: {value!r}; must be {wanted}")
    if unknown := sorted(table.keys() - kinds.keys()):
        raise ValueError(f"{prefix}{unknown[0]}: is not known; there are {', '.join(kinds)}")


def _numbers(values: list[Any], count: int, where: str) -> list[float]:
    wrong = [value for value in values if type(value) not in _NUMBER or not isfinite(value) or value < 0]
    if wrong or len(values) != count:
        found = f"{wrong[0]!r}" if wrong else f"{len(values)} values"
        raise ValueError(f"{where}: {found}; must be {count} numbers of at least 0, one per head")
    return [float(value) for value in values]


def _describe(config: AstroConfig) -> str:
    """What heads of this config do, as far as it differs from the default."""
    if config.hidden == "exact":
        return "softmax attention itself"
    if config == AstroConfig(hidden="streaming", entries=config.entries):
        return f"a streaming memory of {config.entries} entries"
    default = AstroConfig()
    pairs = [(each.name, getattr(config, each.name)) for each in fields(config)]
    changed = [f"{name}={value!r}" for name, value in pairs if value != getattr(default, name)]
    return ", ".join(changed) or "the default config"


def _letters(number: int) -> str:
    """a to z, then aa, ab ..."""
    first = _letters(number // 26 - 1) if number >= 26 else ""
    return first + chr(ord("a") + number % 26)


def _ranges(heads: list[int]) -> str:
    """0-3,5 for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for head in heads:
        if runs and runs[-1][-1] == head - 1:
            runs[-1].append(head)
        else:
            runs.append([head])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
