"""Requests to stop a run, and the mark that tells its batch script not to requeue it."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

STOP_FILE = "FLIPSCALE_STOP_FILE"

# A batch system sends the first two, Ctrl-C the third, and a terminal that is closed the last.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# A launcher sends on what its processes have received as well, and a session that ends sends two kinds.
_ECHO_SECONDS = 3.0

_END = b"\0"  # is no signal

_log = logging.getLogger(__name__)


class _Listener:
    """Hears signals in a thread of its own, in a `with` block: the main thread may be anywhere, behind a device or in a
    library that waits for other processes. A signal that is ignored when the block begins, as under `nohup`, stays
    ignored.

    Args:
        numbers: of the signals.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = numbers
        self._before: dict[int, Any] = {}
        self._wakeup = self._old_wakeup = -1

    def __enter__(self) -> "_Listener":
        reading, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        self._old_wakeup = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        for number in self._numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._receive)
        self._thread = threading.Thread(target=self._listen, args=(reading,), name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        signal.set_wakeup_fd(self._old_wakeup)
        # What came until now is heard, or left to the handlers that it came to. A process that was forked meanwhile may
        # hold the pipe open, so a byte ends the thread; such a process itself has no thread.
        if self._thread.is_alive():
            os.write(self._wakeup, _END)
            self._thread.join()
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: set by no Python code
        os.close(self._wakeup)

    def _listen(self, reading: int) -> None:
        with open(reading, "rb", buffering=0) as numbers:
            while (number := numbers.read(1)) != _END:
                # A handler that was set without a pipe of its own, as `study` has one, takes what comes to this pipe.
                taker = getattr(signal.getsignal(number[0]), "__self__", None)
                if number[0] in self._before and isinstance(taker, _Listener):
                    self._hear(signal.Signals(number[0]))

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Take a signal in the main thread."""

    def _hear(self, number: signal.Signals) -> None:
        """Take a signal in the thread."""


class EndRequest(_Listener):
    """In a `with` block, SIGTERM, SIGUSR1 or SIGHUP ends this process at once with a sentence and 128 and its number.

    Processes that are forked in the block end as they would without it.
    """

    def __init__(self) -> None:
        super().__init__([number for number in _SIGNALS if number != signal.SIGINT])

    def __enter__(self) -> _Listener:
        super().__enter__()
        _ending.append(self)
        return self

    def __exit__(self, *raised: object) -> None:
        _ending.remove(self)
        super().__exit__(*raised)

    def let_go(self) -> None:
        """Leave the signals to what they do of themselves."""
        signal.set_wakeup_fd(-1)
        for number in self._before:
            if signal.getsignal(number) == self._receive:
                signal.signal(number, signal.SIG_DFL)

    def _hear(self, number: signal.Signals) -> None:
        # A launcher ends those that are left when one has failed, and that one says why.
        complaint = "error: " if os.environ.get("WORLD_SIZE", "1") == "1" else ""
        _end(number, f"{complaint}{number.name}: ended; the same command goes on from what is saved, if anything is")


_ending: list[EndRequest] = []


def _let_go() -> None:
    for request in _ending:
        request.let_go()


os.register_at_fork(after_in_child=_let_go)


class StopRequest(_Listener):
    """Whether this process was asked to stop: by SIGTERM, SIGUSR1, SIGINT or SIGHUP while it is in a `with` block, or
    by the file that `$FLIPSCALE_STOP_FILE` names.

    A batch script may learn of a preemption or time limit before its processes exist. A signal would be lost then; a
    file is still there when they look. Only the process with `watches_file` looks for it, and the others learn of it
    when all agree on the step.

    A second signal ends the process at once with 128 and its number, wherever the main thread is. SIGUSR1 does not, nor
    does what may be an echo of the first: whatever comes in the next three seconds, but for a second Ctrl-C where there
    is no launcher.
    """

    def __init__(self, watches_file: bool) -> None:
        super().__init__(_SIGNALS)
        name = os.environ.get(STOP_FILE)
        self._file = Path(name) if name and watches_file else None
        self._received: str | None = None
        self._first_at: float | None = None

    @property
    def reason(self) -> str | None:
        """What asked this process to stop; None while nothing has."""
        # A file system that does not answer for once is no reason to end: `os.path.exists` raises nothing.
        if self._received is None and self._file is not None and os.path.exists(self._file):
            self._received = f"{self._file} exists"
        return self._received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = f"{signal.Signals(number).name} received"

    def _hear(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
            _log.info("%s: saving and stopping; once more to end at once", number.name)
            return
        is_typed = number == signal.SIGINT and "WORLD_SIZE" not in os.environ
        if number == signal.SIGUSR1 or (not is_typed and now - self._first_at < _ECHO_SECONDS):
            return
        words = "ended before all was saved; the same command goes on from the last checkpoint"
        _end(number, f"error: {number.name} again: {words}")


def _end(number: signal.Signals, words: str) -> NoReturn:
    """End this process at once; the first of several says why."""
    if os.environ.get("RANK", "0") == "0":
        print(f"flipscale: {words}", file=sys.stderr, flush=True)
    from flipscale.engines.start import end_process  # imports torch, which `--help` has no need of

    end_process(128 + number)


def refuse_restart() -> None:
    """Tell the batch script, if there is one, not to requeue the job: its user must change something first."""
    name = os.environ.get(STOP_FILE)
    if name:
        Path(f"{name}.refused").touch()
