"""Lists of image-text pairs that can become shards: folders of images, tables of paths, and `datasets` data sets.

A pair is read when it is asked for, so a list may have any length. A bad pair raises `BadSample` and spoils no other
pair. Text tables are not read by pyarrow.csv: it reads a stray quote to the end of the file, and refuses a table that
has a row in another encoding. Here such a row is a bad sample.
"""

import codecs
import csv
import errno
import hashlib
import json
import mmap
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from flipscale.data.captions import captions_of_json, choose_caption, encoded_captions
from flipscale.data.samples import (
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    BadSample,
    MissingCaption,
    check_bytes,
    one_line_reason,
    wrap_errors,
)
from flipscale.data.sources.dataset import load_rows
from flipscale.data.sources.raw_data import IMAGE_SUFFIXES, TABLE_SUFFIXES, is_saved_dataset, no_shards
from flipscale.io.errors import UserError
from flipscale.io.model_folder import is_path
from flipscale.io.paths import file_state, is_utf8, is_utf16
from flipscale.io.progress import Progress
from flipscale.recipe.data import SourceRecipe

if TYPE_CHECKING:
    from datasets import Dataset

FOLDER = "folder"  # the value of --labels for class folders
_USUAL_COLUMNS = {
    "image": ("image", "file_name", "filename", "path", "filepath", "image_path", "img", "picture"),
    "caption": ("caption", "captions", "text", "title", "txt", "description"),
    "label": ("label", "class", "category", "labels"),
}
_FLAGS = {"image": "--image_column", "caption": "--caption_column", "label": "--labels"}
_DELIMITERS = {".csv": ",", ".tsv": "\t", ".jsonl": ""}
_CAPTION_SUFFIXES = (".txt", ".json", ".TXT", ".JSON")
_PARTS = {"train", "test", "val", "valid", "validation"}  # names that `datasets` gives the parts of a folder of images
_MAX_ROW_LINES = 100  # lines of a row whose quoted captions have line breaks
_KEYED_ROWS = 1000  # JSON lines whose keys are the columns
_ROWS_AT_ONCE = 64
_SHOWN, _SHOWN_NAMES = 60, 600  # characters of a malformed row, and of the columns' names
_NO_LABEL = "missing_label"  # cause of a pair without a class
_FILE_NAME = re.compile(r"\.[A-Za-z]{2,7}$")  # names on the Hub hardly end like this
# These errors are not the file's fault: the same command would read it later.
_MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class UnreadableFile(BadSample):
    """A file of the pair is missing, is not a plain file, or cannot be read."""

    cause = "unreadable_file"


class MalformedRow(BadSample):
    """A row of a table cannot be parsed."""

    cause = "malformed_row"


class PairSource(ABC):
    """Pairs by number, in a fixed order; a list can be copied to another process.

    `image`, `captions` and `label` raise BadSample for a pair that cannot be used.
    """

    usual_labels: str | None = None  # a value for --labels: `folder`, or a column with a usual name of classes

    @property
    @abstractmethod
    def layout(self) -> str:
        """Line about the number of pairs, and where images and captions come from."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def place(self, number: int) -> str:
        """Return the place of a pair in its source, without reading it."""

    def key(self, number: int) -> str:
        """Return the name of a pair in its source."""
        return self.place(number)

    @abstractmethod
    def image(self, number: int) -> bytes:
        """Return the stored image of a pair."""

    @abstractmethod
    def captions(self, number: int) -> list[str]:
        """Return the captions of a pair that are not blank, at least one."""

    def label(self, number: int) -> str:
        """Return the class name of a pair, in a list that was opened with `labels`."""
        raise BadSample("there is none", _NO_LABEL)

    def votes(self, number: int) -> np.ndarray | None:
        """Return how many people gave each answer and, last, any other, int `(answers + 1,)`; None without answers."""
        return None

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a digest of the names of the pairs (files, or the data set and its columns), not of the images."""

    @abstractmethod
    def state(self, number: int) -> str:
        """Return a text that changes with the files and the row of a pair."""


def open_pairs(
    source: str,
    image_column: str | None = None,
    caption_column: Sequence[str] = (),
    split: str = "train",
    allow_outside: bool = False,
    labels: str | None = None,
) -> PairSource:
    """Return the pairs of a folder of images, a table, or a `datasets` data set, saved or on the Hub. Raise UserError
    if the source is missing, lacks a column, or has no images or no captions.

    Args:
        source: folder, table or name.
        image_column, caption_column: by default the first column with a usual name.
        allow_outside: whether to read files outside the folder of the list, named by a path or a link.
        labels: column of classes, or `folder` for class folders.
    """
    path, asked = Path(source), {"image": image_column, "caption": next(iter(caption_column), None), "label": labels}
    asked |= {f"caption {number}": name for number, name in enumerate(caption_column[1:], 2)}
    if path.is_dir():
        metadata = (path / f"metadata{suffix}" for suffix in TABLE_SUFFIXES)
        path = next((table for table in metadata if table.exists()), path)
    pairs: PairSource
    if path.suffix.lower() in TABLE_SUFFIXES and not path.is_dir():
        if not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            raise UserError(f"{path} {what}; name a folder, a table or a data set")
        kind = ParquetList if path.suffix.lower() == ".parquet" else TextTable
        pairs = kind.open(path, asked, allow_outside)
    elif not path.is_dir() or is_saved_dataset(str(path)) or (_holds_parquet(path) and not _holds_images(path)):
        pairs = DatasetList.load(source, asked, split, allow_outside)
    elif labels not in (None, FOLDER):
        raise UserError(f"--labels is {labels!r}, and {source} has no columns; give --labels {FOLDER}")
    else:
        pairs = list_folder(path, allow_outside)
    if not len(pairs):
        what = f"images; they are files named {' '.join(IMAGE_SUFFIXES)}" if path.is_dir() else "rows"
        raise UserError(f"{source} has no {what}")
    return pairs


def source_of(name: str) -> SourceRecipe:
    """Return the source of shards, or of a saved data set or Parquet files that hold images in columns of usual names.

    Raise UserError for other Parquet files and data sets, such as a table of paths.
    """
    path = Path(name)
    if not (is_saved_dataset(name) or path.suffix == ".parquet" or _holds_parquet(path)):
        return SourceRecipe(shards=name)
    features = load_rows(name, None, "train").features
    texts = {column for column, feature in features.items() if getattr(feature, "dtype", "").endswith("string")}
    image = next((column for column in _USUAL_COLUMNS["image"] if column in features.keys() - texts), None)
    caption = next((column for column in _USUAL_COLUMNS["caption"] if column in features), None)
    if image is None or caption is None:
        raise no_shards(name)
    return SourceRecipe(dataset=name, image_column=image, caption_columns=[caption])


def _holds_parquet(path: Path) -> bool:
    """Return whether a folder has Parquet files, in its subfolders too, and no shards."""
    return path.is_dir() and not any(path.glob("*.tar")) and any(path.rglob("*.parquet"))


def _holds_images(path: Path) -> bool:
    return any(file.suffix.lower() in IMAGE_SUFFIXES for file in path.rglob("*"))


@dataclass(frozen=True)
class FileList(PairSource):
    """Image files under `root`, with captions in KEY.txt or KEY.json next to them, or the names of their folders.

    Args:
        files: paths of the images in `root`.
        num_captioned: number of images with a text next to them.
        allow_outside: whether to follow links out of `root`.
        by_class: whether the caption of an image is the name of its folder.
    """

    root: Path
    files: list[str]
    num_captioned: int
    allow_outside: bool = False
    by_class: bool = False

    @property
    def usual_labels(self) -> str | None:  # type: ignore[override]
        return FOLDER if self.by_class else None

    @property
    def layout(self) -> str:
        if not self.by_class:
            return f"{len(self):,} images: captions are the .txt or .json files beside {self.num_captioned:,} of them"
        names = sorted({name for file in self.files if (name := _class_of(file))})
        shown = ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])
        return f"{len(self):,} images in {len(names):,} class folders ({shown}): captions are the folders' names"

    def __len__(self) -> int:
        return len(self.files)

    def place(self, number: int) -> str:
        return self.files[number]

    def image(self, number: int) -> bytes:
        return read_file(self.root, self.files[number], self.allow_outside)

    def captions(self, number: int) -> list[str]:
        if self.by_class:
            return _captions_of(self._folder(number, MissingCaption.cause))
        if text := self._text_beside(number):
            content = read_file(self.root, text, self.allow_outside, MAX_TEXT_BYTES)
            return _on_one_line((content,) if text.lower().endswith(".txt") else captions_of_json(content))
        raise MissingCaption("no .txt or .json next to it")

    def _text_beside(self, number: int) -> str | None:
        names = (str(PurePath(self.files[number]).with_suffix(suffix)) for suffix in _CAPTION_SUFFIXES)
        return next((name for name in names if os.path.lexists(self.root / name)), None)

    def label(self, number: int) -> str:
        return _label_of(self._folder(number, _NO_LABEL))

    def _folder(self, number: int, cause: str) -> str:
        if folder := _class_of(self.files[number]):
            return folder
        raise BadSample("it lies in no folder of a class", cause)

    def fingerprint(self) -> str:
        return list_digest(self.files)

    def state(self, number: int) -> str:
        text = None if self.by_class else self._text_beside(number)
        return repr([(name, file_state(self.root / name)) for name in (self.files[number], text) if name])


def list_folder(root: Path, allow_outside: bool) -> FileList:
    """Return the images below a folder, in the layout that is recognised.

    Everything that is named like an image is listed, and so are folders that cannot be listed; reading them fails.
    Raise UserError if there are images, but nothing that can be their captions.
    """
    files, tables, num_captioned = _walk(root)
    if num_captioned or not files:
        return FileList(root, files, num_captioned, allow_outside)
    parts = {PurePath(file).parts[0] for file in files if len(PurePath(file).parts) > 2}
    if parts and parts <= _PARTS:
        raise UserError(
            f"{root} has the parts {' and '.join(sorted(parts))}, whose images would be mixed; name one of them, such "
            f"as {root / max(parts, key=lambda part: part == 'train')}"
        )
    if len({name for file in files if (name := _class_of(file))}) < 2:
        hint = f"; if {tables[0]} has them, name it in place of the folder" if tables else ""
        raise UserError(
            f"{root} has {len(files):,} images and no captions: put KEY.txt next to KEY.jpg, or a metadata.csv with "
            f"the columns file_name and text into the folder, or sort the images into a folder for each class{hint}"
        )
    # In the order of a hash, because in the order of the names a shard would have few classes.
    return FileList(root, sorted(files, key=list_digest), 0, allow_outside, by_class=True)


def picture_files(root: Path) -> FileList:
    """Return the images below a folder by name, with or without captions. Links out of the folder are not followed."""
    files, _, num_captioned = _walk(root)
    return FileList(root, files, num_captioned)


def _walk(root: Path) -> tuple[list[str], list[Path], int]:
    """Return the images below a folder, the tables, and the number of images with a text next to them."""
    found: list[str] = []  # with folders that cannot be listed
    tables: list[Path] = []
    num_captioned = 0
    for folder, folders, files in os.walk(root, onerror=lambda error: found.append(error.filename)):
        links = {name for name in folders if os.path.islink(os.path.join(folder, name))}
        named = {name for name in (*files, *folders) if PurePath(name).suffix.lower() in IMAGE_SUFFIXES}
        texts = {PurePath(name).stem for name in files if PurePath(name).suffix in _CAPTION_SUFFIXES}
        num_captioned += sum(PurePath(name).stem in texts for name in named)
        found.extend(os.path.join(folder, name) for name in links | named)
        tables += [Path(folder, name) for name in files if PurePath(name).suffix.lower() in _DELIMITERS]
    return sorted(os.path.relpath(path, root) for path in found), sorted(tables), num_captioned


def _class_of(file: str) -> str:
    """Return the name of a file's folder with blanks for `_`; empty for files of the root."""
    return PurePath(file).parent.name.replace("_", " ").strip()


def find_columns(source: str, names: Sequence[str], asked: dict[str, str | None]) -> dict[str, str]:
    """Return the columns of `image`, `caption` and, if asked for, `label`. Raise UserError if a column is missing, or
    its name is not unique.

    Args:
        names: all columns of the list `source`.
        asked: column by kind; None stands for the first column with a usual name, or no classes.
    """
    columns: dict[str, str] = {}
    for kind, flag in ((kind, _FLAGS[kind.split()[0]]) for kind in _FLAGS | asked):
        if kind == "label" and not asked[kind]:
            continue
        usual = (asked[kind],) if asked[kind] else _USUAL_COLUMNS[kind]
        name = next((column for column in usual if column in names), None)
        if name is None:
            raise UserError(
                f"{source} has no column {' or '.join(map(str, usual))}; name the {kind.split()[0]}s' with {flag}, "
                f"one of {', '.join(names)[:_SHOWN_NAMES] or 'none'}"
            )
        if list(names).count(name) > 1:
            raise UserError(f"{source} has two columns {name}; rename one, or name another with {flag}")
        columns[kind] = name
    return columns


@dataclass
class RowList(PairSource):
    """Rows with columns.

    Args:
        source: path or name of the list.
        names: all columns.
        columns: columns of `image`, `caption`, and perhaps of `label`, `caption 2` and so on.
        root: folder of the images that rows name by a path.
        allow_outside: whether to read files outside `root`.
        class_names: class names of the columns that hold numbers of classes.
    """

    source: str
    names: Sequence[str]
    columns: dict[str, str]
    root: Path
    allow_outside: bool
    class_names: dict[str, Sequence[str]] = field(default_factory=dict, kw_only=True)

    @property
    def usual_labels(self) -> str | None:  # type: ignore[override]
        return next((name for name in _USUAL_COLUMNS["label"] if name in self.names), None)

    @property
    def layout(self) -> str:
        labels = f", classes of {self.columns['label']}" if "label" in self.columns else ""
        columns = f"images of the column {self.columns['image']}, captions of {' '.join(self.caption_columns)}{labels}"
        return f"{len(self):,} rows {self.whence}: {columns}"

    @property
    def caption_columns(self) -> list[str]:
        return [name for kind, name in self.columns.items() if kind.startswith("caption")]

    @property
    def whence(self) -> str:
        """Preposition and name of the source."""
        return f"in {self.source}"

    @abstractmethod
    def row(self, number: int) -> Sequence[Any]:
        """Return the fields of a row, in the order of `columns`. Raise BadSample if the row cannot be read."""

    def place(self, number: int) -> str:
        return f"{self.source}#{number}"

    def key(self, number: int) -> str:
        try:
            image = self.row(number)[0]
        except BadSample:
            image = None
        path = image.get("path") if isinstance(image, dict) else image
        return path if path and isinstance(path, str) else self.place(number)

    def image(self, number: int) -> bytes:
        value = self.row(number)[0]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str):
            what = "there is none" if value is None else f"it is {type(value).__name__}, neither a path nor bytes"
            raise UnreadableFile(f"image: {what}")
        return read_file(self.root, value, self.allow_outside)

    def state(self, number: int) -> str:
        try:
            row = self.row(number)
        except BadSample as error:
            return str(error)
        image = row[0].get("path") if isinstance(row[0], dict) and not row[0].get("bytes") else row[0]
        return repr((row, file_state(self.root / image) if isinstance(image, str) else ()))

    def captions(self, number: int) -> list[str]:
        cells = zip(self.columns, self.row(number), strict=True)
        given = [self._named(kind, value) for kind, value in cells if kind.startswith("caption")]
        _captions_of(given[0])  # raises if the first is blank, which may be the only right one
        return _captions_of([text for own in given for text in (own if isinstance(own, list) else [own])])

    def label(self, number: int) -> str:
        return _label_of(self._named("label", self.row(number)[2]))

    def _named(self, kind: str, value: Any) -> Any:
        """Return the name of a class where the column holds its number, else the value. None for -1, by which
        `datasets` hides a class."""
        names = self.class_names.get(self.columns[kind], ())
        if not names or not isinstance(value, int):
            return value
        return names[value] if 0 <= value < len(names) else None


@dataclass
class TextTable(RowList):
    """A CSV, TSV or JSON lines file; a first pass finds where each row begins, 8 bytes a row.

    Args:
        delimiter: empty for JSON lines.
        starts: int64 `(rows + 1,)`, start of each row in the file, and the end of the file.
    """

    delimiter: str
    starts: np.ndarray
    digest: str

    @classmethod
    def open(cls, path: Path, asked: dict[str, str | None], allow_outside: bool) -> "TextTable":
        """Find the columns and rows of a table. Raise UserError if it is no such table, or a column is missing."""
        delimiter = _DELIMITERS[path.suffix.lower()]
        if not path.stat().st_size:
            raise UserError(f"{path} is empty; expected a table with a header")
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            if is_utf16(text[:4]):
                raise UserError(f"{path} is not a table in UTF-8 (it is UTF-16); save it as UTF-8")
            first = len(codecs.BOM_UTF8) if text[:3] == codecs.BOM_UTF8 else 0
            with Progress(len(text), "rows", "B") as progress:
                if delimiter:
                    names, first, delimiter = _read_header(path, text, first, delimiter)
                    columns = find_columns(str(path), names, asked)
                    ends = partial(_end_of_quotes, text, delimiter, len(names), names.index(columns["image"]))
                    starts = np.fromiter(_row_starts(text, first, ends, progress), np.int64)
                else:
                    starts = np.fromiter(_row_starts(text, first, None, progress), np.int64)
                    names = _read_keys(path, text, starts)
                    columns = find_columns(str(path), names, asked)
            starts, digest = np.append(starts, len(text)), hashlib.blake2b(text).hexdigest()[:32]
        return cls(str(path), names, columns, path.parent, allow_outside, delimiter, starts, digest)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def place(self, number: int) -> str:
        return f"row {number + 1}"

    def fingerprint(self) -> str:
        return list_digest([self.digest, self.columns["image"], *self.caption_columns])

    def row(self, number: int) -> Sequence[Any]:
        begin, end = self.starts[number : number + 2].tolist()
        with open(self.source, "rb") as file:
            file.seek(begin)
            record = file.read(min(end - begin, MAX_TEXT_BYTES + 1))
        try:
            if not self.delimiter:
                entry = _parse_object(record)
                return [entry.get(name) for name in self.columns.values()]
            fields = _parse_fields(record, self.delimiter)
            if len(fields) != len(self.names):
                raise MalformedRow(f"it has {len(fields)} fields, the header has {len(self.names)}")
        except MalformedRow as error:
            shown_start = record[:_SHOWN].decode("utf-8", "replace").strip()
            raise MalformedRow(f"{self.place(number)}, {shown_start!r}: {error}") from error
        return [fields[self.names.index(name)] for name in self.columns.values()]


def _read_header(path: Path, text: mmap.mmap, at: int, delimiter: str) -> tuple[tuple[str, ...], int, str]:
    """Return the fields of the first line that is not blank, its end, and its delimiter."""
    line = b""
    while at < len(text) and not line.strip():
        line, at = text[at : _line_end(text, at)], _line_end(text, at)
    if delimiter == "," and b"," not in line and b";" in line:
        delimiter = ";"  # because spreadsheets write it where numbers have a decimal comma
    try:
        # Other columns may have names in another encoding.
        return tuple(_parse_fields(line.decode("utf-8", "replace").encode(), delimiter)), at, delimiter
    except MalformedRow as error:
        raise UserError(f"{path} is no {path.suffix[1:].upper()} table in UTF-8 (its header: {error})") from error


def _read_keys(path: Path, text: mmap.mmap, starts: np.ndarray) -> tuple[str, ...]:
    """Return the keys of the first JSON lines."""
    keys: dict[str, None] = {}
    why: BadSample | None = None
    for start in starts[:_KEYED_ROWS].tolist():
        try:
            keys |= dict.fromkeys(_parse_object(text[start : _line_end(text, start)]))
        except MalformedRow as error:
            why = why or error
    if not keys and why:
        raise UserError(f"{path} is not a JSONL table in UTF-8 ({why}); expected an object on each line")
    return tuple(keys)


def _line_end(text: mmap.mmap, at: int) -> int:
    return text.find(b"\n", at) + 1 or len(text)


def _row_starts(
    text: mmap.mmap, at: int, end_of: Callable[[int, int], int] | None, progress: Progress
) -> Iterator[int]:
    """Yield the start of each row that is not blank, from `at` on. `end_of` finds the end of a row whose first line has
    an odd number of quotes; None if quotes mean nothing."""
    while at < len(text):
        start, at = at, _line_end(text, at)
        line = text[start:at]
        if end_of and line.count(b'"') % 2:
            at = end_of(start, at)
        progress.update(at - start)
        if not line.isspace():
            yield start


def _end_of_quotes(text: mmap.mmap, delimiter: str, width: int, image: int, start: int, first_end: int) -> int:
    """Return the end of a row of CSV whose first line has an odd number of quotes and ends at `first_end`.

    The row goes on until its quotes are balanced. If the result has too many lines or another number of fields, the
    first line is a row alone. So it is if a later line names an image, because then the quote is stray. The line that
    closes the quotes may name the image, unless the first line has named one.

    Args:
        width: number of columns.
        image: position of the image column.
    """
    suffixes = tuple(suffix.encode() for suffix in IMAGE_SUFFIXES)

    def names_image(line: bytes) -> bool:
        fields = line.strip().split(delimiter.encode())
        return len(fields) >= width and fields[image].strip(b'"').lower().endswith(suffixes)

    end, is_whole = first_end, names_image(text[start:first_end])
    for _ in range(_MAX_ROW_LINES):
        begin, end = end, _line_end(text, end)
        line = text[begin:end]
        is_odd = line.count(b'"') % 2 == 1
        if not line or (names_image(line) and (is_whole or not is_odd)) or end - start > MAX_TEXT_BYTES:
            break
        if is_odd:
            with suppress(MalformedRow):
                return end if len(_parse_fields(text[start:end], delimiter)) == width else first_end
            break
    return first_end


def _parse_text(record: bytes) -> str:
    if len(record) > MAX_TEXT_BYTES:
        raise MalformedRow(f"it has more than {MAX_TEXT_BYTES:,} bytes")
    try:
        return record.decode("utf-8").strip("\r\n")
    except UnicodeDecodeError as error:
        raise MalformedRow(f"it is not UTF-8 ({error})") from error


def _parse_fields(record: bytes, delimiter: str) -> list[str]:
    """Return the fields of a row of CSV or TSV."""
    text = _parse_text(record)
    if '"' not in text:  # csv refuses a carriage return outside quotes
        return text.split(delimiter)
    csv.field_size_limit(MAX_TEXT_BYTES)
    try:
        return next(csv.reader([text], delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise MalformedRow(f"its quotes do not match ({error})") from error


def _parse_object(record: bytes) -> dict[str, Any]:
    """Return the object of a JSON line."""
    text = _parse_text(record)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedRow(f"it is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise MalformedRow(f"it is {type(value).__name__}, not an object")
    return value


@dataclass
class ParquetList(RowList):
    """The rows of a parquet file, best read in their order: a few rows at a time are in memory.

    Args:
        ends: int64 `(row groups,)`, number of the row after each row group.
    """

    ends: np.ndarray
    _rows: Iterator[tuple[int, tuple[Any, ...]]] | None = field(default=None, init=False, repr=False)
    _row: tuple[int, tuple[Any, ...]] = field(default=(-1, ()), init=False, repr=False)  # the last one that was read

    @classmethod
    def open(cls, path: Path, asked: dict[str, str | None], allow_outside: bool) -> "ParquetList":
        """Read the metadata of a file. Raise UserError if it is not a parquet file, or a column is missing."""
        from datasets import Features
        from pyarrow import ArrowException, parquet

        try:
            metadata = parquet.read_metadata(path)
            schema = metadata.schema.to_arrow_schema()
        except (ArrowException, OSError) as error:
            raise UserError(f"{path} is not a parquet table ({one_line_reason(error)}); write it again") from error
        classes: dict[str, Sequence[str]] = {}
        with suppress(ValueError, TypeError, KeyError, AttributeError):  # another version's metadata
            classes = _class_names(Features.from_arrow_schema(schema))
        columns = find_columns(str(path), schema.names, asked)
        ends = np.cumsum([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)], dtype=int)
        return cls(str(path), schema.names, columns, path.parent, allow_outside, ends, class_names=classes)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}

    def fingerprint(self) -> str:
        return list_digest([self.source, self.columns["image"], *self.caption_columns])

    @wrap_errors(UnreadableFile)
    def row(self, number: int) -> Sequence[Any]:
        group, last = np.searchsorted(self.ends, [number, self._row[0]], side="right").tolist()
        if self._rows is None or group != last or number < self._row[0]:
            first = int(self.ends[group - 1]) if group else 0
            rows = parquet_rows(self.source, list(self.columns.values()), [group])
            self._rows, self._row = enumerate(rows, first), (first - 1, ())
        while self._row[0] < number:
            # A generator that raised is at its end, so the later rows of a damaged group raise too.
            self._row = next(self._rows)
        return self._row[1]


def parquet_rows(file: str | Path, columns: list[str], groups: list[int] | None = None) -> Iterator[tuple[Any, ...]]:
    """Yield these columns of each row of a parquet file, or of some row groups. A few rows are in memory."""
    from pyarrow import parquet

    with parquet.ParquetFile(file) as table:
        for batch in table.iter_batches(_ROWS_AT_ONCE, groups, columns, use_threads=False):
            yield from zip(*(batch.column(column).to_pylist() for column in columns), strict=True)


@dataclass
class DatasetList(RowList):
    """The rows of a split of a `datasets` data set, whose images are not decoded."""

    split: str
    dataset: "Dataset"

    @classmethod
    def load(cls, source: str, asked: dict[str, str | None], split: str, allow_outside: bool) -> "DatasetList":
        """Load a data set by its name on the Hub, or from its folder. Raise UserError if there is none, or it lacks a
        column."""
        is_saved = Path(source).is_dir()
        if not is_saved and (is_path(source) or _FILE_NAME.search(source) or Path(source).exists()):
            what = "is not a list that flipscale reads" if Path(source).exists() else "does not exist"
            raise UserError(
                f"{source} {what}; name a folder, a table (.csv .tsv .jsonl .parquet; export a spreadsheet as CSV in "
                "UTF-8) or a data set of the Hub, such as ORG/NAME"
            )
        import datasets
        from pyarrow import ArrowException

        loaded = load_rows(source, None, split)
        names, columns = loaded.column_names, find_columns(source, loaded.column_names, asked)
        classes, image = _class_names(loaded.features), columns["image"]
        read = [*dict.fromkeys(columns.values())]  # a column may have captions and classes
        try:
            loaded = loaded.select_columns(read).cast_column(image, datasets.Image(decode=False))
        except (OSError, ValueError, RuntimeError, TypeError, LookupError, ArrowException) as error:
            raise UserError(
                f"column {image} of {source} holds no images ({one_line_reason(error)}); name another --image_column"
            ) from error
        # Downloaded images lie in the cache.
        root = Path(source) if is_saved else Path(datasets.config.HF_CACHE_HOME)
        return cls(source, names, columns, root, allow_outside, split, loaded, class_names=classes)

    @property
    def whence(self) -> str:
        return f"of the data set {self.source}, {self.split}"

    def __len__(self) -> int:
        return len(self.dataset)

    def key(self, number: int) -> str:
        return self.place(number)

    def fingerprint(self) -> str:
        return list_digest([self.source, self.split, len(self), self.columns["image"], *self.caption_columns])

    @wrap_errors(UnreadableFile)
    def row(self, number: int) -> Sequence[Any]:
        row = self.dataset[number]
        return [row[name] for name in self.columns.values()]


def _class_names(features: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """Return the class names of the columns that hold numbers of classes."""
    return {name: feature.names for name, feature in features.items() if getattr(feature, "names", None)}


def read_file(root: Path, name: str, allow_outside: bool, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
    """Return the content of a file that a list in the folder `root` names.

    Raises:
        UnreadableFile: it cannot be read, or is not a plain file.
        BadSample: it has more than `max_bytes`; or it lies outside `root`, by its name or by a link, and that is not
            allowed.
    """
    if not name or "\0" in name:
        raise UnreadableFile("the name of the file has a NUL" if name else "the name of the file is blank")
    if not is_utf8(name):
        raise UnreadableFile("the name of the file is not UTF-8; rename it")
    path = root / name
    try:
        if not allow_outside and is_outside(root, name):
            raise BadSample(f"it lies outside {root}", "outside_folder")
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise UnreadableFile(f"{name} is a {'folder' if path.is_dir() else 'pipe or device'}, not a file")
        check_bytes(state.st_size, max_bytes, name)
        return path.read_bytes()
    except OSError as error:
        if error.errno in _MACHINE_ERRORS:
            raise
        raise UnreadableFile(f"{name}: {error.strerror or error}") from error


def is_outside(root: Path, name: str) -> bool:
    """Return whether the file that a list in the folder `root` names lies outside `root`, by its name or by a link."""
    return not os.path.realpath(root / name).startswith(os.path.join(os.path.realpath(root), ""))


def _captions_of(texts: Any) -> list[str]:
    """Return a text or a list of texts as a list without blank ones."""
    return _on_one_line(encoded_captions(texts, "the caption"))


def _on_one_line(captions: tuple[bytes, ...]) -> list[str]:
    """Return captions that are not blank, each on one line, because the lines of a KEY.txt are captions of their own to
    an evaluation."""
    choose_caption(captions, 0.0)  # raises if one of them cannot be used
    texts = (caption.decode().removeprefix("\ufeff").strip() for caption in captions)
    return [" ".join(filter(None, text.splitlines())) for text in texts if text]


def _label_of(value: Any) -> str:
    """Return the name of a class: a text on one line, or a whole number."""
    name = " ".join(str(value).split()) if isinstance(value, str | int) else ""
    if not name or not is_utf8(name) or not name.isprintable():
        words = "there is none" if value in (None, "") else f"{value!r:.60} is not a name of a class"
        raise BadSample(words, _NO_LABEL)
    return name


def list_digest(content: Any) -> str:
    """Return a digest of a JSON value."""
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
