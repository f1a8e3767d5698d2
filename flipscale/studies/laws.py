"""Laws of scaling: trained models as points, laws of their error, and fits with intervals and predictions.

Laws count compute, parameters and pairs in units: the geometric means of the points they describe. The constants of a
law are then errors inside the data, so their intervals are meaningful.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares, minimize
from scipy.special import huber, logsumexp, softmax
from scipy.stats import norm, t

from flipscale.io.errors import UserError
from flipscale.io.text_table import escape_markdown, markdown_table

# Residuals in logs above this value count by their size, below by their square.
_HUBER = 1e-3


@dataclass(frozen=True)
class Points:
    """Trained models, each an entry of every array, all at the ends of their schedules.

    Several seeds of a configuration make one point, their mean error. Of single runs, the front selects lucky ones.
    Raise UserError if a number is not above 0.

    Args:
        compute: operations of the whole training.
        error: error in percent.
        samples: number of pairs seen.
        pairs: number of different pairs in the data.
    """

    names: np.ndarray
    compute: np.ndarray
    error: np.ndarray
    parameters: np.ndarray
    samples: np.ndarray
    pairs: np.ndarray

    def __post_init__(self) -> None:
        for field, values in vars(self).items():
            if field != "names" and (is_wrong := ~((values > 0) & (values < np.inf))).any():
                name, value = self.names[is_wrong][0], values[is_wrong][0]
                raise UserError(f"{field} of {name} is {value:g}; a law of scaling takes numbers above 0")

    def __len__(self) -> int:
        return len(self.names)

    def take(self, chosen: np.ndarray) -> "Points":
        """Return the points at these indices, or where a mask is true."""
        return Points(*(values[chosen] for values in vars(self).values()))

    def front(self) -> "Points":
        """Return the Pareto front by compute: points whose error is below that of every point with no more compute.
        Equal points are all kept, so that a point drawn twice counts twice."""
        order = np.lexsort((self.error, self.compute))
        compute, error = self.compute[order], self.error[order]
        is_new = np.append(True, (np.diff(compute) != 0) | (np.diff(error) != 0))
        is_better = np.append(True, error[1:] < np.minimum.accumulate(error)[:-1])
        first_of_equals = np.maximum.accumulate(np.where(is_new, np.arange(len(self)), 0))
        return self.take(order[is_better[first_of_equals]])

    def largest_budget(self) -> np.ndarray:
        """Return a mask of the points with at least 99 % of the most compute."""
        return self.compute >= 0.99 * self.compute.max()


class Law(ABC):
    """A law of scaling, in units: the geometric means of the spending of some points."""

    name: str
    formula: str
    parameters: tuple[str, ...]
    spent: Sequence[str] = ("compute",)

    def __init__(self, points: Points):
        self.units = {name: float(np.exp(np.log(getattr(points, name)).mean())) for name in self.spent}

    def fitted_to(self, points: Points) -> Points:
        """Return the points that the law is fitted to."""
        return points.front()

    @abstractmethod
    def fit(self, points: Points, followed: int = 6) -> np.ndarray:
        """Return the best parameters for `fitted_to(points)`. Laws with a grid of starts follow the best `followed`."""

    @abstractmethod
    def error(self, fitted: np.ndarray, points: Points) -> np.ndarray:
        """Return the errors of points under the parameters `fitted`."""


class PowerLaw(Law):
    """A power of compute, by least squares in logs on the Pareto front."""

    name = "power law"
    formula = "level x compute^slope"
    parameters = ("slope", "level")

    def fit(self, points: Points, followed: int = 6) -> np.ndarray:
        front = self.fitted_to(points)
        x, y = np.log(front.compute / self.units["compute"]), np.log(front.error)
        off = x - x.mean()
        slope = off @ y / (off @ off)
        return np.array([slope, np.exp(y.mean() - slope * x.mean())])

    def error(self, fitted: np.ndarray, points: Points) -> np.ndarray:
        slope, level = fitted
        return level * (points.compute / self.units["compute"]) ** slope


class SaturatingLaw(Law):
    """A power of compute that begins late and ends at a floor, by least squares in logs on the Pareto front.

    `a`, `b` and `d` are at least 0, `c` is at most 0.
    """

    name = "saturating"
    formula = "a (compute + b)^c + d"
    parameters = ("a", "b", "c", "d")

    def fit(self, points: Points, followed: int = 6) -> np.ndarray:
        front = self.fitted_to(points)
        x, y = front.compute / self.units["compute"], np.log(front.error)

        def residuals(fitted: np.ndarray) -> np.ndarray:
            a, b, c, d = fitted
            return np.log(np.maximum(a * (x + b) ** c + d, 1e-12)) - y

        low, high = np.array([0.0, 0.0, -4.0, 0.0]), np.array([np.inf, np.inf, 0.0, front.error.min()])
        starts = np.clip(self._starts(x, front.error)[:followed], low + 1e-9, high - 1e-9)
        ends = [least_squares(residuals, start, bounds=(low, high), max_nfev=200) for start in starts]
        return min(ends, key=lambda end: end.cost).x

    def error(self, fitted: np.ndarray, points: Points) -> np.ndarray:
        a, b, c, d = fitted
        return a * (points.compute / self.units["compute"] + b) ** c + d

    @staticmethod
    def _starts(x: np.ndarray, error: np.ndarray) -> np.ndarray:
        """Return starts, best first. For each `b` and `c` of a grid, the best `a` and `d` solve a linear problem."""
        b, c = np.meshgrid(np.append(0.0, x.min() * np.geomspace(0.1, 30, 12)), -np.geomspace(0.02, 3, 24))
        b, c = b.ravel(), c.ravel()
        # Relative residuals, because they are close to residuals in logs.
        powers, ones = (x[:, None] + b) ** c / error[:, None], 1 / error[:, None]
        pp, po, oo = (powers * powers).sum(0), (powers * ones).sum(0), (ones * ones).sum(0)
        p1, o1 = powers.sum(0), ones.sum(0)
        d = np.maximum((o1 * pp - p1 * po) / np.maximum(pp * oo - po * po, 1e-12 * pp * oo), 0.0)
        a = np.maximum((p1 - d * po) / pp, 0.0)
        losses = ((a * powers + d * ones - 1) ** 2).sum(0)
        best = np.argsort(losses, kind="stable")
        return np.stack([a, b, c, d], axis=1)[best]


class AdditiveLaw(Law):
    """A floor and a power of each of parameters, samples seen and pairs in the data, if they differ among the points.

    Fitted to all points by log-sum-exp with Huber's loss of the residuals in logs. The losses are summed, because a
    mean of such small losses ends the search early. Source: Hoffmann et al., arXiv 2203.15556, and its replication by
    Besiroglu et al., arXiv 2404.10102. Raise UserError if the points have two values of an axis, or differ in none.
    """

    name = "additive"

    def __init__(self, points: Points):
        fields = {"parameters": "model", "samples": "samples", "pairs": "data"}
        counts = {field: len(np.unique(getattr(points, field))) for field in fields}
        if 2 in counts.values():
            field = next(field for field, count in counts.items() if count == 2)
            raise UserError(
                f"additive: the points have two values of {field}, and a power above a floor needs three; train "
                "another configuration"
            )
        axes = {field: name for field, name in fields.items() if counts[field] > 2}
        if not axes:
            raise UserError(f"additive: all points have the same {', '.join(fields)}; train some that differ in them")
        self.spent = list(axes)
        super().__init__(points)
        self.formula = " + ".join(["floor", *(f"{name} x {field}^-exponent" for field, name in axes.items())])
        self.parameters = (*(f"exponent of {name}" for name in axes.values()), *axes.values(), "floor")

    def fitted_to(self, points: Points) -> Points:
        return points

    def fit(self, points: Points, followed: int = 6) -> np.ndarray:
        x, y, count = self._logs(points), np.log(points.error), len(self.spent)
        # A grid of starts: exponents, and the logs of the shares of the terms and of the floor.
        exponents, shares = (0.15, 0.4, 0.9), np.log([0.05, 0.2, 0.6])
        starts = np.array(list(itertools.product(*[exponents] * count, *[shares] * (count + 1))))
        starts += np.append(np.zeros(count), np.full(count + 1, y.mean()))
        losses = np.concatenate([huber(_HUBER, _log_sum(part, x)[0] - y).sum(1) for part in np.array_split(starts, 16)])

        def loss(fitted: np.ndarray) -> tuple[float, np.ndarray]:
            value, weights = _log_sum(fitted[None], x)
            off = value[0] - y
            slope = np.clip(off, -_HUBER, _HUBER)  # The derivative of Huber's loss.
            by_term = (slope[:, None] * weights[0]).sum(0)
            by_exponent = -(slope[:, None] * weights[0, :, :count] * x).sum(0)
            return huber(_HUBER, off).sum(), np.concatenate([by_exponent, by_term])

        bounds = [(0.0, 4.0)] * count + [(y.min() - 12, y.max() + 3)] * (count + 1)
        options = {"maxiter": 2000, "ftol": 1e-14, "gtol": 1e-9}
        ends = [
            minimize(loss, starts[place], jac=True, method="L-BFGS-B", bounds=bounds, options=options)
            for place in np.argsort(losses, kind="stable")[:followed]
        ]
        best = min(ends, key=lambda end: end.fun).x
        return np.concatenate([best[:count], np.exp(best[count:])])

    def error(self, fitted: np.ndarray, points: Points) -> np.ndarray:
        count = len(self.spent)
        logs = np.concatenate([fitted[:count], np.log(fitted[count:])])
        return np.exp(_log_sum(logs[None], self._logs(points))[0][0])

    def _logs(self, points: Points) -> np.ndarray:
        """Return the logs of each axis in units: `(points, axes)`."""
        return np.log(np.stack([getattr(points, field) / self.units[field] for field in self.spent], axis=1))


def _log_sum(fitted: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the log of the sum of all terms and the terms' shares, `(starts, points, terms)`. The last is the floor.

    Args:
        fitted: exponents, logs of the terms at a unit, and the log of the floor: `(starts, 2 axes + 1)`.
        x: logs of the axes in units: `(points, axes)`.
    """
    count = x.shape[1]
    terms = fitted[:, None, count:-1] - fitted[:, None, :count] * x
    floor = np.broadcast_to(fitted[:, None, -1:], (*terms.shape[:2], 1))
    terms = np.concatenate([terms, floor], axis=2)
    return logsumexp(terms, axis=2), softmax(terms, axis=2)


@dataclass(frozen=True)
class LawFit:
    """A law with its fitted parameters.

    Args:
        fitted: parameters, in the order of their names.
        low, high: ends of their 95 % intervals, from a bootstrap over configurations.
        num_points: number of points it was fitted to.
    """

    law: Law
    fitted: np.ndarray
    low: np.ndarray
    high: np.ndarray
    num_points: int

    def __str__(self) -> str:
        """Return the formula and a table of the parameters, as Markdown."""
        rows = [[self.law.name, "value", "95 % interval"]]
        for name, value, low, high in zip(self.law.parameters, self.fitted, self.low, self.high, strict=True):
            rows.append([name, f"{value:.3g}", f"{low:.3g} to {high:.3g}"])
        units = ", ".join(f"{value:.3g} of {name}" for name, value in self.law.units.items())
        head = f"error in % = {self.law.formula}, fitted to {self.num_points} points, in units of {units}."
        return f"{head}\n\n{markdown_table(rows, 1)}"


@dataclass(frozen=True)
class Prediction:
    """A configuration's error in percent, and its prediction with a 95 % interval by a law fitted without it."""

    law: str
    name: str
    error: float
    predicted: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return the prediction as a line of Markdown."""
        return (
            f"{self.law}: without {escape_markdown(self.name)} it predicts {self.predicted:.1f} % error "
            f"({self.low:.1f} to {self.high:.1f}); found: {self.error:.1f} % "
            f"(off by {self.predicted - self.error:+.1f})"
        )


def fit_law(law: Law, points: Points, resamples: int = 400) -> LawFit:
    """Return a law fitted to points, with intervals by a bootstrap over configurations. Each draw has its own front.
    Raise UserError if there are too few points."""
    low, high = _interval(_bootstrap(law, points, resamples), law, points)
    return LawFit(law, law.fit(points), low, high, len(law.fitted_to(points)))


def predict(law: Law, points: Points, held_out: np.ndarray, resamples: int = 400) -> list[Prediction]:
    """Return the predictions of the points under the mask `held_out`, by a law fitted to the others."""
    rest, left_out = points.take(~held_out), points.take(held_out)
    drawn = _bootstrap(law, rest, resamples)
    low, high = _interval(np.array([law.error(one, left_out) for one in drawn]), law, rest)
    columns = (left_out.names, left_out.error, law.error(law.fit(rest), left_out), low, high)
    return [Prediction(law.name, *numbers) for numbers in zip(*columns, strict=True)]


def _interval(drawn: np.ndarray, law: Law, points: Points) -> np.ndarray:
    """Return the ends of 95 % intervals: percentiles of the draws, a little further out than 2.5 and 97.5.

    A bootstrap of few points is too narrow, by Student's factor and by the number of fitted parameters. Source: the
    expanded percentile interval of Hesterberg, arXiv 1411.5279.
    """
    count, free = len(points), max(len(points) - len(law.parameters), 1)
    tail = 100 * norm.cdf(np.sqrt(count / free) * t.ppf(0.025, free))
    return np.percentile(drawn, [tail, 100 - tail], axis=0)


def _bootstrap(law: Law, points: Points, resamples: int) -> np.ndarray:
    """Return the parameters of each draw: `(resamples, parameters)`. A draw with fewer different points than parameters
    is repeated, because it does not determine them."""
    count, needed = len(law.fitted_to(points)), len(law.parameters) + 2
    if count < needed:
        has = f"{count} points" + ("" if count == len(points) else f" of {len(points)} on the front")
        raise UserError(
            f"{law.name}: {has}, too few for {len(law.parameters)} parameters (at least {needed}); train more"
        )
    rng = np.random.default_rng(0)
    fits: list[np.ndarray] = []
    while len(fits) < resamples:
        draw = points.take(rng.integers(len(points), size=len(points)))
        if len(np.unique(law.fitted_to(draw).names)) >= len(law.parameters):
            fits.append(law.fit(draw, followed=1))
    return np.array(fits)
