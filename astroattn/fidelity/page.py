"""Pages of HTML that need no network: tables and charts in one of the templates."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from astroattn.fidelity.metrics import Value, show, show_interval
from astroattn.files import write_text
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
    write_text(path, environment.get_template(template).render(content))


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


def show_both(key: str, value: Value | None, interval: bool = True) -> str:
    """A figure by its name in `METRICS`, with its interval."""
    return " ".join(filter(None, (show(key, value), show_interval(key, value) if interval else "")))
