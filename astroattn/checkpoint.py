"""The astrocytes of a patched model in files of their own: JSON for what they are, safetensors for what they learned.

No code is ever loaded from a file. The weights of the model itself are its library's to save.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from astroattn.config import AstroConfig
from astroattn.patching import PatchReport, patch, restored_on_error, unpatch
from astroattn.patching.record import RECORD_KEY, RECORD_VERSION, class_name, describe
from astroattn.patching.site import CORE
from astroattn.plan import Plan, pick_configs, read_configs
from astroattn.version import __version__

SETTINGS, TENSORS = "astroattn.json", "astroattn.safetensors"
FIELDS = {"format": int, "model": str, "configs": list, "modules": list}
MODULE_FIELDS = {"name": str, "class": str, "heads": list, "head_dim": int, "tensors": list}

Rows = list[tuple[dict[str, Any], tuple[AstroConfig, ...]]]  # the modules of a record, each with its heads' configs


def save(model: nn.Module, folder: str | Path) -> None:
    """Write the astrocytes of a patched model: `astroattn.json`, and `astroattn.safetensors` where they have learned.

    Args:
        model: a patched model of any library. Its own weights are not written.
        folder: where to; it is made where it is missing. Of several processes one should write.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the model is not patched; it is wrapped (DDP, torch.compile) or sharded (FSDP).
    """
    from safetensors.torch import save as to_bytes

    _require_model(model)
    record = describe(model)
    if not record["modules"]:
        raise ValueError(f"model: {type(model).__name__} is not patched; there is nothing to save")
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for row in record["modules"]
        for name, tensor in _state(model, row["name"]).items()
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record |= {"astroattn": __version__, "base_model": _base_model(model)}
    if tensors:
        content = to_bytes(tensors)
        (folder / TENSORS).write_bytes(content)
        record["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / SETTINGS).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load(model: nn.Module, folder: str | Path) -> PatchReport:
    """Patch a model as the one that `save` wrote was patched, and give its astrocytes what they had learned.

    Args:
        model: of the same class, patched or not; what it was patched with before is replaced.
        folder: what `save` wrote.

    Raises:
        TypeError: `model` is not a module.
        ValueError: a file is missing, damaged or not ours; the model is of another architecture, wrapped (DDP,
            torch.compile) or sharded (FSDP). It is then left as it was.
    """
    _require_model(model)
    folder = Path(folder)
    record = _read_record(folder / SETTINGS)
    tensors = _read_tensors(folder / TENSORS, record.get("sha256"))
    return restore(model, record, tensors, str(folder / SETTINGS))


def from_pretrained(source: str | Path, *, revision: str | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """The patched model of transformers that `model.save_pretrained` wrote, in evaluation mode.

    `save_pretrained` and `push_to_hub` of a patched model of transformers, or of one that holds patched modules, write
    a record of its astrocytes into the header of each file of weights, and what they have learned among the weights.

    Args:
        source: a folder, or an id on the Hugging Face hub. revision: of the hub's repository.
        dtype: of the weights; None is that of the file.

    Raises:
        ValueError: nothing is there; it was not saved from a patched model; a file is damaged.
    """
    import transformers
    from safetensors import SafetensorError, safe_open

    source = str(source)
    options = {"revision": revision, "trust_remote_code": False}
    try:
        shards = _shards(source, revision)
        with safe_open(shards[0], framework="pt") as file:
            text = (file.metadata() or {}).get(RECORD_KEY)
        if text is None:
            raise ValueError("it was not saved from a patched model (its weights hold no record of astrocytes)")
        record = json.loads(text)
        rows = _check_record(record, source)
        cls: Any = getattr(transformers, record["model"], None)
        known = inspect.isclass(cls) and issubclass(cls, transformers.PreTrainedModel)
        if not known:
            raise ValueError(f"transformers {transformers.__version__} has no model {record['model']!r}")
        dtype_of = {"dtype": "auto" if dtype is None else dtype}
        wanted = {f"{row['name']}.{CORE}.{tensor}" for row, _ in rows for tensor in row["tensors"]}
        with _expecting(cls, wanted):
            model = cls.from_pretrained(source, use_safetensors=True, **options, **dtype_of).eval()
        names = _saved_names(model, wanted)
        tensors: dict[str, Tensor] = {}
        for path in shards if wanted else []:
            with safe_open(path, framework="pt") as file:
                tensors |= {names[name]: file.get_tensor(name) for name in names.keys() & set(file.keys())}
    except (OSError, ValueError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"source: cannot load {source!r}: {lines[0]}") from None
    restore(model, record, tensors, source)
    if dtype is not None:
        model.to(dtype)
    return model  # type: ignore[no-any-return]


def _saved_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """What tensors of a model may be called in its files, each with its name: some families keep old names there."""
    from transformers import core_model_loading

    revert = getattr(core_model_loading, "revert_weight_conversion", None)  # not in transformers 5.0
    found = {}
    for name in names:
        found[name] = name
        if revert is not None:
            found |= dict.fromkeys(revert(model, {name: torch.zeros(1)}), name)
    return found


@contextmanager
def _expecting(cls: Any, names: Iterable[str]) -> Iterator[None]:
    """Inside, the class does not warn of these tensors, which its models have only once they are patched."""
    before = cls._keys_to_ignore_on_load_unexpected
    cls._keys_to_ignore_on_load_unexpected = [*(before or ()), *map(re.escape, names)]
    try:
        yield
    finally:
        cls._keys_to_ignore_on_load_unexpected = before


def _shards(source: str, revision: str | None) -> list[str]:
    """The safetensors files of a model of transformers."""
    from transformers.utils import cached_file

    index = cached_file(
        source, "model.safetensors.index.json", revision=revision, _raise_exceptions_for_missing_entries=False
    )
    names = ["model.safetensors"]
    if index is not None:
        names = sorted(set(json.loads(Path(index).read_text("utf-8"))["weight_map"].values()))
    return [cached_file(source, name, revision=revision) for name in names]


def restore(model: nn.Module, record: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> PatchReport:
    """Patch a model by a record (`describe`) and load its tensors; all of it, or nothing.

    Raises:
        ValueError: the record or the tensors do not fit the model; `source` names where they come from.
    """
    rows = _check_record(record, source)
    _check_fit(model, record, rows, tensors, source)
    with restored_on_error(model):
        unpatch(model)
        try:
            plan = Plan(model=record["model"], modules={row["name"]: heads for row, heads in rows})
            report = patch(model, plan)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        mine = {row["name"]: row for row in describe(model)["modules"]}
        for row, _ in rows:
            was, now = (f"a {each['class']} of head dimension {each['head_dim']}" for each in (row, mine[row["name"]]))
            if was != now:
                raise ValueError(f"{source}: {row['name']} was {was}; here it is {now}")
            _load_tensors(model, row, tensors, source)
    return report


def _check_record(record: Mapping[str, Any], source: str) -> Rows:
    """The modules of a record with the configs of their heads."""
    _check_fields(record, FIELDS, source)
    if record["format"] != RECORD_VERSION:
        raise ValueError(f"{source}: format {record['format']}; this version of astroattn reads {RECORD_VERSION}")
    for row in record["modules"]:
        _check_fields(row, MODULE_FIELDS, source)
    try:
        configs = read_configs(record["configs"])
        rows = [(row, pick_configs(configs, row["heads"], f"the heads of {row['name']}")) for row in record["modules"]]
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    if not rows:
        raise ValueError(f"{source}: has no modules")
    return rows


def _check_fields(record: Any, kinds: Mapping[str, type], source: str) -> None:
    wrong = [
        name
        for name, kind in kinds.items()
        if not isinstance(record, Mapping) or not isinstance(record.get(name), kind)
    ]
    if wrong:
        raise ValueError(f"{source}: is not a record of astrocytes ({', '.join(wrong)} missing or of the wrong kind)")


def _check_fit(
    model: nn.Module,
    record: Mapping[str, Any],
    rows: Rows,
    tensors: Mapping[str, Tensor],
    source: str,
) -> None:
    if record["model"] != (name := class_name(model)):
        raise ValueError(f"{source}: holds the astrocytes of a {record['model']}; this model is a {name}")
    missing = [row["name"] for row, _ in rows if not _has_module(model, row["name"])]
    if missing:
        raise ValueError(
            f"{source}: the model has no module {missing[0]!r} ({len(missing)} of {len(rows)} are missing)"
        )
    expected = {f"{row['name']}.{CORE}.{tensor}" for row, _ in rows for tensor in row["tensors"]}
    if lost := sorted(expected - tensors.keys()):
        raise ValueError(f"{source}: the tensor {lost[0]!r} is missing ({len(lost)} of {len(expected)})")


def _has_module(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What the astrocyte of a module has learned, by full name."""
    core = getattr(model.get_submodule(name), CORE)
    return {f"{name}.{CORE}.{key}" if name else f"{CORE}.{key}": tensor for key, tensor in core.state_dict().items()}


def _load_tensors(model: nn.Module, row: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> None:
    for name, mine in _state(model, row["name"]).items():
        theirs = tensors.get(name)
        if theirs is None or theirs.shape != mine.shape or not theirs.is_floating_point():
            found = "is missing" if theirs is None else f"is {list(theirs.shape)} of {theirs.dtype}"
            raise ValueError(f"{source}: the tensor {name!r} {found}; expected {list(mine.shape)}")
        with torch.no_grad():
            mine.copy_(theirs)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"folder: cannot read {str(path)!r}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"folder: {str(path)!r} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"folder: {str(path)!r} is not a record of astrocytes")
    return record


def _read_tensors(path: Path, checksum: str | None) -> dict[str, Tensor]:
    """The tensors of a file whose checksum is known; none where none were written."""
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    if checksum is None:
        return {}
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != checksum:
            raise ValueError(f"folder: {str(path)!r} is not the file that was saved (its checksum differs)")
        return dict(from_bytes(content))
    except OSError as error:
        raise ValueError(f"folder: cannot read {str(path)!r}: {error.strerror}") from None
    except SafetensorError as error:
        raise ValueError(f"folder: {str(path)!r} is not a safetensors file: {error}") from None


def _base_model(model: nn.Module) -> str | None:
    """What the model was loaded from, as far as it knows: of transformers its name or folder, of timm its tag."""
    config, settings = getattr(model, "config", None), getattr(model, "pretrained_cfg", None)
    name = getattr(config, "_name_or_path", None)
    if not name and isinstance(settings, Mapping):
        name = ".".join(filter(None, (settings.get("architecture"), settings.get("tag"))))
    return name or None


def _require_model(model: nn.Module) -> None:
    """Refuse what is no module, what wraps a model, and a model that has only a share of its weights here."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    parts = list(model.modules())
    for part in parts:
        if isinstance(part, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise ValueError(f"model: {type(part).__name__} wraps it; pass what accelerator.unwrap_model(model) gives")
        if "_orig_mod" in part._modules:
            raise ValueError("model: torch.compile wraps it; pass the model that was compiled (model._orig_mod)")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
        from torch.distributed.tensor import DTensor

        sharded = any(isinstance(part, (FSDPModule, FullyShardedDataParallel)) for part in parts)
        if sharded or any(isinstance(weight, DTensor) for weight in model.parameters()):
            raise ValueError(
                "model: its weights are divided among processes (FSDP); load before that, and save a model that is "
                "whole, with the weights that accelerator.get_state_dict(model) gathers"
            )
