"""Tables of paths and captions as text, CSV, TSV or JSON lines, of any length: rows are parsed when they are asked for.

A first pass notes where each row begins, 8 bytes a row. A row that cannot be parsed is a bad sample and takes no other
with it: a quote that is never closed ends with its line, and the next line is a row again.
"""

import codecs
import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from flipscale.data.faults import BadSample
from flipscale.data.sources.source import MAX_TEXT_BYTES
from flipscale.io.errors import UserError
from flipscale.preparation.lists.columns import AskedColumns, Columns
from flipscale.preparation.lists.files import IMAGE_SUFFIXES, captions_of, digest_of, image_of, label_of

DELIMITERS = {".csv": ",", ".tsv": "\t", ".jsonl": ""}
# Of a row whose quoted captions have line breaks.
_MAX_ROW_LINES = 100
# Of JSON lines, whose keys are taken for the columns.
_ROWS_WITH_COLUMNS = 1000
_SHOWN = 60
_ENCODINGS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


class MalformedRow(BadSample):
    """A row of a table cannot be parsed."""

    cause = "malformed_row"


@dataclass(frozen=True)
class TableList:
    """Image files that a table names, relative to its folder, with captions.

    Args:
        header: the columns; empty for JSON lines.
        starts: int64 `(rows + 1,)`, where each row begins in the file, and where the last one ends.
        state: size and time of the file, which must stay.
        digest: of the file.
    """

    path: Path
    header: tuple[str, ...]
    columns: Columns
    starts: np.ndarray
    state: tuple[int, int]
    digest: str
    allow_outside: bool = False

    @classmethod
    def of_file(cls, path: Path, asked: AskedColumns, allow_outside: bool) -> "TableList":
        """Read a table once for its columns and rows.

        Raises:
            ValueError: it is no such table, or a column is missing.
        """
        delimiter = DELIMITERS[path.suffix.lower()]
        with open(path, "rb") as file:
            digest, state = hashlib.file_digest(file, "blake2b").hexdigest()[:32], _state(file)
            begin = _begin(path, file)
            header = _header(path, file, delimiter) if delimiter else ()
            columns = asked.among(str(path), header or _keys(path, file))
            if not header:
                file.seek(begin)
            layout = _Layout(delimiter, len(header), header.index(columns.image)) if header else None
            with tqdm(total=state[0], unit="B", unit_scale=True, desc="rows", disable=None) as bar:
                starts = np.fromiter((start for start in _starts(file, layout, bar)), np.int64)
        return cls(path, header, columns, np.append(starts, state[0]), state, digest, allow_outside)

    @property
    def layout(self) -> str:
        return f"{len(self):,} rows in {self.path}: {self.columns.told()}"

    @property
    def usual_labels(self) -> str | None:
        return self.columns.usual_label

    def __len__(self) -> int:
        return len(self.starts) - 1

    def key(self, number: int) -> str:
        try:
            image = self._row(number)[0]
        except BadSample:
            image = None
        return image if image and isinstance(image, str) else self.place(number)

    def place(self, number: int) -> str:
        return f"row {number + 1}"

    def image(self, number: int) -> bytes:
        return image_of(self._row(number)[0], self.path.parent, self.allow_outside)

    def captions(self, number: int) -> list[str]:
        return captions_of(self._row(number)[1])

    def label(self, number: int) -> str:
        return label_of(self._row(number)[2])

    def fingerprint(self) -> str:
        return digest_of([self.digest, self.columns.image, self.columns.caption])

    @cached_property
    def _places(self) -> list[int]:
        return [self.header.index(name) for name in self.columns.names]

    def _row(self, number: int) -> tuple[Any, ...]:
        """Return what a row has in the columns; None for what it lacks.

        Raises:
            MalformedRow: it cannot be parsed.
            OSError: the file is another than at first.
        """
        record = self._record(number)
        try:
            if not self.header:
                fields = _object(record)
                return tuple(fields.get(name) for name in self.columns.names)
            row = _fields(record, DELIMITERS[self.path.suffix.lower()])
            if len(row) != len(self.header):
                raise MalformedRow(f"it has {len(row)} fields, the header has {len(self.header)}")
        except MalformedRow as error:
            begin = record[:_SHOWN].decode("utf-8", "replace").strip()
            raise MalformedRow(f"{self.place(number)}, {begin!r}: {error}") from error
        return tuple(row[place] for place in self._places)

    def _record(self, number: int) -> bytes:
        """Return the bytes of a row, at most one more than a row may have."""
        begin, end = self.starts[number : number + 2].tolist()
        with open(self.path, "rb") as file:
            if _state(file) != self.state:
                raise OSError(f"{self.path} was written to while it was read; start again in a new folder")
            file.seek(begin)
            return file.read(min(end - begin, MAX_TEXT_BYTES + 1))


@dataclass(frozen=True)
class _Layout:
    """What tells whether a line is a row of a table: its delimiter, its number of columns, and which names images."""

    delimiter: str
    width: int
    image: int


def _state(file: BinaryIO) -> tuple[int, int]:
    state = os.fstat(file.fileno())
    return state.st_size, state.st_mtime_ns


def _begin(path: Path, file: BinaryIO) -> int:
    """Go to the first byte after the mark of UTF-8, if there is one, and return its place.

    Raises:
        ValueError: the file has another encoding.
    """
    file.seek(0)
    first = file.read(3)
    if first[:2] in _ENCODINGS:
        raise UserError(f"{path} is no table in UTF-8 (it is {_ENCODINGS[first[:2]]}); save it as UTF-8")
    return file.seek(len(first) if first == codecs.BOM_UTF8 else 0)


def _header(path: Path, file: BinaryIO, delimiter: str) -> tuple[str, ...]:
    """Read the first line that is not blank.

    Raises:
        ValueError: it cannot be a header.
    """
    while (line := file.readline(MAX_TEXT_BYTES)) and not line.strip():
        pass
    try:
        # Columns that are not asked for may be called as they are.
        return tuple(_fields(line.decode("utf-8", "replace").encode(), delimiter)) if line else ()
    except MalformedRow as error:
        kind = path.suffix[1:].upper()
        raise UserError(f"{path} is no {kind} table in UTF-8 (its header: {error})") from error


def _keys(path: Path, file: BinaryIO) -> tuple[str, ...]:
    """Return the keys of the first JSON lines.

    Raises:
        ValueError: none of them is an object, though there are some.
    """
    found: dict[str, None] = {}
    why: BadSample | None = None
    lines = iter(lambda: file.readline(MAX_TEXT_BYTES), b"")
    for line in islice((line for line in lines if line.strip()), _ROWS_WITH_COLUMNS):
        try:
            found |= dict.fromkeys(_object(line))
        except MalformedRow as error:
            why = why or error
    if not found and why:
        raise UserError(f"{path} is no JSONL table in UTF-8 ({why}); it has an object on each line")
    return tuple(found)


def _starts(file: BinaryIO, layout: _Layout | None, bar: tqdm) -> Iterator[int]:
    """Yield where each row begins, from here to the end of the file. Blank lines are none."""
    end = file.tell()
    while line := file.readline(MAX_TEXT_BYTES):
        begin, end = end, end + len(line)
        if len(line) == MAX_TEXT_BYTES and not line.endswith(b"\n"):
            while rest := file.readline(MAX_TEXT_BYTES):
                end += len(rest)
                if rest.endswith(b"\n"):
                    break
        elif layout and line.count(b'"') % 2:
            end += _more(file, line, layout)
            file.seek(end)
        bar.update(end - begin)
        if not line.isspace():
            yield begin


def _more(file: BinaryIO, line: bytes, layout: _Layout) -> int:
    """Return how many bytes of the next lines belong to a row that begins with `line`, which has a quote too many.

    A row goes on until its quotes are balanced. If it is none then, is too long, or has a line that names an image
    itself, the quote was one too many: the row is its first line.
    """
    record = line
    for _ in range(_MAX_ROW_LINES):
        following = file.readline(MAX_TEXT_BYTES)
        if not following or len(record) + len(following) > MAX_TEXT_BYTES or _names_image(following, layout):
            return 0
        record += following
        if following.count(b'"') % 2:
            try:
                is_row = len(_fields(record, layout.delimiter)) == layout.width
            except MalformedRow:
                is_row = False
            return len(record) - len(line) if is_row else 0
    return 0


def _names_image(line: bytes, layout: _Layout) -> bool:
    fields = line.strip().split(layout.delimiter.encode())
    suffixes = tuple(suffix.encode() for suffix in IMAGE_SUFFIXES)
    return len(fields) >= layout.width and fields[layout.image].strip(b'"').lower().endswith(suffixes)


def _text(record: bytes) -> str:
    if len(record) > MAX_TEXT_BYTES:
        raise MalformedRow(f"it has more than {MAX_TEXT_BYTES:,} bytes")
    try:
        return record.decode("utf-8").strip("\r\n")
    except UnicodeDecodeError as error:
        raise MalformedRow(f"it is not UTF-8 ({error})") from error


def _fields(record: bytes, delimiter: str) -> Sequence[str]:
    """Return the fields of a row of CSV or TSV.

    Raises:
        MalformedRow: it is no such row.
    """
    text = _text(record)
    if '"' not in text:
        return text.split(delimiter)
    csv.field_size_limit(MAX_TEXT_BYTES)
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if row]
    except csv.Error as error:
        raise MalformedRow(f"its quotes do not match ({error})") from error
    if len(rows) != 1:
        raise MalformedRow("it has a line break outside quotes")
    return rows[0]


def _object(record: bytes) -> dict[str, Any]:
    """Return a JSON line.

    Raises:
        MalformedRow: it is no JSON object.
    """
    text = _text(record)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedRow(f"it is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise MalformedRow(f"it is {type(found).__name__}, not an object")
    return found
