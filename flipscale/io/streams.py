"""Standard output and error that escape control characters and survive closed or full streams."""

import os
import re
import sys
from contextlib import suppress
from typing import Any

from flipscale.io.text_table import escape_controls

# Progress bars move the cursor by these, so they stay as they are.
_MOVES = re.compile(r"\n*(\x1b\[A)*")


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
    sys.stdout = _EscapedStream(sys.stdout)  # type: ignore[assignment]
    sys.stderr = _OptionalStream(sys.stderr)  # type: ignore[assignment]


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


class _EscapedStream:
    """A stream that escapes control characters. `flush` repeats an error of `write`, because argparse ignores it."""

    def __init__(self, stream: Any):
        self._stream = stream
        self._error: OSError | None = None

    def write(self, text: str) -> int:
        try:
            self._stream.write(escape_controls(text))
        except OSError as error:
            self._error = error
            raise
        return len(text)

    def flush(self) -> None:
        self._stream.flush()
        if self._error is not None:
            raise self._error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _OptionalStream:
    """A stream that drops lines that it cannot write: a lost log line must not end a run."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        # Progress bars rewrite their line by a carriage return.
        shown = text if _MOVES.fullmatch(text) else "\r".join(map(escape_controls, text.split("\r")))
        with suppress(OSError, ValueError):
            self._stream.write(shown)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
