"""What passes between a run and its batch script: a request to stop, and that starting again cannot help."""

import os
import signal
from pathlib import Path
from types import FrameType

STOP_FILE = "FLIPSCALE_STOP_FILE"


class StopRequest:
    """Made by SIGTERM or SIGUSR1 in this process, or by the file that `$FLIPSCALE_STOP_FILE` names.

    A batch script hears of a coming preemption or time limit before its processes may exist; a file lasts until they
    look, a signal does not. One process looks, with `watches_file`: the others hear of it when they agree on the step.
    """

    def __init__(self, watches_file: bool) -> None:
        name = os.environ.get(STOP_FILE)
        self._file = Path(name) if name and watches_file else None
        self._received: str | None = None

    def listen(self) -> None:
        """Takes over the two signals."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    @property
    def reason(self) -> str | None:
        """What asked this process to stop, None while nothing has."""
        if self._received is None and self._file is not None and self._file.exists():
            self._received = f"{self._file} exists"
        return self._received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = f"{signal.Signals(number).name} received"


def refuse_restart() -> None:
    """Tells the batch script, if there is one, that its user must change something first."""
    name = os.environ.get(STOP_FILE)
    if name:
        Path(f"{name}.refused").touch()
