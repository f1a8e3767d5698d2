"""A bounded folder of fetched shards, shared by all processes of a machine."""

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from flipscale.files.aside import written_aside

_TRIES = 6
_FIRST_DELAY_SECONDS = 0.5  # doubled for each try; before the last one it is 8 seconds
_FULL_DELAY_SECONDS = 0.05


class ShardCache:
    """Local copies of remote shards in `folder`, which holds at most `max_bytes` in all.

    The least recently read shards are removed to make room. A shard is fetched by one process at a time, under a lock
    that is released when its process dies. It is written to another name and renamed when it has the size of the
    original. That name contains the size, so that transfers that run at the same time keep the bound together.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self.folder = folder
        self.max_bytes = max_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, url: str) -> Path:
        """Return where the copy of `url` is once it is fetched."""
        name = url.rstrip("/").rsplit("/", 1)[-1]
        return self.folder / f"{hashlib.blake2b(url.encode(), digest_size=8).hexdigest()}-{name}"

    def open(self, url: str) -> int:
        """Return a file descriptor of the copy of `url`, which is fetched first if needed.

        Raises:
            OSError: it cannot be fetched.
        """
        path = self.path(url)
        while True:
            try:
                file = os.open(path, os.O_RDONLY)
                os.utime(path)  # marks it as the last one read
                return file
            except FileNotFoundError:
                self.fetch(url)  # repeated if it has been removed again before it is opened

    def fetch(self, url: str, wait: bool = True) -> None:
        """Fetch `url` unless its copy exists. If another process is fetching it, `wait` for that or return.

        Raises:
            OSError: it cannot be fetched.
        """
        path = self.path(url)
        if path.exists():
            return
        try:
            with self._lock(path, timeout=-1 if wait else 0):
                if not path.exists():
                    self._fetch_patiently(url, path)
        except Timeout:
            return

    def _lock(self, path: Path, timeout: float) -> FileLock:
        return FileLock(path.with_name(f".{path.name}.lock"), timeout=timeout)

    def _fetch_patiently(self, url: str, path: Path) -> None:
        for number in range(_TRIES):
            try:
                return self._transfer(url, path)
            except (FileNotFoundError, PermissionError, ValueError):
                raise
            except Exception as error:
                # Every protocol raises exceptions of its own for a broken connection.
                if number + 1 == _TRIES:
                    reason = " ".join(str(error).split()) or type(error).__name__
                    raise OSError(
                        f"{url} could not be fetched in {_TRIES} tries ({reason}); start the run again when it can"
                    ) from error
                time.sleep(_FIRST_DELAY_SECONDS * 2**number)

    def _transfer(self, url: str, path: Path) -> None:
        import fsspec

        system, remote = fsspec.core.url_to_fs(url)
        size = system.info(remote)["size"]
        # This process holds the lock, so a file of this name was left by a process that was killed.
        with written_aside(path, path.with_name(f".{path.name}.{size or 0}.partial")) as partial:
            self._reserve(partial, size or 0)
            system.get_file(remote, str(partial))
            got = partial.stat().st_size
            if size is not None and got != size:
                raise OSError(f"{got} of {size} bytes came")

    def _reserve(self, partial: Path, size: int) -> None:
        """Make room for a transfer and reserve it; wait for other transfers if nothing can be removed."""
        if size > self.max_bytes:
            raise ValueError(f"a shard of {size} bytes does not fit into data.cache_bytes {self.max_bytes}")
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
            with suppress(FileNotFoundError):
                state = entry.stat()
                if entry.name.endswith(".partial"):
                    excess += 0 if self._abandoned(entry) else int(entry.name.split(".")[-2])
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
