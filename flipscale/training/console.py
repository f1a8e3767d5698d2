"""What a process says on the terminal: log lines with time and rank, and a user's mistake as one line."""

import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

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

    A process of several exits at once, with 1 also after any other error and its traceback, without unwinding: that
    might wait for the other processes, which wait for this one. What several of them have to say is said once.
    """
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        words = f"flipscale: error: {' '.join(str(error).split())}"
        code = 2 if isinstance(error, ValueError) else 1
        if code == 2:
            refuse_restart()
        if not _is_one_of_several():
            print(words, file=sys.stderr)
            sys.exit(code)
        _exit_at_once(words, code, is_telling=True)
    except Exception as error:
        if not _is_one_of_several():
            raise
        # Our mistake, or torch's error about another process that is gone.
        _exit_at_once("".join(traceback.format_exception(error)), 1, is_telling=False)


def _is_one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _exit_at_once(words: str, code: int, is_telling: bool) -> NoReturn:
    """Print `words` and exit. After another process's failure, print them only if they are others and `is_telling`."""
    # Imports torch, which `--help` has no need of.
    from flipscale.engines.start import claim_failure, end_process, leave, stay_until_others_know

    first = claim_failure(words)
    if first.rank == int(os.environ.get("RANK", "0")) or (is_telling and first.words != words):
        print(words, file=sys.stderr, flush=True)
        stay_until_others_know()
        end_process(code)
    if is_telling:
        end_process(code)
    leave(first)
