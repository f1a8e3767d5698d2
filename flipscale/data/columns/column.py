"""The interface of a column of a batch, and the samples that it reads."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
import torch

from flipscale.data.batch_inputs import BatchInputs
from flipscale.data.samples import Sample, Source


class Candidate:
    """A sample that may fill a row of a batch. The first column that asks for its content reads it."""

    def __init__(self, source: Source, place: tuple[int, int]):
        self.source, self.place = source, place

    @cached_property
    def sample(self) -> Sample:
        return self.source.read(*self.place)


class UnusableRows(Exception):
    """Some rows of a batch have unusable values, seen only when all are there. Other samples must replace them."""

    def __init__(self, rows: Sequence[int]):
        super().__init__(rows)
        self.rows = rows


@dataclass(eq=False, repr=False)
class Column:
    """The maker of one or several columns. It holds what all batches share; the copy that `begin` returns makes one.

    Its randomness is a function of the seed and the rows' positions, see `keyed_uniform`.
    """

    # Name of what a sample must have, for messages; empty if the column reads no sample.
    reads: ClassVar[str] = ""

    given: BatchInputs
    # Of one batch: the positions of its rows, their samples as shards and numbers, and the values of the rows.
    where: np.ndarray = field(init=False)
    places: tuple[np.ndarray, np.ndarray] = field(init=False)
    values: list[Any] = field(init=False)

    def begin(self, where: np.ndarray, places: tuple[np.ndarray, np.ndarray]) -> Self:
        """Return the maker of the columns of one batch."""
        begun = copy.copy(self)
        begun.where, begun.places, begun.values = where, places, [None] * len(where)
        begun.draw()
        return begun

    def draw(self) -> None:
        """Draw what the rows of `where` need, and allocate their tensors."""

    def read(self, row: int, candidate: Candidate) -> Any:
        """Return the value of a row from a sample. Raise BadSample if another sample must replace it."""

    def put(self, row: int, value: Any) -> None:
        """Keep the value of a row, now that all columns have read its sample."""
        self.values[row] = value

    def columns(self) -> dict[str, torch.Tensor]:
        """Return the columns by name. Raise UnusableRows if other samples must replace those of some rows."""
        raise NotImplementedError
