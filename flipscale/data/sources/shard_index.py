"""The index of a tar shard: the places of each sample's files, 24 bytes a sample, in a file beside the shard.

`SHARD.tar.index.npy` is a uint32 array `(samples, 3, 2)`: for the image, the caption and the label, the offset in tar
blocks of 512 bytes (0 if there is none) and the size in bytes. The high bit of a caption's size marks a JSON object. A
label is `KEY.cls`, a class number, or, with the high bit, `KEY.npy`, an array. A sample of both and no caption has
its class number in the caption's place, marked by the second highest bit; with a caption, its array is left out.

The array is in version 2.0 of numpy's format. Behind it are an object of JSON, with the shard's size and time and how
the shard is damaged, and 16 bytes, the digest of all before them. An index of another shard, or one that was changed,
is thus known, and is made anew. Indices of before had only the text of the damage; those that lie beside a shard on
this machine are made anew, as nothing tells whether they are of this shard. In version 1.0 they know no `KEY.npy`.
"""

import errno
import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flipscale.data.sources.tar_members import BAD_HEADER, BLOCK, Blocks, Damaged, NotAFile, members, open_plain
from flipscale.io.atomic import atomic_write, unique_partial_path
from flipscale.io.errors import UserError

ROW = (3, 2)
_JSON_CAPTION = _ARRAY = 1 << 31
_CLASS = 1 << 30
_IMAGES = ("webp", "png", "jpg", "jpeg")  # of a sample with several, the first, as in CLIP_benchmark
_MAX_OTHER_BYTES = (1 << 30) - 1  # two bits of the size are taken
_MAX_BYTES = {**dict.fromkeys(_IMAGES, (1 << 31) - 1), **dict.fromkeys(("txt", "json", "cls", "npy"), _MAX_OTHER_BYTES)}
_FIELDS = {name.encode(): name for name in _MAX_BYTES}
# A longer JSON file beside a text file is not looked into for a list of captions.
_MAX_JSON_BYTES = 1 << 24
_LAST_OFFSET = ((1 << 32) - 1) * BLOCK
_VERSION = (2, 0)
_DIGEST_BYTES, _MOST_ABOUT_BYTES = 16, 1 << 16
_LONGEST_NAME_SAID = 60


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


class Index(NamedTuple):
    """The index of a shard.

    Args:
        rows: uint32 `(samples, 3, 2)`.
        damage: how the shard is damaged; empty if it is not.
        num_bytes: the size of the shard; 0 in an index of before.
        mtime_ns: when the shard was last written, on the machine that made the index.
        may_lack_arrays: whether it knows no `KEY.npy`, and has samples without caption, as classification sets do.
    """

    rows: np.ndarray
    damage: str
    num_bytes: int = 0
    mtime_ns: int = 0
    may_lack_arrays: bool = False


class _File(NamedTuple):
    """A file of a sample. Files of a key that follow each other have the same `run`."""

    run: int
    field: str
    block: int
    size: int


def index_path(shard: Path) -> Path:
    """Return the path of the index of `shard`, beside it."""
    return shard.with_name(shard.name + ".index.npy")


def load_index(shard: Path) -> Index:
    """Return the index of `shard`. If there is none, or one of another size or time of the shard, build and write it.

    Raises:
        OSError: the shard cannot be read.
    """
    with suppress(OSError, ValueError):
        index = read_index(_content(index_path(shard)))
        if (index.num_bytes, index.mtime_ns) == size_and_time(shard):
            return index
    return build_index(shard, index_path(shard))


def size_and_time(shard: str | Path) -> tuple[int, int]:
    """Return the size of a shard, and when it was last written, in nanoseconds; 0 and 0 if it is gone."""
    try:
        state = os.stat(shard)
    except OSError:
        return 0, 0
    return state.st_size, state.st_mtime_ns


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


def read_index(content: bytes) -> Index:
    """Return the index that a file of this content holds.

    Raises:
        ValueError: it is not such an index, or was changed.
    """
    about: dict[str, Any] = {}
    try:
        file = io.BytesIO(content)
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, is_fortran, dtype = read_header[version](file)
        first, num_bytes = file.tell(), shape[0] * ROW[0] * ROW[1] * 4
        if dtype != np.dtype("<u4") or shape[1:] != ROW or is_fortran or num_bytes > len(content) - first:
            raise UserError("not an index of this version")
        rows = np.frombuffer(content, "<u4", num_bytes // 4, first).reshape(shape)
        rest = content[first + num_bytes :]
        if rest[:1] == b"{":
            if _digest(content[:-_DIGEST_BYTES]) != content[-_DIGEST_BYTES:]:
                raise UserError("the index was changed")
            about = json.loads(rest[:-_DIGEST_BYTES])
            return Index(rows, str(about["damage"]), int(about["bytes"]), int(about["mtime_ns"]))
        return Index(rows, rest.decode(), 0, 0, version < _VERSION and bool((rows[:, 1, 0] == 0).any()))
    except Exception as error:
        # numpy raises many kinds of exceptions for a damaged header.
        raise UserError(f"not an index ({error})") from error


def most_bytes(num_bytes: int) -> int:
    """Return the most bytes that the index of a shard of so many bytes may have: two blocks are one sample at least."""
    return num_bytes // (2 * BLOCK) * 4 * ROW[0] * ROW[1] + _MOST_ABOUT_BYTES


def may_be_of(index: Index, num_bytes: int | None) -> bool:
    """Return whether an index may be of a shard of so many bytes, if that is known."""
    if num_bytes is None or index.num_bytes:
        return num_bytes is None or index.num_bytes == num_bytes
    blocks, sizes = index.rows[:, :, 0].astype(np.int64), index.rows[:, :, 1].astype(np.int64)
    sizes[:, 1:] &= _MAX_OTHER_BYTES
    return not (blocks * BLOCK + sizes > num_bytes).any() and bool((blocks[:, 0] > 0).all())


def build_index(shard: Path, path: Path) -> Index:
    """Return the index of a shard, and write it to `path` if the folder is writable. A shard that is no file, or that
    may not be read, has no samples.

    Raises:
        OSError: the shard does not exist, or reading fails, as it may not the next time.
    """
    try:
        file = open_plain(shard)
    except OSError as error:
        damage = _why_never(error, shard)
        if damage is None:
            raise
        return Index(np.empty((0, *ROW), np.uint32), damage, *size_and_time(shard))
    try:
        state = os.fstat(file)
        index = Index(*_scan(file), state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise OSError(
            f"shard {shard} cannot be read ({error.strerror}); start again when it can, or remove it"
        ) from error
    finally:
        os.close(file)
    # Processes that start together may all write it. In a read-only folder nobody can, and it is built again.
    with suppress(OSError), atomic_write(path, unique_partial_path(path)) as partial:
        partial.write_bytes(_encoded(index))
    return index


def _why_never(error: OSError, shard: Path) -> str | None:
    """Return why a shard cannot be opened, whoever tries and when; None if another try may open it or it is gone."""
    if isinstance(error, NotAFile):
        return str(error)
    if error.errno in (errno.EACCES, errno.EPERM):
        return "it may not be read: its permissions or its folder's forbid it"
    if error.errno == errno.ELOOP or (error.errno == errno.ENOENT and os.path.islink(shard)):
        return "it is a link that leads nowhere"
    return None


def _encoded(index: Index) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, index.rows, _VERSION)
    about = {"damage": index.damage, "bytes": index.num_bytes, "mtime_ns": index.mtime_ns}
    file.write(json.dumps(about).encode())
    return file.getvalue() + _digest(file.getvalue())


def _content(path: Path) -> bytes:
    """Return the content of a plain file.

    Raises:
        OSError: it cannot be read.
    """
    with os.fdopen(open_plain(path), "rb") as file:
        return file.read()


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


def _scan(file: int) -> tuple[np.ndarray, str]:
    """Return the index of a shard, without the samples that have no image, and how the shard is damaged."""
    samples: dict[bytes, list[_File]] = {}
    left_out: dict[str, list[bytes]] = {}
    damage, run, last_key = [], 0, b""
    blocks = Blocks(file)
    try:
        for name, offset, size, trouble in members(blocks):
            dot = name.find(b".", name.rfind(b"/") + 1)
            field = _FIELDS.get(name[dot + 1 :].lower()) if dot >= 0 else None
            key = name[:dot] if dot >= 0 else name
            run, last_key = run + (key != last_key), key
            if field is None:
                # A name that was too long has lost its end, which may have been that of a picture.
                if trouble == BAD_HEADER:
                    left_out.setdefault(trouble, []).append(name)
                continue
            if trouble or size > _MAX_BYTES[field] or offset > _LAST_OFFSET:
                left_out.setdefault(trouble or "files that are too long or too far from the start", []).append(name)
                continue
            samples.setdefault(key, []).append(_File(run, field, offset // BLOCK, size))
    except Damaged as error:
        damage.append(str(error))
    rows = []
    for key, files in samples.items():
        for fields in _apart(files):
            if fields is None:
                left_out.setdefault("keys with files that follow each other and cannot be told apart", []).append(key)
            elif not fields.keys().isdisjoint(_IMAGES):
                rows.append(_row(blocks, fields))
    damage += [f"{what} are left out: {len(names)}, the first {_said(names[0])}" for what, names in left_out.items()]
    return np.array(rows, dtype=np.uint32).reshape(len(rows), *ROW), "; ".join(damage)


def _apart(files: list[_File]) -> Iterator[dict[str, tuple[int, int]] | None]:
    """Yield the samples among the files of one key, each as (block, size) by field; None for those that cannot be told
    apart. It is one sample, wherever its files are, unless a field occurs twice. Then those are samples that follow
    each other directly, and of those that stand side by side, each must have the same fields."""
    fields = {file.field: (file.block, file.size) for file in files}
    images = {file.run for file in files if file.field in _IMAGES} if len(files) > 1 else ()
    if len(fields) == len(files) and len(images) <= 1:
        yield fields
        return
    for _, together in groupby(files, itemgetter(0)):
        parts: list[dict[str, tuple[int, int]]] = [{}]
        for file in together:
            if file.field in parts[-1]:
                parts.append({})
            parts[-1][file.field] = (file.block, file.size)
        if any(part.keys() != parts[0].keys() for part in parts):
            yield None
        else:
            yield from parts


def _row(blocks: Blocks, fields: dict[str, tuple[int, int]]) -> list[tuple[int, int]]:
    """Return a sample's row. Its caption is the text file, or the JSON file if that has several or there is no text."""
    caption = fields.get("txt", (0, 0))
    if "json" in fields:
        block, size = fields["json"]
        if "txt" not in fields or (size <= _MAX_JSON_BYTES and b'"captions"' in blocks.read(block * BLOCK, size)):
            caption = (block, size | _JSON_CAPTION)
    label = fields.get("cls", (0, 0))
    if "npy" in fields and not (label[0] and caption[0]):
        if label[0]:
            caption = (label[0], label[1] | _CLASS)
        label = (fields["npy"][0], fields["npy"][1] | _ARRAY)
    return [next(fields[image] for image in _IMAGES if image in fields), caption, label]


def _said(name: bytes) -> str:
    """Return a name for a message: on one line, and not long."""
    text = name.decode("utf-8", "backslashreplace").encode("unicode_escape").decode()
    return text if len(text) <= _LONGEST_NAME_SAID else f"{text[:_LONGEST_NAME_SAID]}..."
