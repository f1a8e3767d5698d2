"""The lock of a folder: one holder at a time, and nobody has to remove it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from flipscale.process import lock as module
from flipscale.process.lock import FolderLock

HOLD = """
import sys, time
from pathlib import Path
from flipscale.process.lock import FolderLock
FolderLock(Path(sys.argv[1]), "trains here").acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.05)
    return tmp_path / "run.lock"


def acquired(path: Path) -> FolderLock:
    lock = FolderLock(path, f"trains in {path.parent}")
    lock.acquire()
    return lock


def move_elsewhere(path: Path, age: float = 0.0, **changes: object) -> None:
    """Make the lock that of another machine whose last heartbeat was `age` seconds ago."""
    holder = {**json.loads(path.read_text()), "token": "theirs", "host": "far", "machine": "another boot", **changes}
    path.write_text(json.dumps(holder))
    os.utime(path, (time.time() - age,) * 2)


def test_one_holder_at_a_time(path: Path) -> None:
    lock = acquired(path)
    with pytest.raises(ValueError, match=rf"^process {os.getpid()} on \S+ \(since [^)]+\) trains in {path.parent}; "):
        acquired(path)
    assert json.loads(path.read_text())["token"] == lock.holder.token
    lock.release()
    assert list(path.parent.iterdir()) == []
    acquired(path).release()


def test_a_holder_that_ends_while_another_process_looks(path: Path) -> None:
    lock, ended = FolderLock(path, "trains"), threading.Event()

    def come_and_go() -> None:
        while not ended.is_set():
            path.touch()
            path.unlink()

    path.parent.mkdir(exist_ok=True)
    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(5000):
            with suppress(OSError):  # that another process has taken the lock
                lock.check(at_once=True)
    finally:
        ended.set()
        thread.join()


def test_one_of_many_at_one_instant(path: Path) -> None:
    """In the second round, all of them take the lock from a dead holder."""
    for _ in range(2):
        ready = threading.Barrier(8)

        def attempt(_: int, ready: threading.Barrier = ready) -> FolderLock | None:
            ready.wait()
            try:
                return acquired(path)
            except ValueError:
                return None

        with ThreadPoolExecutor(8) as pool:
            (winner,) = [lock for lock in pool.map(attempt, range(8)) if lock]
        winner.check(at_once=True)
        winner._ended.set()
        move_elsewhere(path, age=100.0)


def test_a_killed_holder_on_this_machine(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGSTOP)  # a suspended holder keeps its lock
    with pytest.raises(ValueError, match=f"process {process.pid} on"):
        acquired(path)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
    acquired(path).release()
    assert f"process {process.pid} on" in caplog.text
    assert "waiting" not in caplog.text
    process.wait()


def test_a_heartbeat_elsewhere(path: Path) -> None:
    acquired(path)._ended.set()
    move_elsewhere(path, slurm_job="7")
    threading.Timer(0.3, os.utime, (path,)).start()
    with pytest.raises(ValueError, match=r"^process \d+ on far \(since .*, Slurm job 7\) trains in"):
        acquired(path)


@pytest.mark.parametrize("content", [None, b"", b'{"pid": "x"}'])
def test_a_silent_holder_elsewhere(
    path: Path, content: bytes | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "STALE_SECONDS", 1.0)
    acquired(path)._ended.set()
    move_elsewhere(path, age=0.3)
    if content is not None:
        path.write_bytes(content)
    acquired(path).release()
    assert re.search(r"held .*/run.lock; waiting up to 1 s", caplog.text)


def test_clocks_do_not_matter(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALE_SECONDS", 0.5)
    acquired(path)._ended.set()
    move_elsewhere(path, age=-1e6)
    began = time.monotonic()
    acquired(path).release()
    assert time.monotonic() - began > 0.5


@pytest.mark.parametrize(("restart", "waits"), [("1", False), ("0", True)])
def test_a_requeued_job(
    path: Path, restart: str, waits: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "STALE_SECONDS", 1.0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    acquired(path)._ended.set()
    move_elsewhere(path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    acquired(path).release()
    assert ("waiting" in caplog.text) == waits


def test_a_lost_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = acquired(path)
    lock.check(at_once=True)
    move_elsewhere(path)
    lock.check()
    with pytest.raises(OSError, match=r"^process \d+ on far .*trains in .* gave no heartbeat for"):
        lock.check(at_once=True)
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", -1.0)
    with pytest.raises(OSError, match="writes nothing more"):
        lock.check()
    lock.release()
    assert json.loads(path.read_text())["token"] == "theirs"
