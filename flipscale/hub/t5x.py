"""Read checkpoints of the original JAX FLIP, without JAX, from a folder or a zip.

A checkpoint is a folder `checkpoint_N`: an index (msgpack) named `checkpoint` and, for each parameter, a zarr v2 array
in a folder `target.<dotted name>`.
"""

import gzip
import io
import itertools
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from flipscale.io.errors import UserError

_VERSION = 3
# The largest known index has 1 MB, and the metadata of an array 300 bytes.
_MOST_INDEX_BYTES, _MOST_META_BYTES = 64 << 20, 1 << 20
# Upper bound on the compression ratio of gzip and zip.
_MOST_RATIO = 1_100


@dataclass(frozen=True)
class Files:
    """Files of a folder or a zip.

    Args:
        root: name for messages.
        sizes: bytes of all files, by their names relative to the root, with `/`.
        content: function that returns the content of a file by its name.
    """

    root: str
    sizes: Mapping[str, int]
    content: Callable[[str], bytes]

    def read(self, name: str, most: int) -> bytes:
        """Return the content of a file. Raise UserError if it has more than `most` bytes; it may be compressed."""
        if self.sizes[name] > most:
            raise UserError(f"{self.root}/{name} has {self.sizes[name]:,} bytes, more than {most:,}")
        return self.content(name)

    def below(self, folder: str) -> "Files":
        """Return the files of a folder."""
        if folder == ".":
            return self
        start = len(folder) + 1
        sizes = {name[start:]: size for name, size in self.sizes.items() if name.startswith(f"{folder}/")}
        return Files(f"{self.root}/{folder}", sizes, lambda name: self.content(f"{folder}/{name}"))


class StoredArray:
    """A parameter in the checkpoint: `shape` is known at once, `np.asarray` reads the values (fp32).

    Raises:
        UserError: the array is missing, cut short or in a format that the original does not write.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, name: str, files: Files):
        self.name = name
        self.files = files
        self.meta = self._metadata()
        self.shape: tuple[int, ...] = self.meta["shape"]
        # The files may be too small for the claimed shape, whose memory is allocated later.
        stored = sum(size for file, size in files.sizes.items() if file != ".zarray")
        claimed = max(math.prod(self.shape), math.prod(self.meta["chunks"])) * self.meta["dtype"].itemsize
        if claimed > _MOST_RATIO**2 * stored + _MOST_META_BYTES and math.prod(self._counts()) <= len(files.sizes):
            raise UserError(f"array {name} is damaged: {files.root} has {stored:,} bytes, too few for {claimed:,}")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        chunks, stored = self.meta["chunks"], self.meta["dtype"]
        array = np.empty(self.shape, np.float32)
        for position in itertools.product(*map(range, self._counts())):
            content = self._chunk(self.meta["separator"].join(map(str, position)) or "0")
            where = tuple(slice(p * chunk, (p + 1) * chunk) for p, chunk in zip(position, chunks, strict=True))
            part = array[where]
            # A chunk at the edge is stored at full size, padded.
            part[...] = np.frombuffer(content, stored).reshape(chunks)[tuple(map(slice, part.shape))]
        return array if dtype is None else array.astype(dtype, copy=False)

    def _counts(self) -> list[int]:
        """Return the number of chunks along each dimension."""
        return [-(-length // chunk) for length, chunk in zip(self.shape, self.meta["chunks"], strict=True)]

    def _metadata(self) -> dict[str, Any]:
        file = f"{self.files.root}/.zarray"
        if ".zarray" not in self.files.sizes:
            raise UserError(f"array {self.name} is missing: {self.files.root} has no .zarray")
        try:
            meta = json.loads(self.files.read(".zarray", _MOST_META_BYTES))
            compressor = (meta["compressor"] or {"id": None})["id"]
            form = (
                f"zarr {meta['zarr_format']}, compressor {compressor}, order {meta['order']}, filters {meta['filters']}"
            )
            meta = {"separator": meta.get("dimension_separator", "."), **meta}
            meta |= {"compressor": compressor, "shape": tuple(meta["shape"]), "chunks": tuple(meta["chunks"])}
            meta["dtype"] = np.dtype(meta["dtype"])
            lengths = [*meta["shape"], *meta["chunks"]]
            is_sound = meta["dtype"].kind == "f" and all(type(n) is int and n >= 1 for n in lengths)
            if not is_sound or len(meta["shape"]) != len(meta["chunks"]):
                raise UserError(f"{meta['dtype']} of {meta['shape']} in chunks of {meta['chunks']}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"array {self.name} is damaged: {file} cannot be read ({error!r})") from error
        if form not in (f"zarr 2, compressor {known}, order C, filters None" for known in ("gzip", None)):
            raise UserError(
                f"array {self.name} is stored as {form}; the original FLIP writes zarr 2, gzip, order C, no filters"
            )
        return meta

    def _chunk(self, name: str) -> bytes:
        file, num_bytes = f"{self.files.root}/{name}", math.prod(self.meta["chunks"]) * self.meta["dtype"].itemsize
        if name not in self.files.sizes:
            raise UserError(f"array {self.name} is incomplete: {file} is missing")
        try:
            # Incompressible content grows a little.
            content = self.files.read(name, num_bytes + num_bytes // 100 + 4096)
            if self.meta["compressor"] == "gzip":
                with gzip.GzipFile(fileobj=io.BytesIO(content)) as file_content:
                    content = file_content.read(num_bytes + 1)
        except (EOFError, OSError, zlib.error) as error:
            raise UserError(f"array {self.name} is damaged: {file} is cut short or not gzip ({error})") from error
        if len(content) != num_bytes:
            size = f"more than {num_bytes}" if len(content) > num_bytes else f"{len(content)}"
            raise UserError(f"array {self.name} is damaged: {file} holds {size} bytes, not {num_bytes}")
        return content


def open_flip_checkpoint(path: Path | str) -> Mapping[str, StoredArray]:
    """Return all parameters of a checkpoint by the original's names (`img_encoder/cls`), without reading their values.

    Optimiser state is skipped.

    Args:
        path: folder `checkpoint_N`, a folder or zip that contains it at any depth, or the file `checkpoint` in it.

    Raises:
        UserError: there is no checkpoint or more than one, its version is unknown, or an array is missing or in another
            format.
    """
    files = _checkpoint(_files(Path(path)))
    return {name: StoredArray(name, files.below(folder)) for name, folder in _array_folders(files).items()}


def _files(path: Path) -> Files:
    if not path.exists():
        raise UserError(f"{path} does not exist; name a checkpoint_N folder of the original FLIP, or its zip")
    if path.is_file() and path.name != "checkpoint":
        return _zipped_files(path)
    folder = path.parent if path.is_file() else path
    home = folder.resolve()
    # Links out of the folder are not followed.
    files = [file for file in folder.rglob("*") if file.is_file() and file.resolve().is_relative_to(home)]
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    return Files(str(folder), sizes, lambda name: (folder / name).read_bytes())


def _zipped_files(path: Path) -> Files:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{path} is not a checkpoint of the original FLIP: it is not a zip, or cut short ({error})"
        ) from error

    def read(name: str) -> bytes:
        try:
            return archive.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:  # RuntimeError: a password
            raise UserError(f"{path}: {name} in it cannot be read ({error}); download the zip again") from error

    # zipfile never reads more of a file than its listed size.
    return Files(str(path), {member.filename: member.file_size for member in archive.infolist()}, read)


def _checkpoint(files: Files) -> Files:
    """Return the files of the only checkpoint in `files`."""
    arrays = [PurePosixPath(name).parent for name in files.sizes if PurePosixPath(name).name == ".zarray"]
    folders = sorted({str(array.parent) for array in arrays if array.name.startswith("target.")})
    if not folders:
        raise UserError(f"{files.root} is not a checkpoint of the original FLIP: no target.* array folder found")
    if len(folders) > 1:
        raise UserError(f"{files.root} holds {len(folders)} checkpoints ({', '.join(folders)}); name one of them")
    return files.below(folders[0])


def _array_folders(files: Files) -> dict[str, str]:
    """Return the folder of each parameter's array, from the index or, without msgpack, from the names of folders."""
    try:
        import msgpack
    except ImportError:
        msgpack = None
    if msgpack is None or "checkpoint" not in files.sizes:
        folders = sorted({name.split("/")[0] for name in files.sizes if name.startswith("target.")})
        return {folder.removeprefix("target.").replace(".", "/"): folder for folder in folders}
    file = f"{files.root}/checkpoint"
    try:
        index = msgpack.unpackb(files.read("checkpoint", _MOST_INDEX_BYTES), strict_map_key=False)
        version, target = index["version"], index["optimizer"]["target"]
        if version == _VERSION:
            return dict(_leaves(target, ()))
    except UserError:
        raise
    except (msgpack.UnpackException, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is not the index of a checkpoint of the original FLIP ({error!r})") from error
    raise UserError(f"{file} has version {version}; expected {_VERSION}, the original FLIP's")


def _leaves(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield name and array folder of every array below `node`. The trainer's bucket is ignored."""
    name = "/".join(path)
    if not isinstance(node, dict):
        raise UserError(f"parameter {name} is not a zarr array in the checkpoint's index")
    if "driver" not in node:
        for key, child in node.items():
            yield from _leaves(child, (*path, key))
        return
    # Before tensorstore 0.1.14 the path was a sibling of `kvstore`.
    stored = node.get("path") or node.get("kvstore", {}).get("path")
    if not stored:
        raise UserError(f"parameter {name} has no path in the checkpoint's index")
    yield name, PurePosixPath(stored).name
