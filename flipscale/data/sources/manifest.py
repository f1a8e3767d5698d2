"""The list of a source's shards, and its manifest: one file with the indices of all shards.

`shards.manifest` begins with a head of 64 bytes and the indices of all shards (24 bytes a sample). For shards at a URL
it has no indices. A table of 32 bytes a shard, their names, a JSON object and a tail of 32 bytes follow. Opening takes
the same time for any number of samples, because rows of indices are read one at a time.
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
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from flipscale.data.sources.shard_index import ROW, NotAFile, load_index, open_plain, size_and_time
from flipscale.io.atomic import atomic_write, unique_partial_path
from flipscale.io.errors import UserError
from flipscale.io.progress import Progress

_WILD = re.compile(r"[*?\[]|\{\d+\.\.\d+\}")
_POLL_SECONDS = 1.0
# The writer of a manifest that indexes no shard in this time is stopped, or its storage does not answer.
_SILENT_SECONDS = 1800.0
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

_VERSION = 1
_MAGIC = b"flipscale manifest "
_HEAD_BYTES = 64
_STAMP_AT = _HEAD_BYTES - 8
_ROW_BYTES = 4 * ROW[0] * ROW[1]
_TAIL = struct.Struct("<qq16s")  # position of the table, length of the JSON, digest of everything from the table on
# `name_end` is the end of the shard's name in the joined names.
_TABLE = np.dtype([("samples", "<i8"), ("num_bytes", "<i8"), ("mtime_ns", "<i8"), ("name_end", "<i8")])


class ShardEntry(NamedTuple):
    """A shard in a manifest.

    Args:
        name: path relative to the folder of the manifest, or a URL.
        rows: index of the shard, uint32 `(samples, 3, 2)`.
        num_bytes: length of the shard; 0 if unknown.
        mtime_ns: time of the last change; 0 if unknown.
    """

    name: str
    rows: np.ndarray
    damage: str
    num_bytes: int
    mtime_ns: int


@dataclass
class Manifest:
    """A manifest in memory. Pickled, it takes 32 bytes a shard and the names.

    Args:
        pattern: name of the shards in the recipe, relative to the folder.
        table: one row a shard, of the dtype above.
        folders: relative paths of the folders of `stamp`.
        digest: digest of the table and everything after it.
        stamp: digest of the folders' times when the shards were listed.
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
        """Return the row of a sample in the index of its shard, uint32 `(3, 2)`."""
        if self._file is None:
            self._file = self._opened()
        # Not mapped to memory, because a file that is cut short would kill the process.
        row = os.pread(self._file, _ROW_BYTES, _HEAD_BYTES + _ROW_BYTES * int(self._starts[shard] + number))
        if len(row) < _ROW_BYTES:
            raise self._replaced()
        return np.frombuffer(row, "<u4").reshape(ROW)

    def set_stamp(self, stamp: int) -> None:
        """Write the stamp of the folders, if the file can be written."""
        self.stamp = stamp
        with suppress(OSError), open(self.path, "r+b") as file:
            os.pwrite(file.fileno(), struct.pack("<q", stamp), _STAMP_AT)

    def _opened(self) -> int:
        """Return a file descriptor of the manifest."""
        try:
            file = open_plain(self.path)
        except FileNotFoundError as error:
            raise self._replaced() from error
        size = os.fstat(file).st_size
        if size < _TAIL.size or not os.pread(file, _TAIL.size, size - _TAIL.size).endswith(self.digest):
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
    """Return the manifest at `path`, or None."""
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
            manifest = _parsed(path, content, json_bytes, digest, struct.unpack("<q", head[_STAMP_AT:])[0])
            if table_at not in (_HEAD_BYTES, _HEAD_BYTES + _ROW_BYTES * int(manifest.table["samples"].sum())):
                raise UserError("another number of rows")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise UserError(f"manifest {path} is cut short or damaged, at {size} bytes; {remedy}") from error
    finally:
        os.close(file)
    if manifest.pattern != pattern:
        raise UserError(f"manifest {path} lists the shards {manifest.pattern!r}, not {pattern!r}; {remedy}")
    return manifest


def _parsed(path: Path, content: bytes, json_bytes: int, digest: bytes, stamp: int) -> Manifest:
    """Return the manifest with the table, names and JSON in `content`."""
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
    # Names are split only if there are dots, because there may be millions.
    if b".." in names and any(".." in name.split("/") for name in manifest.all_names() if ".." not in manifest.pattern):
        raise UserError("it leads out of its folder")
    return manifest


def write_manifest(path: Path, pattern: str, entries: Iterable[ShardEntry], folders: list[str], rows: bool) -> None:
    """Write a manifest.

    Args:
        pattern: name of the shards in the recipe, relative to the folder.
        folders: relative paths of folders whose times are stamped.
        rows: whether the manifest holds the shards' indices.
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


# Commands that write the data of the package's recipes, by the start of the path.
_WRITERS = {
    "data/demo/train_without_unseen": "python examples/demo/data.py data/demo --with_unseen",
    "data/demo/unseen": "python examples/demo/data.py data/demo --with_unseen",
    "data/demo": "python examples/demo/data.py data/demo",
    "data/mine": "flipscale prepare shards PICTURES data/mine --split 0.1",
}


def without_own_files(names: list[str]) -> list[str]:
    """Return the names without those of files that flipscale writes."""
    return [name for name in names if not _OWN_FILES.fullmatch(name.rsplit("/", 1)[-1])]


def no_shards(shards: str) -> UserError:
    """Return the error of `shards` without a match."""
    if writer := next((command for prefix, command in _WRITERS.items() if shards.startswith(prefix)), None):
        return UserError(f"no shards at {shards!r}; `{writer}` writes them")
    return UserError(f"no shards at {shards!r}; name a folder of *.tar, a glob, or a range like {{00000..00041}}.tar")


def manifest_name(pattern: str) -> str:
    """Return the file name of the manifest of `pattern`, in the folder of the shards."""
    if pattern == "*.tar":
        return "shards.manifest"
    return f"shards-{hashlib.blake2b(pattern.encode(), digest_size=4).hexdigest()}.manifest"


def expand_shards(shards: str) -> list[Path]:
    """Return the paths of `shards` on this machine, sorted."""
    shard_list = ShardList(shards)
    return [shard_list.path(name) for name in shard_list.names()]


class ShardList:
    """Shards on this machine."""

    def __init__(self, shards: str):
        self.shards = shards
        self.folder, self.pattern = split_shards(shards, os.path.isdir)
        self.is_range = expand_range(self.pattern) is not None
        name = manifest_name(self.pattern)
        elsewhere = hashlib.blake2b(os.path.abspath(self.folder).encode(), digest_size=8).hexdigest()
        # The manifest of a read-only folder is in the user's cache.
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flipscale" / "manifests"
        self.places = [Path(self.folder, name), cache / f"{elsewhere}-{name}"]

    @property
    def remedy(self) -> str:
        """Fix of a bad manifest."""
        return f"write the manifest anew with `flipscale prepare index {self.shards!r}`"

    @property
    def stale_remedy(self) -> str:
        """Fix of a shard that differs from its entry in the manifest."""
        return self.remedy

    def path(self, name: str) -> Path:
        """Return the path of a shard."""
        return Path(self.folder, name)

    def names(self) -> list[str]:
        """Return the names of the shards, relative to the folder, sorted. Files that flipscale writes are skipped."""
        names = expand_range(self.pattern)
        if names is None:
            # Sorted folder by folder, as paths are.
            matches = sorted(glob.glob(self.pattern, root_dir=self.folder), key=lambda name: name.split("/"))
            names = without_own_files(matches)
        if not names:
            raise no_shards(self.shards)
        return names

    def stamp(self, folders: Sequence[str]) -> int:
        """Return a number that changes when a shard is added to these folders or removed; 0 without folders."""
        if not folders:
            return 0
        times = b"".join(self.path(folder).stat().st_mtime_ns.to_bytes(8, "little") for folder in folders)
        return int.from_bytes(hashlib.blake2b(times, digest_size=8).digest(), "little") >> 1

    def is_complete(self, manifest: Manifest, may_list: bool) -> bool:
        """Return whether no shard was added or removed since `manifest` was written.

        Args:
            may_list: whether to list the shards again if a folder has changed.
        """
        try:
            stamp = self.stamp(manifest.folders)
            if stamp == manifest.stamp:
                return True
            if may_list and self.names() == manifest.all_names() and self._have_their_sizes(manifest):
                manifest.set_stamp(stamp)
                return True
        except (OSError, ValueError):
            pass
        return False

    def _have_their_sizes(self, manifest: Manifest) -> bool:
        sizes = manifest.table["num_bytes"].tolist()
        return all(
            size_and_time(self.path(name))[0] == size for name, size in zip(manifest.all_names(), sizes, strict=True)
        )

    def open(self, is_good: Callable[[Manifest], bool], anew: bool = False) -> Manifest:
        """Return the manifest of the shards. If it is missing or stale, one process writes it and the others wait.

        These are all processes that see the folder; they need not have joined a process group.

        Args:
            is_good: checks a few shards.

        Raises:
            UserError: a manifest is of another version, damaged, or lists other shards; a shard is missing; or no
                manifest can be written.
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
        entries = in_windows(_Entry(self), names, ProcessPoolExecutor, place)
        try:
            write_manifest(place, self.pattern, entries, folders, rows=True)
        except OSError as error:
            if error.errno is None or error.filename is not None:
                raise
            raise OSError(f"manifest {place} cannot be written ({error.strerror}); make room for it") from error
        written = read_manifest(place, self.pattern, self.remedy)
        assert written is not None
        self.is_complete(written, may_list=True)  # writes the stamp
        return written


class _Entry:
    """A picklable function that returns a shard's entry from its index, which it builds if needed."""

    def __init__(self, shards: ShardList):
        self.shards = shards

    def __call__(self, name: str) -> ShardEntry:
        shard = self.shards.path(name)
        try:
            index = load_index(shard)
            return ShardEntry(name, index.rows, index.damage, index.num_bytes, index.mtime_ns)
        except FileNotFoundError as error:
            raise UserError(f"shard {shard} does not exist; check data.shards") from error


def in_windows(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    new_pool: Callable[[], Executor],
    place: Path,
) -> Iterator[Result]:
    """Yield the result of each item in order, and show progress. A pool computes them if they are many.

    Each result renews the sign of life of the writer of the manifest at `place`.
    """
    with Progress(len(items), "shard indices", "shards", delay=2, leave=False) as bar:
        if len(items) <= _FEW_SHARDS:
            for item in items:
                yield function(item)
                bar.update()
                _touch_lock(place)
            return
        try:
            with new_pool() as pool:
                for first in range(0, len(items), _WINDOW):
                    for result in pool.map(function, items[first : first + _WINDOW], chunksize=8):
                        yield result
                        bar.update()
                        _touch_lock(place)
        except BrokenExecutor as error:
            raise OSError(
                "a process that indexed shards was killed, perhaps for lack of memory; start again"
            ) from error


def written_once(place: Path, read: Callable[[bool], Manifest | None], write: Callable[[], Manifest]) -> Manifest:
    """Return the manifest from `read`, or from `write` in one process while the others wait. If the writer dies,
    another process writes.

    Args:
        read: returns a good manifest or None; its argument is whether it may list the shards, as one process does.
        write: writes and returns the manifest.
    """
    lock = FileLock(_lock_of(place), timeout=0)
    is_waiting = False
    sign, since = 0, time.monotonic()
    while True:
        manifest = read(False)
        if manifest is not None:
            return manifest
        try:
            with lock:
                manifest = read(True)
                if manifest is None and place.exists():
                    _log.info("manifest %s is stale: shards were added, removed or changed; it is rewritten", place)
                try:
                    return manifest or write()
                except ValueError:
                    # Nothing is left in a folder without shards.
                    _lock_of(place).unlink(missing_ok=True)
                    raise
        except Timeout:
            if not is_waiting:
                _log.info(
                    "waiting for the process that writes %s, the list of all shards; it shows its progress", place
                )
            is_waiting = True
            time.sleep(_POLL_SECONDS)
            before, sign = sign, _lock_time(place)
            since = time.monotonic() if sign != before else since
            if time.monotonic() - since > _SILENT_SECONDS:
                raise OSError(
                    f"the process that writes {place} has indexed no shard for {_SILENT_SECONDS / 60:.0f} minutes; end "
                    "it if it is stopped, look at the storage of the shards, and start again"
                ) from None


def _lock_of(place: Path) -> Path:
    return place.with_name(f".{place.name}.lock")


def _touch_lock(place: Path) -> None:
    with suppress(OSError):  # no lock, no waiting processes
        os.utime(_lock_of(place))


def _lock_time(place: Path) -> int:
    with suppress(OSError):
        return _lock_of(place).stat().st_mtime_ns
    return 0
