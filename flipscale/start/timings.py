"""The seconds of the parts of a start."""

import math
import os
import time

from flipscale.process.lock import start_of


class StartTimings(dict[str, float]):
    """The seconds of each part of a start: imports, data, processes, checkpoint. It begins with the process if
    `of_process`, else now."""

    def __init__(self, of_process: bool = False) -> None:
        ticks = (of_process and start_of(os.getpid())) or math.inf  # since the boot; unknown without /proc
        self._last = min(float(ticks) / os.sysconf("SC_CLK_TCK"), time.clock_gettime(time.CLOCK_BOOTTIME))

    def end(self, part: str) -> None:
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        self[part], self._last = round(now - self._last, 2), now
