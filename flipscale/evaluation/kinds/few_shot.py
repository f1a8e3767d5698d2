"""Few-shot classification: a linear classifier from a few training images a class, cheap enough to follow a run.

The classifier is big_vision's few-shot probe (`fewshot_lsr`), ridge regression in closed form. Each feature is scaled
to mean 0 and deviation 1 over the training rows. A constant feature of 100 is the intercept. The targets are 1 for a
row's class and -1 for the others, and the penalty is 1,024.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch

from flipscale.data.randomness import keyed_uniform
from flipscale.evaluation.embedding import ChosenRows, Embedder
from flipscale.evaluation.intervals import Estimate, student, wilson
from flipscale.evaluation.kinds.probe import LabelledSets, LinearClassifier, Rows, Total
from flipscale.evaluation.kinds.task import LabelledTask
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet
from flipscale.io.errors import UserError
from flipscale.io.options import Count, Seed

L2 = 1024.0
CONSTANT = 100.0
_LEAST_DEVIATION = 1e-5  # added to each feature's


@dataclass(frozen=True)
class FewShot(LabelledTask):
    """`1_shot`, `5_shot`, ...: top-1 in percent of the test images, as the mean over draws of the training images.

    `data` and `train` have shards with `KEY.cls` and `classnames.txt`. Only the drawn training images are embedded. A
    class with fewer images gives all of them.

    Args:
        train: folder of training images; by default the `train/` of `data`, and its `test/` is the test set.
        shots: numbers of training images a class.
        seeds: seeds of the draws; the images of fewer shots are a subset of those of more.
    """

    train: str = ""
    shots: list[Count] = field(default_factory=lambda: [1, 5, 10, 25])
    seeds: list[Seed] = field(default_factory=lambda: [0, 1, 2])

    needs: ClassVar[str] = "features"
    protocol: ClassVar[str] = """Few-shot classification: ridge regression in closed form (penalty 1,024) on features
before the projection, scaled to mean 0 and deviation 1, of whole images. The figure is the mean over draws of the
training images. Its interval counts both the draws (Student's t) and the test images."""

    def __post_init__(self) -> None:
        if not self.shots:
            raise UserError(f"shots is {self.shots}; list one number or more, such as [1, 5]")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds is {self.seeds}; list one number or more, all different")

    def check(self) -> None:
        self._sets()

    def other_sets(self) -> list[TestSet]:
        return [TestSet.open(self.train or self.data, "train")]

    def evaluate(self, embedder: Embedder) -> list[Result]:
        sets = self._sets()
        classifiers = self._classifiers(embedder, sets)
        labels = sets.test.labels(embedder, len(sets.class_names))
        right, seen = [0] * len(classifiers), 0
        for rows, features in embedder.image_batches(sets.test.source, "pooled"):
            batch = labels[seen : seen + len(rows)]
            seen += len(rows)
            for number, classifier in enumerate(classifiers):
                right[number] += int((classifier.scores(features).argmax(dim=1) == batch).sum())
        n, draws, chance, results = len(sets.test), len(self.seeds), 100.0 / len(sets.class_names), []
        for shots, hits in zip(self.shots, np.array(embedder.total(right)).reshape(-1, draws), strict=True):
            mean = float(hits.mean()) / n
            low, high = wilson(mean * n, n)
            spread = student(draws - 1) * float((hits / n).std(ddof=1)) / math.sqrt(draws) if draws > 1 else 0.0
            share = Estimate(
                mean, max(mean - math.hypot(mean - low, spread), 0.0), min(mean + math.hypot(high - mean, spread), 1.0)
            )
            label, headline = f"{shots}-shot top-1", shots == self.shots[-1]
            results.append(self.estimated(f"{shots}_shot", share, n, chance, headline, label=label))
        return results

    def _sets(self) -> LabelledSets:
        return LabelledSets.open(self.train or self.data, self.data)

    def _classifiers(self, embedder: Embedder, sets: LabelledSets) -> list[LinearClassifier]:
        """Collective. Return the classifier of each number of shots and, within it, of each seed."""
        source, num_classes = sets.train.source, len(sets.class_names)
        labels = embedder.gathered(sets.train.labels(embedder, num_classes)[:, None], len(source))[:, 0]
        ranks = [_ranks(labels.numpy(), seed) for seed in self.seeds]
        drawn = np.flatnonzero(np.min(ranks, axis=0) < max(self.shots))
        mine = drawn[embedder.rows(len(drawn))]
        features = embedder.uncounted().my_images(ChosenRows(source, drawn), "pooled")
        device, total = embedder.accelerator.device, embedder.accelerator.reduce
        known = Rows(features, labels[torch.from_numpy(mine)]).to(device)
        return [
            ridge(known.where(torch.from_numpy(rank[mine] < shots).to(device)), num_classes, total)
            for shots in self.shots
            for rank in ranks
        ]


def ridge(rows: Rows, num_classes: int, total: Total) -> LinearClassifier:
    """Collective. Return the ridge regression of the rows of all processes, fp64. Only sums meet."""
    features = rows.features.double()
    count = total(features.new_tensor([len(features)]))
    mean = total(features.sum(dim=0)) / count
    deviation = (total((features - mean).square().sum(dim=0)) / count).sqrt() + _LEAST_DEVIATION
    inputs = torch.cat([(features - mean) / deviation, features.new_full((len(features), 1), CONSTANT)], dim=1)
    targets = features.new_full((len(features), num_classes), -1.0)
    targets.scatter_(1, rows.labels[:, None], 1.0)
    left, right = total(inputs.t() @ inputs), total(inputs.t() @ targets)
    left.diagonal().add_(L2)
    solved = torch.cholesky_solve(right, torch.linalg.cholesky(left))
    weight = solved[:-1].t() / deviation
    return LinearClassifier(weight, CONSTANT * solved[-1] - weight @ mean)


def _ranks(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return each row's place in a random order of its class, which depends on the seed and the row numbers."""
    noise = keyed_uniform(seed, "few shot", np.arange(len(labels)), 1)[:, 0]
    order = np.lexsort((noise, labels))
    firsts = np.searchsorted(labels[order], labels[order])
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[order] = np.arange(len(labels)) - firsts
    return ranks
