"""Requests to stop a run, and the mark that keeps its batch script from requeueing it."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Self

STOP_FILE = "FLIPSCALE_STOP_FILE"

# Batch systems send the first two, Ctrl-C the third, and a closed terminal the last.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# A launcher repeats the signals that its processes receive, and an ending session sends two kinds.
_ECHO_SECONDS = 3.0

_END = b"\0"  # no signal has this number

_log = logging.getLogger(__name__)


class _Listener:
    """Receives signals in a thread in a `with` block, because the main thread may be behind a device or in a library.

    A signal that is ignored before the block, as under `nohup`, stays ignored. In another thread than the main one,
    which alone may handle signals, the block receives none.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = numbers
        self._before: dict[int, Any] = {}
        self._wakeup = self._old_wakeup = -1

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
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
        if self._wakeup < 0:
            return
        signal.set_wakeup_fd(self._old_wakeup)
        # A byte ends the thread, because a forked process may hold the pipe open. A forked process has no thread.
        if self._thread.is_alive():
            os.write(self._wakeup, _END)
            self._thread.join()
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python code
        os.close(self._wakeup)

    def _listen(self, reading: int) -> None:
        with open(reading, "rb", buffering=0) as numbers:
            while (number := numbers.read(1)) != _END:
                # A handler without its own pipe, such as that of `study`, writes to this pipe too.
                owner = getattr(signal.getsignal(number[0]), "__self__", None)
                if number[0] in self._before and isinstance(owner, _Listener):
                    self._handle(signal.Signals(number[0]))

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal in the main thread."""

    def _handle(self, number: signal.Signals) -> None:
        """Handle a signal in the listening thread."""


class EndRequest(_Listener):
    """Ends this process at SIGTERM, SIGUSR1 or SIGHUP in a `with` block, with a line and exit code 128 + number.

    Processes forked in the block end as they would without it.
    """

    def __init__(self) -> None:
        super().__init__([number for number in _SIGNALS if number != signal.SIGINT])
        os.register_at_fork(after_in_child=self._restore_defaults)

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)
        self._before = {}

    def _restore_defaults(self) -> None:
        if self._before:
            signal.set_wakeup_fd(-1)
        for number in self._before:
            if signal.getsignal(number) == self._receive:
                signal.signal(number, signal.SIG_DFL)

    def _handle(self, number: signal.Signals) -> None:
        # After a failure, a launcher ends the other processes; the failed one has printed why.
        prefix = "error: " if os.environ.get("WORLD_SIZE", "1") == "1" else ""
        _end(number, f"{prefix}{number.name}: ended; the same command resumes from the last save, if there is one")


class Stopped(BaseException):
    """A run was asked to stop, and has saved."""


class StopRequest(_Listener):
    """Whether this process was asked to stop: by SIGTERM, SIGUSR1, SIGINT or SIGHUP in a `with` block, or by the file
    that `$FLIPSCALE_STOP_FILE` names.

    A batch script may learn of a preemption or a time limit before its processes exist. A signal would be lost then,
    but a file stays. Only the process with `watches_file` looks for it; the others learn it in the next step.

    A second signal ends the process at once with 128 and its number. SIGUSR1 does not, and neither does any signal
    within three seconds, which may be an echo, except a second Ctrl-C without a launcher.
    """

    def __init__(self, watches_file: bool) -> None:
        super().__init__(_SIGNALS)
        name = os.environ.get(STOP_FILE)
        self._file = Path(name) if name and watches_file else None
        self._received: str | None = None
        self._first_at: float | None = None

    @property
    def reason(self) -> str | None:
        # `os.path.exists` raises nothing if the file system does not answer for once.
        if self._received is None and self._file is not None and os.path.exists(self._file):
            self._received = f"{self._file} exists"
        return self._received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = f"{signal.Signals(number).name} received"

    def _handle(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
            _log.info("%s: saving and stopping; once more to end at once", number.name)
            return
        is_typed = number == signal.SIGINT and "WORLD_SIZE" not in os.environ
        if may_be_echo(number, now - self._first_at, is_typed):
            return
        _end(number, f"error: {number.name} again: ended before the save; the same command resumes from the last one")


def may_be_echo(number: int, seconds: float, is_typed: bool) -> bool:
    """Return whether a signal, `seconds` after the first, asks for no more than the first did. `is_typed`: a person
    sent it."""
    return number == signal.SIGUSR1 or (not is_typed and seconds < _ECHO_SECONDS)


def refuse_restart() -> None:
    """Tell the batch script not to requeue the job, because its user must change something."""
    name = os.environ.get(STOP_FILE)
    if name:
        Path(f"{name}.refused").touch()


def _end(number: signal.Signals, words: str) -> NoReturn:
    """End this process at once; rank 0 prints why."""
    if os.environ.get("RANK", "0") == "0":
        print(f"flipscale: {words}", file=sys.stderr, flush=True)
    from flipscale.process.watchdog import end_process  # imports torch, which `--help` does not need

    end_process(128 + number)
