"""Worker processes that prepare data."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from flipscale.io.processes import end_with_parent


@contextmanager
def worker_pool(
    processes: int,
    initializer: Callable[..., None] | None = None,
    initargs: tuple[Any, ...] = (),
    remedy: str = "run the same command again",
) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of spawned processes that end with this process, even if it is killed. After an exception they end
    at once. Raise OSError, with the remedy, if one died."""
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
    # The parent reports Ctrl-C, which all processes of a terminal receive.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    if initializer is not None:
        initializer(*initargs)
