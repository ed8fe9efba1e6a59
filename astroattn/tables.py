"""Tables as plain text that fits a terminal, or as markdown; nothing in them is ever cut."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count

WIDTH = 80  # of `str(...)`, and where there is no terminal
GAP = "  "
NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?%?( \(\d+\))?|\[.*\]|-|nan|inf|not finite|")


@dataclass(frozen=True)
class Table:
    """Rows of text under columns.

    A table that is too wide has the names of its modules shortened by what they share, then its remarks below it, and
    is then printed in several parts that begin with the same column.

    Args:
        columns: the headings.
        rows: of as many cells each.
        title, caption: lines above and below.
        names: the column of module names, or None. The first column stands in every part.
        remarks: the column of sentences, or None.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    caption: str = ""
    names: int | None = None
    remarks: int | None = None

    def text(self, width: int = WIDTH) -> str:
        """The table in lines of at most `width` characters, but for single cells that are longer."""
        above, below = textwrap.wrap(self.title, width), textwrap.wrap(self.caption, width)
        table = self
        if table._width() > width and (shared := table._share_names()) is not None:
            table, line = shared
            above.append(line)
        if table._width() > width and (told := table._number_remarks()) is not None:
            table, lines = told
            below = [*lines, *below]
        return "\n".join([*above, "\n\n".join(part._draw() for part in table._split(width)), *below])

    def markdown(self) -> str:
        """The table as GitHub's markdown has it."""
        rule = [":---" if left else "---:" for left in self._left()]
        lines = [list(self.columns), rule, *self.rows]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return "\n\n".join(filter(None, (self.title, table, self.caption)))

    def _left(self) -> list[bool]:
        """Which columns are words: the first, names, and those whose cells are not all numbers."""
        return [
            place in (0, self.names) or not all(NUMBER.fullmatch(row[place]) for row in self.rows)
            for place in range(len(self.columns))
        ]

    def _widths(self) -> list[int]:
        """A heading takes two lines where its cells are narrower."""
        widths = []
        for place, heading in enumerate(self.columns):
            least = max([1, *(len(row[place]) for row in self.rows), *map(len, heading.split())])
            widths.append(next(width for width in count(least) if len(textwrap.wrap(heading, width)) <= 2))
        return widths

    def _width(self) -> int:
        return sum(self._widths()) + len(GAP) * (len(self.columns) - 1)

    def _draw(self) -> str:
        widths, left = self._widths(), self._left()
        headings = [textwrap.wrap(each, width) for each, width in zip(self.columns, widths, strict=True)]
        depth = max(map(len, headings))
        lines = [[lines[number] if number < len(lines) else "" for lines in headings] for number in range(depth)]
        lines += [["-" * width for width in widths], *map(list, self.rows)]
        return "\n".join(
            GAP.join(
                cell.ljust(width) if is_left else cell.rjust(width)
                for cell, width, is_left in zip(line, widths, left, strict=True)
            ).rstrip()
            for line in lines
        )

    def _share_names(self) -> tuple[Table, str] | None:
        """The table with what all names share taken out, and a line that says what; None where they share nothing."""
        if self.names is None:
            return None
        paths = [row[self.names].split(".") for row in self.rows]
        short = min(map(len, paths))
        start = next((n for n in range(short) if len({path[n] for path in paths}) > 1), short - 1)
        end = next((n for n in range(short - start) if len({path[-1 - n] for path in paths}) > 1), 0)
        if len(paths) < 2 or start + end == 0:
            return None
        middles = [".".join(path[start : len(path) - end]) for path in paths]
        rows = [
            (*row[: self.names], middle, *row[self.names + 1 :]) for row, middle in zip(self.rows, middles, strict=True)
        ]
        whole = ".".join([*paths[0][:start], "*", *paths[0][len(paths[0]) - end :]])
        heading = self.columns[self.names]
        columns = (*self.columns[: self.names], "*", *self.columns[self.names + 1 :])
        return replace(self, columns=columns, rows=rows), f"{heading}: {whole}"

    def _number_remarks(self) -> tuple[Table, list[str]] | None:
        """The table with numbers for its remarks, and the remarks; None where it has none."""
        if self.remarks is None:
            return None
        place = self.remarks
        numbers: dict[str, int] = {}
        for row in self.rows:
            if row[place]:
                numbers.setdefault(row[place], len(numbers) + 1)
        rows = [
            (*row[:place], f"({numbers[row[place]]})" if row[place] else "", *row[place + 1 :]) for row in self.rows
        ]
        return replace(self, rows=rows), [f"({number}) {text}" for text, number in numbers.items()]

    def _split(self, width: int) -> list[Table]:
        """Tables of some columns each, the first of them in all."""
        widths = self._widths()
        parts: list[list[int]] = [[0]]
        for place in range(1, len(widths)):
            taken = sum(widths[each] + len(GAP) for each in (*parts[-1], place)) - len(GAP)
            if taken > width and len(parts[-1]) > 1:
                parts.append([0])
            parts[-1].append(place)
        return [
            Table(
                [self.columns[place] for place in part],
                [[row[place] for place in part] for row in self.rows],
                names=part.index(self.names) if self.names in part else None,
            )
            for part in parts
        ]


Block = Table | str


def render(blocks: Iterable[Block], width: int = WIDTH) -> str:
    """Lines and tables below one another."""
    return "\n".join(block if isinstance(block, str) else block.text(width) for block in blocks)


def render_markdown(blocks: Iterable[Block]) -> str:
    """The same as paragraphs and tables of markdown."""
    return "\n\n".join(block if isinstance(block, str) else block.markdown() for block in blocks if block)


def terminal_width() -> int:
    """The columns of the terminal, or of the variable COLUMNS; `WIDTH` where there is neither."""
    return shutil.get_terminal_size((WIDTH, 24)).columns
