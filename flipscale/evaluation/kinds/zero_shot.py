"""Classification: zero-shot, by the class whose name is nearest to the image, with one label or several; and by the
model's own head, after fine-tuning."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.task import LabelledTask, Task, check_learned_names
from flipscale.evaluation.metrics import average_precision_chance, hits_by_class, mean_average_precision, roc_auc
from flipscale.evaluation.results import Result
from flipscale.evaluation.task_page import TEMPLATES
from flipscale.evaluation.test_set import TestSet, read_list, read_text
from flipscale.io.errors import UserError

# ImageNet-21k with CLIP's 80 prompts has 1.8 million texts.
_MOST_TEXTS = 10_000_000

_log = logging.getLogger(__name__)

Scores = Callable[[torch.Tensor], torch.Tensor]


def classifier(embedder: Embedder, class_names: list[str], templates: list[str]) -> Scores:
    """Collective. Return a function from embeddings to 100 times their cosines with classes, `(images, classes)`."""
    prompts = [template.replace("{c}", name) for name in class_names for template in templates]
    weights = embedder.texts(prompts, together=len(templates)).t().contiguous()
    return lambda embeds: 100.0 * embeds @ weights


@dataclass(frozen=True)
class PromptedTask(Task):
    """A task whose answers are the classes of `classnames.txt`.

    Args:
        templates: `imagenet7` or `imagenet80`, CLIP's prompts, or a list of prompts with `{c}` for the name; the
            folder's own prompts by default.
    """

    templates: str | list[str] | None = None

    hub_task: ClassVar[str] = "zero-shot-image-classification"

    def __post_init__(self) -> None:
        if isinstance(self.templates, list):
            if not self.templates:
                raise UserError("templates is []; list one prompt or more, with {c} for the name")
            _check_prompts(self.templates, "templates")
        elif self.templates not in (None, *TEMPLATES):
            raise UserError(f"templates is {self.templates!r}; use {', '.join(TEMPLATES)}, or a list of prompts")

    def check(self) -> None:
        super().check()
        test_set = TestSet.open(self.data)
        names, prompts = test_set.class_names(), self.prompts(test_set)
        if len(names) * len(prompts) > _MOST_TEXTS:
            raise UserError(
                f"{self.data} has {len(prompts):,} prompts for each of {len(names):,} classes, more than "
                f"{_MOST_TEXTS:,} texts; use fewer prompts"
            )
        if getattr(self, "metric", None) == "top5" and len(names) <= 5:
            raise UserError(f"{self.data} has {len(names)} classes; the metric top5 needs six or more")

    def prompts(self, test_set: TestSet) -> list[str]:
        if isinstance(self.templates, str):
            return TEMPLATES[self.templates]
        if self.templates is not None:
            return self.templates
        # A blank line counts as a prompt, as in CLIP_benchmark.
        prompts = test_set.templates()
        _check_prompts([prompt for prompt in prompts if prompt], self.data)
        return prompts

    def classifier(self, embedder: Embedder, test_set: TestSet) -> Scores:
        return classifier(embedder, test_set.class_names(), self.prompts(test_set))


@dataclass(frozen=True)
class ZeroShot(PromptedTask, LabelledTask):
    """`top1`, `top5` (with five classes or more) and `mean_per_class` of classification shards, in percent.

    `data` has shards with `KEY.cls` in CLIP_benchmark's layout. Beside them are `classnames.txt` and, without
    `templates`, `zeroshot_classification_templates.txt`.

    Args:
        metric: the headline; `roc_auc` (two classes) is computed only if named.
        labels: a JSON file next to the class names with a list of class numbers for each image in shard order, such as
            ImageNet-ReaL's. It replaces `KEY.cls`, and the only result is `any_label`: the share of labelled images
            whose nearest class is one of their labels.
    """

    metric: Literal["top1", "top5", "mean_per_class", "roc_auc"] = "top1"
    labels: str | None = None

    protocol: ClassVar[str] = """Zero-shot classification: whole images, the short side resized to the model's size and
the centre cut out. The answer is the class of highest cosine; a class embedding is the mean over the set's prompts.
Shares have Wilson intervals. The interval of the mean per class sums the class variances and leaves out classes without
images. The interval of an AUC is DeLong's."""

    def check(self) -> None:
        super().check()
        test_set = TestSet.open(self.data)
        num_classes = len(test_set.class_names())
        if num_classes < 2:
            raise UserError(f"{self.data} has 1 class, which every image would get; name two or more")
        if self.metric == "roc_auc" and num_classes != 2:
            raise UserError(f"{self.data} has {num_classes} classes; roc_auc is for two")
        if self.labels is not None:
            self._label_sets(test_set)

    def contents(self) -> list[Any]:
        return [read_text(self.data, self.labels)] if self.labels else []

    def truth(self, test_set: TestSet) -> Callable[[int, int], Any]:
        # Label files are checked as a whole.
        return Task.truth(self, test_set) if self.labels is not None else super().truth(test_set)

    def evaluate(self, embedder: Embedder, test_set: TestSet) -> list[Result]:
        if self.labels is not None:
            return self._any_label(embedder, test_set)
        names, n = test_set.class_names(), len(test_set)
        labels = test_set.labels(embedder, len(names))
        hits = torch.zeros(len(labels), 4, dtype=torch.int32)
        leads = torch.zeros(len(labels), 1)  # of the second class over the first, for `roc_auc`
        for mine, scores in self.scored(embedder, test_set):
            hits[mine] = hits_by_class(scores, labels[mine])
            leads[mine] = scores[:, 1:2] - scores[:, :1]
        results = self.class_results(embedder, embedder.gathered(hits, n).numpy(), names, self.metric)
        if self.metric == "roc_auc":
            positive = embedder.gathered(labels, n).numpy() == 1
            if positive.all() or not positive.any():
                raise UserError(f"{self.data} has {n} images of one class; roc_auc needs both")
            auc = roc_auc(embedder.gathered(leads, n).numpy()[:, 0], positive)
            results.append(self.estimated(self.metric, auc, n, 50.0))
        return results

    def scored(self, embedder: Embedder, test_set: TestSet) -> Iterator[tuple[slice, torch.Tensor]]:
        """Collective, to its end. Yield places among this process's rows, and their scores, `(rows, classes)`."""
        score = self.classifier(embedder, test_set)
        for mine, embeds in embedder.image_batches(test_set.source):
            yield mine, score(embeds)

    def _any_label(self, embedder: Embedder, test_set: TestSet) -> list[Result]:
        label_sets, rows, hits = self._label_sets(test_set), embedder.rows(len(test_set)), 0
        for mine, scores in self.scored(embedder, test_set):
            nearest = scores.argmax(dim=1).tolist()
            hits += sum(best in label_sets[row] for row, best in zip(rows[mine], nearest, strict=True))
        sizes = [len(set(labels)) for labels in label_sets if labels]
        chance = 100.0 * sum(sizes) / len(sizes) / len(test_set.class_names())
        return [self.proportion("any_label", embedder.total([hits])[0], len(sizes), chance)]

    def _label_sets(self, test_set: TestSet) -> list[list[int]]:
        rows, count = read_list(self.data, str(self.labels), "class numbers"), len(TestSet.open(self.data))
        num_classes, file = len(test_set.class_names()), f"{self.data}/{self.labels}"
        if len(rows) != count or not any(rows):
            raise UserError(f"{file} has {len(rows)} lists; it must list the class numbers of each of {count} images")
        for number, row in enumerate(rows):
            if not isinstance(row, list) or any(type(c) is not int or not 0 <= c < num_classes for c in row):
                raise UserError(
                    f"{file} has {row!r:.80} for image {number}; expected a list of class numbers below {num_classes}"
                )
        return [rows[number] for number in test_set.row_numbers]


@dataclass(frozen=True)
class ZeroShotMultilabel(PromptedTask):
    """`map11`, over VOC 2007's eleven points, and `map`, CLIP_benchmark's plain mean average precision, in percent.

    `data` is laid out as for `zero_shot`, with `KEY.npy` in place of `KEY.cls`: an array with 1 for each class of the
    image, else 0. Every process holds the scores of all images and classes, 5 bytes each. `metric` is the headline.
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

    def evaluate(self, embedder: Embedder, test_set: TestSet) -> list[Result]:
        names, n = test_set.class_names(), len(test_set)
        labels = test_set.of_my_rows(embedder, partial(test_set.label_set, len(names)))
        score = self.classifier(embedder, test_set)
        scores = embedder.measured(test_set.source, lambda mine, embeds: score(embeds))
        my_labels = torch.from_numpy(np.array(labels, np.uint8).reshape(-1, len(names)))
        positive = embedder.gathered(my_labels, n).numpy().astype(bool)
        positives = positive.sum(axis=0)
        empty = [name for name, count in zip(names, positives, strict=True) if not count]
        if empty and embedder.accelerator.is_main_process:
            message = "%s: %d of %d classes have no image, such as %r; each counts as 0"
            _log.warning(message, self.name, len(empty), len(names), empty[0])
        chance = 100.0 * average_precision_chance(positives, n)
        eleven, plain = (mean_average_precision(scores, positive, points) for points in (True, False))
        return [
            self.estimated("map11", eleven, n, headline=self.metric == "map11"),
            self.estimated("map", plain, n, chance, headline=self.metric == "map"),
        ]


@dataclass(frozen=True)
class Classification(LabelledTask):
    """`top1`, `top5` (with five classes or more) and `mean_per_class` of classification shards, in percent.

    `data` has shards with `KEY.cls`, and `classnames.txt` with the head's classes. `metric` is the headline.
    """

    metric: Literal["top1", "mean_per_class"] = "top1"

    needs: ClassVar[str] = "head"
    protocol: ClassVar[str] = """Classification by the model's head: whole images, the short side resized to the model's
size and the centre cut out. Shares have Wilson intervals. The interval of the mean per class sums the class variances
and leaves out classes without images."""

    def check(self) -> None:
        super().check()
        TestSet.open(self.data).class_names()

    def evaluate(self, embedder: Embedder, test_set: TestSet) -> list[Result]:
        names, num_labels = test_set.class_names(), embedder.model.config.num_labels
        if len(names) != num_labels:
            raise UserError(
                f"{self.data} names {len(names)} classes, and the model's head has {num_labels}; use the test set of "
                "the head's classes"
            )
        check_learned_names(self.data, names, embedder)
        labels = test_set.labels(embedder, num_labels)
        hits = embedder.measured(test_set.source, lambda mine, logits: hits_by_class(logits, labels[mine]), "logits")
        return self.class_results(embedder, hits, names, self.metric)


def _check_prompts(prompts: list[str], where: str) -> None:
    for prompt in prompts:
        if "{c}" not in prompt:
            raise UserError(f"{where} has the prompt {prompt!r:.80}; each prompt must have {{c}} for the name")
