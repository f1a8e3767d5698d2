"""The end of child processes with their parent."""

import ctypes
import multiprocessing
import os
import signal
from contextlib import suppress

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Let the kernel kill this process when the thread that started it ends, even if this process is suspended."""
    with suppress(OSError, AttributeError):  # a system without prctl
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it ended before the call
        os._exit(1)
