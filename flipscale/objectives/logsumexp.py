"""The softmax of each row or column of a matrix that is seen a tile at a time: its log-sum-exp, then its weights."""

from typing import NamedTuple

import torch

# How far above and below the common shift logits may lie. exp(60) times a million is finite in fp32. A million of
# exp(-80) add less than exp(-16) to a row whose positive is above exp(-50).
_ABOVE, _BELOW = 60.0, 50.0
# Exponents are clamped to this: on a CPU a product of denormal numbers takes 200 times as long, and exp 150 times as
# long to make one.
LOWEST_EXPONENT = -80.0


class LogSumExp(NamedTuple):
    """The log-sum-exp of the negatives that each row has met so far, as `total * exp(shift)`: two tensors `(count,)`.

    The positive is not in the sum. Where it has won, everything left to learn is in the few negatives, and adding them
    to the positive would round them away.
    """

    shift: torch.Tensor
    total: torch.Tensor

    @classmethod
    def empty(cls, rows: torch.Tensor, shift: float | None) -> "LogSumExp":
        """Return the sum of no negatives for each of `rows`. With `shift` None, shifts follow the running maxima."""
        start = rows.new_full((len(rows),), float("-inf") if shift is None else shift)
        return cls(start, torch.zeros_like(start))

    def part(self, rows: slice) -> "LogSumExp":
        """Return a view of some rows."""
        return LogSumExp(self.shift[rows], self.total[rows])

    def raise_shift(self, shift: torch.Tensor) -> None:
        """Move each shift up to `shift` where that is higher."""
        higher = torch.maximum(self.shift, shift)
        self.total.mul_((self.shift - higher).exp_())
        self.shift.copy_(higher)

    def cross_entropy(self, positives: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy of each row, given the logit of its positive: fp64 `(count,)`."""
        return (self.total.double() * (self.shift.double() - positives).exp()).log1p()

    def softmax(self, positives: torch.Tensor) -> "Softmax":
        """Return the softmax of each row over its negatives and its positive."""
        return Softmax(self.shift, (self.total + (positives - self.shift).exp()).reciprocal_())


class Softmax(NamedTuple):
    """A normalised softmax: the weight of a logit is `exp(logit - shift) * factor`; two tensors `(count,)`."""

    shift: torch.Tensor
    factor: torch.Tensor

    def part(self, rows: slice) -> "Softmax":
        """Return a view of some rows."""
        return Softmax(self.shift[rows], self.factor[rows])


def merge(parts: LogSumExp) -> LogSumExp:
    """Return the log-sum-exp of the negatives of all `parts` `(parts, count)`."""
    shift = parts.shift.amax(0)
    return LogSumExp(shift, (parts.total * (parts.shift - shift).exp_()).sum(0))


def common_shift(highest: float, lowest_positive: float) -> float | None:
    """Return a shift under which one exponential of a logit serves both its row and its column: 0 if that is enough,
    None if there is no such shift.

    Args:
        highest: no logit is above it.
        lowest_positive: no positive is below it, and so the largest logit of no row or column.
    """
    if highest <= _ABOVE and lowest_positive >= -_BELOW:
        return 0.0
    shift = min(highest, lowest_positive + _BELOW)
    return shift if highest - shift <= _ABOVE else None
