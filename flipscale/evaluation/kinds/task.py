"""What every evaluation has: its data, its name and when it is due; and the one signature that they share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch

from flipscale.data.prepared import check_prepared
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.metrics import Estimate, wilson
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet
from flipscale.io.errors import UserError
from flipscale.io.options import Pixels, SamplesOrZero

_LACKS = {"texts": "no text tower", "head": "no head", "decoder": "no decoder", "answers": "no list of answers"}
# The first kind of task for what a model has.
_KINDS_FOR = {"head": "classification", "texts": "zero_shot", "decoder": "captioning", "answers": "vqa"}


@dataclass(frozen=True)
class Task(ABC):
    """An evaluation that a recipe lists. Each kind is a subclass whose own fields are the options that it takes.

    Args:
        kind: one of `flipscale.evaluation.kinds.kinds.KINDS`.
        data: the folder of the test set.
        name: what its results are called; the kind, where it is left out.
        task: the name of its page, for a task that has one; its data must then be prepared whole.
        every_samples: how often it runs while the model is trained, 0 only at the end; left out, `eval.every_samples`.
        image_size: the side in pixels of its images, a multiple of the patch; left out, the model's own. A patch has
            the position of the place that it shows, as in a stage of that size.
    """

    kind: str
    data: str
    name: str = ""
    task: str = ""
    every_samples: SamplesOrZero | None = None
    image_size: Pixels | None = None

    # What it takes of a model: images and texts compared (`texts`), the image tower alone (`features`), a `head`, or a
    # `decoder`.
    needs: ClassVar[str] = "texts"
    # For the model card: how it is done, the Hub's names of task and metric (left out: the kind and the metric), and
    # what of `made_by` belongs to the test's name (left out: all).
    protocol: ClassVar[str] = ""
    hub_task: ClassVar[str] = ""
    hub_metric: ClassVar[str] = ""
    hub_options: ClassVar[tuple[str, ...] | None] = None

    def check(self) -> None:
        """Raise if the test set is not there, before a run begins. Its manifest is written if there is none.

        Raises:
            ValueError: a file is missing.
            OSError: a shard at a URL cannot be fetched.
        """
        if self.task:
            check_prepared(Path(self.data), self.task)
        TestSet.open(self.data)

    def check_model(self, gives: Collection[str], whose: str) -> None:
        """Raise unless a model has what this task takes of it.

        Args:
            gives: what it has, see `parts_of`.
            whose: what has it, for the message.

        Raises:
            ValueError: it lacks that.
        """
        if self.needs not in gives:
            kind = next((kind for part, kind in _KINDS_FOR.items() if part in gives), "probe")
            raise UserError(
                f"{self.name} is of kind {self.kind!r}, and {whose} has {_LACKS[self.needs]}; use kind {kind}"
            )

    def prompts(self, test_set: TestSet) -> list[str]:
        """Return the prompts that class names are put into, `{c}` for the name; none where there are no classes."""
        return []

    def other_sets(self) -> list[TestSet]:
        """Return the sets that the results depend on beside the test set, such as one to learn from."""
        return []

    def truth(self, test_set: TestSet) -> Callable[[int, int], Any]:
        """Return what reads the right answer of a sample, by its shard and number; a `ValueError` if it has none."""
        return lambda shard, number: None

    @abstractmethod
    def evaluate(self, embedder: Embedder) -> list[Result]:
        """Collective. Return what the model of `embedder` achieves.

        Raises:
            ValueError: the test set is not as this kind needs it.
        """

    def proportion(self, metric: str, hits: int, n: int, chance: float | None = None, headline: bool = True) -> Result:
        """Return the result that `hits` of `n` queries were answered rightly, in percent with its Wilson interval."""
        return self.estimated(metric, Estimate(hits / n, *wilson(hits, n)), n, chance, headline)

    def estimated(
        self, metric: str, estimate: Estimate, n: int, chance: float | None = None, headline: bool = True
    ) -> Result:
        """Return the result that `n` queries gave an estimate, in percent."""
        return Result(
            *(self.name, self.kind, metric, 100.0 * estimate.value, n, 100.0 * estimate.low, 100.0 * estimate.high),
            chance=chance,
            headline=headline,
            made_by=self.made_by,
        )

    @property
    def made_by(self) -> dict[str, Any]:
        """What the results depend on: the data, the image size if it has one of its own, and the options that are not
        at their defaults."""
        size = {} if self.image_size is None else {"image_size": self.image_size}
        options = [option for option in fields(self) if option.name not in {known.name for known in fields(Task)}]
        given = {option.name: getattr(self, option.name) for option in options}
        return {"data": self.data, **size, **{o.name: given[o.name] for o in options if given[o.name] != _default(o)}}


class Scorer(ABC):
    """Takes the embeddings of a test set's images as they come, and has the results when all have come."""

    @abstractmethod
    def add(self, rows: torch.Tensor, embeds: torch.Tensor) -> None:
        """Take some of this process's rows, int64 `(rows,)`, with their embeddings, fp32 `(rows, dim)` of unit length,
        CPU. They come in the order of `Embedder.rows`, each once; there may be none in a call. Not collective."""

    @abstractmethod
    def results(self) -> list[Result]:
        """Collective. Return what the model achieves, once all rows were added."""


class StreamedTask(Task):
    """A task that sees each image's embedding once, a batch at a time. Tasks of the same data share one pass over its
    images (`evaluate_together`)."""

    @abstractmethod
    def scorer(self, embedder: Embedder, test_set: TestSet) -> Scorer:
        """Collective. Return what takes the images, its texts embedded and its labels read.

        Raises:
            ValueError: the test set is not as this kind needs it.
        """

    def arranged(self, test_set: TestSet) -> TestSet:
        """Return the test set in the order in which this task needs its images; other tasks take any."""
        return test_set

    def evaluate(self, embedder: Embedder) -> list[Result]:
        return evaluate_together(embedder, [self])[0]


def evaluate_together(embedder: Embedder, tasks: Sequence[StreamedTask]) -> list[list[Result]]:
    """Collective. Return the results of each of several tasks of the same data, whose images are read once for all.

    Raises:
        ValueError: the test set is not as a task needs it, or an image cannot be decoded.
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


def _default(option: Field) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()
