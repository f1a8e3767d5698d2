"""A folder's lock: one holder at a time, none that a person has to remove."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flipscale.io import lock as module
from flipscale.io.lock import FolderLock

HELD = """
import sys, time
from pathlib import Path
from flipscale.io.lock import FolderLock
FolderLock(Path(sys.argv[1]), "trains here").acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.lock"


def held(path: Path) -> FolderLock:
    lock = FolderLock(path, f"trains in {path.parent}")
    lock.acquire()
    return lock


def another_process(path: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HELD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def as_if_of(path: Path, age: float = 0.0, **changes: object) -> None:
    """Let the lock be of another machine, whose holder gave its last sign `age` seconds ago."""
    about = {**json.loads(path.read_text()), "token": "theirs", "host": "far", "machine": "another boot", **changes}
    path.write_text(json.dumps(about))
    os.utime(path, (time.time() - age,) * 2)


def test_a_lock_is_taken_once_and_given_back(path: Path) -> None:
    lock = held(path)
    with pytest.raises(
        ValueError,
        match=rf"^process {os.getpid()} on \S+ \(since [^)]+\) trains in {path.parent}; wait for it, stop it, or use "
        "another folder$",
    ):
        held(path)
    assert json.loads(path.read_text())["token"] == lock.about["token"]
    lock.release()
    assert list(path.parent.iterdir()) == []
    held(path).release()


def test_of_many_at_one_instant_one_gets_it(path: Path) -> None:
    """Also where all of them take it from a holder that is gone."""
    for _ in range(2):
        ready = threading.Barrier(8)

        def attempt(_: int, ready: threading.Barrier = ready) -> FolderLock | None:
            ready.wait()
            try:
                return held(path)
            except ValueError:
                return None

        with ThreadPoolExecutor(8) as pool:
            (winner,) = [lock for lock in pool.map(attempt, range(8)) if lock]
        winner.check(at_once=True)
        winner._ended.set()
        as_if_of(path, age=100.0)


def test_a_killed_holder_of_this_machine_is_gone_at_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    process = another_process(path)
    with pytest.raises(ValueError, match=f"process {process.pid} on"):
        held(path)
    process.kill()
    # Dead, and its parent has not asked for its exit code.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    held(path).release()
    assert f"process {process.pid} on" in caplog.text
    assert "waiting" not in caplog.text
    process.wait()


def test_a_suspended_holder_of_this_machine_is_not_gone(path: Path) -> None:
    process = another_process(path)
    process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(ValueError, match=f"process {process.pid} on"):
            held(path)
    finally:
        process.kill()
        process.wait()


def test_another_process_with_the_number_of_the_holder_is_not_it(path: Path) -> None:
    lock = held(path)
    lock._ended.set()
    path.write_text(json.dumps({**lock.about, "token": "theirs", "started": "1"}))
    held(path).release()


def test_a_holder_elsewhere_that_gives_signs_has_it(path: Path) -> None:
    held(path)._ended.set()
    as_if_of(path, slurm_job="7")
    beating = threading.Timer(1.0, os.utime, (path,))
    beating.start()
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"^process \d+ on far \(since .*, Slurm job 7\) trains in"):
        held(path)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("content", [None, b"", b"\0\xff{", b"[1]", b'{"pid": "x"}', b"[" * 100_000])
def test_a_silent_holder_elsewhere_is_gone_after_a_minute(
    path: Path, content: bytes | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether its lock can be read or not."""
    monkeypatch.setattr(module, "STALE_SECONDS", 6.0)
    held(path)._ended.set()
    as_if_of(path, age=4.0)
    if content is not None:
        path.write_bytes(content)
    began = time.monotonic()
    held(path).release()
    assert 0.5 < time.monotonic() - began < 30
    assert re.search(r"held .*/run.lock; waiting up to 6 s for a sign of it", caplog.text)


def test_clocks_do_not_matter(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file from the future is watched for a minute of this process's clock."""
    monkeypatch.setattr(module, "STALE_SECONDS", 1.0)
    held(path)._ended.set()
    as_if_of(path, age=-1e6)
    began = time.monotonic()
    held(path).release()
    assert 1.0 < time.monotonic() - began < 30


@pytest.mark.parametrize(("restart", "waits"), [("1", False), ("0", True)])
def test_a_requeued_job_does_not_wait_for_itself(
    path: Path, restart: str, waits: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "STALE_SECONDS", 2.0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    held(path)._ended.set()
    as_if_of(path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    held(path).release()
    assert ("waiting" in caplog.text) == waits


def test_a_holder_that_lost_the_lock_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = held(path)
    lock.check(at_once=True)
    as_if_of(path)
    lock.check()
    with pytest.raises(OSError, match=r"^process \d+ on far .*trains in .* since this process gave no sign for"):
        lock.check(at_once=True)
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", -1.0)
    with pytest.raises(OSError, match="this one ends and writes nothing more"):
        lock.check()
    lock.release()
    assert json.loads(path.read_text())["token"] == "theirs"


def test_a_lock_that_somebody_removed_is_made_again(path: Path) -> None:
    lock = held(path)
    path.unlink()
    lock.check(at_once=True)
    with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
        held(path)
    lock.release()


def test_without_hard_links(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*names: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", no_links)
    lock = held(path)
    with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
        held(path)
    lock.release()


def test_something_else_in_its_place(path: Path) -> None:
    path.mkdir()
    with pytest.raises(ValueError, match=r"run.lock is a folder, and a lock is to be there; move it away"):
        held(path)
