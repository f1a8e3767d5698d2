"""The task: an evaluation that a recipe lists, with its data, its options and the one signature of all kinds."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from flipscale.data.prepared import check_prepared
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

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task(ABC):
    """An evaluation that a recipe lists. Each kind is a subclass; the fields of the subclass are the kind's options.

    Args:
        kind: a key of `flipscale.evaluation.suite.KINDS`.
        data: folder or URL of the test set.
        name: name of the results; the kind by default.
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
        """Raise before a run begins if the test set is missing. Write its manifest if there is none.

        Raises:
            UserError: a file is missing.
            OSError: a shard at a URL cannot be fetched.
        """
        if self.task:
            check_prepared(Path(self.data), self.task)
        TestSet.open(self.data)

    def check_model(self, parts: Collection[str], model: str) -> None:
        """Raise unless the model has the part that this task needs.

        Args:
            parts: parts of the model, see `parts_of`.
            model: name of the model, for the message.

        Raises:
            UserError: the part is missing.
        """
        if self.needs not in parts:
            kind = next((kind for part, kind in _KINDS_FOR.items() if part in parts), "probe")
            raise UserError(
                f"{self.name} is of kind {self.kind!r}, and {model} has {_LACKS[self.needs]}; use kind {kind}"
            )

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
        """Collective. Return the results of the embedder's model.

        Raises:
            UserError: the test set does not have what this kind needs.
        """

    def proportion(self, metric: str, hits: int, n: int, chance: float | None = None, headline: bool = True) -> Result:
        """Return the share of `hits` among `n` queries in percent, with its Wilson interval."""
        return self.estimated(metric, Estimate(hits / n, *wilson(hits, n)), n, chance, headline)

    def estimated(
        self, metric: str, estimate: Estimate, n: int, chance: float | None = None, headline: bool = True
    ) -> Result:
        """Return an estimate from `n` queries in percent."""
        return Result(
            *(self.name, self.kind, metric, 100.0 * estimate.value, n, 100.0 * estimate.low, 100.0 * estimate.high),
            chance=chance,
            headline=headline,
            made_by=self.made_by,
        )

    @property
    def made_by(self) -> dict[str, Any]:
        """Everything that the results depend on: the data, the task's image size, and options that are not defaults."""
        size = {} if self.image_size is None else {"image_size": self.image_size}
        shared = {field.name for field in fields(Task)}
        options = {
            option.name: getattr(self, option.name)
            for option in fields(self)
            if option.name not in shared and getattr(self, option.name) != _default(option)
        }
        return {"data": self.data, **size, **options}


class Scorer(ABC):
    """Takes a test set's image embeddings batch by batch and computes the results at the end."""

    @abstractmethod
    def add(self, rows: torch.Tensor, embeds: torch.Tensor) -> None:
        """Add a batch of this process. Batches come in the order of `Embedder.rows`, each row once. Not collective.

        Args:
            rows: row numbers, int64 `(rows,)`; may be empty.
            embeds: their embeddings, fp32 `(rows, dim)` of unit length, CPU.
        """

    @abstractmethod
    def results(self) -> list[Result]:
        """Collective. Return the results, after all rows were added."""


class StreamedTask(Task):
    """A task that needs each image embedding once, batch by batch. Tasks on the same data share one pass over it."""

    @abstractmethod
    def scorer(self, embedder: Embedder, test_set: TestSet) -> Scorer:
        """Collective. Embed the texts, read the labels, and return the scorer.

        Raises:
            UserError: the test set does not have what this kind needs.
        """

    def arranged(self, test_set: TestSet) -> TestSet:
        """Return the test set in the order that this task needs; any order by default."""
        return test_set

    def evaluate(self, embedder: Embedder) -> list[Result]:
        return evaluate_together(embedder, [self])[0]


def evaluate_together(embedder: Embedder, tasks: Sequence[StreamedTask]) -> list[list[Result]]:
    """Collective. Return the results of each of several tasks on the same data. The images are read once.

    Raises:
        UserError: the test set does not have what a task needs, or an image cannot be decoded.
        OSError: a shard cannot be read, or a worker died.
    """
    test_set = TestSet.open(tasks[0].data)
    for task in tasks:
        test_set = task.arranged(test_set)
    scorers = [task.scorer(embedder, test_set) for task in tasks]
    for rows, embeds in embedder.image_batches(test_set.source):
        for scorer in scorers:
            scorer.add(rows, embeds)
    return [scorer.results() for scorer in scorers]


class ClassHits:
    """Counts this process's images whose class is the best, or among the five best, by class.

    Args:
        task: the task, for names and options.
        embedder: the embedder, for sums over the processes.
        labels: class of each row of this process, int64 `(rows,)`, in the order of `add`.
        class_names: names of all classes.
    """

    def __init__(self, task: Task, embedder: Embedder, labels: torch.Tensor, class_names: Sequence[str]):
        self._task, self._embedder, self.labels, self._names = task, embedder, labels, class_names
        self._ks = [1, 5] if len(class_names) >= 5 else [1]
        self._hits = torch.zeros(len(self._ks), dtype=torch.int64)
        self._right = torch.zeros(len(class_names), dtype=torch.int64)
        self.seen = 0

    def add(self, scores: torch.Tensor) -> torch.Tensor:
        """Count the next rows by their scores, `(rows, classes)` on the CPU, and return their labels."""
        labels = self.labels[self.seen : self.seen + len(scores)]
        self._hits += hits_at(scores, labels, self._ks).sum(dim=0)
        self._right += torch.bincount(labels[scores.argmax(dim=1) == labels], minlength=len(self._right))
        self.seen += len(scores)
        return labels

    def totals(self) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Collective. Return the hits at 1 (and 5), then the hits and the images of each class, int64 `(classes,)`."""
        images = torch.bincount(self.labels, minlength=len(self._right))
        sums = np.array(self._embedder.total([*self._hits.tolist(), *self._right.tolist(), *images.tolist()]))
        return sums[: len(self._ks)].tolist(), *np.split(sums[len(self._ks) :], 2)

    def results(self, metric: str) -> tuple[list[Result], list[int]]:
        """Collective. Return `top1`, `top5` (with five classes or more) and `mean_per_class`, and the hits at 1 and 5.

        Args:
            metric: the headline; `top1` makes `top5` a headline too.
        """
        task, (hits, right, counts) = self._task, self.totals()
        empty = np.flatnonzero(counts == 0)
        if len(empty) and self._embedder.accelerator.is_main_process:
            _log.warning(
                "%s: %d of %d classes have no image, such as %r; the mean per class leaves them out",
                *(task.name, len(empty), len(counts), self._names[empty[0]]),
            )
        n, chance = int(counts.sum()), 100.0 / len(counts)
        results = [task.proportion("top1", hits[0], n, chance, headline=metric == "top1")]
        for top5 in hits[1:]:
            results.append(task.proportion("top5", top5, n, 5 * chance, headline=metric in ("top1", "top5")))
        mean = mean_per_class(right, counts)
        results.append(task.estimated("mean_per_class", mean, n, chance, headline=metric == "mean_per_class"))
        return results, hits


def _default(option: "Field[Any]") -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()
