"""Parquet tables of paths or images, and captions, of any length: a few rows at a time are in memory."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flipscale.data.faults import BadSample
from flipscale.io.errors import UserError
from flipscale.preparation.lists.columns import AskedColumns, Columns
from flipscale.preparation.lists.files import UnreadableFile, captions_of, digest_of, image_of, label_of

_ROWS_AT_ONCE = 64


@dataclass
class ParquetList:
    """The rows of a parquet file; best read in their order.

    Args:
        ends: int64 `(row groups,)`, the number of the row after each row group.
        footer: a digest of the file's metadata.
    """

    path: Path
    columns: Columns
    ends: np.ndarray
    footer: str
    allow_outside: bool = False
    _rows: "_Rows | None" = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def of_file(cls, path: Path, asked: AskedColumns, allow_outside: bool) -> "ParquetList":
        """Read a file's metadata.

        Raises:
            ValueError: it is no parquet file, or a column is missing.
        """
        from pyarrow import ArrowException, parquet

        try:
            metadata = parquet.read_metadata(path)
            schema = metadata.schema.to_arrow_schema()
        except (ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path} is no parquet table ({reason}); write it again") from error
        columns = asked.among(str(path), schema.names, _features(schema))
        ends = np.cumsum([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)], dtype=int)
        return cls(path, columns, ends, digest_of(_footer(path).hex()), allow_outside)

    @property
    def layout(self) -> str:
        return f"{len(self):,} rows in {self.path}: {self.columns.told()}"

    @property
    def usual_labels(self) -> str | None:
        return self.columns.usual_label

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}

    def key(self, number: int) -> str:
        try:
            image = self._row(number)[0]
        except BadSample:
            image = None
        path = image.get("path") if isinstance(image, dict) else image
        return path if path and isinstance(path, str) else self.place(number)

    def place(self, number: int) -> str:
        return f"{self.path}#{number}"

    def image(self, number: int) -> bytes:
        return image_of(self._row(number)[0], self.path.parent, self.allow_outside)

    def captions(self, number: int) -> list[str]:
        return captions_of(self.columns.named(self.columns.caption, self._row(number)[1]))

    def label(self, number: int) -> str:
        assert self.columns.label is not None
        return label_of(self.columns.named(self.columns.label, self._row(number)[2]))

    def fingerprint(self) -> str:
        return digest_of([str(self.path), self.footer, self.columns.image, self.columns.caption])

    def _row(self, number: int) -> tuple[Any, ...]:
        """Return the columns of a row.

        Raises:
            UnreadableFile: the table is damaged there.
        """
        group = int(np.searchsorted(self.ends, number, side="right"))
        first = int(self.ends[group - 1]) if group else 0
        if self._rows is None or self._rows.group != group or number < self._rows.first:
            self._rows = _Rows(self.path, group, first, list(self.columns.names))
        return self._rows.row(number)


class _Rows:
    """The rows of a row group from the first to the last that was asked for.

    Args:
        first: the number of the group's first row.
    """

    def __init__(self, path: Path, group: int, first: int, columns: list[str]) -> None:
        self.group, self.first = group, first
        self._columns, self._why = columns, ""
        self._batch: Any = ()
        self._batches = _batches(path, group, columns)

    def row(self, number: int) -> tuple[Any, ...]:
        """Return the fields of a row, not before the rows that were asked for last."""
        while number >= self.first + len(self._batch) and not self._why:
            self.first += len(self._batch)
            try:
                self._batch = next(self._batches)
            except Exception as error:
                # Whatever pyarrow makes of damaged bytes, and the end of a group that has fewer rows than it says.
                self._batch, self._why = (), " ".join(str(error).split()) or "it ends early"
        try:
            if not self._why:
                return tuple(self._batch.column(name)[number - self.first].as_py() for name in self._columns)
        except Exception as error:
            raise UnreadableFile(f"the row cannot be read ({error})") from error
        raise UnreadableFile(f"row group {self.group} cannot be read ({self._why})")


def _features(schema: Any) -> dict[str, Any]:
    """Return what `datasets` wrote of the columns, if it wrote the table."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    from datasets import Features

    try:
        return dict(Features.from_arrow_schema(schema))
    except Exception:
        # Whatever it makes of metadata that another version, or nobody, wrote.
        return {}


def _batches(path: Path, group: int, columns: list[str]) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as table:
        yield from table.iter_batches(_ROWS_AT_ONCE, [group], columns, use_threads=False)


def _footer(path: Path) -> bytes:
    """Return the metadata at the end of a parquet file, after which come its length and four letters."""
    with open(path, "rb") as file:
        end = file.seek(-8, 2)
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(end - length, 0))
        return file.read(length)
