"""Log lines on stderr, and the one place that turns an error into a line and an exit code."""

import errno
import logging
import os
import platform
import re
import resource
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import flipscale
from flipscale.io.errors import UserError
from flipscale.io.streams import flush_or_drop, is_unread
from flipscale.io.surroundings import known, versions
from flipscale.io.urls import without_secrets
from flipscale.process.preemption import EndRequest, refuse_restart
from flipscale.process.state import safe_streams, silence_other_packages

# With this variable set, every error prints its traceback.
DEBUG = "FLIPSCALE_DEBUG"

# Shells use these exit codes after Ctrl-C and after a write to a pipe without a reader.
_INTERRUPTED, _BROKEN_PIPE = 130, 141
_PACKAGE = Path(__file__).parents[1]
if flipscale.__file__ is None:
    sys.exit("flipscale: error: this folder has a folder flipscale/, which hides the package; leave this folder")
# A longer message keeps its begin and, because the fix stands there, its end.
_MESSAGE_CHARACTERS, _END_CHARACTERS = 1_000, 300
_VERSIONS = ("torch", "transformers", "accelerate", "numpy", "huggingface_hub", "datasets", "deepspeed")
_EXTRAS = {"deepspeed": "'flipscale[deepspeed]'", "open_clip": "'flipscale[peers]'"}
_NO_MEMORY = re.compile("failed to map segment|an(no|')t allocate memory|can't start new thread", re.IGNORECASE)
_REMEDIES = {
    "MemoryError": "memory is exhausted; use smaller batches or fewer workers",
    "OutOfMemoryError": "memory is exhausted; use a smaller data.micro_batch_size, or smaller batches",
}


def start_logging() -> None:
    """Write the package's log lines to stderr, with the time and, in a run of several processes, the rank.

    Rank 0 logs from level INFO on, other ranks from WARNING on. Other packages are silent.
    """
    silence_other_packages()
    rank = _number("RANK", 0)
    place = f" rank {rank}:" if _number("WORLD_SIZE", 1) > 1 else ""
    package = logging.getLogger("flipscale")
    package.handlers = [_AboveTheBar()]
    package.handlers[0].setFormatter(logging.Formatter(f"%(asctime)s{place} %(level)s%(message)s", "%Y-%m-%d %H:%M:%S"))
    package.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    package.propagate = False


class _AboveTheBar(logging.Handler):
    """Writes lines above the progress bar, which they would tear otherwise."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm  # `flipscale --help` imports this module and needs no bar

        record.level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        tqdm.write(self.format(record), file=sys.stderr)


@dataclass
class ErrorReport:
    """The run directory that receives the traceback of an unexpected error; None is the folder for temporary files."""

    run_dir: Path | None = None


class _Ending(NamedTuple):
    """The end of a command.

    Args:
        line: line for stderr; empty if nobody reads it.
        is_consequence: whether the failure of another process may have caused the error.
        is_expected: whether the line says all that its reader needs; otherwise the traceback is kept.
    """

    line: str
    code: int
    is_consequence: bool = False
    is_expected: bool = True


@contextmanager
def report_user_errors() -> Iterator[ErrorReport]:
    """Turn any error into one line on stderr and an exit code.

    | error | exit code |
    |---|---|
    | UserError | 2; a batch script does not start again |
    | OSError, FloatingPointError | 1 |
    | any other error | 1; the line names the file with the traceback |
    | Ctrl-C | 130 |
    | stdout is a pipe without a reader, as in `flipscale status RUN \\| head` | 141, without a line |
    | SIGTERM, SIGUSR1, SIGHUP, unless the command handles them | 128 and the signal's number |

    A process of several exits without unwinding, because that might wait for the other processes, which wait for this
    one. If several processes fail with the same line, one of them prints it.
    """
    report = ErrorReport()
    threading.excepthook = lambda failed: _log_thread_failure(failed, report)
    # Errors of objects under destruction can neither be caught nor mended.
    sys.unraisablehook = sys.__unraisablehook__ if _is_debugging() else lambda unraisable: None
    with safe_streams():
        try:
            with EndRequest():
                try:
                    yield report
                except SystemExit as ended:
                    if not ended.code:  # `--help`
                        sys.stdout.flush()
                    raise
                sys.stdout.flush()
        except SystemExit:
            raise
        except BaseException as error:
            _leave(_ending_of(error, report.run_dir), error, report)


@contextmanager
def only_describes(piece: str | Path, run_dir: Path, command: Sequence[str] = ()) -> Iterator[None]:
    """Turn any error into one warning, for a piece that only describes a run. The run and its next pieces go on.
    The run directory receives the traceback of an unexpected error; `command` makes the piece later."""
    try:
        yield
    except Exception as error:  # fonts, plugins and pictures can raise anything
        reason = _one_line(str(error))
        if not isinstance(error, (UserError, OSError)):
            reason = f"{_description(error)}; {_keep_traceback(error, ErrorReport(run_dir))}"
        retry = f"; to write it: {shlex.join(command)}" if command else ""
        message = "%s was not written (%s); training is not affected%s"
        logging.getLogger(__name__).warning(message, piece, reason, retry)


def _ending_of(error: BaseException, run_dir: Path | None) -> _Ending:
    if isinstance(error, KeyboardInterrupt):
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends at once
        return _Ending("flipscale: error: interrupted", _INTERRUPTED)
    if isinstance(error, OSError) and is_unread(sys.stdout):
        return _Ending("", _BROKEN_PIPE, is_consequence=True)
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and (
        isinstance(error, MemoryError | SystemError) or _NO_MEMORY.search(str(error))
    ):
        words = f"the shell's memory limit of {limit / 1e9:.1f} GB is too small ({_one_line(str(error))})"
        return _Ending(f"flipscale: error: {words}; start after: ulimit -v unlimited", 1)
    # `flipscale.model` also runs without flipscale, so it raises ValueError in place of UserError.
    place = Path(traceback.extract_tb(error.__traceback__)[-1].filename).parent
    is_user_error = isinstance(error, UserError) or (isinstance(error, ValueError) and place == _PACKAGE / "model")
    if not is_user_error and not isinstance(error, (OSError, FloatingPointError)):
        # torch raises such an error when another process is gone.
        return _Ending(f"flipscale: error: {_description(error)}", 1, is_consequence=True, is_expected=False)
    words = str(error)
    if run_dir is not None and isinstance(error, FileNotFoundError) and not run_dir.exists():
        words = f"{run_dir} was removed or renamed during the run ({error}); put it back, and start the run again"
    elif run_dir is not None and isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        words = (
            f"the disk of {run_dir} is full ({error}); its checkpoints are whole: free some space and start the run "
            "again"
        )
    return _Ending(f"flipscale: error: {_one_line(words)}", 2 if is_user_error else 1)


def _description(error: BaseException) -> str:
    frames = list(traceback.extract_tb(error.__traceback__))
    frames = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)] or frames
    place = f", in {'/'.join(Path(frames[-1].filename).parts[-3:])} line {frames[-1].lineno}" if frames else ""
    name, message = type(error).__name__, _one_line(str(error))
    remedy = f"; {_REMEDIES[name]}" if name in _REMEDIES else ""
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        remedy = f"; pip install {_EXTRAS.get(package, package)}"
    return f"{name}{': ' if message else ''}{message}{place}{remedy}"


def _keep_traceback(error: BaseException, report: ErrorReport) -> str:
    rank = _number("RANK", 0)
    packages = {"flipscale": flipscale.__version__, **versions(_VERSIONS)}
    text = "".join(f"{package} {version}\n" for package, version in packages.items())
    text += (
        f"Python {platform.python_version()}, {known(platform.platform)}\n"
        f"rank {rank} of {_number('WORLD_SIZE', 1)} on {platform.node()}\n"
        f"folder: {known(os.getcwd)}\ncommand: {shlex.join(sys.argv)}\n\n{''.join(traceback.format_exception(error))}"
    )
    try:
        folder = tempfile.gettempdir()
        if report.run_dir is not None and report.run_dir.is_dir():
            folder = str(report.run_dir / "errors")
            os.makedirs(folder, exist_ok=True)
        name = f"flipscale-{time.strftime('%Y%m%d-%H%M%S')}-rank-{rank}-"
        descriptor, file = tempfile.mkstemp(".txt", name, folder)
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as opened:
            opened.write(without_secrets(text))
    except OSError as failed:
        return f"its traceback could not be written ({_one_line(str(failed))}); {DEBUG}=1 prints it"
    return f"its traceback is in {file}"


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    if len(text) > _MESSAGE_CHARACTERS:
        text = f"{text[: _MESSAGE_CHARACTERS - _END_CHARACTERS]} ... {text[-_END_CHARACTERS:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _leave(ending: _Ending, error: BaseException, report: ErrorReport) -> NoReturn:
    def show() -> None:
        if _is_debugging():
            traceback.print_exception(error)
        if ending.line:
            line = ending.line if ending.is_expected else f"{ending.line}; {_keep_traceback(error, report)}"
            print(line, file=sys.stderr, flush=True)

    if ending.code == 2:
        with suppress(OSError):
            refuse_restart()
    flush_or_drop(sys.stdout)
    if _number("WORLD_SIZE", 1) <= 1:
        show()
        flush_or_drop(sys.stderr)
        sys.exit(ending.code)
    # Imports torch, which `--help` does not need.
    from flipscale.process.watchdog import claim_failure, end_process, leave, stay_until_others_know

    # After the failure of another process, only another and independent error is printed.
    first = claim_failure(ending.line, ending.is_consequence)
    if first.rank == _number("RANK", 0) or not (ending.is_consequence or first.words == ending.line):
        show()
        stay_until_others_know()
    elif ending.is_consequence:
        leave(first)
    end_process(ending.code)


def _is_debugging() -> bool:
    return os.environ.get(DEBUG, "0") not in ("", "0")


def _number(name: str, default: int) -> int:
    """Return a launcher's variable, or the default if it is not a number, which `launch_of` refuses later."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def _log_thread_failure(failed: threading.ExceptHookArgs, report: ErrorReport) -> None:
    if failed.exc_value is not None and not isinstance(failed.exc_value, SystemExit):
        thread = failed.thread.name if failed.thread else "unknown"
        words = f"{_description(failed.exc_value)}; {_keep_traceback(failed.exc_value, report)}"
        logging.getLogger(__name__).warning("thread %s ended: %s", thread, words)
