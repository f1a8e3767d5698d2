"""Tar shards on s3, gs, hf or https: requests with limits, a bounded cache on a local disk, and the source.

Each request has a limit of time and of size, is tried again, and ends in one sentence.
"""

import asyncio
import errno
import hashlib
import logging
import os
import re
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import count
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from flipscale.data.order import Lanes
from flipscale.data.samples import evenly, one_line_reason
from flipscale.data.sources.manifest import (
    Manifest,
    ShardList,
    expand_range,
    in_windows,
    manifest_name,
    read_manifest,
    split_shards,
    without_own_files,
    write_manifest,
    written_once,
)
from flipscale.data.sources.raw_data import no_shards
from flipscale.data.sources.shard_index import (
    NotAFile,
    ShardIndex,
    build_index,
    most_bytes,
    open_plain,
    read_index,
    size_and_time,
)
from flipscale.data.sources.tar import StaleManifest, TarSource
from flipscale.io.atomic import atomic_write, remove, unique_partial_path
from flipscale.io.errors import UserError
from flipscale.io.hub_requests import guard_requests
from flipscale.io.paths import check_writable
from flipscale.io.urls import without_password, without_secrets
from flipscale.recipe.data import DataRecipe

# A transfer is stopped when fewer bytes come in so many seconds.
_SILENT_SECONDS = 20.0
_LEAST_BYTES = 20_000
# Long lists come in pages.
_LISTING_SECONDS = 200.0
# No try begins later than this after the first. A start must not wait minutes for a server that accepts connections and
# answers nothing; a run may wait longer for a shard.
_START_PATIENCE_SECONDS = 30.0
_PATIENCE_SECONDS = 90.0
_TRIES = 6
_FIRST_DELAY_SECONDS = 0.5  # doubled for each try, up to 8 seconds
_ENDING_SECONDS = 5.0
# HTTP's client errors that may pass: time-out, too early, too many requests.
_MAY_PASS = (408, 425, 429)

_FULL_DELAY_SECONDS = 0.05
# Space reserved for a file whose server gives no size, and the limit of that file.
_UNKNOWN_SIZE_BYTES = 1 << 31
_LONGEST_NAME = 100
# Names of the cache's own files. Other files in the folder are neither counted nor removed.
_OURS = re.compile(r"\.?[0-9a-f]{16}-.*")
_PARTIAL = re.compile(r"\.[0-9a-f]{16}-.*\.(\d+)\.partial")

# More threads than cores, because requests mostly wait.
_THREADS = 16
# Number of shards whose sizes are checked when a source is opened.
_CHECKED_SHARDS = 3
# Pause of the prefetch after a shard that could not be fetched.
_PAUSE_SECONDS = 1.0

_log = logging.getLogger(__name__)

Result = TypeVar("Result")


def file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it."""
    import fsspec

    if url.startswith(("s3:", "gs:", "hf:")) and url != without_password(url):
        raise UserError(f"{without_secrets(url)!r} has a password, which is for http; set keys in the environment")
    if url.startswith("hf:"):
        guard_requests()
    try:
        options = {"get_client": _http_client} if url.startswith(("http:", "https:")) else {}
        system, path = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise UserError(without_secrets(f"{url!r} cannot be read: {error}")) from error
    return system, path


async def _http_client(**settings: Any) -> Any:
    """Return fsspec's client of HTTP. It uses the proxy of the environment, often a compute node's only way out."""
    import aiohttp

    return aiohttp.ClientSession(**{"trust_env": True, **settings})


def information(url: str) -> dict[str, Any]:
    """Return the server's information about a file: `size`, possibly None, and a checksum or a time."""
    return with_retries(url, lambda: _ask(url, "info"), _START_PATIENCE_SECONDS)


def _version(url: str) -> str:
    """Return a digest of the server's information about a file."""
    about = information(url)
    for name in ("name", "url"):  # the addresses before and after redirects, often with signatures that change
        about.pop(name, None)
    return hashlib.blake2b(repr(sorted(about.items(), key=str)).encode(), digest_size=8).hexdigest()


def _ask(url: str, method: str, seconds: float | None = None) -> Any:
    system, remote = file_system(url)
    return _watched(system, method, lambda: 0, seconds or _SILENT_SECONDS, remote)


def fetch(url: str, path: Path, size: int | None, most_bytes: int) -> None:
    """Write a file of at most `most_bytes` to `path`, without retries. Raise OSError if the size differs, or the
    transfer is too slow or too long."""
    from fsspec.callbacks import Callback

    def check(_: int | None, so_far: int) -> None:
        if so_far > most_bytes:
            raise OSError(f"more than {most_bytes} bytes came")

    system, remote = file_system(url)
    progress = Callback(hooks={"check": check})
    _watched(system, "get_file", lambda: progress.value, _SILENT_SECONDS, remote, str(path), callback=progress)
    got = path.stat().st_size
    if size is not None and got != size:
        raise OSError(f"{got} of {size} bytes came")


def with_retries(url: str, ask: Callable[[], Result], patience: float = _PATIENCE_SECONDS) -> Result:
    """Return the result of `ask`, with a warning after each error that may pass, and retries for `patience` seconds."""
    started, name = time.monotonic(), without_secrets(url)
    for number in count(1):
        try:
            return ask()
        except Exception as error:
            if not _may_pass(error):
                raise
            cause = error.__cause__ if isinstance(error, FileNotFoundError) else error
            reason = without_secrets(" ".join(str(cause).split())) or type(cause).__name__
            if number == _TRIES or time.monotonic() - started > patience:
                raise OSError(f"{name} could not be fetched in {number} tries ({reason}); start again later") from error
            _log.warning("%s could not be fetched (%s); trying again", name, reason)
            time.sleep(_FIRST_DELAY_SECONDS * 2 ** (number - 1))
    raise AssertionError


def _may_pass(error: Exception) -> bool:
    """Return whether a request may succeed after this error. Unknown kinds may be a protocol's own for a broken
    connection, and a proxy's page in place of an answer is a JSONDecodeError."""
    if isinstance(error, FileNotFoundError):
        # fsspec raises it for any error of HTTP. aiohttp's causes have a status, the Hub's a response with a status.
        cause = error.__cause__
        if not (isinstance(cause, OSError) or type(cause).__module__.startswith(("aiohttp", "asyncio"))):
            return False
        status = getattr(cause, "status", None) or getattr(getattr(cause, "response", None), "status_code", None)
        return status is None or not 400 <= status < 500 or status in _MAY_PASS
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return False
    return isinstance(error, JSONDecodeError) or not isinstance(error, PermissionError | ValueError)


def _watched(system: Any, name: str, progress: Callable[[], int], seconds: float, *arguments: Any, **named: Any) -> Any:
    """Return the result of a file system's method, if `progress`, a number of bytes, grows by `_LEAST_BYTES` in each
    period of `seconds`.

    Only methods in fsspec's event loop are watched. The Hub's file system has its own time-outs (`guard_requests`).
    """
    from fsspec.asyn import sync

    if not getattr(system, "async_impl", False):
        return getattr(system, name)(*arguments, **named)
    method: Callable[..., Awaitable[Any]] = getattr(system, f"_{name}")

    async def watched() -> Any:
        task = asyncio.ensure_future(method(*arguments, **named))
        before = 0
        while not (await asyncio.wait({task}, timeout=seconds))[0]:
            now = progress()
            if now - before < _LEAST_BYTES:
                task.cancel()
                await asyncio.wait({task}, timeout=_ENDING_SECONDS)
                raise OSError(f"{now - before} bytes came in {seconds:g} seconds")
            before = now
        return task.result()

    return sync(system.loop, watched)


class ShardCache:
    """Local copies of remote shards, shared by all processes of a machine.

    The least recently read shards are removed to make room. One process at a time fetches a shard, under a lock that
    ends with its process. A shard is written under a temporary name, and renamed when it has the original's size. The
    temporary name contains the size, so that concurrent transfers keep the limit together.
    """

    def __init__(self, folder: str | Path, max_bytes: int):
        self.folder = Path(folder).expanduser()
        self.max_bytes = max_bytes
        self.query = ""  # of all URLs of a source, such as a signature; copies do not depend on it
        check_writable(self.folder, "data.cache_dir")
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, url: str) -> Path:
        """Return the path of the copy of `url`, whether or not it is fetched."""
        url = without_password(url.removesuffix(self.query))
        name = url.partition("?")[0].rstrip("/").rsplit("/", 1)[-1][-_LONGEST_NAME:]
        return self.folder / f"{hashlib.blake2b(url.encode(), digest_size=8).hexdigest()}-{name}"

    def open(self, url: str) -> int:
        """Return a file descriptor of the copy of `url`, after fetching it if needed."""
        path = self.path(url)
        while True:
            try:
                file = open_plain(path)
                os.utime(file)  # marks the copy as just read
                return file
            except FileNotFoundError:
                self.fetch(url)  # again, if another process removes the copy before it is opened
            except NotAFile:
                self.forget(url)

    def forget(self, url: str) -> None:
        remove(self.path(url))

    def fetch(self, url: str, is_needed: bool = True) -> None:
        """Fetch `url`, unless its copy exists. If it is needed, wait for another process that fetches it, and retry."""
        path = self.path(url)
        with suppress(Timeout), self._lock(path, timeout=-1 if is_needed else 0):
            if not path.exists():
                transfer = partial(self._transfer, url, path)
                with_retries(url, transfer) if is_needed else transfer()

    def _lock(self, path: Path, timeout: float) -> FileLock:
        return FileLock(path.with_name(f".{path.name}.lock"), timeout=timeout)

    def _transfer(self, url: str, path: Path) -> None:
        size = _ask(url, "info")["size"]
        reserved = min(_UNKNOWN_SIZE_BYTES, self.max_bytes) if size is None else size
        if reserved > self.max_bytes:
            words = f"{url} has {size} bytes, which do not fit into data.cache_bytes {self.max_bytes}"
            raise UserError(without_secrets(words))
        # This process holds the lock, so a file of this name is the rest of a killed process.
        with atomic_write(path, path.with_name(f".{path.name}.{reserved}.partial")) as partial:
            self._reserve(partial, reserved)
            fetch(url, partial, size, reserved)

    def _reserve(self, partial: Path, size: int) -> None:
        """Make room for a transfer and reserve it; wait for other transfers if nothing can be removed."""
        while True:
            with FileLock(self.folder / ".lock"):
                if self._make_room(size) <= 0:
                    partial.touch()
                    return
            time.sleep(_FULL_DELAY_SECONDS)

    def _make_room(self, size: int) -> int:
        """Remove the least recently read shards, then the oldest indices, until `size` bytes fit. Return the number of
        missing bytes."""
        excess, removable = size - self.max_bytes, []
        for entry in os.scandir(self.folder):
            if not _OURS.fullmatch(entry.name):
                continue
            with suppress(FileNotFoundError):
                state, partial = entry.stat(), _PARTIAL.fullmatch(entry.name)
                if partial:
                    excess += 0 if self._abandoned(entry) else int(partial[1])
                    continue
                excess += state.st_size
                if not entry.name.startswith(".") and not entry.name.endswith(".manifest"):
                    is_index = entry.name.endswith(".index.npy")
                    removable.append((is_index, state.st_mtime_ns, state.st_size, entry.path))
        for *_, held, path in sorted(removable):
            if excess <= 0:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            excess -= held
        return excess

    def _abandoned(self, partial: "os.DirEntry[str]") -> bool:
        """Return whether the writer of `partial` is gone; if so, remove the file."""
        shard = self.folder / partial.name.removeprefix(".").rsplit(".", 2)[0]
        try:
            with self._lock(shard, timeout=0):
                Path(partial.path).unlink(missing_ok=True)
                return True
        except Timeout:
            return False


class RemoteShardList(ShardList):
    """The shards at a URL: a range such as `{00000..00041}.tar`, a glob, or a folder.

    The content of a URL must not change. New shards are seen after `flipscale prepare index` has rewritten the
    manifest. A manifest next to the shards is fetched. Without it, one process of each node makes a manifest in the
    cache, from the indices next to the shards or else from the shards.
    """

    def __init__(self, shards: str, cache: ShardCache):
        self.shards, self.cache = without_secrets(shards), cache
        url, mark, query = shards.partition("?")
        # A query that names a shard is not a signature.
        if url.startswith("http") and (url.endswith(".tar") or not re.search(r"[{*]|\.tar", query)):
            shards, cache.query = url, mark + query
        self.folder, self.pattern = split_shards(
            shards, lambda url: not url.endswith(".tar") and not re.search(r"[*?\[{]", url)
        )
        self.url = self.path(manifest_name(self.pattern))

    @property
    def stale_remedy(self) -> str:
        return f"give the new shard another name, and {self.remedy}"

    def path(self, name: str) -> str:  # type: ignore[override]
        return name if "://" in name else f"{self.folder}/{name}{self.cache.query}"

    def names(self) -> list[str]:
        named = expand_range(self.pattern)
        if named is None:
            url = f"{self.folder}/{self.pattern}"
            system, path = file_system(url)
            paths = [path]
            if re.search(r"[*?\[]", path):
                paths = with_retries(url, lambda: _ask(url, "glob", _LISTING_SECONDS), _START_PATIENCE_SECONDS)
            urls = sorted(map(system.unstrip_protocol, paths))
            named = without_own_files([url.removeprefix(f"{self.folder}/") for url in urls])
        if not named:
            raise no_shards(self.shards)
        return named

    def open(self, is_good: Callable[[Manifest], bool], anew: bool = False) -> Manifest:
        """Return `ShardList.open`, without a check of shards."""
        if not anew and (published := self._published()) is not None:
            return published
        place = self._local("local")
        if anew:
            return self._write(place)
        return written_once(place, lambda _: self._still_good(place), lambda: self._write(place))

    def _still_good(self, place: Path) -> Manifest | None:
        """Return a manifest made on this machine, unless a few of its shards are gone or have other sizes now."""
        manifest = self._read_cached(place)
        if manifest is None:
            return None
        with suppress(FileNotFoundError):
            for shard in evenly(len(manifest), _CHECKED_SHARDS):
                if information(self.path(manifest.names[shard]))["size"] not in (None, manifest.num_bytes[shard]):
                    return None
            return manifest
        return None

    def _read_cached(self, place: Path) -> Manifest | None:
        """Return a manifest of the cache; None if it is missing or damaged."""
        with suppress(ValueError):
            return read_manifest(place, self.pattern, self.remedy)
        _log.warning("%s is damaged; it is made anew", place)
        return None

    def index(self, name: str, size: int | None = None) -> ShardIndex:
        """Return the index of a shard of `size` bytes, if known: from the cache, from next to the shard, or built."""
        url, path = self.path(name), self.index_path(name)
        index = _read_copy(path, size)
        if index is None:
            with suppress(FileNotFoundError, PermissionError):
                limit = self.cache.max_bytes if size is None else most_bytes(size)
                self._fetch(self.path(f"{name}.index.npy"), path, limit)
                index = _read_copy(path, size)
        if index is not None:
            return index
        if size not in (None, size_and_time(self.cache.path(url))[0]):
            self.cache.forget(url)
        while True:
            self.cache.fetch(url)
            with suppress(FileNotFoundError):  # another process removed the copy to make room
                return build_index(self.cache.path(url), path)

    def _fetch(self, url: str, path: Path, most_bytes: int) -> None:

        def ask() -> None:
            with atomic_write(path, unique_partial_path(path)) as partial_file:
                fetch(url, partial_file, None, most_bytes)

        # Checked first, because fsspec makes the local file before it finds nothing at the URL.
        information(url)
        with_retries(url, ask)

    def index_path(self, name: str) -> Path:
        path = self.cache.path(self.path(name))
        return path.with_name(path.name + ".index.npy")

    def _local(self, version: str) -> Path:
        key = self.cache.path(self.url).name.partition("-")[0]
        return self.cache.folder / f"{key}-{version}.manifest"

    def _published(self) -> Manifest | None:
        """Return the manifest next to the shards, fetched if it changed; None if there is none."""
        try:
            path = self._local(_version(self.url))
            manifest = self._read_cached(path)
            if manifest is None:
                self._fetch(self.url, path, self.cache.max_bytes)
                manifest = read_manifest(path, self.pattern, self.remedy)
        except (FileNotFoundError, PermissionError):
            return None
        protocol = self.url.partition("://")[0]
        for name in manifest.names if manifest is not None else ():
            if "://" in name and name.partition("://")[0] != protocol:
                words = f"manifest {self.url} names {name!r}, which is on another server; {self.remedy}"
                raise UserError(without_secrets(words))
        return manifest

    def _write(self, place: Path) -> Manifest:
        shards = in_windows(self._indexed, self.names(), lambda: ThreadPoolExecutor(_THREADS))
        return write_manifest(place, self.pattern, shards, [], rows=False)

    def _indexed(self, name: str) -> tuple[str, ShardIndex]:
        try:
            size = information(self.path(name))["size"]
            index = self.index(name, size)
        except FileNotFoundError as error:
            raise UserError(f"shard {without_secrets(self.path(name))} does not exist; check data.shards") from error
        return name, index._replace(num_bytes=size or index.num_bytes, mtime_ns=0)


def _read_copy(path: Path, size: int | None) -> ShardIndex | None:
    """Return the index at `path`; None if it is missing, damaged or of a shard with another size."""
    with suppress(OSError, ValueError):
        index = read_index(path.read_bytes())
        if size in (None, index.num_bytes):
            return index
    return None


class RemoteTarSource(TarSource):
    """A `TarSource` of shards at URLs, which are prefetched. Lanes determine the size that the cache needs."""

    def __init__(self, shards: str, cache: ShardCache, recipe: DataRecipe, anew: bool = False):
        self.cache = cache
        self.list: RemoteShardList = RemoteShardList(shards, cache)
        super().__init__(self.list, anew)
        # The lanes of this node read some shards now and as many next.
        processes, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        lanes, of_each = Lanes.of(recipe).over(len(self.shard_sizes), recipe.shards_per_block)
        largest = np.sort(self.manifest.num_bytes)[-2 * of_each * -(-lanes.count * here // processes) :]
        if cache.max_bytes < largest.sum():
            raise UserError(
                f"data.cache_bytes {cache.max_bytes} cannot hold the {len(largest)} shards of {self.list.shards!r} "
                f"that a node reads now and next, {largest.sum()} bytes; raise it, or lower data.lanes and "
                "data.shards_per_block"
            )
        # Enough for the shards now and next, because each open one has an index in memory, 24 bytes a sample.
        self._most_kept = len(largest)
        self._prefetch: threading.Thread | None = None
        self._indices: dict[int, np.ndarray] = {}

    def fetch_ahead(self, shards: list[int]) -> None:
        """Prefetch these shards in a thread, except those that another process fetches.

        A call while the thread is busy does nothing, because each batch calls again.
        """
        # Closed, because a removed copy frees its space when no process has it open.
        for shard in [shard for shard, file in self._open.items() if not os.fstat(file).st_nlink]:
            self._close(shard)
        if self._prefetch is None or not self._prefetch.is_alive():
            urls = [self.list.path(self.manifest.names[shard]) for shard in shards]
            self._prefetch = threading.Thread(target=_prefetch, args=(weakref.ref(self.cache), urls), daemon=True)
            self._prefetch.start()

    def publish(self) -> None:
        """Write the manifest and the missing indices next to the shards, for other machines."""
        url = self.list.url
        try:
            for name in self.manifest.names:
                url = self.list.path(f"{name}.index.npy")
                system, remote = file_system(url)
                if not system.exists(remote):
                    system.put_file(str(self.list.index_path(name)), remote)
            url = self.list.url
            system, remote = file_system(url)
            system.put_file(str(self.manifest.path), remote)
        except Exception as error:  # each protocol has its own kinds
            words = f"{url} cannot be written ({one_line_reason(error)}); name a writable place"
            raise UserError(without_secrets(words)) from error

    def shard_state(self, shard: int) -> list[int | str]:
        return [_version(self.list.path(self.manifest.names[shard]))]

    def shard_digest(self, shard: int, anew: bool = False) -> str:
        if anew:
            self.cache.forget(self.list.path(self.manifest.names[shard]))
        return super().shard_digest(shard)

    def _open_checked(self, shard: int) -> int:
        try:
            return super()._open_checked(shard)
        except StaleManifest:
            # The copy may be damaged.
            self.cache.forget(self.list.path(self.manifest.names[shard]))
            return super()._open_checked(shard)

    def _open_shard(self, shard: int) -> int:
        return self.cache.open(self.list.path(self.manifest.names[shard]))

    def _opened(self, shard: int) -> int:
        file = super()._opened(shard)
        os.utime(file)  # because the cache removes the least recently read shards
        return file

    def _close(self, shard: int) -> None:
        super()._close(shard)
        self._indices.pop(shard, None)

    def _row(self, shard: int, number: int) -> np.ndarray:
        if shard not in self._indices:
            try:
                self._indices[shard] = self.list.index(self.manifest.names[shard]).rows
            except FileNotFoundError as error:
                raise self._gone(shard) from error
        return self._indices[shard][number]

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_prefetch": None, "_indices": {}}


def _prefetch(cache_of_source: "weakref.ref[ShardCache]", urls: list[str]) -> None:
    """Fetch shards while their source is in use. Every process does so; the cache lets one of them fetch a shard."""
    for url in urls:
        cache = cache_of_source()
        if cache is None:
            return
        try:
            if not cache.path(url).exists():
                cache.fetch(url, is_needed=False)
        except Exception:  # each protocol has its own kinds
            # The shard may never be needed. If it is, the reader tries again and reports the error.
            time.sleep(_PAUSE_SECONDS)
            return
        del cache  # else it would live as long as this thread
