"""A disk whose Nth operation fails: each open, write, fsync, mkdir, rename and unlink under a folder counts."""

import builtins
import errno
import io
import os
import sys
import threading
from pathlib import Path
from typing import Any

import processes

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
# Python's audit events of changes to files.
_EVENTS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate")


class FailingDisk:
    """Counts what this process does to the files of a folder, from 1, and fails one operation.

    Args:
        log: file with a line for each operation: its kind and the path in the folder.
        failing: number of the failing operation; 0 for none.
        error: errno of the failure.
    """

    def __init__(self, folder: Path, log: Path, failing: int, error: int):
        self.folder, self.failing, self.error = f"{folder.resolve()}/", failing, error
        self._count, self._lock = 0, threading.Lock()
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def meet(self, kind: str, path: str) -> None:
        """Count an operation on a file, and let it fail if it is the chosen one."""
        if not path.startswith(self.folder):
            return
        with self._lock:
            self._count += 1
            count = self._count
        os.write(self._log, f"{kind} {path.removeprefix(self.folder)}\n".encode())
        if count == self.failing:
            raise OSError(self.error, os.strerror(self.error), path)

    def install(self) -> None:
        sys.addaudithook(self._audit)
        fsync, true_open, disk = os.fsync, io.open, self

        def failing_fsync(descriptor: int) -> None:
            self.meet("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        class Raw(io.FileIO):
            def write(self, data: Any) -> int | None:
                disk.meet("write", os.path.abspath(os.fsdecode(self.name)))
                return super().write(data)

        def failing_open(file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, *rest: Any) -> Any:
            is_ours = not isinstance(file, int) and os.path.abspath(os.fsdecode(file)).startswith(self.folder)
            if not is_ours or not set(mode) & set("wax+"):
                return true_open(file, mode, buffering, encoding, *rest)
            raw = Raw(file, mode.replace("b", "").replace("t", ""))
            if buffering == 0:
                return raw
            buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding or "utf-8")

        os.fsync = failing_fsync
        builtins.open = io.open = failing_open

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        path = arguments[0] if event in _EVENTS else None
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if isinstance(path, str | bytes | os.PathLike):
            # A descriptor of a folder follows, from which `rmtree` names files; -1 for none.
            folder = arguments[-1] if event in ("os.remove", "os.rmdir") else -1
            start = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else os.getcwd()
            self.meet(event, os.path.join(start, os.fsdecode(path)))


def train(file: str, folder: str, log: str, failing: int, error: int, output: str) -> None:
    """Train as `flipscale pretrain` does, on such a disk."""
    FailingDisk(Path(folder), Path(log), failing, error).install()
    processes.call_main("flipscale.pretrain", ["--config", file], output)
