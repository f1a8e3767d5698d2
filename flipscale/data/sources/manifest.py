"""The manifest of a source's shards: one file that says what is in each of them, so that nobody opens them to ask.

`shards.manifest` is 64 bytes of head, then the indices of all shards in one piece (24 bytes a sample; none for shards
at a URL), then a table of 32 bytes a shard, their names, an object of JSON, and 32 bytes that close it. Reading it
takes one open and no time that depends on the number of samples: indices are read a row at a time.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flipscale.data.sources.shard_index import ROW
from flipscale.data.sources.tar_members import NotAFile, open_plain
from flipscale.io.atomic import atomic_write, unique_partial_path
from flipscale.io.errors import UserError

_VERSION = 1
_MAGIC = b"flipscale manifest "
_HEAD_BYTES = 64
_STAMP_AT = _HEAD_BYTES - 8
_ROW_BYTES = 4 * ROW[0] * ROW[1]
_TAIL = struct.Struct("<qq16s")  # where the table is, how long the JSON is, the digest of all from the table on
# `name_end`: where the shard's name ends in the blob of all names.
_TABLE = np.dtype([("samples", "<i8"), ("num_bytes", "<i8"), ("mtime_ns", "<i8"), ("name_end", "<i8")])


class ShardEntry(NamedTuple):
    """What a manifest holds of a shard.

    Args:
        name: relative to the folder that holds the manifest, or a URL.
        rows: its index, uint32 `(samples, 3, 2)`.
        damage: how the shard is damaged; empty if it is not.
        mtime_ns: when it was last written; 0 where that is not known.
    """

    name: str
    rows: np.ndarray
    damage: str
    num_bytes: int
    mtime_ns: int


@dataclass
class Manifest:
    """A manifest that was read. Pickled, it takes 32 bytes a shard and the names.

    Args:
        path: of its file.
        pattern: what it lists, as the recipe names it, relative to its folder.
        table: of the dtype above, one row a shard.
        names: of all shards, joined.
        damage: by shard.
        folders: whose times `stamp` is made of; relative.
        digest: of the table and all that follows it.
        stamp: of the folders when the shards were listed.
    """

    path: Path
    pattern: str
    table: np.ndarray
    names: bytes
    damage: dict[int, str]
    folders: list[str]
    digest: bytes
    stamp: int

    def __post_init__(self) -> None:
        self._file: int | None = None
        self._starts = np.cumsum(self.table["samples"]) - self.table["samples"]

    def __len__(self) -> int:
        return len(self.table)

    def name(self, shard: int) -> str:
        """Return the name of a shard."""
        first = int(self.table["name_end"][shard - 1]) if shard else 0
        return os.fsdecode(self.names[first : int(self.table["name_end"][shard])])

    def all_names(self) -> list[str]:
        """Return the names of all shards."""
        return [self.name(shard) for shard in range(len(self))]

    def row(self, shard: int, number: int) -> np.ndarray:
        """Return the row of a sample in the index of its shard, uint32 `(3, 2)`.

        Raises:
            ValueError: another manifest has taken this one's place.
        """
        if self._file is None:
            self._file = self._opened()
        # Not mapped to memory: if somebody cut the file short, that would be the end of the process.
        row = os.pread(self._file, _ROW_BYTES, _HEAD_BYTES + _ROW_BYTES * int(self._starts[shard] + number))
        if len(row) < _ROW_BYTES:
            raise self._written_anew()
        return np.frombuffer(row, "<u4").reshape(ROW)

    def set_stamp(self, stamp: int) -> None:
        """Write when the folders were last seen to hold these shards, if the file can be written."""
        self.stamp = stamp
        with suppress(OSError), open(self.path, "r+b") as file:
            os.pwrite(file.fileno(), struct.pack("<q", stamp), _STAMP_AT)

    def _opened(self) -> int:
        """Return a file descriptor of the manifest, from which rows are read one at a time."""
        try:
            file = open_plain(self.path)
        except FileNotFoundError as error:
            raise self._written_anew() from error
        size = os.fstat(file).st_size
        if size < _TAIL.size or not os.pread(file, _TAIL.size, size - _TAIL.size).endswith(self.digest):
            os.close(file)
            raise self._written_anew()
        return file

    def _written_anew(self) -> UserError:
        return UserError(f"manifest {self.path} was written anew or removed while this ran; start again")

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)


def read_manifest(path: Path, pattern: str, remedy: str) -> Manifest | None:
    """Return the manifest at `path`, None if there is none.

    Args:
        pattern: what it must list.
        remedy: the end of the sentence of an error.

    Raises:
        ValueError: it is of another version, damaged, or lists other shards.
    """
    try:
        file = open_plain(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except NotAFile as error:
        raise UserError(f"{path} cannot be the manifest of shards: {error}; remove it") from error
    try:
        head, size = os.pread(file, _HEAD_BYTES, 0), os.fstat(file).st_size
        if head[: len(_MAGIC)] != _MAGIC:
            raise UserError(f"{path} is not a manifest of shards; {remedy}")
        version = head[len(_MAGIC) : _STAMP_AT].strip(b"\n\0").decode("utf-8", "replace")
        if version != str(_VERSION):
            raise UserError(f"manifest {path} has version {version}, this flipscale reads {_VERSION}; {remedy}")
        tail = os.pread(file, _TAIL.size, size - _TAIL.size) if size >= _HEAD_BYTES + _TAIL.size else bytes(_TAIL.size)
        table_at, json_bytes, digest = _TAIL.unpack(tail)
        content = os.pread(file, size - _TAIL.size - table_at, table_at) if 0 < table_at < size - _TAIL.size else b""
        try:
            if _digest(content) != digest:
                raise UserError("another digest")
            found = _parsed(path, content, json_bytes, digest, struct.unpack("<q", head[_STAMP_AT:])[0])
            if table_at not in (_HEAD_BYTES, _HEAD_BYTES + _ROW_BYTES * int(found.table["samples"].sum())):
                raise UserError("another number of rows")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise UserError(f"manifest {path} is cut short or damaged, at {size} bytes; {remedy}") from error
    finally:
        os.close(file)
    if found.pattern != pattern:
        raise UserError(f"manifest {path} lists the shards {found.pattern!r}, not {pattern!r}; {remedy}")
    return found


def _parsed(path: Path, content: bytes, json_bytes: int, digest: bytes, stamp: int) -> Manifest:
    """Return the manifest whose table and all that follows it is `content`.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError: it is none, or leads out of its
            folder.
    """
    about = json.loads(content[-json_bytes:])
    table = np.frombuffer(content, _TABLE, about["shards"])
    names = content[table.nbytes : -json_bytes]
    damage = {int(shard): str(text) for shard, text in about["damage"].items()}
    folders = [os.fspath(folder) for folder in about["folders"]]
    ends = np.concatenate([[0], table["name_end"]])
    if (table["samples"] < 0).any() or (table["num_bytes"] < 0).any() or (np.diff(ends) < 0).any():
        raise UserError("negative numbers")
    if ends[-1] != len(names) or (np.frombuffer(names + b"/", "u1")[ends[:-1]] == ord("/")).any():
        raise UserError("absolute or empty names")
    if not all(0 <= shard < len(table) for shard in damage):
        raise UserError("other names or shards")
    manifest = Manifest(path, str(about["pattern"]), table, names, damage, folders, digest, stamp)
    # Few names have dots, so the others need not be taken apart.
    if b".." in names and any(".." in name.split("/") for name in manifest.all_names() if ".." not in manifest.pattern):
        raise UserError("it leads out of its folder")
    return manifest


def write_manifest(path: Path, pattern: str, entries: Iterable[ShardEntry], folders: list[str], rows: bool) -> None:
    """Write a manifest, under another name until it is whole.

    Args:
        folders: as `Manifest`.
        rows: whether it holds the shards' indices.

    Raises:
        OSError: it cannot be written, or a shard cannot be read.
    """
    table: list[tuple[int, int, int, int]] = []
    names, name_end, damage = [], 0, {}
    with atomic_write(path, unique_partial_path(path)) as partial, open(partial, "wb") as file:
        file.write((_MAGIC + f"{_VERSION}\n".encode()).ljust(_HEAD_BYTES, b"\0"))
        for entry in entries:
            names.append(os.fsencode(entry.name))
            name_end += len(names[-1])
            if entry.damage:
                damage[len(table)] = entry.damage
            table.append((len(entry.rows), entry.num_bytes, entry.mtime_ns, name_end))
            if rows:
                file.write(entry.rows.tobytes())
        about = json.dumps({"pattern": pattern, "shards": len(table), "damage": damage, "folders": folders}).encode()
        content = np.array(table, _TABLE).tobytes() + b"".join(names) + about
        table_at = file.tell()
        file.write(content + _TAIL.pack(table_at, len(about), _digest(content)))


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
