"""An evaluation again without the images that an audit found in the training data."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.images import ChosenRows, SampleNumbers
from flipscale.evaluation.kinds.task import Scorer, StreamedTask, Task
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet
from flipscale.io.errors import UserError
from flipscale.io.files import read_text

SUFFIX = "_clean"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Without(StreamedTask):
    """A task again without some of its images, called `NAME_clean`; its images come in the same pass as the task's.

    Args:
        whole: the task.
        left_out: file name of the shard and number in it, of each image that is left out.
    """

    whole: StreamedTask | None = None
    left_out: frozenset[tuple[str, int]] = frozenset()

    @classmethod
    def of(cls, task: StreamedTask, left_out: frozenset[tuple[str, int]]) -> "Without":
        """Return the task without these images."""
        return cls(
            task.kind, task.data, task.name + SUFFIX, task.task, task.every_samples, task.image_size, task, left_out
        )

    @property
    def made_by(self) -> dict[str, Any]:
        assert self.whole is not None
        return {**self.whole.made_by, "without": f"{len(self.left_out):,} images that lie in the training data"}

    def arranged(self, test_set: TestSet) -> TestSet:
        """Return the test set with the images that are left out at its end. The others then have the same numbers as in
        a set without them, so each process has its own rows of both."""
        if isinstance(test_set.source, ChosenRows):
            return test_set  # a task before this one has done it
        source = test_set.source
        kept: list[int] = []
        left: list[int] = []
        for row, (shard, number) in enumerate(SampleNumbers(source)):
            name = source.shard_name(shard).rsplit("/", 1)[-1]
            (left if (name, number) in self.left_out else kept).append(row)
        if len(left) != len(self.left_out) or not kept:
            raise UserError(
                f"{len(left)} of the {len(self.left_out)} images that the audit found in the training data are among "
                f"the {len(source)} of {self.data}; {'all are' if left else 'audit it again'}"
            )
        return replace(test_set, source=ChosenRows(source, np.array(kept + left)))

    def scorer(self, embedder: Embedder, test_set: TestSet) -> "WithoutScorer":
        assert self.whole is not None
        count = len(test_set.source) - len(self.left_out)
        some = replace(test_set, source=ChosenRows(test_set.source, np.arange(count)))
        return WithoutScorer(self, self.whole.scorer(embedder, some), count)


class WithoutScorer(Scorer):
    """Hands on the first `count` rows."""

    def __init__(self, task: Without, scorer: Scorer, count: int):
        self._task, self._scorer, self._count = task, scorer, count

    def add(self, rows: torch.Tensor, embeds: torch.Tensor) -> None:
        kept = rows < self._count
        self._scorer.add(rows[kept], embeds[kept])

    def results(self) -> list[Result]:
        return [replace(found, task=self._task.name, made_by=self._task.made_by) for found in self._scorer.results()]


def with_clean_tasks(tasks: Sequence[Task], audit: Path) -> list[Task]:
    """Return the tasks, and after each whose test set overlaps with the training data the same without the overlap.

    Args:
        audit: what `flipscale prepare audit SHARDS --tests DIR` wrote of the training data.

    Raises:
        ValueError: it compared none of the tasks' test sets with the training data.
    """
    files = [_read(file) for file in sorted((audit / "overlap").glob("*.json"))]
    if not files:
        raise UserError(
            f"{audit} has no overlap/NAME.json; run: flipscale prepare audit SHARDS --tests DIR --output_dir {audit}"
        )
    by_contents = {file["contents"]: file for file in files}
    found: list[Task] = []
    compared = 0
    for task in tasks:
        found.append(task)
        contents = TestSet.open(task.data).source.contents_digest() if isinstance(task, StreamedTask) else None
        if not isinstance(task, StreamedTask) or contents not in by_contents:
            continue
        compared += 1
        left_out = frozenset((one["shard"], one["number"]) for one in by_contents[contents]["overlap"])
        if left_out:
            found.append(Without.of(task, left_out))
        else:
            _log.warning("no image of %s lies in the training data, so %s has no second figure", task.data, task.name)
    if not compared:
        raise UserError(
            f"{audit} compared {', '.join(file['test'] for file in files)} with the training data and none of "
            f"{', '.join(task.data for task in tasks)}; audit again with these in --tests"
        )
    return found


def _read(file: Path) -> dict[str, Any]:
    """Return what an audit says of a test set: its name, a digest of its contents, and which images lie in the data.

    Raises:
        ValueError: it is no such file.
    """
    try:
        said = json.loads(read_text(file))
        images = [{"shard": str(one["shard"]), "number": int(one["number"])} for one in said["overlap"]]
        return {"test": str(said["test"]), "contents": str(said["contents"]), "overlap": images}
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{file} is not of flipscale prepare audit ({error!r}); audit again") from error
