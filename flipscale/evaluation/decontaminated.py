"""Decontaminated results: a task again without the test images that an audit found in the training data."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from flipscale.data.samples import SampleNumbers
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet
from flipscale.evaluation.whole_images import ChosenRows
from flipscale.io.errors import UserError
from flipscale.io.paths import quoted, read_text

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decontaminated(Task):
    """A task without some of its images, called `NAME_clean`. The embeddings come from the whole task's pass.

    Args:
        overlap: shard file name and number of each image to leave out.
    """

    whole: Task = field(kw_only=True)
    overlap: frozenset[tuple[str, int]] = field(kw_only=True)

    @property
    def made_by(self) -> dict[str, Any]:
        return {**self.whole.made_by, "without": f"{len(self.overlap):,} images that lie in the training data"}

    def prompts(self, test_set: TestSet) -> list[str]:
        return self.whole.prompts(test_set)

    def other_sets(self) -> list[TestSet]:
        return self.whole.other_sets()

    def contents(self) -> list[Any]:
        return [*sorted(self.overlap), *self.whole.contents()]

    def evaluate(self, embedder: Embedder, test_set: TestSet) -> list[Result]:
        rows = self.other_rows(test_set.source)
        clean_set = replace(test_set, source=ChosenRows(test_set.source, rows))
        embeds = embedder.images(test_set.source)[rows]
        mine = [(batch, embeds[batch.start : batch.stop]) for batch, _ in embedder.share(len(rows)).rounds()]
        known = replace(embedder, kept={(clean_set.source, "embeds"): mine})
        return [replace(one, task=self.name, made_by=self.made_by) for one in self.whole.evaluate(known, clean_set)]

    def other_rows(self, source: TarSource) -> np.ndarray:
        """Return the rows of the images that are not in the training data, int64 `(rows,)`."""
        names = [source.shard_name(shard).rsplit("/", 1)[-1] for shard in range(len(source.shard_sizes))]
        is_left_out = np.array([(names[shard], number) in self.overlap for shard, number in SampleNumbers(source)])
        count = int(is_left_out.sum())
        if count != len(self.overlap) or count == len(is_left_out):
            raise UserError(
                f"{self.data} has {count} of the {len(self.overlap)} images that the audit found in the "
                f"training data, among {len(source)}; {'all are' if count else 'audit it again'}"
            )
        return np.flatnonzero(~is_left_out)


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
        if task.needs != "texts":
            continue  # only embeddings and prompts give a second figure without a second pass
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
