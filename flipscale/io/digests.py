"""Digests of files, safetensors files written with their digests, and comparisons of files with digests.

A file has a digest for every 16 MiB, so readers can share the work and damage has a position. Digests detect faults of
disks and networks. They do not detect an attacker who rewrites both file and digests.
"""

import errno
import itertools
import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash

from flipscale.io.errors import UserError

CHUNK_BYTES = 16 * 2**20
_ALGORITHM = "xxh3_64"
# Only these errors mean that the path is not a file. After EIO, EACCES or ESTALE the file may be whole.
_NOT_A_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}

Chunk = tuple[str, int]  # a file's name and a chunk index


class CorruptFile(Exception):
    """A file differs from the one that was written; the text says how."""


class FileDigest(NamedTuple):
    """Length of a file in bytes, and the XXH3 digest of each chunk in hexadecimal."""

    num_bytes: int
    chunks: tuple[str, ...]


class Digester:
    """Computes the digest of a file from pieces of any length."""

    def __init__(self) -> None:
        self._num_bytes = 0
        self._hashes: list[xxhash.xxh3_64] = []

    def update(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            position = self._num_bytes % CHUNK_BYTES
            if position == 0:
                self._hashes.append(xxhash.xxh3_64())
            part = view[: CHUNK_BYTES - position]
            self._hashes[-1].update(part)
            self._num_bytes += len(part)
            view = view[len(part) :]

    def digest(self) -> FileDigest:
        return FileDigest(self._num_bytes, tuple(chunk.hexdigest() for chunk in self._hashes))


def digest_of(data: bytes) -> FileDigest:
    digester = Digester()
    digester.update(data)
    return digester.digest()


def digests_to_json(digests: Mapping[str, FileDigest]) -> str:
    files = {name: {"bytes": digest.num_bytes, _ALGORITHM: digest.chunks} for name, digest in digests.items()}
    return json.dumps({"chunk_bytes": CHUNK_BYTES, "files": files})


def read_digests(path: Path) -> dict[str, FileDigest]:
    """Return the digests that `digests_to_json` wrote. Raise CorruptFile without such a file, else OSError."""
    try:
        content = json.loads(read_bytes(path))
        files = {name: FileDigest(file["bytes"], tuple(file[_ALGORITHM])) for name, file in content["files"].items()}
        has_chunks = all(len(digest.chunks) == -(-digest.num_bytes // CHUNK_BYTES) for digest in files.values())
        if content["chunk_bytes"] != CHUNK_BYTES or not has_chunks:
            raise ValueError("chunks of another length")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFile(f"{path.name} is unreadable") from error
    return files


def read_bytes(path: Path, most: int = 2**28) -> bytes:
    """Return the content of a file of at most `most` bytes; raises as `file_bytes`."""
    size = file_bytes(path)
    if size > most:
        raise CorruptFile(f"{path.name} has {size:,} bytes; expected at most {most:,}")
    return path.read_bytes()


def file_bytes(path: Path) -> int:
    """Return the length of a regular file. Reading a pipe or a device may never end, so they are `CorruptFile`.

    Raises:
        CorruptFile: no regular file is there.
        OSError: the status cannot be read, though the file may be whole.
    """
    try:
        status = path.stat()
    except OSError as error:
        if error.errno not in _NOT_A_FILE:
            raise
        raise CorruptFile(f"{path.name} is missing") from error
    if not stat.S_ISREG(status.st_mode):
        raise CorruptFile(f"{path.name} is not a regular file")
    return status.st_size


def damaged_chunks(
    folder: Path, digests: Mapping[str, FileDigest], chunks: Sequence[Chunk], num_threads: int = 1
) -> list[Chunk]:
    """Return the chunks of a folder's files that differ from their digests, by file name; raises as `file_bytes`."""

    def is_damaged(chunk: Chunk) -> bool:
        name, number = chunk
        file_bytes(folder / name)
        with open(folder / name, "rb") as file:
            file.seek(number * CHUNK_BYTES)
            return digest_of(file.read(CHUNK_BYTES)).chunks != (digests[name].chunks[number],)

    with ThreadPoolExecutor(num_threads) as pool:
        return sorted(itertools.compress(chunks, pool.map(is_damaged, chunks)))


def chunks_of(digests: Mapping[str, FileDigest]) -> list[Chunk]:
    return [(name, number) for name, digest in digests.items() for number in range(len(digest.chunks))]


def write_tensors(
    path: Path, layout: Mapping[str, tuple[torch.dtype, Sequence[int]]], tensors: Iterable[torch.Tensor]
) -> FileDigest:
    """Write a safetensors file, wait until it is on disk, and return its digest.

    Unlike the library's writer, this one needs one tensor at a time and releases the interpreter's lock.

    Args:
        layout: dtype and shape of each tensor by name, in the order of `tensors`.
        tensors: tensors on the CPU.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in layout.items():
        size = dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digester = Digester()
    # Hashing and writing both release the interpreter's lock, so they overlap.
    with open(path, "wb") as file, ThreadPoolExecutor(1) as hashing:

        def write(data: bytes | memoryview) -> None:
            hashed = hashing.submit(digester.update, data)
            file.write(data)
            hashed.result()

        write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return digester.digest()


def check_weight(name: str, weight: torch.Tensor) -> None:
    """Raise UserError unless a tensor has finite floating-point numbers."""
    if not weight.is_floating_point():
        raise UserError(f"weight {name} is of type {str(weight.dtype).removeprefix('torch.')}; it must be a float")
    if weight.numel() and not all(end.isfinite() for end in weight.detach().float().aminmax()):
        raise UserError(f"weight {name} has numbers that are NaN or infinite; use weights of an earlier step")


def weights_digest(weights: Iterable[torch.Tensor]) -> str:
    """Return a digest of weights in fp32, whatever their names, order and files."""
    digests = [xxhash.xxh3_128(weight.detach().float().cpu().numpy().tobytes()).hexdigest() for weight in weights]
    return xxhash.xxh3_128("".join(sorted(digests)).encode()).hexdigest()
