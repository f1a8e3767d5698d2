"""Each file operation of a run fails in turn: one sentence, whole checkpoints, and the next start learns the same.

The Nth open, write, fsync, mkdir, rename or unlink under a folder fails.
"""

import builtins
import errno
import io
import os
import random
import re
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import processes
import pytest
from conftest import losses, pretrain

from flipscale.engines.checkpoint import list_checkpoints, require_valid

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


def train_on_it(file: str, folder: str, log: str, failing: int, error: int, output: str) -> None:
    """Train as `flipscale pretrain` does, on such a disk."""
    FailingDisk(Path(folder), Path(log), failing, error).install()
    processes.call_main("flipscale.pretrain", ["--config", file], output)


def train(file: Path, tmp_path: Path, failing: int = 0, error: int = 0) -> tuple[int, str, list[str]]:
    """Return the exit code, output and operations of a start."""
    output = tmp_path / "output"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    arguments = str(file), str(tmp_path / "run/checkpoints"), str(output / "log"), failing, error, str(output)
    (code,) = processes.exit_codes([processes.start(train_on_it, *arguments)])
    assert code is not None, "it hangs"
    printed = "".join((output / name).read_text() for name in ("stdout", "stderr"))
    return code, printed, (output / "log").read_text().splitlines()


def some_of(operations: list[str]) -> list[tuple[int, int]]:
    """Return operations by number, from 1, with errors: the first of each of eight kinds."""
    kinds: dict[str, int] = {}
    for number, operation in enumerate(operations, 1):
        kinds.setdefault(re.sub(r"\d{8}", "N", operation), number)
    numbers = sorted(random.Random(0).sample(sorted(kinds.values()), 8))
    return [(number, ERRORS[place % len(ERRORS)]) for place, number in enumerate(numbers)]


@pytest.mark.long
def test_each_operation_fails_in_turn(write_recipe, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    stages = [{"name": "masked", "samples": 160, "mask_ratio": 0.75, "base_lr": 0.012}]
    file = write_recipe(run_dir, stages=stages, save={"every_samples": 64, "total_limit": 1})
    code, printed, operations = train(file, tmp_path)
    assert code == 0, printed
    whole = losses(run_dir)
    assert len(whole) == 10
    ended = 0
    chosen = some_of(operations)
    for number, error in chosen:
        what = f"operation {number} ({operations[number - 1]}) fails with {os.strerror(error)}"
        shutil.rmtree(run_dir)
        code, printed, met = train(file, tmp_path, number, error)
        assert "Traceback" not in printed, (what, printed)
        assert len(met) >= number
        complaints = [line for line in printed.splitlines() if line.startswith("flipscale: error: ")]
        assert (code, len(complaints)) in ((1, 1), (0, 0)), (what, printed)
        ended += code
        if code:
            assert os.strerror(error) in complaints[0], what
        for checkpoint in list_checkpoints(run_dir):
            require_valid(checkpoint)
        if code:
            again = pretrain(file)
            assert again.returncode == 0, (what, again.stderr)
        assert losses(run_dir) == whole, what
        assert (run_dir / "DONE").exists(), what
    assert 2 * ended >= len(chosen)
