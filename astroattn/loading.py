"""`attn_implementation="astroattn"`: what transformers loads so is patched before it is handed over."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

from astroattn.imports import put_over

NAME = "astroattn"
SHOWN = 3  # modules that stay exact, in the warning


def serve(library: Any) -> None:
    """Put it over the loading of `transformers.modeling_utils`.

    An attention function of transformers is given neither the model nor a moment after loading, and astrocytes are
    checked, and know the grid of patches, in whole models: so the model is patched, and the function stays the host's.
    """
    for name in ("from_pretrained", "_from_config"):
        put_over(library.PreTrainedModel, name, _patching)


def _patching(load: Any) -> Any:
    def patching(cls: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs, asked = _take_out(args, kwargs)
        answer = load(cls, *args, **kwargs)
        if asked:
            _patch(answer[0] if isinstance(answer, tuple) else answer, args, kwargs)
        return answer

    return patching


def _take_out(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """The arguments with the library's own attention in place of ours, and whether ours was asked for."""
    asked = kwargs.get("attn_implementation") == NAME
    kwargs = {name: value for name, value in kwargs.items() if not (asked and name == "attn_implementation")}

    def own(value: Any) -> Any:
        nonlocal asked
        if getattr(value, "_attn_implementation", None) != NAME:
            return value
        asked, value = True, copy.deepcopy(value)  # a config, from an auto class or made so
        value._attn_implementation = None
        return value

    return tuple(map(own, args)), {name: own(value) for name, value in kwargs.items()}, asked


def _patch(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Patch as the files say, if they are of a patched model, else with the default."""
    from astroattn.checkpoint import load
    from astroattn.patching import patch
    from astroattn.patching.saving import RECORD_KEY

    if vars(model.config).pop(RECORD_KEY, None) is not None:  # words for who opens it without us
        source = args[0] if args else kwargs["pretrained_model_name_or_path"]
        report = load(model, Path(source) if Path(source).is_dir() else source, revision=kwargs.get("revision"))
    else:
        report = patch(model)
    if report.exact:
        rows = [f"{row.name} ({row.reason})" for row in report.exact]
        more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
        warnings.warn(
            f'attn_implementation="{NAME}": {len(report.patched)} of {len(report.rows)} attention modules of '
            f"{report.model} are astrocytes; exact stay {', '.join(rows[:SHOWN])}{more}",
            stacklevel=4,
        )
