"""A disk whose Nth operation fails: each open, write, fsync, close, mkdir, rename and unlink under a folder counts."""

import builtins
import errno
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
_OF_PATHS = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "truncate", "link", "symlink")
_OF_DESCRIPTORS = ("fsync", "ftruncate", "close")


class FailingDisk:
    """Counts what this process does to the files of a folder, from 1, and fails one operation.

    Args:
        log: file with a line for each operation: its kind and the path in the folder.
        failing: number of the failing operation; 0 for none.
        error: errno of the failure.
    """

    def __init__(self, folder: Path, log: Path, failing: int, error: int):
        self.folder, self.failing, self.error = f"{folder.resolve()}/", failing, error
        self._count = 0
        self._lock = threading.Lock()
        self._write, self._log = os.write, os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def meet(self, kind: str, path: str) -> None:
        """Count an operation on a file, and let it fail if it is the chosen one."""
        if not path.startswith(self.folder):
            return
        with self._lock:
            self._count += 1
            count = self._count
        self._write(self._log, f"{kind} {path.removeprefix(self.folder)}\n".encode())
        if count == self.failing:
            self.fail(path)

    def fail(self, path: str) -> None:
        raise OSError(self.error, os.strerror(self.error), path)

    def install(self) -> None:
        for name in _OF_PATHS:
            setattr(os, name, self._of_path(name, getattr(os, name)))
        for name in _OF_DESCRIPTORS:
            setattr(os, name, self._of_descriptor(name, getattr(os, name)))
        os.open = self._opening(os.open)
        builtins.open = io.open = self._opening_file(io.open)

    def _of_path(self, kind: str, true: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            self.meet(kind, _absolute(path, options.get("dir_fd")))
            return true(path, *arguments, **options)

        return call

    def _of_descriptor(self, kind: str, true: Callable[..., Any]) -> Callable[..., Any]:
        def call(descriptor: int, *arguments: Any) -> Any:
            path = _path_of(descriptor)
            try:
                self.meet(kind, path)
            except OSError:
                if kind == "close":
                    true(descriptor)
                raise
            return true(descriptor, *arguments)

        return call

    def _opening(self, true: Callable[..., int]) -> Callable[..., int]:
        def call(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            self.meet("open", _absolute(path, options.get("dir_fd")))
            return true(path, flags, *arguments, **options)

        return call

    def _opening_file(self, true: Callable[..., Any]) -> Callable[..., Any]:
        disk = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int | None:
                disk.meet("write", self.path)
                return super().write(data)

            def close(self) -> None:
                was_open = not self.closed
                super().close()
                if was_open:
                    disk.meet("close", self.path)

        def call(
            file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, *rest: Any, **options: Any
        ) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax+"):
                return true(file, mode, buffering, encoding, *rest, **options)
            path = _absolute(file, None)
            if not path.startswith(disk.folder):
                return true(file, mode, buffering, encoding, *rest, **options)
            disk.meet("open", path)
            raw = Raw(file, mode.replace("b", "").replace("t", ""))
            raw.path = path
            if buffering == 0:
                return raw
            buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding or "utf-8")

        return call


def _absolute(path: Any, folder: int | None) -> str:
    name = os.fsdecode(path)
    return os.path.join(_path_of(folder) if folder is not None else os.getcwd(), name)


def _path_of(descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


def train(file: str, folder: str, log: str, failing: int, error: int, output: str) -> None:
    """Train as `flipscale pretrain` does, on such a disk."""
    FailingDisk(Path(folder), Path(log), failing, error).install()
    processes.call_main("flipscale.pretrain", ["--config", file], output)
