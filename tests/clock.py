"""A clock for the tests of what takes too long: it goes as a test says, so that no busy machine makes anything late."""

import time

# What the trainer divides by its time must not be 0.
_SLOWNESS = 1000.0


class Clock:
    """In place of the module `time` in a module of the trainer: its `perf_counter` hardly moves until it is started."""

    def __init__(self) -> None:
        self._offset = 0.0
        self._since, self._slowness = time.perf_counter(), _SLOWNESS

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)

    def perf_counter(self) -> float:
        """Return the seconds that it has counted, and those that it was moved by."""
        return self._offset + (time.perf_counter() - self._since) / self._slowness

    def move(self, seconds: float) -> None:
        """Let it be later."""
        self._offset += seconds

    def start(self) -> None:
        """Let it go as other clocks do."""
        self._offset = self.perf_counter()
        self._since, self._slowness = time.perf_counter(), 1.0
