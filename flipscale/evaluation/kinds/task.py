"""The task: an evaluation that a recipe lists, with its data, its options and the one signature of all kinds."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from flipscale.data.task_page import check_prepared
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.intervals import Estimate, wilson
from flipscale.evaluation.metrics import hits_at, mean_per_class
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet
from flipscale.io.errors import UserError
from flipscale.io.options import Pixels, SamplesOrZero

_LACKS = {"texts": "no text tower", "head": "no head", "decoder": "no decoder", "answers": "no list of answers"}
# The kind to suggest for each part that a model may have, the best suggestion first.
_KINDS_FOR = {"head": "classification", "texts": "zero_shot", "decoder": "captioning", "answers": "vqa"}

# 1 for each query that is answered right, `(queries,)`; None if unknown.
Answers = np.ndarray | None

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task(ABC):
    """An evaluation that a recipe lists. Each kind is a subclass; the fields of the subclass are the kind's options.

    Args:
        kind: a key of `flipscale.evaluation.suite.KINDS`.
        task: name of the task's page, for data that `flipscale prepare tasks` wrote.
        every_samples: training samples between two runs, 0 for the end only; `eval.every_samples` by default.
        image_size: pixels along each side of an image, a multiple of the patch; the model's size by default.
    """

    kind: str
    data: str
    name: str = ""
    task: str = ""
    every_samples: SamplesOrZero | None = None
    image_size: Pixels | None = None

    # Part of a model that the task needs: `texts`, `features` (the image tower alone), `head`, `decoder` or `answers`.
    needs: ClassVar[str] = "texts"
    # For the model card: the protocol, and the Hub's names of task and metric, by default the kind and the metric. The
    # options in `hub_options` belong to the test's name, by default all.
    protocol: ClassVar[str] = ""
    hub_task: ClassVar[str] = ""
    hub_metric: ClassVar[str] = ""
    hub_options: ClassVar[tuple[str, ...] | None] = None

    def check(self) -> None:
        """Raise before a run begins if the test set is missing. Write its manifest if there is none."""
        if self.task:
            check_prepared(Path(self.data), self.task)
        TestSet.open(self.data)

    def check_model(self, parts: Collection[str], model: str) -> None:
        """Raise unless the model has the part that this task needs."""
        if self.needs not in parts:
            kind = next((kind for part, kind in _KINDS_FOR.items() if part in parts), "probe")
            raise UserError(f"{self.name} is of kind {self.kind!r}; {model} has {_LACKS[self.needs]}; use kind {kind}")

    def prompts(self, test_set: TestSet) -> list[str]:
        """Return the prompts, `{c}` for the class name; an empty list for kinds without classes."""
        return []

    def other_sets(self) -> list[TestSet]:
        """Return the sets that the results depend on beside the test set, such as training images."""
        return []

    def truth(self, test_set: TestSet) -> Callable[[int, int], Any]:
        """Return a function that reads the right answer of sample (shard, number) and raises UserError without one."""
        return lambda shard, number: None

    @abstractmethod
    def evaluate(self, embedder: Embedder) -> list[Result]:
        """Collective. Return the results of the embedder's model."""

    def proportion(
        self, metric: str, hits: int, n: int, chance: float | None = None, headline: bool = True, right: Answers = None
    ) -> Result:
        """Return the share of `hits` among `n` queries in percent, with its Wilson interval.

        The answers are for comparisons in pairs."""
        outcomes = "" if right is None else np.packbits(right != 0).tobytes().hex()
        return self.estimated(metric, Estimate(hits / n, *wilson(hits, n)), n, chance, headline, outcomes=outcomes)

    def estimated(
        self, metric: str, estimate: Estimate, n: int, chance: float | None = None, headline: bool = True, **shown: str
    ) -> Result:
        """Return 100 times the estimate; `shown` are its unit and label, if not `%` and the metric's name."""
        value, low, high = (100.0 * part for part in estimate)
        about: dict[str, Any] = {"chance": chance, "headline": headline, "made_by": self.made_by, **shown}
        return Result(self.name, self.kind, metric, value, n, low, high, **about)

    @property
    def made_by(self) -> dict[str, Any]:
        """Everything that the results depend on: the data, the task's image size, and options that are not defaults."""
        size = {} if self.image_size is None else {"image_size": self.image_size}
        default, shared = type(self)(self.kind, self.data), {field.name for field in fields(Task)}
        names = [option.name for option in fields(self) if option.name not in shared]
        options = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(default, name)}
        return {"data": self.data, **size, **options}


class Scorer(NamedTuple):
    """Takes a test set's image embeddings batch by batch and computes the results at the end.

    Args:
        add: adds a batch of this process: its place among this process's rows, the row numbers, int64 `(rows,)`, and
            the embeddings, fp32 `(rows, dim)` of unit length, CPU. A batch may be empty. Not collective.
        results: collective; returns the results, after all rows were added.
    """

    add: Callable[[slice, torch.Tensor, torch.Tensor], None]
    results: Callable[[], list[Result]]


class LabelledTask(Task):
    """A task of images with class numbers, `KEY.cls`."""

    hub_task: ClassVar[str] = "image-classification"
    hub_metric: ClassVar[str] = "accuracy"

    def truth(self, test_set: TestSet) -> Callable[[int, int], Any]:
        return partial(test_set.label, len(test_set.class_names()))


class StreamedTask(Task):
    """A task that needs each image embedding once, batch by batch. Tasks on the same data share one pass over it."""

    @abstractmethod
    def scorer(self, embedder: Embedder, test_set: TestSet) -> Scorer:
        """Collective. Embed the texts, read the labels, and return the scorer."""

    def arranged(self, test_set: TestSet) -> TestSet:
        """Return the test set in the order that this task needs; any order by default."""
        return test_set

    def evaluate(self, embedder: Embedder) -> list[Result]:
        return evaluate_together(embedder, [self])[0]


def evaluate_together(embedder: Embedder, tasks: Sequence[StreamedTask]) -> list[list[Result]]:
    """Collective. Return the results of each of several tasks on the same data. The images are read once."""
    test_set = TestSet.open(tasks[0].data)
    for task in tasks:
        test_set = task.arranged(test_set)
    scorers = [task.scorer(embedder, test_set) for task in tasks]
    seen = 0
    for rows, embeds in embedder.image_batches(test_set.source):
        mine = slice(seen, seen + len(rows))
        seen = mine.stop
        for scorer in scorers:
            scorer.add(mine, rows, embeds)
    return [scorer.results() for scorer in scorers]


class ClassHits:
    """Counts this process's images whose class is the best, or among the five best, by class.

    Args:
        count: number of rows that the embedder shares out; None if the labels are of a part of them, whose outcomes
            cannot be gathered.
    """

    def __init__(
        self, task: Task, embedder: Embedder, labels: torch.Tensor, class_names: Sequence[str], count: int | None
    ):
        self._task, self._embedder, self._labels, self._names = task, embedder, labels, class_names
        self._count, self._best = count, torch.zeros(len(labels), dtype=torch.uint8)
        self._ks = [1, 5] if len(class_names) >= 5 else [1]
        self._hits = torch.zeros(len(self._ks), dtype=torch.int64)
        self._right = torch.zeros(len(class_names), dtype=torch.int64)
        self._seen = 0

    def add(self, scores: torch.Tensor) -> None:
        """Count the next rows by their scores, `(rows, classes)` on the CPU."""
        labels = self._labels[self._seen : self._seen + len(scores)]
        hits = hits_at(scores, labels, self._ks)
        self._hits += hits.sum(dim=0)
        self._right += torch.bincount(labels[scores.argmax(dim=1) == labels], minlength=len(self._right))
        self._best[self._seen : self._seen + len(scores)] = hits[:, 0]
        self._seen += len(scores)

    def totals(self) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Collective. Return the hits at 1 (and 5), then the hits and the images of each class, int64 `(classes,)`."""
        images = torch.bincount(self._labels, minlength=len(self._right))
        sums = np.array(self._embedder.total([*self._hits.tolist(), *self._right.tolist(), *images.tolist()]))
        return sums[: len(self._ks)].tolist(), *np.split(sums[len(self._ks) :], 2)

    def results(self, metric: str) -> list[Result]:
        """Collective. Return `top1`, `top5` (with five classes or more) and `mean_per_class`.

        `metric` is the headline; `top1` makes `top5` a headline too, if there are more than five classes.
        """
        task, (hits, right, counts) = self._task, self.totals()
        empty = np.flatnonzero(counts == 0)
        if len(empty) and self._embedder.accelerator.is_main_process:
            message = "%s: %d of %d classes have no image, such as %r; the mean per class leaves them out"
            _log.warning(message, task.name, len(empty), len(counts), self._names[empty[0]])
        n, chance = int(counts.sum()), 100.0 / len(counts)
        answers = None if self._count is None else self._embedder.gathered(self._best, self._count).numpy()
        results = [task.proportion("top1", hits[0], n, chance, metric == "top1", answers)]
        for top5 in hits[1:]:
            is_headline = metric in ("top1", "top5") and len(counts) > 5
            results.append(task.proportion("top5", top5, n, 5 * chance, headline=is_headline))
        mean = mean_per_class(right, counts)
        results.append(task.estimated("mean_per_class", mean, n, chance, headline=metric == "mean_per_class"))
        return results
