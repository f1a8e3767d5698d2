"""The scores of the answers to each image's question."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from flipscale.data.columns.column import Candidate, Column
from flipscale.data.columns.labels import number_of
from flipscale.data.samples import BadSample

# Score of an answer by the number of people who gave it, 4 or more scoring 1: METER (arXiv 2111.02387).
SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)


@dataclass(eq=False, repr=False)
class Answers(Column):
    """`labels` fp32 `(batch, num_answers)`: score of each answer, from 0 to 1.

    `KEY.cls` is the number of a sample's one answer. Or `KEY.npy` counts people for each answer and, last, any other.
    """

    reads: ClassVar[str] = "answer"

    num_answers: int

    def read(self, row: int, candidate: Candidate) -> np.ndarray:
        sample, scores = candidate.sample, np.zeros(self.num_answers, np.float32)
        try:
            votes = sample.read_array() if sample.read_array else None
        except BadSample:
            raise
        except ValueError as error:
            raise BadSample(str(error), "wrong_votes") from error
        if votes is None:
            scores[number_of(sample, "answer", "num_answers", self.num_answers)] = 1.0
            return scores
        if votes.shape != (self.num_answers + 1,) or votes.dtype.kind not in "iu" or not (votes >= 0).all():
            raise BadSample(
                f"KEY.npy is {votes.dtype} {votes.shape}; it must count the people who gave each of the "
                f"{self.num_answers} answers, and any other",
                "wrong_votes",
            )
        scores[:] = np.array(SCORES, np.float32)[np.minimum(votes[:-1], len(SCORES) - 1)]
        return scores

    def columns(self) -> dict[str, torch.Tensor]:
        return {"labels": torch.from_numpy(np.stack(self.values))}
