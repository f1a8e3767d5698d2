"""A folder's lock: one process on one host holds it, also on a network file system whose `flock` lies.

The lock is a file that names its holder and that the holder touches every few seconds. Nobody has to remove it after a
kill: a holder of this machine is looked for among its processes, and one of another machine is gone when its file has
not been touched for a minute. Ages are differences of times that the file system itself has written, whatever the
hosts' clocks say.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from flipscale.io.atomic import unique_partial_path
from flipscale.io.errors import UserError
from flipscale.io.files import read_text

_log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
# Between taking a lock from a dead holder and looking who has it: two may do so at the same instant.
_SETTLE_SECONDS = 0.5
_LOOK_SECONDS = 0.5
# How long a release waits for the thread that keeps the lock: its file system may not answer.
_CLOSING_SECONDS = 1.0

_TYPES = {
    **dict.fromkeys(("token", "host", "machine", "started", "slurm_job"), str),
    **{"pid": int, "slurm_restart": int, "since": float},
}


class Holder(NamedTuple):
    """A holder as the lock's file names it.

    Args:
        about: `token`, `host`, `machine`, `pid`, `started`, `since`, `slurm_job` and `slurm_restart`; empty if the file
            cannot be read as these.
        touched: when the holder gave its last sign, by the file system's clock.
    """

    about: Mapping[str, Any]
    touched: float

    @property
    def words(self) -> str:
        if not self.about:
            return "a process that its lock does not name"
        since = time.strftime("%F %T", time.localtime(self.about["since"]))
        job = f", Slurm job {self.about['slurm_job']}" if self.about["slurm_job"] else ""
        return f"process {self.about['pid']} on {self.about['host']} (since {since}{job})"


def is_holder_alive(path: Path) -> bool | None:
    """Return whether the process that a lock's file names lives; None where there is no file, or its holder is of
    another machine or unknown."""
    try:
        return _lives_here(Holder(_parsed(read_text(path).encode()), 0.0))
    except (OSError, ValueError):
        return None


class FolderLock:
    """The lock of a folder, which this process takes with `acquire` and keeps until `release` or its end.

    Args:
        path: the lock's file, in the folder.
        doing: what the holder does, for messages: `trains in runs/a`.
    """

    def __init__(self, path: Path, doing: str):
        self.path = path
        self.doing = doing
        self.about = {"token": uuid.uuid4().hex, **_this_process()}
        self._confirmed = time.monotonic()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock, and keep it fresh in a thread.

        A holder of another machine that is silent is waited for, a minute at most; so is one that was killed there.

        Raises:
            ValueError: another process holds it.
            OSError: the folder is not writable.
        """
        mine = unique_partial_path(self.path)
        mine.write_text(json.dumps(self.about), encoding="utf-8")
        try:
            self._take(mine)
        finally:
            mine.unlink(missing_ok=True)
        self._confirmed = time.monotonic()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def check(self, at_once: bool = False) -> None:
        """Raise if another process has taken the lock, as it may when this one was suspended or cut off for a minute.

        Costs nothing while the thread that keeps the lock has just looked.

        Args:
            at_once: look in any case.

        Raises:
            OSError: another process has it.
        """
        if at_once or time.monotonic() - self._confirmed > 2 * HEARTBEAT_SECONDS:
            self._confirm()

    def release(self) -> None:
        """Give the lock back, if this process still has it."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(_CLOSING_SECONDS)
        with suppress(OSError):
            found = self._look()
            if found is not None and self._is_mine(found):
                self.path.unlink()

    def _take(self, mine: Path) -> None:
        first, began, told = None, time.monotonic(), False
        while not self._created(mine):
            found = self._look()
            if found is None:
                continue
            if self._is_mine(found):
                return
            if first is None or found.about != first.about:
                first, began = found, time.monotonic()
            if self._is_gone(found, mine, time.monotonic() - began):
                self._replace(mine, found)
                continue
            if _lives_here(found) or found.touched != first.touched:
                raise UserError(f"{found.words} {self.doing}; wait for it, stop it, or use another folder")
            if not told:
                told = True
                _log.warning("%s held %s; waiting up to %.0f s for a sign of it", found.words, self.path, STALE_SECONDS)
            time.sleep(_LOOK_SECONDS)

    def _is_gone(self, holder: Holder, mine: Path, watched: float) -> bool:
        """Return whether a holder has ended.

        Args:
            mine: a file beside the lock, which is touched to learn the file system's time.
            watched: for how many seconds its file has been seen untouched.
        """
        if self._is_earlier_start(holder):
            return True
        here = _lives_here(holder)
        if here is not None:
            return not here
        os.utime(mine)
        return max(_fresh_stat(mine).st_mtime - holder.touched, watched) > STALE_SECONDS

    def _is_earlier_start(self, holder: Holder) -> bool:
        """Return whether the holder is the same Slurm job before it was requeued, which Slurm has ended."""
        ours, theirs = self.about, holder.about
        return bool(
            theirs
            and ours["slurm_job"]
            and ours["slurm_job"] == theirs["slurm_job"]
            and ours["slurm_restart"] > theirs["slurm_restart"]
        )

    def _created(self, mine: Path) -> bool:
        """Make the lock of `mine` unless there is one; return whether it was made."""
        try:
            os.link(mine, self.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            try:
                with open(self.path, "x", encoding="utf-8") as file:
                    file.write(json.dumps(self.about))
            except FileExistsError:
                return False
        return True

    def _replace(self, mine: Path, gone: Holder) -> None:
        """Put this process's lock in the place of one whose holder is gone, if it is still that one."""
        if self._look() != gone:
            return
        _log.warning("%s is gone; going on from what it left", gone.words)
        taken = unique_partial_path(mine)
        taken.write_text(json.dumps(self.about), encoding="utf-8")
        os.replace(taken, self.path)
        time.sleep(_SETTLE_SECONDS)

    def _look(self) -> Holder | None:
        """Return who has the lock, None if nobody has.

        Raises:
            ValueError: there is something else in its place.
        """
        if self.path.exists() and not self.path.is_file():
            what = "a folder" if self.path.is_dir() else "no plain file"
            raise UserError(f"{self.path} is {what}, and a lock is to be there; move it away")
        try:
            touched = _fresh_stat(self.path).st_mtime
            return Holder(_parsed(self.path.read_bytes()), touched)
        except FileNotFoundError:
            return None

    def _is_mine(self, holder: Holder) -> bool:
        return holder.about.get("token") == self.about["token"]

    def _confirm(self) -> None:
        try:
            found = self._look()
            if found is None:  # somebody has removed it
                with open(self.path, "x", encoding="utf-8") as file:
                    file.write(json.dumps(self.about))
        except OSError:
            return  # looked at again soon; a disk that stays so is told of by what is saved there
        if found is not None and not self._is_mine(found):
            raise OSError(
                f"{found.words} {self.doing} since this process gave no sign for {STALE_SECONDS:.0f} s or more; this "
                "one ends and writes nothing more"
            )
        self._confirmed = time.monotonic()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            try:
                self._confirm()
                os.utime(self.path)
            except (OSError, ValueError):
                continue  # `check` says so


def _this_process() -> dict[str, Any]:
    restart = os.environ.get("SLURM_RESTART_COUNT", "")
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()) or "",
        "since": time.time(),
        "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
        "slurm_restart": int(restart) if restart.isdecimal() else 0,
    }


def _parsed(content: bytes) -> dict[str, Any]:
    """Return what a lock's file says of its holder; nothing where that cannot be what `_this_process` returned."""
    try:
        about = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(about, dict) or {key: type(value) for key, value in about.items()} != _TYPES:
        return {}
    return about if 0 < about["pid"] < 2**31 and 0 < about["since"] < 2**33 else {}


def _machine() -> str:
    """Return what processes that see each other have in common: this boot of this machine, and the container."""
    try:
        return (
            Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
            + " "
            + os.readlink("/proc/self/ns/pid")
        )
    except OSError:
        return socket.gethostname()


def _start_of(pid: int) -> str | None:
    """Return when a process started, in ticks since the boot; None where it has ended or that cannot be read."""
    try:
        # The name, in brackets, may have spaces and brackets.
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def _lives_here(holder: Holder) -> bool | None:
    """Return whether a holder of this machine lives; None of one of another, or of an unknown one."""
    if not holder.about or holder.about["machine"] != _machine():
        return None
    try:
        os.kill(holder.about["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's, of which /proc may tell nothing
        return _start_of(holder.about["pid"]) in (None, holder.about["started"])
    started = _start_of(holder.about["pid"])
    return started == holder.about["started"] or (started is None and not Path("/proc/self/stat").exists())


def _fresh_stat(path: Path) -> os.stat_result:
    """Return a file's status as its server has it: opening a file makes a client of NFS forget what it remembers."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.fstat(descriptor)
    finally:
        os.close(descriptor)
