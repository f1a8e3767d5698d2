"""Few-shot classification: a linear classifier of a few training images a class, cheap enough to follow a run by."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from flipscale.data.randomness import keyed_uniform
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.images import ChosenRows
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.metrics import wilson
from flipscale.evaluation.probe.ridge import ridge
from flipscale.evaluation.probe.rows import Classifier, Rows, total_of
from flipscale.evaluation.probe.sets import LabelledSet, Sets
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet
from flipscale.io.errors import UserError
from flipscale.io.options import Count, Seed

# Student's t of a two-sided 95 % interval, for 2, 3, ... draws.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class FewShot(Task):
    """`1_shot`, `5_shot`, ...: top-1 in percent of the test images, the mean over draws of the training images.

    `data` and `train` have shards with `KEY.cls` and `classnames.txt`. Only the drawn training images are embedded. A
    class that has fewer images gives all it has.

    Args:
        train: the folder of training images; left out, the `train/` of `data`, whose `test/` is tested.
        shots: how many training images a class has.
        seeds: of the draws; the images of fewer shots are among those of more.
    """

    train: str = ""
    shots: list[Count] = field(default_factory=lambda: [1, 5, 10, 25])
    seeds: list[Seed] = field(default_factory=lambda: [0, 1, 2])

    needs: ClassVar[str] = "features"
    protocol: ClassVar[str] = """Few-shot classification: ridge regression in closed form (penalty 1,024) on features
before the projection, brought to mean 0 and deviation 1, of whole images; the mean over draws of the training images.
The interval counts both the draws (Student's t) and the test images."""
    hub_task: ClassVar[str] = "image-classification"
    hub_metric: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        if not self.shots:
            raise UserError(f"shots is {self.shots}; it must list one number or more, such as [1, 5]")
        if not 1 <= len(set(self.seeds)) == len(self.seeds) <= len(_T95) + 1:
            raise UserError(f"seeds is {self.seeds}; it must list 1 to {len(_T95) + 1} different numbers")

    def check(self) -> None:
        self._sets()

    def truth(self, test_set: TestSet) -> Callable[[int, int], Any]:
        return partial(test_set.label, len(test_set.class_names()))

    def other_sets(self) -> list[TestSet]:
        return [TestSet.open(self.train or self.data, "train")]

    def evaluate(self, embedder: Embedder) -> list[Result]:
        sets = self._sets()
        classifiers = self._classifiers(embedder, sets)
        device, labels = embedder.accelerator.device, sets.test.labels(embedder)
        right, seen = [0] * len(classifiers), 0
        for rows, found in embedder.image_batches(sets.test.source, "pooled"):
            asked = Rows(found, labels[seen : seen + len(rows)]).to(device)
            seen += len(rows)
            for number, classifier in enumerate(classifiers):
                right[number] += int((classifier.answers(asked.features) == asked.labels).sum())
        hits = np.array(embedder.total(right)).reshape(len(self.shots), len(self.seeds))
        chance = 100.0 / len(sets.test.class_names)
        return [
            self._result(shots, some, len(sets.test.source), chance)
            for shots, some in zip(self.shots, hits, strict=True)
        ]

    def _sets(self) -> Sets:
        return Sets(LabelledSet.open(self.train or self.data, "train"), LabelledSet.open(self.data, "test"))

    def _classifiers(self, embedder: Embedder, sets: Sets) -> list[Classifier]:
        """Collective. Return the classifier of each number of shots and, within it, of each seed."""
        source, num_classes = sets.train.source, len(sets.train.class_names)
        labels = embedder.gathered(sets.train.labels(embedder)[:, None], len(source))[:, 0]
        ranks = [_ranks(labels.numpy(), seed) for seed in self.seeds]
        drawn = np.flatnonzero(np.min(ranks, axis=0) < max(self.shots))
        mine = drawn[embedder.rows(len(drawn))]
        # A bar over the test images does not count these.
        quiet = embedder if embedder.progress is None else replace(embedder, progress=lambda images: None)
        features = quiet.my_images(ChosenRows(source, drawn), "pooled")
        device, total = embedder.accelerator.device, total_of(embedder.accelerator)
        known = Rows(features, labels[torch.from_numpy(mine)]).to(device)
        return [
            ridge(known.where(torch.from_numpy(rank[mine] < shots).to(device)), num_classes, total)
            for shots in self.shots
            for rank in ranks
        ]

    def _result(self, shots: int, hits: np.ndarray, n: int, chance: float) -> Result:
        """Return the result of as many draws as there are `hits`, each of `n` test images."""
        mean = float(hits.mean()) / n
        low, high = wilson(mean * n, n)
        draws = len(hits)
        spread = _T95[draws - 2] * float((hits / n).std(ddof=1)) / math.sqrt(draws) if draws > 1 else 0.0
        return Result(
            *(self.name, self.kind, f"{shots}_shot", 100.0 * mean, n),
            low=100.0 * max(mean - math.hypot(mean - low, spread), 0.0),
            high=100.0 * min(mean + math.hypot(high - mean, spread), 1.0),
            label=f"{shots}-shot top-1",
            chance=chance,
            headline=shots == self.shots[-1],
            made_by=self.made_by,
        )


def _ranks(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return each row's place in a random order of its class's rows, which the seed and the row numbers decide."""
    noise = keyed_uniform(seed, "few shot", np.arange(len(labels)), 1)[:, 0]
    order = np.lexsort((noise, labels))
    firsts = np.searchsorted(labels[order], labels[order])
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[order] = np.arange(len(labels)) - firsts
    return ranks
