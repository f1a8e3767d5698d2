"""Parquet tables of paths or images, and captions, of any length: a few rows at a time are in memory."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flipscale.data.faults import BadSample
from flipscale.preparation.lists.columns import CAPTION_COLUMNS, IMAGE_COLUMNS, column
from flipscale.preparation.lists.files import UnreadableFile, captions_of, digest_of, image_of

_ROWS_AT_ONCE = 64


@dataclass
class ParquetList:
    """The rows of a parquet file; best read in their order.

    Args:
        ends: int64 `(row groups,)`, the number of the row after each row group.
        footer: a digest of the file's metadata.
    """

    path: Path
    image_column: str
    caption_column: str
    ends: np.ndarray
    footer: str
    allow_outside: bool = False
    _rows: "_Rows | None" = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def of_file(cls, path: Path, image: str | None, caption: str | None, allow_outside: bool) -> "ParquetList":
        """Read a file's metadata; the columns are named as for text tables.

        Raises:
            ValueError: it is no parquet file, or a column is missing.
        """
        from pyarrow import ArrowException, parquet

        try:
            metadata = parquet.read_metadata(path)
            columns = metadata.schema.to_arrow_schema().names
        except (ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} is no parquet table ({reason}); write it again") from error
        image = column(str(path), columns, image, IMAGE_COLUMNS, "image")
        caption = column(str(path), columns, caption, CAPTION_COLUMNS, "caption")
        ends = np.cumsum([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)], dtype=int)
        return cls(path, image, caption, ends, digest_of(_footer(path).hex()), allow_outside)

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
        return captions_of(self._row(number)[1])

    def fingerprint(self) -> str:
        return digest_of([str(self.path), self.footer, self.image_column, self.caption_column])

    def _row(self, number: int) -> tuple[Any, Any]:
        """Return image and captions of a row.

        Raises:
            UnreadableFile: the table is damaged there.
        """
        group = int(np.searchsorted(self.ends, number, side="right"))
        first = int(self.ends[group - 1]) if group else 0
        if self._rows is None or self._rows.group != group or number < self._rows.first:
            self._rows = _Rows(self.path, group, first, [self.image_column, self.caption_column])
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

    def row(self, number: int) -> tuple[Any, Any]:
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
                return tuple(self._batch.column(name)[number - self.first].as_py() for name in self._columns)  # type: ignore[return-value]
        except Exception as error:
            raise UnreadableFile(f"the row cannot be read ({error})") from error
        raise UnreadableFile(f"row group {self.group} cannot be read ({self._why})")


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
