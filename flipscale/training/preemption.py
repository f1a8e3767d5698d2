"""Requests to stop a run, and the mark that tells its batch script not to requeue it."""

import os
import signal
from pathlib import Path
from types import FrameType

STOP_FILE = "FLIPSCALE_STOP_FILE"


class StopRequest:
    """Whether this process was asked to stop: by SIGTERM, by SIGUSR1, or by the file that `$FLIPSCALE_STOP_FILE` names.

    A batch script may learn of a preemption or time limit before its processes exist. A signal would be lost then; a
    file is still there when they look. Only the process with `watches_file` looks for it, and the others learn of it
    when all agree on the step.
    """

    def __init__(self, watches_file: bool) -> None:
        name = os.environ.get(STOP_FILE)
        self._file = Path(name) if name and watches_file else None
        self._received: str | None = None

    def listen(self) -> None:
        """Handle the two signals from now on."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    @property
    def reason(self) -> str | None:
        """What asked this process to stop; None while nothing has."""
        if self._received is None and self._file is not None and self._file.exists():
            self._received = f"{self._file} exists"
        return self._received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = f"{signal.Signals(number).name} received"


def refuse_restart() -> None:
    """Tell the batch script, if there is one, not to requeue the job: its user must change something first."""
    name = os.environ.get(STOP_FILE)
    if name:
        Path(f"{name}.refused").touch()
