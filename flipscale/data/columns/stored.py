"""The stored features of each sample, in place of the input of a tower."""

from dataclasses import dataclass

import numpy as np
import torch

from flipscale.data.columns.column import Candidate, Column, UnusableRows


@dataclass(eq=False, repr=False)
class StoredFeatures(Column):
    """`image_features` or `text_features`, float16 `(batch, width)`."""

    tower: str

    def draw(self) -> None:
        self._features = self.given.stored[self.tower]
        self._rows = self._features.rows(*self.places)

    def read(self, row: int, candidate: Candidate) -> np.ndarray:
        return self._features.row(candidate.place)

    def put(self, row: int, value: np.ndarray) -> None:
        self._rows[row] = value

    def columns(self) -> dict[str, torch.Tensor]:
        if len(lacking := np.flatnonzero(np.isnan(self._rows[:, 0]))):
            raise UnusableRows(lacking.tolist())
        return {f"{self.tower[:-1]}_features": torch.from_numpy(self._rows)}
