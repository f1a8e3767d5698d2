"""Multinomial logistic regression with an l2 penalty, rows sharded over processes: scikit-learn's objective.

The objective is the sum over the rows of the cross-entropy, plus `l2 / 2` times the sum of the squared weights; the
intercept is not penalised. That is `LogisticRegression(C=1 / l2)` of scikit-learn, with two classes too, where it
learns one vector of weights and two vectors would share the penalty.

Features and sums are fp64 on every device: data-centre GPUs multiply fp64 as fast as fp32 without TF32, and the sums
are then the same for any number of processes to about 1e-15. A process keeps its rows and multiplies them; what meets
is the value and the gradient of each step.

Plain L-BFGS needs thousands of steps where features are correlated or have a large mean, or where the penalty is so
small that most rows are certain. So it works in variables that the mean curvature over the classes is 1 for: every
`REFRESH` steps the matrix `X^T diag(w) X + l2` of the features X is factored anew, w a row's mean of p (1 - p).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from flipscale.evaluation.probe.minimise import minimise
from flipscale.evaluation.probe.rows import BLOCK, Classifier, Rows, Total, class_counts

# Of the objective. A fit is then equal to scikit-learn's to 1e-6 with a margin; a search needs only the answers.
TOLERANCE, SEARCH_TOLERANCE = 1e-10, 1e-6
MAX_ITERATIONS = 1000  # CLIP's
REFRESH = 50
_RELATIVE_JITTER = 1e-12  # of the largest curvature, so that a feature without any leaves the matrix definite


@dataclass(frozen=True)
class Fit:
    """A fitted classifier, and how it was reached.

    Args:
        classifier: fp64.
        l2: the penalty.
        objective: the sum over all rows, with the penalty.
        iterations: steps of L-BFGS.
        converged: False when `MAX_ITERATIONS` ran out first.
    """

    classifier: Classifier
    l2: float
    objective: float
    iterations: int
    converged: bool


def fit(
    rows: Rows,
    num_classes: int,
    l2: float,
    total: Total,
    *,
    tolerance: float = TOLERANCE,
    start: Classifier | None = None,
    step_done: Callable[[], None] = lambda: None,
) -> Fit:
    """Collective. Return the classifier at which the objective is least. A class without a row on any process is never
    answered.

    Args:
        rows: of this process, fp64.
        num_classes: all that labels may name.
        l2: the penalty, 1 / C.
        total: sums over the processes.
        tolerance: of the objective, relative.
        start: where to begin, such as the classifier of another penalty.
        step_done: called after each step.
    """
    counts = class_counts(rows.labels, num_classes, total)
    present = counts.nonzero()[:, 0]
    number_of = torch.full_like(counts, -1)
    number_of[present] = torch.arange(len(present), device=counts.device)
    problem = _Problem(Rows(rows.features, number_of[rows.labels]), len(present), l2, total)
    weights = rows.features.new_zeros(len(present), rows.features.shape[1] + 1)
    if start is not None:
        weights = torch.cat([start.weight, start.bias[:, None]], dim=1)[present]
        weights = torch.where(weights.isfinite(), weights, 0.0)

    iterations, converged, value = 0, False, torch.inf
    while not converged and iterations < MAX_ITERATIONS:
        problem.refresh(weights)
        most = min(REFRESH, MAX_ITERATIONS - iterations)
        found = minimise(problem.value_and_gradient, problem.scaled(weights), tolerance, most, step_done)
        weights, value, converged = problem.plain(found.at), found.value, found.converged
        iterations += found.iterations

    weight = weights.new_zeros(num_classes, weights.shape[1] - 1)
    bias = weights.new_full((num_classes,), -torch.inf)
    weight[present], bias[present] = weights[:, :-1], weights[:, -1]
    return Fit(Classifier(weight, bias), l2, value, iterations, converged)


class _Problem:
    """The objective of weights `(classes, dim + 1)`, the intercept last, in variables whose curvature is about 1."""

    def __init__(self, rows: Rows, num_classes: int, l2: float, total: Total):
        self.rows = rows
        self.total = total
        self.shape = (num_classes, rows.features.shape[1] + 1)
        self.penalty = rows.features.new_full(self.shape[1:], l2 * (2 if num_classes == 2 else 1))
        self.penalty[-1] = 0.0
        self.factor = torch.eye(self.shape[1], dtype=self.penalty.dtype, device=self.penalty.device)

    def refresh(self, weights: torch.Tensor) -> None:
        """Collective. Take the curvature at `weights` for the scale of the variables."""
        dim = self.shape[1]
        curvature = self.penalty.new_zeros(dim, dim)
        for features, _ in self._blocks():
            shares = self._scores(features, weights).softmax(dim=1)
            share = (shares * (1 - shares)).mean(dim=1, keepdim=True)
            ones = torch.ones_like(share)
            extended = torch.cat([features, ones], dim=1)
            curvature += extended.t() @ (extended * share)
        curvature = self.total(curvature) + torch.diag(self.penalty)
        curvature.diagonal().add_(_RELATIVE_JITTER * curvature.diagonal().max())
        self.factor = torch.linalg.cholesky(curvature)

    def scaled(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the flat variables of `weights`."""
        return (weights @ self.factor).flatten()

    def plain(self, point: torch.Tensor) -> torch.Tensor:
        """Return the weights of flat variables."""
        return torch.linalg.solve_triangular(self.factor, point.view(self.shape), upper=False, left=False)

    def value_and_gradient(self, point: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Collective. Return the objective and its gradient by the flat variables, the same on all processes."""
        weights = self.plain(point)
        loss, gradient = point.new_zeros(1), torch.zeros_like(weights)
        for features, labels in self._blocks():
            scores = self._scores(features, weights)
            log_sums = scores.logsumexp(dim=1, keepdim=True)
            loss += (log_sums - scores.gather(1, labels[:, None])).sum()
            errors = (scores - log_sums).exp_()
            errors.scatter_add_(1, labels[:, None], errors.new_full((len(labels), 1), -1.0))
            gradient[:, :-1] += errors.t() @ features
            gradient[:, -1] += errors.sum(dim=0)
        summed = self.total(torch.cat([loss, gradient.flatten()]))
        value = summed[0] + (self.penalty * weights.square()).sum() / 2
        gradient = summed[1:].view(self.shape) + self.penalty * weights
        return value.item(), torch.linalg.solve_triangular(self.factor.t(), gradient, upper=True, left=False).flatten()

    def _blocks(self) -> zip:
        return zip(self.rows.features.split(BLOCK), self.rows.labels.split(BLOCK), strict=True)

    @staticmethod
    def _scores(features: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.addmm(weights[:, -1], features, weights[:, :-1].t())
