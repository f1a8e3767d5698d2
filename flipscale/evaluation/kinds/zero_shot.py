"""Zero-shot classification: the answer is the class whose name is nearest to the image, with one label or several."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.task import ClassHits, Scorer, StreamedTask
from flipscale.evaluation.kinds.templates import TEMPLATES
from flipscale.evaluation.metrics import average_precision_chance, mean_average_precision, mean_of_two, roc_auc
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet, of_my_rows, read_text
from flipscale.io.errors import UserError

# ImageNet-21k with CLIP's 80 prompts has 1.8 million texts.
_MOST_TEXTS = 10_000_000

_log = logging.getLogger(__name__)


class Classifier(NamedTuple):
    """Class names and their embeddings, `(dim, classes)` of unit length."""

    names: list[str]
    weights: torch.Tensor

    def scores(self, embeds: torch.Tensor) -> torch.Tensor:
        """Return 100 times the cosine of each image `(images, dim)` and each class: `(images, classes)`."""
        return 100.0 * embeds @ self.weights


@dataclass(frozen=True)
class PromptedTask(StreamedTask):
    """A task whose answers are the classes of `classnames.txt`.

    Args:
        templates: `imagenet7` or `imagenet80`, CLIP's prompts, or a list of prompts with `{c}` for the name; the
            folder's own prompts by default.
    """

    templates: str | list[str] | None = None

    def __post_init__(self) -> None:
        if self.templates is None:
            return
        if isinstance(self.templates, str):
            if self.templates not in TEMPLATES:
                raise UserError(f"templates is {self.templates!r}; use {', '.join(TEMPLATES)}, or a list of prompts")
            return
        if not self.templates:
            raise UserError("templates is []; list one prompt or more, with {c} for the name")
        _check_prompts(self.templates, "templates")

    def check(self) -> None:
        super().check()
        test_set = TestSet.open(self.data)
        names, prompts = test_set.class_names(), self.prompts(test_set)
        if len(names) * len(prompts) > _MOST_TEXTS:
            raise UserError(
                f"{self.data} has {len(prompts):,} prompts for each of {len(names):,} classes, more than "
                f"{_MOST_TEXTS:,} texts; use fewer prompts"
            )

    def prompts(self, test_set: TestSet) -> list[str]:
        """Return the prompts, `{c}` for the name.

        Raises:
            UserError: the folder's own prompts are missing or have no `{c}`.
        """
        if isinstance(self.templates, str):
            return TEMPLATES[self.templates]
        if self.templates is not None:
            return self.templates
        # A blank line counts as a prompt, as in CLIP_benchmark.
        prompts = test_set.templates()
        _check_prompts([prompt for prompt in prompts if prompt], self.data)
        return prompts

    def classifier(self, embedder: Embedder, test_set: TestSet) -> Classifier:
        """Collective. Return the embedded classes of the set.

        Raises:
            UserError: class names or prompts are missing.
        """
        return classifier(embedder, test_set.class_names(), self.prompts(test_set))


def classifier(embedder: Embedder, class_names: list[str], templates: list[str]) -> Classifier:
    """Collective. Return embedded classes: the mean over the prompt embeddings, of unit length again, as in CLIP."""
    prompts = [template.replace("{c}", name) for name in class_names for template in templates]
    return Classifier(class_names, embedder.texts(prompts, together=len(templates)).t().contiguous())


@dataclass(frozen=True)
class ZeroShot(PromptedTask):
    """`top1`, `top5` (with five classes or more) and `mean_per_class` of classification shards, in percent.

    `data` has shards with `KEY.cls` in CLIP_benchmark's layout. Beside them are `classnames.txt` and, without
    `templates`, `zeroshot_classification_templates.txt`.

    Args:
        metric: the headline; `mean_top1_top5` and `roc_auc` (two classes) are computed only if named.
        labels: a JSON file beside the class names with a list of class numbers for each image in shard order, such as
            ImageNet-ReaL's. It replaces `KEY.cls`, and the only result is `any_label`: the share of labelled images
            whose nearest class is one of their labels.
    """

    metric: Literal["top1", "top5", "mean_per_class", "mean_top1_top5", "roc_auc"] = "top1"
    labels: str | None = None

    protocol: ClassVar[str] = """Zero-shot classification: whole images, the short side resized to the model's size and
the centre cut out. The answer is the class of highest cosine; a class embedding is the mean over the set's prompts.
Shares have Wilson intervals. The interval of the mean per class sums the class variances and leaves out classes without
images. The interval of an AUC is DeLong's."""
    hub_task: ClassVar[str] = "zero-shot-image-classification"
    hub_metric: ClassVar[str] = "accuracy"

    def check(self) -> None:
        super().check()
        test_set = TestSet.open(self.data)
        num_classes = len(test_set.class_names())
        self._check_num_classes(num_classes)
        if self.labels is not None:
            self._label_sets(test_set, num_classes)

    def truth(self, test_set: TestSet) -> Callable[[int, int], Any]:
        if self.labels is not None:
            return super().truth(test_set)
        return partial(test_set.label, len(test_set.class_names()))

    def scorer(self, embedder: Embedder, test_set: TestSet) -> Scorer:
        num_classes = len(test_set.class_names())
        if self.labels is not None:
            label_sets = self._label_sets(test_set, num_classes)
            return AnyLabelScorer(self, embedder, self.classifier(embedder, test_set), label_sets)
        self._check_num_classes(num_classes)
        labels = test_set.labels(embedder, num_classes)
        return ZeroShotScorer(self, embedder, self.classifier(embedder, test_set), labels, len(test_set))

    def _check_num_classes(self, num_classes: int) -> None:
        if self.metric == "roc_auc" and num_classes != 2:
            raise UserError(f"{self.data} has {num_classes} classes; roc_auc is for two")
        if self.metric in ("top5", "mean_top1_top5") and num_classes < 5:
            raise UserError(f"{self.data} has {num_classes} classes; {self.metric} needs five or more")

    def _label_sets(self, test_set: TestSet, num_classes: int) -> list[list[int]]:
        """Return the class numbers of every image from the file `labels`.

        Raises:
            UserError: the file is missing, or is not a list of class numbers for each image.
        """
        path = f"{test_set.data}/{self.labels}"
        text = read_text(test_set.data, str(self.labels))
        if text is None:
            raise UserError(f"{path} is missing; it lists the class numbers of each image")
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path} is no JSON ({error}); write it anew") from error
        if not isinstance(rows, list) or len(rows) != len(test_set) or not all(isinstance(row, list) for row in rows):
            content = f"{len(rows)} lists" if isinstance(rows, list) else type(rows).__name__
            raise UserError(f"{path} has {content}; it must list the classes of {len(test_set)} images")
        wrong = [number for row in rows for number in row if number not in range(num_classes)]
        if wrong:
            raise UserError(f"{path} has class {wrong[0]}; {num_classes} names are listed")
        if not any(rows):
            raise UserError(f"{path} has no label of any image; write it anew")
        return rows


class ZeroShotScorer(Scorer):
    """Counts the images whose class is the nearest, or among the five nearest."""

    def __init__(
        self, task: ZeroShot, embedder: Embedder, classes: Classifier, labels: torch.Tensor, num_images: int
    ) -> None:
        self._task, self._embedder, self._classes, self._num_images = task, embedder, classes, num_images
        self._hits = ClassHits(task, embedder, labels, classes.names)
        # For two classes: the second score minus the first, and the label.
        self._leads = torch.zeros(len(labels), 2)

    def add(self, rows: torch.Tensor, embeds: torch.Tensor) -> None:
        first, scores = self._hits.seen, self._classes.scores(embeds)
        labels = self._hits.add(scores)
        if self._task.metric == "roc_auc":
            lead = scores[:, 1] - scores[:, 0]
            self._leads[first : first + len(rows)] = torch.stack([lead, labels.float()], dim=1)

    def results(self) -> list[Result]:
        task, n, metric = self._task, self._num_images, self._task.metric
        results, hits = self._hits.results(metric)
        if metric == "mean_top1_top5":
            results.append(
                task.estimated(metric, mean_of_two(hits[0], hits[1], n), n, 300.0 / len(self._classes.names))
            )
        if metric == "roc_auc":
            leads, labels = self._embedder.gathered(self._leads, n).numpy().T
            if len(set(labels.tolist())) < 2:
                raise UserError(f"{task.data} has {n} images of one class; roc_auc needs both")
            results.append(task.estimated(metric, roc_auc(leads, labels == 1), n, 50.0))
        return results


class AnyLabelScorer(Scorer):
    """Counts the labelled images whose nearest class is one of their labels."""

    def __init__(self, task: ZeroShot, embedder: Embedder, classes: Classifier, label_sets: list[list[int]]) -> None:
        self._task, self._embedder, self._classes, self._label_sets = task, embedder, classes, label_sets
        self._hits = 0

    def add(self, rows: torch.Tensor, embeds: torch.Tensor) -> None:
        nearest = self._classes.scores(embeds).argmax(dim=1).tolist()
        self._hits += sum(best in self._label_sets[row] for row, best in zip(rows.tolist(), nearest, strict=True))

    def results(self) -> list[Result]:
        (hits,) = self._embedder.total([self._hits])
        sizes = [len(set(labels)) for labels in self._label_sets if labels]
        chance = 100.0 * sum(sizes) / len(sizes) / len(self._classes.names)
        return [self._task.proportion("any_label", hits, len(sizes), chance)]


@dataclass(frozen=True)
class ZeroShotMultilabel(PromptedTask):
    """`map11`, over VOC 2007's eleven points, and `map`, CLIP_benchmark's plain mean average precision, in percent.

    `data` is laid out as for `zero_shot`, with `KEY.npy` in place of `KEY.cls`: an array with 1 for each class of the
    image, else 0. Every process holds the scores of all images and classes, 5 bytes each.

    Args:
        metric: the headline.
    """

    metric: Literal["map11", "map"] = "map11"

    protocol: ClassVar[
        str
    ] = """Zero-shot classification with several labels: images and classes are embedded as for one
label. Each class ranks the images by cosine, and the class average precisions are averaged. map11 takes the highest
precision at a recall of 0, 0.1, ... 1 or more; map takes the precision at each image of the class. A class without
images has 0, as in CLIP_benchmark. Intervals are 1.96 standard deviations over 200 bootstrap draws of the images."""
    hub_task: ClassVar[str] = "zero-shot-image-classification"

    def truth(self, test_set: TestSet) -> Callable[[int, int], Any]:
        return partial(test_set.label_set, len(test_set.class_names()))

    def scorer(self, embedder: Embedder, test_set: TestSet) -> "MultilabelScorer":
        num_classes = len(test_set.class_names())
        labels = of_my_rows(embedder, test_set.source, partial(test_set.label_set, num_classes))
        table = torch.from_numpy(np.array(labels, np.uint8).reshape(len(labels), num_classes))
        return MultilabelScorer(self, embedder, self.classifier(embedder, test_set), table, len(test_set))


class MultilabelScorer(Scorer):
    """Keeps the scores of this process's images and ranks all images at the end."""

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
        positive = self._embedder.gathered(self._labels, n).numpy().astype(bool)
        positives = positive.sum(axis=0)
        empty = [name for name, count in zip(self._classes.names, positives, strict=True) if not count]
        if empty and self._embedder.accelerator.is_main_process:
            _log.warning(
                "%s: %d of %d classes have no image, such as %r; each counts as 0",
                *(task.name, len(empty), len(positives), empty[0]),
            )
        chance = 100.0 * average_precision_chance(positives, n)
        eleven, plain = (mean_average_precision(scores, positive, points) for points in (True, False))
        return [
            task.estimated("map11", eleven, n, headline=task.metric == "map11"),
            task.estimated("map", plain, n, chance, headline=task.metric == "map"),
        ]


def _check_prompts(prompts: list[str], where: str) -> None:
    for prompt in prompts:
        if "{c}" not in prompt:
            raise UserError(f"{where} has the prompt {prompt!r:.80}; each prompt must have {{c}} for the name")
