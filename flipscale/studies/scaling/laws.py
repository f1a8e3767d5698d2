"""Laws of scaling: error as a function of what was spent, and how each is fitted to points.

Each counts compute, parameters and pairs in units from the middle of what it describes: intervals of what an error is
there say something, as those of what it would be at one operation or one pair do not.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flipscale.io.errors import UserError
from flipscale.studies.scaling.points import Points

# Beyond it, a residual in logs counts by its size and no longer by its square.
_HUBER = 1e-3
# How many of a grid's starts a fit follows to their ends: the best ones.
FOLLOWED = 6


class Law(ABC):
    """A law of scaling.

    Args:
        points: those to describe; the geometric means of what was spent on them become the units.
    """

    name: str
    formula: str
    parameters: tuple[str, ...]
    spent: Sequence[str] = ("compute",)

    def __init__(self, points: Points):
        self.units = {name: float(np.exp(np.log(getattr(points, name)).mean())) for name in self.spent}

    def fitted_to(self, points: Points) -> Points:
        """Return those of the points that the law is fitted to."""
        return points.front()

    @abstractmethod
    def fit(self, points: Points, followed: int = FOLLOWED) -> np.ndarray:
        """Return the parameters that describe `fitted_to(points)` best.

        Args:
            followed: how many starts of the grid are followed, where there is one.
        """

    @abstractmethod
    def error(self, found: np.ndarray, points: Points) -> np.ndarray:
        """Return the errors of points under the parameters `found`."""


class PowerLaw(Law):
    """A power of compute, by least squares in logs on the Pareto front."""

    name = "power law"
    formula = "level x compute^slope"
    parameters = ("slope", "level")

    def fit(self, points: Points, followed: int = FOLLOWED) -> np.ndarray:
        front = self.fitted_to(points)
        x, y = np.log(front.compute / self.units["compute"]), np.log(front.error)
        off = x - x.mean()
        slope = off @ y / (off @ off)
        return np.array([slope, np.exp(y.mean() - slope * x.mean())])

    def error(self, found: np.ndarray, points: Points) -> np.ndarray:
        slope, level = found
        return level * (points.compute / self.units["compute"]) ** slope


class SaturatingLaw(Law):
    """A power of compute that begins late and ends at a floor, by least squares in logs on the Pareto front.

    `a`, `b` and `d` are not below 0, `c` is not above 0.
    """

    name = "saturating"
    formula = "a (compute + b)^c + d"
    parameters = ("a", "b", "c", "d")

    def fit(self, points: Points, followed: int = FOLLOWED) -> np.ndarray:
        from scipy.optimize import least_squares

        front = self.fitted_to(points)
        x, y = front.compute / self.units["compute"], np.log(front.error)

        def residuals(found: np.ndarray) -> np.ndarray:
            a, b, c, d = found
            return np.log(np.maximum(a * (x + b) ** c + d, 1e-12)) - y

        low, high = np.array([0.0, 0.0, -4.0, 0.0]), np.array([np.inf, np.inf, 0.0, front.error.min()])
        starts = np.clip(self._starts(x, front.error)[:followed], low + 1e-9, high - 1e-9)
        ends = [least_squares(residuals, start, bounds=(low, high), max_nfev=200) for start in starts]
        return min(ends, key=lambda end: end.cost).x

    def error(self, found: np.ndarray, points: Points) -> np.ndarray:
        a, b, c, d = found
        return a * (points.compute / self.units["compute"] + b) ** c + d

    @staticmethod
    def _starts(x: np.ndarray, error: np.ndarray) -> np.ndarray:
        """Return starts, the best first: to each `b` and `c` of a grid, the best `a` and `d`, a linear problem."""
        b, c = np.meshgrid(np.append(0.0, x.min() * np.geomspace(0.1, 30, 12)), -np.geomspace(0.02, 3, 24))
        b, c = b.ravel(), c.ravel()
        # Relative residuals, which are near those in logs.
        powers, ones = (x[:, None] + b) ** c / error[:, None], 1 / error[:, None]
        pp, po, oo = (powers * powers).sum(0), (powers * ones).sum(0), (ones * ones).sum(0)
        p1, o1 = powers.sum(0), ones.sum(0)
        d = np.maximum((o1 * pp - p1 * po) / np.maximum(pp * oo - po * po, 1e-12 * pp * oo), 0.0)
        a = np.maximum((p1 - d * po) / pp, 0.0)
        losses = ((a * powers + d * ones - 1) ** 2).sum(0)
        best = np.argsort(losses, kind="stable")
        return np.stack([a, b, c, d], axis=1)[best]


@dataclass(frozen=True)
class _Axis:
    """A term of the additive law: its name in the points, and what tables call its exponent and its share."""

    field: str
    exponent: str
    share: str


class AdditiveLaw(Law):
    """A floor and a power of each of model, samples seen and data, as far as they differ among the points.

    By log-sum-exp, with Huber's loss of the residuals in logs, fitted to all points. The losses are summed and not
    averaged: a mean of losses so small ends the search early. Source: Hoffmann et al., arXiv 2203.15556, and its
    replication by Besiroglu et al., arXiv 2404.10102.

    Raises:
        ValueError: the points have two values of an axis, or differ in none.
    """

    name = "additive"

    _AXES = (
        _Axis("parameters", "exponent of model", "model"),
        _Axis("samples", "exponent of samples", "samples"),
        _Axis("pairs", "exponent of data", "data"),
    )

    def __init__(self, points: Points):
        values = {axis: len(np.unique(getattr(points, axis.field))) for axis in self._AXES}
        for axis, number in values.items():
            if number == 2:
                raise UserError(
                    f"additive: the points have two values of {axis.field}, and a power above a floor takes three; "
                    "train another one"
                )
        self._axes = [axis for axis, number in values.items() if number > 2]
        if not self._axes:
            raise UserError(
                "additive: all points have the same parameters, samples and pairs; train some that differ in them"
            )
        self.spent = [axis.field for axis in self._axes]
        super().__init__(points)
        terms = [f"{axis.share} x {axis.field}^-exponent" for axis in self._axes]
        self.formula = " + ".join(["floor", *terms])
        exponents, shares = ([getattr(axis, kind) for axis in self._axes] for kind in ("exponent", "share"))
        self.parameters = (*exponents, *shares, "floor")

    def fitted_to(self, points: Points) -> Points:
        return points

    def fit(self, points: Points, followed: int = FOLLOWED) -> np.ndarray:
        from scipy.optimize import minimize

        x, y, count = self._logs(points), np.log(points.error), len(self._axes)
        starts = self._starts(count) + np.append(np.zeros(count), np.full(count + 1, y.mean()))
        losses = np.concatenate([_huber(_log_sum(part, x)[0] - y).sum(1) for part in np.array_split(starts, 16)])

        def loss(found: np.ndarray) -> tuple[float, np.ndarray]:
            value, weights = _log_sum(found[None], x)
            off = value[0] - y
            slope = np.clip(off, -_HUBER, _HUBER)  # of Huber's loss
            by_term = (slope[:, None] * weights[0]).sum(0)
            return _huber(off).sum(), np.concatenate([-(slope[:, None] * weights[0, :, :count] * x).sum(0), by_term])

        bounds = [(0.0, 4.0)] * count + [(y.min() - 12, y.max() + 3)] * (count + 1)
        options = {"maxiter": 2000, "ftol": 1e-14, "gtol": 1e-9}
        ends = [
            minimize(loss, starts[place], jac=True, method="L-BFGS-B", bounds=bounds, options=options)
            for place in np.argsort(losses, kind="stable")[:followed]
        ]
        best = min(ends, key=lambda end: end.fun).x
        return np.concatenate([best[:count], np.exp(best[count:])])

    def error(self, found: np.ndarray, points: Points) -> np.ndarray:
        count = len(self._axes)
        logs = np.concatenate([found[:count], np.log(found[count:])])
        return np.exp(_log_sum(logs[None], self._logs(points))[0][0])

    def _logs(self, points: Points) -> np.ndarray:
        """Return the logs of each axis in units: `(points, axes)`."""
        return np.log(np.stack([getattr(points, axis.field) / self.units[axis.field] for axis in self._axes], axis=1))

    @staticmethod
    def _starts(count: int) -> np.ndarray:
        """Return a grid of starts: exponents, and the logs of the terms' and the floor's shares of the error."""
        exponents, shares = (0.15, 0.4, 0.9), np.log([0.05, 0.2, 0.6])
        return np.array(list(itertools.product(*[exponents] * count, *[shares] * (count + 1))))


def _log_sum(found: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the log of the sum of all terms, `(starts, points)`, and the share of each, `(starts, points, terms)`, the
    floor's last.

    Args:
        found: exponents, logs of the terms at a unit and the log of the floor: `(starts, 2 axes + 1)`.
        x: logs of the axes in units: `(points, axes)`.
    """
    count = x.shape[1]
    terms = found[:, None, count:-1] - found[:, None, :count] * x
    floor = np.broadcast_to(found[:, None, -1:], (*terms.shape[:2], 1))
    terms = np.concatenate([terms, floor], axis=2)
    most = terms.max(axis=2, keepdims=True)
    powers = np.exp(terms - most)
    total = powers.sum(axis=2, keepdims=True)
    return (most + np.log(total))[..., 0], powers / total


def _huber(off: np.ndarray) -> np.ndarray:
    size = np.abs(off)
    return np.where(size <= _HUBER, 0.5 * off**2, _HUBER * (size - 0.5 * _HUBER))
