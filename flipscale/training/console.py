"""What a process says on the terminal: log lines with time and rank, and a user's mistake as one line."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from flipscale.training.preemption import refuse_restart


def start_logging() -> None:
    """Have the package's loggers write to stderr, with the time and this process's rank in front.

    The first process writes what its loggers call info, every process its warnings.
    """
    rank = int(os.environ.get("RANK", "0"))
    package = logging.getLogger("flipscale")
    package.handlers = [_AboveTheBar()]
    package.handlers[0].setFormatter(_Formatter(f"%(asctime)s rank {rank}: %(message)s", "%Y-%m-%d %H:%M:%S"))
    package.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    package.propagate = False


class _AboveTheBar(logging.Handler):
    """Writes lines above the progress bar, which would otherwise be torn."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm  # not needed by `flipscale --help`, which imports this module

        tqdm.write(self.format(record), file=sys.stderr)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        return line if record.levelno == logging.INFO else line.replace(": ", f": {record.levelname.lower()}: ", 1)


@contextmanager
def report_user_errors() -> Iterator[None]:
    """Print a ValueError as one line and exit with 2, an OSError or FloatingPointError with 1.

    After a ValueError the batch script, if there is one, is told not to start again: the user must change something.
    """
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"flipscale: error: {' '.join(str(error).split())}", file=sys.stderr)
        if isinstance(error, ValueError):
            refuse_restart()
        sys.exit(2 if isinstance(error, ValueError) else 1)
