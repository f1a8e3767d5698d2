"""A bounded folder of fetched shards, shared by all processes of a machine."""

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from flipscale.files.aside import written_aside

_TRIES = 6
_FIRST_DELAY_SECONDS = 0.5  # doubled every time: the last of the tries is 16 seconds after the one before it
_FULL_DELAY_SECONDS = 0.05


class ShardCache:
    """Local copies of remote shards in `folder`, at most `max_bytes` with everything that lies there.

    The least recently read shard makes room for the next. A shard is fetched by one process at a time, under a lock
    that dies with its process, into a file of another name, and renamed when its size is that of the original; how much
    a transfer will need is in that name, so that those that run at once keep the bound together.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self.folder = folder
        self.max_bytes = max_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, url: str) -> Path:
        """Where the copy of `url` lies when it is there."""
        name = url.rstrip("/").rsplit("/", 1)[-1]
        return self.folder / f"{hashlib.blake2b(url.encode(), digest_size=8).hexdigest()}-{name}"

    def open(self, url: str) -> int:
        """A file descriptor of the copy of `url`, fetched first if need be.

        Raises:
            OSError: it cannot be fetched.
        """
        path = self.path(url)
        while True:
            try:
                file = os.open(path, os.O_RDONLY)
                os.utime(path)  # was read last now
                return file
            except FileNotFoundError:
                self.fetch(url)  # and once more if it is already gone again

    def fetch(self, url: str, wait: bool = True) -> None:
        """Fetches `url` unless it is there, or another process is at it and this one is not to `wait`.

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
                # Every protocol has exceptions of its own for a connection that broke.
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
        # A file of this name that lies there is of a process that was killed: the lock is ours now.
        with written_aside(path, path.with_name(f".{path.name}.{size or 0}.partial")) as partial:
            self._reserve(partial, size or 0)
            system.get_file(remote, str(partial))
            got = partial.stat().st_size
            if size is not None and got != size:
                raise OSError(f"{got} of {size} bytes came")

    def _reserve(self, partial: Path, size: int) -> None:
        """Makes room for a transfer and counts it in, waiting for others to end where nothing can be removed."""
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
        """Removes what was read longest ago until `size` bytes fit; the bytes still lacking, 0 or less when they do."""
        excess, shards = size - self.max_bytes, []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                state = entry.stat()
                if entry.name.endswith(".partial"):
                    excess += 0 if self._abandoned(entry) else int(entry.name.split(".")[-2])
                else:
                    excess += state.st_size
                    if not entry.name.startswith(".") and not entry.name.endswith(".index.npy"):
                        shards.append((state.st_mtime_ns, state.st_size, entry.path))
        for _, held, path in sorted(shards):
            if excess <= 0:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            excess -= held
        return excess

    def _abandoned(self, partial: "os.DirEntry[str]") -> bool:
        """Whether the process that wrote `partial` is gone; removes it if so."""
        shard = self.folder / partial.name.removeprefix(".").rsplit(".", 2)[0]
        try:
            with self._lock(shard, timeout=0):
                Path(partial.path).unlink(missing_ok=True)
                return True
        except Timeout:
            return False
