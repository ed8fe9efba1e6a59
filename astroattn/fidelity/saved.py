"""Reading a comparison that was saved as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from astroattn.fidelity.diagnosis import LayerFidelity
from astroattn.fidelity.metrics import Value
from astroattn.fidelity.result import Fidelity, Row


def load_result(path: str | Path) -> Fidelity:
    """Read what `Fidelity.save_json` wrote; what was not finite is NaN again.

    Raises:
        ValueError: a file that cannot be read, or that is no comparison, naming it.
    """
    try:
        plain = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = {title: Row(row["config"], _values(row["values"])) for title, row in plain.pop("rows").items()}
        layers = tuple(
            LayerFidelity(**{name: _number(part) for name, part in row.items()}) for row in plain.pop("layers")
        )
        result = Fidelity(rows=rows, layers=layers, notes=tuple(plain.pop("notes")), **plain)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"result: cannot read {str(path)!r}: {error}") from None
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"result: {str(path)!r} is not what compare writes as JSON: {error}") from None
    if "patched" not in rows or "original" not in rows:
        raise ValueError(f"result: {str(path)!r} has no rows 'original' and 'patched'")
    return result


def _values(row: Mapping[str, Any]) -> dict[str, Value]:
    """The figures of a row; an end of an interval may be None, a figure may not."""
    return {
        name: Value(**each | {"value": float("nan")} if each["value"] is None else each) for name, each in row.items()
    }


def _number(part: Any) -> Any:
    return [float("nan") if each is None else each for each in part] if isinstance(part, list) else part
