"""Classification by a decoder: the class whose name it finds the most likely caption of the image."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from flipscale.evaluation.captions.writing import Likelihoods
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.images import ChosenRows
from flipscale.evaluation.kinds.prompted import Classifier
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.kinds.zero_shot import ZeroShot, ZeroShotScorer
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet
from flipscale.io.options import Count

Metric = Literal["top1", "top5", "mean_per_class"]


@dataclass(frozen=True)
class Likelihood(Task):
    """`top1`, `top5` (of five classes or more) and `mean_per_class` of classification shards, in percent.

    `data` is laid out as for `zero_shot`. A class's score is the log-likelihood of its prompt under the decoder, the
    sum over its tokens and the end; of several prompts, their mean. The decoder reads each beginning of the prompts for
    each image, a thousand times as much as to write captions for 1,000 classes: give it few prompts, or few images.

    Args:
        templates: as of `zero_shot`.
        metric: the headline.
        images: so many images of the set are tested, from all over it; left out, all.
    """

    templates: str | list[str] | None = None
    metric: Metric = "top1"
    images: Count | None = None

    needs: ClassVar[str] = "decoder"
    protocol: ClassVar[str] = """Classification by likelihood: whole images; the answer is the class whose prompt the
decoder finds the most likely caption, by the sum of its tokens' log-likelihoods (the mean over the set's prompts).
Intervals are as of zero-shot classification."""
    hub_task: ClassVar[str] = "zero-shot-image-classification"
    hub_metric: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        self._zero_shot()

    def check(self) -> None:
        super().check()
        self._zero_shot().check()

    def prompts(self, test_set: TestSet) -> list[str]:
        return self._zero_shot().prompts(test_set)

    def truth(self, test_set: TestSet) -> Callable[[int, int], Any]:
        return partial(test_set.label, len(test_set.class_names()))

    def evaluate(self, embedder: Embedder) -> list[Result]:
        test_set = self._test_set()
        names, prompts = test_set.class_names(), self.prompts(test_set)
        texts = [prompt.replace("{c}", name) for name in names for prompt in prompts]
        likelihoods = Likelihoods(embedder, texts, embedder.most_in_batch(len(test_set)))
        labels = test_set.labels(embedder, len(names))
        scorer = ZeroShotScorer(self._zero_shot(), embedder, _Given(names, torch.empty(0)), labels, len(test_set))
        for rows, columns in embedder.image_columns(test_set.source):
            scores = likelihoods.of(columns)[: len(rows)]
            scorer.add(
                torch.arange(rows.start, rows.stop), scores.view(len(rows), len(names), len(prompts)).mean(dim=2)
            )
        return [replace(result, made_by=self.made_by) for result in scorer.results()]

    def _test_set(self) -> TestSet:
        """Return the set, or the part of it that is tested."""
        test_set = TestSet.open(self.data)
        if self.images is None or self.images >= len(test_set):
            return test_set
        rows = np.linspace(0, len(test_set), self.images, endpoint=False, dtype=np.int64)
        return replace(test_set, source=ChosenRows(test_set.source, rows))

    def _zero_shot(self) -> ZeroShot:
        """Return the task of the same classes and prompts by embeddings, which checks them and counts what is right."""
        return ZeroShot(
            *(self.kind, self.data, self.name),
            image_size=self.image_size,
            templates=self.templates,
            metric=self.metric,
        )


class _Given(Classifier):
    """Classes whose scores are given in place of embeddings."""

    def scores(self, embeds: torch.Tensor) -> torch.Tensor:
        return embeds
