"""Tar shards on s3, gs, hf or https, read through a bounded cache and fetched a block ahead of need."""

import io
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from flipscale.data.sources.shard_cache import ShardCache
from flipscale.data.sources.shard_index import BLOCK, ShardSummary, build_index, load_summaries, read_summary
from flipscale.data.sources.tar_source import TarSource, expand_range
from flipscale.files.aside import own_partial_path, written_aside

_MAX_INDICES = 256


def expand_urls(shards: str) -> list[str]:
    """The shards that a URL names, sorted: a range such as `{00000..00041}.tar`, a glob, or all of a folder.

    Raises:
        ValueError: nothing is there, or the protocol's package is not installed.
    """
    import fsspec

    numbered = expand_range(shards)
    if numbered is not None:
        return numbered
    try:
        system, path = fsspec.core.url_to_fs(shards)
        if path.endswith(".tar") and not re.search(r"[*?\[]", path):
            return [shards]
        found = system.glob(path if re.search(r"[*?\[]", path) else f"{path.rstrip('/')}/*.tar")
    except (ImportError, ValueError) as error:
        raise ValueError(f"{shards!r} cannot be read: {error}") from error
    if not found:
        raise ValueError(
            f"no shards at {shards!r}; name a folder of *.tar, a glob, or a range like {{00000..00041}}.tar"
        )
    return sorted(system.unstrip_protocol(name) for name in found)


class RemoteTarSource(TarSource):
    """As `TarSource`, of shards at URLs. What lies at a URL must not change.

    Every node fetches every shard once an epoch. An index that lies beside a shard (`flipscale prepare index` put it
    there) is fetched; otherwise the shard is, to build it, once: that is kept in the cache's folder.

    Args:
        shards: a range, glob or folder at `s3://`, `gs://`, `hf://`, `https://` or any protocol of fsspec.
        cache: for this and every other process of the machine.
        shards_per_block: of the order that the samples will be read in.

    Raises:
        ValueError: a shard that is missing, a cache too small for two blocks.
    """

    def __init__(self, shards: str, cache: ShardCache, shards_per_block: int):
        self.cache = cache
        self.urls = expand_urls(shards)
        self._describe(self.urls, load_summaries(self.urls, self._summary))
        sizes = sorted((self._extent(url) for url in self.urls), reverse=True)
        needed = sum(sizes[: 2 * shards_per_block])
        if cache.max_bytes < needed:
            raise ValueError(
                f"data.cache_bytes {cache.max_bytes} cannot hold two blocks of {shards_per_block} shards of "
                f"{shards!r}, {needed} bytes; raise it, or lower data.shards_per_block"
            )
        self._ahead = _FetchAhead(cache)
        self._indices: OrderedDict[int, np.ndarray] = OrderedDict()

    def fetch_ahead(self, shards: Sequence[int]) -> None:
        """Has a thread of this process fetch these, as far as no other process does."""
        self._ahead.want([self.urls[shard] for shard in shards])

    def publish_indices(self) -> None:
        """Writes the indices beside the shards, where they are not there yet: the next machine need not fetch those.

        Raises:
            ValueError: nothing can be written there.
        """
        import fsspec

        try:
            for url in self.urls:
                system, remote = fsspec.core.url_to_fs(f"{url}.index.npy")
                if not system.exists(remote):
                    system.put_file(str(self._index_path(url)), remote)
        except Exception as error:
            # Every protocol has exceptions of its own for what is not allowed.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"the index of {url} cannot be written beside it ({reason})") from error

    @contextmanager
    def _opened(self, shard: int) -> Iterator[tuple[int, np.ndarray]]:
        # Not kept open: the space of a shard that was removed from the cache is free at once.
        file = self.cache.open(self.urls[shard])
        try:
            yield file, self._index(shard)
        finally:
            os.close(file)

    def _index(self, shard: int) -> np.ndarray:
        """The index of a shard, the last few kept."""
        if shard not in self._indices:
            if len(self._indices) >= _MAX_INDICES:
                self._indices.popitem(last=False)
            self._indices[shard] = np.load(self._index_path(self.urls[shard]), mmap_mode="r")
        self._indices.move_to_end(shard)
        return self._indices[shard]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_indices": OrderedDict()}

    def _index_path(self, url: str) -> Path:
        path = self.cache.path(url)
        return path.with_name(path.name + ".index.npy")

    def _extent(self, url: str) -> int:
        """About the size of a shard: where the last file of its last sample ends."""
        index = np.load(self._index_path(url), mmap_mode="r")
        return int((index[-1, :, 0].astype(np.int64) * BLOCK).max() + index[-1, 0, 1]) if len(index) else 0

    def _summary(self, url: str) -> ShardSummary:
        """What the index of a shard says: the one kept here, the one beside the shard, or one that is built."""
        import fsspec

        path = self._index_path(url)
        try:
            with open(path, "rb") as file:
                return read_summary(file)
        except FileNotFoundError:
            pass
        try:
            system, remote = fsspec.core.url_to_fs(f"{url}.index.npy")
            content = system.cat_file(remote)
            summary = read_summary(io.BytesIO(content))
        except (FileNotFoundError, ValueError):
            return self._build(url, path)
        with written_aside(path, own_partial_path(path)) as partial:
            partial.write_bytes(content)
        return summary

    def _build(self, url: str, path: Path) -> ShardSummary:
        while True:
            try:
                self.cache.fetch(url)
            except FileNotFoundError as error:
                raise ValueError(f"shard {url} does not exist; check data.shards") from error
            try:
                index, damage = build_index(self.cache.path(url), path)
                return ShardSummary(len(index), damage)
            except FileNotFoundError:
                continue  # it has already made room for another


class _FetchAhead:
    """A thread that fetches what is wanted; each process of a machine has one, and one of them fetches a shard."""

    def __init__(self, cache: ShardCache):
        self.cache = cache
        self._thread: threading.Thread | None = None

    def want(self, urls: list[str]) -> None:
        """Replaces what is wanted by `urls`."""
        self._urls = urls
        if self._thread is None or not self._thread.is_alive():
            self._changed = threading.Event()
            self._thread = threading.Thread(target=self._fetch, name="fetch ahead", daemon=True)
            self._thread.start()
        self._changed.set()

    def _fetch(self) -> None:
        while True:
            self._changed.wait()
            self._changed.clear()
            for url in self._urls:
                if self._changed.is_set():
                    break
                try:
                    self.cache.fetch(url, wait=False)
                except (OSError, ValueError):
                    # Whoever needs it tries again and says so; it may never be needed.
                    break

    def __getstate__(self) -> dict[str, object]:
        return {"cache": self.cache, "_thread": None}
