"""The list of a source's shards, and its manifest: one file with the indices of all shards.

`shards.manifest` begins with a head of 64 bytes and the indices of all shards (24 bytes a sample). For shards at a URL
it has no indices. A JSON object with the names, sizes, times and damage of the shards follows, and a tail of 24 bytes.
Opening reads the JSON object only, because rows of indices are read one at a time. The manifest's time is that of the
folder, so that new and removed shards are noticed.
"""

import glob
import hashlib
import json
import logging
import os
import re
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from filelock import FileLock, Timeout

from flipscale.data.sources.raw_data import RAW_SUFFIXES, no_shards
from flipscale.data.sources.shard_index import (
    ROW,
    ROW_BYTES,
    NotAFile,
    ShardIndex,
    load_index,
    open_plain,
    size_and_time,
)
from flipscale.io.atomic import atomic_write, unique_partial_path
from flipscale.io.cores import end_with_parent
from flipscale.io.errors import UserError
from flipscale.io.paths import quoted
from flipscale.io.progress import Progress

_WILD = re.compile(r"[*?\[]|\{\d+\.\.\d+\}")
_POLL_SECONDS = 1.0
# Indexing fewer shards takes less time than starting processes.
_FEW_SHARDS = 32
# Number of indices in memory at a time, 240 kB for 10,000 samples.
_WINDOW = 512
_MOST_SHARDS, _MOST_DIGITS = 10_000_000, 18
# With more folders, only the first is watched for new and removed shards.
_MAX_FOLDERS = 16

# `DIR/*` also matches files that flipscale writes into folders of shards: indices, manifests, reports, class names.
_OWN_FILES = re.compile(r".*\.(npy|manifest|json|jsonl|txt)|\..*")

_log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

_HEAD = b"flipscale manifest 2\n".ljust(64, b"\0")
_TAIL = struct.Struct("<q16s")  # position of the JSON object, and digest of it


@dataclass
class Manifest:
    """A manifest in memory. Pickled, it takes 24 bytes a shard and the names.

    Args:
        pattern: name of the shards in the recipe, relative to the folder.
        names: paths of the shards relative to the folder, or URLs.
        sizes: samples, bytes and time in nanoseconds of each shard, int64 `(shards, 3)`; 0 for unknown bytes and times.
        damage: descriptions of damaged shards, by the shard's number.
        folders: relative paths of the folders that are watched for new and removed shards.
        digest: digest of the JSON object.
    """

    path: Path
    pattern: str
    names: list[str]
    sizes: np.ndarray
    damage: dict[int, str]
    folders: list[str]
    digest: bytes

    def __post_init__(self) -> None:
        self._file: int | None = None
        self._starts = np.cumsum(self.num_samples) - self.num_samples

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_samples(self) -> np.ndarray:
        return self.sizes[:, 0]

    @property
    def num_bytes(self) -> np.ndarray:
        return self.sizes[:, 1]

    def row(self, shard: int, number: int) -> np.ndarray:
        """Return the row of a sample in the index of its shard, uint32 `(3, 2)`."""
        if self._file is None:
            self._file = self._opened()
        # Not mapped to memory, because a file that is cut short would kill the process.
        row = os.pread(self._file, ROW_BYTES, len(_HEAD) + ROW_BYTES * int(self._starts[shard] + number))
        if len(row) < ROW_BYTES:
            raise self._replaced()
        return np.frombuffer(row, "<u4").reshape(ROW)

    def _opened(self) -> int:
        try:
            file = open_plain(self.path)
        except FileNotFoundError as error:
            raise self._replaced() from error
        if os.pread(file, _TAIL.size, max(os.fstat(file).st_size - _TAIL.size, 0))[8:] != self.digest:
            os.close(file)
            raise self._replaced()
        return file

    def _replaced(self) -> UserError:
        return UserError(f"manifest {self.path} was rewritten or removed during the run; start again")

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)


def read_manifest(path: Path, pattern: str, remedy: str) -> Manifest | None:
    try:
        file = open_plain(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except NotAFile as error:
        raise UserError(f"{path} cannot be the manifest of shards: {error}; remove it") from error
    with os.fdopen(file, "rb") as opened:
        if opened.read(len(_HEAD)) != _HEAD:
            raise UserError(f"{path} is not a manifest of this version of flipscale; {remedy}")
        size = os.fstat(file).st_size
        try:
            start, digest = _TAIL.unpack(os.pread(file, _TAIL.size, max(size - _TAIL.size, 0)))
            content = os.pread(file, size - _TAIL.size - start, start) if 0 < start < size - _TAIL.size else b""
            if _digest(content) != digest:
                raise UserError("another digest")
            manifest = _parsed(path, content, digest)
            if start not in (len(_HEAD), len(_HEAD) + ROW_BYTES * int(manifest.num_samples.sum())):
                raise UserError("another number of rows")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, struct.error) as error:
            raise UserError(f"manifest {path} is cut short or damaged, at {size} bytes; {remedy}") from error
    if manifest.pattern != pattern:
        raise UserError(f"manifest {path} lists the shards {manifest.pattern!r}, not {pattern!r}; {remedy}")
    return manifest


def _parsed(path: Path, content: bytes, digest: bytes) -> Manifest:
    about = json.loads(content)
    pattern, names, folders = str(about["pattern"]), list(about["names"]), list(about["folders"])
    if not all(isinstance(name, str) for name in (*names, *folders)):
        raise UserError("names that are no texts")
    sizes = np.array(about["sizes"], np.int64).reshape(-1, 3)
    damage = {int(shard): str(text) for shard, text in about["damage"].items()}
    if len(sizes) != len(names) or (sizes[:, :2] < 0).any() or not all(0 <= shard < len(names) for shard in damage):
        raise UserError("negative sizes, or other shards")
    leads_out = ".." not in pattern and any(".." in name.split("/") for name in names if ".." in name)
    if leads_out or any(name[:1] in ("", "/") for name in names):
        raise UserError("names that are empty or lead out of the folder")
    return Manifest(path, pattern, names, sizes, damage, folders, digest)


def write_manifest(
    path: Path, pattern: str, shards: Iterable[tuple[str, ShardIndex]], folders: list[str], rows: bool
) -> Manifest:
    """Write a manifest of the shards, with `rows` also their indices, and return it."""
    names: list[str] = []
    sizes: list[int] = []
    damage = {}
    with atomic_write(path, unique_partial_path(path)) as partial, open(partial, "wb") as file:
        file.write(_HEAD)
        for name, index in shards:
            if index.damage:
                damage[len(names)] = index.damage
            names.append(name)
            sizes += [len(index.rows), index.num_bytes, index.mtime_ns]
            if rows:
                file.write(index.rows.tobytes())
        about = {"pattern": pattern, "names": names, "sizes": sizes, "damage": damage, "folders": folders}
        content = json.dumps(about).encode()
        file.write(content + _TAIL.pack(file.tell(), _digest(content)))
    written = read_manifest(path, pattern, "start again")
    assert written is not None
    return written


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def split_shards(shards: str, is_folder: Callable[[str], bool]) -> tuple[str, str]:
    """Return the folder of `shards`, and the pattern of names in it: `*.tar` for a whole folder."""
    if not shards:
        raise UserError("data.shards is empty; name a folder of *.tar, a glob, or a range like {00000..00041}.tar")
    if is_folder(shards):
        return shards.rstrip("/") or "/", "*.tar"
    wild = _WILD.search(shards)
    folder, slash, _ = shards[: wild.start() if wild else len(shards)].rpartition("/")
    return folder or slash or ".", shards[len(folder + slash) :]


def expand_range(shards: str) -> list[str] | None:
    """Return the names of a range such as `{00000..00041}.tar`; None if `shards` has no range."""
    numbered = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", shards)
    if numbered is None:
        return None
    head, first, last, tail = numbered.groups()
    if len(last) > _MOST_DIGITS or int(last) - int(first) >= _MOST_SHARDS:
        raise UserError(f"data.shards {shards[:100]!r} is a range of more than {_MOST_SHARDS} shards; check its end")
    return [f"{head}{number:0{len(first)}d}{tail}" for number in range(int(first), int(last) + 1)]


def without_own_files(names: list[str]) -> list[str]:
    return [name for name in names if not _OWN_FILES.fullmatch(name.rsplit("/", 1)[-1])]


def manifest_name(pattern: str) -> str:
    """Return the file name of the manifest of `pattern`, in the folder of the shards."""
    if pattern == "*.tar":
        return "shards.manifest"
    return f"shards-{hashlib.blake2b(pattern.encode(), digest_size=4).hexdigest()}.manifest"


class ShardList:
    """Shards on this machine."""

    def __init__(self, shards: str):
        self.shards = shards
        self.folder, self.pattern = split_shards(shards, os.path.isdir)
        self.is_range = expand_range(self.pattern) is not None
        name = manifest_name(self.pattern)
        elsewhere = hashlib.blake2b(os.path.abspath(self.folder).encode(), digest_size=8).hexdigest()
        # The manifest of a read-only folder is in the user's cache.
        cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "flipscale" / "manifests"
        self.places = [Path(self.folder, name), cache / f"{elsewhere}-{name}"]

    @property
    def remedy(self) -> str:
        return f"write the manifest anew with `flipscale prepare index {quoted(self.shards)}`"

    @property
    def stale_remedy(self) -> str:
        """Fix of a shard that differs from its entry in the manifest."""
        return self.remedy

    def path(self, name: str) -> Path:
        return Path(self.folder, name)

    def names(self) -> list[str]:
        """Return the names of the shards, relative to the folder, sorted. Files that flipscale writes are skipped."""
        names = expand_range(self.pattern)
        if names is None:
            # Sorted folder by folder, as paths are.
            matches = sorted(glob.glob(self.pattern, root_dir=self.folder), key=lambda name: name.split("/"))
            names = without_own_files(matches)
        if all(name.lower().endswith(RAW_SUFFIXES) for name in names):
            raise no_shards(self.shards)
        return names

    def is_complete(self, manifest: Manifest, may_list: bool) -> bool:
        """Return whether no shard was added or removed since `manifest` was written.

        With `may_list`, the shards are listed again if a folder has changed.
        """
        with suppress(OSError, ValueError):
            newest = max((self.path(folder).stat().st_mtime_ns for folder in manifest.folders), default=None)
            if newest in (None, manifest.path.stat().st_mtime_ns):
                return True
            sizes = zip(manifest.names, manifest.num_bytes.tolist(), strict=True)
            if (
                may_list
                and self.names() == manifest.names
                and all(size_and_time(self.path(name))[0] == size for name, size in sizes)
            ):
                with suppress(OSError):
                    os.utime(manifest.path, ns=(newest, newest))
                return True
        return False

    def open(self, is_good: Callable[[Manifest], bool], anew: bool = False) -> Manifest:
        """Return the manifest of the shards. If it is missing or stale, one process writes it and the others wait.

        These are all processes that see the folder; they need not have joined a process group. `is_good` checks a few
        shards. Raise UserError if a manifest is of another version or other shards, damaged or unwritable; a shard is
        missing.
        """
        if not os.access(self.folder, os.W_OK):
            with suppress(OSError):
                self.places[1].parent.mkdir(parents=True, exist_ok=True)
        place = next((place for place in self.places if os.access(place.parent, os.W_OK)), None)
        if place is None:
            folders = " nor ".join(str(place.parent) for place in self.places)
            raise UserError(f"no manifest of {self.shards!r} can be written to {folders}; make one of them writable")

        def read(may_list: bool) -> Manifest | None:
            for where in self.places:
                manifest = read_manifest(where, self.pattern, self.remedy)
                listed = may_list or where != place
                if manifest and self.is_complete(manifest, listed) and is_good(manifest):
                    return manifest
            return None

        if anew:
            return self._write(place)
        return written_once(place, read, lambda: self._write(place))

    def _write(self, place: Path) -> Manifest:
        names = self.names()
        inner = {"/".join(name.split("/")[:depth]) for name in names for depth in range(name.count("/") + 1)}
        folders = [] if self.is_range else sorted(inner) if len(inner) <= _MAX_FOLDERS else [""]
        shards = in_windows(partial(_indexed, self), names, partial(ProcessPoolExecutor, initializer=end_with_parent))
        written = write_manifest(place, self.pattern, shards, folders, rows=True)
        self.is_complete(written, may_list=True)  # gives it the time of the folders
        return written


def _indexed(shards: ShardList, name: str) -> tuple[str, ShardIndex]:
    path = shards.path(name)
    try:
        return name, load_index(path)
    except FileNotFoundError as error:
        raise UserError(f"shard {path} does not exist; check data.shards") from error


def in_windows(
    function: Callable[[Item], Result], items: Sequence[Item], new_pool: Callable[[], Executor]
) -> Iterator[Result]:
    """Yield the result of each item in order, and show progress. A pool computes them if they are many."""
    with Progress(len(items), "reading shards", "shards", delay=2, leave=False) as bar:
        if len(items) <= _FEW_SHARDS:
            for item in items:
                yield function(item)
                bar.update()
            return
        try:
            with new_pool() as pool:
                for first in range(0, len(items), _WINDOW):
                    for result in pool.map(function, items[first : first + _WINDOW], chunksize=8):
                        yield result
                        bar.update()
        except BrokenExecutor as error:
            raise OSError("an indexing process was killed, perhaps for lack of memory; start again") from error


def written_once(place: Path, read: Callable[[bool], Manifest | None], write: Callable[[], Manifest]) -> Manifest:
    """Return the manifest from `read`, or from `write` in one process while others wait. If it dies, another writes.

    Args:
        read: returns a good manifest or None; its argument is whether it may list the shards, as one process does.
    """
    lock_file = place.with_name(f".{place.name}.lock")
    lock = FileLock(lock_file, timeout=0)
    is_waiting = False
    while (manifest := read(False)) is None:
        try:
            with lock:
                manifest = read(True)
                if manifest is None and place.exists():
                    _log.info("manifest %s is stale: shards were added, removed or changed; it is rewritten", place)
                try:
                    return manifest or write()
                except ValueError:
                    lock_file.unlink(missing_ok=True)  # so that nothing is left in a folder without shards
                    raise
        except Timeout:
            if not is_waiting:
                _log.info("waiting for the process that writes %s, the list of all shards; it shows progress", place)
            is_waiting = True
            time.sleep(_POLL_SECONDS)
    return manifest
