"""The end of a run that cannot go on: a process hangs, falls silent, fails or is killed.

One failure ends all processes within seconds, and one process prints it. This works under any launcher, because the
processes talk through the store in which torch's process group met.
"""

import faulthandler
import itertools
import json
import multiprocessing
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch.distributed as dist

from flipscale.process.lock import machine, start_of
from flipscale.process.world import promised_processes, whole_number

# Keys of the store: the first failure, the number of processes that know it, all signs of life, a rank's looks.
_FAILED, _KNOWING, _SIGNS, _LOOKS = "flipscale/failed", "flipscale/knowing", "flipscale/signs", "flipscale/looks/{}"
# A rank's process. A launcher may use one store for several starts of its processes.
_PROCESS = f"flipscale/process/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{{}}"
# Message of a process that was killed and could print none.
_KILLED = "killed"
_MESSAGE_CHARACTERS = 2_000
# A store whose process is gone blocks for minutes.
_STORE_SECONDS = 3.0
# Between two looks at the store and at the processes of this machine: a request or two a second of each rank.
_LOOK_SECONDS = 0.5
# Between two signs of life, and between a failure's message and the end of the other processes.
_SIGN_SECONDS = 2.0
# Rank 0 often keeps the store, so it stays until all know of the failure, but no longer than this.
_STAY_SECONDS = 10.0
# Other ranks wait this much longer before they report a hang, so that rank 0 prints the message.
_LATER_SECONDS = 15.0
_STACKS_SECONDS = 10.0
# The thread that watches the clock may be stuck in a file system that is gone.
_CLOSING_SECONDS = 1.0
# A process that has not looked at the clock for so long was suspended. A starved one looks more often.
_SUSPENDED_SECONDS = 50.0
# Reads and writes beside the work, between two looks at the clock, stay below this.
_MIN_BYTES = 1 << 16


class Failure(NamedTuple):
    """A failed process and its message."""

    rank: int
    host: str
    words: str


# The failure of a process that took the store with it.
_UNKNOWN = Failure(0, "the first host", "")


class Watchdog:
    """Ends this process in a `with` block when it hangs, and soon after another process has failed or was killed.

    A process hangs after `hang_seconds` without a sign of life: `begin`, `alive`, and bytes that it and its children
    read and write. Outside of steps, other processes' signs count too: a rank that has written its part of a checkpoint
    waits for the others. After half of the time, every rank writes its threads' stacks to `stacks/`.

    After another process's failure, this one may be blocked on the GPU, or in work that needs no other process. Its
    launcher would ask it to end by SIGTERM, which is a request to save, and kill it half a minute later.
    """

    def __init__(self, run_dir: Path, hang_seconds: float, rank: int):
        self._run_dir, self._hang_seconds, self._rank = run_dir, hang_seconds, rank
        self._pause = min(hang_seconds / 20, 5.0)
        # Time of the last look at the clock, and the seconds so far in which this process was suspended.
        self._looked = (time.perf_counter(), 0.0)
        self._work, self._is_step = "", False
        # Time of the last sign of life from the main thread; None while the clock is stopped.
        self._since: float | None = None
        # Numbers of signs of life: this process's, and those of all others.
        self._signs = self._heard = 0
        self._finished = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Watchdog":
        self._start_thread(self._watch_clock)
        if (store := own_store()) is not None:
            # Now and not in the thread, because the first step may kill this process.
            place = json.dumps([machine(), os.getpid(), start_of(os.getpid())])
            store.set(_PROCESS.format(dist.get_rank()), place)
            # Another thread, because the store may block when a process is gone.
            self._start_thread(self._watch_others, store)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        # All processes end their threads before any of them leaves the group.
        self._finished.set()
        for thread in self._threads:
            thread.join(_CLOSING_SECONDS)

    def begin(self, work: str, is_step: bool = False) -> None:
        """Start the clock for some work, such as `a save after step 8`."""
        self._work, self._is_step = work, is_step
        self._since = self.awake_seconds()

    def alive(self) -> None:
        self._since = self.awake_seconds()

    def idle(self) -> None:
        self._since = None

    def awake_seconds(self) -> float:
        """Return the time by a clock that stands still while this process is suspended, such as by SIGSTOP.

        A thread looks at the clock all the time, so a long time without a look is a suspension.
        """
        now, (looked, suspended) = time.perf_counter(), self._looked
        if now - looked > _SUSPENDED_SECONDS:
            suspended += now - looked
        self._looked = now, suspended  # two threads may write this at once; both have the same suspension
        return now - suspended

    def _start_thread(self, watch: Callable[..., None], *arguments: Any) -> threading.Thread:
        self._threads.append(threading.Thread(target=watch, args=arguments, name=watch.__name__, daemon=True))
        self._threads[-1].start()
        return self._threads[-1]

    def _watch_clock(self) -> None:
        written_for = began = None
        stacks: threading.Thread | None = None
        sign, num_bytes, heard = 0.0, 0, 0
        limit = self._hang_seconds + (0.0 if self._rank == 0 else _LATER_SECONDS)
        while not self._finished.wait(self._pause):
            since, now = self._since, self.awake_seconds()
            if since is None:
                continue
            # The bytes of the stacks are not a sign of life.
            has_moved = (moved := _bytes_moved()) - num_bytes > _MIN_BYTES and stacks is None and not self._is_step
            others_live = self._heard != heard and not self._is_step
            num_bytes, heard = moved, self._heard
            if stacks is not None and not stacks.is_alive():
                stacks = None
            self._signs += since != began or has_moved
            if since != began:
                began = sign = since
            elif has_moved or others_live:
                sign = now
            seconds = now - sign
            if seconds > self._hang_seconds / 2 and written_for != sign:
                # In a thread, because it takes seconds on a busy machine.
                written_for, stacks = sign, self._start_thread(self._write_stacks)
            if seconds > limit:
                if stacks is not None:
                    stacks.join(_STACKS_SECONDS)
                self._end(limit)

    def _write_stacks(self) -> None:
        folder = self._run_dir / "stacks"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"rank-{self._rank:05d}.txt", "a", encoding="utf-8") as file:
                file.write(f"{self._work} on {platform.node()}, {time.strftime('%F %T')}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)

    def _end(self, seconds: float) -> NoReturn:
        silent = _silent_ranks()
        where = f"; rank {', '.join(map(str, silent))} does not run any more" if silent else ""
        words = (
            f"flipscale: error: {self._work} has not finished on rank {self._rank} after {seconds:.0f} s "
            f"(log.hang_seconds){where}; the stacks of each rank that still runs are in {self._run_dir}/stacks; start "
            "the run again to resume from its last checkpoint"
        )
        if claim_failure(words).rank == self._rank:
            print(words, file=sys.stderr, flush=True)
            stay_until_others_know()
        end_process(1)  # the main thread hangs, so nothing can be unwound

    def _watch_others(self, store: dist.Store) -> None:
        """Exchange signs of life, claim the failure of killed neighbours, and end this process after any failure.

        Neighbours are the processes of this launcher. Their end is seen before any collective fails or any launcher
        acts. On GPUs, collectives do not fail: they wait.
        """
        rank, given = dist.get_rank(), 0
        first = rank - whole_number(os.environ, "LOCAL_RANK", 0)
        unknown = {*range(first, first + whole_number(os.environ, "LOCAL_WORLD_SIZE", 1))} - {rank}
        neighbours: dict[int, tuple[int, str]] = {}
        for look in itertools.count():
            if self._finished.wait(_LOOK_SECONDS):
                return
            try:
                if look % int(_SIGN_SECONDS / _LOOK_SECONDS) == 0:
                    store.add(_LOOKS.format(rank), 1)
                    news = self._signs - given
                    given += news
                    self._heard = store.add(_SIGNS, news) - given
                for other in [other for other in unknown if store.check([_PROCESS.format(other)])]:
                    unknown.remove(other)
                    place, pid, started = json.loads(store.get(_PROCESS.format(other)))
                    if place == machine():
                        neighbours[other] = pid, started
                for other, (pid, started) in neighbours.items():
                    if start_of(pid) != started:
                        store.compare_set(_FAILED, "", json.dumps(Failure(other, platform.node(), _KILLED)))
                if not store.check([_FAILED]):
                    continue
                failure = Failure(*json.loads(store.get(_FAILED)))
            except RuntimeError:
                failure = _UNKNOWN
            # Its message first. Meanwhile this process may fail alike, and must find the failure in the store.
            if not self._finished.wait(0.0 if failure.words == _KILLED else _SIGN_SECONDS):
                with suppress(RuntimeError):
                    store.add(_KNOWING, 1)
                leave(failure)


def _bytes_moved() -> int:
    total = 0
    for pid in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        with suppress(OSError):  # ended
            counts = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text("ascii").splitlines())
            # rchar and wchar count system calls; the other two also count page faults.
            total += sum(int(counts[name]) for name in ("rchar", "wchar", "read_bytes", "write_bytes"))
    return total


def _silent_ranks() -> list[int]:
    """Return the ranks that do not look at the store any more: stopped processes, or machines that are gone.

    Takes nine seconds at most. Without an answer of the store, its keeper, rank 0, is silent.
    """
    silent = [0] if _have_met() else []

    def ask() -> None:
        if (store := own_store()) is None:
            return
        with suppress(RuntimeError):
            before = [store.add(_LOOKS.format(rank), 0) for rank in range(dist.get_world_size())]
            time.sleep(3 * _SIGN_SECONDS)
            silent[:] = [rank for rank, looks in enumerate(before) if store.add(_LOOKS.format(rank), 0) == looks]

    _within(3 * _SIGN_SECONDS + _STORE_SECONDS, ask)
    return silent


def claim_failure(words: str, may_be_consequence: bool = False) -> Failure:
    """Return the first failure of the run: this process's with `words`, unless another process failed before.

    Takes five seconds at most. If it `may_be_consequence` of another process's end, that is awaited shortly.
    """
    mine = Failure(int(os.environ.get("RANK", "0")), platform.node(), words[:_MESSAGE_CHARACTERS])
    if not _have_met():
        # All check their recipe at the same time, each by itself, so rank 0's message is enough.
        time.sleep(0.0 if mine.rank == 0 else _SIGN_SECONDS)
        return mine
    first = [mine]

    def claim() -> None:
        first[0], store = _UNKNOWN, own_store()
        with suppress(RuntimeError):
            if store is not None:
                deadline = time.monotonic() + 3 * _LOOK_SECONDS * may_be_consequence
                while time.monotonic() < deadline and not store.check([_FAILED]):
                    time.sleep(0.05)
                first[0] = Failure(*json.loads(store.compare_set(_FAILED, "", json.dumps(mine))))
                store.add(_KNOWING, 1)

    _within(_STORE_SECONDS, claim)
    if first[0] != mine and first[0].words != _KILLED:
        time.sleep(_SIGN_SECONDS)  # a launcher that sees this process end would cut the other's message off
    return first[0]


def stay_until_others_know() -> None:
    """Wait until every process knows of this one's failure, ten seconds at most, if this is rank 0.

    Rank 0 often keeps the store. Without it, a process that fails alike would print the same message again.
    """
    store = own_store() if os.environ.get("RANK", "0") == "0" else None
    deadline = time.monotonic() + _STAY_SECONDS
    with suppress(RuntimeError):  # a launcher's store, and the launcher is gone
        while store and store.add(_KNOWING, 0) < dist.get_world_size() and time.monotonic() < deadline:
            time.sleep(0.05)


def leave(failure: Failure) -> NoReturn:
    """End this process after another one has failed; rank 0 prints which."""
    if os.environ.get("RANK", "0") == "0":
        why = "was killed" if failure.words == _KILLED else "has failed; its message says why"
        print(f"flipscale: rank 0 ends too, as rank {failure.rank} on {failure.host} {why}", file=sys.stderr)
    end_process(1)


def close_process_group() -> None:
    """Collective. Wait at a barrier for all processes of a finished run, then destroy their process group."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def exit_now() -> None:
    """Exit at once with code 0 if this process is one of several.

    The interpreter's usual end aborts one launch in ten on a busy CPU, because gloo's threads still run. The launcher
    would report a failure.
    """
    if promised_processes(os.environ) > 1:
        end_process(0)


def end_process(code: int) -> NoReturn:
    """Kill the loader's workers and exit from any thread, without the interpreter's usual end."""
    for worker in multiprocessing.active_children():
        worker.kill()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the reader is gone
            stream.flush()
    os._exit(code)


def own_store() -> dist.Store | None:
    """Return its own connection to the store of the process group; None before the processes have met."""
    if not _have_met():
        return None
    try:
        return dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
    except RuntimeError:  # a store that cannot be cloned, or whose process is gone
        return None


def _have_met() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _within(seconds: float, ask: Callable[[], None]) -> None:
    """Run a function in a thread, and return at its end or after some seconds."""
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
