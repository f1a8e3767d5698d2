"""Decontaminated results: a task again without the test images that an audit found in the training data."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flipscale.data.samples import SampleNumbers
from flipscale.evaluation.embedding import ChosenRows, Embedder
from flipscale.evaluation.kinds.task import Scorer, StreamedTask, Task
from flipscale.evaluation.test_set import TestSet
from flipscale.io.errors import UserError
from flipscale.io.files import quoted, read_text

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decontaminated(StreamedTask):
    """A task without some of its images, called `NAME_clean`. Its images come in the same pass as the whole task's.

    Args:
        overlap: shard file name and number of each image to leave out.
    """

    whole: StreamedTask = field(kw_only=True)
    overlap: frozenset[tuple[str, int]] = field(kw_only=True)

    @property
    def made_by(self) -> dict[str, Any]:
        return {**self.whole.made_by, "without": f"{len(self.overlap):,} images that lie in the training data"}

    def arranged(self, test_set: TestSet) -> TestSet:
        """Return the test set with the overlap at its end. The other images then have the same row numbers as in a set
        without the overlap, so each process has its own rows of both."""
        if isinstance(test_set.source, ChosenRows):
            return test_set  # an earlier task of the same data arranged it
        source = test_set.source
        kept: list[int] = []
        left_out: list[int] = []
        for row, (shard, number) in enumerate(SampleNumbers(source)):
            name = source.shard_name(shard).rsplit("/", 1)[-1]
            (left_out if (name, number) in self.overlap else kept).append(row)
        if len(left_out) != len(self.overlap) or not kept:
            raise UserError(
                f"{self.data} has {len(left_out)} of the {len(self.overlap)} images that the audit found in the "
                f"training data, among {len(source)}; {'all are' if left_out else 'audit it again'}"
            )
        return replace(test_set, source=ChosenRows(source, np.array(kept + left_out)))

    def scorer(self, embedder: Embedder, test_set: TestSet) -> Scorer:
        count = len(test_set.source) - len(self.overlap)
        # This process has the same rows of both sets only if their batches have the same size.
        same_batches = replace(embedder, batches_of=len(test_set.source))
        kept_set = replace(test_set, source=ChosenRows(test_set.source, np.arange(count)))
        whole = self.whole.scorer(same_batches, kept_set)

        def add(mine: slice, rows: torch.Tensor, embeds: torch.Tensor) -> None:
            kept = rows < count
            whole.add(slice(mine.start, mine.start + int(kept.sum())), rows[kept], embeds[kept])

        return Scorer(add, lambda: [replace(one, task=self.name, made_by=self.made_by) for one in whole.results()])


def with_clean_tasks(tasks: Sequence[Task], audit: Path) -> list[Task]:
    """Return the tasks, each with its decontaminated form after it if its test set overlaps with the training data, by
    the folder that `flipscale prepare audit SHARDS --tests DIR` wrote."""
    audited: list[str] = []
    overlaps: dict[str, frozenset[tuple[str, int]]] = {}
    for file in sorted((audit / "overlap").glob("*.json")):
        try:
            content = json.loads(read_text(file))
            audited.append(str(content["test"]))
            overlap = ((str(image["shard"]), int(image["number"])) for image in content["overlap"])
            overlaps[content["contents"]] = frozenset(overlap)
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise UserError(f"{file} is not of flipscale prepare audit ({error!r}); audit again") from error
    if not audited:
        raise UserError(
            f"{audit} has no overlap/NAME.json; run: flipscale prepare audit SHARDS --tests DIR --output_dir "
            f"{quoted(audit)}"
        )
    all_tasks: list[Task] = []
    compared = 0
    for task in tasks:
        all_tasks.append(task)
        if not isinstance(task, StreamedTask):
            continue
        images = overlaps.get(TestSet.open(task.data).source.contents_digest())
        if images is None:
            continue
        compared += 1
        if images:
            shared = (task.data, f"{task.name}_clean", task.task, task.every_samples, task.image_size)
            all_tasks.append(Decontaminated(task.kind, *shared, whole=task, overlap=images))
        else:
            _log.warning("no image of %s lies in the training data, so %s has no second figure", task.data, task.name)
    if not compared:
        raise UserError(
            f"{audit} compared {', '.join(audited)} with the training data, but not "
            f"{', '.join(task.data for task in tasks)}; audit again with these in --tests"
        )
    return all_tasks
