"""A batch of questions about images: read, decoded, cropped, masked and tokenised in a loader worker, as pairs are."""

from typing import Any, ClassVar

import numpy as np
import torch

from flipscale.data.faults import BadSample
from flipscale.data.labelled.dataset import MissingLabel
from flipscale.data.pairs import PairDataset
from flipscale.data.sources.source import Sample
from flipscale.io.errors import UserError

# The score of an answer that so many people of ten gave, 4 or more of them 1: METER's (arXiv 2111.02387).
SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)


class WrongVotes(BadSample):
    """The sample's `KEY.npy` does not count the people who gave each answer."""

    cause = "wrong_votes"


class QuestionDataset(PairDataset):
    """Questions about images by global position. The columns of a batch are those of `PairDataset`, whose captions are
    the questions, and:

    * `labels` fp32 `(batch, num_answers)`: the score of each answer, from 0 to 1.

    A sample has the number of its one answer in `KEY.cls`, or in `KEY.npy` how many people gave each answer and, last,
    any other.

    Args:
        num_answers: of the list that an answer is one of.
    """

    what: ClassVar[str] = "question with an answer"

    def __init__(self, *arguments: Any, num_answers: int, **options: Any):
        super().__init__(*arguments, **options)
        self.num_answers = num_answers

    def _answer(self, sample: Sample, draw: float, each_caption: bool) -> tuple[str, np.ndarray]:
        """Return a sample's question, and the score of each answer.

        Raises:
            BadSample: it has no question or no answer.
            ValueError: its answer is outside of the list.
        """
        question, scores = super()._answer(sample, draw, each_caption), np.zeros(self.num_answers, np.float32)
        try:
            votes = sample.read_array()
        except BadSample:
            raise
        except ValueError as error:
            raise WrongVotes(str(error)) from error
        if votes is not None:
            if votes.shape != (self.num_answers + 1,) or votes.dtype.kind not in "iu" or not (votes >= 0).all():
                raise WrongVotes(
                    f"KEY.npy is {votes.dtype} {votes.shape}; it must count the people who gave each of the "
                    f"{self.num_answers} answers, and any other"
                )
            scores[:] = np.array(SCORES, np.float32)[np.minimum(votes[:-1], len(SCORES) - 1)]
            return question, scores
        if sample.label is None:
            raise MissingLabel("there is no KEY.cls with a number, and no KEY.npy")
        if sample.label >= self.num_answers:
            raise UserError(
                f"{sample.name} has answer {sample.label}, and the model chooses among {self.num_answers}, counted "
                "from 0; set loss.options.num_answers to the lines of classnames.txt"
            )
        scores[sample.label] = 1.0
        return question, scores

    def _answers(self, found: list[Any], where: np.ndarray) -> dict[str, torch.Tensor]:
        tokens = super()._answers([question for question, _ in found], where)
        return {**tokens, "labels": torch.from_numpy(np.stack([scores for _, scores in found]))}
