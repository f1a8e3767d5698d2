"""Atomic writes: a file or folder is written under a hidden name and renamed once it is whole."""

import errno
import os
import platform
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flipscale.io.errors import UserError


class FullDisk(OSError):
    """A disk has no room for a file. The text names the file, the folder and the free bytes."""

    def __str__(self) -> str:
        return str(self.strerror)


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Raise FullDisk in place of the system's error for a file or folder that is written in a `with` block."""
    try:
        yield
    except OSError as error:
        # numpy's error for a short write has no number.
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT) or " requested and " in str(error)
        if not is_full or isinstance(error, FullDisk):
            raise
        free = shutil.disk_usage(path.parent).free
        text = f"{path.name} needs more than the {free:,} bytes that the disk of {path.parent} has free"
        raise FullDisk(errno.ENOSPC, f"{text}; free some space, and run the same command again") from error


def partial_path(path: Path) -> Path:
    """Return the temporary name of `path`, `.NAME.partial` in the same folder."""
    return path.with_name(f".{path.name}.partial")


def unique_partial_path(path: Path) -> Path:
    """Return a temporary name of `path` that no other thread, process or host uses."""
    host = platform.node().replace("/", "_")
    return path.with_name(f".{path.name}.partial.{host}.{os.getpid()}.{threading.get_ident()}")


@contextmanager
def atomic_write(path: Path, partial: Path | None = None) -> Iterator[Path]:
    """Yield a temporary name for a file or a folder, and rename it to `path` at the end.

    An exception or a kill leaves the old content of `path`. An exception also removes the temporary file. A folder is
    replaced by two renames, and a kill between them leaves the old folder as `.NAME.old`. The temporary name is in the
    folder of `path`, by default `partial_path(path)`. Remains of a kill are removed.
    """
    partial = partial or partial_path(path)
    remove(partial)
    with naming_full_disk(path):
        try:
            yield partial
            _move(partial, path)
        except BaseException:
            remove(partial)
            raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder, and rename it to `path` at the end. Raise UserError if `path` exists."""
    if path.exists():
        raise UserError(f"{path} is there already; name another folder or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.mkdir()
        yield partial


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until a file's content is on disk, or a folder's list of names, where its file system can do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Shared folders of SMB and of virtual machines have no sync of a folder.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _move(partial: Path, path: Path) -> None:
    if path.is_dir() and not path.is_symlink() and not partial.is_dir():
        raise OSError(f"{path}: a folder has this name; move it away, so that the file can be written")
    if not (partial.is_dir() and path.is_dir()):
        os.replace(partial, path)
        return
    old = path.with_name(f".{path.name}.old")  # because a rename cannot replace a folder with content
    remove(old)
    os.replace(path, old)
    try:
        os.replace(partial, path)
    except OSError:
        os.replace(old, path)
        raise
    remove(old)
