"""Child processes whose parent ends."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event

import psutil
import pytest
from processes import wait_for

from flipscale.data.loader import loader_of, set_up_worker, start_workers
from flipscale.io.cores import end_with_parent


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def parent(settle: Callable[[], object], ready: Connection) -> None:
    def child() -> None:
        settle()
        ready.send(os.getpid())
        signal.pause()

    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    multiprocessing.get_context("fork").Process(target=child).start()
    signal.pause()


@pytest.mark.parametrize("settle", [end_with_parent, lambda: set_up_worker(0)], ids=["pool", "loader"])
def test_a_suspended_child_ends_with_its_killed_parent(settle: Callable[[], object]) -> None:
    receiving, ready = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=parent, args=(settle, ready), daemon=True)
    process.start()
    child = receiving.recv()
    os.kill(child, signal.SIGSTOP)
    wait_for(lambda: psutil.Process(child).status() == psutil.STATUS_STOPPED)
    process.kill()
    wait_for(lambda: is_gone(child))


def test_a_suspended_worker_ends_with_its_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # torch's wait for a worker
    batches = start_workers(loader_of([1, 2, 3, 4], [[0], [1], [2], [3]], num_workers=1))  # type: ignore[arg-type]
    next(batches)
    (worker,) = batches._workers  # type: ignore[attr-defined]
    os.kill(worker.pid, signal.SIGSTOP)
    wait_for(lambda: psutil.Process(worker.pid).status() == psutil.STATUS_STOPPED)
    batches._shutdown_workers()  # type: ignore[attr-defined]
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_the_end_of_a_loader_waits_for_no_lock_of_a_suspended_worker(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flipscale.data.loader.worker_context", lambda: method)
    context = loader_of([], [], num_workers=1).multiprocessing_context  # type: ignore[arg-type]
    for _ in range(20):  # half of the time, a worker that does nothing else would hold the lock
        event = context.Event()
        worker = context.Process(target=read_until_set, args=(event,), daemon=True)
        worker.start()
        time.sleep(0.01)
        os.kill(worker.pid, signal.SIGSTOP)
        wait_for(lambda pid=worker.pid: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
        ending = threading.Thread(target=event.set, daemon=True)
        ending.start()
        ending.join(20)
        waits = ending.is_alive()
        os.kill(worker.pid, signal.SIGCONT)
        worker.join(60)
        assert not waits
        assert worker.exitcode == 0


def read_until_set(event: Event) -> None:
    while not event.is_set():
        pass
