"""Progress of long work: a bar on a terminal, elsewhere one log line each half minute."""

import logging
import sys
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from tqdm import tqdm

_LINE_SECONDS = 30.0
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Progress(tqdm):  # type: ignore[type-arg]
    """A bar of tqdm, which writes log lines off a terminal. `n` is the number of finished units.

    Args:
        total: number of units in the whole task; None if unknown.
        unit: name of the units, such as `icons`; `B` shows bytes as kB, MB and GB.
        initial: number of units that an earlier run finished.
        delay: seconds before a terminal's bar appears, so that short tasks show none.
        hidden: whether to show nothing, as on all ranks but the first.
    """

    # Every update looks at the clock, so no thread has to watch for late ones.
    monitor_interval = 0

    def __init__(
        self, total: int | None, what: str, unit: str, *,
        initial: int = 0, delay: float = 0, leave: bool = True, hidden: bool = False,
    ):  # fmt: skip
        options: dict[str, Any] = {"delay": delay, "leave": leave, "miniters": 1}
        if not sys.stderr.isatty():
            end = "{unit} done" if total is None else " of {total_fmt}{unit} done, about {remaining} left"
            options |= {"delay": _LINE_SECONDS, "leave": False, "mininterval": _LINE_SECONDS}
            options |= {"file": _LogLines(), "bar_format": "{desc}: {n_fmt}" + end}
        scaled = {"unit": unit, "unit_scale": True} if unit == "B" else {"unit": f" {unit}"}
        super().__init__(total=total, desc=what, initial=initial, disable=hidden, **scaled, **options)


class _LogLines:
    """A file for tqdm whose lines are log lines."""

    def write(self, text: str) -> None:
        if line := text.replace("\x1b[A", "").strip():  # tqdm moves the cursor to the line of a second bar
            _log.info("%s", line)

    def flush(self) -> None:
        """Do nothing, because a log line is written at once."""


def each(items: Iterable[_T], what: str, unit: str, total: int | None = None, **options: Any) -> Iterator[_T]:
    """Yield the items and show how many are done; `total` is `len(items)` by default, `options` are `Progress`'s."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(total, what, unit, **options) as progress:
        for item in items:
            yield item
            progress.update()
