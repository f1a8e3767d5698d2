"""The mean over seeds, with its interval."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# The 97.5 % points of Student's t with 1, 2, ... degrees of freedom.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Mean(NamedTuple):
    """A mean over seeds, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def student(degrees: int) -> float:
    """Return the 97.5 % point of Student's t; beyond the table, by its expansion about the normal distribution's."""
    if degrees <= len(_STUDENT):
        return _STUDENT[degrees - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def mean_of(values: Sequence[float], unit: str = "") -> Mean:
    """Return the mean of two numbers or more, of seeds that are drawn from many, by Student's t; of percentages, the
    interval ends at 0 and 100."""
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    width = student(len(values) - 1) * deviation / math.sqrt(len(values))
    low, high = mean - width, mean + width
    return Mean(mean, max(low, 0.0), min(high, 100.0)) if unit == "%" else Mean(mean, low, high)
