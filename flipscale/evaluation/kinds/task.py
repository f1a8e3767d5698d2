"""The task: an evaluation that a recipe lists, with its data, its options and the one signature of all kinds."""

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.intervals import Estimate, wilson
from flipscale.evaluation.metrics import mean_per_class
from flipscale.evaluation.results import Result
from flipscale.evaluation.task_page import check_prepared
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
        """Return the sets that the results depend on besides the test set, such as training images."""
        return []

    def contents(self) -> list[Any]:
        """Return JSON values that the results depend on besides shards, class names, prompts and options."""
        return []

    def truth(self, test_set: TestSet) -> Callable[[int, int], Any]:
        """Return a function that reads the right answer of sample (shard, number) and raises UserError without one."""
        return lambda shard, number: None

    def digest(self, test_set: TestSet, contents: str) -> str:
        """Return a digest of what makes two tests one: the `contents` of the set, prompts, options and other sets."""
        places = ("data", "train", "validation", "memory", "templates")  # their contents count
        options = {name: value for name, value in self.made_by.items() if name not in places}
        others = [one.source.contents_digest(in_order=True) for one in self.other_sets()]
        content = [self.kind, contents, self.prompts(test_set), options, others, self.contents()]
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()

    @abstractmethod
    def evaluate(self, embedder: Embedder, test_set: TestSet) -> list[Result]:
        """Collective. Return the results of the embedder's model.

        Args:
            test_set: the images of `data`; some of them, if the others are in the training data.
        """

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


class LabelledTask(Task):
    """A task of images with class numbers, `KEY.cls`."""

    hub_task: ClassVar[str] = "image-classification"
    hub_metric: ClassVar[str] = "accuracy"

    def truth(self, test_set: TestSet) -> Callable[[int, int], Any]:
        return partial(test_set.label, len(test_set.class_names()))

    def class_results(self, embedder: Embedder, hits: np.ndarray, class_names: list[str], metric: str) -> list[Result]:
        """Return `top1`, `top5` (with five classes or more) and `mean_per_class`.

        Args:
            hits: `hits_by_class` of all images, with label -1 for images to leave out.
            metric: the headline; `top1` makes `top5` a headline too, if there are more than five classes.
        """
        labels, best, top1, top5 = hits[hits[:, 0] >= 0].T
        num_classes, n = len(class_names), len(labels)
        counts = np.bincount(labels, minlength=num_classes)
        empty = np.flatnonzero(counts == 0)
        if len(empty) and embedder.accelerator.is_main_process:
            message = "%s: %d of %d classes have no image, such as %r; the mean per class leaves them out"
            _log.warning(message, self.name, len(empty), num_classes, class_names[empty[0]])
        chance = 100.0 / num_classes
        results = [self.proportion("top1", int(top1.sum()), n, chance, metric == "top1", top1)]
        if num_classes >= 5:
            headline = metric in ("top1", "top5") and num_classes > 5
            results.append(self.proportion("top5", int(top5.sum()), n, 5 * chance, headline))
        mean = mean_per_class(np.bincount(labels[best == 1], minlength=num_classes), counts)
        return [*results, self.estimated("mean_per_class", mean, n, chance, metric == "mean_per_class")]


def check_learned_names(data: str, names: list[str], embedder: Embedder) -> None:
    """Raise UserError unless a test set has the names of the model's head in its order, if the model's folder has
    names."""
    learned = [*embedder.model.config.id2label.values()]
    if len(learned) != len(names) or learned == [f"LABEL_{number}" for number in range(len(names))]:
        return
    for number, (ours, its) in enumerate(zip(names, learned, strict=True)):
        if ours != its:
            raise UserError(
                f"{data} names class {number} {ours!r}, and the model's head {its!r}; use a test set with the head's "
                "classes in their order"
            )
