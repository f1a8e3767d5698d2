"""A signal that asks the run to stop, noticed between two steps."""

import signal
from types import FrameType


class StopRequest:
    """Set by SIGTERM or SIGUSR1 (what Slurm sends ahead of a preemption) in this process."""

    def __init__(self) -> None:
        self.received: str | None = None

    def listen(self) -> None:
        """Takes over the two signals."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
