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
from flipscale.evaluation.metrics import average_precision_chance, mean_average_precision, mean_of_two, roc_auc
from flipscale.evaluation.results import Result
from flipscale.evaluation.task_page import TEMPLATES
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

    hub_task: ClassVar[str] = "zero-shot-image-classification"

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
        if isinstance(self.templates, str):
            return TEMPLATES[self.templates]
        if self.templates is not None:
            return self.templates
        # A blank line counts as a prompt, as in CLIP_benchmark.
        prompts = test_set.templates()
        _check_prompts([prompt for prompt in prompts if prompt], self.data)
        return prompts

    def classifier(self, embedder: Embedder, test_set: TestSet) -> Classifier:
        return classifier(embedder, test_set.class_names(), self.prompts(test_set))


def classifier(embedder: Embedder, class_names: list[str], templates: list[str]) -> Classifier:
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
        num_classes, n, metric = len(test_set.class_names()), len(test_set), self.metric
        if self.labels is not None:
            return self._any_label_scorer(embedder, test_set, self._label_sets(test_set, num_classes))
        self._check_num_classes(num_classes)
        labels = test_set.labels(embedder, num_classes)
        classes = self.classifier(embedder, test_set)
        counted = ClassHits(self, embedder, labels, classes.names)
        # For two classes: the second score minus the first, and the label.
        leads = torch.zeros(len(labels), 2)

        def add(mine: slice, rows: torch.Tensor, embeds: torch.Tensor) -> None:
            scores = classes.scores(embeds)
            counted.add(scores)
            if metric == "roc_auc":
                leads[mine] = torch.stack([scores[:, 1] - scores[:, 0], labels[mine].float()], dim=1)

        def results() -> list[Result]:
            results, hits = counted.results(metric)
            if metric == "mean_top1_top5":
                results.append(self.estimated(metric, mean_of_two(hits[0], hits[1], n), n, 300.0 / num_classes))
            if metric == "roc_auc":
                lead, label = embedder.gathered(leads, n).numpy().T
                if len(set(label.tolist())) < 2:
                    raise UserError(f"{self.data} has {n} images of one class; roc_auc needs both")
                results.append(self.estimated(metric, roc_auc(lead, label == 1), n, 50.0))
            return results

        return Scorer(add, results)

    def _any_label_scorer(self, embedder: Embedder, test_set: TestSet, label_sets: list[list[int]]) -> Scorer:
        classes, mine = self.classifier(embedder, test_set), [0]

        def add(_: slice, rows: torch.Tensor, embeds: torch.Tensor) -> None:
            nearest = classes.scores(embeds).argmax(dim=1).tolist()
            mine[0] += sum(best in label_sets[row] for row, best in zip(rows.tolist(), nearest, strict=True))

        def results() -> list[Result]:
            sizes = [len(set(labels)) for labels in label_sets if labels]
            chance = 100.0 * sum(sizes) / len(sizes) / len(classes.names)
            (hits,) = embedder.total(mine)
            return [self.proportion("any_label", hits, len(sizes), chance)]

        return Scorer(add, results)

    def _check_num_classes(self, num_classes: int) -> None:
        if self.metric == "roc_auc" and num_classes != 2:
            raise UserError(f"{self.data} has {num_classes} classes; roc_auc is for two")
        if self.metric in ("top5", "mean_top1_top5") and num_classes < 5:
            raise UserError(f"{self.data} has {num_classes} classes; {self.metric} needs five or more")

    def _label_sets(self, test_set: TestSet, num_classes: int) -> list[list[int]]:
        path = f"{test_set.data}/{self.labels}"
        text = read_text(test_set.data, str(self.labels))
        if text is None:
            raise UserError(f"{path} is missing; it lists the class numbers of each image")
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path} is no JSON ({error}); write it anew") from error
        count = len(TestSet.open(self.data))
        if not isinstance(rows, list) or len(rows) != count or not all(isinstance(row, list) for row in rows):
            content = f"{len(rows)} lists" if isinstance(rows, list) else type(rows).__name__
            raise UserError(f"{path} has {content}; it must list the classes of {count} images")
        wrong = [number for row in rows for number in row if number not in range(num_classes)]
        if wrong:
            raise UserError(f"{path} has class {wrong[0]}; {num_classes} names are listed")
        rows = [rows[number] for number in test_set.row_numbers]
        if not any(rows):
            raise UserError(f"{path} has no label of any image; write it anew")
        return rows


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

    def truth(self, test_set: TestSet) -> Callable[[int, int], Any]:
        return partial(test_set.label_set, len(test_set.class_names()))

    def scorer(self, embedder: Embedder, test_set: TestSet) -> Scorer:
        num_classes, n = len(test_set.class_names()), len(test_set)
        labels = of_my_rows(embedder, test_set.source, partial(test_set.label_set, num_classes))
        my_labels = torch.from_numpy(np.array(labels, np.uint8).reshape(len(labels), num_classes))
        classes = self.classifier(embedder, test_set)
        my_scores = torch.zeros(len(labels), num_classes)

        def add(mine: slice, rows: torch.Tensor, embeds: torch.Tensor) -> None:
            my_scores[mine] = classes.scores(embeds)

        def results() -> list[Result]:
            scores = embedder.gathered(my_scores, n).numpy()
            positive = embedder.gathered(my_labels, n).numpy().astype(bool)
            positives = positive.sum(axis=0)
            empty = [name for name, count in zip(classes.names, positives, strict=True) if not count]
            if empty and embedder.accelerator.is_main_process:
                message = "%s: %d of %d classes have no image, such as %r; each counts as 0"
                _log.warning(message, self.name, len(empty), num_classes, empty[0])
            chance = 100.0 * average_precision_chance(positives, n)
            eleven, plain = (mean_average_precision(scores, positive, points) for points in (True, False))
            return [
                self.estimated("map11", eleven, n, headline=self.metric == "map11"),
                self.estimated("map", plain, n, chance, headline=self.metric == "map"),
            ]

        return Scorer(add, results)


def _check_prompts(prompts: list[str], where: str) -> None:
    for prompt in prompts:
        if "{c}" not in prompt:
            raise UserError(f"{where} has the prompt {prompt!r:.80}; each prompt must have {{c}} for the name")
