"""Other libraries save patched models: what they write holds the record of the astrocytes, and says so in words.

The record is made from the model as it is when it is saved; nothing in memory holds it, and a file of weights that is
written again without it has none. Of transformers it lies in the header of the files of weights; of peft and timm,
which open no file with tensors that they do not know, in files of its own.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn

from astroattn.imports import put_over, when_imported
from astroattn.patching.blocks import AttnLayer
from astroattn.patching.card import CARD, add_section, line, remove_section
from astroattn.patching.record import SETTINGS, TENSORS, describe, learned_by, tensor_names, write_record

RECORD_KEY = "astroattn"  # in the metadata of a safetensors file, and in settings
WRITTEN_WITH = "written_with"  # in a record of ours: the library whose files it lies with, and may go with

_header: ContextVar[dict[str, str]] = ContextVar("astroattn_header", default={})  # noqa: B039 (never changed)
_held: ContextVar[bool] = ContextVar("astroattn_held", default=False)  # whether the model belongs to a larger save


def keep_records() -> None:
    """Have the libraries that are imported, and those that will be, write the record of every patched model."""
    for name, put_over_library in LIBRARIES.items():
        when_imported(name, put_over_library)


# transformers


def _over_transformers(library: Any) -> None:
    model = getattr(library, "PreTrainedModel", None)
    if model is not None:
        put_over(model, "save_pretrained", _saving_the_record)
        put_over(model, "_upload_modified_files", _uploading_the_card)
        put_over(library, "safe_save_file", _adding_the_header)


def _saving_the_record(save_pretrained: Any) -> Any:
    signature = inspect.signature(save_pretrained)

    def save(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        record = describe(self)
        patched, writes = bool(record["modules"]), given.get("is_main_process", True)
        is_adapter = _has_adapters(self)
        if patched and not is_adapter:
            if writes:
                _require_learned(record, given.get("state_dict"))
            record["saved_as"] = _saved_names(self, record)
        if patched and given.get("distributed_checkpoint"):
            warnings.warn(
                "distributed_checkpoint=True: it holds no record of the astrocytes; the model that it is loaded into "
                "must be patched in the same way before",
                stacklevel=2,
            )
        vars(self.config).pop(RECORD_KEY, None)  # of the folder it was opened from
        token = _header.set({RECORD_KEY: json.dumps(record)} if patched and not is_adapter else {})
        try:
            if patched:
                setattr(self.config, RECORD_KEY, line(record, "transformers"))
            answer = save_pretrained(self, *args, **kwargs)
        finally:
            _header.reset(token)
            vars(self.config).pop(RECORD_KEY, None)
        folder = Path(given["save_directory"])
        if writes and folder.is_dir():
            if is_adapter:
                _keep_files(self, record, folder, "peft")
            _keep_card(folder, record, "peft" if is_adapter else "transformers", create=not _held.get())
        return answer

    return save


def _adding_the_header(save_file: Any) -> Any:
    def save(tensors: Any, filename: Any, metadata: dict[str, str] | None = None) -> None:
        save_file(tensors, filename, metadata={**(metadata or {}), **_header.get()})

    return save


def _uploading_the_card(upload: Any) -> Any:
    """Pushing writes the repository's own card over that of the folder, and would write a new one over that."""

    def with_card(self: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        record, folder = describe(_whole(self)), Path(working_dir)
        library = "peft" if _has_adapters(self) else "transformers"
        if record["modules"] and not (folder / CARD).exists():
            from transformers.utils.hub import create_and_tag_model_card

            create_and_tag_model_card(repo_id, token=kwargs.get("token")).save(folder / CARD)
        _keep_card(folder, record, library)
        return upload(self, working_dir, repo_id, *args, **kwargs)

    return with_card


def _require_learned(record: Mapping[str, Any], state_dict: Mapping[str, Any] | None) -> None:
    if state_dict is None:
        return
    wanted = tensor_names(record)
    if lost := [name for name in wanted if name not in state_dict]:
        raise ValueError(
            f"state_dict: lacks {lost[0]!r} ({len(lost)} of the {len(wanted)} tensors that the astrocytes of this "
            "model have learned); save all of them, or call astroattn.unpatch(model) first"
        )


def _saved_names(model: Any, record: Mapping[str, Any]) -> dict[str, str]:
    """What tensors are called in the file, where that is not their name: some families keep old names there."""
    from transformers import core_model_loading

    revert = getattr(core_model_loading, "revert_weight_conversion", None)  # not in transformers 5.0
    found: dict[str, str] = {}
    if revert is None:
        return found
    for name in tensor_names(record):
        (saved,) = revert(model, {name: torch.zeros(1)})
        if saved != name:
            found[name] = saved
    return found


# peft


def _over_peft(library: Any) -> None:
    model = getattr(library, "PeftModel", None)
    if model is not None:
        put_over(model, "save_pretrained", _saving_with_adapters)
        put_over(model, "_upload_modified_files", _uploading_the_card)


def _saving_with_adapters(save_pretrained: Any) -> Any:
    signature = inspect.signature(save_pretrained)

    def save(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        answer = save_pretrained(self, *args, **kwargs)
        if given.get("is_main_process", True):
            folder, model = Path(given["save_directory"]), _whole(self)
            whole = _warn_of_shares(model)
            for adapter in given.get("selected_adapters") or self.peft_config:
                place = folder if adapter == "default" else folder / adapter
                _keep_files(model, describe(model, adapter) | whole, place, "peft", adapter)
            _keep_card(folder, describe(model) | whole, "peft")
        return answer

    return save


def _warn_of_shares(model: Any) -> dict[str, list[Any]]:
    """What to put into a record of which this process has a share of the tensors alone: that there is nothing."""
    if not any(hasattr(tensor, "full_tensor") for tensor in learned_by(model, describe(model)).values()):
        return {}
    warnings.warn(
        "the astrocytes have learned weights that are divided among processes (FSDP), and are not saved with this "
        "adapter: gather the model, and call astroattn.save(model, folder)",
        stacklevel=3,
    )
    return {"modules": []}


def _has_adapters(model: Any) -> bool:
    """Whether it is saved as adapters alone, by peft or by what transformers has of it."""
    return getattr(model, "_hf_peft_config_loaded", False) or _whole(model) is not model


def _whole(model: Any) -> Any:
    """The model that peft has put its adapters into; any other itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# sentence-transformers


def _over_sentences(library: Any) -> None:
    model = getattr(library, "SentenceTransformer", None)
    for cls in () if model is None else model.__mro__:
        if "save" in vars(cls) and issubclass(cls, nn.Module):
            put_over(cls, "save", _saving_sentences)


def _saving_sentences(save: Any) -> Any:
    signature = inspect.signature(save)

    def save_all(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        token = _held.set(True)  # it writes the card after its modules, or wants none
        try:
            answer = save(self, *args, **kwargs)
        finally:
            _held.reset(token)
        if given["path"] is not None:
            _keep_card(Path(given["path"]), describe(self), "sentence_transformers", create=False)
        return answer

    return save_all


# the trainer of transformers


def _over_trainer(library: Any) -> None:
    trainer = getattr(library, "Trainer", None)
    if trainer is not None:
        put_over(trainer, "create_model_card", _adding_to_the_card)  # which it writes over that of the model


def _adding_to_the_card(create_model_card: Any) -> Any:
    def create(self: Any, *args: Any, **kwargs: Any) -> None:
        create_model_card(self, *args, **kwargs)
        if self.is_world_process_zero():
            model = self.accelerator.unwrap_model(self.model)
            library = "peft" if _has_adapters(model) else "transformers"
            _keep_card(Path(self.args.output_dir), describe(_whole(model)), library, create=False)

    return create


# timm


def _over_timm(library: Any) -> None:
    put_over(library, "save_config_for_hf", _saving_with_settings)  # the last that save_for_hf and push_to_hf_hub call


def _saving_with_settings(save_config: Any) -> Any:
    def save(model: Any, config_path: Any, *args: Any, **kwargs: Any) -> None:
        made_with = getattr(model, "_model_args", {})
        if isinstance(made_with.get("attn_layer"), AttnLayer):  # which timm cannot write; the record says it
            model._model_args = {name: value for name, value in made_with.items() if name != "attn_layer"}
        save_config(model, config_path, *args, **kwargs)
        path, record = Path(config_path), describe(model)
        if record["modules"]:
            settings = json.loads(path.read_text("utf-8"))
            path.write_text(json.dumps(settings | {RECORD_KEY: line(record, "timm")}, indent=2), "utf-8")
            _take_out(model, tensor_names(record), path.parent)
        _keep_files(model, record, path.parent, "timm")
        _keep_card(path.parent, record, "timm", create=False)  # it may be pushed over a card that is there

    return save


def _take_out(model: nn.Module, names: Collection[str], folder: Path) -> None:
    """Write the weights again without tensors that timm would refuse; of whichever save, they are of these settings."""
    from safetensors.torch import save_file

    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in names}
    for path, write in ((folder / "model.safetensors", save_file), (folder / "pytorch_model.bin", torch.save)):
        if names and path.exists():
            write(weights, path)


# all of them


def _keep_files(model: Any, record: dict[str, Any], folder: Path, library: str, adapter: str | None = None) -> None:
    """Write the record beside the files of a library; without astrocytes, take away what was written so before."""
    if record["modules"]:
        write_record(model, record | {WRITTEN_WITH: library}, folder, adapter)
        return
    path = folder / SETTINGS
    if path.exists() and json.loads(path.read_text("utf-8")).get(WRITTEN_WITH) == library:
        path.unlink(missing_ok=True)
        (folder / TENSORS).unlink(missing_ok=True)


def _keep_card(folder: Path, record: Mapping[str, Any], library: str, create: bool = True) -> None:
    if not record["modules"]:
        remove_section(folder)
    elif create or (folder / CARD).exists():
        add_section(folder, record, library)


LIBRARIES: dict[str, Callable[[Any], None]] = {
    "transformers.modeling_utils": _over_transformers,
    "transformers.trainer": _over_trainer,
    "peft.peft_model": _over_peft,
    "sentence_transformers": _over_sentences,
    "timm.models._hub": _over_timm,
}
