"""Fits laws of scaling to points: parameters with intervals, and the largest budget left out and predicted."""

from dataclasses import dataclass

import numpy as np

from flipscale.io.errors import UserError
from flipscale.studies.scaling.laws import Law
from flipscale.studies.scaling.points import Points

# Budgets as near as this to the largest are the largest.
_SAME_BUDGET = 0.99


@dataclass(frozen=True)
class Fit:
    """A law with the parameters that were found.

    Args:
        law: the law.
        found: its parameters, in the order of their names.
        low, high: ends of their 95 % intervals, percentiles over drawn configurations.
        num_points: how many points it was fitted to.
    """

    law: Law
    found: np.ndarray
    low: np.ndarray
    high: np.ndarray
    num_points: int


@dataclass(frozen=True)
class Prediction:
    """What a law that was fitted without a point says of it.

    Args:
        name: of the configuration.
        found, predicted: errors, in percent.
        low, high: ends of the 95 % interval of the prediction.
    """

    name: str
    found: float
    predicted: float
    low: float
    high: float


def fit_law(law: Law, points: Points, resamples: int = 400, seed: int = 0) -> Fit:
    """Return a law fitted to points, with intervals by a bootstrap over configurations: what the law is fitted to, such
    as the front, is found anew in each draw.

    Raises:
        ValueError: there are fewer points to fit than parameters + 2.
    """
    refuse_few(law, points)
    drawn = _drawn(law, points, resamples, seed)
    low, high = _interval(drawn, law, points)
    return Fit(law, law.fit(points), low, high, len(law.fitted_to(points)))


def refuse_few(law: Law, points: Points) -> None:
    """Raise if there are too few points for a law.

    Raises:
        ValueError: there are fewer than parameters + 2.
    """
    count, needed = len(law.fitted_to(points)), len(law.parameters) + 2
    if count < needed:
        where = "" if count == len(points) else f" of {len(points)} on the front"
        has = f"1 point{where} is" if count == 1 else f"{count} points{where} are"
        raise UserError(
            f"{law.name}: {has} too few for {len(law.parameters)} parameters, which take {needed}; "
            "train more configurations"
        )


def largest_budget(points: Points) -> np.ndarray:
    """Return a mask of the points that took the most compute."""
    return points.compute >= _SAME_BUDGET * points.compute.max()


def predict(law: Law, points: Points, held_out: np.ndarray, resamples: int = 400, seed: int = 0) -> list[Prediction]:
    """Return what a law fitted without the points `held_out`, a mask, says of each of them.

    Raises:
        ValueError: the others are fewer than parameters + 2.
    """
    rest, left_out = points.take(~held_out), points.take(held_out)
    refuse_few(law, rest)
    found, drawn = law.fit(rest), _drawn(law, rest, resamples, seed)
    low, high = _interval(np.array([law.error(one, left_out) for one in drawn]), law, rest)
    return [
        Prediction(*numbers)
        for numbers in zip(left_out.names, left_out.error, law.error(found, left_out), low, high, strict=True)
    ]


def _interval(drawn: np.ndarray, law: Law, points: Points) -> np.ndarray:
    """Return the ends of the 95 % intervals of what was drawn: percentiles, a little further out than 2.5 and 97.5, for
    a bootstrap of few points is too narrow by Student's factor and by the parameters that were fitted.

    Source: the expanded percentile interval of Hesterberg, arXiv 1411.5279.
    """
    from scipy.stats import norm, t

    count, free = len(points), max(len(points) - len(law.parameters), 1)
    tail = 100 * norm.cdf(np.sqrt(count / free) * t.ppf(0.025, free))
    return np.percentile(drawn, [tail, 100 - tail], axis=0)


def _drawn(law: Law, points: Points, resamples: int, seed: int) -> np.ndarray:
    """Return the parameters of each of `resamples` draws, `(resamples, parameters)`. A draw that has fewer different
    points to fit than parameters determines nothing, and is drawn anew."""
    rng = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    while len(found) < resamples:
        draw = points.take(rng.integers(len(points), size=len(points)))
        if len(np.unique(law.fitted_to(draw).names)) >= len(law.parameters):
            found.append(law.fit(draw, followed=1))
    return np.array(found)
