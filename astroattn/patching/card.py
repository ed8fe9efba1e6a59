"""What a folder of a patched model says of it in words: a section of its model card, a line of its settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from astroattn.config import AstroConfig
from astroattn.version import __version__

CARD = "README.md"
BEGIN, END = "<!-- astroattn: begin (written anew with every save) -->", "<!-- astroattn: end -->"
SECTION = re.compile(rf"[\r\n]*{re.escape(BEGIN)}.*?{re.escape(END)}[\r\n]*", re.DOTALL)
URL = "https://doi.org/10.1073/pnas.2219150120"

# how a folder is opened, by the library that wrote it
LOAD = 'astroattn.load(model, "FOLDER")'
OPENING = {
    "transformers": 'model = astroattn.from_pretrained("FOLDER")',
    "peft": f"model = ...  # the base model with this adapter, as always\n{LOAD}",
    "sentence_transformers": f'model = MODEL("FOLDER")  # as always\n{LOAD}',
    "timm": f'model = timm.create_model("local-dir:FOLDER", pretrained=True)  # as always\n{LOAD}',
}
OPTIONS = f"To open it with options of your own, open it with transformers as always, then call `{LOAD}`. "


def line(record: Mapping[str, Any], library: str) -> str:
    """For the settings of a model: that it was patched, how, and which call patches it again."""
    calls = "astroattn.from_pretrained(folder), or " if library == "transformers" else ""
    return (
        f"The self-attention of this model was replaced by astroattn {__version__}: {_what(record)}. The library that "
        f"opens this folder gives the same weights with softmax attention, which is another model; {calls}"
        "astroattn.load(model, folder) after that, gives the one that was saved. Files that were written again since "
        "by a model that was not patched hold no record of it, and these calls say so."
    )


def add_section(folder: Path, record: Mapping[str, Any], library: str) -> None:
    """Say so in the model card of a folder; what else stands there stays."""
    options = OPTIONS if library == "transformers" else ""
    section = f"""{BEGIN}
## Neuron-astrocyte attention

The self-attention of this model was replaced by a neuron-astrocyte network
([Kozachkov et al. 2023]({URL})) with astroattn {__version__}: {_what(record)}.

```python
import astroattn

{OPENING[library].replace("MODEL", record["model"])}
```

FOLDER is this folder, or the name of this repository. {options}Without that it opens with softmax attention and the
same weights: another model, whose outputs differ{_lost(record)}. If its files were written again since by a model that
was not patched, they hold no record of it, and the call says so.
{END}
"""
    rest = _without(text := _read(folder / CARD))
    _write(folder / CARD, text, f"{rest}\n\n{section}" if rest else section)


def remove_section(folder: Path) -> None:
    """Take the section out of the model card of a folder, whose model is not patched any more."""
    text = _read(folder / CARD)
    if BEGIN in text:
        if rest := _without(text):
            _write(folder / CARD, text, f"{rest}\n")
        else:
            (folder / CARD).unlink(missing_ok=True)  # it was ours alone


def _without(text: str) -> str:
    return SECTION.sub("\n\n", text).strip("\r\n")


def _read(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "surrogateescape") if path.exists() else ""


def _write(path: Path, before: str, after: str) -> None:
    if after != before:  # what is not written again is not uploaded again
        path.write_bytes(after.encode("utf-8", "surrogateescape"))


def _what(record: Mapping[str, Any]) -> str:
    """Which modules, and what their heads do."""
    names = [row["name"] or "the model itself" for row in record["modules"]]
    named = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    modules = f"{len(names)} attention module{'s' * (len(names) > 1)} of its {record['model']} ({named})"
    configs = [_config(AstroConfig(**values)) for values in record["configs"][:3]]
    more = f" and {len(record['configs']) - 3} more configs" if len(record["configs"]) > 3 else ""
    return f"{modules} with {', '.join(configs)}{more}"


def _config(config: AstroConfig) -> str:
    default = AstroConfig()
    pairs = ((each.name, getattr(config, each.name)) for each in fields(config))
    return f"AstroConfig({', '.join(f'{name}={value!r}' for name, value in pairs if value != getattr(default, name))})"


def _lost(record: Mapping[str, Any]) -> str:
    learned = any(row["tensors"] for row in record["modules"])
    return ", and what its astrocytes have learned is not used" if learned else ""
