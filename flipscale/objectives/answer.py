"""Answering questions about images: one answer from a list, from the tokens of both towers (paper, section 4.3)."""

import copy
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from flipscale.data.batch_inputs import BatchInputs
from flipscale.data.columns.answers import Answers
from flipscale.data.columns.column import Column
from flipscale.io.options import Range
from flipscale.model import FlipConfig, FlipForQuestionAnswering, FlipPreTrainedModel
from flipscale.model.configuration_flip import FlipAnswerConfig
from flipscale.model.modeling_flip_vqa import FlipAnswerOutput
from flipscale.objectives.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Answer(Objective):
    """The binary cross-entropy of each answer's score, summed over all answers.

    Args:
        num_answers: number of answers in the list, one per line of `classnames.txt` next to the training shards.
    """

    model_class: ClassVar[type[FlipPreTrainedModel]] = FlipForQuestionAnswering
    exported_class: ClassVar[type[FlipPreTrainedModel]] = FlipForQuestionAnswering
    columns: ClassVar[tuple[str, ...]] = ("labels",)

    num_answers: Annotated[int, Range(at_least=2, at_most=10_000_000)]

    @property
    def num_labels(self) -> int:
        return self.num_answers

    def model_config(self, config: FlipConfig) -> FlipConfig:
        changed = copy.deepcopy(config)
        changed.answer_config = changed.answer_config or FlipAnswerConfig()
        changed.answer_config.num_answers = self.num_answers
        return changed

    def makers(self, given: BatchInputs) -> list[Column]:
        questions, *images = super().makers(given)
        return [questions, Answers(given, self.num_answers), *images]

    def per_sample_loss(self, output: FlipAnswerOutput) -> torch.Tensor:
        assert output.answer_losses is not None
        return output.answer_losses.mean()

    def example_labels(self, batch_size: int) -> torch.Tensor:
        return torch.zeros(batch_size, self.num_answers)
