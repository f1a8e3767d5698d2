"""Room: whether a disk has enough for what is to be written, sizes as people read them, and cores for processes."""

import os
import shutil
from pathlib import Path

from flipscale.io.errors import UserError


def check_room(folder: Path, needed: int, fewer: str) -> None:
    """Raise if the disk of a folder, which may not be there yet, has no room for `needed` bytes.

    Args:
        fewer: how to need less, such as `prepare fewer tasks with --only`.

    Raises:
        ValueError: it has not.
    """
    free = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free
    if needed > free:
        raise UserError(
            f"{size_text(needed)} are needed and the disk of {folder} has {size_text(free)} free; make room, name "
            f"another folder, or {fewer}"
        )


def size_text(num_bytes: int) -> str:
    """Return a number of bytes as people read it: `1.2 GB`."""
    value, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}" if value < 100 else f"{value:.0f} {units[0]}"


def usable_cores() -> int:
    """Return how many cores this process may use: of a node that jobs share, those of its own job."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
