"""Files and folders written under a hidden name and renamed when they are whole."""

import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flipscale.io.errors import UserError


def partial_path(path: Path) -> Path:
    """Return the name under which `path` is written until it is whole: `.NAME.partial` beside it."""
    return path.with_name(f".{path.name}.partial")


def own_partial_path(path: Path) -> Path:
    """Return such a name that no other thread, process or host uses, for files that several may write at once."""
    writer = f"{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
    return path.with_name(f".{path.name}.partial.{writer}")


@contextmanager
def written_aside(path: Path, partial: Path | None = None) -> Iterator[Path]:
    """Yield a name to write a file or a folder to, and rename that to `path` at the end.

    What was at `path` is replaced, a folder by a folder too. A kill leaves `path` as it was, and so does an exception,
    which also removes what was written. A folder is replaced by two renames: a kill between them leaves it as
    `.NAME.old`.

    Args:
        partial: the name to write to, in the folder of `path`; by default its `partial_path`. What a kill left there
            is removed.

    Raises:
        OSError: the disk is full or not writable.
    """
    partial = partial_path(path) if partial is None else partial
    remove(partial)
    try:
        yield partial
        _move(partial, path)
    except BaseException:
        remove(partial)
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, and rename it to `path` when it is whole; its parents are made.

    Raises:
        ValueError: `path` exists.
    """
    if path.exists():
        raise UserError(f"{path} is there already; name another folder or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as partial:
        partial.mkdir()
        yield partial


def refuse_unwritable(folder: Path) -> None:
    """Raise unless `folder` is one that can be written to, or can be made; nothing is made.

    Raises:
        ValueError: it or a parent is a file, a link to nothing, or closed to this user.
    """
    for there in (folder, *folder.parents):
        if there.is_dir():
            if not os.access(there, os.W_OK | os.X_OK):
                raise UserError(f"{there} is not writable for this user; name another folder, or change its rights")
            return
        if there.is_symlink() and not there.exists():
            raise UserError(f"{there} is a link to {os.readlink(there)}, which is not there; name another folder")
        if there.exists():
            raise UserError(f"{there} is a file; name another folder, or move it away")


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


def _move(partial: Path, path: Path) -> None:
    if path.is_dir() and not path.is_symlink() and not partial.is_dir():
        raise OSError(f"{path} is a folder, where a file is to be written; move it away")
    if not (partial.is_dir() and path.is_dir()):
        os.replace(partial, path)
        return
    # A rename replaces no folder that has something in it.
    old = path.with_name(f".{path.name}.old")
    remove(old)
    os.replace(path, old)
    try:
        os.replace(partial, path)
    except OSError:
        os.replace(old, path)
        raise
    remove(old)
