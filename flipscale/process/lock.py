"""A folder's lock: one process on one host holds it, also on network file systems without a working `flock`.

The lock is a file that names its holder; the holder touches it every few seconds. Nobody has to remove it after a kill.
A holder on this machine is looked up among the processes. A holder elsewhere is gone when the file stays untouched for
a minute. Ages compare times that the file system wrote, so hosts' clocks do not matter.
"""

import dataclasses
import json
import logging
import os
import platform
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flipscale.io.atomic import atomic_write, unique_partial_path
from flipscale.io.errors import UserError
from flipscale.io.paths import check_plain

_log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
# Two processes may replace a dead holder's file at the same instant; after this time the last writer has the lock.
_SETTLE_SECONDS = 0.5
_POLL_SECONDS = 0.5
# A release does not wait longer for the heartbeat thread, because its file system may hang.
_RELEASE_SECONDS = 1.0


@dataclass(frozen=True)
class Holder:
    """The process that a lock file names.

    Args:
        token: random name of the lock's owner.
        machine: boot and process namespace; processes with the same value see each other.
        started: start time of the process in ticks since the boot.
        since: Unix time of the lock.
        slurm_restart: number of requeues of the Slurm job.
    """

    token: str
    host: str
    machine: str
    pid: int
    started: str
    since: float
    slurm_job: str
    slurm_restart: int

    def __str__(self) -> str:
        since = time.strftime("%F %T", time.localtime(self.since))
        job = f", Slurm job {self.slurm_job}" if self.slurm_job else ""
        return f"process {self.pid} on {self.host} (since {since}{job})"

    def is_alive(self) -> bool | None:
        """Return whether the process lives; None on another machine."""
        if self.machine != machine():
            return None
        started = start_of(self.pid)
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's process, which /proc may hide
            return started in (None, self.started)
        return started == self.started


def is_holder_alive(path: Path) -> bool | None:
    """Return whether the holder that a lock file names lives; None without a file, or if the holder is elsewhere."""
    try:
        holder = _parse(path.read_bytes()) if path.is_file() else None
    except FileNotFoundError:  # a run that ends removes its lock at any time
        return None
    return None if holder is None else holder.is_alive()


class FolderLock:
    """The lock of a folder, from `acquire` to `release` or the end of the process.

    Args:
        path: lock file in the folder.
        doing: activity of the holder, for messages: `trains in runs/a`.
    """

    def __init__(self, path: Path, doing: str):
        self.path = path
        self.doing = doing
        restart = os.environ.get("SLURM_RESTART_COUNT", "")
        self.holder = Holder(
            token=uuid.uuid4().hex,
            host=platform.node(),
            machine=machine(),
            pid=os.getpid(),
            started=start_of(os.getpid()) or "",
            since=time.time(),
            slurm_job=os.environ.get("SLURM_JOB_ID", ""),
            slurm_restart=int(restart) if restart.isdecimal() else 0,
        )
        self._confirmed = time.monotonic()
        self._made: list[Path] = []
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> Holder:
        """Make the folder, take the lock, keep it fresh in a thread, and return this process as the holder. Wait a
        minute at most for a silent holder on another machine. Raise UserError if another process holds the lock."""
        self._made = [folder for folder in self.path.parents if not folder.exists()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        first: tuple[Holder | None, float] | None = None
        while not self._create():
            if (seen := self._look()) is None:
                continue
            holder, touched = seen
            if holder == self.holder:
                break
            if first is None or first[0] != holder:
                first, began, is_waiting = seen, time.monotonic(), False
            name = holder or "a process that its lock does not name"
            alive = holder and holder.is_alive()
            if self._has_requeued(holder) or alive is False or (alive is None and self._is_stale(touched, began)):
                if self._look() == seen:
                    _log.warning("%s is gone; its lock %s is taken over", name, self.path)
                    with atomic_write(self.path, unique_partial_path(self.path)) as partial:
                        partial.write_text(json.dumps(dataclasses.asdict(self.holder)), encoding="utf-8")
                    time.sleep(_SETTLE_SECONDS)
                continue
            if alive or touched != first[1]:
                raise UserError(f"{name} {self.doing}; wait for it, stop it, or use another folder")
            if not is_waiting:
                is_waiting = True
                _log.warning("%s held %s; waiting up to %.0f s for a heartbeat", name, self.path, STALE_SECONDS)
            time.sleep(_POLL_SECONDS)
        self._confirmed = time.monotonic()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()
        return self.holder

    def shows(self, holder: Holder) -> bool:
        """Return whether the lock file names this holder. A minute may pass until a network file system shows it."""
        end = time.monotonic() + STALE_SECONDS
        while (seen := self._look()) is None or seen[0] != holder:
            if time.monotonic() > end:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def check(self, at_once: bool = False) -> None:
        """Raise OSError if another process took the lock while this process was suspended or cut off for a minute.

        Free while the heartbeat thread has just looked, unless `at_once`.
        """
        if not at_once and time.monotonic() - self._confirmed <= 2 * HEARTBEAT_SECONDS:
            return
        try:
            seen = self._look()
        except OSError:
            return  # the next heartbeat looks again; a lasting disk fault also fails the saves
        if seen is not None and seen[0] != self.holder:
            raise OSError(
                f"{seen[0] or 'another process'} {self.doing}, because this process gave no heartbeat for "
                f"{STALE_SECONDS:.0f} s or more; this process ends and writes nothing more"
            )
        self._confirmed = time.monotonic()

    def release(self) -> None:
        """Give the lock back, if this process still holds it, and remove the folders that it made if they are empty."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(_RELEASE_SECONDS)
        with suppress(OSError):
            if (seen := self._look()) and seen[0] == self.holder:
                self.path.unlink()
                for folder in self._made:
                    folder.rmdir()  # raises for a folder with content

    def _create(self) -> bool:
        try:
            with open(self.path, "x", encoding="utf-8") as file:
                json.dump(dataclasses.asdict(self.holder), file)
        except FileExistsError:
            return False
        return True

    def _look(self) -> tuple[Holder | None, float] | None:
        """Return the holder and its last heartbeat by the file system's clock; None without a file."""
        check_plain(self.path)
        try:
            # Opening a file makes an NFS client drop its cached attributes.
            with open(self.path, "rb") as file:
                return _parse(file.read()), os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None

    def _has_requeued(self, holder: Holder | None) -> bool:
        """Return whether the holder is an earlier start of this Slurm job, which Slurm has ended."""
        mine = self.holder
        if holder is None or not mine.slurm_job:
            return False
        return mine.slurm_job == holder.slurm_job and mine.slurm_restart > holder.slurm_restart

    def _is_stale(self, touched: float, began: float) -> bool:
        """Return whether the last heartbeat, at `touched`, is too old. The file is watched since `began`."""
        probe = unique_partial_path(self.path)
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return max(now - touched, time.monotonic() - began) > STALE_SECONDS

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with suppress(OSError, UserError):  # the main thread's `check` reports them
                self.check(at_once=True)
                os.utime(self.path)


def _parse(content: bytes) -> Holder | None:
    """Return the holder in a lock file; None if its writer was killed midway or the file holds something else."""
    try:
        holder = Holder(**json.loads(content))
        str(holder), holder.pid + holder.slurm_restart  # because a wrong type fails here
    except (ValueError, TypeError, OverflowError):
        return None
    return holder


def machine() -> str:
    """Return the boot and the process namespace, which processes that see each other share."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # some sandboxes hide them
        return platform.node()


def start_of(pid: int) -> str | None:
    """Return when a process started, in ticks since the boot; None if the process ended or is not readable."""
    try:
        # The process name, in brackets, may hold spaces and brackets.
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]
