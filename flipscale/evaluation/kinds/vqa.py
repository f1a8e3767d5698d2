"""Visual question answering: the model's answers compared with the answers that people gave."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from flipscale.data.captions import tokenise
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.intervals import Estimate, mean_estimate
from flipscale.evaluation.kinds.task import Task, check_learned_names
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet
from flipscale.evaluation.whole_images import ChosenRows
from flipscale.io.errors import UserError

# VQAv2's threshold: an answer that three of ten people gave is right.
_ENOUGH = 3


@dataclass(frozen=True)
class Vqa(Task):
    """VQAv2's `accuracy` in percent of the questions, then of yes-or-no questions and of other questions.

    `data` has shards with a sample for each question: its image, the question in `KEY.txt`, and its answers. The
    answers are `KEY.cls`, the number of the only answer, or `KEY.npy`: the number of people who gave each answer and,
    last, the number who gave any other. `classnames.txt` lists the answers. Every process holds all questions.

    Args:
        image: `shuffled` gives each question the image of another, which measures what the questions alone reveal.
    """

    image: Literal["own", "shuffled"] = "own"

    needs: ClassVar[str] = "answers"
    protocol: ClassVar[str] = """Visual question answering: the best answer of the model's list, for whole images. An
answer that n people gave scores min(n / 3, 1), averaged over the subsets that leave out one person, and 1 if it is the
only answer (Antol et al. 2015). Intervals treat questions as independent."""
    hub_task: ClassVar[str] = "visual-question-answering"
    hub_metric: ClassVar[str] = "accuracy"

    def check(self) -> None:
        super().check()
        TestSet.open(self.data).class_names()

    def truth(self, test_set: TestSet) -> Callable[[int, int], Any]:
        return partial(_question, test_set, len(test_set.class_names()))

    def evaluate(self, embedder: Embedder, test_set: TestSet) -> list[Result]:
        answers = test_set.class_names()
        num_answers = embedder.model.config.answer_config.num_answers
        if num_answers != len(answers):
            raise UserError(
                f"{self.data} lists {len(answers)} answers, and the model chooses among {num_answers}; use a test set "
                "with the model's answers"
            )
        check_learned_names(self.data, answers, embedder)
        mine = test_set.of_my_rows(embedder, partial(_question, test_set, len(answers)))
        source = test_set.source
        if self.image == "shuffled":
            source = ChosenRows(source, np.random.default_rng(0).permutation(len(source)))
        scores: list[float] = []
        length, device = embedder.model.config.text_config.max_position_embeddings, embedder.accelerator.device
        for rows, columns in embedder.image_columns(source):
            batch = mine[len(scores) : len(scores) + len(rows)]
            # A process without a question left answers a dummy, because the forward pass is collective.
            tokens = tokenise(embedder.tokenizer, [question for question, _ in batch] or ["?"], length)
            with torch.no_grad(), embedder.accelerator.autocast():
                logits = embedder.model(**columns, **{name: ids.to(device) for name, ids in tokens.items()}).logits
            best = logits.argmax(dim=1).tolist()
            scores += [accuracy(votes, answer) for (_, votes), answer in zip(batch, best, strict=False)]
        named = [*answers, ""]
        yes_no = [named[max(votes, key=votes.__getitem__)] in ("yes", "no") for _, votes in mine]
        table = embedder.gathered(torch.tensor([scores, yes_no], dtype=torch.float64).T, len(test_set)).numpy()
        all_scores, is_yes_no, results = table[:, 0], table[:, 1] > 0, []
        for metric, label, chosen in (
            ("accuracy", "VQA accuracy", np.ones(len(table), bool)),
            ("accuracy_yes_no", "VQA accuracy, yes or no", is_yes_no),
            ("accuracy_other", "VQA accuracy, other", ~is_yes_no),
        ):
            if chosen.any():
                value, low, high = mean_estimate(all_scores[chosen])
                share, headline = Estimate(value, low, min(high, 1.0)), metric == "accuracy"
                results.append(self.estimated(metric, share, int(chosen.sum()), headline=headline, label=label))
        return results


def accuracy(votes: Mapping[int, int], answer: int) -> float:
    """Return VQAv2's accuracy of an answer, in [0, 1].

    It is min(n / 3, 1) for the n people who gave it, averaged over the subsets that leave out one person. With a single
    person it is 1 for the same answer, else 0."""
    people, same = sum(votes.values()), votes.get(answer, 0)
    if people == 1:
        return float(same)
    without, with_it = min((same - 1) / _ENOUGH, 1.0), min(same / _ENOUGH, 1.0)
    return (same * without + (people - same) * with_it) / people if same else 0.0


def _question(test_set: TestSet, num_answers: int, shard: int, number: int) -> tuple[str, dict[int, int]]:
    """Return a sample's question and the number of people for each answer; `num_answers` is any other answer."""
    where = test_set.place(shard, number)
    question = " ".join(line.strip() for line in test_set.captions_of(shard, number))
    array = test_set.source.read_array(shard, number)
    if array is not None:
        if array.shape != (num_answers + 1,) or array.dtype.kind not in "iu" or not (array >= 0).all():
            raise UserError(
                f"{where} has a KEY.npy of {array.dtype} {array.shape}; it must count the people who gave each of the "
                f"{num_answers} answers, and any other"
            )
        votes = {answer: int(array[answer]) for answer in np.flatnonzero(array).tolist()}
        if votes:
            return question, votes
    label = test_set.source.read_label(shard, number)
    if label is None:
        raise UserError(f"{where} has no answer; vqa needs a KEY.cls or KEY.npy for every question")
    if label >= num_answers:
        raise UserError(f"{where} has answer {label}; {num_answers} answers are listed, counted from 0")
    return question, {label: 1}
