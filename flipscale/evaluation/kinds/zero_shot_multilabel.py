"""Zero-shot classification of images with several labels: the mean over classes of the average precision."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.prompted import Classifier, PromptedTask
from flipscale.evaluation.kinds.task import Scorer
from flipscale.evaluation.metrics import average_precision_chance, mean_average_precision
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ZeroShotMultilabel(PromptedTask):
    """`map11`, of VOC 2007's eleven points, and `map`, the plain one of CLIP_benchmark, in percent.

    `data` is as of `zero_shot`, with `KEY.npy` in place of `KEY.cls`: an array of 1 for each class of the image, else
    0. Every process holds the scores of all images and classes, 5 bytes of each.

    Args:
        metric: the headline.
    """

    metric: Literal["map11", "map"] = "map11"

    protocol: ClassVar[str] = """Zero-shot classification of several labels: images and classes are embedded as for one
label; each class orders the images by cosine, and the classes' average precisions are
averaged. map11 takes the highest precision at a recall of 0, 0.1, ... 1 or more, map the precision at each image of
the class; a class without images has 0, as in CLIP_benchmark. Intervals are 1.96 standard deviations of 200 bootstrap
draws of the images."""
    hub_task: ClassVar[str] = "zero-shot-image-classification"

    def truth(self, test_set: TestSet) -> Callable[[int, int], Any]:
        return partial(test_set.label_set, len(test_set.class_names()))

    def scorer(self, embedder: Embedder, test_set: TestSet) -> "MultilabelScorer":
        labels = test_set.label_sets(embedder, len(test_set.class_names()))
        return MultilabelScorer(self, embedder, self.classifier(embedder, test_set), labels, len(test_set))


class MultilabelScorer(Scorer):
    """Keeps the scores of this process's images, and orders those of all at the end."""

    def __init__(
        self, task: ZeroShotMultilabel, embedder: Embedder, classes: Classifier, labels: torch.Tensor, num_images: int
    ) -> None:
        self._task, self._embedder, self._classes, self._labels = task, embedder, classes, labels
        self._num_images = num_images
        self._scores = torch.zeros(len(labels), len(classes.names))
        self._seen = 0

    def add(self, rows: torch.Tensor, embeds: torch.Tensor) -> None:
        self._scores[self._seen : self._seen + len(rows)] = self._classes.scores(embeds)
        self._seen += len(rows)

    def results(self) -> list[Result]:
        task, n = self._task, self._num_images
        scores = self._embedder.gathered(self._scores, n).numpy()
        positive = self._embedder.gathered(self._labels.to(torch.uint8), n).numpy().astype(bool)
        positives = positive.sum(axis=0)
        self._warn_of_empty(positives.tolist())
        chance = 100.0 * average_precision_chance(positives, n)
        eleven, plain = (mean_average_precision(scores, positive, points) for points in (True, False))
        return [
            task.estimated("map11", eleven, n, headline=task.metric == "map11"),
            task.estimated("map", plain, n, chance, headline=task.metric == "map"),
        ]

    def _warn_of_empty(self, positives: list[int]) -> None:
        empty = [name for name, count in zip(self._classes.names, positives, strict=True) if not count]
        if empty and self._embedder.accelerator.is_main_process:
            _log.warning(
                "%s: %d of %d classes have no image, such as %r; each counts as 0",
                *(self._task.name, len(empty), len(positives), empty[0]),
            )
