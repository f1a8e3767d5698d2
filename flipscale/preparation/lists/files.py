"""Files that a list names, and captions: what is no file, lies outside or is no text is no more than a bad sample."""

import errno
import hashlib
import json
import os
import stat
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from flipscale.data.captions import captions_of_json, choose_caption, encoded_captions
from flipscale.data.faults import BadSample, MissingCaption
from flipscale.data.sources.source import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, check_bytes

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


def is_utf8(text: str) -> bool:
    """Return whether a text can be written; halves of surrogate pairs, as file names that are no UTF-8 have, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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
    return _usable(encoded_captions(texts, "the caption"))


def _usable(captions: tuple[bytes, ...]) -> list[str]:
    choose_caption(captions, 0.0)  # raises if one of them cannot be used
    texts = (caption.decode().removeprefix("\ufeff").strip() for caption in captions)
    return [text for text in texts if text]


def digest_of(content: Any) -> str:
    """Return a digest of what is ready for JSON."""
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class FileList:
    """Image files under `root`, with their captions in KEY.txt or KEY.json beside them."""

    root: Path
    files: list[str]
    allow_outside: bool = False

    @classmethod
    def of_folder(cls, root: Path, allow_outside: bool) -> "FileList":
        """List what is called like an image in a folder and below it, files or not, and the folders that cannot be
        listed; reading these says what is wrong with them."""
        found: list[str] = []
        unlisted: list[str] = []
        for folder, folders, files in os.walk(root, onerror=lambda error: unlisted.append(error.filename)):
            links = {name for name in folders if os.path.islink(os.path.join(folder, name))}
            named = {name for name in (*files, *folders) if PurePath(name).suffix.lower() in IMAGE_SUFFIXES}
            found += [os.path.join(folder, name) for name in links | named]
        found += unlisted
        return cls(root, sorted(os.path.relpath(path, root) for path in found), allow_outside)

    def __len__(self) -> int:
        return len(self.files)

    def key(self, number: int) -> str:
        return self.files[number]

    def place(self, number: int) -> str:
        return self.files[number]

    def image(self, number: int) -> bytes:
        return read_file(self.root, self.files[number], self.allow_outside)

    def captions(self, number: int) -> list[str]:
        image = PurePath(self.files[number])
        for suffix in (".txt", ".json"):
            beside = image.with_suffix(suffix)
            if os.path.lexists(self.root / beside):
                content = read_file(self.root, str(beside), self.allow_outside, MAX_TEXT_BYTES)
                return _usable((content,) if suffix == ".txt" else captions_of_json(content))
        raise MissingCaption("no .txt or .json beside it")

    def fingerprint(self) -> str:
        return digest_of(self.files)
