"""Pages of HTML that need no network: tables and charts in one of the templates."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from astroattn.fidelity.metrics import METRICS, SCALES, Value
from astroattn.imports import needs

# Dark lines and letters of a chart take the colour of the page's text; what is coloured keeps its own.
INK = re.compile(r"#000000|#555555|#262626")


class Table(NamedTuple):
    """Cells of text below a header; the first cell of a row names it."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    sortable: bool = False


class Chart(NamedTuple):
    """A drawing as inline SVG, and what it shows in words."""

    svg: str
    title: str
    description: str


def check_page(name: str, path: str | Path) -> None:
    """Raise ValueError, naming the argument, where no page could be written, so that it is known before measuring."""
    if not Path(path).parent.is_dir():
        raise ValueError(f"{name}: there is no folder {str(Path(path).parent)!r}")
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{name}: must end in .html, got {str(path)!r}")


def write_page(path: str | Path, template: str, **content: Any) -> None:
    """Fill a template; whatever comes from models and data is escaped."""
    with needs("eval"):
        from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("astroattn.fidelity"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    Path(path).write_text(environment.get_template(template).render(content), encoding="utf-8")


def draw_chart(name: str, title: str, description: str, draw: Callable[[Any], None], height: float = 3.2) -> Chart:
    """Draw on the axes of a new figure; `name` keeps the ids of its parts apart from those of other charts."""
    import matplotlib
    from matplotlib.figure import Figure

    # Letters stay letters: light, searchable, in the font of the page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}):
        figure = Figure(figsize=(5, height), layout="constrained")
        draw(figure.subplots())
        text = StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg)
    return Chart(INK.sub("currentColor", svg), title, description)


def show(key: str, value: Value | None, interval: bool = True) -> str:
    """A figure by its name in `METRICS`, with its interval; nothing where it was not measured."""
    if value is None:
        return ""
    if not math.isfinite(value.value):
        return "not finite"
    form, scale = METRICS[key].form, SCALES.get(key, 1.0)
    text = form.format(value.value * scale)
    if interval and value.low is not None and value.high is not None:
        text += f" [{form.format(value.low * scale)}, {form.format(value.high * scale)}]"
    return text
