"""What laws of scaling are fitted to: trained models, what was spent on each, and the error that was found."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from flipscale.io.errors import UserError


@dataclass(frozen=True)
class Points:
    """Trained models, each an entry of every array, all trained to the end of their schedules.

    A configuration that was trained with several seeds is one point, the mean of their errors: of single runs, the
    Pareto front would pick the lucky ones.

    Args:
        names: of the configurations.
        compute: operations of the whole training.
        error: in percent.
        parameters: of the model.
        samples: pairs seen.
        pairs: different pairs in the data.

    Raises:
        ValueError: a number is not above 0.
    """

    names: np.ndarray
    compute: np.ndarray
    error: np.ndarray
    parameters: np.ndarray
    samples: np.ndarray
    pairs: np.ndarray

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[1:]:
            values = getattr(self, field.name)
            is_wrong = ~((values > 0) & (values < np.inf))
            if is_wrong.any():
                name, value = self.names[is_wrong][0], values[is_wrong][0]
                raise UserError(f"{field.name} of {name} is {value:g}; a law of scaling takes numbers above 0")

    def __len__(self) -> int:
        return len(self.names)

    def take(self, chosen: np.ndarray) -> "Points":
        """Return the points at these places, or where a mask is true."""
        return Points(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))

    def front(self) -> "Points":
        """Return the Pareto front, by compute: the points that no other one with as little compute or less beats. Equal
        points are all kept, so that one that is drawn twice counts twice."""
        order = np.lexsort((self.error, self.compute))
        compute, error = self.compute[order], self.error[order]
        is_new = np.append(True, (np.diff(compute) != 0) | (np.diff(error) != 0))
        is_better = np.append(True, error[1:] < np.minimum.accumulate(error)[:-1])
        first_of_equals = np.maximum.accumulate(np.where(is_new, np.arange(len(self)), 0))
        return self.take(order[is_better[first_of_equals]])
