"""The manifest of a source's shards: one file that says what is in each of them, so that nobody opens them to ask.

`shards.manifest` is 64 bytes of head, then the indices of all shards in one piece (24 bytes a sample; none for shards
at a URL), then a table of 32 bytes a shard, their names, an object of JSON, and 32 bytes that close it. Reading it
takes one open and no time that depends on the number of samples: indices are read a row at a time.
"""

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flipscale.data.sources.shard_index import ROW
from flipscale.files.aside import own_partial_path, written_aside

_VERSION = 1
_MAGIC = b"flipscale manifest "
_HEAD_BYTES = 64
_STAMP_AT = _HEAD_BYTES - 8
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
        self._starts = np.cumsum(self.table["samples"]) - self.table["samples"]
        self._rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.table)

    def name(self, shard: int) -> str:
        """Return the name of a shard."""
        first = int(self.table["name_end"][shard - 1]) if shard else 0
        return self.names[first : int(self.table["name_end"][shard])].decode()

    def all_names(self) -> list[str]:
        """Return the names of all shards."""
        return [self.name(shard) for shard in range(len(self))]

    def row(self, shard: int, number: int) -> np.ndarray:
        """Return the row of a sample in the index of its shard, uint32 `(3, 2)`.

        Raises:
            ValueError: another manifest has taken this one's place.
        """
        if self._rows is None:
            self._rows = self._mapped()
        row: np.ndarray = self._rows[self._starts[shard] + number]
        return row

    def set_stamp(self, stamp: int) -> None:
        """Write when the folders were last seen to hold these shards, if the file can be written."""
        self.stamp = stamp
        with suppress(OSError), open(self.path, "r+b") as file:
            os.pwrite(file.fileno(), struct.pack("<q", stamp), _STAMP_AT)

    def _mapped(self) -> np.ndarray:
        """Return the indices of all shards, memory-mapped: the processes of a machine share what they read of them."""
        with open(self.path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        if not mapped[-_TAIL.size :].endswith(self.digest):
            raise ValueError(f"manifest {self.path} was written anew while this ran; start again")
        num_samples = int(self.table["samples"].sum())
        return np.frombuffer(mapped, "<u4", num_samples * ROW[0] * ROW[1], _HEAD_BYTES).reshape(num_samples, *ROW)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_rows": None}


def read_manifest(path: Path, pattern: str, remedy: str) -> Manifest | None:
    """Return the manifest at `path`, None if there is none.

    Args:
        pattern: what it must list.
        remedy: the end of the sentence of an error.

    Raises:
        ValueError: it is of another version, damaged, or lists other shards.
    """
    try:
        file = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        head, size = os.pread(file, _HEAD_BYTES, 0), os.fstat(file).st_size
        if head[: len(_MAGIC)] != _MAGIC:
            raise ValueError(f"{path} is not a manifest of shards; {remedy}")
        version = head[len(_MAGIC) : _STAMP_AT].strip(b"\n\0").decode("utf-8", "replace")
        if version != str(_VERSION):
            raise ValueError(f"manifest {path} has version {version}, this flipscale reads {_VERSION}; {remedy}")
        tail = os.pread(file, _TAIL.size, size - _TAIL.size) if size >= _HEAD_BYTES + _TAIL.size else bytes(_TAIL.size)
        table_at, json_bytes, digest = _TAIL.unpack(tail)
        content = os.pread(file, size - _TAIL.size - table_at, table_at) if 0 < table_at < size else b""
        if not content or _digest(content) != digest:
            raise ValueError(f"manifest {path} is cut short or damaged, at {size} bytes; {remedy}")
    finally:
        os.close(file)
    about = json.loads(content[-json_bytes:])
    if about["pattern"] != pattern:
        raise ValueError(f"manifest {path} lists the shards {about['pattern']!r}, not {pattern!r}; {remedy}")
    table = np.frombuffer(content, _TABLE, about["shards"])
    return Manifest(
        path,
        pattern,
        table,
        content[table.nbytes : -json_bytes],
        {int(shard): damage for shard, damage in about["damage"].items()},
        about["folders"],
        digest,
        struct.unpack("<q", head[_STAMP_AT:])[0],
    )


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
    with written_aside(path, own_partial_path(path)) as partial, open(partial, "wb") as file:
        file.write((_MAGIC + f"{_VERSION}\n".encode()).ljust(_HEAD_BYTES, b"\0"))
        for entry in entries:
            names.append(entry.name.encode())
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
