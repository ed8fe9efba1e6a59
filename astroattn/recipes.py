"""Recipes: a pretrained model, the settings it is patched with, and the data it is compared on, as one TOML file."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import torch
from torch import nn

from astroattn.calibration import calibrate
from astroattn.choices import DTYPES
from astroattn.config import AstroConfig, as_config
from astroattn.data import Data, load_data
from astroattn.data.loading import first_names
from astroattn.models import LoadedModel, load_model
from astroattn.patching import PatchReport, patch, plan_parts
from astroattn.plan import Plan
from astroattn.suggestions import suggest

if TYPE_CHECKING:
    from astroattn.fidelity import Fidelity
    from astroattn.fidelity.sweep import Sweep

NOT_MEASURED = "not measured here"


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where the items come from and how they are prepared; see `load_data`.

    Args:
        source: a path, `datasets:NAME` or `python-docs`; empty where it must be given on the command line.
        tokens, half, limit, classes: as in `load_data`.
        size: pixels per side of the photos.
        pooling: as in `compare`.
        batch_size: items per batch.
        preprocessing: in words, for people.
    """

    source: str = ""
    tokens: int = 0
    half: str | None = None
    limit: int | None = None
    classes: str | None = None
    size: int | None = None
    pooling: str = "auto"
    batch_size: int = 32
    preprocessing: str = ""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a command printed: its data, date and versions, and the figures by their names in `fidelity.METRICS`."""

    command: str
    data: str
    date: str
    versions: Mapping[str, str]
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One pretrained model and how it is patched.

    Args:
        id: what `load_model` takes.
        library: `"transformers"` or `"timm"`.
        title: what people call it.
        layers: which attention modules: `"all"`, indices and ranges (`"0-5,8"`), or a name pattern.
        settings: fields of `AstroConfig`; those left out have their defaults or, where the file names a preset beside
            them (`preset = "fast"`), what that says.
        settings_of: settings of their own for some layers, over `settings`; by which, as in `layers`. In the file a
            table for each: `[settings_of."0-2"]`. No layer has two.
        plan: what every head does, instead of settings; in the file the path of one, relative to it.
        data: `DataSettings`.
        measured: what was measured with these settings; empty for nothing.
    """

    id: str
    library: str = ""
    title: str = ""
    layers: str = "all"
    settings: AstroConfig = field(default_factory=AstroConfig)
    settings_of: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    plan: Plan | None = None
    data: DataSettings = field(default_factory=DataSettings)
    measured: tuple[Measurement, ...] = ()

    def load(
        self,
        weights: str | Path | None = None,
        device: str | None = None,
        dtype: str = "float32",
        *,
        items: bool = True,
    ) -> LoadedModel:
        """The model, not yet patched; on a GPU where there is one, unless `device` says otherwise.

        Without `items` it needs no tokenizer or processor, and takes no texts, photos or recordings.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype: must be one of {', '.join(DTYPES)}, got {dtype!r}{suggest(dtype, DTYPES)}")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        kind = getattr(torch, dtype)
        try:
            return load_model(self.id, weights=weights, size=self.data.size, dtype=kind, device=device, items=items)
        except ValueError as error:
            raise ValueError(f"{error}{_similar(self.id)}") from None

    def config_of(self, model: nn.Module) -> AstroConfig | Plan:
        """What `patch` is given: where layers have settings of their own, a plan for this model.

        Raises:
            ValueError: such settings for layers that the model does not have, or that cannot be patched.
        """
        if self.plan or not self.settings_of:
            return self.plan or self.settings
        parts = {
            f"settings_of.{layers}": (parse_layers(layers), replace(self.settings, **own))
            for layers, own in self.settings_of.items()
        }
        return plan_parts(model, self.settings, parts, parse_layers(self.layers))

    def patch(self, loaded: LoadedModel) -> PatchReport:
        """Patch the model in place."""
        return patch(loaded.model, self.config_of(loaded.model), parse_layers(self.layers))

    def compare(
        self,
        loaded: LoadedModel,
        *,
        diagnose: int = 2,
        controls: bool = True,
        seed: int = 0,
        progress: bool = True,
    ) -> Fidelity:
        """Compare the model with a patched copy on the data of the recipe."""
        from astroattn.fidelity import compare  # needs more than patching does

        data, found = self.data, self._read_data(loaded, "compare")
        return compare(
            loaded.model,
            found.batches(loaded.encode, data.batch_size),
            self.config_of(loaded.model),
            where=parse_layers(self.layers),
            labels=found.labels,
            scores=found.scores,
            transcripts=found.transcripts,
            tokenizer=loaded.tokenizer,
            items=_in_words(found.items, loaded.tokenizer),
            class_names=found.class_names or first_names(loaded.classes),
            pooling=data.pooling,
            diagnose=diagnose,
            controls=controls,
            seed=seed,
            name=loaded.name,
            data="; ".join([found.name, *found.notes, *loaded.notes, f"batches of {data.batch_size}"]),
            progress=progress,
        )

    def sweep(
        self,
        loaded: LoadedModel,
        setting: str,
        values: Sequence[int | float | str | bool],
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> Sweep:
        """Compare the model with patched copies that differ in one setting, without controls and layers.

        Raises:
            ValueError: a value that the setting cannot have, before anything is measured.
        """
        from astroattn.fidelity.sweep import Sweep

        recipes = [override(self, {setting: value}, {}, None) for value in values]
        results = [
            recipe.compare(loaded, diagnose=0, controls=False, seed=seed, progress=progress) for recipe in recipes
        ]
        return Sweep(setting, tuple(values), tuple(results))

    def calibrate(
        self,
        loaded: LoadedModel,
        *,
        tolerance: float | None = None,
        cost: float | None = None,
        entries: float | None = None,
        metric: str = "auto",
        seed: int = 0,
        progress: bool = True,
        state: str | Path | None = None,
    ) -> Plan:
        """Choose a plan for the model, on the data of the recipe; see `astroattn.calibrate`."""
        found = self._read_data(loaded, "calibrate")
        plan = calibrate(
            loaded.model,
            found.batches(loaded.encode, self.data.batch_size),
            tolerance=tolerance,
            cost=cost,
            entries=entries,
            metric=metric,
            where=parse_layers(self.layers),
            pooling=self.data.pooling,
            seed=seed,
            progress=progress,
            state=state,
        )
        return replace(plan, provenance={**plan.provenance, "name": loaded.name, "data": found.name})

    def _read_data(self, loaded: LoadedModel, purpose: str) -> Data:
        data = self.data
        if not data.source:
            raise ValueError(f"data: say what to {purpose} on")
        return load_data(
            data.source,
            loaded.kind,
            tokenizer=loaded.tokenizer,
            tokens=data.tokens,
            max_tokens=loaded.max_tokens,
            classes=data.classes,
            class_names=loaded.classes,
            num_classes=loaded.num_classes,
            half=data.half,
            limit=data.limit,
        )


def find_recipes() -> dict[str, Path]:
    """The recipes that come with the library, by their names: installed inside it, in a checkout beside it."""
    package = Path(__file__).parent
    inside = package / "patches"
    folder = inside if inside.is_dir() else package.parent / "patches"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def open_recipe(model: str) -> Recipe:
    """A recipe by the path of its file (it ends in .toml) or by its name, or the default settings for a model.

    A folder of the name of a recipe is a model, as any folder is.
    """
    if model.endswith(".toml"):
        return load_recipe(model)
    if model in (known := find_recipes()) and not Path(model).is_dir():
        return load_recipe(known[model])
    return Recipe(id=model, library="timm" if model.startswith("timm:") else "transformers")


def override(
    recipe: Recipe,
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    layers: str | None,
    plan: str | Path | None = None,
    preset: str | None = None,
) -> Recipe:
    """The recipe with other values; None leaves what it says.

    A plan, the path of its file, replaces the settings; a preset, a word of `PRESETS`, settings or plan. Layers that
    have settings of their own keep those over single settings, and lose them to a plan or a preset.

    Raises:
        ValueError: a plan that cannot be read; settings for a recipe that has a plan; a plan and a preset.
    """
    changed = {name: value for name, value in settings.items() if value is not None}
    if preset is not None:
        if plan is not None:
            raise ValueError("preset: cannot be set, as a plan says what every head does")
        recipe = replace(recipe, plan=None, settings=as_config(preset, "preset"), settings_of={})
    chosen = recipe.plan if plan is None else Plan.load(plan)
    if chosen is not None and (others := changed.keys() - {"seed"}):  # the seed is also that of the intervals
        raise ValueError(f"{min(others)}: cannot be set, as a plan says what every head does")
    return replace(
        recipe,
        settings=recipe.settings if chosen is not None else replace(recipe.settings, **changed),
        settings_of=recipe.settings_of if plan is None else {},
        plan=chosen,
        data=replace(recipe.data, **{name: value for name, value in data.items() if value is not None}),
        layers=layers or recipe.layers,
    )


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe and check it.

    Raises:
        ValueError: a file that cannot be read, an unknown key or a value of the wrong type, naming it.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"recipe: cannot read {str(path)!r}: {error}{_similar(Path(path).name)}") from None
    try:
        return parse_recipe(table, Path(path).parent)
    except (TypeError, ValueError) as error:
        raise ValueError(f"recipe: {Path(path).name}: {error}") from None


def _similar(name: str) -> str:
    """What to add where nothing of this name was found; ids of the hub and of libraries are no names of recipes."""
    plain = name.removesuffix(".toml").lower().replace("-", "_")
    close = [] if re.search("[/:]", name) else get_close_matches(plain, find_recipes())
    return f"; there is a recipe {' and a recipe '.join(map(repr, close))}" if close else ""


def parse_recipe(table: Mapping[str, Any], folder: Path | None = None) -> Recipe:
    """A recipe from the tables of its TOML file, which lies in this folder (None: the current one)."""
    table = dict(table)
    measured = table.pop("measured", None)
    if measured is None:
        raise ValueError(f"measured: is missing; write {NOT_MEASURED!r} where nothing was")
    if measured == NOT_MEASURED:
        measured = []
    if not isinstance(measured, list):
        raise ValueError(f"measured: must be {NOT_MEASURED!r} or [[measured]] tables, got {measured!r}")
    plan = table.pop("plan", None)
    if plan is not None and not isinstance(plan, str):
        raise ValueError(f"plan: must be str, got {plan!r}")
    preset, settings, own = (table.pop(name, None) for name in ("preset", "settings", "settings_of"))
    for name, other in (("preset", preset), ("settings", settings), ("settings_of", own)):
        if plan is not None and other is not None:
            raise ValueError(f"{name}: a recipe has a plan or {name}, not both")
    base = as_config(preset, "preset")
    parts = {
        "plan": None if plan is None else Plan.load((folder or Path()) / plan),
        "settings": base if settings is None else _read(AstroConfig, settings, "settings.", asdict(base)),
        "data": _read(DataSettings, table.pop("data", {}), "data."),
        "measured": tuple(_read(Measurement, row, f"measured[{n}].") for n, row in enumerate(measured)),
    }
    _read_own({} if own is None else own, parts["settings"])
    recipe: Recipe = _read(Recipe, table | parts | {"settings_of": own or {}})
    if recipe.library not in ("transformers", "timm"):
        raise ValueError(f"library: must be transformers or timm, got {recipe.library!r}")
    parse_layers(recipe.layers)
    return recipe


def parse_setting(text: str, option: str = "set") -> tuple[str, list[int | float | str | bool]]:
    """A field of `AstroConfig` and values for it, from `exact_keys=16,32,64`; `option` is named in errors.

    Raises:
        ValueError: no such field, or values that are not of its type.
    """
    name, _, listed = text.partition("=")
    name = name.strip().replace("-", "_")
    hints = get_type_hints(AstroConfig)
    kinds = {each.name: hints[each.name] for each in fields(AstroConfig)}
    if name not in kinds:
        raise ValueError(f"{option}: {name!r} is not known; there are {', '.join(kinds)}{suggest(name, kinds)}")
    words = [word.strip() for word in listed.split(",") if word.strip()]
    if not words:
        raise ValueError(f"{option}: {text!r} has no values; write {name}=this,that")
    if kinds[name] is str:
        return name, list(words)
    known = {"true": True, "false": False}
    try:
        return name, [known[word.lower()] if kinds[name] is bool else kinds[name](word) for word in words]
    except (KeyError, ValueError):
        raise ValueError(f"{option}: {listed!r}; {name} must be {kinds[name].__name__}") from None


def parse_layers(text: str) -> list[int] | str | None:
    """`where` of `patch`: None for `"all"`, indices for `"0-5,8"`, else the name pattern itself."""
    text = text.strip()
    if not text:
        raise ValueError("layers: must be all, indices such as 0-5,8 or a name pattern, got nothing")
    if text == "all":
        return None
    if not re.fullmatch(r"[\d\s,-]+", text):
        return text
    indices: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"layers: {part.strip()!r} is neither an index nor a range such as 0-5")
        indices += range(int(match[1]), int(match[2] or match[1]) + 1)
    return indices


def _read_own(tables: Any, base: AstroConfig) -> None:
    """Check the settings that layers have of their own over those of all; an error names the table and the key."""
    if not isinstance(tables, Mapping):
        raise ValueError(f"settings_of: must be tables by layers, got {tables!r}")
    for layers, table in tables.items():
        where = f"settings_of.{layers}"
        try:
            parse_layers(layers)
        except ValueError as error:
            raise ValueError(f"{where}: {str(error).removeprefix('layers: ')}") from None
        try:
            _read(AstroConfig, table, f"{where}.", asdict(base))
        except (TypeError, ValueError) as error:
            raise ValueError(str(error) if str(error).startswith(where) else f"{where}.{error}") from None


def _read(kind: type, table: Any, prefix: str = "", base: Mapping[str, Any] | None = None) -> Any:
    """Make a dataclass of a TOML table over `base`; unknown keys and wrong types are errors that name the key."""
    if not isinstance(table, Mapping):
        raise ValueError(f"{prefix.rstrip('.')}: must be a table, got {table!r}")
    types = get_type_hints(kind)
    names = [each.name for each in fields(kind)]
    for name, value in table.items():
        if name not in names:
            raise ValueError(f"{prefix}{name}: is not known; there are {', '.join(names)}{suggest(name, names)}")
        allowed = get_args(types[name]) if isinstance(types[name], UnionType) else (types[name],)
        whole = type(value) is int and float in allowed
        if isinstance(value, bool | int | float | str) and type(value) not in allowed and not whole:
            wanted = " or ".join(each.__name__ for each in allowed if each is not type(None))
            raise ValueError(f"{prefix}{name}: must be {wanted}, got {value!r}")
    try:
        return kind(**{**(base or {}), **table})
    except TypeError as error:  # a field without a default that is missing
        raise ValueError(f"{prefix.rstrip('.') or 'recipe'}: {str(error).split(') ')[-1]}") from None


def _in_words(items: Sequence[Any], tokenizer: Any) -> list[Any]:
    """The items as people know them: texts that were cut into chunks of token ids are texts again."""
    return [tokenizer.decode(item, skip_special_tokens=True) if isinstance(item, list) else item for item in items]
