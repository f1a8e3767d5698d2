"""Digests of files: taken while a file is written, and compared by any number of threads and processes.

A file has a digest for every 16 MiB, so that several readers can share the work, and damage has a place. They find what
disks, networks and careless hands do to a file; they do not keep out somebody who writes both file and digests.
"""

import errno
import itertools
import json
import os
import stat
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import xxhash

CHUNK_BYTES = 16 * 2**20
_NAME = "xxh3_64"
# Read and hashed at once: more does not fit a core's cache, less waits more often for the interpreter's lock.
_BLOCK_BYTES = 4 * 2**20
# Errors that say that a file is not there or not a file. After any other (EIO, EACCES, ESTALE) it may be whole.
_NOT_A_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)


class Damage(Exception):
    """A file is not what was written; the text says in which way."""


class FileDigest(NamedTuple):
    """What is known of a file that is whole: its length and the XXH3 digest of each chunk, in hexadecimal."""

    num_bytes: int
    chunks: tuple[str, ...]


class Digester:
    """Takes the digest of a file from its bytes, which come in any pieces."""

    def __init__(self) -> None:
        self._num_bytes = 0
        self._chunks: list[str] = []
        self._hash = xxhash.xxh3_64()

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes of the file."""
        view = memoryview(data)
        while view:
            rest = CHUNK_BYTES - self._num_bytes % CHUNK_BYTES
            self._hash.update(view[:rest])
            self._num_bytes += len(view[:rest])
            if self._num_bytes % CHUNK_BYTES == 0:
                self._end_chunk()
            view = view[rest:]

    def digest(self) -> FileDigest:
        """Return the digest of the file, which ends here."""
        if self._num_bytes % CHUNK_BYTES:
            self._end_chunk()
        return FileDigest(self._num_bytes, tuple(self._chunks))

    def _end_chunk(self) -> None:
        self._chunks.append(self._hash.hexdigest())
        self._hash.reset()


def digest_of(data: bytes) -> FileDigest:
    """Return the digest of a file that holds `data`."""
    digester = Digester()
    digester.update(data)
    return digester.digest()


def digests_as_text(digests: Mapping[str, FileDigest]) -> str:
    """Return the digests of files, by their names, as JSON."""
    files = {name: {"bytes": digest.num_bytes, _NAME: digest.chunks} for name, digest in digests.items()}
    return json.dumps({"chunk_bytes": CHUNK_BYTES, "files": files})


def digests_in(path: Path) -> dict[str, FileDigest]:
    """Return the digests that a file holds as `digests_as_text`.

    Raises:
        Damage: there is no such file, or it holds something else.
        OSError: as `read_bytes`.
    """
    try:
        content = json.loads(read_bytes(path))
        files = {name: FileDigest(file["bytes"], tuple(file[_NAME])) for name, file in content["files"].items()}
        has_chunks = all(len(digest.chunks) == -(-digest.num_bytes // CHUNK_BYTES) for digest in files.values())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Damage(f"{path.name} is unreadable") from error
    if content.get("chunk_bytes") != CHUNK_BYTES or not has_chunks:
        raise Damage(f"{path.name} is unreadable")
    return files


def read_bytes(path: Path, most: int = 2**28) -> bytes:
    """Return what a regular file holds.

    Raises:
        Damage: there is no such file, or it has more than `most` bytes.
        OSError: it cannot be read, which does not say that it is damaged.
    """
    size = file_bytes(path)
    if size > most:
        raise Damage(f"{path.name} has {size:,} bytes, where {most:,} would be many")
    return path.read_bytes()


def file_bytes(path: Path) -> int:
    """Return the length of a regular file, which a pipe or a device is not: reading those may never end.

    Raises:
        Damage: there is no such file.
        OSError: it cannot be looked at, which does not say that it is damaged.
    """
    try:
        found = path.stat()
    except OSError as error:
        if error.errno not in _NOT_A_FILE:
            raise
        raise Damage(f"{path.name} is missing") from error
    if not stat.S_ISREG(found.st_mode):
        raise Damage(f"{path.name} is no regular file")
    return found.st_size


Chunk = tuple[str, int]


class Comparison:
    """Compares chunks of a folder's files with their digests, in threads, from the moment that it is made.

    Args:
        folder: of the files.
        digests: of its files, by name.
        chunks: a file's name and the number of a chunk of it, each.
        num_threads: which end with the process, wherever they are.
    """

    def __init__(self, folder: Path, digests: Mapping[str, FileDigest], chunks: Sequence[Chunk], num_threads: int = 1):
        self.folder = folder
        self.chunks = chunks
        self._digests = digests
        self._damaged: list[Chunk] = []
        self._errors: list[Exception] = []
        self._threads = [
            threading.Thread(target=self._compare, args=(chunks[first::num_threads],), daemon=True)
            for first in range(min(num_threads, len(chunks)))
        ]
        for thread in self._threads:
            thread.start()

    def damaged(self) -> list[Chunk]:
        """Wait for the end and return the chunks that are not what was written.

        Raises:
            Damage: there is no such file.
            OSError: a file cannot be read, which does not say that it is damaged.
        """
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]
        return sorted(self._damaged)

    def _compare(self, chunks: Sequence[Chunk]) -> None:
        try:
            for name, group in itertools.groupby(chunks, key=lambda chunk: chunk[0]):
                file_bytes(self.folder / name)
                descriptor = os.open(self.folder / name, os.O_RDONLY)
                try:
                    for _, number in group:
                        if _chunk_digest(descriptor, number) != self._digests[name].chunks[number]:
                            self._damaged.append((name, number))
                finally:
                    os.close(descriptor)
        except Exception as error:  # of any kind: what was not compared must not pass
            self._errors.append(error)


def chunks_of(digests: Mapping[str, FileDigest]) -> list[Chunk]:
    """Return all chunks of some files."""
    return [(name, number) for name, digest in digests.items() for number in range(len(digest.chunks))]


def _chunk_digest(descriptor: int, number: int) -> str:
    block, digest = bytearray(_BLOCK_BYTES), xxhash.xxh3_64()
    position, last = number * CHUNK_BYTES, (number + 1) * CHUNK_BYTES
    while position < last:
        count = os.preadv(descriptor, [memoryview(block)[: last - position]], position)
        if count == 0:
            break
        digest.update(memoryview(block)[:count])
        position += count
    return digest.hexdigest()
