"""A bounded folder of fetched shards, shared by all processes of a machine."""

import hashlib
import os
import re
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from flipscale.data.sources.remote_files import fetch, information_at_once, patiently
from flipscale.data.sources.tar_members import NotAFile, open_plain
from flipscale.io.atomic import atomic_write, remove
from flipscale.io.errors import UserError

_FULL_DELAY_SECONDS = 0.05
# What is reserved for a file whose size its server does not say, and the most that is taken of it.
_UNTOLD_BYTES = 1 << 31
_LONGEST_NAME = 100
# The names in the folder that are the cache's. Nothing else there is counted or removed.
_OURS = re.compile(r"\.?[0-9a-f]{16}-.*")
_PARTIAL = re.compile(r"\.[0-9a-f]{16}-.*\.(\d+)\.partial")


class ShardCache:
    """Local copies of remote shards in `folder`, which holds at most `max_bytes` in all.

    The least recently read shards are removed to make room. A shard is fetched by one process at a time, under a lock
    that is released when its process dies. It is written to another name and renamed when it has the size of the
    original. That name contains the size, so that transfers that run at the same time keep the bound together.

    Raises:
        ValueError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self.folder = folder
        self.max_bytes = max_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"data.cache_dir {folder} cannot be made ({error.strerror}); name a folder on a local disk"
            ) from error
        if not os.access(folder, os.W_OK):
            raise UserError(f"data.cache_dir {folder} may not be written; name a folder on a local disk")

    def path(self, url: str) -> Path:
        """Return where the copy of `url` is once it is fetched."""
        name = url.rstrip("/").rsplit("/", 1)[-1][-_LONGEST_NAME:]
        return self.folder / f"{hashlib.blake2b(url.encode(), digest_size=8).hexdigest()}-{name}"

    def open(self, url: str) -> int:
        """Return a file descriptor of the copy of `url`, which is fetched first if needed.

        Raises:
            OSError: it cannot be fetched.
        """
        path = self.path(url)
        while True:
            try:
                file = open_plain(path)
                os.utime(file)  # marks it as the last one read
                return file
            except FileNotFoundError:
                self.fetch(url)  # repeated if it has been removed again before it is opened
            except NotAFile:
                self.forget(url)

    def forget(self, url: str) -> None:
        """Remove the copy of `url`, which is not as it should be."""
        remove(self.path(url))

    def fetch(self, url: str) -> None:
        """Fetch `url` unless its copy exists, after as many tries as it needs; wait if another process is fetching it.

        Raises:
            OSError: it cannot be fetched.
        """
        path = self.path(url)
        if path.exists():
            return
        with self._lock(path, timeout=-1):
            if not path.exists():
                patiently(url, lambda: self._transfer(url, path))

    def try_to_fetch(self, url: str) -> None:
        """Fetch `url` in one try, unless its copy exists or another process is fetching it.

        Raises:
            Exception: of any kind that its protocol has for a broken connection.
        """
        path = self.path(url)
        with suppress(Timeout), self._lock(path, timeout=0):
            if not path.exists():
                self._transfer(url, path)

    def _lock(self, path: Path, timeout: float) -> FileLock:
        return FileLock(path.with_name(f".{path.name}.lock"), timeout=timeout)

    def _transfer(self, url: str, path: Path) -> None:
        size = information_at_once(url)["size"]
        reserved = min(_UNTOLD_BYTES, self.max_bytes) if size is None else size
        if reserved > self.max_bytes:
            raise UserError(f"{url} has {size} bytes, which do not fit into data.cache_bytes {self.max_bytes}")
        # This process holds the lock, so a file of this name was left by a process that was killed.
        with atomic_write(path, path.with_name(f".{path.name}.{reserved}.partial")) as partial:
            self._reserve(partial, reserved)
            fetch(url, partial, size, reserved)

    def _reserve(self, partial: Path, size: int) -> None:
        """Make room for a transfer and reserve it; wait for other transfers if nothing can be removed."""
        while True:
            with FileLock(self.folder / ".lock"):
                excess = self._make_room(size)
                if excess <= 0:
                    partial.touch()
                    return
            time.sleep(_FULL_DELAY_SECONDS)

    def _make_room(self, size: int) -> int:
        """Remove the least recently read shards until `size` bytes fit, and return how many bytes are still lacking."""
        excess, shards = size - self.max_bytes, []
        for entry in os.scandir(self.folder):
            if not _OURS.fullmatch(entry.name):
                continue
            with suppress(FileNotFoundError):
                state = entry.stat()
                partial = _PARTIAL.fullmatch(entry.name)
                if partial:
                    excess += 0 if self._abandoned(entry) else int(partial[1])
                else:
                    excess += state.st_size
                    if not entry.name.startswith(".") and not entry.name.endswith((".index.npy", ".manifest")):
                        shards.append((state.st_mtime_ns, state.st_size, entry.path))
        for _, held, path in sorted(shards):
            if excess <= 0:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            excess -= held
        return excess

    def _abandoned(self, partial: "os.DirEntry[str]") -> bool:
        """Return whether the process that wrote `partial` is gone; if so, remove the file."""
        shard = self.folder / partial.name.removeprefix(".").rsplit(".", 2)[0]
        try:
            with self._lock(shard, timeout=0):
                Path(partial.path).unlink(missing_ok=True)
                return True
        except Timeout:
            return False
