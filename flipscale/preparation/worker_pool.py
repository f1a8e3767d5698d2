"""Worker processes that prepare data."""

import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from flipscale.io.cores import end_with_parent

_shared: Any = None


def shared() -> Any:
    """Return the value that the pool of this worker was opened with."""
    return _shared


@contextmanager
def worker_pool(
    processes: int, value: Any = None, remedy: str = "run the same command again"
) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of spawned processes that end with this process, even if it is killed. After an exception they end
    at once. Raise OSError, with the remedy, if one died. Each worker gets `value` once; its tasks call `shared`."""
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, spawn, initializer=_begin, initargs=(value,))
    try:
        yield pool
    except BaseException as error:
        for worker in list((pool._processes or {}).values()):
            worker.kill()
        if isinstance(error, BrokenProcessPool):
            raise OSError(f"a worker died (killed, or out of memory); {remedy}") from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(value: Any) -> None:
    global _shared
    _shared = value
    # The parent reports Ctrl-C, which all processes of a terminal receive.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
