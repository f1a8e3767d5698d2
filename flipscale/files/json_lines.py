"""JSON lines: a record a line, appended while a run goes on and read while it may be writing."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flipscale.files.aside import sync, written_aside


def append(path: Path, records: Iterable[dict[str, Any]], is_synced: bool = False) -> None:
    """Append a line for each record, all of them in one write; none for no record.

    A line that an earlier writer did not finish is ended first, so that it spoils no record but its own.

    Args:
        is_synced: whether to wait until the lines, and the name of a new file, are on disk.

    Raises:
        OSError: the disk is full or not writable.
    """
    text = "".join(map(_as_line, records)).encode()
    if not text:
        return
    is_new = not path.exists()
    with open(path, "ab", buffering=0) as file:
        text = (b"\n" if _ends_torn(path) else b"") + text
        while text:
            text = text[file.write(text) :]
        if is_synced:
            os.fsync(file.fileno())
    if is_synced and is_new:
        sync(path.parent)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file, none where there is no file; a torn line is left out."""
    return list(each(path))


def each(path: Path) -> Iterator[dict[str, Any]]:
    """Yield what `read` returns, one at a time in memory."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            record = _parsed(line)
            if record is not None:
                yield record


def rewrite(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write a file of these records alone in place of the one that may be there; a kill leaves one of the two."""
    with written_aside(path) as partial, open(partial, "w", encoding="utf-8") as file:
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


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
