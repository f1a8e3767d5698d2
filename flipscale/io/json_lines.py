"""JSON lines: a record a line, appended while a run goes on and read while it may be writing."""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flipscale.io.atomic import atomic_write, sync
from flipscale.io.files import check_plain

_log = logging.getLogger(__name__)

_MOST = 2**63

# How many lines of a file are no records, as the last warning had it.
_told: dict[Path, int] = {}


def append(path: Path, records: Iterable[dict[str, Any]], is_synced: bool = False) -> None:
    """Append a line for each record, all of them in one write; none for no record.

    A line that an earlier writer did not finish is ended first, so that it spoils no record but its own.

    Args:
        is_synced: whether to wait until the lines, and the name of a new file, are on disk.

    Raises:
        ValueError: there is a folder, a pipe or a device instead.
        OSError: the disk is full or not writable.
    """
    text = "".join(map(_as_line, records)).encode()
    if not text:
        return
    is_new = not path.exists()
    check_plain(path)
    with open(path, "ab", buffering=0) as file:
        text = (b"\n" if _ends_torn(path) else b"") + text
        while text:
            text = text[file.write(text) :]
        if is_synced:
            os.fsync(file.fileno())
    if is_synced and is_new:
        sync(path.parent)


def read(path: Path, **fields: Any) -> list[dict[str, Any]]:
    """Return the records of a file, none where there is no file.

    Lines that are no records are left out, and counted in a warning: a disk or a text editor may have left anything. A
    last line without an end is still being written, or was when its writer was killed, and is left out without a word.

    Args:
        fields: the type of each field that is used: `step=int`, or `position=int | None` of one that a record may lack.

    Raises:
        ValueError: there is a folder, a pipe or a device instead.
    """
    return list(each(path, **fields))


def each(path: Path, **fields: Any) -> Iterator[dict[str, Any]]:
    """Yield what `read` returns, one at a time in memory."""
    if not path.exists():
        return
    check_plain(path)
    num_lines = left_out = 0
    with open(path, "rb") as file:
        for line in file:
            record = _parsed(line, fields)
            num_lines += 1
            if record is not None:
                yield record
            elif line.strip() and line.endswith(b"\n"):
                left_out += 1
    if left_out > _told.get(path, 0):
        _told[path] = left_out
        _log.warning("%s: %d of %d lines are no records of it and are skipped", path, left_out, num_lines)


def rewrite(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write a file of these records alone in place of the one that may be there; a kill leaves one of the two."""
    with atomic_write(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.writelines(map(_as_line, records))


def _as_line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _ends_torn(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(0, 2)
        if file.tell() == 0:
            return False
        file.seek(-1, 2)
        return file.read(1) != b"\n"


def _parsed(line: bytes, fields: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    return record if all(_is_of(record.get(name), kind) for name, kind in fields.items()) else None


def _is_of(value: Any, kind: Any) -> bool:
    """Return whether a value is of a type, and no number that nobody counts to: JSON has 1e400, NaN, and 500 digits."""
    is_number = isinstance(value, int | float)
    return isinstance(value, kind) and (not is_number or abs(value) < _MOST)
