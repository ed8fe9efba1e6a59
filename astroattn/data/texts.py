"""Texts, labelled texts and scored sentence pairs in files, and long texts cut into chunks of tokens."""

from __future__ import annotations

import ast
import csv
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

TABLES = {".csv": ",", ".tsv": "\t"}  # the delimiter by the ending
TEXT_COLUMNS = ("text", "sentence", "content", "document", "review", "question")
PAIR_COLUMNS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("text1", "text2"), ("question1", "question2"))
LABEL_COLUMNS = ("label", "labels", "class", "target")
SCORE_COLUMNS = ("score", "similarity_score", "similarity")


@dataclass(frozen=True)
class Texts:
    """Rows of one text, or of two sentences that make a pair; labels and scores where the source has them."""

    rows: list[tuple[str, ...]]
    labels: list[int | str] | None = None
    scores: list[float] | None = None
    note: str = ""


def read_texts(path: Path) -> Texts:
    """The texts of a file: CSV or TSV by its ending, else one text per line, or `label text` if every line is so."""
    text = read_file(path)
    if path.suffix.lower() in TABLES:
        delimiter = TABLES[path.suffix.lower()]
        rows = [row for row in csv.reader(text.splitlines(keepends=True), delimiter=delimiter) if any(row)]
        return read_table(rows, str(path))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"data: {str(path)!r} has no text")
    found = [re.fullmatch(r"(\d+)\s+(\S.*)", line) for line in lines]
    labelled = [(match[2], int(match[1])) for match in found if match]
    if len(labelled) == len(lines):
        return Texts(
            [(text,) for text, _ in labelled], [label for _, label in labelled], note="lines of label and text"
        )
    return Texts([(line,) for line in lines], note="one text a line")


def read_file(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"data: cannot read {str(path)!r}: {error.strerror}") from None
    if b"\0" in raw:
        raise ValueError(f"data: {str(path)!r} is not a text file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def read_table(rows: list[list[str]], source: str) -> Texts:
    """Texts of a table, by the names in its first row or, without a header, by what its columns hold.

    Without a header: two texts and a number are a scored pair; a whole number before the texts is their label, as it is
    after a single text.
    """
    if not rows:
        raise ValueError(f"data: {source!r} has no rows")
    header = [cell.strip().lower() for cell in rows[0]]
    if set(header) & {*TEXT_COLUMNS, *chain(*PAIR_COLUMNS)}:
        table = [dict(zip(header, row, strict=False)) for row in rows[1:]]
        if not table:
            raise ValueError(f"data: {source!r} has a header and no rows")
        return read_records(table, header, source)
    width = len(rows[0])
    if any(len(row) != width for row in rows):
        raise ValueError(f"data: the rows of {source!r} do not all have {width} columns")
    numbers = [all(_is_number(row[column]) for row in rows) for column in range(width)]
    if numbers == [False, False, True]:
        return Texts([(row[0], row[1]) for row in rows], scores=[float(row[2]) for row in rows], note="scored pairs")
    if width > 1 and numbers[0] and not any(numbers[1:]):
        return Texts([(". ".join(row[1:]),) for row in rows], [_label(row[0]) for row in rows], note="label, text")
    if numbers == [False, True]:
        return Texts([(row[0],) for row in rows], [_label(row[1]) for row in rows], note="text, label")
    if numbers == [False]:
        return Texts([(row[0],) for row in rows], note="one text a row")
    raise ValueError(
        f"data: the columns of {source!r} are not understood; name them in a first row: text and label, or sentence1,"
        " sentence2 and score"
    )


def read_records(records: Sequence[dict[str, Any]], columns: Sequence[str], source: str) -> Texts:
    """Texts of rows with named columns."""
    pair = next((pair for pair in PAIR_COLUMNS if set(pair) <= set(columns)), None)
    text = next((name for name in TEXT_COLUMNS if name in columns), None)
    label = next((name for name in LABEL_COLUMNS if name in columns), None)
    score = next((name for name in SCORE_COLUMNS if name in columns), None)
    chosen = pair or ((text,) if text else None)
    if chosen is None:
        raise ValueError(f"data: {source!r} has no column of text; there are {', '.join(columns)}")
    if pair and score is None:
        raise ValueError(f"data: {source!r} has pairs ({', '.join(pair)}) and no score")
    try:
        rows = [tuple(str(record[name]) for name in chosen) for record in records]
        if pair and score:
            return Texts(
                rows, scores=[float(record[score]) for record in records], note=f"columns {', '.join(pair)}, {score}"
            )
        labels = [_label(record[label]) for record in records] if label else None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"data: a row of {source!r} is not complete: {error}") from None
    return Texts(rows, labels, note=f"columns {text}" + (f", {label}" if label else ""))


def read_documents(path: Path) -> list[str]:
    """Long texts: a file is one (of a table, its texts), a folder has one per .txt file."""
    if path.suffix.lower() in TABLES:
        return ["\n".join(text for row in read_texts(path).rows for text in row)]
    paths = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not paths:
        raise ValueError(f"data: no .txt files in {str(path)!r}")
    return [read_file(path) for path in paths]


def read_python_docs() -> list[str]:
    """Long real text that is on every machine: the licence of Python and the docstrings of its standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    documents = [read_file(path) for path in sorted(folder.glob("LICENSE*"))]
    for path in sorted(folder.glob("*.py")):
        nodes = ast.walk(ast.parse(path.read_bytes()))
        found = (ast.get_docstring(node) for node in nodes if isinstance(node, _DOCUMENTED))
        documents.append("\n\n".join(text for text in found if text))
    return [document for document in documents if document]


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def cut(documents: Sequence[str], tokenizer: Any, tokens: int) -> list[list[int]]:
    """Chunks of exactly `tokens` token ids, special tokens included; the rest of every document is left out.

    The first chunk of every document comes first, then the second, and so on, so that the first few are varied.
    """
    if not tokenizer.is_fast:
        raise ValueError("tokens: the tokenizer of this model cannot cut text into chunks")
    options = {"max_length": tokens, "truncation": True, "return_overflowing_tokens": True}
    chunks = [tokenizer(document, **options)["input_ids"] for document in documents]
    full = [[ids for ids in parts if len(ids) == tokens] for parts in chunks]
    return [ids for layer in zip_longest(*full) for ids in layer if ids is not None]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _label(value: Any) -> int | str:
    text = str(value).strip()
    return int(text) if re.fullmatch(r"-?\d+", text) else text
