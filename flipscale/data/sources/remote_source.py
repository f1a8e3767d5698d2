"""Tar shards on s3, gs, hf or https, read through a bounded cache that fetches them ahead."""

import hashlib
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from flipscale.data.order import Lanes, share_out
from flipscale.data.recipe import DataRecipe
from flipscale.data.sources import remote_files
from flipscale.data.sources.manifest import Manifest, ShardEntry, read_manifest, write_manifest
from flipscale.data.sources.remote_files import file_system, information, patiently
from flipscale.data.sources.shard_cache import ShardCache
from flipscale.data.sources.shard_index import Index, build_index, may_be_of, most_bytes, read_index, size_and_time
from flipscale.data.sources.shard_list import (
    ShardList,
    expand_range,
    in_windows,
    manifest_name,
    no_shards,
    split_shards,
    written_once,
)
from flipscale.data.sources.tar_source import StaleManifest, TarSource
from flipscale.io.atomic import atomic_write, unique_partial_path
from flipscale.io.errors import UserError

# Requests are mostly waiting, so there are more threads than cores.
_THREADS = 16
# Shards whose sizes are asked for when a source is opened.
_SPOTS = 3
# No shard is fetched ahead so soon after one that could not be.
_PAUSE_SECONDS = 1.0

_log = logging.getLogger(__name__)


class RemoteShardList(ShardList):
    """The shards at a URL: a range such as `{00000..00041}.tar`, a glob, or a whole folder. The content of a URL must
    not change, and shards that are added are seen once `flipscale prepare index` has written the manifest anew.

    A manifest that `prepare index` wrote beside the shards is fetched. If there is none, one process of each node makes
    one in the cache, from the indices beside the shards or else from the shards.

    Raises:
        ValueError: no shard is found, or the protocol's package is not installed.
    """

    def __init__(self, shards: str, cache: ShardCache):
        self.shards, self.cache = shards, cache
        self.folder, self.pattern = split_shards(
            shards, lambda url: not url.endswith(".tar") and not re.search(r"[*?\[{]", url)
        )
        self.url = self.path(manifest_name(self.pattern))

    @property
    def stale_remedy(self) -> str:
        """What to do about a shard that is not as the manifest says."""
        return f"give the new shard another name, and {self.remedy}"

    def path(self, name: str) -> str:  # type: ignore[override]
        """Return the URL of a shard of this name."""
        return name if "://" in name else f"{self.folder}/{name}"

    def names(self) -> list[str]:
        """Do as `ShardList.names`."""
        named = expand_range(self.pattern)
        if named is None:
            url = self.path(self.pattern)
            system, path = file_system(url)
            urls = remote_files.listed(url) if re.search(r"[*?\[]", path) else [system.unstrip_protocol(path)]
            named = [url.removeprefix(f"{self.folder}/") for url in urls]
        if not named:
            raise no_shards(self.shards)
        return named

    def open(self, is_good: Callable[[Manifest], bool], anew: bool = False) -> Manifest:
        """Do as `ShardList.open`; no shard is looked at before it is read."""
        if not anew:
            published = self._published()
            if published is not None:
                return published
        place = self._local("local")
        if anew:
            return self._write(place, anew)
        return written_once(place, lambda _: self._still_good(place), lambda: self._write(place))

    def _still_good(self, place: Path) -> Manifest | None:
        """Return a manifest that was made on this machine, unless a few of its shards have other sizes now."""
        manifest = self._read_cached(place)
        if manifest is not None:
            for shard in np.linspace(0, len(manifest) - 1, min(_SPOTS, len(manifest))).astype(int).tolist():
                size = information(self.path(manifest.name(shard)))["size"]
                if size not in (None, manifest.table["num_bytes"][shard]):
                    return None
        return manifest

    def _read_cached(self, place: Path) -> Manifest | None:
        """Return a manifest of the cache; None if there is none that is whole."""
        with suppress(ValueError):
            return read_manifest(place, self.pattern, self.remedy)
        _log.warning("%s is damaged; it is made anew", place)
        return None

    def index(self, name: str, anew: bool = False, size: int | None = None) -> Index:
        """Return the index of a shard: from the cache, from beside the shard, or built.

        Args:
            anew: build it if it may lack what this version puts in.
            size: of the shard, if it is known; an index that leads beyond it is built.
        """
        url = self.path(name)
        path = self.index_path(name)
        with suppress(OSError, ValueError):
            found = read_index(path.read_bytes())
            if not (anew and found.may_lack_arrays) and may_be_of(found, size):
                return found
        try:
            self._fetch(f"{url}.index.npy", path, self.cache.max_bytes if size is None else most_bytes(size))
            found = read_index(path.read_bytes())
        except (FileNotFoundError, PermissionError, ValueError):
            return self._build(url, path, size)
        if (anew and found.may_lack_arrays) or not may_be_of(found, size):
            return self._build(url, path, size)
        return found

    def _fetch(self, url: str, path: Path, most_bytes: int) -> None:
        """Fetch a small file to `path`."""

        def ask() -> None:
            with atomic_write(path, unique_partial_path(path)) as aside:
                remote_files.fetch(url, aside, None, most_bytes)

        # fsspec makes the file before it finds that there is none at the URL.
        information(url)
        patiently(url, ask)

    def index_path(self, name: str) -> Path:
        """Return where the cache keeps the index of a shard."""
        path = self.cache.path(self.path(name))
        return path.with_name(path.name + ".index.npy")

    def _local(self, version: str) -> Path:
        key = hashlib.blake2b(self.url.encode(), digest_size=8).hexdigest()
        return self.cache.folder / f"{key}-{version}.manifest"

    def _published(self) -> Manifest | None:
        """Return the manifest beside the shards, fetched if it is another one than last time; None if there is none."""
        try:
            about = information(self.url)
            version = hashlib.blake2b(repr(sorted(about.items(), key=str)).encode(), digest_size=8).hexdigest()
            path = self._local(version)
            if not path.exists() or self._read_cached(path) is None:
                self._fetch(self.url, path, self.cache.max_bytes)
        except (FileNotFoundError, PermissionError):
            return None
        manifest = read_manifest(path, self.pattern, self.remedy)
        protocol = self.url.partition("://")[0]
        if manifest is not None and b"://" in manifest.names:
            for name in manifest.all_names():
                if "://" in name and name.partition("://")[0] != protocol:
                    raise UserError(f"manifest {self.url} names {name!r}, which is elsewhere; {self.remedy}")
        return manifest

    def _write(self, place: Path, anew: bool = False) -> Manifest:
        entries = in_windows(partial(self._entry, anew), self.names(), lambda: ThreadPoolExecutor(_THREADS), place)
        write_manifest(place, self.pattern, entries, [], rows=False)
        written = read_manifest(place, self.pattern, self.remedy)
        assert written is not None
        return written

    def _entry(self, anew: bool, name: str) -> ShardEntry:
        try:
            size = information(self.path(name))["size"]
            index = self.index(name, anew, size)
            return ShardEntry(name, index.rows, index.damage, size or index.num_bytes, 0)
        except FileNotFoundError as error:
            raise UserError(f"shard {self.path(name)} does not exist; check data.shards") from error

    def _build(self, url: str, path: Path, size: int | None) -> Index:
        if size not in (None, size_and_time(self.cache.path(url))[0]):
            self.cache.forget(url)
        while True:
            self.cache.fetch(url)
            try:
                return build_index(self.cache.path(url), path)
            except FileNotFoundError:
                continue  # the cache has already removed it to make room


def _read_at_once(num_shards: int, recipe: DataRecipe) -> int:
    """Return how many shards the lanes of this node read at the same time."""
    processes, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    lanes, of_each = share_out(num_shards, recipe.shards_per_block, Lanes(recipe.num_lanes, recipe.global_batch_size))
    return of_each * -(-lanes.count * here // processes)


class RemoteTarSource(TarSource):
    """A `TarSource` of shards at URLs, which a node fetches when it is about to read them.

    Args:
        shards: a range, glob or folder at `s3://`, `gs://`, `hf://`, `https://` or any other protocol of fsspec.
        cache: shared by all processes of the machine.
        recipe: how the samples will be read.

    Raises:
        ValueError: a shard is missing, or the cache is too small for what a node reads now and next.
    """

    def __init__(self, shards: str, cache: ShardCache, recipe: DataRecipe, anew: bool = False):
        self.cache = cache
        super().__init__(shards, anew)
        largest = np.sort(self.manifest.table["num_bytes"])[-2 * _read_at_once(len(self.shard_sizes), recipe) :]
        if cache.max_bytes < largest.sum():
            raise UserError(
                f"data.cache_bytes {cache.max_bytes} cannot hold the {len(largest)} shards of {shards!r} that a node "
                f"reads now and next, {largest.sum()} bytes; raise it, or lower data.lanes and data.shards_per_block"
            )
        self._ahead = _FetchAhead(cache)
        self._indices: OrderedDict[int, np.ndarray] = OrderedDict()

    def _listed(self, shards: str) -> ShardList:
        return RemoteShardList(shards, self.cache)

    def fetch_ahead(self, shards: Sequence[int]) -> None:
        """Fetch these shards in a thread, except those that another process is fetching."""
        # A shard that the cache has removed frees its space when nobody has it open any more.
        for shard in [shard for shard, file in self._open.items() if not os.fstat(file).st_nlink]:
            os.close(self._open.pop(shard))
            self._indices.pop(shard, None)
        self._ahead.want([self.shard_name(shard) for shard in shards])

    def publish(self) -> None:
        """Write the manifest and the missing indices beside the shards, so that other machines need not make them.

        Raises:
            ValueError: the place is not writable.
        """
        assert isinstance(self.list, RemoteShardList)
        url = self.list.url
        try:
            for name in self.manifest.all_names():
                url = f"{self.list.path(name)}.index.npy"
                system, remote = file_system(url)
                if not system.exists(remote):
                    system.put_file(str(self.list.index_path(name)), remote)
            url = self.list.url
            system, remote = file_system(url)
            system.put_file(str(self.manifest.path), remote)
        except Exception as error:
            # Every protocol raises exceptions of its own.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{url} cannot be written ({reason}); name a place that you may write to") from error

    def _open_checked(self, shard: int) -> int:
        try:
            return super()._open_checked(shard)
        except StaleManifest:
            # It may be the copy that is damaged.
            self.cache.forget(self.shard_name(shard))
            return super()._open_checked(shard)

    def _open_shard(self, name: str) -> int:
        return self.cache.open(name)

    def _holds_its_samples(self, file: int, shard: int) -> bool:
        """Return True: if the index beside a shard is of another one, its samples are counted as they are read."""
        return True

    def _opened(self, shard: int) -> int:
        file = super()._opened(shard)
        os.utime(file)  # the cache removes those first that were not read for longest
        return file

    def _row(self, shard: int, number: int) -> np.ndarray:
        if shard not in self._indices:
            assert isinstance(self.list, RemoteShardList)
            self._indices[shard] = self.list.index(self.manifest.name(shard)).rows
        return self._indices[shard][number]

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_indices": OrderedDict()}

    def __del__(self) -> None:
        with suppress(AttributeError):  # of a source that was never whole
            self._ahead.end()
        super().__del__()


class _FetchAhead:
    """A thread that fetches shards ahead. Every process has one; the cache lets only one of them fetch a shard."""

    def __init__(self, cache: ShardCache):
        self.cache = cache
        self._thread: threading.Thread | None = None
        self._urls: list[str] = []

    def want(self, urls: list[str]) -> None:
        """Fetch `urls`, in their order, instead of those of the last call."""
        self._urls = urls
        if self._thread is None or not self._thread.is_alive():
            self._changed, self._ended = threading.Event(), threading.Event()
            self._thread = threading.Thread(target=self._fetch, name="fetch ahead", daemon=True)
            self._thread.start()
        self._changed.set()

    def end(self) -> None:
        """Let the thread end after what it is fetching."""
        if self._thread is not None:
            self._ended.set()
            self._changed.set()

    def _fetch(self) -> None:
        while self._changed.wait() and not self._ended.is_set():
            self._changed.clear()
            for url in self._urls:
                if self._changed.is_set():
                    break
                try:
                    self.cache.try_to_fetch(url)
                except Exception:
                    # Every protocol has exceptions of its own for a broken connection. It may never be needed. If it
                    # is, the reader tries again, with patience, and says so.
                    self._ended.wait(_PAUSE_SECONDS)
                    break

    def __getstate__(self) -> dict[str, object]:
        return {"cache": self.cache, "_thread": None, "_urls": []}
