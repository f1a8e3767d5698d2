"""L-BFGS for a smooth convex function: curvature of the last steps, and a line search for the weak Wolfe conditions."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

MEMORY = 20  # steps whose curvature is kept
_SUFFICIENT, _CURVATURE = 1e-4, 0.9  # Nocedal and Wright's constants for quasi-Newton directions
_MOST_TRIES = 30

Evaluate = Callable[[torch.Tensor], tuple[float, torch.Tensor]]


@dataclass(frozen=True)
class Minimum:
    """Where the function is least.

    Args:
        at: the point.
        value: of the function there.
        iterations: steps that were taken.
        converged: False when the steps ran out first.
    """

    at: torch.Tensor
    value: float
    iterations: int
    converged: bool


def minimise(
    evaluate: Evaluate,
    start: torch.Tensor,
    tolerance: float,
    max_iterations: int,
    step_done: Callable[[], None] = lambda: None,
) -> Minimum:
    """Return the minimum of a convex function that is not negative.

    It ends when half the decrease that a step promises, which is what a quadratic has left, is at most `tolerance` of
    the value.

    Args:
        evaluate: returns value and gradient at a point. Its variables should be scaled so that the curvature is about
            1 in all directions; the nearer to that, the fewer steps.
        start: where to begin; it is not changed.
        tolerance: relative.
        max_iterations: at most so many steps.
        step_done: called after each.
    """
    point = start
    value, gradient = evaluate(point)
    past: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=MEMORY)
    for iteration in range(max_iterations):
        direction = _direction(gradient, past)
        slope = torch.dot(gradient, direction).item()
        if -slope <= 2 * tolerance * value:
            return Minimum(point, value, iteration, True)
        found = _search(evaluate, point, value, direction, slope)
        if found is None:
            # Rounding hides what is left to gain.
            return Minimum(point, value, iteration, True)
        size, value, new_gradient = found
        step, change = size * direction, new_gradient - gradient
        point, gradient = point + step, new_gradient
        if torch.dot(step, change).item() > 0:
            past.append((step, change))
        step_done()
    return Minimum(point, value, max_iterations, False)


def _direction(gradient: torch.Tensor, past: deque[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Return minus the gradient times the inverse curvature that the past steps saw."""
    direction = -gradient
    shares = []
    for step, change in reversed(past):
        share = torch.dot(step, direction) / torch.dot(step, change)
        direction = direction - share * change
        shares.append(share)
    if past:
        step, change = past[-1]
        direction = direction * (torch.dot(step, change) / torch.dot(change, change))
    for (step, change), share in zip(past, reversed(shares), strict=True):
        direction = direction + step * (share - torch.dot(change, direction) / torch.dot(step, change))
    return direction


def _search(
    evaluate: Evaluate, point: torch.Tensor, value: float, direction: torch.Tensor, slope: float
) -> tuple[float, float, torch.Tensor] | None:
    """Return a size of step with value and gradient there, by bisection; None if no step makes the value less."""
    low, high, size = 0.0, math.inf, 1.0
    for _ in range(_MOST_TRIES):
        new_value, gradient = evaluate(point + size * direction)
        if not new_value <= value + _SUFFICIENT * size * slope:
            high = size
        elif torch.dot(gradient, direction).item() < _CURVATURE * slope:
            low = size
        else:
            return size, new_value, gradient
        size = 2 * low if high == math.inf else (low + high) / 2
    return None
