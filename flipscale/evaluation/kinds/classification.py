"""Classification by a model's own head, as fine-tuning trains it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.metrics import hits_at, mean_per_class
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet
from flipscale.io.errors import UserError


@dataclass(frozen=True)
class Classification(Task):
    """`top1`, `top5` (of five classes or more) and `mean_per_class` of classification shards, in percent.

    `data` has shards with `KEY.cls`, and beside them `classnames.txt`, whose classes are those of the model's head.

    Args:
        metric: the headline.
    """

    metric: Literal["top1", "mean_per_class"] = "top1"

    needs: ClassVar[str] = "head"
    protocol: ClassVar[str] = """Classification by the model's head: whole images, the short side resized to the model's
size and the centre cut out. Intervals of shares are Wilson's; that of the mean per class, which leaves out classes
without images, sums the classes' variances."""
    hub_task: ClassVar[str] = "image-classification"
    hub_metric: ClassVar[str] = "accuracy"

    def check(self) -> None:
        super().check()
        TestSet.open(self.data).class_names()

    def truth(self, test_set: TestSet) -> Callable[[int, int], Any]:
        return partial(test_set.label, len(test_set.class_names()))

    def evaluate(self, embedder: Embedder) -> list[Result]:
        test_set = TestSet.open(self.data)
        num_classes, of_head = len(test_set.class_names()), embedder.model.config.num_labels
        if num_classes != of_head:
            raise UserError(
                f"{self.data} names {num_classes} classes, and the model's head has {of_head}; test it on its own"
            )
        labels = test_set.labels(embedder, num_classes)
        ks = [1, 5] if num_classes >= 5 else [1]
        hits, right = torch.zeros(len(ks), dtype=torch.int64), torch.zeros(num_classes, dtype=torch.int64)
        seen = 0
        for rows, columns in embedder.image_columns(test_set.source):
            with torch.no_grad(), embedder.accelerator.autocast():
                logits = embedder.image_features(**columns).float().cpu()[: len(rows)]
            mine = labels[seen : seen + len(rows)]
            hits += hits_at(logits, mine, ks).sum(dim=0)
            right += torch.bincount(mine[logits.argmax(dim=1) == mine], minlength=num_classes)
            seen += len(rows)
        images = torch.bincount(labels, minlength=num_classes)
        found = np.array(embedder.total([*hits.tolist(), *right.tolist(), *images.tolist()]))
        (top1, *top5), (of_class, counts) = found[: len(ks)].tolist(), np.split(found[len(ks) :], 2)
        n, chance = len(test_set), 100.0 / num_classes
        results = [self.proportion("top1", top1, n, chance, headline=self.metric == "top1")]
        results += [self.proportion("top5", hits, n, 5 * chance, headline=self.metric == "top1") for hits in top5]
        mean = mean_per_class(of_class, counts)
        return [*results, self.estimated("mean_per_class", mean, n, chance, headline=self.metric == "mean_per_class")]
