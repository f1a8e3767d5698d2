"""What a process says on the terminal: log lines with time and rank, and why a command failed, in one line."""

import importlib.metadata
import logging
import os
import platform
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import flipscale
from flipscale.io.streams import is_unread, open_streams, write_or_drop
from flipscale.training.preemption import EndRequest, refuse_restart
from flipscale.training.report.quiet import silence_other_packages

# Prints the traceback of any error, too.
DEBUG = "FLIPSCALE_DEBUG"

# What shells say of a process that Ctrl-C ended, and of one that wrote to a pipe that nobody reads.
_INTERRUPTED, _BROKEN_PIPE = 130, 141
_LONGEST_WORDS = 1_000
# Of a message that is longer; its end says what to do.
_LAST_WORDS = 300
_BEGIN = "Traceback (most recent call last)"
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in \S+\n(?: {4}(.*))?')
_VERSIONS = ("torch", "transformers", "accelerate", "numpy", "huggingface_hub", "datasets", "deepspeed")
# What helps against errors that are neither flipscale's nor the operating system's, by the name of their class.
_LIMITS = "the limits of this machine on processes or memory are too low; see `ulimit -u` and `ulimit -v`"
_REMEDIES = {
    "MemoryError": "the memory did not suffice; use smaller batches or fewer workers",
    "OutOfMemoryError": "the memory did not suffice; use a smaller batch_size or data.micro_batch_size",
    "UnicodeEncodeError": "the locale has no such letters; set PYTHONUTF8=1 in the environment",
    "RecursionError": "something in what it read is nested too deep",
}
# The packages of modules that have another name, or versions that were tried.
_PACKAGES = {
    **{name: f"'flipscale[{extra}]'" for name, extra in (("deepspeed", "deepspeed"), ("open_clip", "peers"))},
    **{"cv2": "opencv-python-headless", "PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn"},
}


def start_logging() -> None:
    """Have the package's loggers write to stderr, with the time in front, and this process's rank if it is one of
    several; other packages' are silent.

    The first process writes what its loggers call info, every process its warnings.
    """
    silence_other_packages()
    rank = _number("RANK", 0)
    place = f" rank {rank}:" if _number("WORLD_SIZE", 1) > 1 else ""
    package = logging.getLogger("flipscale")
    package.handlers = [_AboveTheBar()]
    package.handlers[0].setFormatter(_Formatter(f"%(asctime)s{place} %(level)s%(message)s", "%Y-%m-%d %H:%M:%S"))
    package.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    package.propagate = False


class _AboveTheBar(logging.Handler):
    """Writes lines above the progress bar, which would otherwise be torn."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm  # not needed by `flipscale --help`, which imports this module

        tqdm.write(self.format(record), file=sys.stderr)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        record.level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return super().format(record)


@dataclass
class LastResort:
    """What a command knows by the time that it fails.

    Args:
        folder: of its run, where the traceback of what nobody foresaw is written if it is there; None for the folder of
            temporary files.
    """

    folder: Path | None = None


class _End(NamedTuple):
    """How a command ends.

    Args:
        words: the sentence, nothing where there is nobody to read it.
        code: the exit code.
        is_telling: it says more than that another process has gone.
        is_foreseen: the sentence says all that its reader needs.
    """

    words: str
    code: int
    is_telling: bool = True
    is_foreseen: bool = True


@contextmanager
def report_user_errors() -> Iterator[LastResort]:
    """Turn any error into one line on stderr and an exit code; with `FLIPSCALE_DEBUG=1` print its traceback, too.

    A ValueError that flipscale raised exits with 2: the user must change something, and the batch script, if there is
    one, is told not to start again. An OSError or FloatingPointError that flipscale raised exits with 1. So does any
    other error, which nobody foresaw: the line names the file that its traceback was written to. Ctrl-C exits with 130,
    a pipe that nobody reads any more (`flipscale status | head`) with 141 and no word.

    A process of several exits at once, without unwinding: that might wait for the other processes, which wait for this
    one. What several of them have to say is said once. SIGTERM, SIGUSR1 and SIGHUP end it with a sentence, too, unless
    the command does otherwise, and with 128 and their number.
    """
    before, resort = (sys.stdout, sys.stderr), LastResort()
    open_streams()
    threading.excepthook = lambda failed: _warn_of_a_thread(failed, resort)
    sys.unraisablehook = _ignore
    try:
        with _told_of_signals(), _all_printed():
            yield resort
    except SystemExit:
        raise
    except BaseException as error:
        if isinstance(error, OSError) and is_unread(sys.stdout):
            end = _End("", _BROKEN_PIPE, is_telling=False)
        else:
            end = _end_of(error)
        _leave(end, error, resort)
    finally:
        sys.stdout, sys.stderr = before


def _told_of_signals() -> AbstractContextManager[object]:
    return EndRequest() if threading.current_thread() is threading.main_thread() else nullcontext()


@contextmanager
def _all_printed() -> Iterator[None]:
    """Write what waits to be printed, also after `--help`, which exits.

    Raises:
        OSError: it cannot be written.
    """
    try:
        yield
    except SystemExit as ended:
        if not ended.code:
            sys.stdout.flush()
        raise
    sys.stdout.flush()


def _end_of(error: BaseException) -> _End:
    if isinstance(error, KeyboardInterrupt):
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends at once
        return _End("flipscale: error: interrupted", _INTERRUPTED)
    if isinstance(error, (ValueError, OSError, FloatingPointError)) and _is_foreseen(error):
        words = f"flipscale: error: {_one_line(_worker_s_words(error))}"
        return _End(words, 2 if isinstance(error, ValueError) else 1)
    # The operating system's errors are others' business; the rest may be torch's error about a process that is gone.
    return _End(f"flipscale: error: {_unforeseen(error)}", 1, isinstance(error, OSError), is_foreseen=False)


def _traceback_of(error: BaseException) -> str:
    """Return the traceback of an error, where it was raised first: in a worker process, which sends it as text."""
    for text in (str(error), str(error.__cause__)):
        if _BEGIN in text:
            return text
    return "".join(traceback.format_tb(error.__traceback__))


def _is_foreseen(error: BaseException) -> bool:
    """Return whether a `raise` of flipscale's raised an error, and thus wrote a sentence for it."""
    frames = _FRAME.findall(_traceback_of(error))
    return bool(frames) and _is_ours(frames[-1][0]) and frames[-1][2].startswith("raise ")


def _is_ours(file: str) -> bool:
    return file.startswith(f"{Path(flipscale.__file__).parent}{os.sep}")


def _worker_s_words(error: BaseException) -> str:
    """Return the message of an error, without the traceback of a loader's worker that torch puts into it."""
    text = str(error)
    if _BEGIN not in text:
        return text
    return re.sub(r"^[\w.]+: ", "", re.split(r"\n(?=\S)", text.partition(_BEGIN)[2], maxsplit=1)[-1])


def _unforeseen(error: BaseException) -> str:
    """Return a sentence for an error that has none: its kind, text and place, and what helps."""
    frames = _FRAME.findall(_traceback_of(error))
    frames = [frame for frame in frames if _is_ours(frame[0])] or frames
    place = f", in {'/'.join(Path(frames[-1][0]).parts[-3:])} line {frames[-1][1]}" if frames else ""
    words = _one_line(_worker_s_words(error))
    kinds = [kind.__name__ for kind in type(error).__mro__]
    remedy = next((f"; {_REMEDIES[kind]}" for kind in kinds if kind in _REMEDIES), "")
    if "can't start new thread" in words:
        remedy = f"; {_LIMITS}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        module = error.name.partition(".")[0]
        remedy = f"; pip install {_PACKAGES.get(module, module)}"
    return f"{kinds[0]}{': ' if words else ''}{words}{place}{remedy}"


def _kept(error: BaseException, resort: LastResort) -> str:
    """Write an error's traceback with versions and command to a file, and say which."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-rank-{_number('RANK', 0)}-"
    text = "".join([*_circumstances(), *traceback.format_exception(error)])
    try:
        folder = tempfile.gettempdir()
        if resort.folder is not None and resort.folder.is_dir():
            folder = str(resort.folder / "errors")
            os.makedirs(folder, exist_ok=True)
        descriptor, file = tempfile.mkstemp(".txt", f"flipscale-{name}", folder)
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as written:
            written.write(text)
    except OSError as failed:
        return f"its traceback could not be written ({_one_line(str(failed))}); {DEBUG}=1 prints it"
    return f"its traceback is in {file}"


def _circumstances() -> Iterator[str]:
    """Yield lines for a report: the command and where it ran, and the versions of what it ran on."""
    yield f"command: {shlex.join(sys.argv)}\nfolder: {os.getcwd()}\n"
    yield f"rank: {_number('RANK', 0)} of {_number('WORLD_SIZE', 1)} on {platform.node()}\n"
    yield f"flipscale {flipscale.__version__}, Python {platform.python_version()}, {platform.platform()}\n"
    for package in _VERSIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            yield f"{package} {importlib.metadata.version(package)}\n"
    yield "\n"


def _one_line(text: str) -> str:
    """Return a text of any length and any characters as one line that a terminal can show."""
    text = " ".join(text.split())
    if len(text) > _LONGEST_WORDS:
        text = f"{text[: _LONGEST_WORDS - _LAST_WORDS]} ... {text[-_LAST_WORDS:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _leave(end: _End, error: BaseException, resort: LastResort) -> NoReturn:
    if end.code == 2:
        with suppress(OSError):
            refuse_restart()
    write_or_drop(sys.stdout)
    if _number("WORLD_SIZE", 1) > 1:
        _exit_at_once(end, error, resort)
    _tell(end, error, resort)
    write_or_drop(sys.stderr)
    sys.exit(end.code)


def _exit_at_once(end: _End, error: BaseException, resort: LastResort) -> NoReturn:
    """Say why and exit. After another process's failure, say it only if it is something else and telling."""
    # Imports torch, which `--help` has no need of.
    from flipscale.engines.start import claim_failure, end_process, leave, stay_until_others_know

    first = claim_failure(end.words)
    if first.rank == _number("RANK", 0) or (end.is_telling and first.words != end.words):
        _tell(end, error, resort)
        stay_until_others_know()
        end_process(end.code)
    if end.is_telling:
        end_process(end.code)
    leave(first)


def _tell(end: _End, error: BaseException, resort: LastResort) -> None:
    if _is_debugging():
        traceback.print_exception(error)
    if end.words:
        print(end.words if end.is_foreseen else f"{end.words}; {_kept(error, resort)}", file=sys.stderr, flush=True)


def _is_debugging() -> bool:
    return os.environ.get(DEBUG, "0") not in ("", "0")


def _number(name: str, default: int) -> int:
    """Return a launcher's variable; the default if it is no number, which `launch_of` complains of."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def _warn_of_a_thread(failed: threading.ExceptHookArgs, resort: LastResort) -> None:
    """Say in one line that a thread has failed; the command goes on."""
    if failed.exc_value is not None and not isinstance(failed.exc_value, SystemExit):
        thread = failed.thread.name if failed.thread else "one"
        words = f"{_unforeseen(failed.exc_value)}; {_kept(failed.exc_value, resort)}"
        logging.getLogger(__name__).warning("thread %s ended: %s", thread, words)


def _ignore(unraisable: Any) -> None:
    """Pass over an error of something that is being destroyed, which can neither be caught nor mended."""
    if _is_debugging():
        sys.__unraisablehook__(unraisable)
