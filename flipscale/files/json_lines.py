"""JSON lines: a record a line, appended while a run goes on and read while it may be writing."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flipscale.files.aside import sync, write_text


def append(path: Path, records: Iterable[dict[str, Any]], is_synced: bool = False) -> None:
    """Append a line for each record, all of them in one write; none for no record.

    A line that an earlier writer did not finish is ended first, so that it spoils no record but its own.

    Args:
        is_synced: whether to wait until the lines, and the name of a new file, are on disk.

    Raises:
        OSError: the disk is full or not writable.
    """
    text = _as_lines(records).encode()
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
    if not path.exists():
        return []
    found = (_parsed(line) for line in path.read_bytes().split(b"\n"))
    return [record for record in found if record is not None]


def rewrite(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write a file of these records alone in place of the one that may be there; a kill leaves one of the two."""
    write_text(path, _as_lines(records))


def _as_lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


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
