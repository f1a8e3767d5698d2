"""What a recipe's `shards` names on this machine, and the manifest that lists it: found, or written by one process."""

import glob
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout
from tqdm import tqdm

from flipscale.data.sources.manifest import Manifest, ShardEntry, read_manifest, write_manifest
from flipscale.data.sources.shard_index import load_index, size_and_time
from flipscale.io.errors import UserError

_WILD = re.compile(r"[*?\[]|\{\d+\.\.\d+\}")
_POLL_SECONDS = 1.0
# A process that indexes shards and finishes none in so long is stopped, or its storage does not answer.
_SILENT_SECONDS = 1800.0
# Fewer shards are indexed in less time than it takes to start processes.
_FEW_SHARDS = 32
# Shards whose indices are in memory at a time, 240 kB for 10,000 samples.
_WINDOW = 512
_MOST_SHARDS, _MOST_DIGITS = 10_000_000, 18
# If there are more folders, only the first is watched for shards that come or go.
_MAX_FOLDERS = 16

_log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


def split_shards(shards: str, is_folder: Callable[[str], bool]) -> tuple[str, str]:
    """Return the folder that `shards` begins with, and the pattern of names in it: `*.tar` for a whole folder.

    Raises:
        ValueError: it is empty.
    """
    if not shards:
        raise UserError("data.shards is empty; name a folder of *.tar, a glob, or a range like {00000..00041}.tar")
    if is_folder(shards):
        return shards.rstrip("/") or "/", "*.tar"
    wild = _WILD.search(shards)
    folder, slash, _ = shards[: wild.start() if wild else len(shards)].rpartition("/")
    return folder or slash or ".", shards[len(folder + slash) :]


def expand_range(shards: str) -> list[str] | None:
    """Return the names that a range such as `{00000..00041}.tar` stands for; None if `shards` has no range.

    Raises:
        ValueError: there are too many.
    """
    numbered = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", shards)
    if numbered is None:
        return None
    head, first, last, tail = numbered.groups()
    if len(last) > _MOST_DIGITS or int(last) - int(first) >= _MOST_SHARDS:
        raise UserError(f"data.shards {shards[:100]!r} is a range of more than {_MOST_SHARDS} shards; check its end")
    return [f"{head}{number:0{len(first)}d}{tail}" for number in range(int(first), int(last) + 1)]


# What writes the data that the package's own recipes name, by how its path begins.
_WRITERS = {
    "data/demo/train_without_unseen": "python examples/demo/data.py data/demo --with_unseen",
    "data/demo/unseen": "python examples/demo/data.py data/demo --with_unseen",
    "data/demo": "python examples/demo/data.py data/demo",
    "data/mine": "flipscale prepare shards PICTURES data/mine --split 0.1",
}


def no_shards(shards: str) -> ValueError:
    """Return the error that `shards` names none."""
    if writer := next((command for prefix, command in _WRITERS.items() if shards.startswith(prefix)), None):
        return UserError(f"no shards at {shards!r}; `{writer}` writes them")
    return UserError(f"no shards at {shards!r}; name a folder of *.tar, a glob, or a range like {{00000..00041}}.tar")


def manifest_name(pattern: str) -> str:
    """Return the name of the manifest of what `pattern` names, in the folder of the shards."""
    if pattern == "*.tar":
        return "shards.manifest"
    return f"shards-{hashlib.blake2b(pattern.encode(), digest_size=4).hexdigest()}.manifest"


def expand_shards(shards: str) -> list[Path]:
    """Return the shards on this machine that `shards` names, sorted.

    Raises:
        ValueError: there is none.
    """
    found = ShardList(shards)
    return [found.path(name) for name in found.names()]


class ShardList:
    """The shards on this machine that `shards` names: a folder, a glob, or a range such as `{00000..00041}.tar`.

    Raises:
        ValueError: it is empty.
    """

    def __init__(self, shards: str):
        self.shards = shards
        self.folder, self.pattern = split_shards(shards, os.path.isdir)
        self.is_range = expand_range(self.pattern) is not None
        name = manifest_name(self.pattern)
        elsewhere = hashlib.blake2b(os.path.abspath(self.folder).encode(), digest_size=8).hexdigest()
        # A folder that cannot be written has its manifest in the user's cache.
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flipscale" / "manifests"
        self.places = [Path(self.folder, name), cache / f"{elsewhere}-{name}"]

    @property
    def remedy(self) -> str:
        """What to do about a manifest that is no good."""
        return f"write the manifest anew with `flipscale prepare index {self.shards!r}`"

    @property
    def stale_remedy(self) -> str:
        """What to do about a shard that is not as the manifest says."""
        return self.remedy

    def path(self, name: str) -> Path:
        """Return the path of a shard of this name."""
        return Path(self.folder, name)

    def names(self) -> list[str]:
        """Return the names of the shards, sorted, relative to the folder. One process does so, before there is a
        manifest.

        Raises:
            ValueError: there is none.
        """
        named = expand_range(self.pattern)
        if named is None:
            # As paths are sorted: folder by folder.
            named = sorted(glob.glob(self.pattern, root_dir=self.folder), key=lambda name: name.split("/"))
        if not named:
            raise no_shards(self.shards)
        return named

    def stamp(self, folders: Sequence[str]) -> int:
        """Return a number that changes when a shard comes to these folders or goes; 0 where no other can come."""
        if not folders:
            return 0
        times = b"".join(self.path(folder).stat().st_mtime_ns.to_bytes(8, "little") for folder in folders)
        return int.from_bytes(hashlib.blake2b(times, digest_size=8).digest(), "little") >> 1

    def is_complete(self, manifest: Manifest, may_list: bool) -> bool:
        """Return whether no shard has come or gone since `manifest` was written.

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
        """Return the manifest of the shards. If it is missing or stale, one process writes it and the others wait:
        one of all that see this folder, before any of them has joined the others.

        Args:
            is_good: looks at a few shards.
            anew: write it in any case.

        Raises:
            ValueError: a manifest is of another version, damaged, or lists other shards; there is no shard, or one is
                missing; or no manifest can be written.
        """
        if not os.access(self.folder, os.W_OK):
            with suppress(OSError):
                self.places[1].parent.mkdir(parents=True, exist_ok=True)
        place = next((place for place in self.places if os.access(place.parent, os.W_OK)), None)
        if place is None:
            folders = " nor ".join(str(place.parent) for place in self.places)
            raise UserError(f"no manifest of {self.shards!r} can be written to {folders}; make one of them writable")

        def found(may_list: bool) -> Manifest | None:
            for where in self.places:
                manifest = read_manifest(where, self.pattern, self.remedy)
                listed = may_list or where != place
                if manifest and self.is_complete(manifest, listed) and is_good(manifest):
                    return manifest
            return None

        if anew:
            return self._write(place)
        return written_once(place, found, lambda: self._write(place))

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
        self.is_complete(written, may_list=True)  # stamps it
        return written


class _Entry:
    """Makes a shard's entry from its index, which is built where it is missing."""

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
    """Yield the result of each item in order, with a progress bar if it takes long; a pool makes them if many. Those
    who wait for the manifest at `place` see that it goes on."""
    with tqdm(total=len(items), desc="shard indices", unit="shard", delay=2, leave=False) as bar:
        if len(items) <= _FEW_SHARDS:
            for item in items:
                yield function(item)
                bar.update()
                _give_a_sign(place)
            return
        try:
            with new_pool() as pool:
                for first in range(0, len(items), _WINDOW):
                    for result in pool.map(function, items[first : first + _WINDOW], chunksize=8):
                        yield result
                        bar.update()
                        _give_a_sign(place)
        except BrokenExecutor as error:
            raise OSError(
                "a process that indexed shards was killed, perhaps for want of memory; start again"
            ) from error


def written_once(place: Path, found: Callable[[bool], Manifest | None], write: Callable[[], Manifest]) -> Manifest:
    """Return the manifest that `found` finds, or what `write` writes to `place` in one process while the others wait.
    If the one that writes dies, another takes over.

    Args:
        found: told whether it may take its time, as one process at a time does.

    Raises:
        OSError: the one that writes gives no sign of life.
    """
    lock = FileLock(_lock_of(place), timeout=0)
    waits = False
    sign, since = 0, time.monotonic()
    while True:
        manifest = found(False)
        if manifest is not None:
            return manifest
        try:
            with lock:
                manifest = found(True)
                if manifest is None and place.exists():
                    _log.info("manifest %s is stale: shards came, went or changed; it is written anew", place)
                try:
                    return manifest or write()
                except ValueError:
                    # There are no such shards, and nothing is to be left where somebody took them to be.
                    _lock_of(place).unlink(missing_ok=True)
                    raise
        except Timeout:
            if not waits:
                _log.info(
                    "waiting for the process that writes %s, the list of all shards; it shows its progress", place
                )
            waits = True
            time.sleep(_POLL_SECONDS)
            before, sign = sign, _last_sign(place)
            since = time.monotonic() if sign != before else since
            if time.monotonic() - since > _SILENT_SECONDS:
                raise OSError(
                    f"the process that writes {place} has indexed no shard for {_SILENT_SECONDS / 60:.0f} minutes; end "
                    "it if it is stopped, look at the storage of the shards, and start again"
                ) from None


def _lock_of(place: Path) -> Path:
    return place.with_name(f".{place.name}.lock")


def _give_a_sign(place: Path) -> None:
    with suppress(OSError):  # there is none where nobody waits
        os.utime(_lock_of(place))


def _last_sign(place: Path) -> int:
    with suppress(OSError):
        return _lock_of(place).stat().st_mtime_ns
    return 0
