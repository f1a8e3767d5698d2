"""What attacks do to files, and checks of what is left."""

import os
import shutil
import socket
from pathlib import Path

from attacks.attack import Change, Ended, later


def nothing(folder: Path) -> None:
    """Change nothing."""


@later
def instead(folder: Path, make: Change, name: str = "") -> None:
    """Put something else in the place of a file or folder."""
    path = folder / name
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    make(path)


def unix_socket(path: Path) -> None:
    """Make a socket."""
    before = os.getcwd()
    os.chdir(path.parent)  # because a socket's path has at most 108 characters
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(before)


@later
def pipe(folder: Path, name: str) -> None:
    """Put a pipe in the place of a file."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)


@later
def text(folder: Path, name: str, content: str | bytes) -> None:
    """Write a file."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def mine(name: str) -> Change:
    """Return a change that writes a file of the user's, which `kept` finds again."""
    return text(name, "mine")


@later
def kept(folder: Path, ended: Ended, *names: str) -> None:
    """Assert that the user's files are as they were."""
    assert [(folder / name).read_text() for name in names] == ["mine"] * len(names)


@later
def exists(folder: Path, ended: Ended, *names: str) -> None:
    """Assert that these files were written."""
    assert all((folder / name).exists() for name in names), ended


@later
def lacks(folder: Path, ended: Ended, *names: str) -> None:
    """Assert that these files were not written."""
    assert not any((folder / name).exists() for name in names), ended


def obeys_nothing(folder: Path, ended: Ended) -> None:
    """Assert that no control character of a terminal was printed."""
    assert not set("\x1b\x07\x9b\u202e") & set(ended.stdout + ended.stderr), ended
