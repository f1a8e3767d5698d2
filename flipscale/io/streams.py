"""Streams that escape control characters and survive closed or full files, without other packages' progress bars."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from flipscale.io.text_table import escape_controls
from flipscale.io.urls import without_secrets

# Progress bars move the cursor by these.
_MOVES = re.compile(r"\n*(\x1b\[A)*")


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


class SafeStream:
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
