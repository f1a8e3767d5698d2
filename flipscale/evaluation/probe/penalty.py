"""The search for the penalty of a probe, as in CLIP's and CLIP_benchmark's probes."""

from collections.abc import Callable

import numpy as np

PENALTIES: list[float] = np.logspace(-6, 2, num=97).tolist()
_FIRST = range(0, len(PENALTIES), 16)  # 7 values over the whole range
_STEPS = (8, 4, 2, 1)


def search_penalty(accuracy: Callable[[int], float]) -> int:
    """Return the number of the penalty in `PENALTIES` with the highest validation accuracy: the best of 7, then of it
    and its two neighbours at distance 8, 4, 2 and 1. Of equals, the smallest penalty is taken.

    Args:
        accuracy: of the penalty of this number; called once for each that is looked at.
    """
    known: dict[int, float] = {}

    def best(numbers: list[int]) -> int:
        for number in numbers:
            if number not in known:
                known[number] = accuracy(number)
        return max(sorted(set(numbers)), key=lambda number: known[number])

    peak = best(list(_FIRST))
    for step in _STEPS:
        peak = best([max(peak - step, 0), peak, min(peak + step, len(PENALTIES) - 1)])
    return peak
