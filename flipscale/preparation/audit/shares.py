"""Counts as shares of a total, with an interval where the total is a sample."""

import math
from typing import Any

_Z95 = 1.959964  # the normal quantile of a two-sided 95 % interval


def share_row(key: str, name: str, count: int, total: int, is_sample: bool) -> dict[str, Any]:
    """Return a row of a report: `{key: name}`, the count, its share, and the ends of Wilson's 95 % interval if it is of
    a sample."""
    row = {key: name, "count": count, "share": count / total}
    if is_sample:
        low, high = wilson(count, total)
        row |= {"low": low, "high": high}
    return row


def wilson(count: int, total: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a share, as two fractions."""
    share, z2 = count / total, _Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total)) / (1 + z2 / total)
    return max(centre - half, 0.0), min(centre + half, 1.0)
