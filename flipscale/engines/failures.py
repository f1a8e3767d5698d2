"""The end of a run's processes: one failure ends all within seconds, and one process prints it.

It works under any launcher, because the processes talk through the store in which torch's process group met.
"""

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
from typing import NamedTuple, NoReturn

import torch.distributed as dist

from flipscale.engines.launch import promised_processes, whole_number
from flipscale.io.lock import machine, start_of

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
_LATER_SECONDS = 2.0
# Rank 0 often keeps the store, so it stays until all know of the failure, but no longer than this.
_STAY_SECONDS = 10.0


class Failure(NamedTuple):
    """A failed process and its message."""

    rank: int
    host: str
    words: str


# The failure of a process that took the store with it.
_UNKNOWN = Failure(0, "the first host", "")


def claim_failure(words: str, may_be_consequence: bool = False) -> Failure:
    """Return the first failure of the run: this process's with `words`, unless another process failed before.

    Takes five seconds at most. If it `may_be_consequence` of another process's end, that is awaited shortly.
    """
    mine = Failure(int(os.environ.get("RANK", "0")), platform.node(), words[:_MESSAGE_CHARACTERS])
    if not _have_met():
        # All check their recipe at the same time, each by itself, so rank 0's message is enough.
        time.sleep(0.0 if mine.rank == 0 else _LATER_SECONDS)
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
        time.sleep(_LATER_SECONDS)  # a launcher that sees this process end would cut the other's message off
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


class OtherProcesses:
    """Ends this process soon after another one has failed, and counts the others' signs of life.

    This process may be stuck behind a GPU, or in work that needs no other process. Its launcher would ask it to end by
    SIGTERM, which is a request to save, and kill it half a minute later.

    Attributes:
        signs: number of this process's signs of life.
        heard: number of the others' signs of life.
    """

    def __init__(self) -> None:
        self.signs = 0
        self.heard = 0
        self._finished = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self) -> None:
        """Begin, if there are other processes and they have met."""
        store = own_store()
        if store is not None:
            # Now and not in the thread, because the first step may kill this process.
            neighbours = _Neighbours(store)
            self._thread = threading.Thread(
                target=self._look, args=(store, neighbours), name="other processes", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """End. All processes do so before any of them leaves the group."""
        self._finished.set()
        if self._thread is not None:
            self._thread.join(timeout=1.0)

    def silent_ranks(self) -> list[int]:
        """Return the ranks that do not look at the store any more: stopped processes, or machines that are gone.

        Takes nine seconds at most. Without an answer of the store, its keeper, rank 0, is silent.
        """
        silent = [0] if _have_met() else []

        def ask() -> None:
            store = own_store()
            if store is None:
                return
            with suppress(RuntimeError):
                before = [store.add(_LOOKS.format(rank), 0) for rank in range(dist.get_world_size())]
                time.sleep(3 * _LATER_SECONDS)
                silent[:] = [rank for rank, looks in enumerate(before) if store.add(_LOOKS.format(rank), 0) == looks]

        _within(3 * _LATER_SECONDS + _STORE_SECONDS, ask)
        return silent

    def _look(self, store: dist.Store, neighbours: "_Neighbours") -> None:
        given = 0
        for look in itertools.count():
            if self._finished.wait(_LOOK_SECONDS):
                return
            try:
                if look % int(_LATER_SECONDS / _LOOK_SECONDS) == 0:
                    store.add(_LOOKS.format(dist.get_rank()), 1)
                    news = self.signs - given
                    given += news
                    self.heard = store.add(_SIGNS, news) - given
                neighbours.claim_killed()
                if not store.check([_FAILED]):
                    continue
                failure = Failure(*json.loads(store.get(_FAILED)))
            except RuntimeError:
                failure = _UNKNOWN
            # Its message first. Meanwhile this process may fail alike, and must find the failure in the store.
            if not self._finished.wait(0.0 if failure.words == _KILLED else _LATER_SECONDS):
                with suppress(RuntimeError):
                    store.add(_KNOWING, 1)
                leave(failure)


class _Neighbours:
    """The other processes of this launcher, whose end this process sees before any collective fails or any launcher
    acts. On GPUs, collectives do not fail: they wait."""

    def __init__(self, store: dist.Store):
        self._store, rank = store, dist.get_rank()
        first = rank - whole_number(os.environ, "LOCAL_RANK", 0)
        self._unknown = {*range(first, first + whole_number(os.environ, "LOCAL_WORLD_SIZE", 1))} - {rank}
        self._started: dict[int, tuple[int, str]] = {}
        store.set(_PROCESS.format(rank), json.dumps([machine(), os.getpid(), start_of(os.getpid())]))

    def claim_killed(self) -> None:
        """Claim the failure of a process that was killed."""
        for rank in [rank for rank in self._unknown if self._store.check([_PROCESS.format(rank)])]:
            self._unknown.remove(rank)
            place, pid, started = json.loads(self._store.get(_PROCESS.format(rank)))
            if place == machine():
                self._started[rank] = pid, started
        for rank, (pid, started) in self._started.items():
            if start_of(pid) != started:
                self._store.compare_set(_FAILED, "", json.dumps(Failure(rank, platform.node(), _KILLED)))


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

    Unwinding the interpreter beside gloo's threads aborts one launch in ten on a busy CPU, which looks like a failure.
    """
    if promised_processes(os.environ) > 1:
        end_process(0)


def end_process(code: int) -> NoReturn:
    """Kill the loader's workers and exit, from any thread, without unwinding the interpreter."""
    for worker in multiprocessing.active_children():
        worker.kill()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the reader is gone
            stream.flush()
    os._exit(code)


def own_store() -> dist.Store | None:
    """Return a connection of its own to the store of the process group; None before the processes have met."""
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
