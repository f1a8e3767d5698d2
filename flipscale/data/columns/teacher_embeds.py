"""The embeddings of each pair by teachers."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from flipscale.data.columns.column import Candidate, Column
from flipscale.data.decode import DRAWS_PER_CROP
from flipscale.data.randomness import keyed_uniform


@dataclass(eq=False, repr=False)
class TeacherEmbeds(Column):
    """`teacher_embeds` fp32 `(batch, teachers, 2, width)`, see `Distilled`. Narrow embeddings are padded with zeros.

    They are of the crop that `Pixels` shows, and of the caption that `Tokens` has.
    """

    reads: ClassVar[str] = "embedding of each teacher"

    def draw(self) -> None:
        self._crop_draws = keyed_uniform(self.given.seed, "crop", self.where, DRAWS_PER_CROP)
        width = max(teacher.texts.width for teacher in self.given.teachers)
        self._embeds = np.zeros((len(self.where), len(self.given.teachers), 2, width), np.float32)

    def read(self, row: int, candidate: Candidate) -> list[np.ndarray]:
        number = self.given.teachers[0].crops.number(self._crop_draws[row])
        return [teacher.logit_sides(candidate.place, number) for teacher in self.given.teachers]

    def put(self, row: int, value: list[np.ndarray]) -> None:
        for embeds, sides in zip(self._embeds[row], value, strict=True):
            embeds[:, : sides.shape[1]] = sides

    def columns(self) -> dict[str, torch.Tensor]:
        return {"teacher_embeds": torch.from_numpy(self._embeds)}
