"""Progress of long work: a bar on a terminal, elsewhere one log line each half minute."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from tqdm import tqdm

_LINE_SECONDS = 30.0
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Progress:
    """Counts the finished units of a long task and shows the rest.

    Args:
        total: number of units in the whole task; None if unknown.
        what: the task, such as `drawing`.
        unit: name of the units, such as `icons`; `B` shows bytes as kB, MB and GB.
        initial: number of units that an earlier run finished.
        delay: seconds before a terminal's bar appears, so that short tasks show none.
        leave: whether the bar stays on the terminal at the end.
        hidden: whether to show nothing, as on all ranks but the first.
    """

    def __init__(
        self,
        total: int | None,
        what: str,
        unit: str,
        *,
        initial: int = 0,
        delay: float = 0,
        leave: bool = True,
        hidden: bool = False,
    ):
        self._what, self._unit, self._total = what, unit, total
        self.done = self._initial = initial
        self._began = self._last_line = time.monotonic()
        self._is_logged = not hidden and not sys.stderr.isatty()
        self._bar: tqdm[Any] = tqdm(
            total=total,
            desc=what,
            unit=unit if unit == "B" else f" {unit}",
            unit_scale=unit == "B",
            initial=initial,
            delay=delay,
            leave=leave,
            disable=hidden or self._is_logged,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        """Add `count` finished units."""
        self.done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._is_logged and now - self._last_line >= _LINE_SECONDS:
            self._last_line = now
            _log.info("%s", self._line(now - self._began))

    def close(self) -> None:
        """Finish the bar."""
        self._bar.close()

    def _line(self, seconds: float) -> str:
        unit = "" if self._unit == "B" else f" {self._unit}"
        if self._total is None:
            return f"{self._what}: {self._count(self.done)}{unit} done"
        line = f"{self._what}: {self._count(self.done)} of {self._count(self._total)}{unit} done"
        if (done_now := self.done - self._initial) <= 0:
            return line
        left = (self._total - self.done) * seconds / done_now
        return f"{line}, about {tqdm.format_interval(left)} left"

    def _count(self, count: int) -> str:
        return f"{tqdm.format_sizeof(count)}B" if self._unit == "B" else f"{count:,}"


def each(items: Iterable[_T], what: str, unit: str, total: int | None = None, **options: Any) -> Iterator[_T]:
    """Yield the items and show how many are done; `total` is `len(items)` by default, `options` are `Progress`'s."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(total, what, unit, **options) as progress:
        for item in items:
            yield item
            progress.update()
