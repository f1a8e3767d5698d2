"""Files and folders written under a hidden name and renamed when they are whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def partial_path(path: Path) -> Path:
    """Where `path` is written until it is whole: `.NAME.partial` beside it."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a path to write to, a file or a folder, and rename it to `path` at the end.

    A kill leaves `path` as it was; so does an exception, which also removes what was written. A folder replaces a
    folder that is already there only if that is empty.

    Raises:
        OSError: the disk is full or not writable.
    """
    partial = partial_path(path)
    remove(partial)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        remove(partial)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, UTF-8, in place of the one that may be there."""
    with written_aside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
