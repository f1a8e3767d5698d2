"""The index of a tar shard: the places of each sample's files, 24 bytes a sample, in a file beside the shard.

`SHARD.tar.index.npy` is a uint32 array `(samples, 3, 2)`: for the image, the caption and the label, the offset in tar
blocks of 512 bytes (0 if there is none) and the size in bytes. The high bit of a caption's size marks a JSON object. A
label is `KEY.cls`, a class number, or, with the high bit, `KEY.npy`, an array. A sample of both and no caption has
its class number in the caption's place, marked by the second highest bit; with a caption, its array is left out. If the
shard is damaged, a text after the array says how.

The array is in version 2.0 of numpy's format. In version 1.0, indices of flipscale 0.1 know no `KEY.npy`; they are good
for all else.
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from flipscale.files.aside import own_partial_path, written_aside

BLOCK = 512
ROW = (3, 2)
_JSON_CAPTION = _ARRAY = 1 << 31
_CLASS = 1 << 30
_IMAGES = ("webp", "png", "jpg", "jpeg")  # of a sample with several, the first, as in CLIP_benchmark
_MAX_OTHER_BYTES = (1 << 30) - 1  # two bits of the size are taken
_MAX_BYTES = {**dict.fromkeys(_IMAGES, (1 << 31) - 1), **dict.fromkeys(("txt", "json", "cls", "npy"), _MAX_OTHER_BYTES)}
_VERSION = (2, 0)


class Place(NamedTuple):
    """Where a file is in its shard, in bytes."""

    offset: int
    size: int


class Places(NamedTuple):
    """Where the files of a sample are; None for those that it lacks."""

    image: Place
    caption: Place | None
    is_json: bool
    class_number: Place | None
    array: Place | None


class _Damaged(Exception):
    """The tar cannot be read further."""


def index_path(shard: Path) -> Path:
    """Return the path of the index of `shard`, beside it."""
    return shard.with_name(shard.name + ".index.npy")


def load_index(shard: Path) -> tuple[np.ndarray, str]:
    """Return the index of `shard`, and how the shard is damaged (empty if it is not). If the index is missing or older
    than the shard, build and write it first.

    Raises:
        OSError: the shard cannot be opened.
    """
    with suppress(OSError, ValueError), open(index_path(shard), "rb") as file:
        if os.fstat(file.fileno()).st_mtime_ns >= shard.stat().st_mtime_ns:
            return read_index(file)
    return build_index(shard, index_path(shard))


def fresh_index(shard: Path) -> tuple[np.ndarray, str]:
    """Return what `load_index` does, but build an index of before `KEY.npy` anew where there may be such a file.

    Raises:
        OSError: the shard cannot be opened.
    """
    with suppress(OSError, ValueError), open(index_path(shard), "rb") as file:
        if may_lack_arrays(file):
            return build_index(shard, index_path(shard))
    return load_index(shard)


def may_lack_arrays(file: BinaryIO) -> bool:
    """Return whether the index in `file` knows no `KEY.npy` and has samples without caption, as classification sets do.

    Raises:
        ValueError: it is not an index.
    """
    version = np.lib.format.read_magic(file)
    file.seek(0)
    return version < _VERSION and bool((read_index(file)[0][:, 1, 0] == 0).any())


def places(row: np.ndarray) -> Places:
    """Return where the files of a sample are, of its row in the index, uint32 `(3, 2)`."""
    image, (caption_at, caption_size), (label_at, label_size) = row.tolist()
    caption = Place(caption_at * BLOCK, caption_size & _MAX_OTHER_BYTES) if caption_at else None
    label = Place(label_at * BLOCK, label_size & _MAX_OTHER_BYTES) if label_at else None
    has_array, class_before = bool(label_size & _ARRAY), bool(caption_size & _CLASS)
    return Places(
        Place(image[0] * BLOCK, image[1]),
        None if class_before else caption,
        bool(caption_size & _JSON_CAPTION),
        caption if class_before else None if has_array else label,
        label if has_array else None,
    )


def read_index(file: BinaryIO) -> tuple[np.ndarray, str]:
    """Return the index in `file`, and how its shard is damaged.

    Raises:
        ValueError: it is not such an index.
    """
    index = np.lib.format.read_array(file, allow_pickle=False)
    if index.dtype != np.uint32 or index.shape[1:] != ROW:
        raise ValueError("not an index of this version")
    return index, file.read().decode()


def build_index(shard: Path, path: Path) -> tuple[np.ndarray, str]:
    """Return the index of a shard and how it is damaged, and write both to `path` if the folder is writable."""
    index, damage = _scan(shard)
    # Processes that start together may all write it. In a read-only folder nobody can, and it is built again.
    with suppress(OSError), written_aside(path, own_partial_path(path)) as partial, open(partial, "wb") as file:
        np.lib.format.write_array(file, index, _VERSION)
        file.write(damage.encode())
    return index, damage


def _scan(shard: Path) -> tuple[np.ndarray, str]:
    """Return the index of a shard, without the samples that have no image, and how the shard is damaged."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    damage = ""
    file = os.open(shard, os.O_RDONLY)
    try:
        try:
            for name, offset, size in _members(file, os.fstat(file).st_size):
                folder, base = os.path.split(name)
                stem, _, extension = base.partition(".")
                field = extension.lower()
                if size <= _MAX_BYTES.get(field, -1):
                    samples.setdefault(f"{folder}/{stem}", {})[field] = (offset // BLOCK, size)
        except _Damaged as error:
            damage = str(error)
        rows = [_row(file, fields) for fields in samples.values() if not fields.keys().isdisjoint(_IMAGES)]
    finally:
        os.close(file)
    return np.array(rows, dtype=np.uint32).reshape(len(rows), *ROW), damage


def _row(file: int, fields: dict[str, tuple[int, int]]) -> list[tuple[int, int]]:
    """Return a sample's row. Its caption is the text file, or the JSON file if that has several or there is no text."""
    caption = fields.get("txt", (0, 0))
    if "json" in fields:
        block, size = fields["json"]
        if "txt" not in fields or b'"captions"' in os.pread(file, size, block * BLOCK):
            caption = (block, size | _JSON_CAPTION)
    label = fields.get("cls", (0, 0))
    if "npy" in fields and not (label[0] and caption[0]):
        if label[0]:
            caption = (label[0], label[1] | _CLASS)
        label = (fields["npy"][0], fields["npy"][1] | _ARRAY)
    return [next(fields[image] for image in _IMAGES if image in fields), caption, label]


def _members(file: int, total: int) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and size of each regular file of a tar.

    It takes a third of `tarfile`'s time and is stricter: `tarfile` takes a damaged header for the end.

    Raises:
        _Damaged: the tar ends early or has an invalid header. The files yielded so far can be read.
    """
    position, long_name, long_size = 0, "", -1
    while True:
        header = os.pread(file, BLOCK, position)
        if len(header) < BLOCK:
            raise _Damaged("it is empty" if total == 0 else f"it ends at byte {total} without an end mark")
        if header == bytes(BLOCK):
            return
        size = checked_size(header)
        if size < 0:
            raise _Damaged("it is not a tar file" if position == 0 else f"there is no tar header at byte {position}")
        kind, offset = header[156:157], position + BLOCK
        if kind in b"0\0" and long_size >= 0:
            size = long_size
        position = offset + -(-size // BLOCK) * BLOCK
        if offset + size > total:
            raise _Damaged(f"it ends at byte {total}, inside a file that goes on to {offset + size}")
        if kind == b"L":  # GNU: the name of the file that follows
            long_name = _text(os.pread(file, size, offset))
        elif kind == b"x":  # pax: lines "LENGTH key=value" on the file that follows
            records = dict(re.findall(rb"\d+ ([^=\n]+)=([^\n]*)\n", os.pread(file, size, offset)))
            long_name, long_size = _text(records.get(b"path", b"")), int(records.get(b"size", b"-1"))
        elif kind in b"0\0":
            prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
            yield long_name or (f"{prefix}/" if prefix else "") + _text(header[:100]), offset, size
            long_name, long_size = "", -1


def checked_size(header: bytes) -> int:
    """Return the size of the file that a tar header announces; -1 if the checksum is wrong."""
    try:
        checksum = _number(header[148:156])
        return _number(header[124:136]) if checksum == sum(header) - sum(header[148:156]) + 8 * ord(" ") else -1
    except ValueError:
        return -1


def _number(field: bytes) -> int:
    """Parse a number of a tar header: octal text or, if the first bit is set, big-endian binary."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "replace")
