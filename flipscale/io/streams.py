"""Standard output and error, for anything that is printed: to a terminal, a pipe, a full disk or nowhere."""

import os
import re
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from flipscale.io.text_table import visible

# What a progress bar writes to move to another's line.
_MOVES = re.compile(r"\n*(\x1b\[A)*")


def open_streams() -> None:
    """Let anything be printed: in any locale, and to streams that are closed, full, or that nobody reads.

    A stream that is closed becomes /dev/null. Otherwise the next file that is opened would get its number, and what
    libraries print.
    """
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            try:
                os.fstat(descriptor)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout = _Visible(sys.stdout)  # type: ignore[assignment]
    sys.stderr = _Careless(sys.stderr)  # type: ignore[assignment]


def write_or_drop(stream: Any) -> None:
    """Write what waits to be printed, or drop it: the interpreter would complain of it at its end."""
    with suppress(OSError, ValueError):
        stream.flush()
        return
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        stream.flush()


def is_unread(stream: Any) -> bool:
    """Return whether a stream is a pipe whose reader is gone."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(events & select.POLLERR for _, events in poll.poll(0))
    except (OSError, ValueError):  # a stream of a test's, or closed
        return False


class _Visible:
    """A stream that a terminal may read, which obeys what is in names and captions unless it is written out.

    What could not be written is told at the latest when it is flushed: argparse passes over errors.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self._failed: OSError | None = None

    def write(self, text: str) -> int:
        with self._told():
            self._stream.write(visible(text))
        return len(text)

    def flush(self) -> None:
        with self._told():
            self._stream.flush()
        if self._failed is not None:
            raise self._failed

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            words = f"the output could not be written ({error}); free some space, or send it elsewhere"
            self._failed = OSError(words)
            raise self._failed from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Careless:
    """A stream whose reader may be gone or whose disk may be full: a line that nobody can read must not end a run."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        # Progress bars begin their line anew, or move to another's.
        shown = text if _MOVES.fullmatch(text) else "\r".join(map(visible, text.split("\r")))
        with suppress(OSError, ValueError):
            self._stream.write(shown)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
