"""Standard output and error that escape control characters and survive closed or full streams, without the warnings and
progress bars of other packages."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from flipscale.io.text_table import escape_controls
from flipscale.io.urls import without_secrets

# Progress bars move the cursor by these.
_MOVES = re.compile(r"\n*(\x1b\[A)*")


def use_utf8() -> None:
    """Start this command anew in Python's UTF-8 mode if the locale has another encoding.

    Python would take names of files and words of the command line for other characters, and could not open files that
    a UTF-8 text names.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def open_streams() -> None:
    """Make stdout and stderr safe for any text: file names and captions may hold control characters.

    A closed stream becomes /dev/null; otherwise the next opened file would get its number.
    """
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            try:
                os.fstat(descriptor)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is `descriptor`
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout = _SafeStream(sys.stdout, is_optional=False)  # type: ignore[assignment]
    sys.stderr = _SafeStream(sys.stderr, is_optional=True)  # type: ignore[assignment]


def flush_or_drop(stream: Any) -> None:
    """Flush a stream, or drop its buffer, because the interpreter would complain about it at exit."""
    with suppress(OSError, ValueError):
        stream.flush()
        return
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        stream.flush()


def is_unread(stream: Any) -> bool:
    """Return whether the stream is a pipe without a reader."""
    try:
        stream.flush()
    except BrokenPipeError:
        return True
    except (OSError, ValueError):
        return False
    return False


class _SafeStream:
    """A stream that escapes control characters, and hides secrets of URLs.

    Args:
        is_optional: whether lost lines are harmless, as in a log. Else `flush` repeats errors that argparse ignores.
    """

    def __init__(self, stream: Any, is_optional: bool):
        self._stream, self._is_optional = stream, is_optional
        self._ignored = (OSError, ValueError) if is_optional else ()
        self._error: OSError | None = None

    def write(self, text: str) -> int:
        public = without_secrets(text)
        shown = escape_controls(public)
        if self._is_optional:  # progress bars move up by lines, and rewrite theirs by a carriage return
            shown = public if _MOVES.fullmatch(public) else "\r".join(map(escape_controls, public.split("\r")))
        with suppress(*self._ignored):
            try:
                self._stream.write(shown)
            except OSError as error:
                self._error = error
                raise
        return len(text)

    def flush(self) -> None:
        with suppress(*self._ignored):
            self._stream.flush()
            if self._error is not None:
                raise self._error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def silence_other_packages() -> None:
    """Hide other packages' warnings in this process and its children. Errors stay, and `python -W` overrides this."""
    if sys.warnoptions not in ([], ["ignore"]):  # "ignore" comes from a parent that called this function
        return
    warnings.simplefilter("ignore")
    os.environ["PYTHONWARNINGS"] = "ignore"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    # A filter, because DeepSpeed sets its logger's level when it is imported later.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide the progress bars of transformers in a `with` block."""
    from transformers.utils import logging as transformers_logging  # slow to import, and `flipscale --help` needs none

    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()
