"""Requests to stop a run, and the mark that tells its batch script not to requeue it."""

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

STOP_FILE = "FLIPSCALE_STOP_FILE"

# A batch system sends the first two, Ctrl-C the third, and a terminal that is closed the last.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# A launcher sends on what its processes have received as well, and a session that ends sends two kinds.
_ECHO_SECONDS = 3.0

_log = logging.getLogger(__name__)


class StopRequest:
    """Whether this process was asked to stop: by SIGTERM, SIGUSR1, SIGINT or SIGHUP while it is in a `with` block, or
    by the file that `$FLIPSCALE_STOP_FILE` names.

    A batch script may learn of a preemption or time limit before its processes exist. A signal would be lost then; a
    file is still there when they look. Only the process with `watches_file` looks for it, and the others learn of it
    when all agree on the step.

    A second signal ends the process at once with 128 and its number, wherever the main thread is. SIGUSR1 does not, nor
    does what may be an echo of the first: whatever comes in the next three seconds, but for a second Ctrl-C where there
    is no launcher. A signal that is ignored when the block begins, as under `nohup`, stays ignored.
    """

    def __init__(self, watches_file: bool) -> None:
        name = os.environ.get(STOP_FILE)
        self._file = Path(name) if name and watches_file else None
        self._received: str | None = None
        self._first_at: float | None = None
        self._before: dict[int, Any] = {}
        self._wakeup = self._old_wakeup = -1

    def __enter__(self) -> "StopRequest":
        reading, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        self._old_wakeup = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._receive)
        # The main thread may be anywhere: behind a device, or in a library that waits for other processes.
        threading.Thread(target=self._listen, args=(reading,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: set by no Python code
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._wakeup)

    @property
    def reason(self) -> str | None:
        """What asked this process to stop; None while nothing has."""
        if self._received is None and self._file is not None and self._file.exists():
            self._received = f"{self._file} exists"
        return self._received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = f"{signal.Signals(number).name} received"

    def _listen(self, reading: int) -> None:
        with open(reading, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] in self._before:
                    self._hear(signal.Signals(number[0]))

    def _hear(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
            _log.info("%s: saving and stopping; once more to end at once", number.name)
            return
        is_typed = number == signal.SIGINT and "WORLD_SIZE" not in os.environ
        if number == signal.SIGUSR1 or (not is_typed and now - self._first_at < _ECHO_SECONDS):
            return
        from flipscale.engines.start import end_process  # imports torch, which `--help` has no need of

        if os.environ.get("RANK", "0") == "0":
            words = "ended before all was saved; the same command goes on from the last checkpoint"
            print(f"flipscale: error: {number.name} again: {words}", file=sys.stderr)
        end_process(128 + number)


def refuse_restart() -> None:
    """Tell the batch script, if there is one, not to requeue the job: its user must change something first."""
    name = os.environ.get(STOP_FILE)
    if name:
        Path(f"{name}.refused").touch()
