"""Read checkpoints of the original JAX FLIP, without JAX, from a folder or directly from a zip.

A checkpoint is a folder `checkpoint_N`: an index (msgpack) named `checkpoint` and, for each parameter, a zarr v2 array
in a folder `target.<dotted name>`.
"""

import gzip
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

_VERSION = 3


@dataclass(frozen=True)
class Files:
    """The files in a folder or in a zip.

    Args:
        root: its name in messages.
        names: of all its files, relative to it, with `/`.
        read: returns the content of a file by its name.
    """

    root: str
    names: frozenset[str]
    read: Callable[[str], bytes]

    def below(self, folder: str) -> "Files":
        """Return the files in one of its folders."""
        if folder == ".":
            return self
        names = frozenset(name[len(folder) + 1 :] for name in self.names if name.startswith(f"{folder}/"))
        return Files(f"{self.root}/{folder}", names, lambda name: self.read(f"{folder}/{name}"))


class StoredArray:
    """A parameter in the checkpoint. Its shape is known; `np.asarray` reads its values (fp32).

    Raises:
        ValueError: it is missing, cut short or in a format that the original does not write.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, name: str, files: Files):
        self.name = name
        self.files = files
        self.meta = self._metadata()
        self.shape: tuple[int, ...] = self.meta["shape"]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        shape, chunks, stored = self.shape, self.meta["chunks"], self.meta["dtype"]
        array = np.empty(shape, np.float32)
        counts = [math.ceil(length / chunk) for length, chunk in zip(shape, chunks, strict=True)]
        for position in itertools.product(*map(range, counts)):
            content = self._chunk(self.meta["separator"].join(map(str, position)) or "0")
            where = tuple(slice(p * chunk, (p + 1) * chunk) for p, chunk in zip(position, chunks, strict=True))
            part = array[where]
            # A chunk at the edge is stored at full size, padded.
            part[...] = np.frombuffer(content, stored).reshape(chunks)[tuple(map(slice, part.shape))]
        return array if dtype is None else array.astype(dtype, copy=False)

    def _metadata(self) -> dict[str, Any]:
        file = f"{self.files.root}/.zarray"
        if ".zarray" not in self.files.names:
            raise ValueError(f"array {self.name} is missing: {self.files.root} has no .zarray")
        try:
            meta = json.loads(self.files.read(".zarray"))
            compressor = (meta["compressor"] or {"id": None})["id"]
            form = (
                f"zarr {meta['zarr_format']}, compressor {compressor}, order {meta['order']}, filters {meta['filters']}"
            )
            meta = {"separator": meta.get("dimension_separator", "."), **meta}
            meta |= {"compressor": compressor, "shape": tuple(meta["shape"]), "chunks": tuple(meta["chunks"])}
            meta["dtype"] = np.dtype(meta["dtype"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"array {self.name} is damaged: {file} cannot be read ({error!r})") from error
        if form not in (f"zarr 2, compressor {known}, order C, filters None" for known in ("gzip", None)):
            raise ValueError(
                f"array {self.name} is stored as {form}; the original FLIP writes zarr 2, gzip, order C, no filters"
            )
        return meta

    def _chunk(self, name: str) -> bytes:
        file, num_bytes = f"{self.files.root}/{name}", math.prod(self.meta["chunks"]) * self.meta["dtype"].itemsize
        if name not in self.files.names:
            raise ValueError(f"array {self.name} is incomplete: {file} is missing")
        try:
            content = self.files.read(name)
            if self.meta["compressor"] == "gzip":
                content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"array {self.name} is damaged: {file} is cut short or not gzip ({error})") from error
        if len(content) != num_bytes:
            raise ValueError(f"array {self.name} is damaged: {file} holds {len(content)} bytes, not {num_bytes}")
        return content


def open_flip_checkpoint(path: Path | str) -> Mapping[str, StoredArray]:
    """Return all parameters of a checkpoint by the original's names (`img_encoder/cls`), without reading their values.

    Optimiser state is skipped.

    Args:
        path: the folder `checkpoint_N`, a folder or a zip that holds it at any depth, or the file `checkpoint` in it.

    Raises:
        ValueError: there is no checkpoint or more than one, its version is unknown, or an array is missing or in
            another format.
    """
    files = _checkpoint(_files(Path(path)))
    return {name: StoredArray(name, files.below(folder)) for name, folder in _array_folders(files).items()}


def _files(path: Path) -> Files:
    if not path.exists():
        raise ValueError(f"{path} does not exist; name a checkpoint_N folder of the original FLIP, or its zip")
    if path.is_file() and path.name != "checkpoint":
        return _zipped_files(path)
    folder = path.parent if path.is_file() else path
    names = frozenset(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return Files(str(folder), names, lambda name: (folder / name).read_bytes())


def _zipped_files(path: Path) -> Files:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path} is not a checkpoint of the original FLIP: it is no zip, or one that was cut short ({error})"
        ) from error

    def read(name: str) -> bytes:
        try:
            return archive.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: it wants a password
            raise ValueError(f"{path}: {name} in it cannot be read ({error}); fetch the zip again") from error

    return Files(str(path), frozenset(archive.namelist()), read)


def _checkpoint(files: Files) -> Files:
    """Return the files of the only checkpoint among `files`."""
    arrays = [PurePosixPath(name).parent for name in files.names if PurePosixPath(name).name == ".zarray"]
    folders = sorted({str(array.parent) for array in arrays if array.name.startswith("target.")})
    if not folders:
        raise ValueError(f"{files.root} is not a checkpoint of the original FLIP: no target.* array folder is in it")
    if len(folders) > 1:
        raise ValueError(f"{files.root} holds {len(folders)} checkpoints ({', '.join(folders)}); name one of them")
    return files.below(folders[0])


def _array_folders(files: Files) -> dict[str, str]:
    """Return the folder of each parameter's array, from the index or, without msgpack, from the folders' names."""
    try:
        import msgpack
    except ImportError:
        msgpack = None
    if msgpack is None or "checkpoint" not in files.names:
        folders = sorted({name.split("/")[0] for name in files.names if name.startswith("target.")})
        return {folder.removeprefix("target.").replace(".", "/"): folder for folder in folders}
    file = f"{files.root}/checkpoint"
    try:
        index = msgpack.unpackb(files.read("checkpoint"), strict_map_key=False)
        version, target = index["version"], index["optimizer"]["target"]
    except (msgpack.UnpackException, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not the index of a checkpoint of the original FLIP ({error!r})") from error
    if version != _VERSION:
        raise ValueError(f"{file} is of version {version}; only version {_VERSION}, the original FLIP's, can be read")
    return dict(_leaves(target, ()))


def _leaves(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield name and array folder of every array below `node`. The bucket that the trainer wrote to is ignored."""
    name = "/".join(path)
    if not isinstance(node, dict):
        raise ValueError(f"parameter {name} is not a zarr array in the checkpoint's index")
    if "driver" not in node:
        for key, child in node.items():
            yield from _leaves(child, (*path, key))
        return
    # Before tensorstore 0.1.14 the path was beside `kvstore`.
    stored = node.get("path") or node.get("kvstore", {}).get("path")
    if not stored:
        raise ValueError(f"parameter {name} has no path in the checkpoint's index")
    yield name, PurePosixPath(stored).name
