"""JSON lines: one record a line, appended by a run and read while the run may be writing."""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from flipscale.io.atomic import atomic_write, naming_full_disk, sync
from flipscale.io.paths import check_plain

_log = logging.getLogger(__name__)

# Fields of every record of a run, and of an interval of its training.
PLACE = {"step": int, "samples_seen": int, "trained_seconds": int | float}
_INTERVAL = {
    **dict.fromkeys(("images_per_s", "mfu", "data_wait_share", "loss", "lr"), int | float | None),
    **dict.fromkeys(("peak_memory_bytes", "num_replaced", "num_skipped", "num_slow"), int | None),
    "stage": str | None,
}
# Number of skipped lines of each file at the last warning.
_warned: dict[Path, int] = {}


def append(path: Path, records: Iterable[dict[str, Any]], is_synced: bool = False) -> None:
    """Append a line for each record, all in one write. No record writes nothing.

    A torn last line of an earlier writer is ended first, so that it spoils no other record. With `is_synced`, the lines
    and the name of a new file are on disk at the return. Raise UserError if `path` is a folder, a pipe or a device.
    """
    text = "".join(map(_line, records)).encode()
    if not text:
        return
    is_new = not path.exists()
    check_plain(path)
    with naming_full_disk(path), open(path, "a+b", buffering=0) as file:
        if size := file.seek(0, os.SEEK_END):
            file.seek(size - 1)
            text = text if file.read(1) == b"\n" else b"\n" + text
        while text:
            text = text[file.write(text) :]
        if is_synced:
            os.fsync(file.fileno())
    if is_synced and is_new:
        sync(path.parent)


def read(path: Path, *needed: str, **kinds: Any) -> list[dict[str, Any]]:
    """Return the records of a file, none without a file.

    A full disk, a kill or an editor can leave lines that are no records. They are skipped, and counted in a warning. A
    last line without an end is skipped silently, because its writer may be at work. Raise UserError if `path` is a
    folder, a pipe or a device.

    Args:
        needed: fields that a record must have.
        kinds: types of fields: `step=int`, or `position=int | None` for a field that a record may lack.
    """
    return list(iterate(path, *needed, **kinds))


def iterate(path: Path, *needed: str, **kinds: Any) -> Iterator[dict[str, Any]]:
    """Yield what `read` returns, with one record in memory."""
    if not path.exists():
        return
    check_plain(path)
    num_lines = num_skipped = 0
    with open(path, "rb") as file:
        for line in file:
            num_lines += 1
            record: Any = None
            with suppress(ValueError):
                record = json.loads(line)
            is_whole = isinstance(record, dict) and all(name in record for name in needed)
            if is_whole and all(_is_of(record.get(name), kind) for name, kind in kinds.items()):
                yield record
            elif line.strip() and line.endswith(b"\n"):
                num_skipped += 1
    if num_skipped > _warned.get(path, 0):
        _warned[path] = num_skipped
        _log.warning("%s: %d of %d lines are no records of it and are skipped", path, num_skipped, num_lines)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    return read(run_dir / "metrics.jsonl", **PLACE, **_INTERVAL)


def rewrite(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Replace a file by these records. A kill leaves the old file or the new one."""
    with atomic_write(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.writelines(map(_line, records))


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _is_of(value: Any, kind: Any) -> bool:
    """Return whether a value is of a type, and below 2**63 if it is a number: JSON has 1e400, NaN and 400 digits."""
    return isinstance(value, kind) and (not isinstance(value, int | float) or abs(value) < 2**63)
