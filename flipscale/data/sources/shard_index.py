"""Reading a tar shard, and its index: the places of each sample's files, 24 bytes a sample, in a file next to it.

`SHARD.tar.index.npy` is a uint32 array `(samples, 3, 2)`: offset and size of the image, the caption and the label. An
offset counts tar blocks of 512 bytes (0 for no file), a size counts bytes. The high bit of a caption's size marks a
JSON object. A label is `KEY.cls`, a class number, or, with the high bit, `KEY.npy`, an array. A sample with both and
without a caption has its class number there, marked by the second highest bit. With a caption, no array is listed.

The array is in version 2.0 of numpy's format. Behind it are a JSON object, with the shard's size, time and damage, and
a digest of 16 bytes of everything before. So the index of another shard, or a changed index, is detected and rebuilt.
"""

import errno
import hashlib
import io
import json
import math
import os
import re
import stat
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from flipscale.io.atomic import atomic_write, unique_partial_path
from flipscale.io.errors import UserError

BLOCK = tarfile.BLOCKSIZE
ROW = (3, 2)
ROW_BYTES = 4 * 3 * 2
_JSON_CAPTION = _ARRAY = 1 << 31
_CLASS = 1 << 30
_IMAGES = ("webp", "png", "jpg", "jpeg")  # in order of preference, as in CLIP_benchmark
_MAX_OTHER_BYTES = (1 << 30) - 1  # two bits of the size are marks
_MAX_BYTES = {**dict.fromkeys(_IMAGES, (1 << 31) - 1), **dict.fromkeys(("txt", "json", "cls", "npy"), _MAX_OTHER_BYTES)}
# With a text file, a longer JSON file is not searched for a list of captions.
_MAX_JSON_BYTES = 1 << 24
_LAST_OFFSET = ((1 << 32) - 1) * BLOCK
_DIGEST_BYTES = 16
_LONGEST_SHOWN_NAME = 60

_ZEROS_AT_ONCE = 1 << 20
# The end mark of two blocks, and the rest of the last record of 20 blocks.
_MOST_END_BYTES = 22 * BLOCK
# tarfile holds a pax header or a GNU name in memory.
_MOST_HEADER_BYTES = 1 << 16
# tarfile (before Python 3.12.6) takes quadratic time for runs of digits in pax headers.
_LONG_NUMBER = re.compile(rb"[0-9]{256}")
_LONGEST_NAME = 4096  # PATH_MAX of Linux
# Size, time and checksum of a regular file's header, from byte 124 on.
_PLAIN_HEADER = re.compile(rb"[0-7]{11}[\0 ][0-7]{11}[\0 ]([0-7]{6})\0 0")
_HEADER_TYPES = (*tarfile.GNU_TYPES[:2], tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
# Errors of tarfile for damaged headers; chains of headers about headers recurse.
_TAR_ERRORS = (tarfile.TarError, ValueError, IndexError, OverflowError, RecursionError)


class NotAFile(OSError):
    """A path does not lead to a plain file."""


class Damaged(Exception):
    """The tar cannot be read further."""


class _Header(tarfile.TarInfo):
    """A tar header that refuses large or slow headers about other headers, and skips the maps of sparse files."""

    _others = (b"", b"")

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        # Most headers differ from the one before in name, size, time and checksum only, and tarfile parses all fields.
        others, plain = (bytes(buf[100:124]), bytes(buf[157:])), _PLAIN_HEADER.match(buf, 124)
        if plain and others == cls._others and sum(buf) - sum(buf[148:156]) + 8 * ord(" ") == int(plain[1], 8):
            header = cls(buf[:100].split(b"\0", 1)[0].decode(encoding, errors))
            header.size = int(buf[124:135], 8)
            return header
        header = super().frombuf(buf, encoding, errors)
        if plain and not buf[345]:  # without a prefix of the name
            cls._others = others
        return header

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        if self.type in _HEADER_TYPES:
            start = tar.fileobj.tell()
            if not 0 <= self.size <= _MOST_HEADER_BYTES or _LONG_NUMBER.search(tar.fileobj.read(self.size)):
                raise tarfile.HeaderError("a header that is too large")
            tar.fileobj.seek(start)
        return super()._proc_member(tar)  # type: ignore[misc]

    def _proc_gnusparse_00(self, member: tarfile.TarInfo, *arguments: Any) -> None:
        member.sparse = []  # type: ignore[assignment]

    _proc_gnusparse_01 = _proc_gnusparse_10 = _proc_gnusparse_00


def open_plain(path: str | Path) -> int:
    """Return a file descriptor of a plain file, for reading, without waiting for a FIFO."""
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind != stat.S_IFREG:
        names = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        raise NotAFile(f"it is {names.get(kind, 'a device')}, not a file")
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK)


def tar_members(file: BinaryIO) -> Iterator[tuple[str, int, int, str]]:
    """Yield the name, the content's offset and size in bytes, and the fault of each entry of a tar.

    Several tars may be joined to one file. The fault is the reason why an entry cannot be used; it is empty for a good
    file. tarfile reads the headers, but would take a damaged one for the end of the tar.

    Raises:
        Damaged: the tar ends early, has an invalid header, or zeros in place of files. Earlier files can be read.
    """
    total = os.fstat(file.fileno()).st_size
    tar = tarfile.TarFile(fileobj=io.BytesIO(bytes(2 * BLOCK)))
    tar.fileobj, tar.offset = file, 0
    while True:
        start = tar.offset
        file.seek(start)
        try:
            member = _Header.fromtarfile(tar)
        except tarfile.EOFHeaderError as error:  # type: ignore[attr-defined]
            following = _after_zeros(file, start, total)
            if following - start > _MOST_END_BYTES:
                raise Damaged(f"it has zeros from byte {start} to {following}, more than the end of a tar") from error
            if following == total:
                return
            tar.offset, tar.pax_headers = following, {}
            continue
        except _TAR_ERRORS as error:
            raise Damaged(_damage(file.fileno(), start, total)) from error
        if {"path", "size"} & tar.pax_headers.keys():
            raise Damaged("it has a pax header that gives all files one name or size")
        end = member.offset_data + (member.size if member.isreg() else 0)
        if member.size < 0 or tar.offset <= start:
            raise Damaged(f"there is no tar header at byte {start}")
        if end > total:
            raise Damaged(f"it ends at byte {total}, inside a file that goes on to {end}")
        yield member.name, member.offset_data, member.size, _unusable_because(member, file.fileno(), start)


def _unusable_because(member: tarfile.TarInfo, file: int, start: int) -> str:
    if not member.isreg() or member.issparse() or any(key.startswith("GNU.sparse") for key in member.pax_headers):
        return "links, sparse files and devices"
    if len(member.name) > _LONGEST_NAME:
        return "files with too long names"
    # Reading a sample also compares the header before it, which may follow others.
    before = member.offset_data - BLOCK
    if before == start or is_header_of(os.pread(file, BLOCK, before), member.size):
        return ""
    return "files whose headers give different sizes"


def _after_zeros(file: BinaryIO, position: int, total: int) -> int:
    """Return the position of the next block with a byte other than zero, or `total`. Holes of a file are skipped."""
    while position < total:
        try:
            # Rounded down, because holes end at blocks of the file system.
            position = max(position, file.seek(position, os.SEEK_DATA) // BLOCK * BLOCK)
        except OSError:  # ENXIO: a hole up to the end
            return total
        content = os.pread(file.fileno(), min(_ZEROS_AT_ONCE, total - position), position)
        if any(content):
            return position + (len(content) - len(content.lstrip(b"\0"))) // BLOCK * BLOCK
        position += len(content) or total
    return total


def _damage(file: int, start: int, total: int) -> str:
    if total - start < BLOCK:
        return f"it ends at byte {total} without an end mark" if total else "it is empty"
    if start == 0:
        return f"it is not a tar file: it begins with {os.pread(file, 16, 0)!r}"
    return f"there is no tar header at byte {start}"


def is_header_of(header: bytes, size: int) -> bool:
    """Return whether a block is the tar header of a file of `size` bytes."""
    # The usual form of the size first, because this is checked for each sample.
    if header[124:135] == b"%011o" % size:
        return True
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size == size
    except _TAR_ERRORS:
        return False


# Run, extension, and block and size of a file of a sample. Consecutive files of one key have the same run.
_File = tuple[int, str, tuple[int, int]]


class Place(NamedTuple):
    """Position and length of a file in its shard, in bytes."""

    offset: int
    size: int


class Places(NamedTuple):
    """The places of a sample's files; None for missing files."""

    image: Place
    caption: Place | None
    is_json: bool
    class_number: Place | None
    array: Place | None


class ShardIndex(NamedTuple):
    """The index of a shard.

    Args:
        rows: places of the samples' files, uint32 `(samples, 3, 2)`.
        mtime_ns: time of the shard's last change, on the machine that made the index.
    """

    rows: np.ndarray
    damage: str
    num_bytes: int
    mtime_ns: int


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".index.npy")


def load_index(shard: Path) -> ShardIndex:
    """Return the index of `shard`. If it is missing, or the shard has another size or time, build and write it."""
    with suppress(OSError, ValueError), os.fdopen(open_plain(index_path(shard)), "rb") as file:
        index = read_index(file.read())
        if (index.num_bytes, index.mtime_ns) == size_and_time(shard):
            return index
    return build_index(shard, index_path(shard))


def size_and_time(shard: str | Path) -> tuple[int, int]:
    """Return the size of a shard and its last change in nanoseconds; 0 and 0 if it is gone."""
    try:
        state = os.stat(shard)
    except OSError:
        return 0, 0
    return state.st_size, state.st_mtime_ns


def places(row: np.ndarray) -> Places:
    """Return the places of a sample's files from its row in the index, uint32 `(3, 2)`."""
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


def read_index(content: bytes) -> ShardIndex:
    try:
        if _digest(content[:-_DIGEST_BYTES]) != content[-_DIGEST_BYTES:]:
            raise UserError("the index was changed")
        file = io.BytesIO(content)
        np.lib.format.read_magic(file)
        shape, _, _ = np.lib.format.read_array_header_2_0(file)
        # A view of the content, because numpy's reader would make room for any shape.
        rows = np.frombuffer(content, "<u4", math.prod(shape), file.tell()).reshape(-1, *ROW)
        about = json.loads(content[file.tell() + rows.nbytes : -_DIGEST_BYTES])
        return ShardIndex(rows, str(about["damage"]), int(about["bytes"]), int(about["mtime_ns"]))
    except Exception as error:  # numpy raises many kinds for a damaged header
        raise UserError(f"not an index ({error})") from error


def most_bytes(num_bytes: int) -> int:
    """Return the largest index of a shard of `num_bytes`: a sample needs at least two blocks, and the damage 64 KiB."""
    return num_bytes // (2 * BLOCK) * ROW_BYTES + (1 << 16)


def build_index(shard: Path, path: Path) -> ShardIndex:
    """Return the index of a shard, and write it to `path` if possible. A shard that cannot be read has no samples.
    Raise OSError if the shard does not exist, or reading failed and may succeed the next time."""
    try:
        file = open_plain(shard)
    except OSError as error:
        damage = _lasting_damage(error, shard)
        if damage is None:
            raise
        return ShardIndex(np.empty((0, *ROW), "<u4"), damage, *size_and_time(shard))
    try:
        with os.fdopen(file, "rb") as opened:
            state = os.fstat(file)
            index = ShardIndex(*_scan(opened), state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise OSError(f"shard {shard} cannot be read ({error.strerror}); start again, or remove it") from error
    # Processes that start together may all write it. In a read-only folder, every start builds it again.
    with suppress(OSError), atomic_write(path, unique_partial_path(path)) as partial:
        about = {"damage": index.damage, "bytes": index.num_bytes, "mtime_ns": index.mtime_ns}
        array = io.BytesIO()
        np.lib.format.write_array(array, index.rows, version=(2, 0))
        content = array.getvalue() + json.dumps(about).encode()
        partial.write_bytes(content + _digest(content))
    return index


def _lasting_damage(error: OSError, shard: Path) -> str | None:
    """Return why a shard cannot be opened; None if it is gone or another try may succeed."""
    if isinstance(error, NotAFile):
        return str(error)
    if error.errno in (errno.EACCES, errno.EPERM):
        return "it may not be read: its permissions or its folder's forbid it"
    if error.errno == errno.ELOOP or (error.errno == errno.ENOENT and os.path.islink(shard)):
        return "it is a link that leads nowhere"
    return None


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


def _scan(file: BinaryIO) -> tuple[np.ndarray, str]:
    """Return the rows of a shard's samples that have an image, and the damage of the shard."""
    samples: dict[str, list[_File]] = {}
    left_out: dict[str, list[str]] = {}
    damage, run, last_key = [], 0, ""
    try:
        for name, offset, size, reason in tar_members(file):
            dot = name.find(".", name.rfind("/") + 1)
            field = name[dot + 1 :].lower() if dot >= 0 else ""
            key = name[:dot] if dot >= 0 else name
            run, last_key = run + (key != last_key), key
            if field not in _MAX_BYTES:
                continue
            if reason or size > _MAX_BYTES[field] or offset > _LAST_OFFSET:
                left_out.setdefault(reason or "files that are too long or too far from the start", []).append(name)
                continue
            samples.setdefault(key, []).append((run, field, (offset // BLOCK, size)))
    except Damaged as error:
        damage.append(str(error))
    rows = []
    for key, files in samples.items():
        for fields in _samples_of_key(files):
            if fields is None:
                left_out.setdefault("keys with files that follow each other and cannot be told apart", []).append(key)
            elif not fields.keys().isdisjoint(_IMAGES):
                rows.append(_row(file.fileno(), fields))
    for what, names in left_out.items():
        first = names[0].encode("unicode_escape").decode()
        shown = first if len(first) <= _LONGEST_SHOWN_NAME else f"{first[:_LONGEST_SHOWN_NAME]}..."
        damage.append(f"{what} are left out: {len(names)}, the first {shown}")
    return np.array(rows, dtype="<u4").reshape(len(rows), *ROW), "; ".join(damage)


def _samples_of_key(files: list[_File]) -> Iterator[dict[str, tuple[int, int]] | None]:
    """Yield the samples among the files of one key, each as (block, size) by field; None if they are ambiguous.

    The files are one sample, wherever they are, unless a field occurs twice. Then neighbouring files are samples, and
    samples side by side must have the same fields.
    """
    fields = {field: place for _, field, place in files}
    images = {run for run, field, _ in files if field in _IMAGES} if len(files) > 1 else ()
    if len(fields) == len(files) and len(images) <= 1:
        yield fields
        return
    for _, together in groupby(files, itemgetter(0)):
        parts: list[dict[str, tuple[int, int]]] = [{}]
        for _, field, place in together:
            if field in parts[-1]:
                parts.append({})
            parts[-1][field] = place
        if any(part.keys() != parts[0].keys() for part in parts):
            yield None
        else:
            yield from parts


def _row(file: int, fields: dict[str, tuple[int, int]]) -> list[tuple[int, int]]:
    """Return a sample's row. The caption is the text file, or the JSON file if it has a list or there is no text."""
    caption = fields.get("txt", (0, 0))
    if "json" in fields:
        block, size = fields["json"]
        if "txt" not in fields or (size <= _MAX_JSON_BYTES and b'"captions"' in os.pread(file, size, block * BLOCK)):
            caption = (block, size | _JSON_CAPTION)
    label = fields.get("cls", (0, 0))
    if "npy" in fields and not (label[0] and caption[0]):
        if label[0]:
            caption = (label[0], label[1] | _CLASS)
        label = (fields["npy"][0], fields["npy"][1] | _ARRAY)
    return [next(fields[image] for image in _IMAGES if image in fields), caption, label]
