"""Tar shards on s3, gs, hf or https, read through a bounded cache that fetches one block ahead."""

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
    """Return the shards that a URL names, sorted: a range such as `{00000..00041}.tar`, a glob, or a whole folder.

    Raises:
        ValueError: no shard is found, or the protocol's package is not installed.
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
    """A `TarSource` of shards at URLs. The content of a URL must not change.

    Every node fetches every shard once an epoch. The index beside a shard is fetched if there is one (`flipscale
    prepare index` writes it). If not, the shard is fetched once to build its index, which the cache's folder keeps.

    Args:
        shards: a range, glob or folder at `s3://`, `gs://`, `hf://`, `https://` or any other protocol of fsspec.
        cache: shared by all processes of the machine.
        shards_per_block: as in the order in which the samples will be read.

    Raises:
        ValueError: a shard is missing, or the cache is too small for two blocks.
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
        """Fetch these shards in a thread, except those that another process is fetching."""
        self._ahead.want([self.urls[shard] for shard in shards])

    def publish_indices(self) -> None:
        """Write the missing indices beside the shards, so that other machines need not fetch shards to build them.

        Raises:
            ValueError: the place is not writable.
        """
        import fsspec

        try:
            for url in self.urls:
                system, remote = fsspec.core.url_to_fs(f"{url}.index.npy")
                if not system.exists(remote):
                    system.put_file(str(self._index_path(url)), remote)
        except Exception as error:
            # Every protocol raises exceptions of its own.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"the index of {url} cannot be written beside it ({reason})") from error

    @contextmanager
    def _opened(self, shard: int) -> Iterator[tuple[int, np.ndarray]]:
        # Closed after each read, so that a shard that is removed from the cache frees its space at once.
        file = self.cache.open(self.urls[shard])
        try:
            yield file, self._index(shard)
        finally:
            os.close(file)

    def _index(self, shard: int) -> np.ndarray:
        """Return the index of a shard; the last few are kept."""
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
        """Return the approximate size of a shard: where the last file of its last sample ends."""
        index = np.load(self._index_path(url), mmap_mode="r")
        return int((index[-1, :, 0].astype(np.int64) * BLOCK).max() + index[-1, 0, 1]) if len(index) else 0

    def _summary(self, url: str) -> ShardSummary:
        """Return the summary of a shard's index: the one in the cache, the one beside the shard, or a new one."""
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
                continue  # the cache has already removed it to make room


class _FetchAhead:
    """A thread that fetches shards ahead. Every process has one; the cache lets only one of them fetch a shard."""

    def __init__(self, cache: ShardCache):
        self.cache = cache
        self._thread: threading.Thread | None = None

    def want(self, urls: list[str]) -> None:
        """Fetch `urls`, in their order, instead of those of the last call."""
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
                    # It may never be needed. If it is, the reader tries again and reports the error.
                    break

    def __getstate__(self) -> dict[str, object]:
        return {"cache": self.cache, "_thread": None}
