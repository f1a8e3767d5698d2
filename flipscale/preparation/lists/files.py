"""Files that a list names, captions and classes: what is no file, lies outside or is no text is no more than a bad
sample."""

import errno
import hashlib
import json
import os
import stat
from functools import cache
from pathlib import Path
from typing import Any

from flipscale.data.captions import choose_caption, encoded_captions
from flipscale.data.faults import BadSample
from flipscale.data.sources.source import MAX_IMAGE_BYTES, check_bytes
from flipscale.io.files import is_utf8

IMAGE_SUFFIXES = (".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# These say nothing of the file: the same command would read it later.
_NOT_THE_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class UnreadableFile(BadSample):
    """A file of the pair is missing, no file, or cannot be read."""

    cause = "unreadable_file"


class OutsideFolder(BadSample):
    """The list names a file outside its folder."""

    cause = "outside_folder"


class MissingLabel(BadSample):
    """The pair has no class."""

    cause = "missing_label"


def read_file(root: Path, name: str, allow_outside: bool, most_bytes: int = MAX_IMAGE_BYTES) -> bytes:
    """Return the content of a file that a list in the folder `root` names.

    Raises:
        UnreadableFile: it cannot be read, or is no file but a pipe or a device.
        OversizedSample: it has more than `most_bytes`.
        OutsideFolder: it lies outside `root`, by its name or by a link, and that is not allowed.
    """
    if not name or "\0" in name:
        raise UnreadableFile("the name of the file has a NUL" if name else "the name of the file is blank")
    if not is_utf8(name):
        raise UnreadableFile("the name of the file is not UTF-8; rename it")
    path = root / name
    try:
        if not allow_outside and not _is_inside(path, root):
            raise OutsideFolder(f"it lies outside {root}; --allow_outside reads it all the same")
        kind, size = stat.S_IFMT((state := path.stat()).st_mode), state.st_size
        if kind != stat.S_IFREG:
            raise UnreadableFile(f"{name} is {_KINDS.get(kind, 'something else')}, not a file")
        check_bytes(size, most_bytes, name)
        # A pipe that has taken its place since is not waited for.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return file.read(most_bytes)
    except OSError as error:
        if error.errno in _NOT_THE_FILES:
            raise
        raise UnreadableFile(f"{name}: {error.strerror or error}") from error


def _is_inside(path: Path, root: Path) -> bool:
    inside = _real_folder(root)
    return os.path.realpath(path).startswith(inside if inside.endswith("/") else f"{inside}/")


@cache
def _real_folder(root: Path) -> str:
    return os.path.realpath(root)


def image_of(value: Any, root: Path, allow_outside: bool) -> bytes:
    """Return the bytes of an image: of its file, or those that a table holds, alone or beside a path.

    Raises:
        BadSample: there is none, or it cannot be read.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        what = "there is none" if value is None else f"it is {type(value).__name__}, neither a path nor bytes"
        raise UnreadableFile(f"image: {what}")
    return read_file(root, value, allow_outside)


def captions_of(texts: Any) -> list[str]:
    """Return one text or a list of texts as a list without blank ones.

    Raises:
        BadSample: there is none, or one that training would refuse.
    """
    return usable(encoded_captions(texts, "the caption"))


def usable(captions: tuple[bytes, ...]) -> list[str]:
    """Return captions as texts, without blank ones.

    Raises:
        BadSample: there is none, or one that training would refuse.
    """
    choose_caption(captions, 0.0)  # raises if one of them cannot be used
    texts = (caption.decode().removeprefix("\ufeff").strip() for caption in captions)
    return [text for text in texts if text]


def label_of(value: Any) -> str:
    """Return the name of a class: a text on one line, or a whole number.

    Raises:
        MissingLabel: it is none.
    """
    name = " ".join(str(value).split()) if isinstance(value, str | int) else ""
    if not name or not is_utf8(name) or not name.isprintable():
        raise MissingLabel("there is none" if value in (None, "") else f"{value!r:.60} is no name of a class")
    return name


def shown(text: str) -> str:
    """Return a text in letters that any terminal shows."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def digest_of(content: Any) -> str:
    """Return a digest of what is ready for JSON."""
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
