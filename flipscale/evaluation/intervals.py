"""Estimates with 95 % intervals, by numpy and scipy: no module here imports torch."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Z95 = 1.959964  # normal quantile of a two-sided 95 % interval
_DRAWS = 200  # enough for a standard deviation, which is all that the bootstrap gives here


class Estimate(NamedTuple):
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def student(degrees: int, compared: int = 1) -> float:
    """Return the 97.5 % point of Student's t distribution, or that for the best of several (Bonferroni)."""
    from scipy.special import stdtrit  # slow to import, and `--help` needs none

    return float(stdtrit(degrees, 1 - 0.025 / compared))


def mean_of(values: Sequence[float], unit: str = "") -> Estimate:
    """Return the mean over two seeds or more, with Student's t interval; percentages end at 0 and 100."""
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    width = student(len(values) - 1) * deviation / math.sqrt(len(values))
    low, high = mean - width, mean + width
    return Estimate(mean, max(low, 0.0), min(high, 100.0)) if unit == "%" else Estimate(mean, low, high)


def mean_estimate(scores: np.ndarray) -> Estimate:
    """Return the mean of scores that are at least 0, with a normal interval."""
    mean = float(scores.mean())
    half = Z95 * float(scores.std(ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else 0.0
    return Estimate(mean, max(mean - half, 0.0), mean + half)


def normal(value: float, deviation: float) -> Estimate:
    """Return a share in [0, 1] with a normal interval, clipped to [0, 1]."""
    half = Z95 * deviation
    return Estimate(value, max(value - half, 0.0), min(value + half, 1.0))


def wilson(hits: float, n: float) -> tuple[float, float]:
    """Return the Wilson score interval of a share of independent queries. Counts may be fractions, unlike in scipy."""
    share, z2 = hits / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def clustered_share(hits: np.ndarray, counts: np.ndarray) -> Estimate:
    """Return the share of hits among clustered queries, such as the captions of one image.

    The interval is Wilson's for the number of independent queries with the same variance as the clusters. That number
    is at most the number of queries. Each cluster has one query or more.
    """
    n, clusters = int(counts.sum()), len(counts)
    share = float(hits.sum() / n)
    variance = float(((hits - share * counts) ** 2).sum()) / n**2 * clusters / max(clusters - 1, 1)
    # Without observed variance, each cluster counts as one query.
    independent = min(share * (1 - share) / variance, n) if variance > 0 else clusters
    return Estimate(share, *wilson(share * independent, independent))


def bootstrapped(measure: Callable[[np.ndarray], float], n: int) -> Estimate:
    """Return `measure` of all `n` rows, with 1.96 standard deviations over bootstrap draws of a fixed seed.

    `measure` takes the number of times that each row was drawn, int64 `(n,)`.
    """
    rng = np.random.default_rng(0)
    draws = [measure(np.bincount(rng.integers(n, size=n), minlength=n)) for _ in range(_DRAWS)]
    return normal(measure(np.ones(n, np.int64)), float(np.std(draws, ddof=1)))
