"""The astrocytes of a patched model in files: JSON for what they are, safetensors for what they learned.

No code is ever loaded from a file. The weights of the model itself are its library's to save, which writes our record
with them (`patching.saving`).
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from astroattn.config import AstroConfig
from astroattn.imports import needs
from astroattn.patching import PatchReport, patch, restored_on_error, unpatch
from astroattn.patching.place import find_place
from astroattn.patching.record import (
    RECORD_VERSION,
    SETTINGS,
    TENSORS,
    describe,
    join,
    learned,
    tensor_names,
    write_record,
)
from astroattn.patching.report import make_notes
from astroattn.patching.saving import RECORD_KEY
from astroattn.patching.site import CORE
from astroattn.plan import Plan, pick_configs, read_configs

FIELDS = {"format": int, "model": str, "configs": list, "modules": list, "exact": dict}
MODULE_FIELDS = {"name": str, "class": str, "heads": list, "head_dim": int, "tensors": list}

Rows = list[tuple[dict[str, Any], tuple[AstroConfig, ...]]]  # the modules of a record, each with its heads' configs
Saved = tuple[dict[str, Any], dict[str, Tensor], str]  # a record, what was learned by name, and where they are from


def save(model: nn.Module, folder: str | Path) -> None:
    """Write the astrocytes of a patched model: `astroattn.json`, and `astroattn.safetensors` where they have learned.

    Args:
        model: a patched model of any library. Its own weights are not written.
        folder: where to; it is made where it is missing. Of several processes one should write.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the model is not patched; it is wrapped (DDP, torch.compile) or sharded (FSDP).
    """
    _require_model(model)
    record = describe(model)
    if not record["modules"]:
        raise ValueError(f"model: {type(model).__name__} is not patched; there is nothing to save")
    write_record(model, record | {"base_model": _base_model(model)}, Path(folder))


def load(
    model: nn.Module,
    folder: str | Path,
    *,
    revision: str | None = None,
    inputs: Mapping[str, Any] | Tensor | None = None,
) -> PatchReport:
    """Patch a model as a saved one was patched, and give its astrocytes what they had learned.

    The model may be any that holds the encoder that was patched, such as a task model or a SentenceTransformer around
    it, or the encoder alone: its attention modules are found by what they are, whatever stands before their names.

    Args:
        model: patched or not; what that encoder in it was patched with before is replaced.
        folder: what `save` wrote, or what transformers, sentence-transformers, peft or timm wrote of a patched model;
            or an id on the Hugging Face hub.
        revision: of the hub's repository. inputs: as in `patch`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: nothing is there; a file is damaged or not ours; two records there differ; the model does not hold
            that encoder, or several of its kind; it is wrapped (DDP, torch.compile) or sharded (FSDP). It is then left
            as it was.
    """
    from safetensors import SafetensorError

    _require_model(model)
    try:
        both = _read_files(str(folder), revision), _read_weights(str(folder), revision)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"folder: cannot read {str(folder)!r}: {_line(error)}") from None
    found = [each for each in both if each is not None]
    if not found:
        raise ValueError(
            f"folder: {str(folder)!r} has no record of astrocytes, neither {SETTINGS} nor in the header of "
            "model.safetensors: it was not saved from a patched model" + _hint(str(folder))
        )
    if len(found) > 1 and not _same(*found):
        raise ValueError(
            f"folder: {str(folder)!r} has two records that differ, {SETTINGS} and that in the header of its weights; "
            "take the older one away, or save again"
        )
    return restore(model, *found[0], inputs)


def from_pretrained(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    inputs: Mapping[str, Any] | Tensor | None = None,
) -> nn.Module:
    """The patched model of transformers that `model.save_pretrained` wrote, in evaluation mode.

    `save_pretrained` and `push_to_hub` of a patched model of transformers, or of one that holds patched modules, write
    a record of its astrocytes into the header of each file of weights, and what they have learned among the weights.
    To open it with other options (num_labels, device_map ...), open it with transformers and call `load` on that.

    Args:
        source: a folder, or an id on the Hugging Face hub. revision: of the hub's repository.
        dtype: of the weights; None is that of the file. inputs: as in `patch`.

    Raises:
        ValueError: nothing is there; it was not saved from a patched model; a file is damaged.
        ImportError: transformers is not installed.
    """
    from safetensors import SafetensorError

    with needs("eval"):
        import transformers

    source = str(source)
    options = {"revision": revision, "trust_remote_code": False}
    try:
        saved = _read_weights(source, revision)
        if saved is None:
            raise ValueError(
                "it was not saved from a patched model (its weights hold no record of astrocytes)" + _hint(source)
            )
        record = saved[0]
        _check_record(record, source)
        cls: Any = getattr(transformers, record["model"], None)
        known = inspect.isclass(cls) and issubclass(cls, transformers.PreTrainedModel)
        if not known:
            raise ValueError(f"transformers {transformers.__version__} has no model {record['model']!r}")
        dtype_of = {"dtype": "auto" if dtype is None else dtype}
        with _expecting(cls, tensor_names(record)):
            model = cls.from_pretrained(source, use_safetensors=True, **options, **dtype_of).eval()
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"source: cannot load {source!r}: {_line(error)}") from None
    vars(model.config).pop(RECORD_KEY, None)  # the words are for who opens it without us
    restore(model, record, saved[1], source, inputs)
    if dtype is not None:
        model.to(dtype)
    return model  # type: ignore[no-any-return]


def _hint(source: str) -> str:
    """What else may be the matter where there is no record."""
    if not Path(source).is_dir():
        return ", or it is out of reach"  # of an id that is nowhere, and without a network, transformers says no more
    if (Path(source) / SETTINGS).exists():
        return f"; it has {SETTINGS}: open the model with its library, then call astroattn.load(model, folder)"
    return ""


@contextmanager
def _expecting(cls: Any, names: Iterable[str]) -> Iterator[None]:
    """Inside, the class does not warn of these tensors, which its models have only once they are patched."""
    before = cls._keys_to_ignore_on_load_unexpected
    cls._keys_to_ignore_on_load_unexpected = [*(before or ()), *map(re.escape, names)]
    try:
        yield
    finally:
        cls._keys_to_ignore_on_load_unexpected = before


def restore(
    model: nn.Module, record: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str, inputs: Any = None
) -> PatchReport:
    """Patch a model by a record (`describe`) and load its tensors; all of it, or nothing.

    Raises:
        ValueError: the record or the tensors do not fit the model; `source` names where they come from.
    """
    rows = _check_record(record, source)
    part, names = find_place(model, record, source)
    expected = tensor_names(record)
    if lost := sorted(set(expected) - tensors.keys()):
        raise ValueError(f"{source}: the tensor {lost[0]!r} is missing ({len(lost)} of {len(expected)})")
    with restored_on_error(model):
        unpatch(model.get_submodule(part))
        try:
            plan = Plan(model=record["model"], modules={names[row["name"]]: heads for row, heads in rows})
            report = patch(model, plan, where=lambda name, module: name in plan.modules, inputs=inputs)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        for row, _ in rows:
            core = getattr(model.get_submodule(names[row["name"]]), CORE)
            if core.head_dim != row["head_dim"]:
                was, now = (f"a {row['class']} of head dimension {size}" for size in (row["head_dim"], core.head_dim))
                raise ValueError(f"{source}: {row['name']} was {was}; here it is {now}")
            _load_tensors(core, row, tensors, source)
    return replace(report, notes=make_notes(model))


def _check_record(record: Mapping[str, Any], source: str) -> Rows:
    """The modules of a record with the configs of their heads."""
    _check_fields(record, {"format": int}, source)
    if record["format"] != RECORD_VERSION:
        raise ValueError(f"{source}: format {record['format']}; this version of astroattn reads {RECORD_VERSION}")
    _check_fields(record, FIELDS, source)
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


def _load_tensors(core: Any, row: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> None:
    for key, mine in learned(core).items():
        name = join(row["name"], CORE, key)
        theirs = tensors.get(name)
        if theirs is None or theirs.shape != mine.shape or not theirs.is_floating_point():
            found = "is missing" if theirs is None else f"is {list(theirs.shape)} of {theirs.dtype}"
            raise ValueError(f"{source}: the tensor {name!r} {found}; expected {list(mine.shape)}")
        with torch.no_grad():
            mine.copy_(theirs)


def _same(one: Saved, other: Saved) -> bool:
    """Whether two records say the same."""
    if any(one[0].get(field) != other[0].get(field) for field in FIELDS) or one[1].keys() != other[1].keys():
        return False
    return all(torch.equal(tensor, other[1][name]) for name, tensor in one[1].items())


def _read_files(folder: str, revision: str | None) -> Saved | None:
    """What `save` wrote; None where that is not there."""
    path = _find(folder, SETTINGS, revision)
    if path is None:
        return None
    try:
        record = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"folder: cannot read {str(path)!r}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"folder: {str(path)!r} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"folder: {str(path)!r} is not a record of astrocytes")
    checksum = record.get("sha256")
    tensors = _find(folder, TENSORS, revision) if checksum is not None else None
    return record, _read_tensors(tensors or path.with_name(TENSORS), checksum), str(path)


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


def _read_weights(source: str, revision: str | None) -> Saved | None:
    """What transformers wrote with the weights of a model; None where they hold no record."""
    from safetensors import safe_open

    paths = [_find(source, "model.safetensors", revision)]  # in the order in which transformers looks for them
    if paths == [None]:
        index = _find(source, "model.safetensors.index.json", revision)
        shards = () if index is None else set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        paths = [_find(source, name, revision) for name in sorted(shards)]
    if not paths:  # another variant, which only a folder tells
        paths = list(Path(source).glob("model.*.safetensors"))
    headers = set()
    for path in paths:
        if path is None:
            raise OSError("a file that its index names is missing")
        with safe_open(path, framework="pt") as file:
            headers.add((file.metadata() or {}).get(RECORD_KEY))
    if len(headers) > 1:
        raise OSError("its files of weights have records that differ, or some have none; they are of several saves")
    if (text := next(iter(headers), None)) is None:
        return None
    record = json.loads(text)
    _check_record(record, source)
    names = {name: name for name in tensor_names(record)}
    names |= {saved: name for name, saved in record.get("saved_as", {}).items()}
    tensors: dict[str, Tensor] = {}
    for path in paths if names else []:
        with safe_open(path, framework="pt") as file:
            tensors |= {names[name]: file.get_tensor(name) for name in names.keys() & set(file.keys())}
    return record, tensors, source


def _find(source: str, name: str, revision: str | None) -> Path | None:
    """A file of a folder, or of a repository on the hub; None where it is not there."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.exists() else None
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise OSError("there is no such folder")
    with needs("eval"):
        from transformers.utils import cached_file

    found = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


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
