"""Labelled features, each process its own rows of them: they are never gathered."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

# Returns the sum of a tensor over the processes. Collective.
Total = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Rows:
    """Some features and their classes.

    Args:
        features: `(rows, dim)`.
        labels: int64 `(rows,)`, on the same device.
    """

    features: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Rows":
        """Return the rows on a device."""
        return Rows(self.features.to(device), self.labels.to(device))

    def where(self, chosen: torch.Tensor) -> "Rows":
        """Return the rows that `chosen`, bool `(rows,)`, names."""
        return Rows(self.features[chosen], self.labels[chosen])

    def and_also(self, others: "Rows") -> "Rows":
        """Return these rows, then the others."""
        return Rows(torch.cat([self.features, others.features]), torch.cat([self.labels, others.labels]))


@dataclass(frozen=True)
class Classifier:
    """A linear classifier: the class is the highest of `features @ weight.T + bias`.

    Args:
        weight: `(classes, dim)`.
        bias: `(classes,)`; minus infinity for a class that is never answered.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def answers(self, features: torch.Tensor) -> torch.Tensor:
        """Return the class of each row, int64 `(rows,)`."""
        found = features.new_empty(len(features), dtype=torch.int64)
        for answers, block in zip(found.split(BLOCK), features.split(BLOCK), strict=True):
            answers[:] = (block.to(self.weight.dtype) @ self.weight.t() + self.bias).argmax(dim=1)
        return found


# Rows that are multiplied at once: with 1,000 classes, 130 MB of fp64 scores.
BLOCK = 16_384


def class_counts(labels: torch.Tensor, num_classes: int, total: Total) -> torch.Tensor:
    """Collective. Return how many rows of all processes are of each class, int64 `(classes,)`."""
    return total(torch.bincount(labels, minlength=num_classes))


def total_of(accelerator: "Accelerator") -> Total:
    """Return the sum over the processes of an accelerator, for tensors on its device."""
    return partial(accelerator.reduce, reduction="sum")
