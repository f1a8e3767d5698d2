"""What runs that differ in their seeds show together: the means of their curves, and how much sooner one is where
another one ends."""

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from flipscale.evaluation.intervals import Mean, mean_of
from flipscale.evaluation.reports.comparison import Curve, by_recipe, headlines
from flipscale.evaluation.results import Result, with_unit


def over_seeds(group: Sequence[Curve], name: str) -> tuple[np.ndarray, list[Mean]]:
    """Return when a result was found, in training seconds, and its means over the runs of a group; the times are the
    first run's, and the others' values are those between their own times.

    Args:
        group: runs that differ in their seeds, two or more.
        name: of the result, `task/metric`.
    """
    courses = [course for curve in group if (course := curve.course(name))]
    times = np.array([measured.trained_seconds for measured in courses[0]])
    values = np.array(
        [np.interp(times, [m.trained_seconds for m in course], [m.result.value for m in course]) for course in courses]
    )
    return times, [mean_of(column, courses[0][0].result.unit) for column in values.T]


def seconds_to(curve: Curve, name: str, value: float) -> float | None:
    """Return after how many seconds of training a result first was `value`, on the lines between what was measured and
    from what chance achieves at the start; None where it never was."""
    course = curve.course(name)
    if not course:
        return None
    sign = 1.0 if course[0].result.higher_is_better else -1.0
    points = [(m.trained_seconds, sign * m.result.value) for m in course]
    if course[0].result.chance is not None:
        points.insert(0, (0.0, sign * course[0].result.chance))
    before = points[0]
    for after in points:
        if after[1] >= sign * value:
            rise = after[1] - before[1]
            part = (sign * value - before[1]) / rise if rise > 0 else 1.0
            return before[0] + part * (after[0] - before[0])
        before = after
    return None


def times_to_equal(curves: Sequence[Curve]) -> list[str]:
    """Return, for each two recipes, a sentence on how much sooner the better one was where the other one ended, by the
    first headline that both have: the ratio of times with its 95 % interval over seeds, of the ratios' logarithms."""
    groups = by_recipe(curves)
    names = [name for name in headlines(curves) if all(curve.course(name) for curve in curves)]
    if not names:
        return []
    found: list[str] = []
    for one, other in combinations(groups, 2):
        last = {id(group): [curve.course(names[0])[-1].result for curve in group] for group in (one, other)}
        sign = 1.0 if last[id(one)][0].higher_is_better else -1.0
        better, worse = sorted(
            (one, other), key=lambda group: -sign * float(np.mean([result.value for result in last[id(group)]]))
        )
        found.append(_sentence(better, worse, last[id(worse)], names[0]))
    return found


def _sentence(better: Sequence[Curve], worse: Sequence[Curve], ends: Sequence[Result], name: str) -> str:
    """Return how much sooner a group reaches what another one's runs end with, seed by seed."""
    ratios = []
    for curve, baseline, end in zip(better, worse, ends, strict=False):
        seconds = seconds_to(curve, name, end.value)
        # Twice the same curve, or one that starts there, says nothing of time.
        if seconds:
            ratios.append(baseline.course(name)[-1].trained_seconds / seconds)
    count = min(len(better), len(worse))
    mean = with_unit(float(np.mean([end.value for end in ends])), ends[0].unit)
    head = f"{better[0].arm} reaches the last {ends[0].shown} of {worse[0].arm} ({mean})"
    if len(ratios) < count:
        return f"{head} in {len(ratios)} of {count} seeds only, so no ratio of times is given."
    logs = [math.log(ratio) for ratio in ratios]
    if count == 1:
        return f"{head} {ratios[0]:.2f} times as fast; one seed, so no interval."
    ratio, low, high = (math.exp(end) for end in mean_of(logs))
    return f"{head} {ratio:.2f} times as fast (95 % interval over {count} seeds: {low:.2f} to {high:.2f})."
