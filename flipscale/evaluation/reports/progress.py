"""The progress bar of a suite: how many of its images are embedded, and which task is going on."""

import dataclasses
from collections.abc import Sequence
from types import TracebackType

from tqdm import tqdm

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.test_set import TestSet


class SuiteBar:
    """Shows, on the main process and if it is at a terminal, how far a model's evaluation has come.

    Tasks of the same data and image size that follow each other share a pass over its images, which count once.

    Args:
        embedder: whose images are counted, if they are embedded by this bar's `embedder`.
        name: what tables call the model.
        tasks: those that are to be done, in their order.
    """

    def __init__(self, embedder: Embedder, name: str, tasks: Sequence[Task]):
        self.embedder = dataclasses.replace(embedder, progress=self._seen)
        self._name, self._tasks = name, tasks
        self._ends = _images_after(tasks) if embedder.accelerator.is_main_process else [0] * len(tasks)
        self._bar = tqdm(
            total=self._ends[-1],
            desc=self._said(0),
            unit=" images",
            leave=False,
            disable=None if embedder.accelerator.is_main_process else True,
        )

    def finish(self, number: int) -> None:
        """Note that a task has ended."""
        self._bar.update(self._ends[number] - self._bar.n)
        if number + 1 < len(self._tasks):
            self._bar.set_description(self._said(number + 1))

    def __enter__(self) -> "SuiteBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def _seen(self, images: int) -> None:
        self._bar.update(images)

    def _said(self, number: int) -> str:
        return f"{self._name}: {self._tasks[number].name} ({number + 1} of {len(self._tasks)})"


def _images_after(tasks: Sequence[Task]) -> list[int]:
    """Return how many images are embedded when each task has ended."""
    ends, total, seen = [], 0, None
    for task in tasks:
        if (task.data, task.image_size) != seen:
            total, seen = total + len(TestSet.open(task.data).source), (task.data, task.image_size)
        ends.append(total)
    return ends
