"""Classification by the model's own head, after fine-tuning."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.task import ClassHits, LabelledTask
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet
from flipscale.io.errors import UserError


@dataclass(frozen=True)
class Classification(LabelledTask):
    """`top1`, `top5` (with five classes or more) and `mean_per_class` of classification shards, in percent.

    `data` has shards with `KEY.cls`, and beside them `classnames.txt` with the classes of the model's head. `metric`
    is the headline.
    """

    metric: Literal["top1", "mean_per_class"] = "top1"

    needs: ClassVar[str] = "head"
    protocol: ClassVar[str] = """Classification by the model's head: whole images, the short side resized to the model's
size and the centre cut out. Shares have Wilson intervals. The interval of the mean per class sums the class variances
and leaves out classes without images."""

    def check(self) -> None:
        super().check()
        TestSet.open(self.data).class_names()

    def evaluate(self, embedder: Embedder) -> list[Result]:
        test_set = TestSet.open(self.data)
        names, num_labels = test_set.class_names(), embedder.model.config.num_labels
        if len(names) != num_labels:
            raise UserError(
                f"{self.data} names {len(names)} classes, and the model's head has {num_labels}; use the test set of "
                "the head's classes"
            )
        hits = ClassHits(self, embedder, test_set.labels(embedder, len(names)), names)
        for rows, columns in embedder.image_columns(test_set.source):
            with torch.no_grad(), embedder.accelerator.autocast():
                hits.add(embedder.image_features(**columns).float().cpu()[: len(rows)])
        return hits.results(self.metric)
