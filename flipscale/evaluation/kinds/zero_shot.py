"""Zero-shot classification: the nearest class name, the embeddings of all templates averaged and renormalised."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.prompted import Classifier, PromptedTask
from flipscale.evaluation.kinds.task import Scorer
from flipscale.evaluation.metrics import any_hits, hits_at, mean_of_two, mean_per_class, roc_auc
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet, read_text
from flipscale.io.errors import UserError

Metric = Literal["top1", "top5", "mean_per_class", "mean_top1_top5", "roc_auc"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ZeroShot(PromptedTask):
    """`top1`, `top5` (of five classes or more) and `mean_per_class` of classification shards, in percent.

    `data` has shards with `KEY.cls`, and beside them `classnames.txt` and (unless `templates` is given)
    `zeroshot_classification_templates.txt` with `{c}` for the name, as CLIP_benchmark lays them out.

    Args:
        metric: the headline; `mean_top1_top5` and, of two classes, `roc_auc` are there only if they are named.
        labels: a file beside the class names, a JSON list with the class numbers of each image in the order of the
            shards, such as ImageNet-ReaL's, in place of `KEY.cls`; the one result is then `any_label`, the share of the
            images with labels whose nearest class is one of them.
    """

    metric: Metric = "top1"
    labels: str | None = None

    protocol: ClassVar[str] = """Zero-shot classification: whole images, the short side resized to the model's size and
the centre cut out; the answer is the class whose embedding (the mean over the set's prompts) is nearest in cosine.
Intervals of shares are Wilson's; that of the mean per class, which leaves out classes without images, sums the classes'
variances, that of an AUC is DeLong's."""
    hub_task: ClassVar[str] = "zero-shot-image-classification"
    hub_metric: ClassVar[str] = "accuracy"

    def check(self) -> None:
        super().check()
        test_set = TestSet.open(self.data)
        self._refuse_few_or_many(len(test_set.class_names()))
        if self.labels is not None:
            self._label_sets(test_set, len(test_set.class_names()))

    def truth(self, test_set: TestSet) -> Callable[[int, int], Any]:
        if self.labels is not None:
            return super().truth(test_set)
        return partial(test_set.label, len(test_set.class_names()))

    def scorer(self, embedder: Embedder, test_set: TestSet) -> Scorer:
        num_classes = len(test_set.class_names())
        if self.labels is not None:
            label_sets = self._label_sets(test_set, num_classes)
            return AnyLabelScorer(self, embedder, self.classifier(embedder, test_set), label_sets)
        self._refuse_few_or_many(num_classes)
        labels = test_set.labels(embedder, num_classes)
        return ZeroShotScorer(self, embedder, self.classifier(embedder, test_set), labels, len(test_set))

    def _refuse_few_or_many(self, num_classes: int) -> None:
        if self.metric == "roc_auc" and num_classes != 2:
            raise UserError(f"{self.data} has {num_classes} classes; roc_auc is of two")
        if self.metric in ("top5", "mean_top1_top5") and num_classes < 5:
            raise UserError(f"{self.data} has {num_classes} classes; {self.metric} needs five or more")

    def _label_sets(self, test_set: TestSet, num_classes: int) -> list[list[int]]:
        """Return the class numbers of every image, from the file `labels`.

        Raises:
            ValueError: it is missing, or not a list of class numbers for each image.
        """
        text = read_text(test_set.data, str(self.labels))
        if text is None:
            raise UserError(f"{test_set.data}/{self.labels} is missing; it lists the class numbers of each image")
        try:
            found = json.loads(text)
        except ValueError as error:
            raise UserError(f"{test_set.data}/{self.labels} is no JSON ({error}); write it anew") from error
        rows = found if isinstance(found, list) else []
        if len(rows) != len(test_set) or not all(isinstance(row, list) for row in rows):
            what = f"{len(rows)} lists" if isinstance(found, list) else type(found).__name__
            raise UserError(
                f"{test_set.data}/{self.labels} has {what}; it must list the classes of {len(test_set)} images"
            )
        wrong = [number for row in rows for number in row if number not in range(num_classes)]
        if wrong:
            raise UserError(f"{test_set.data}/{self.labels} has class {wrong[0]}; {num_classes} names are listed")
        if not any(rows):
            raise UserError(f"{test_set.data}/{self.labels} has no label of any image; write it anew")
        return rows


class ZeroShotScorer(Scorer):
    """Counts, by class, the images whose class is the nearest, or among the five nearest."""

    def __init__(
        self, task: ZeroShot, embedder: Embedder, classes: Classifier, labels: torch.Tensor, num_images: int
    ) -> None:
        self._task, self._embedder, self._classes, self._labels = task, embedder, classes, labels
        self._num_images = num_images
        self._num_classes = len(classes.names)
        self._ks = [1, 5] if self._num_classes >= 5 else [1]
        self._seen = 0
        self._hits = torch.zeros(len(self._ks), dtype=torch.int64)
        self._right = torch.zeros(self._num_classes, dtype=torch.int64)
        # Of two classes: by how much the second is nearer, and the label.
        self._leads = torch.zeros(len(labels), 2)

    def add(self, rows: torch.Tensor, embeds: torch.Tensor) -> None:
        labels = self._labels[self._seen : self._seen + len(rows)]
        scores = self._classes.scores(embeds)
        self._hits += hits_at(scores, labels, self._ks).sum(dim=0)
        self._right += torch.bincount(labels[scores.argmax(dim=1) == labels], minlength=self._num_classes)
        if self._task.metric == "roc_auc":
            lead = scores[:, 1] - scores[:, 0]
            self._leads[self._seen : self._seen + len(rows)] = torch.stack([lead, labels.float()], dim=1)
        self._seen += len(rows)

    def results(self) -> list[Result]:
        task, n, metric = self._task, self._num_images, self._task.metric
        images = torch.bincount(self._labels, minlength=self._num_classes)
        found = np.array(self._embedder.total([*self._hits.tolist(), *self._right.tolist(), *images.tolist()]))
        hits, (right, counts) = found[: len(self._ks)].tolist(), np.split(found[len(self._ks) :], 2)
        self._warn_of_empty(counts)
        chance = 100.0 / self._num_classes
        results = [task.proportion("top1", hits[0], n, chance, headline=metric == "top1")]
        if len(hits) > 1:
            results.append(task.proportion("top5", hits[1], n, 5 * chance, headline=metric in ("top1", "top5")))
        mean = mean_per_class(right, counts)
        results.append(task.estimated("mean_per_class", mean, n, chance, headline=metric == "mean_per_class"))
        if metric == "mean_top1_top5":
            results.append(task.estimated(metric, mean_of_two(hits[0], hits[1], n), n, 3 * chance))
        if metric == "roc_auc":
            leads, labels = self._embedder.gathered(self._leads, n).numpy().T
            if counts.min() == 0:
                raise UserError(f"{task.data} has {n} images of one class; roc_auc needs both")
            results.append(task.estimated(metric, roc_auc(leads, labels == 1), n, 50.0))
        return results

    def _warn_of_empty(self, counts: np.ndarray) -> None:
        empty = [name for name, count in zip(self._classes.names, counts, strict=True) if not count]
        if empty and self._embedder.accelerator.is_main_process:
            _log.warning(
                "%s: %d of %d classes have no image, such as %r; the mean per class leaves them out",
                *(self._task.name, len(empty), len(counts), empty[0]),
            )


class AnyLabelScorer(Scorer):
    """Counts the images with labels whose nearest class is one of them."""

    def __init__(self, task: ZeroShot, embedder: Embedder, classes: Classifier, label_sets: list[list[int]]) -> None:
        self._task, self._embedder, self._classes, self._label_sets = task, embedder, classes, label_sets
        self._hits = 0

    def add(self, rows: torch.Tensor, embeds: torch.Tensor) -> None:
        right = torch.zeros(len(rows), len(self._classes.names), dtype=torch.bool)
        for place, row in enumerate(rows.tolist()):
            right[place, self._label_sets[row]] = True
        self._hits += int(any_hits(self._classes.scores(embeds), right).sum())

    def results(self) -> list[Result]:
        (hits,) = self._embedder.total([self._hits])
        sizes = [len(set(labels)) for labels in self._label_sets if labels]
        chance = 100.0 * sum(sizes) / len(sizes) / len(self._classes.names)
        return [self._task.proportion("any_label", hits, len(sizes), chance)]
