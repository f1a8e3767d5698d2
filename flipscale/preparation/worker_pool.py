"""Worker processes for preparing data sets."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any


@contextmanager
def worker_pool(
    processes: int,
    initializer: Callable[..., None] | None = None,
    initargs: tuple[Any, ...] = (),
    remedy: str = "run the same command again",
) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of spawned processes that end when this one does, even if it is killed.

    After an exception they end at once, with what they do and what waits for them.

    Args:
        remedy: what to do if a worker dies.

    Raises:
        OSError: a worker died.
    """
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, spawn, initializer=_begin, initargs=(initializer, initargs))
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


def _begin(initializer: Callable[..., None] | None, initargs: tuple[Any, ...]) -> None:
    # Of Ctrl-C, which all processes of a terminal get, the parent tells.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    if initializer is not None:
        initializer(*initargs)


def end_with_parent() -> None:
    """Make this worker exit when its parent dies; otherwise it would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
